//! Refusals: why an operation is refused, and what the user can do about it.
//!
//! Owns the errno and the sentence of every refusal, each in one exhaustive match. Does not know how a refusal
//! reaches the user, or the names of processes: a caller passes a name if the reader may know it.
//!
//! Longer than 400 lines because each refusal has its line in three places that are read together.

use nix::errno::Errno;

use super::cpuset::{CpuSet, ParseCpuSetError};
use super::partition::Missing;
use super::pool::{InvalidPoolName, ListId, PoolName};
use super::task::TaskId;

/// The name of a CPU list for people.
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

/// The task that holds a list which another one wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The task.
    pub task: TaskId,
    /// The list it is on.
    pub list: ListId,
    /// How long it has been on the list, in nanoseconds.
    pub held: u64,
}

/// Why an operation is refused. A refused operation has changed nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// A word of the write is not a PID.
    Nonsense {
        /// The word, printable and short.
        word: String,
    },
    /// The command both claims and releases a process.
    Contradiction,
    /// The command is too long, or was cut by stdio.
    TooLong,
    /// An earlier part of this command was too long, so what follows through the same open file is refused too.
    AfterTooLong,
    /// All named processes are dead, or the daemon cannot see the writer.
    NoSuchProcess,
    /// The kernel would not let the user set the affinity of the task.
    NotPermitted {
        /// The user who opened the file or wrote.
        uid: u32,
    },
    /// The process is a kernel thread.
    KernelThread,
    /// The process belongs to the daemon.
    OwnProcess,
    /// A live task is on the exclusive list.
    Held {
        /// The list.
        list: ListName,
        /// The task on it.
        holder: Holder,
        /// A free list of the pool.
        free: Option<String>,
    },
    /// The command names two tasks for an exclusive list.
    TwoNamed {
        /// The list.
        list: ListName,
    },
    /// No list of the pool is free.
    NoneFree {
        /// The pool.
        pool: PoolName,
        /// How many of its lists are taken.
        taken: usize,
        /// How many of its lists are free and drain.
        draining: usize,
        /// The list that has been held for the longest time, and its holder.
        longest: Option<(ListName, Holder)>,
    },
    /// The free lists of the pool are for tasks that wait in turn.
    OthersWait {
        /// The pool.
        pool: PoolName,
        /// How many tasks wait before this one.
        before: usize,
    },
    /// Too many tasks wait in turn.
    QueueFull,
    /// The data is not one PID.
    NotOnePid,
    /// Files cannot be made, removed, renamed or linked.
    FixedFiles {
        /// The operation: `created`.
        operation: &'static str,
        /// The error that kernel filesystems with fixed files return.
        errno: Errno,
    },
    /// The list takes no new tasks.
    Draining {
        /// The list.
        list: ListName,
    },
    /// The pool has free lists, but the kernel allows the task on no free list.
    NoneSuits {
        /// The pool.
        pool: PoolName,
    },
    /// The kernel refused or narrowed the mask.
    MaskRefused {
        /// The list.
        list: ListName,
        /// The narrowed mask; `None` if the kernel refused it.
        got: Option<CpuSet>,
    },
    /// The list is exclusive and has offline CPUs.
    Offline {
        /// The list.
        list: ListName,
        /// Its CPUs that are offline.
        offline: CpuSet,
    },
    /// The task widens its threads' masks as fast as they are set.
    KeepsChanging,
    /// The task creates threads, and not all of them could be proven to have the mask.
    Unsettled,
    /// The write takes more time than its user may use now.
    OutOfTime {
        /// The user who writes.
        uid: u32,
    },
    /// A thread has the policy `SCHED_DEADLINE`.
    Deadline,
    /// The kernel refuses the daemon something for which it needs a capability.
    DaemonLacks {
        /// The name of the capability.
        capability: &'static str,
    },
    /// The daemon can watch no more tasks.
    TooMany {
        /// The limit for this user.
        limit: usize,
    },
    /// There is no room for the claims log.
    JournalFull,
    /// The claims log cannot be written for another reason.
    CannotRecord {
        /// The reason. The answer is the same as for a full disk, so that clients need to know only one.
        errno: Errno,
    },
    /// The disk of the state directory does not answer in time.
    DiskStalled,
    /// Another operation on the same task has not finished in time.
    TaskBusy,
    /// More requests of the user wait than are kept or carried out in time.
    TooManyRequests {
        /// The user.
        uid: u32,
    },
    /// The list or pool has been removed while its file was open.
    Removed,
    /// The user lacks `CAP_SYS_ADMIN` in the user namespace of the daemon.
    NotAdmin,
    /// The name is not valid for a pool.
    BadPoolName(InvalidPoolName),
    /// The name is not a CPU list.
    BadCpuList(ParseCpuSetError),
    /// CPUs that this machine does not have.
    UnknownCpus {
        /// The unknown CPUs of the list.
        unknown: CpuSet,
        /// The CPUs of the machine.
        known: CpuSet,
    },
    /// Another list has some of these CPUs.
    Overlap {
        /// The other list.
        other: ListName,
        /// The CPUs in both.
        both: CpuSet,
    },
    /// The pool or the list exists already.
    Exists,
    /// A list with live tasks cannot be removed.
    ListInUse {
        /// The list.
        list: ListName,
        /// One of the tasks.
        holder: Holder,
    },
    /// A pool with lists cannot be removed.
    PoolHasLists {
        /// The pool.
        pool: PoolName,
    },
    /// A pool cannot become exclusive while a list has several live tasks.
    SharedByMany {
        /// The list.
        list: ListName,
        /// How many.
        tasks: usize,
    },
    /// This machine can make no partitions.
    CannotIsolate {
        /// The lack.
        missing: Missing,
    },
    /// A shared pool cannot be isolated.
    NotExclusive {
        /// The pool.
        pool: PoolName,
    },
    /// An isolated pool cannot become shared.
    IsolatedPool {
        /// The pool.
        pool: PoolName,
    },
    /// The cgroup of the task can have no partition below it.
    UnsuitableCgroup {
        /// The path of the cgroup, printable.
        path: String,
        /// The reason.
        why: String,
    },
    /// The kernel makes no partition of the list.
    PartitionRefused {
        /// The list.
        list: ListName,
        /// The reason that the kernel gives.
        why: String,
    },
    /// The data is not `affinity` or `isolated`.
    NotAMode,
    /// The data is not `0` or `1`.
    NotAFlag,
    /// The data is not `drain` or `undrain`.
    NotAStateChange,
    /// The data is not a configuration.
    BadConfig {
        /// What is wrong with it.
        why: String,
    },
    /// The data is not the number of an event.
    NotASeq,
    /// The file cannot be written.
    NotWritable,
    /// The directory has only fixed entries.
    FixedDirectory,
    /// The configuration cannot be stored.
    CannotStore {
        /// The error of the state directory.
        errno: Errno,
    },
    /// A system call failed that should not fail.
    Fault {
        /// The operation that failed.
        what: &'static str,
        /// The error of the kernel.
        errno: Errno,
    },
}

impl Refusal {
    /// Returns the error number for the caller.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::Nonsense { .. }
            | Self::Contradiction
            | Self::KernelThread
            | Self::OwnProcess
            | Self::NoneSuits { .. }
            | Self::MaskRefused { .. }
            | Self::Offline { .. }
            | Self::Deadline
            | Self::BadPoolName(_)
            | Self::BadCpuList(_)
            | Self::UnknownCpus { .. }
            | Self::NotExclusive { .. }
            | Self::PartitionRefused { .. }
            | Self::NotAMode
            | Self::NotAFlag
            | Self::NotAStateChange
            | Self::BadConfig { .. }
            | Self::NotASeq
            | Self::NotOnePid
            | Self::NotWritable => Errno::EINVAL,
            Self::TooLong | Self::AfterTooLong => Errno::E2BIG,
            Self::NoSuchProcess => Errno::ESRCH,
            Self::NotPermitted { .. } | Self::DaemonLacks { .. } | Self::NotAdmin | Self::FixedDirectory => {
                Errno::EPERM
            }
            Self::Held { .. }
            | Self::TwoNamed { .. }
            | Self::NoneFree { .. }
            | Self::OthersWait { .. }
            | Self::Draining { .. }
            | Self::Overlap { .. }
            | Self::ListInUse { .. }
            | Self::SharedByMany { .. }
            | Self::IsolatedPool { .. } => Errno::EBUSY,
            Self::CannotIsolate { .. } | Self::UnsuitableCgroup { .. } => Errno::EOPNOTSUPP,
            Self::KeepsChanging
            | Self::Unsettled
            | Self::OutOfTime { .. }
            | Self::TaskBusy
            | Self::TooManyRequests { .. } => Errno::EAGAIN,
            Self::TooMany { .. } | Self::QueueFull | Self::JournalFull => Errno::ENOSPC,
            Self::DiskStalled => Errno::EIO,
            Self::Removed => Errno::ENODEV,
            Self::CannotRecord { .. } => Errno::ENOSPC,
            Self::Exists => Errno::EEXIST,
            Self::PoolHasLists { .. } => Errno::ENOTEMPTY,
            Self::CannotStore { errno } | Self::Fault { errno, .. } | Self::FixedFiles { errno, .. } => {
                *errno
            }
        }
    }

    /// Returns the task that the refusal names, if it names one.
    #[must_use]
    pub fn holder(&self) -> Option<Holder> {
        match self {
            Self::Held { holder, .. } | Self::ListInUse { holder, .. } => Some(*holder),
            Self::NoneFree { longest, .. } => longest.as_ref().map(|(_, holder)| *holder),
            _ => None,
        }
    }

    /// Returns the reason and the cure, on one line. `holder` is the name of [`Refusal::holder`] as far as the
    /// reader may know it: `4711 (sleep)`, `4711`, or `a task`.
    #[must_use]
    pub fn sentence(&self, holder: &str) -> String {
        let seconds = |holder: &Holder| holder.held / 1_000_000_000;
        match self {
            Self::Nonsense { word } => {
                format!("\"{word}\" is not a PID; write 0 (yourself), a PID, or -PID to release it")
            }
            Self::Contradiction => "one process is both claimed and released; write one of the two".into(),
            Self::TooLong => {
                "a command is at most 64 KiB, in one write(2); write fewer PIDs at a time".into()
            }
            Self::AfterTooLong => {
                "this follows a command that was too long or cut; open the file again and write fewer PIDs"
                    .into()
            }
            Self::NoSuchProcess => "no such process in the writer's PID namespace; look at ps".into(),
            Self::NotPermitted { uid } => {
                format!(
                    "uid {uid} does not own the process, or has fewer capabilities, and lacks CAP_SYS_NICE over it; open and write as its owner"
                )
            }
            Self::KernelThread => "a kernel thread cannot be claimed; name a process of a user".into(),
            Self::OwnProcess => "kcm's own daemon cannot be claimed; name another process".into(),
            Self::Held { list, holder: held, free } => {
                let rest = free.as_ref().map_or_else(
                    || {
                        format!(
                            "no list of {} is free; wait for one with poll(2), kcm isolate --wait or kcm claim --wait",
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
            Self::NoneFree { pool, taken: 0, draining: 0, .. } => {
                format!("{pool} has no CPU lists; make one: mkdir pools/{pool}/<cpulist>")
            }
            Self::Draining { list } => {
                format!("{list} is draining and takes no new task; claim another list, or write undrain to its file state")
            }
            Self::NoneFree { pool, taken, draining, longest } => {
                let longest = longest.as_ref().map_or_else(String::new, |(list, held)| {
                    format!("; {list} is held by {holder} for {} s, the longest time", seconds(held))
                });
                let draining = if *draining > 0 { format!(", {draining} draining") } else { String::new() };
                format!(
                    "no list of {pool} is free ({taken} taken{draining}){longest}; wait for one with poll(2), kcm isolate --wait or kcm claim --wait"
                )
            }
            Self::OthersWait { pool, before } => {
                format!(
                    "the free lists of {pool} are for {before} tasks that wait in turn; wait, too: kcm isolate --wait or kcm claim --wait"
                )
            }
            Self::QueueFull => {
                "too many tasks wait in turn; end some of them, or wait with poll(2) on tasks".into()
            }
            Self::NotOnePid => "not one PID; write 0 (yourself) or a PID, and then wait with poll(2)".into(),
            Self::FixedFiles { operation, .. } => {
                format!(
                    "files cannot be {operation} here; make pools and CPU lists with mkdir, and remove them with rmdir"
                )
            }
            Self::NoneSuits { pool } => {
                format!(
                    "no free list of {pool} is allowed for this task; look at its cpuset cgroup and at offline CPUs"
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
            Self::Offline { list, offline } => {
                format!(
                    "{list} has offline CPUs: {offline}; bring them online, or write 1 to partial in its pool"
                )
            }
            Self::KeepsChanging => {
                "the task keeps changing its threads' masks; stop that and write again".into()
            }
            Self::Unsettled => {
                "the task creates threads, and it is not certain that all have the mask; write again".into()
            }
            Self::OutOfTime { uid } => {
                format!(
                    "the writes of uid {uid} take too much time; write fewer PIDs, or write again in a second"
                )
            }
            Self::Deadline => {
                "the kernel gives no thread with the policy SCHED_DEADLINE a mask; change the policy first: chrt --other --pid 0 PID"
                    .into()
            }
            Self::DaemonLacks { capability } => {
                format!(
                    "kcm's daemon lacks {capability}; give it to its service or container, and start it again"
                )
            }
            Self::TooMany { limit } => {
                format!(
                    "{limit} tasks are watched, which is the limit; release some, or raise the daemon's open files limit"
                )
            }
            Self::JournalFull => "the claims log cannot be written; make room for the state directory".into(),
            Self::CannotRecord { errno } => {
                format!(
                    "the claims log cannot be written ({errno}); look at the state directory and its disk"
                )
            }
            Self::DiskStalled => {
                "the disk of the state directory does not answer; look at it and at dmesg, then try again"
                    .into()
            }
            Self::TaskBusy => "another operation on the same task has not finished; write again".into(),
            Self::TooManyRequests { uid } => {
                format!("too many requests of uid {uid} wait; send fewer at a time, then try again")
            }
            Self::Removed => "this CPU list or pool has been removed; open another".into(),
            Self::NotAdmin => {
                "this needs CAP_SYS_ADMIN on the node, whatever uid and modes say; do it as root of the node"
                    .into()
            }
            Self::BadPoolName(why) => format!("{why}; choose another name"),
            Self::BadCpuList(why) => format!("not a CPU list: {why}; write it like 0-2,8-10"),
            Self::UnknownCpus { unknown, known } => {
                format!("this machine does not have CPU {unknown}, it has {known}; choose among those")
            }
            Self::Overlap { other, both } => {
                format!("CPU {both} is in {other} already; remove that list first")
            }
            Self::Exists => "it exists already; nothing to do".into(),
            Self::ListInUse { list, .. } => {
                format!("{list} has live tasks, one is {holder}; release them first")
            }
            Self::PoolHasLists { pool } => format!("{pool} has CPU lists; remove them first"),
            Self::SharedByMany { list, tasks } => {
                format!("{list} has {tasks} tasks, an exclusive list takes one; release the others first")
            }
            Self::CannotIsolate { missing } => format!("this machine cannot isolate CPUs: {missing}"),
            Self::NotExclusive { pool } => {
                format!("{pool} is shared, and only exclusive lists can be isolated; write 1 to its file exclusive first")
            }
            Self::IsolatedPool { pool } => {
                format!("{pool} is isolated, so it stays exclusive; write affinity to its file mode first")
            }
            Self::UnsuitableCgroup { path, why } => {
                format!("no partition can be made in the task's cgroup {path}: {why}; start the task in a cgroup of its own")
            }
            Self::PartitionRefused { list, why } => {
                format!("the kernel does not isolate {list}: {why}; free these CPUs from other cpuset settings")
            }
            Self::NotAMode => "not affinity or isolated; write one of them".into(),
            Self::NotAFlag => "not 0 or 1; write one of them".into(),
            Self::NotAStateChange => "not drain or undrain; write one of them".into(),
            Self::BadConfig { why } => format!("not a configuration: {why}; write what kcm apply would"),
            Self::NotASeq => {
                "not the number of an event; write the seq of the last event that you have read".into()
            }
            Self::NotWritable => {
                "this file is read-only; commands go to tasks, queue, exclusive, partial, mode, transient, state, info/config and info/reclaimed".into()
            }
            Self::FixedDirectory => {
                "nothing can be made, renamed or removed here; pools are in pools/, and CPU lists in a pool".into()
            }
            Self::CannotStore { errno } => {
                format!(
                    "the configuration cannot be stored ({errno}); look at the state directory and its disk"
                )
            }
            Self::Fault { what, errno } => format!("{what}: {errno}; the daemon log may say more"),
        }
    }
}
