//! The newest records of all users, of which each user has a fair share.
//!
//! Owns which record makes room for a new one. Does not know what is recorded.
//!
//! While there is room, everybody may use it. When it is full, the user with the most records loses the oldest of
//! them. Root (uid 0) has one half and all other users together the other one, because a user may own many uids
//! (subuid(5)).
//!
//! So nobody loses a record because of others while he has no more than his share: of `LIMIT` records root has a half,
//! and each of `n` other users has `1/n` of a half.

use std::collections::{BTreeMap, VecDeque};

const ROOT: u32 = 0;

/// At most `LIMIT` records, in the order in which they were added. Each belongs to a uid.
#[derive(Clone, Debug)]
pub(crate) struct FairRing<T, const LIMIT: usize> {
    /// The number of the next record.
    next: u64,
    /// By number.
    records: BTreeMap<u64, (u32, T)>,
    /// The numbers of the records of each uid, the oldest first.
    owners: BTreeMap<u32, VecDeque<u64>>,
    /// How many records have made room for others.
    dropped: u64,
}

impl<T, const LIMIT: usize> Default for FairRing<T, LIMIT> {
    fn default() -> Self {
        Self { next: 0, records: BTreeMap::new(), owners: BTreeMap::new(), dropped: 0 }
    }
}

/// Two rings are equal if they have the same records, whatever was in them before.
impl<T: PartialEq, const LIMIT: usize> PartialEq for FairRing<T, LIMIT> {
    fn eq(&self, other: &Self) -> bool {
        self.records.values().eq(other.records.values())
    }
}

impl<T: Eq, const LIMIT: usize> Eq for FairRing<T, LIMIT> {}

impl<T, const LIMIT: usize> FairRing<T, LIMIT> {
    /// Adds a record of a user. Returns the one that makes room for it, if it is full: perhaps the new one.
    pub(crate) fn push(&mut self, uid: u32, record: T) -> Option<T> {
        self.records.insert(self.next, (uid, record));
        self.owners.entry(uid).or_default().push_back(self.next);
        self.next += 1;
        if self.records.len() <= LIMIT {
            return None;
        }
        let loser = self.loser()?;
        let numbers = self.owners.get_mut(&loser)?;
        let oldest = numbers.pop_front()?;
        if numbers.is_empty() {
            self.owners.remove(&loser);
        }
        self.dropped += 1;
        self.records.remove(&oldest).map(|(_, record)| record)
    }

    /// Returns the user who has to make room.
    fn loser(&self) -> Option<u32> {
        let of_root = self.owners.get(&ROOT).map_or(0, VecDeque::len);
        if of_root > self.records.len() - of_root {
            return Some(ROOT);
        }
        let others = self.owners.iter().filter(|(uid, _)| **uid != ROOT);
        // Of those with equally many records the one whose oldest record is the oldest.
        let most = others.max_by_key(|(_, numbers)| (numbers.len(), std::cmp::Reverse(numbers.front())));
        most.map(|(uid, _)| *uid)
    }

    /// Keeps only the records for which `keep` is true. The others do not count as dropped.
    pub(crate) fn retain(&mut self, mut keep: impl FnMut(&T) -> bool) {
        self.records.retain(|_, (_, record)| keep(record));
        let records = &self.records;
        self.owners.retain(|_, numbers| {
            numbers.retain(|number| records.contains_key(number));
            !numbers.is_empty()
        });
    }

    /// Returns the records in their order.
    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = &T> + Clone {
        self.records.values().map(|(_, record)| record)
    }

    /// Changes all records, in their order.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.records.values_mut().map(|(_, record)| record)
    }

    /// Returns the records that were added since [`FairRing::next_number`] returned `number`.
    pub(crate) fn since(&self, number: u64) -> impl Iterator<Item = &T> {
        self.records.range(number..).map(|(_, (_, record))| record)
    }

    /// Returns the number of the next record.
    pub(crate) fn next_number(&self) -> u64 {
        self.next
    }

    pub(crate) fn oldest(&self) -> Option<&T> {
        self.iter().next()
    }

    pub(crate) fn len(&self) -> usize {
        self.records.len()
    }

    /// Returns how many records have made room for others.
    pub(crate) fn dropped(&self) -> u64 {
        self.dropped
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMIT: usize = 8;

    type Ring = FairRing<(u32, u32), LIMIT>;

    /// Adds a numbered record for each of these users.
    fn filled(uids: impl IntoIterator<Item = u32>) -> Ring {
        let mut ring = Ring::default();
        for (n, uid) in (0..).zip(uids) {
            ring.push(uid, (uid, n));
        }
        ring
    }

    fn numbers(ring: &Ring) -> Vec<u32> {
        ring.iter().map(|(_, n)| *n).collect()
    }

    #[test]
    fn a_single_user_has_the_newest() {
        for uid in [0, 7] {
            let ring = filled([uid; 20]);
            assert_eq!(numbers(&ring), (12..20).collect::<Vec<_>>());
            assert_eq!((ring.len(), ring.dropped()), (LIMIT, 12));
        }
    }

    #[test]
    fn the_user_with_the_most_loses_the_oldest() {
        let ring = filled([1, 2, 2, 2, 1, 2, 2, 2, 2, 3]);
        assert_eq!(numbers(&ring), [0, 3, 4, 5, 6, 7, 8, 9]);
    }

    #[test]
    fn root_has_one_half_however_many_others_there_are() {
        let ring = filled([0, 0, 0, 0].into_iter().chain(100..200));
        assert_eq!(numbers(&ring), [0, 1, 2, 3, 100, 101, 102, 103]);
        let ring = filled([1, 2, 3, 4].into_iter().chain([0; 100]));
        assert_eq!(numbers(&ring), [0, 1, 2, 3, 100, 101, 102, 103]);
    }

    #[test]
    fn what_is_not_retained_makes_room() {
        let mut ring = filled([0, 1, 2, 1, 2]);
        ring.retain(|(uid, _)| *uid != 1);
        assert_eq!((numbers(&ring), ring.dropped(), ring.next_number()), (vec![0, 2, 4], 0, 5));
        for n in 5..11 {
            ring.push(1, (1, n));
        }
        assert_eq!(numbers(&ring), [0, 2, 4, 6, 7, 8, 9, 10]);
        assert_eq!(ring.since(9).map(|(_, n)| *n).collect::<Vec<_>>(), [9, 10]);
    }

    proptest! {
        /// A user with no more records than his share keeps all his newest records, whatever others do.
        #[test]
        fn nobody_loses_a_record_within_his_share(uids in prop::collection::vec(0..5_u32, 0..200)) {
            let ring = filled(uids.iter().copied());
            prop_assert_eq!(ring.len(), uids.len().min(LIMIT));
            prop_assert_eq!(ring.len() as u64 + ring.dropped(), uids.len() as u64);
            let others = (1..5).filter(|uid| uids.contains(uid)).count();
            for uid in 0..5 {
                let share = if uid == 0 { LIMIT / 2 } else { LIMIT / 2 / others.max(1) };
                let own = |(_, it): &(u32, &u32)| **it == uid;
                let all: Vec<u32> = (0..).zip(&uids).filter(own).map(|(n, _)| n).collect();
                let kept: Vec<u32> = ring.iter().filter(|(it, _)| *it == uid).map(|(_, n)| *n).collect();
                prop_assert!(all.ends_with(&kept), "{uid} has {kept:?} of {all:?}");
                prop_assert!(kept.len() >= all.len().min(share), "{uid} has {kept:?} of {all:?}");
            }
        }

        /// A ring that is filled from the journal behaves as before.
        #[test]
        fn a_ring_that_is_filled_again_is_the_same(
            before in prop::collection::vec(0..5_u32, 0..40),
            after in prop::collection::vec(0..5_u32, 0..40),
        ) {
            let mut ring = filled(before);
            let mut again = filled([]);
            for &(uid, n) in ring.iter() {
                again.push(uid, (uid, n));
            }
            for (n, uid) in (1000..).zip(after) {
                prop_assert_eq!(ring.push(uid, (uid, n)), again.push(uid, (uid, n)));
            }
            prop_assert_eq!(ring, again);
        }
    }
}
