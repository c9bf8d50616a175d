//! Decides which user's request is carried out next.
//!
//! Owns the order and the bounds: how many requests are carried out at a time, how many of them for one user, and how
//! many wait. Pure: does not know what a request asks for, and has no clock, lock or thread.
//!
//! A request is carried out at once if that leaves a thread to read the next one and its user has not used up its share.
//! Otherwise it waits in the queue of its user. The queues take turns.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

/// For how long all places may be taken by the same requests before the worker counts as stuck. Every wait inside a
/// request ends within half of that.
const STUCK_TIME: Duration = Duration::from_secs(10);

/// The bounds of a [`Queue`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// How many requests are carried out at a time.
    pub(super) places: usize,
    /// How many of these places a user gets.
    pub(super) share: fn(uid: u32) -> usize,
    /// How many requests of one user wait.
    pub(super) waiting: usize,
    /// How many bytes the waiting requests of one user have.
    pub(super) bytes: usize,
    /// How many requests of all users wait. Beyond it, each user still has `reserved`.
    pub(super) total: usize,
    /// The same for bytes.
    pub(super) total_bytes: usize,
    /// How many requests of a user wait even if others have used up the total.
    pub(super) reserved: usize,
    /// How many users have waiting requests.
    pub(super) users: usize,
}

/// The decision about a request that has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arrival {
    /// Carry it out now, and call [`Queue::finish`] after it.
    Run,
    /// Let it wait: [`Queue::wait`].
    Wait,
    /// Let it wait without its data, to be refused in its turn. A client that is refused at once comes back at once.
    WaitWithoutData,
    /// Refuse it now.
    Full,
    /// Try again later: all places are taken, and nothing finishes.
    Stuck,
}

/// A request that waits.
#[derive(Debug)]
pub(super) struct Waiting<T> {
    pub(super) job: T,
    /// The size of its data.
    pub(super) bytes: usize,
    /// When it is too late to carry it out.
    pub(super) deadline: Instant,
    /// Whether its data is there.
    pub(super) has_data: bool,
}

/// A request whose turn it is.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Turn<T> {
    pub(super) uid: u32,
    pub(super) job: T,
    /// Whether it is refused: it is too late, or its data is not there.
    pub(super) is_refused: bool,
}

/// The requests that are carried out and those that wait.
#[derive(Debug)]
pub(super) struct Queue<T> {
    limits: Limits,
    /// The users of the requests that are carried out: one entry each.
    running: Vec<u32>,
    /// How many requests have finished.
    finished: u64,
    /// Since when all places have been taken, and how many requests had finished then.
    full_since: Option<(Instant, u64)>,
    /// Only the users with waiting requests.
    users: HashMap<u32, User<T>>,
    /// The same users, the next one first.
    turns: VecDeque<u32>,
    waiting: usize,
    bytes: usize,
}

/// The waiting requests of one user.
#[derive(Debug)]
struct User<T> {
    waiting: VecDeque<Waiting<T>>,
    bytes: usize,
}

impl<T> Queue<T> {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            running: Vec::with_capacity(limits.places),
            finished: 0,
            full_since: None,
            users: HashMap::new(),
            turns: VecDeque::new(),
            waiting: 0,
            bytes: 0,
        }
    }

    /// Decides what happens to a request that has arrived with data of this size. One that `is_cheap` does not wait
    /// behind others of its user, for which it has one place more. `now` is asked only if it matters.
    pub(super) fn arrive(
        &mut self,
        uid: u32,
        bytes: usize,
        is_cheap: bool,
        now: impl FnOnce() -> Instant,
    ) -> Arrival {
        let may_run = if is_cheap {
            self.has_place(uid, 1)
        } else {
            self.may_run(uid) && !self.users.contains_key(&uid)
        };
        if may_run {
            self.running.push(uid);
            return Arrival::Run;
        }
        if self.running.len() == self.limits.places && self.is_stuck(now()) {
            return Arrival::Stuck;
        }
        let (own, own_bytes) = self.users.get(&uid).map_or((0, 0), |user| (user.waiting.len(), user.bytes));
        let Limits { waiting, total, reserved, users, .. } = self.limits;
        let is_new = own == 0;
        if own >= waiting || self.waiting >= total && own >= reserved || is_new && self.users.len() >= users {
            return Arrival::Full;
        }
        if bytes > 0
            && (own_bytes + bytes > self.limits.bytes || self.bytes + bytes > self.limits.total_bytes)
        {
            return Arrival::WaitWithoutData;
        }
        Arrival::Wait
    }

    /// Lets a request wait after [`Arrival::Wait`]. If a place has become free meanwhile, it is returned: carry it out
    /// now, and call [`Queue::finish`] after it.
    pub(super) fn wait(&mut self, uid: u32, waiting: Waiting<T>) -> Option<Turn<T>> {
        if self.may_run(uid) && !self.users.contains_key(&uid) {
            self.running.push(uid);
            return Some(Turn { uid, job: waiting.job, is_refused: !waiting.has_data });
        }
        let user = self.users.entry(uid).or_insert_with(|| {
            self.turns.push_back(uid);
            User { waiting: VecDeque::new(), bytes: 0 }
        });
        user.bytes += waiting.bytes;
        self.bytes += waiting.bytes;
        self.waiting += 1;
        user.waiting.push_back(waiting);
        None
    }

    /// A request of this user has been carried out. Returns the next one: carry it out, and call this again after it.
    /// `now` is asked only if it matters.
    pub(super) fn finish(&mut self, uid: u32, now: impl FnOnce() -> Instant) -> Option<Turn<T>> {
        self.finished = self.finished.wrapping_add(1);
        if let Some(place) = self.running.iter().position(|running| *running == uid) {
            self.running.swap_remove(place);
        }
        if self.users.is_empty() { None } else { self.next(now()) }
    }

    /// Returns the next request: the oldest of the first user who may have another place.
    fn next(&mut self, now: Instant) -> Option<Turn<T>> {
        let place = self.turns.iter().position(|uid| self.may_run(*uid))?;
        let uid = self.turns.remove(place)?;
        let user = self.users.get_mut(&uid)?;
        let next = user.waiting.pop_front()?;
        user.bytes -= next.bytes;
        self.bytes -= next.bytes;
        self.waiting -= 1;
        if user.waiting.is_empty() {
            self.users.remove(&uid);
        } else {
            self.turns.push_back(uid);
        }
        self.running.push(uid);
        Some(Turn { uid, job: next.job, is_refused: !next.has_data || next.deadline <= now })
    }

    /// Takes out the requests for which it is too late. They have no place.
    pub(super) fn take_late(&mut self, now: Instant) -> Vec<T> {
        let mut late = Vec::new();
        let Self { users, turns, waiting, bytes, .. } = self;
        users.retain(|_, user| {
            if user.waiting.iter().all(|one| one.deadline > now) {
                return true;
            }
            let (gone, rest): (VecDeque<_>, VecDeque<_>) =
                std::mem::take(&mut user.waiting).into_iter().partition(|one| one.deadline <= now);
            for one in gone {
                user.bytes -= one.bytes;
                *bytes -= one.bytes;
                *waiting -= 1;
                late.push(one.job);
            }
            user.waiting = rest;
            !user.waiting.is_empty()
        });
        turns.retain(|uid| users.contains_key(uid));
        late
    }

    /// Returns the earliest deadline of a waiting request.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.users.values().flat_map(|user| &user.waiting).map(|one| one.deadline).min()
    }

    /// Returns how many requests of this user wait.
    pub(super) fn waiting_of(&self, uid: u32) -> usize {
        self.users.get(&uid).map_or(0, |user| user.waiting.len())
    }

    /// Returns whether a place and a part of this user's share are free.
    fn may_run(&self, uid: u32) -> bool {
        self.has_place(uid, 0)
    }

    fn has_place(&self, uid: u32, more: usize) -> bool {
        let Limits { places, share, .. } = self.limits;
        self.running.len() < places
            && self.running.iter().filter(|running| **running == uid).count() < share(uid) + more
    }

    /// Returns whether all places have been taken for long, and no request has finished meanwhile.
    fn is_stuck(&mut self, now: Instant) -> bool {
        match self.full_since {
            Some((since, finished)) if finished == self.finished => {
                now.saturating_duration_since(since) > STUCK_TIME
            }
            _ => {
                self.full_since = Some((now, self.finished));
                false
            }
        }
    }
}

#[cfg(test)]
mod tests;
