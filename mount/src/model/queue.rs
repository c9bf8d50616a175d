//! The tasks that wait in turn for a CPU list of a pool.
//!
//! Owns their order, and whose turn it is. Does not know which lists are free, or how a waiting program is woken.
//!
//! An entry belongs to an open file: it ends when the file is closed, so a waiter that is killed leaves nothing behind.

use std::collections::BTreeMap;

use super::pool::PoolId;
use super::task::TaskId;

/// The most entries of all users.
pub const MAX_WAITERS: usize = 4096;
/// The most entries of a user other than root.
pub const MAX_WAITERS_OF_USER: usize = 256;

/// A task that waits, and the open file through which it was entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiter {
    /// The open file.
    pub fh: u64,
    /// The pool.
    pub pool: PoolId,
    /// The task that is to get a list.
    pub task: TaskId,
    /// The user who opened the file.
    pub uid: u32,
    /// Since when it waits: wall time in milliseconds.
    pub since: u64,
}

/// A waiter in its queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The waiter.
    pub waiter: Waiter,
    /// The name of its program when it was entered.
    pub program: String,
    /// Since when it is its turn, in nanoseconds since boot.
    pub turn: Option<u64>,
}

/// The place of an entry: of two, the one with the lower number is served first.
pub type Place = (PoolId, u64);

/// The queues of all pools.
#[derive(Debug, Default)]
pub struct Queues {
    entries: BTreeMap<Place, Entry>,
    next: u64,
}

/// No more entries are taken.
#[derive(Debug, PartialEq, Eq)]
pub struct Full;

impl Queues {
    /// Returns whether nobody waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Enters a waiter at the end of its queue. It loses the place that its open file had before.
    ///
    /// # Errors
    /// [`Full`] if its user, or all users, have too many entries.
    pub fn add(&mut self, waiter: Waiter, program: String) -> Result<(), Full> {
        self.remove(waiter.fh);
        let of_user = self.entries.values().filter(|entry| entry.waiter.uid == waiter.uid).count();
        if self.entries.len() >= MAX_WAITERS || (waiter.uid != 0 && of_user >= MAX_WAITERS_OF_USER) {
            return Err(Full);
        }
        self.push(Entry { waiter, program, turn: None });
        Ok(())
    }

    fn push(&mut self, entry: Entry) {
        self.entries.insert((entry.waiter.pool, self.next), entry);
        self.next += 1;
    }

    /// Removes the entry of an open file. Returns its pool.
    pub fn remove(&mut self, fh: u64) -> Option<PoolId> {
        let place = *self.entries.iter().find(|(_, entry)| entry.waiter.fh == fh)?.0;
        self.entries.remove(&place).map(|entry| entry.waiter.pool)
    }

    /// Removes all entries of a pool. Returns their open files.
    pub fn remove_pool(&mut self, pool: PoolId) -> Vec<u64> {
        let places: Vec<Place> = self.of(pool).map(|(place, _)| place).collect();
        places.iter().filter_map(|place| self.entries.remove(place)).map(|entry| entry.waiter.fh).collect()
    }

    /// Takes the entries of tasks that are getting lists. They go back with [`Queues::put_back`] if the tasks get none.
    pub fn take(&mut self, pool: PoolId, is_one_of_them: impl Fn(TaskId) -> bool) -> Vec<(Place, Entry)> {
        let of_them = self.of(pool).filter(|(_, entry)| is_one_of_them(entry.waiter.task));
        let places: Vec<Place> = of_them.map(|(place, _)| place).collect();
        places.iter().filter_map(|place| self.entries.remove_entry(place)).collect()
    }

    /// Puts entries back in their places.
    pub fn put_back(&mut self, taken: Vec<(Place, Entry)>) {
        self.entries.extend(taken);
    }

    /// Returns the entries of a pool in their order.
    pub fn of(&self, pool: PoolId) -> impl Iterator<Item = (Place, &Entry)> {
        self.entries.range((pool, 0)..=(pool, u64::MAX)).map(|(place, entry)| (*place, entry))
    }

    /// Returns the entry of an open file.
    #[must_use]
    pub fn entry(&self, fh: u64) -> Option<&Entry> {
        self.entries.values().find(|entry| entry.waiter.fh == fh)
    }

    /// Returns the pools with entries.
    #[must_use]
    pub fn pools(&self) -> Vec<PoolId> {
        let mut pools: Vec<PoolId> = self.entries.keys().map(|(pool, _)| *pool).collect();
        pools.dedup();
        pools
    }

    /// Returns how many tasks are before these: before the first of them that waits, or all if none of them does.
    pub fn before(&self, pool: PoolId, is_one_of_them: impl Fn(TaskId) -> bool) -> usize {
        self.of(pool).take_while(|(_, entry)| !is_one_of_them(entry.waiter.task)).count()
    }

    /// It is the turn of as many tasks as there are free lists. Returns the open files of those whose turn begins.
    pub fn give_turns(&mut self, pool: PoolId, free: usize, now: u64) -> Vec<u64> {
        let mut begun = Vec::new();
        for (n, entry) in self.entries.range_mut((pool, 0)..=(pool, u64::MAX)).map(|(_, it)| it).enumerate() {
            if n >= free {
                entry.turn = None;
            } else if entry.turn.is_none() {
                entry.turn = Some(now);
                begun.push(entry.waiter.fh);
            }
        }
        begun
    }

    /// Moves the entries whose turn began at `then` or before to the end of their queues, unless nobody is behind them.
    /// Returns them.
    pub fn expire(&mut self, then: u64) -> Vec<Waiter> {
        let late = |entry: &Entry| entry.turn.is_some_and(|turn| turn <= then);
        let places: Vec<Place> = self.entries.iter().filter(|(_, it)| late(it)).map(|(at, _)| *at).collect();
        let mut moved = Vec::new();
        for place in places {
            if self.of(place.0).last().is_some_and(|(last, _)| last == place) {
                continue;
            }
            let Some(entry) = self.entries.remove(&place) else { continue };
            moved.push(entry.waiter);
            self.push(Entry { turn: None, ..entry });
        }
        moved
    }

    /// Returns when the oldest turn began that somebody waits behind.
    #[must_use]
    pub fn oldest_turn(&self) -> Option<u64> {
        let has_more = |place: &Place| self.entries.range(*place..=(place.0, u64::MAX)).nth(1).is_some();
        self.entries.iter().filter(|(place, _)| has_more(place)).filter_map(|(_, entry)| entry.turn).min()
    }
}

#[cfg(test)]
mod tests {
    use super::super::task::Pid;
    use super::*;

    const POOL: PoolId = PoolId(64);
    const OTHER: PoolId = PoolId(68);

    fn task(pid: u32) -> TaskId {
        TaskId { pid: Pid::new(pid).unwrap(), ino: u64::from(pid) }
    }

    fn waiter(fh: u64, pool: PoolId, uid: u32) -> Waiter {
        Waiter { fh, pool, task: task(1000 + fh as u32), uid, since: 0 }
    }

    /// Queues with the open files 1, 2, 3 in one pool and 4 in another.
    fn queues() -> Queues {
        let mut queues = Queues::default();
        for (fh, pool) in [(1, POOL), (4, OTHER), (2, POOL), (3, POOL)] {
            queues.add(waiter(fh, pool, 0), "p".into()).unwrap();
        }
        queues
    }

    fn order(queues: &Queues) -> Vec<u64> {
        queues.of(POOL).map(|(_, entry)| entry.waiter.fh).collect()
    }

    fn before(queues: &Queues, fh: u32) -> usize {
        queues.before(POOL, |it| it == task(1000 + fh))
    }

    #[test]
    fn the_first_is_served_first() {
        let mut queues = queues();
        assert_eq!(order(&queues), [1, 2, 3]);
        assert_eq!([1, 2, 3, 9].map(|fh| before(&queues, fh)), [0, 1, 2, 3]);
        assert_eq!(queues.pools(), [POOL, OTHER]);
        queues.remove(1);
        assert_eq!((order(&queues), before(&queues, 2)), (vec![2, 3], 0));
        queues.add(waiter(2, POOL, 0), "p".into()).unwrap();
        assert_eq!(order(&queues), [3, 2], "who asks again goes to the end");
        assert_eq!((queues.remove_pool(POOL), queues.pools()), (vec![3, 2], vec![OTHER]));
        assert_eq!((queues.remove(4), queues.remove(4), queues.is_empty()), (Some(OTHER), None, true));
    }

    #[test]
    fn it_is_the_turn_of_as_many_as_there_are_lists() {
        let mut queues = queues();
        assert!(queues.give_turns(POOL, 0, 5).is_empty());
        assert_eq!(queues.give_turns(POOL, 2, 6), [1, 2]);
        assert!(queues.give_turns(POOL, 2, 7).is_empty(), "each turn begins once");
        assert_eq!(queues.entry(1).unwrap().turn, Some(6));
        assert!(queues.give_turns(POOL, 1, 8).is_empty());
        assert_eq!((queues.entry(2).unwrap().turn, queues.oldest_turn()), (None, Some(6)));
        assert_eq!(queues.entry(4).unwrap().turn, None, "the other pool");
    }

    #[test]
    fn a_task_that_does_not_use_its_turn_goes_to_the_end() {
        let mut queues = queues();
        queues.give_turns(POOL, 1, 10);
        assert!(queues.expire(9).is_empty());
        assert_eq!(queues.expire(10).iter().map(|waiter| waiter.fh).collect::<Vec<u64>>(), [1]);
        assert_eq!((order(&queues), queues.entry(1).unwrap().turn), (vec![2, 3, 1], None));
        assert_eq!(queues.give_turns(POOL, 1, 11), [2]);
        queues.remove(1);
        queues.remove(3);
        assert_eq!((queues.expire(20), queues.oldest_turn()), (vec![], None), "nobody is behind it");
        assert_eq!(queues.entry(2).unwrap().turn, Some(11));
    }

    #[test]
    fn a_task_that_gets_no_list_keeps_its_place() {
        let mut queues = queues();
        let is_first = |it| it == task(1001);
        let taken = queues.take(POOL, is_first);
        assert_eq!((order(&queues), before(&queues, 2)), (vec![2, 3], 0));
        assert_eq!((taken.len(), queues.take(POOL, is_first).len()), (1, 0));
        queues.put_back(taken);
        assert_eq!(order(&queues), [1, 2, 3]);
    }

    #[test]
    fn the_number_of_entries_is_bounded() {
        let mut queues = Queues::default();
        let mut add = |fh, uid| queues.add(waiter(fh, POOL, uid), String::new());
        let most = MAX_WAITERS_OF_USER as u64;
        assert!((0..most).all(|fh| add(fh, 1000) == Ok(())));
        assert_eq!((add(most, 1000), add(most + 1, 0)), (Err(Full), Ok(())));
        assert_eq!(add(0, 1000), Ok(()), "the same open file again");
        assert!((5000..5000 + MAX_WAITERS as u64).any(|fh| add(fh, 0) == Err(Full)));
    }
}
