//! How much of the daemon each user may use: a token bucket for each uid.
//!
//! Owns how much is left. Does not know the time, or what is used.

use std::collections::HashMap;

/// The number of users that are remembered. Only users who have used something lately are.
const USERS: usize = 1024;
/// The bucket of all users who come when so many others are remembered. No user has this uid.
const OTHERS: u32 = u32::MAX;

/// The time, in nanoseconds, that the writes of one user may use at once: for the work of the daemon and for waiting
/// until new threads of a task are proven to have its mask. Writers of the same file wait as long.
pub(super) const WRITE_TIME: u64 = 250_000_000;
/// The time that a user gets in each second: a quarter, so that one user does not occupy a thread.
const WRITE_TIME_PER_SECOND: u64 = 250_000_000;
/// How many refusals of one user are recorded at once: more than a person or a script causes.
const RECORDED_REFUSALS: u64 = 512;
/// The same for each second. A record and its event are about 700 bytes of the journal.
const RECORDED_REFUSALS_PER_SECOND: u64 = 64;

/// Returns the budget of the time for writes.
pub(super) fn of_write_time() -> Budget {
    Budget::new(WRITE_TIME, WRITE_TIME_PER_SECOND)
}

/// Returns the budget of the refusals that are recorded.
pub(super) fn of_recorded_refusals() -> Budget {
    Budget::new(RECORDED_REFUSALS, RECORDED_REFUSALS_PER_SECOND)
}

/// The buckets of all users. Amounts have any unit; times are in nanoseconds.
#[derive(Debug)]
pub(super) struct Budget {
    /// The amount of a user who has used nothing lately.
    burst: u64,
    /// The amount that a user gets in a second.
    per_second: u64,
    users: HashMap<u32, Bucket>,
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    /// Negative for a user who has used more than there was, at most by one burst.
    left: i64,
    at: u64,
}

impl Budget {
    fn new(burst: u64, per_second: u64) -> Self {
        Self { burst, per_second, users: HashMap::new() }
    }

    /// Returns what is left for a user.
    pub(super) fn left(&self, uid: u32, now: u64) -> u64 {
        let known = self.users.get(&uid).or_else(|| self.users.get(&OTHERS).filter(|_| self.is_full()));
        known.map_or(self.burst, |bucket| self.refilled(bucket, now).max(0).unsigned_abs())
    }

    /// Takes an amount from what is left for a user. If there is less, the user has to wait longer for the next.
    pub(super) fn spend(&mut self, uid: u32, amount: u64, now: u64) {
        let uid = self.remembered(uid, now);
        let burst = as_signed(self.burst);
        let before = self.users.get(&uid).map_or(burst, |bucket| self.refilled(bucket, now));
        let left = before.saturating_sub(as_signed(amount)).max(-burst);
        self.users.insert(uid, Bucket { left, at: now });
    }

    /// Returns the uid under which a user is remembered.
    fn remembered(&mut self, uid: u32, now: u64) -> u32 {
        if !self.is_full() || self.users.contains_key(&uid) {
            return uid;
        }
        let mut users = std::mem::take(&mut self.users);
        users.retain(|_, bucket| self.refilled(bucket, now) < as_signed(self.burst));
        self.users = users;
        if self.is_full() { OTHERS } else { uid }
    }

    fn is_full(&self) -> bool {
        self.users.len() >= USERS
    }

    fn refilled(&self, bucket: &Bucket, now: u64) -> i64 {
        let elapsed = u128::from(now.saturating_sub(bucket.at));
        let added = elapsed * u128::from(self.per_second) / 1_000_000_000;
        let added = i64::try_from(added).unwrap_or(i64::MAX);
        bucket.left.saturating_add(added).min(as_signed(self.burst))
    }
}

fn as_signed(amount: u64) -> i64 {
    i64::try_from(amount).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: u64 = 1_000_000_000;

    fn budget() -> Budget {
        Budget::new(100, 10)
    }

    #[test]
    fn a_user_uses_a_burst_and_then_what_time_brings() {
        let mut budget = budget();
        assert_eq!(budget.left(1, 0), 100);
        budget.spend(1, 60, 0);
        assert_eq!((budget.left(1, 0), budget.left(2, 0)), (40, 100));
        assert_eq!(budget.left(1, SECOND), 50);
        budget.spend(1, 50, SECOND);
        assert_eq!((budget.left(1, SECOND), budget.left(1, 2 * SECOND)), (0, 10));
        assert_eq!(budget.left(1, 1_000 * SECOND), 100, "never more than a burst");
        assert_eq!(budget.left(1, u64::MAX), 100);
    }

    #[test]
    fn a_debt_is_paid_off_but_not_without_end() {
        let mut budget = budget();
        budget.spend(1, 150, 0);
        assert_eq!((budget.left(1, 5 * SECOND), budget.left(1, 6 * SECOND)), (0, 10));
        budget.spend(1, u64::MAX, 6 * SECOND);
        assert_eq!((budget.left(1, 16 * SECOND), budget.left(1, 17 * SECOND)), (0, 10));
    }

    #[test]
    fn time_that_runs_backwards_brings_nothing() {
        let mut budget = budget();
        budget.spend(1, 60, 5 * SECOND);
        assert_eq!(budget.left(1, 0), 40);
    }

    #[test]
    fn a_bounded_number_of_users_is_remembered() {
        let mut budget = budget();
        for uid in 0..3 * USERS as u32 {
            budget.spend(uid, 60, 0);
            assert!(budget.users.len() <= USERS + 1);
        }
        // The last ones share what is left, and the first ones do not.
        assert_eq!((budget.left(0, 0), budget.left(2 * USERS as u32, 0)), (40, 0));
        // Those who have everything again are forgotten.
        budget.spend(u32::MAX - 1, 60, 100 * SECOND);
        assert_eq!(budget.users.len(), 1);
        assert_eq!(budget.left(u32::MAX - 1, 100 * SECOND), 40);
    }

    proptest! {
        #[test]
        fn nobody_uses_more_than_a_burst_and_what_time_brings(
            steps in prop::collection::vec((0..3_u32, 0..3 * SECOND, 0..40_u64), 1..100),
        ) {
            let (mut budget, mut now, mut used) = (budget(), 0, [0; 3]);
            for (uid, pause, amount) in steps {
                now += pause;
                // As a caller that uses only what is left.
                let amount = amount.min(budget.left(uid, now));
                budget.spend(uid, amount, now);
                used[uid as usize] += amount;
                prop_assert!(used[uid as usize] <= 100 + now * 10 / SECOND);
            }
        }
    }
}
