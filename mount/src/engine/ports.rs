//! The ports of the engine: its needs from the rest of the daemon, as traits.
//!
//! Owns these traits. The engine is generic over [`Ports`], so that its tests run it on fakes, without root and
//! without a mount; `live` implements the traits with the kernel and the state directory. Does not know the engine.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use crate::journal::{AppendError, Config, Record};
use crate::model::command::{CgroupId, Ending, SavedMask};
use crate::model::cpuset::CpuSet;
use crate::model::partition::{Extent, Missing, Partition};
use crate::model::pool::ListId;
use crate::model::rights::User;
use crate::model::task::{Pid, TaskId, WrittenPid};
use crate::partitions::{Found, PartitionError};
use crate::process::{BlockedWriter, Facts, Look, MaskError, ScannedProcess, Seen, Threads};

/// One implementation of each port.
pub(crate) trait Ports: Copy + Debug + 'static {
    type Processes: Processes + Masks + Watch;
    type Journal: Journal;
    type Clock: Clock;
    type Partitions: Partitions;
}

/// A process that stays the same even if its PID is reused.
pub(crate) trait Process: Debug + Send + Sync + 'static {
    fn id(&self) -> TaskId;

    /// Returns whether any of its threads is alive.
    fn is_alive(&self) -> bool;
}

/// Finds processes and describes them. Unless a method says otherwise, `None` means that the process has died.
pub(crate) trait Processes: Debug + Send + Sync + 'static {
    type Process: Process;

    /// Returns the process of a thread; cheap for a process that has asked before.
    fn of_thread(&self, tid: Pid) -> io::Result<Option<Arc<Self::Process>>>;

    /// Returns the process of a thread.
    fn open(&self, tid: Pid) -> io::Result<Option<Self::Process>>;

    /// Returns a known task, even a dead one that its parent has not collected yet.
    fn find(&self, task: TaskId) -> io::Result<Option<Self::Process>>;

    /// Returns the process that has this PID in the PID namespace of `writer`.
    fn with_pid_in_namespace_of(
        &self,
        writer: &Self::Process,
        pid: WrittenPid,
    ) -> io::Result<Option<Arc<Self::Process>>>;

    /// Returns the PID of a process in the PID namespace of `reader`.
    fn pid_in_namespace_of(&self, reader: &Self::Process, pid: Pid) -> Option<u32>;

    /// Returns whether the process is in the PID namespace of the daemon.
    fn shares_our_namespace(&self, process: &Self::Process) -> io::Result<bool>;

    /// Calls `visit` with the parent, its parent, and so on, until it returns false, has seen the first process of the
    /// PID namespace, or has seen `most` ancestors. PID 1 of the machine is left out.
    fn walk_ancestors(&self, from: &Self::Process, most: usize, visit: &mut dyn FnMut(TaskId) -> bool);

    /// Calls `visit` with all processes that have a thread whose mask is wanted, without kernel threads, until it breaks
    /// off: first those whose first thread has such a mask, then the others; the oldest first.
    fn scan(
        &self,
        wanted: &dyn Fn(&CpuSet) -> bool,
        visit: &mut dyn FnMut(ScannedProcess) -> ControlFlow<()>,
    ) -> io::Result<()>;

    /// Returns whether a process that was found by its [`TaskId`] is certainly that one, and no other one with its PID.
    fn is_certain(&self, process: &Self::Process) -> bool;

    fn facts(&self, process: &Self::Process) -> io::Result<Option<Facts>>;

    /// Returns the user on whose behalf a thread asks, with its capabilities.
    fn user(&self, tid: u32, uid: u32) -> User;

    /// Returns whether a thread has `CAP_SYS_NICE` over a process in a user namespace below the daemon's.
    fn is_covered(&self, tid: u32, uid: u32, process: &Self::Process) -> bool;

    /// Returns the permitted capabilities of a process; all if it has died.
    fn permitted(&self, process: &Self::Process) -> u64;

    /// Returns the groups that count for a thread's rights to files.
    fn groups(&self, tid: u32) -> io::Result<Vec<u32>>;

    /// Returns the time of its start, in clock ticks since boot.
    fn started(&self, process: &Self::Process) -> Option<u64>;

    /// Returns its cgroups.
    fn cgroup(&self, process: &Self::Process) -> Option<CgroupId>;

    /// Returns the number that [`Processes::cgroup`] has for the cgroup that an earlier version recorded as `recorded`.
    fn upgrade_cgroup(&self, process: &Self::Process, recorded: u64) -> u64;

    /// Returns the name of its program.
    fn comm(&self, process: &Self::Process) -> Option<String>;

    /// See [`crate::process::Processes::comm_at_death`].
    fn comm_at_death(&self, process: &Self::Process) -> Option<String>;

    /// See [`crate::process::Processes::has_terminal_of_another`].
    fn has_terminal_of_another(&self, task: TaskId, uid: u32) -> bool;

    /// See [`crate::process::session_of`].
    fn session(&self, tid: u32) -> Option<u32>;

    /// Returns how a dead process ended.
    fn ending(&self, process: &Self::Process) -> Ending;

    /// Returns the real uid of a dead process, if the kernel can still tell.
    fn user_at_death(&self, process: &Self::Process) -> Option<u32>;
}

/// Sets and reads the affinity masks of tasks.
pub(crate) trait Masks: Processes {
    /// The masks that the threads of a task had, for [`Masks::undo`].
    type SavedMasks: Debug;

    /// Returns the mask of the task's leader, or of the thread with this number.
    fn leader_mask(&self, pid: Pid) -> Result<CpuSet, MaskError>;

    /// Returns the CPUs that are offline.
    fn offline(&self) -> CpuSet;

    /// Returns whether threads of a task are within these CPUs.
    fn are_within(&self, process: &Self::Process, cpus: &CpuSet, look: Look) -> Result<bool, MaskError>;

    /// Looks at the threads of a task whose list has these CPUs, while nobody else sets its masks. `before`: the result of
    /// the last look that found one that is not within them.
    fn look_at_masks(
        &self,
        process: &Self::Process,
        cpus: &CpuSet,
        before: Option<&Seen>,
    ) -> Result<Seen, MaskError>;

    /// Returns the mask to save for a task, as far as it is known without touching the task.
    fn saved_mask(&self, process: &Self::Process) -> Result<SavedMask, MaskError>;

    /// Returns the mask to restore for a task whose claim was not finished. Changes the task's mask for a moment.
    fn probe_saved_mask(&self, process: &Self::Process, saved: SavedMask) -> Result<SavedMask, MaskError>;

    /// Sets the mask of a task whose intent is recorded, and reads it back. Returns the mask to save, too: `saved`, or
    /// a better one. On an error the task has the masks that it had.
    fn set_first_mask(
        &self,
        process: &Self::Process,
        cpus: &CpuSet,
        saved: SavedMask,
        waiting: BlockedWriter,
    ) -> Result<(SavedMask, Self::SavedMasks), MaskError>;

    /// Sets the mask of a task that has a claim on the CPUs `own`, and reads it back. On an error the task has the
    /// masks that it had.
    fn set_mask(
        &self,
        process: &Self::Process,
        cpus: &CpuSet,
        own: &CpuSet,
        threads: Threads,
        waiting: BlockedWriter,
    ) -> Result<Self::SavedMasks, MaskError>;

    /// Restores the previous masks of a task's threads. Never fails.
    fn undo(&self, process: &Self::Process, previous: Self::SavedMasks, waiting: BlockedWriter);

    /// Sets the mask of all threads, or all CPUs if that is not possible. Never fails.
    fn restore_mask(&self, process: &Self::Process, mask: &SavedMask, waiting: BlockedWriter);
}

/// Watches tasks for their death. As a descriptor, it is readable while a watched task is dead.
pub(crate) trait Watch: Processes + AsFd {
    /// Watches a task. A task that is dead already is reported like any other.
    fn watch(&self, process: Arc<Self::Process>) -> io::Result<()>;

    fn unwatch(&self, task: &TaskId);

    /// Returns a watched task.
    fn watched(&self, task: &TaskId) -> Option<Arc<Self::Process>>;

    /// Returns whether a watched task is dead; one system call.
    fn any_dead(&self) -> bool;

    /// Returns the watched tasks that are dead.
    fn dead(&self) -> Vec<TaskId>;

    /// Returns how many tasks can be watched.
    fn limit(&self) -> usize;
}

/// Keeps records and the configuration for the next worker.
///
/// Records and events are kept in the order of the calls of `append`, `defer` and `note_event`. `defer` and
/// `note_event` do no I/O, so they may be called under any lock.
pub(crate) trait Journal: Debug + Send + Sync + 'static {
    /// Writes a record, after all deferred ones. It survives this process when this returns. Waits for the disk, but
    /// not for another thread that has waited too long.
    fn append(&self, record: &Record) -> Result<(), AppendError>;

    /// Queues the record of something that has happened.
    fn defer(&self, record: Record);

    /// Queues a line of the events file, which counts as this user's.
    fn note_event(&self, uid: u32, line: &str);

    /// Writes what is queued. Waits no longer than [`Journal::append`].
    fn flush(&self) -> Result<(), AppendError>;

    /// Writes what is queued, unless another thread is writing.
    fn flush_deferred(&self);

    /// Has another thread write what is queued.
    fn request_flush(&self);

    /// Has that thread write what is queued, and waits for that no longer than `limit`.
    fn flush_within(&self, limit: Duration);

    /// Writes what is queued whenever [`Journal::request_flush`] asks for it; does not return.
    fn flush_forever(&self);

    /// Returns whether a thread has waited for the disk for too long.
    fn is_stalled(&self) -> bool;

    /// Replaces the configuration; durable when this returns.
    fn store_config(&self, config: &Config) -> io::Result<()>;

    /// Returns the identity of the mount.
    fn mount(&self) -> u64;

    /// Returns the answer to a request that an earlier worker has decided: 0 or an errno.
    fn answer(&self, request: u64) -> Option<i32>;

    /// Returns how often a request was carried out again after a worker died.
    fn retries(&self, request: u64) -> usize;
}

/// Makes isolated partitions of the machine's CPUs, and takes them back. Keeps nothing in memory.
pub(crate) trait Partitions: Debug + Send + Sync + 'static {
    /// Returns what this machine lacks for partitions.
    fn missing(&self) -> Option<Missing>;

    /// Returns the partition that would be made for a process. `is_partition` says whether a cgroup was made as one already.
    fn plan(
        &self,
        pid: Pid,
        list: ListId,
        cpus: &CpuSet,
        extent: &Extent,
        is_partition: &dyn Fn(&str) -> bool,
    ) -> Result<Partition, PartitionError>;

    /// Makes a partition, moves the process into it, and reads back that it is in force. On an error it has to be taken back.
    fn make(&self, partition: &Partition, pid: Pid) -> Result<(), PartitionError>;

    /// Looks whether a partition is in force and has the process.
    fn look(&self, partition: &Partition, pid: Pid) -> Found;

    /// Returns the threads in a partition.
    fn members(&self, partition: &Partition) -> Vec<Pid>;

    /// Returns that one of these partitions in which a process is.
    fn partition_of(&self, pid: Pid, partitions: &[Partition]) -> Option<Partition>;

    /// Moves a process out of a partition into the cgroup above it.
    fn leave(&self, partition: &Partition, pid: Pid) -> io::Result<()>;

    /// Moves a process back into a partition that it has left.
    fn enter(&self, partition: &Partition, pid: Pid) -> io::Result<()>;

    /// Opens files that poll(2) reports when the partition changes after this, or has no process any more.
    fn watch(&self, partition: &Partition) -> Vec<File>;

    /// Takes everything back, or as much as was made. A controller that one of the others needs stays on, and that one has to
    /// take it back later. Returns the others that changed.
    fn take_back(&self, partition: &Partition, others: &[Partition]) -> io::Result<Vec<Partition>>;
}

/// The clocks.
pub(crate) trait Clock: Debug + Send + Sync + 'static {
    /// Nanoseconds since boot.
    fn since_boot(&self) -> u64;

    /// Wall time in milliseconds since 1970.
    fn wall_ms(&self) -> u64;

    /// The length of a clock tick in nanoseconds.
    fn tick(&self) -> u64;

    /// The nanoseconds that this thread has worked, or has waited for proofs that a task has its mask.
    fn spent(&self) -> u64;
}
