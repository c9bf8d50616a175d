//! Statistics of measurements: medians, percentiles, and the ratio of two contenders.
//!
//! Owns all arithmetic of the benchmark; `tests/it/benchmark.rs` tests it. Does not know what was measured.

/// Measurements of one round, ascending.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Samples(Vec<f64>);

impl Samples {
    pub fn new(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self(values)
    }

    /// The samples of several clients together.
    pub fn join(all: impl IntoIterator<Item = Self>) -> Self {
        Self::new(all.into_iter().flat_map(|samples| samples.0).collect())
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns the quantile `q` by nearest rank; NaN if there are no samples.
    pub fn quantile(&self, q: f64) -> f64 {
        let rank = (q * self.0.len() as f64).ceil() as usize;
        self.0.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
    }

    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    pub fn p99(&self) -> f64 {
        self.quantile(0.99)
    }
}

/// Measurements of one contender, round by round.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rounds(Vec<Samples>);

impl Rounds {
    pub fn push(&mut self, round: Samples) {
        self.0.push(round);
    }

    /// The samples of all rounds together.
    pub fn all(&self) -> Samples {
        Samples::join(self.0.iter().cloned())
    }

    /// Returns the median over all rounds of this contender's figure divided by the other's. Both are measured right
    /// after each other in a round, so that other load on the machine affects both.
    pub fn ratio(&self, other: &Self, figure: impl Fn(&Samples) -> f64) -> f64 {
        let ratios = self.0.iter().zip(&other.0).map(|(ours, theirs)| figure(ours) / figure(theirs));
        Samples::new(ratios.filter(|ratio| ratio.is_finite()).collect()).median()
    }

    /// Returns the median over all rounds of the difference between this contender's figure and the other's.
    pub fn difference(&self, other: &Self, figure: impl Fn(&Samples) -> f64) -> f64 {
        let differences = self.0.iter().zip(&other.0).map(|(ours, theirs)| figure(ours) - figure(theirs));
        Samples::new(differences.filter(|it| it.is_finite()).collect()).median()
    }
}
