//! The pauses between attempts.
//!
//! Owns how they grow, their bounds and their jitter. Does not know what is attempted, or when to give up.

use std::ops::RangeInclusive;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Doubles the pause with each attempt, up to a longest one.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    pauses: RangeInclusive<Duration>,
    next: Duration,
}

impl Backoff {
    /// `pauses`: the first and the longest one.
    pub(crate) fn new(pauses: RangeInclusive<Duration>) -> Self {
        Self { next: *pauses.start(), pauses }
    }

    /// Returns the pause before the next attempt: between half and one and a half of its nominal length, so that
    /// many nodes that lost the same server do not come back at the same time.
    pub(crate) fn next(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(*self.pauses.end());
        pause.mul_f64(0.5 + fraction())
    }

    /// Starts again with the first pause.
    pub(crate) fn reset(&mut self) {
        self.next = *self.pauses.start();
    }
}

/// Returns a number from 0 to 1 that differs between calls and machines: the nanoseconds of the clock.
fn fraction() -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    f64::from(now.subsec_nanos() % 1_000_000) / 1_000_000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest() {
        let [first, longest] = [100, 1000].map(Duration::from_millis);
        let mut backoff = Backoff::new(first..=longest);
        for nominal in [100, 200, 400, 800, 1000, 1000] {
            let pause = backoff.next();
            let nominal = Duration::from_millis(nominal);
            assert!(pause >= nominal / 2 && pause <= nominal * 3 / 2, "{pause:?} around {nominal:?}");
        }
        backoff.reset();
        assert!(backoff.next() <= first * 3 / 2);
    }
}
