//! CPU numbers and sets of CPUs in the kernel's list format (cpuset(7), "List format").
//!
//! Owns parsing, printing and set algebra, all bounded by [`CpuId::MAX`]. Does not know which CPUs a machine has, or what a
//! set is used for.
//!
//! Longer than 400 lines because half of it is the tests of one type.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

/// A logical CPU, identified by the kernel's number (`CPU` in lscpu, not `Core`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CpuId(u16);

impl CpuId {
    /// The highest number that a Linux configuration allows: `NR_CPUS` is at most 8192 on every architecture.
    pub const MAX: u16 = 8191;

    /// The CPU with this number, or `None` beyond [`CpuId::MAX`].
    #[must_use]
    pub const fn new(number: u32) -> Option<Self> {
        if number <= Self::MAX as u32 { Some(Self(number as u16)) } else { None }
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0 as u32
    }
}

impl fmt::Display for CpuId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A set of CPUs.
///
/// Its text is the kernel's list format, which [`fmt::Display`] writes in its canonical form: ascending,
/// ranges folded.
///
/// ```
/// use kcm_mount::model::cpuset::CpuSet;
/// let set: CpuSet = "10,8-9,0-2".parse()?;
/// assert_eq!(set.to_string(), "0-2,8-10");
/// assert_eq!(set.len(), 6);
/// # Ok::<(), kcm_mount::model::cpuset::ParseCpuSetError>(())
/// ```
#[derive(Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CpuSet {
    /// Bit `n % 64` of word `n / 64`. Never ends in a zero word, so that equal sets are equal vectors.
    /// As small as a vector, without a heap allocation up to 128 CPUs.
    words: SmallVec<[u64; 2]>,
}

/// Why a text is not a CPU list.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseCpuSetError {
    /// The text, or a part of it between two commas, is empty.
    #[error("an empty part")]
    Empty,
    /// A part is neither a number nor a range.
    #[error("{0:?} is neither a number nor a range")]
    NotANumber(String),
    /// A range whose end lies before its start.
    #[error("the range {0}-{1} runs backwards")]
    Backwards(u32, u32),
    /// A CPU that a name contains twice.
    #[error("CPU {} is in it twice", .0.get())]
    Twice(CpuId),
    /// A number beyond [`CpuId::MAX`].
    #[error("no CPU has a number above {}", CpuId::MAX)]
    TooLarge,
}

impl CpuSet {
    /// The empty set.
    #[must_use]
    pub const fn new() -> Self {
        Self { words: SmallVec::new_const() }
    }

    /// The set in the words of a kernel CPU mask: bit `n % 64` of word `n / 64` is CPU `n`.
    /// Bits beyond [`CpuId::MAX`] are dropped.
    #[must_use]
    pub fn from_words(words: &[u64]) -> Self {
        let limit = (CpuId::MAX as usize + 1) / 64;
        let known = words.get(..limit).unwrap_or(words);
        let used = known.iter().rposition(|&word| word != 0).map_or(0, |last| last + 1);
        Self { words: SmallVec::from_slice(known.get(..used).unwrap_or_default()) }
    }

    /// Parses the name of a CPU list that a user makes. The kernel's format allows a CPU to be repeated; in a name
    /// that is a mistake.
    ///
    /// # Errors
    /// Returns an error if it is not in the list format, or contains a CPU twice.
    pub fn from_name(name: &str) -> Result<Self, ParseCpuSetError> {
        let mut set = Self::new();
        for part in name.split(',') {
            let part: Self = part.parse()?;
            if let Some(twice) = set.intersection(&part).first() {
                return Err(ParseCpuSetError::Twice(twice));
            }
            set = set.union(&part);
        }
        Ok(set)
    }

    /// Parses the kernel's mask format (cpuset(7)): hexadecimal words of 32 bits, the highest first, separated by commas.
    #[must_use]
    pub fn from_mask(text: &str) -> Option<Self> {
        let mut set = Self::new();
        for (word, digits) in text.rsplit(',').enumerate() {
            let bits = u32::from_str_radix(digits, 16).ok()?;
            for bit in (0..32).filter(|bit| bits & (1 << bit) != 0) {
                set.insert(CpuId::new(u32::try_from(word).ok()?.checked_mul(32)? + bit)?);
            }
        }
        Some(set)
    }

    /// Returns the set in the kernel's mask format, without zeros at the front: the kernel refuses more words than it has.
    #[must_use]
    pub fn to_mask(&self) -> String {
        let halves = self.words.iter().rev().flat_map(|word| [word >> 32, word & u64::from(u32::MAX)]);
        let words: Vec<String> = halves.map(|half| format!("{half:08x}")).collect();
        let mask = words.join(",");
        let mask = mask.trim_start_matches(['0', ',']);
        if mask.is_empty() { "0".to_owned() } else { mask.to_owned() }
    }

    /// The words of the kernel CPU mask of this set, without zero words at the end.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Whether no CPU is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// How many CPUs are in the set.
    #[must_use]
    pub fn len(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Whether `cpu` is in the set.
    #[must_use]
    pub fn contains(&self, cpu: CpuId) -> bool {
        let (word, bit) = position(cpu);
        self.words.get(word).is_some_and(|w| w & bit != 0)
    }

    /// Puts `cpu` into the set.
    pub fn insert(&mut self, cpu: CpuId) {
        let (word, bit) = position(cpu);
        if self.words.len() <= word {
            self.words.resize(word + 1, 0);
        }
        if let Some(w) = self.words.get_mut(word) {
            *w |= bit;
        }
    }

    /// The CPU with the lowest number.
    #[must_use]
    pub fn first(&self) -> Option<CpuId> {
        self.iter().next()
    }

    /// The CPUs in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = CpuId> + '_ {
        let some = |word: u64| Some(word).filter(|&word| word != 0);
        self.words.iter().enumerate().flat_map(move |(index, &word)| {
            // Each step clears the lowest bit, so that CPUs outside the set cost nothing.
            std::iter::successors(some(word), move |rest| some(rest & (rest - 1)))
                .filter_map(move |rest| CpuId::new((index * 64) as u32 + rest.trailing_zeros()))
        })
    }

    /// The CPUs that are in both sets.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        let words = self.words.iter().zip(&other.words).map(|(a, b)| a & b).collect();
        let mut set = Self { words };
        set.trim();
        set
    }

    /// The CPUs that are in either set.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        let (long, short) = if self.words.len() >= other.words.len() { (self, other) } else { (other, self) };
        let mut set = long.clone();
        for (word, more) in set.words.iter_mut().zip(&short.words) {
            *word |= more;
        }
        set
    }

    /// The CPUs of this set that are not in `other`.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Self {
        let rest = other.words.iter().copied().chain(std::iter::repeat(0));
        let words = self.words.iter().zip(rest).map(|(a, b)| a & !b).collect();
        let mut set = Self { words };
        set.trim();
        set
    }

    /// Whether no CPU is in both sets.
    #[must_use]
    pub fn is_disjoint(&self, other: &Self) -> bool {
        self.words.iter().zip(&other.words).all(|(a, b)| a & b == 0)
    }

    /// Whether each CPU of this set is in `other`.
    #[must_use]
    pub fn is_subset(&self, other: &Self) -> bool {
        let rest = other.words.iter().copied().chain(std::iter::repeat(0));
        self.words.iter().zip(rest).all(|(a, b)| a & !b == 0)
    }

    fn trim(&mut self) {
        while self.words.last() == Some(&0) {
            self.words.pop();
        }
    }
}

const fn position(cpu: CpuId) -> (usize, u64) {
    (cpu.0 as usize / 64, 1 << (cpu.0 % 64))
}

impl FromIterator<CpuId> for CpuSet {
    fn from_iter<I: IntoIterator<Item = CpuId>>(cpus: I) -> Self {
        let mut set = Self::new();
        for cpu in cpus {
            set.insert(cpu);
        }
        set
    }
}

impl FromStr for CpuSet {
    type Err = ParseCpuSetError;

    /// Reads numbers and ranges between commas; nothing else, and no white space.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut set = Self::new();
        for part in text.split(',') {
            let (first, last) = match part.split_once('-') {
                Some((first, last)) => (number(first, part)?, number(last, part)?),
                None => {
                    let only = number(part, part)?;
                    (only, only)
                }
            };
            if last < first {
                return Err(ParseCpuSetError::Backwards(first.get(), last.get()));
            }
            for cpu in (first.get()..=last.get()).filter_map(CpuId::new) {
                set.insert(cpu);
            }
        }
        Ok(set)
    }
}

impl TryFrom<String> for CpuSet {
    type Error = ParseCpuSetError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<CpuSet> for String {
    fn from(set: CpuSet) -> Self {
        set.to_string()
    }
}

/// Parses a number. Errors show `part`.
fn number(text: &str, part: &str) -> Result<CpuId, ParseCpuSetError> {
    if part.is_empty() {
        return Err(ParseCpuSetError::Empty);
    }
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(ParseCpuSetError::NotANumber(part.to_owned()));
    }
    text.parse().ok().and_then(CpuId::new).ok_or(ParseCpuSetError::TooLarge)
}

impl fmt::Display for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut cpus = self.iter().map(CpuId::get).peekable();
        let mut comma = "";
        while let Some(first) = cpus.next() {
            let mut last = first;
            while let Some(next) = cpus.next_if_eq(&(last + 1)) {
                last = next;
            }
            if first == last {
                write!(f, "{comma}{first}")?;
            } else {
                write!(f, "{comma}{first}-{last}")?;
            }
            comma = ",";
        }
        Ok(())
    }
}

impl fmt::Debug for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CpuSet({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn lists_are_read_and_written_canonically() {
        for (text, canonical) in [
            ("0", "0"),
            ("5,13", "5,13"),
            ("13,5", "5,13"),
            ("0,1,2", "0-2"),
            ("0-2,8-10", "0-2,8-10"),
            ("1-1", "1"),
            ("63,64", "63-64"),
            ("1,1,1", "1"),
            ("8191", "8191"),
            ("007", "7"),
        ] {
            assert_eq!(text.parse::<CpuSet>().unwrap().to_string(), canonical, "{text}");
        }
    }

    #[test]
    fn texts_that_are_not_lists_are_refused() {
        for text in [
            "",
            ",",
            "0,",
            ",0",
            "a",
            "-",
            "-1",
            "1-",
            "0-4294967295",
            "8192",
            "3-1",
            "0 ",
            " 0",
            "+1",
            "0x1",
            "1--2",
            "1-2-3",
            "99999999999999999999",
            "0-3:1/2",
            "all",
            "..",
            "٣",
            "1\n",
        ] {
            assert!(text.parse::<CpuSet>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_name_contains_each_cpu_once() {
        for name in ["0", "13,5", "0-2,8-10", "1-1"] {
            assert_eq!(CpuSet::from_name(name), name.parse(), "{name}");
        }
        for (name, twice) in [("0,0", 0), ("0-2,1", 1), ("3,1-4", 3), ("8,0-2,2-3", 2)] {
            assert_eq!(CpuSet::from_name(name), Err(ParseCpuSetError::Twice(CpuId(twice))), "{name}");
        }
        for name in ["", "0,,1", "x,x"] {
            assert_eq!(CpuSet::from_name(name), name.parse(), "{name}");
        }
    }

    fn sets() -> impl Strategy<Value = BTreeSet<u32>> {
        prop::collection::btree_set(0..=200u32, 0..40)
    }

    fn set(numbers: &BTreeSet<u32>) -> CpuSet {
        numbers.iter().filter_map(|&n| CpuId::new(n)).collect()
    }

    fn numbers(set: &CpuSet) -> BTreeSet<u32> {
        set.iter().map(CpuId::get).collect()
    }

    #[test]
    fn masks_are_read_as_the_kernel_writes_them() {
        for (text, list) in [
            ("3", "0-1"),
            ("0", ""),
            ("ff", "0-7"),
            ("00000001,00000000", "32"),
            ("f0000000,00000001,80000000", "31-32,92-95"),
        ] {
            assert_eq!(CpuSet::from_mask(text).unwrap().to_string(), list, "{text}");
        }
        for text in ["", "x", "1,", "100000000", "-1"] {
            assert!(CpuSet::from_mask(text).is_none(), "{text}");
        }
        assert_eq!(CpuSet::new().to_mask(), "0");
        assert_eq!("0,33".parse::<CpuSet>().unwrap().to_mask(), "2,00000001");
        assert_eq!("1-4".parse::<CpuSet>().unwrap().to_mask(), "1e");
    }

    proptest! {
        #[test]
        fn text_and_words_are_read_back(a in sets()) {
            let a = set(&a);
            prop_assert_eq!(&CpuSet::from_words(a.words()), &a);
            prop_assert_eq!(CpuSet::from_mask(&a.to_mask()).unwrap(), a.clone());
            if !a.is_empty() {
                prop_assert_eq!(a.to_string().parse::<CpuSet>().unwrap(), a);
            }
        }

        #[test]
        fn algebra_matches_btree_sets(a in sets(), b in sets()) {
            let (x, y) = (set(&a), set(&b));
            prop_assert_eq!(numbers(&x.union(&y)), &a | &b);
            prop_assert_eq!(numbers(&x.intersection(&y)), &a & &b);
            prop_assert_eq!(numbers(&x.difference(&y)), &a - &b);
            prop_assert_eq!(x.is_subset(&y), a.is_subset(&b));
            prop_assert_eq!(x.is_disjoint(&y), a.is_disjoint(&b));
            prop_assert_eq!(x.len(), a.len());
            prop_assert_eq!(x.first().map(CpuId::get), a.first().copied());
            prop_assert_eq!(x == y, a == b);
        }

        #[test]
        fn any_text_is_answered(text in "\\PC{0,40}") {
            if let Ok(set) = text.parse::<CpuSet>() {
                prop_assert!(!set.is_empty());
            }
        }
    }
}
