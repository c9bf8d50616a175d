//! Tasks, and the grammar of one write to a `tasks` file.
//!
//! Owns: how a task is told from every other, and what the bytes of a write say. Must not know: whether a
//! process lives, who may touch it, or what a claim is.

use std::fmt;
use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};

/// A process (thread group) by its number in the daemon's PID namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Pid(NonZeroU32);

impl Pid {
    /// The process with this number; `None` for 0 and for what the kernel's `pid_t` cannot hold.
    #[must_use]
    pub const fn new(number: u32) -> Option<Self> {
        match NonZeroU32::new(number) {
            Some(number) if number.get() <= i32::MAX as u32 => Some(Self(number)),
            _ => None,
        }
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0.get()
    }
}

impl fmt::Display for Pid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A number that somebody wrote as a PID: it means a process in the writer's PID namespace, not in ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WrittenPid(pub NonZeroU32);

impl fmt::Display for WrittenPid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What tells a task from every other one of this boot, also from one that later gets its PID.
///
/// Ordered by PID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TaskId {
    /// Its number.
    pub pid: Pid,
    /// The inode of its pidfd (pidfs, kernel 6.9 and newer: never given twice in one boot); before that,
    /// where a pidfd has no inode of its own, its start time in clock ticks since boot with the top bit set.
    pub ino: u64,
}
