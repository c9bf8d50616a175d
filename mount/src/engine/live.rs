//! The ports of a daemon that serves a mount: the processes of this machine and the state directory.
//!
//! Owns nothing but the delegation. Does not know what the engine does with it.
//!
//! Longer than 400 lines because the ports have as many functions.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::ports::{Clock, Journal, Masks, Partitions, Ports, Process, Processes, Watch};
use super::{Engine, OwnProcesses, StartError};
use crate::clock;
use crate::journal::{AppendError, Config, Record, Recovered, StateDir};
use crate::model::command::{CgroupId, Ending, SavedMask};
use crate::model::cpuset::CpuSet;
use crate::model::partition::{Extent, Missing, Partition};
use crate::model::pool::ListId;
use crate::model::rights::User;
use crate::model::task::{Pid, TaskId, WrittenPid};
use crate::model::topology::Topology;
use crate::partitions::{Found, PartitionError, Tree};
use crate::process::{
    self, BlockedWriter, Facts, KeptPidfds, Look, MaskError, SavedMasks, ScannedProcess, Seen, Threads,
};

/// The real ports.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Live {}

impl Ports for Live {
    type Processes = Machine;
    type Journal = StateDir;
    type Clock = SystemClock;
    type Partitions = Cgroups;
}

impl Engine {
    /// Starts the engine on this machine and this state directory. Also returns the number of the first open file.
    ///
    /// # Errors
    /// /proc is not mounted, or no descriptors are left.
    pub(crate) fn start(
        state: StateDir,
        recovered: Recovered,
        topology: Topology,
        own: OwnProcesses,
        kept: KeptPidfds,
    ) -> Result<(Self, u32), StartError> {
        let recorded: BTreeSet<TaskId> = recovered.claims.iter().map(|claim| claim.task).collect();
        let watch =
            process::Watch::new(kept, |task| recorded.contains(task)).map_err(StartError::Processes)?;
        let processes = process::Processes::new().map_err(StartError::Processes)?;
        let machine = Machine { processes, watch };
        Self::with_ports((machine, state, SystemClock, Cgroups::default()), recovered, topology, own)
    }
}

/// The processes of this machine, and the watched ones among them.
#[derive(Debug)]
pub(crate) struct Machine {
    processes: process::Processes,
    watch: process::Watch,
}

impl Process for process::Process {
    fn id(&self) -> TaskId {
        self.id()
    }

    fn is_alive(&self) -> bool {
        self.is_alive()
    }
}

impl Processes for Machine {
    type Process = process::Process;

    fn of_thread(&self, tid: Pid) -> io::Result<Option<Arc<process::Process>>> {
        self.processes.of_thread(tid, &self.watch)
    }

    fn open(&self, tid: Pid) -> io::Result<Option<process::Process>> {
        self.processes.open(tid)
    }

    fn find(&self, task: TaskId) -> io::Result<Option<process::Process>> {
        match self.watch.take_kept(task) {
            Some(process) => Ok(Some(process)),
            None => self.processes.find(task),
        }
    }

    fn with_pid_in_namespace_of(
        &self,
        writer: &process::Process,
        pid: WrittenPid,
    ) -> io::Result<Option<Arc<process::Process>>> {
        self.processes.open_in_namespace_of(writer, pid, &self.watch)
    }

    fn pid_in_namespace_of(&self, reader: &process::Process, pid: Pid) -> Option<u32> {
        self.processes.number_in_namespace_of(reader, pid)
    }

    fn shares_our_namespace(&self, process: &process::Process) -> io::Result<bool> {
        self.processes.shares_namespace(process)
    }

    fn walk_ancestors(&self, from: &process::Process, most: usize, visit: &mut dyn FnMut(TaskId) -> bool) {
        self.processes.walk_ancestors(from, most, visit);
    }

    fn scan(
        &self,
        wanted: &dyn Fn(&CpuSet) -> bool,
        visit: &mut dyn FnMut(ScannedProcess) -> ControlFlow<()>,
    ) -> io::Result<()> {
        self.processes.scan(wanted, visit)
    }

    fn is_certain(&self, process: &process::Process) -> bool {
        self.processes.is_certain(process)
    }

    fn facts(&self, process: &process::Process) -> io::Result<Option<Facts>> {
        self.processes.facts(process)
    }

    fn user(&self, tid: u32, uid: u32) -> User {
        self.processes.user(tid, uid)
    }

    fn is_covered(&self, tid: u32, uid: u32, process: &process::Process) -> bool {
        self.processes.is_covered(tid, uid, process)
    }

    fn permitted(&self, process: &process::Process) -> u64 {
        self.processes.permitted(process)
    }

    fn groups(&self, tid: u32) -> io::Result<Vec<u32>> {
        self.processes.groups(tid)
    }

    fn started(&self, process: &process::Process) -> Option<u64> {
        self.processes.started(process)
    }

    fn cgroup(&self, process: &process::Process) -> Option<CgroupId> {
        self.processes.cgroup(process)
    }

    fn upgrade_cgroup(&self, process: &process::Process, recorded: u64) -> u64 {
        self.processes.upgrade_cgroup(process, recorded)
    }

    fn comm(&self, process: &process::Process) -> Option<String> {
        self.processes.comm(process)
    }

    fn comm_at_death(&self, process: &process::Process) -> Option<String> {
        self.processes.comm_at_death(process)
    }

    fn has_terminal_of_another(&self, task: TaskId, uid: u32) -> bool {
        self.processes.has_terminal_of_another(task, uid)
    }

    fn session(&self, tid: u32) -> Option<u32> {
        process::session_of(tid)
    }

    fn ending(&self, process: &process::Process) -> Ending {
        self.processes.ended(process)
    }

    fn user_at_death(&self, process: &process::Process) -> Option<u32> {
        self.processes.user_at_death(process)
    }
}

impl Masks for Machine {
    type SavedMasks = SavedMasks;

    fn leader_mask(&self, pid: Pid) -> Result<CpuSet, MaskError> {
        self.processes.leader_mask(pid)
    }

    fn offline(&self) -> CpuSet {
        self.processes.offline()
    }

    fn are_within(&self, process: &process::Process, cpus: &CpuSet, look: Look) -> Result<bool, MaskError> {
        self.processes.are_within(process, cpus, look)
    }

    fn look_at_masks(
        &self,
        process: &process::Process,
        cpus: &CpuSet,
        before: Option<&Seen>,
    ) -> Result<Seen, MaskError> {
        self.processes.look_at_masks(process, cpus, before)
    }

    fn saved_mask(&self, process: &process::Process) -> Result<SavedMask, MaskError> {
        self.processes.saved_mask(process)
    }

    fn probe_saved_mask(&self, process: &process::Process, saved: SavedMask) -> Result<SavedMask, MaskError> {
        self.processes.probe_saved_mask(process, saved)
    }

    fn set_first_mask(
        &self,
        process: &process::Process,
        cpus: &CpuSet,
        saved: SavedMask,
        waiting: BlockedWriter,
    ) -> Result<(SavedMask, SavedMasks), MaskError> {
        self.processes.set_first_mask(process, cpus, saved, waiting)
    }

    fn set_mask(
        &self,
        process: &process::Process,
        cpus: &CpuSet,
        own: &CpuSet,
        threads: Threads,
        waiting: BlockedWriter,
    ) -> Result<SavedMasks, MaskError> {
        self.processes.set_mask(process, cpus, own, threads, waiting)
    }

    fn undo(&self, process: &process::Process, previous: SavedMasks, waiting: BlockedWriter) {
        self.processes.undo(process, previous, waiting);
    }

    fn restore_mask(&self, process: &process::Process, mask: &SavedMask, waiting: BlockedWriter) {
        self.processes.restore_mask(process, mask, waiting);
    }
}

impl AsFd for Machine {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.watch.as_fd()
    }
}

impl Watch for Machine {
    fn watch(&self, process: Arc<process::Process>) -> io::Result<()> {
        self.watch.add(process)
    }

    fn unwatch(&self, task: &TaskId) {
        self.watch.remove(task);
    }

    fn watched(&self, task: &TaskId) -> Option<Arc<process::Process>> {
        self.watch.get(task)
    }

    fn any_dead(&self) -> bool {
        self.watch.any_dead()
    }

    fn dead(&self) -> Vec<TaskId> {
        self.watch.dead()
    }

    fn limit(&self) -> usize {
        self.watch.limit()
    }
}

impl Journal for StateDir {
    fn append(&self, record: &Record) -> Result<(), AppendError> {
        self.append(record)
    }

    fn defer(&self, record: Record) {
        self.defer(record);
    }

    fn note_event(&self, uid: u32, line: &str) {
        self.note_event(uid, line);
    }

    fn flush(&self) -> Result<(), AppendError> {
        self.flush()
    }

    fn flush_deferred(&self) {
        self.flush_deferred();
    }

    fn request_flush(&self) {
        self.request_flush();
    }

    fn flush_within(&self, limit: Duration) {
        self.flush_within(limit);
    }

    fn flush_forever(&self) {
        self.flush_forever();
    }

    fn is_stalled(&self) -> bool {
        self.is_stalled()
    }

    fn store_config(&self, config: &Config) -> io::Result<()> {
        self.store_config(config)
    }

    fn mount(&self) -> u64 {
        self.mount()
    }

    fn answer(&self, request: u64) -> Option<i32> {
        self.with_requests(|requests| requests.answer(request))
    }

    fn retries(&self, request: u64) -> usize {
        self.with_requests(|requests| requests.retries(request))
    }
}

/// The cgroups of this machine.
#[derive(Debug, Default)]
pub(crate) struct Cgroups {
    /// The tree, once it was found to be suitable.
    tree: OnceLock<Tree>,
}

impl Cgroups {
    fn tree(&self) -> Result<&Tree, Missing> {
        match self.tree.get() {
            Some(tree) => Ok(tree),
            None => Tree::find().map(|tree| self.tree.get_or_init(|| tree)),
        }
    }
}

impl Partitions for Cgroups {
    fn missing(&self) -> Option<Missing> {
        self.tree().err()
    }

    fn plan(
        &self,
        pid: Pid,
        list: ListId,
        cpus: &CpuSet,
        extent: &Extent,
        is_partition: &dyn Fn(&str) -> bool,
    ) -> Result<Partition, PartitionError> {
        self.tree()?.plan(pid.get(), list, cpus, extent, is_partition)
    }

    fn make(&self, partition: &Partition, pid: Pid) -> Result<(), PartitionError> {
        self.tree()?.make(partition, pid.get())
    }

    fn look(&self, partition: &Partition, pid: Pid) -> Found {
        self.tree()
            .map_or_else(|missing| Found::Broken(missing.to_string()), |tree| tree.look(partition, pid.get()))
    }

    fn members(&self, partition: &Partition) -> Vec<Pid> {
        let members = self.tree().map(|tree| tree.members(partition)).unwrap_or_default();
        members.into_iter().filter_map(Pid::new).collect()
    }

    fn partition_of(&self, pid: Pid, partitions: &[Partition]) -> Option<Partition> {
        self.tree().ok()?.partition_of(pid.get(), partitions)
    }

    fn leave(&self, partition: &Partition, pid: Pid) -> io::Result<()> {
        self.tree().map_err(|missing| io::Error::other(missing.to_string()))?.leave(partition, pid.get())
    }

    fn enter(&self, partition: &Partition, pid: Pid) -> io::Result<()> {
        self.tree().map_err(|missing| io::Error::other(missing.to_string()))?.enter(partition, pid.get())
    }

    fn watch(&self, partition: &Partition) -> Vec<File> {
        self.tree().map(|tree| tree.watch(partition)).unwrap_or_default()
    }

    fn take_back(&self, partition: &Partition, others: &[Partition]) -> io::Result<Vec<Partition>> {
        self.tree().map_err(|missing| io::Error::other(missing.to_string()))?.take_back(partition, others)
    }
}

/// The clocks of the kernel.
#[derive(Debug)]
pub(crate) struct SystemClock;

impl Clock for SystemClock {
    fn since_boot(&self) -> u64 {
        clock::since_boot()
    }

    fn wall_ms(&self) -> u64 {
        clock::wall_ms()
    }

    fn tick(&self) -> u64 {
        clock::tick()
    }

    fn spent(&self) -> u64 {
        clock::of_this_thread().saturating_add(process::waited().as_nanos() as u64)
    }
}
