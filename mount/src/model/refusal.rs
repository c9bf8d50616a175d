//! Refusals: what was refused, why, and what to do about it.
//!
//! Owns: the errno and the sentence of every refusal, each in one exhaustive match. Must not know: how a
//! refusal reaches anybody, or the names of processes (they are told to it, where the reader may know them).

use nix::errno::Errno;

use super::cpuset::{CpuSet, ParseCpuSetError};
use super::pool::{InvalidPoolName, ListId, PoolName};
use super::task::TaskId;

/// A CPU list as people name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListName {
    /// Its pool.
    pub pool: PoolName,
    /// The name of its directory.
    pub cpus: String,
}

impl std::fmt::Display for ListName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.pool, self.cpus)
    }
}

/// Who holds what somebody else wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The task.
    pub task: TaskId,
    /// The list it is on.
    pub list: ListId,
    /// For how long, in nanoseconds.
    pub held: u64,
}

/// Why an operation is refused. Nothing of a refused operation has taken effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// A word of the write is no PID.
    Nonsense {
        /// The word, printable and short.
        word: String,
    },
    /// The same process is to be claimed and released.
    Contradiction,
    /// The command is too long, or was cut by stdio.
    TooLong,
    /// An earlier part of this command was too long: what follows through the same open file is a rest.
    Rest,
    /// None of the processes that were named lives, or the writer cannot be seen by the daemon.
    NoSuchProcess,
    /// Not root, and not the owner of the task.
    NotPermitted {
        /// The user who opened the file or wrote.
        uid: u32,
    },
    /// Kernel threads are not ours to place.
    KernelThread,
    /// The daemon does not place itself.
    OwnProcess,
    /// A living task is on the exclusive list.
    Held {
        /// The list.
        list: ListName,
        /// Who is on it.
        holder: Holder,
        /// Another list of the pool that is free.
        free: Option<String>,
    },
    /// Two tasks for one exclusive list.
    TwoNamed {
        /// The list.
        list: ListName,
    },
    /// No list of the pool is free.
    NoneFree {
        /// The pool.
        pool: PoolName,
        /// How many lists it has.
        lists: usize,
    },
    /// There are free lists, but the kernel lets this task on none of them.
    NoneSuits {
        /// The pool.
        pool: PoolName,
    },
    /// The kernel refused or narrowed the mask.
    MaskRefused {
        /// The list.
        list: ListName,
        /// What the kernel made of it, where it did not refuse outright.
        got: Option<CpuSet>,
    },
    /// The task widens its threads' masks as fast as they are set.
    KeepsChanging,
    /// More tasks than the daemon can watch.
    TooMany {
        /// How many there may be for this user.
        limit: usize,
    },
    /// The log of claims cannot be written.
    LogFull,
    /// Another operation on the same task has not ended in time.
    TaskBusy,
    /// The list or pool has been removed while its file was open.
    Removed,
    /// Configuring needs root.
    NotRoot,
    /// Not a name for a pool.
    BadPoolName(InvalidPoolName),
    /// Not a CPU list.
    BadCpuList(ParseCpuSetError),
    /// CPUs that this machine does not have.
    UnknownCpus {
        /// Those of the list that are unknown.
        unknown: CpuSet,
        /// Those that the machine has.
        known: CpuSet,
    },
    /// Another list has some of these CPUs already.
    Overlap {
        /// The other one.
        other: ListName,
        /// The CPUs in both.
        both: CpuSet,
    },
    /// The pool or the list is there already.
    Exists,
    /// A list that is to be removed has living tasks.
    ListInUse {
        /// The list.
        list: ListName,
        /// One of them.
        holder: Holder,
    },
    /// A pool that is to be removed has lists.
    PoolHasLists {
        /// The pool.
        pool: PoolName,
    },
    /// A pool that is to be exclusive has a list with several living tasks.
    SharedByMany {
        /// The list.
        list: ListName,
        /// How many.
        tasks: usize,
    },
    /// Neither `0` nor `1`.
    NoFlag,
    /// Not an event number.
    NoSeq,
    /// The file is not for writing, or nothing can be done to it.
    NotWritable,
    /// The configuration cannot be stored.
    CannotStore {
        /// What the state directory answered.
        errno: Errno,
    },
    /// Something failed that has no business to.
    Fault {
        /// What was tried.
        what: &'static str,
        /// What the kernel answered.
        errno: Errno,
    },
}

impl Refusal {
    /// The error number that the caller gets.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::Nonsense { .. }
            | Self::Contradiction
            | Self::KernelThread
            | Self::OwnProcess
            | Self::NoneSuits { .. }
            | Self::MaskRefused { .. }
            | Self::BadPoolName(_)
            | Self::BadCpuList(_)
            | Self::UnknownCpus { .. }
            | Self::NoFlag
            | Self::NoSeq
            | Self::NotWritable => Errno::EINVAL,
            Self::TooLong | Self::Rest => Errno::E2BIG,
            Self::NoSuchProcess => Errno::ESRCH,
            Self::NotPermitted { .. } | Self::NotRoot => Errno::EPERM,
            Self::Held { .. }
            | Self::TwoNamed { .. }
            | Self::NoneFree { .. }
            | Self::Overlap { .. }
            | Self::ListInUse { .. }
            | Self::SharedByMany { .. } => Errno::EBUSY,
            Self::KeepsChanging | Self::TaskBusy => Errno::EAGAIN,
            Self::TooMany { .. } | Self::LogFull => Errno::ENOSPC,
            Self::Removed => Errno::ENODEV,
            Self::Exists => Errno::EEXIST,
            Self::PoolHasLists { .. } => Errno::ENOTEMPTY,
            Self::CannotStore { errno } | Self::Fault { errno, .. } => *errno,
        }
    }

    /// Whom the refusal speaks of, where it speaks of a process.
    #[must_use]
    pub fn holder(&self) -> Option<Holder> {
        match self {
            Self::Held { holder, .. } | Self::ListInUse { holder, .. } => Some(*holder),
            _ => None,
        }
    }

    /// What happened and what to do about it, on one line. `holder` is how the reader may know the one that
    /// [`Refusal::holder`] names: `4711 (sleep)`, `4711`, or `a task`.
    #[must_use]
    pub fn sentence(&self, holder: &str) -> String {
        let seconds = |holder: &Holder| holder.held / 1_000_000_000;
        match self {
            Self::Nonsense { word } => {
                format!("\"{word}\" is no PID; write 0 (yourself), a PID, or -PID to release it")
            }
            Self::Contradiction => "one process is both claimed and released; write one of the two".into(),
            Self::TooLong => {
                "a command is at most 64 KiB, in one write(2); write fewer PIDs at a time".into()
            }
            Self::Rest => {
                "the rest of a command that was too long or cut; open the file again and write fewer PIDs"
                    .into()
            }
            Self::NoSuchProcess => "no such process in the writer's PID namespace; look at ps".into(),
            Self::NotPermitted { uid } => {
                format!(
                    "uid {uid} neither is root nor owns the process; claim as its owner, through a file opened by its owner"
                )
            }
            Self::KernelThread => "a kernel thread cannot be claimed; name a process of a user".into(),
            Self::OwnProcess => "kcm's own daemon cannot be claimed; name another process".into(),
            Self::Held { list, holder: held, free } => {
                let rest = free.as_ref().map_or_else(
                    || {
                        format!(
                            "no list of {} is free; wait for one with poll(2) or kcm isolate --wait",
                            list.pool
                        )
                    },
                    |free| {
                        format!("{} {free} is free; a write to pools/{}/tasks finds it", list.pool, list.pool)
                    },
                );
                format!("{list} is held by {holder} for {} s; {rest}", seconds(held))
            }
            Self::TwoNamed { list } => format!("{list} is exclusive and takes one task; name one process"),
            Self::NoneFree { pool, lists: 0 } => {
                format!("{pool} has no CPU lists; make one: mkdir pools/{pool}/<cpulist>")
            }
            Self::NoneFree { pool, lists } => {
                format!(
                    "no list of {pool} is free ({lists} taken); wait for one with poll(2) or kcm isolate --wait"
                )
            }
            Self::NoneSuits { pool } => {
                format!(
                    "the kernel lets the task on no free list of {pool}; look at its cpuset cgroup and at offline CPUs"
                )
            }
            Self::MaskRefused { list, got: None } => {
                format!(
                    "the kernel refused {list} for the task; look at its cpuset cgroup and at offline CPUs"
                )
            }
            Self::MaskRefused { list, got: Some(got) } => {
                format!(
                    "the kernel narrowed {list} to {got}; look at the task's cpuset cgroup and at offline CPUs"
                )
            }
            Self::KeepsChanging => {
                "the task keeps changing its threads' masks; stop that and write again".into()
            }
            Self::TooMany { limit } => {
                format!(
                    "{limit} tasks are watched and no more can be; release some, or raise the daemon's open files limit"
                )
            }
            Self::LogFull => "the log of claims cannot be written; make room for the state directory".into(),
            Self::TaskBusy => "another operation on the same task has not ended; write again".into(),
            Self::Removed => "this CPU list or pool has been removed; open another".into(),
            Self::NotRoot => "configuring needs root, whatever the modes say; do it as root".into(),
            Self::BadPoolName(why) => format!("{why}; choose another name"),
            Self::BadCpuList(why) => format!("no CPU list: {why}; write it like 0-2,8-10"),
            Self::UnknownCpus { unknown, known } => {
                format!("this machine has no CPU {unknown}, it has {known}; choose among those")
            }
            Self::Overlap { other, both } => {
                format!("CPU {both} is in {other} already; remove that list first")
            }
            Self::Exists => "it exists already; nothing to do".into(),
            Self::ListInUse { list, .. } => {
                format!("{list} has living tasks, one is {holder}; release them first")
            }
            Self::PoolHasLists { pool } => format!("{pool} has CPU lists; remove them first"),
            Self::SharedByMany { list, tasks } => {
                format!("{list} holds {tasks} tasks, an exclusive list takes one; release the others first")
            }
            Self::NoFlag => "neither 0 nor 1; write one of them".into(),
            Self::NoSeq => "not the number of an event; write the seq up to which you have read".into(),
            Self::NotWritable => "this file is not for writing".into(),
            Self::CannotStore { errno } => {
                format!(
                    "the configuration cannot be stored ({errno}); look at the state directory and its disk"
                )
            }
            Self::Fault { what, errno } => format!("{what}: {errno}; the daemon's log may say more"),
        }
    }
}
