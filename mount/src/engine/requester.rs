//! Who writes to a `tasks` or `queue` file, and how much time the write may take.
//!
//! Owns the share of each user in the time of the daemon. Does not know what a write does.
//!
//! A write of a user without `CAP_SYS_NICE` on the node uses up time of that user: for the daemon's work, and for waiting
//! until new threads are proven to have the mask of their task, or until another write on the same task has ended. When
//! nothing is left, a write still takes effect if that is a matter of [`LEAST_WORK`] and no wait.

use std::cell::OnceCell;
use std::time::{Duration, Instant};

use super::budget::WRITE_TIME;
use super::ports::{Clock as _, Ports};
use super::{Caller, Engine};
use crate::model::refusal::Refusal;
use crate::model::rights::User;
use crate::model::task::TaskId;
use crate::process::{BlockedWriter, TimeLimit};

/// How long a write may work whose user has no time left: some 50 tasks.
const LEAST_WORK: Duration = Duration::from_millis(5);
/// How long a write of root may take, so that it ends.
const ROOTS_LIMIT: Duration = Duration::from_secs(10);

/// The users and the request behind a write.
#[derive(Debug)]
pub(super) struct Requester {
    /// The opener of the file.
    pub(super) opener: User,
    /// The writing thread, and its process.
    pub(super) caller: Caller,
    pub(super) process: TaskId,
    /// The thread that writes, and the limits of the request.
    pub(super) waiting: BlockedWriter,
    pub(super) time: Allowance,
    /// The writer with its capabilities, once they were asked for.
    pub(super) writer: OnceCell<User>,
}

/// The time that a write may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Allowance {
    /// The user whose time it is; `None` if it is not counted.
    pub(super) uid: Option<u32>,
    pub(super) limit: TimeLimit,
    /// How long the write may wait for another one.
    pub(super) waiting: Duration,
    /// Whether it is less than what a user has who has used nothing lately.
    is_low: bool,
}

impl Allowance {
    /// Returns why a write is refused that could not prove in time that all threads have the mask.
    pub(super) fn unsettled(&self, caller: Caller) -> Refusal {
        if self.is_low { Refusal::OutOfTime { uid: caller.uid } } else { Refusal::Unsettled }
    }
}

impl Requester {
    /// # Errors
    /// The write has taken too long.
    pub(super) fn check_time(&self) -> Result<(), Refusal> {
        if self.time.limit.is_over() { Err(Refusal::OutOfTime { uid: self.caller.uid }) } else { Ok(()) }
    }

    /// The users who must have the right over processes. The writer's capabilities matter only if they were asked for.
    pub(super) fn users(&self) -> [User; 2] {
        let writer = self.writer.get().copied();
        [self.opener, writer.unwrap_or(User::without_capabilities(self.caller.uid))]
    }
}

impl<P: Ports> Engine<P> {
    /// Returns the users and the request behind a write of `writer`, which may take this much time.
    pub(super) fn requester(
        &self,
        caller: Caller,
        opener: User,
        writer: TaskId,
        time: Allowance,
    ) -> Requester {
        let waiting = caller.waiting().within(time.limit);
        Requester { opener, caller, process: writer, waiting, time, writer: OnceCell::new() }
    }

    /// Returns how much time a write may take.
    pub(super) fn allowance(&self, caller: Caller, opener: User) -> Allowance {
        let now = Instant::now();
        // Root of the node, who could do worse. The opener's capabilities are known: this costs no system call.
        if opener.nice && opener.uid == caller.uid {
            let limit = TimeLimit::new(now, ROOTS_LIMIT, ROOTS_LIMIT);
            return Allowance { uid: None, limit, waiting: self.in_flight_timeout, is_low: false };
        }
        let left = self.write_time.lock().left(caller.uid, self.clock.since_boot());
        let waiting = Duration::from_nanos(left);
        let limit = TimeLimit::new(now, waiting.max(LEAST_WORK), waiting);
        let waiting = waiting.min(self.in_flight_timeout);
        Allowance { uid: Some(caller.uid), limit, waiting, is_low: left < WRITE_TIME / 2 }
    }

    /// Carries out a write, and counts the time that it takes.
    pub(super) fn counted<T>(&self, time: Allowance, write: impl FnOnce() -> T) -> T {
        let Some(uid) = time.uid else { return write() };
        let before = self.clock.spent();
        let result = write();
        self.spend_write_time(uid, self.clock.spent().saturating_sub(before));
        result
    }

    /// Counts time that a write has taken.
    pub(super) fn spend_write_time(&self, uid: u32, nanoseconds: u64) {
        let now = self.clock.since_boot();
        self.write_time.lock().spend(uid, nanoseconds, now);
    }
}
