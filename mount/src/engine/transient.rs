//! Transient pools: a list of one is removed when its last task leaves, and the pool with its last list.
//!
//! Owns when something is removed. Does not remove it: that is a request of another process, as if a user had made it, so
//! that the kernel forgets the name, too.

use std::collections::{HashMap, HashSet};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::Mutex;

use super::Engine;
use super::ports::Ports;
use crate::model::claims::Claims;
use crate::model::pool::{ListId, PoolId};

/// How long a list may wait for its first task, and a pool for its first list. A kill of its maker may come between.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long after its last pool the mount ends: the answer to whoever has removed that is on the way.
const LAST_ANSWER: Duration = Duration::from_millis(200);
/// How long until a removal is tried again that was refused or not answered.
const AGAIN: Duration = Duration::from_secs(1);

/// The lists of transient pools.
#[derive(Debug)]
pub(super) struct Transient {
    /// The lists that have had a task.
    had_tasks: Mutex<HashSet<ListId>>,
    /// Wakes the thread that removes.
    bell: EventFd,
}

/// Something that nobody uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Unused {
    /// A directory, relative to `pools`.
    Directory(String),
    /// The mount: it has no pools.
    Mount,
}

/// The unused things, and since when they are unused.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    /// Keyed by node.
    seen: HashMap<u64, Seen>,
    /// The pools that have had a list, by node, and the mount if it has had a pool.
    had_children: HashSet<u64>,
}

/// Something unused that was seen before.
#[derive(Clone, Copy, Debug)]
struct Seen {
    since: Instant,
    /// When its removal was tried last.
    tried: Option<Instant>,
}

/// The result of a look.
#[derive(Debug, Default)]
pub(super) struct Due {
    /// Remove these now.
    pub(super) now: Vec<Unused>,
    /// The time of the next look, if nothing changes until then.
    pub(super) next: Option<Instant>,
    /// Whether transient lists have tasks, whose deaths matter.
    pub(super) has_tasks: bool,
}

/// Something unused, and how long it stays.
#[derive(Debug)]
struct Found {
    what: Unused,
    stays: Duration,
}

impl Found {
    fn new(what: Unused, was_used: bool) -> Self {
        let stays = match &what {
            _ if !was_used => PATIENCE,
            Unused::Directory(_) => Duration::ZERO,
            Unused::Mount => LAST_ANSWER,
        };
        Self { what, stays }
    }
}

/// The node of the mount in a [`Schedule`]. No pool or list has it.
const MOUNT: u64 = 0;

impl Transient {
    /// # Errors
    /// No descriptors are left.
    pub(super) fn new() -> nix::Result<Self> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        Ok(Self { had_tasks: Mutex::default(), bell: EventFd::from_flags(flags)? })
    }

    /// The configuration has changed.
    pub(super) fn wake(&self) {
        let _ = self.bell.write(1);
    }

    /// A task has come to a list or has left it.
    pub(super) fn note(&self, claims: &Claims, id: ListId) {
        let pool = claims.list(id).and_then(|list| claims.pool(list.pool()));
        if pool.is_some_and(|pool| pool.is_transient()) {
            self.had_tasks.lock().insert(id);
            self.wake();
        }
    }
}

impl Schedule {
    /// Returns the removals for this time, and notes that they are tried.
    fn take_due(&mut self, unused: HashMap<u64, Found>, now: Instant) -> Due {
        self.seen.retain(|node, _| unused.contains_key(node));
        let mut all = Due::default();
        for (node, Found { what, stays }) in unused {
            let seen = self.seen.entry(node).or_insert(Seen { since: now, tried: None });
            if seen.due(stays) <= now {
                seen.tried = Some(now);
                all.now.push(what);
            }
            let due = seen.due(stays);
            all.next = Some(all.next.map_or(due, |next| next.min(due)));
        }
        all
    }
}

impl Seen {
    fn due(self, stays: Duration) -> Instant {
        self.tried.map_or(self.since + stays, |tried| tried + AGAIN)
    }
}

impl<P: Ports> Engine<P> {
    /// Removes what nobody uses in transient pools; for a thread of its own. Sleeps while there are none. `ends`: whether
    /// the mount is to end without pools, too. `remove` removes the directory, if it is still unused, or ends the mount.
    pub(crate) fn remove_unused_forever(&self, ends: bool, remove: impl Fn(&Unused)) {
        let mut schedule = Schedule::default();
        loop {
            let _ = self.transient.bell.read();
            let due = self.due_removals(&mut schedule, ends, Instant::now());
            due.now.iter().for_each(&remove);
            let left =
                |next: Instant| next.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            let timeout = due.next.and_then(|next| PollTimeout::try_from(left(next)).ok());
            let mut fds = vec![PollFd::new(self.transient.bell.as_fd(), PollFlags::POLLIN)];
            if due.has_tasks {
                fds.push(PollFd::new(self.processes.as_fd(), PollFlags::POLLIN));
            }
            let _ = poll(&mut fds, timeout.unwrap_or(PollTimeout::NONE));
            if due.has_tasks {
                self.reap();
            }
        }
    }

    /// Returns the removals for this time.
    pub(super) fn due_removals(&self, schedule: &mut Schedule, ends: bool, now: Instant) -> Due {
        let mut unused = HashMap::new();
        let mut has_tasks = false;
        let claims = self.configuration();
        let mut had_tasks = self.transient.had_tasks.lock();
        had_tasks.retain(|list| claims.list(*list).is_some());
        schedule.had_children.retain(|node| *node == MOUNT || claims.pool(PoolId(*node)).is_some());
        for (id, pool) in claims.pools().filter(|(_, pool)| pool.is_transient()) {
            for (list, found) in pool.lists().filter_map(|id| Some((id, claims.list(id)?))) {
                if found.is_used() {
                    had_tasks.insert(list);
                    has_tasks = true;
                } else if found.is_free() {
                    let what = Unused::Directory(format!("{}/{}", pool.name(), found.name().cpus));
                    unused.insert(list.0, Found::new(what, had_tasks.contains(&list)));
                }
            }
            if pool.lists().len() > 0 {
                schedule.had_children.insert(id.0);
            } else {
                let what = Unused::Directory(pool.name().to_string());
                unused.insert(id.0, Found::new(what, schedule.had_children.contains(&id.0)));
            }
        }
        drop(had_tasks);
        if claims.pools().next().is_some() {
            schedule.had_children.insert(MOUNT);
        } else if ends {
            unused.insert(MOUNT, Found::new(Unused::Mount, schedule.had_children.contains(&MOUNT)));
        }
        drop(claims);
        Due { has_tasks, ..schedule.take_due(unused, now) }
    }
}
