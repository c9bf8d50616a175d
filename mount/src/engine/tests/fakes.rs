//! In-memory ports: processes with threads and masks, a journal that can fail, and a clock.
//!
//! Owns one [`World`] that all ports share. Every call that could fail or be followed by a crash is a *step*: the
//! world takes a snapshot there, and a test may interfere (kill a task, change a cpuset, fail the journal).
//!
//! Longer than 400 lines because all ports share one state.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::eventfd::EventFd;
use parking_lot::Mutex;

use crate::engine::Ports;
use crate::engine::ports::{Clock, Journal, Masks, Partitions, Process, Processes, Watch};
use crate::journal::{AppendError, Config, Record, Recovered};
use crate::model::cgroup::Cgroups;
use crate::model::command::{CgroupId, Ending, SavedMask, Uids};
use crate::model::cpuset::CpuSet;
use crate::model::partition::{Extent, Missing, Partition};
use crate::model::pool::ListId;
use crate::model::rights::User;
use crate::model::task::{Pid, TaskId, WrittenPid};
use crate::partitions::{Found, PartitionError};
use crate::process::{BlockedWriter, Facts, Look, MaskError, ScannedProcess, Seen, Threads};

/// The CPUs of every fake machine.
pub(crate) const ONLINE: &str = "0-7";
/// The length of a clock tick in nanoseconds.
pub(crate) const TICK: u64 = 10_000_000;

pub(crate) fn cpus(text: &str) -> CpuSet {
    text.parse().unwrap()
}

pub(crate) fn task(pid: u32) -> TaskId {
    TaskId { pid: Pid::new(pid).unwrap(), ino: 1000 + u64::from(pid) }
}

/// The ports of a fake machine.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fake {}

impl Ports for Fake {
    type Processes = FakeProcesses;
    type Journal = FakeJournal;
    type Clock = FakeClock;
    type Partitions = FakePartitions;
}

/// A process of the fake machine.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct FakeTask {
    pub(crate) uid: u32,
    pub(crate) parent: Option<u32>,
    /// Its path; there is only cgroup v2.
    pub(crate) cgroup: &'static str,
    /// In clock ticks since boot.
    pub(crate) started: u64,
    /// The masks of its threads, the leader's first.
    pub(crate) masks: Vec<CpuSet>,
    /// The CPUs that its cpuset allows.
    pub(crate) allowed: CpuSet,
    pub(crate) ending: Option<Ending>,
    pub(crate) kernel_thread: bool,
}

/// A call of a port.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Step {
    Watch(TaskId),
    /// A look over all processes.
    Scan,
    SetMask(TaskId, CpuSet),
    UndoMask(TaskId),
    RestoreMask(TaskId),
    MakePartition(ListId),
    /// The task enters the partition.
    EnterPartition(ListId),
    TakeBackPartition(ListId),
    Append(Record),
    Flush,
    Store,
}

/// Everything that survives the death of the daemon.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    pub(crate) tasks: BTreeMap<u32, FakeTask>,
    pub(crate) file: Vec<Record>,
    pub(crate) config: Config,
    /// The partitions that the kernel has, with the processes in them.
    pub(crate) partitions: BTreeMap<ListId, Vec<u32>>,
}

impl Snapshot {
    pub(crate) fn recovered(&self) -> Recovered {
        Recovered::from_records(self.config.clone(), &self.file)
    }
}

type Hook = Box<dyn FnMut(&Step, &World) + Send>;

#[derive(Default)]
struct State {
    tasks: BTreeMap<u32, FakeTask>,
    watched: HashMap<TaskId, Arc<FakeProcess>>,
    /// The records in the file, and those that are deferred.
    file: Vec<Record>,
    queue: Vec<Record>,
    events: Vec<String>,
    config: Config,
    flush_requests: usize,
    /// How the next appends fail.
    failing: Option<fn() -> AppendError>,
    steps: Vec<Step>,
    snapshots: Vec<Snapshot>,
    now: u64,
    spent: u64,
    looks: usize,
    offline: CpuSet,
    partitions: BTreeMap<ListId, Vec<u32>>,
    /// What the machine lacks for partitions.
    missing: Option<Missing>,
    /// Why the kernel makes no partitions.
    refusing: Option<PartitionError>,
}

/// A machine and a state directory in memory.
#[derive(Default)]
pub(crate) struct World {
    state: Mutex<State>,
    hook: Mutex<Option<Hook>>,
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("World")
    }
}

impl World {
    pub(crate) fn new() -> Arc<Self> {
        let world = Self::default();
        world.state.lock().now = 1_000_000_000_000;
        world.spawn(std::process::id(), ONLINE, |_| ());
        Arc::new(world)
    }

    /// A machine on which a daemon died at this snapshot.
    pub(crate) fn after_crash(snapshot: &Snapshot) -> Arc<Self> {
        let world = Self::new();
        {
            let mut state = world.state.lock();
            state.tasks.clone_from(&snapshot.tasks);
            state.file.clone_from(&snapshot.file);
            state.config = snapshot.config.clone();
            state.partitions.clone_from(&snapshot.partitions);
        }
        world
    }

    pub(crate) fn ports(self: &Arc<Self>) -> (FakeProcesses, FakeJournal, FakeClock, FakePartitions) {
        let processes = FakeProcesses { world: Arc::clone(self), readiness: EventFd::new().unwrap() };
        let partitions = FakePartitions(Arc::clone(self));
        (processes, FakeJournal(Arc::clone(self)), FakeClock(Arc::clone(self)), partitions)
    }

    /// Adds a process of root with one thread.
    pub(crate) fn spawn(&self, pid: u32, mask: &str, change: impl FnOnce(&mut FakeTask)) {
        let mut state = self.state.lock();
        state.now += TICK;
        let mut task = FakeTask {
            uid: 0,
            parent: None,
            cgroup: "/",
            started: state.now / TICK,
            masks: vec![cpus(mask)],
            allowed: cpus(ONLINE),
            ending: None,
            kernel_thread: false,
        };
        change(&mut task);
        state.tasks.insert(pid, task);
    }

    pub(crate) fn kill(&self, pid: u32, ending: Ending) {
        if let Some(task) = self.state.lock().tasks.get_mut(&pid).filter(|task| task.ending.is_none()) {
            task.ending = Some(ending);
        }
    }

    pub(crate) fn change(&self, pid: u32, change: impl FnOnce(&mut FakeTask)) {
        change(self.state.lock().tasks.get_mut(&pid).unwrap());
    }

    pub(crate) fn task(&self, pid: u32) -> FakeTask {
        self.state.lock().tasks[&pid].clone()
    }

    pub(crate) fn set_offline(&self, cpus: &CpuSet) {
        self.state.lock().offline.clone_from(cpus);
    }

    pub(crate) fn is_alive(&self, pid: u32) -> bool {
        self.state.lock().tasks.get(&pid).is_some_and(|task| task.ending.is_none())
    }

    /// The masks of all threads of a process.
    pub(crate) fn masks(&self, pid: u32) -> Vec<String> {
        self.task(pid).masks.iter().map(CpuSet::to_string).collect()
    }

    pub(crate) fn fail_appends(&self, error: Option<fn() -> AppendError>) {
        self.state.lock().failing = error;
    }

    /// Calls `hook` at every step, before it happens, with no lock of the world held.
    pub(crate) fn on_step(&self, hook: impl FnMut(&Step, &World) + Send + 'static) {
        *self.hook.lock() = Some(Box::new(hook));
    }

    pub(crate) fn off_step(&self) {
        *self.hook.lock() = None;
    }

    /// The steps since the last call.
    pub(crate) fn take_steps(&self) -> Vec<Step> {
        std::mem::take(&mut self.state.lock().steps)
    }

    /// The snapshots since the last call: before each step, and now.
    pub(crate) fn take_snapshots(&self) -> Vec<Snapshot> {
        let now = self.snapshot();
        let mut snapshots = std::mem::take(&mut self.state.lock().snapshots);
        snapshots.push(now);
        snapshots
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        self.state.lock().snapshot()
    }

    /// The records in their order, deferred ones last.
    pub(crate) fn records(&self) -> Vec<Record> {
        let state = self.state.lock();
        state.file.iter().chain(&state.queue).cloned().collect()
    }

    pub(crate) fn deferred(&self) -> usize {
        self.state.lock().queue.len()
    }

    pub(crate) fn flush_requests(&self) -> usize {
        self.state.lock().flush_requests
    }

    /// How often the daemon has looked at a process.
    pub(crate) fn looks(&self) -> usize {
        self.state.lock().looks
    }

    /// The partitions that the kernel has, with the processes in them.
    pub(crate) fn partitions(&self) -> BTreeMap<ListId, Vec<u32>> {
        self.state.lock().partitions.clone()
    }

    /// Somebody else changes the partitions.
    pub(crate) fn change_partitions(&self, change: impl FnOnce(&mut BTreeMap<ListId, Vec<u32>>)) {
        change(&mut self.state.lock().partitions);
    }

    /// From now on the machine lacks this for partitions, or nothing.
    pub(crate) fn lack(&self, missing: Option<Missing>) {
        self.state.lock().missing = missing;
    }

    /// From now on the kernel makes no partitions for this reason, or makes them.
    pub(crate) fn refuse_partitions(&self, why: Option<PartitionError>) {
        self.state.lock().refusing = why;
    }

    /// Lets time pass.
    pub(crate) fn pass(&self, time: Duration) {
        self.state.lock().now += time.as_nanos() as u64;
    }

    /// Lets the daemon work for this long.
    pub(crate) fn spend(&self, time: Duration) {
        self.state.lock().spent += time.as_nanos() as u64;
    }

    /// Writes deferred records, as the journal's thread does.
    pub(crate) fn flush(&self) {
        self.state.lock().write_queue();
    }

    fn step(&self, step: Step) {
        {
            let mut state = self.state.lock();
            let snapshot = state.snapshot();
            state.snapshots.push(snapshot);
            state.steps.push(step.clone());
        }
        let hook = self.hook.lock().take();
        if let Some(mut hook) = hook {
            hook(&step, self);
            self.hook.lock().get_or_insert(hook);
        }
    }
}

impl State {
    fn snapshot(&self) -> Snapshot {
        Snapshot {
            tasks: self.tasks.clone(),
            file: self.file.clone(),
            config: self.config.clone(),
            partitions: self.partitions.clone(),
        }
    }

    fn write_queue(&mut self) {
        let queue = std::mem::take(&mut self.queue);
        self.file.extend(queue);
    }

    fn alive(&mut self, task: TaskId) -> Result<&mut FakeTask, MaskError> {
        let found = self.tasks.get_mut(&task.pid.get());
        found.filter(|task| task.ending.is_none()).ok_or(MaskError::Gone)
    }
}

#[derive(Debug)]
pub(crate) struct FakeProcess {
    id: TaskId,
    world: Arc<World>,
}

impl Process for FakeProcess {
    fn id(&self) -> TaskId {
        self.id
    }

    fn is_alive(&self) -> bool {
        self.world.is_alive(self.id.pid.get())
    }
}

#[derive(Debug)]
pub(crate) struct FakeProcesses {
    world: Arc<World>,
    readiness: EventFd,
}

impl FakeProcesses {
    fn process(&self, pid: Pid) -> FakeProcess {
        FakeProcess { id: task(pid.get()), world: Arc::clone(&self.world) }
    }

    fn alive<T>(&self, process: &FakeProcess, get: impl FnOnce(&FakeTask) -> T) -> Option<T> {
        let state = self.world.state.lock();
        state.tasks.get(&process.id.pid.get()).filter(|task| task.ending.is_none()).map(get)
    }
}

impl Processes for FakeProcesses {
    type Process = FakeProcess;

    fn of_thread(&self, tid: Pid) -> io::Result<Option<Arc<FakeProcess>>> {
        Ok(self.open(tid)?.map(Arc::new))
    }

    fn open(&self, tid: Pid) -> io::Result<Option<FakeProcess>> {
        Ok(Some(self.process(tid)).filter(Process::is_alive))
    }

    fn find(&self, task: TaskId) -> io::Result<Option<FakeProcess>> {
        let is_known = self.world.state.lock().tasks.contains_key(&task.pid.get());
        Ok(is_known.then(|| self.process(task.pid)))
    }

    fn with_pid_in_namespace_of(
        &self,
        _: &FakeProcess,
        pid: WrittenPid,
    ) -> io::Result<Option<Arc<FakeProcess>>> {
        self.of_thread(Pid::new(pid.0.get()).unwrap())
    }

    fn pid_in_namespace_of(&self, _: &FakeProcess, pid: Pid) -> Option<u32> {
        Some(pid.get())
    }

    fn shares_our_namespace(&self, _: &FakeProcess) -> io::Result<bool> {
        Ok(true)
    }

    fn walk_ancestors(&self, from: &FakeProcess, most: usize, visit: &mut dyn FnMut(TaskId) -> bool) {
        let mut pid = from.id.pid.get();
        for _ in 0..most {
            let parent = self.world.state.lock().tasks.get(&pid).and_then(|task| task.parent);
            match parent.filter(|&parent| parent != 1 && self.world.is_alive(parent)) {
                Some(parent) if visit(task(parent)) => pid = parent,
                _ => return,
            }
        }
    }

    fn scan(
        &self,
        wanted: &dyn Fn(&CpuSet) -> bool,
        visit: &mut dyn FnMut(ScannedProcess) -> ControlFlow<()>,
    ) -> io::Result<()> {
        self.world.step(Step::Scan);
        let mut alive: Vec<(u32, FakeTask)> = {
            let state = self.world.state.lock();
            let alive = state.tasks.iter().filter(|(_, task)| task.ending.is_none());
            alive.map(|(pid, task)| (*pid, task.clone())).collect()
        };
        alive.sort_by_key(|(pid, task)| (task.started, *pid));
        for first in [true, false] {
            for (pid, it) in &alive {
                let threads = it
                    .masks
                    .iter()
                    .enumerate()
                    .filter(|(index, mask)| (*index == 0) == first && wanted(mask));
                let threads: Vec<(u32, CpuSet)> =
                    threads.map(|(index, mask)| (thread(*pid, index), mask.clone())).collect();
                let found = ScannedProcess {
                    task: task(*pid),
                    facts: facts(it),
                    users: vec![it.uid],
                    cgroups: vec![cgroup(it.cgroup)],
                    started: it.started,
                    threads,
                };
                if !found.threads.is_empty() && visit(found).is_break() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn is_certain(&self, _: &FakeProcess) -> bool {
        true
    }

    fn facts(&self, process: &FakeProcess) -> io::Result<Option<Facts>> {
        self.world.state.lock().looks += 1;
        Ok(self.alive(process, facts))
    }

    fn user(&self, _: u32, uid: u32) -> User {
        uid.into()
    }

    fn is_covered(&self, _: u32, _: u32, _: &FakeProcess) -> bool {
        false
    }

    fn permitted(&self, process: &FakeProcess) -> u64 {
        self.alive(process, |task| User::from(task.uid).permitted).unwrap_or(u64::MAX)
    }

    fn groups(&self, _: u32) -> io::Result<Vec<u32>> {
        Ok(Vec::new())
    }

    fn started(&self, process: &FakeProcess) -> Option<u64> {
        self.alive(process, |task| task.started)
    }

    fn cgroup(&self, process: &FakeProcess) -> Option<CgroupId> {
        self.alive(process, |task| cgroup(task.cgroup))
    }

    fn upgrade_cgroup(&self, _: &FakeProcess, recorded: u64) -> u64 {
        recorded
    }

    fn comm(&self, process: &FakeProcess) -> Option<String> {
        self.alive(process, |_| "fake".to_owned())
    }

    fn comm_at_death(&self, _: &FakeProcess) -> Option<String> {
        Some("fake".to_owned())
    }

    fn has_terminal_of_another(&self, _: TaskId, _: u32) -> bool {
        false
    }

    fn session(&self, _: u32) -> Option<u32> {
        Some(1)
    }

    fn ending(&self, process: &FakeProcess) -> Ending {
        let state = self.world.state.lock();
        let ending = state.tasks.get(&process.id.pid.get()).and_then(|task| task.ending);
        ending.unwrap_or(Ending::Unknown)
    }

    fn user_at_death(&self, process: &FakeProcess) -> Option<u32> {
        let state = self.world.state.lock();
        let task = state.tasks.get(&process.id.pid.get())?;
        (task.ending != Some(Ending::Unknown)).then_some(task.uid)
    }
}

/// The number of a thread of a process, which is never a PID.
fn thread(pid: u32, index: usize) -> u32 {
    pid + ((index as u32) << 20)
}

pub(crate) fn cgroup(path: &str) -> CgroupId {
    let cgroups = Arc::new(Cgroups::parse(format!("0::{path}\n").as_bytes()));
    CgroupId { number: path.len() as u64, cgroups }
}

fn facts(task: &FakeTask) -> Facts {
    let uid = task.uid;
    Facts {
        parent: task.parent.and_then(Pid::new),
        uids: Uids { real: uid, effective: uid, saved: uid },
        kernel_thread: task.kernel_thread,
    }
}

impl Masks for FakeProcesses {
    type SavedMasks = Vec<CpuSet>;

    fn leader_mask(&self, pid: Pid) -> Result<CpuSet, MaskError> {
        let (pid, index) = (Pid::new(pid.get() & 0xf_ffff).unwrap(), (pid.get() >> 20) as usize);
        let mask = self.alive(&self.process(pid), |task| task.masks.get(index).cloned());
        mask.flatten().ok_or(MaskError::Gone)
    }

    fn offline(&self) -> CpuSet {
        self.world.state.lock().offline.clone()
    }

    fn are_within(&self, process: &FakeProcess, cpus: &CpuSet, look: Look) -> Result<bool, MaskError> {
        let task = self.alive(process, FakeTask::clone).ok_or(MaskError::Gone)?;
        let seen = if look == Look::AllThreads { &task.masks[..] } else { &task.masks[..1] };
        Ok(seen.iter().all(|mask| mask.is_subset(cpus)))
    }

    fn look_at_masks(
        &self,
        process: &FakeProcess,
        cpus: &CpuSet,
        _: Option<&Seen>,
    ) -> Result<Seen, MaskError> {
        let task = self.alive(process, FakeTask::clone).ok_or(MaskError::Gone)?;
        Ok(match task.masks.iter().find(|mask| !mask.is_subset(cpus)) {
            None => Seen::Within,
            Some(mask) if *mask == task.allowed => Seen::Displaced(mask.clone()),
            Some(mask) => Seen::Chosen(mask.clone()),
        })
    }

    fn saved_mask(&self, process: &FakeProcess) -> Result<SavedMask, MaskError> {
        let mask = self.leader_mask(process.id.pid)?;
        Ok(if mask == cpus(ONLINE) { SavedMask::All } else { SavedMask::Cpus(mask) })
    }

    fn probe_saved_mask(&self, process: &FakeProcess, saved: SavedMask) -> Result<SavedMask, MaskError> {
        let allowed = self.alive(process, |task| task.allowed.clone()).ok_or(MaskError::Gone)?;
        Ok(if saved == SavedMask::Cpus(allowed) { SavedMask::All } else { saved })
    }

    fn set_first_mask(
        &self,
        process: &FakeProcess,
        cpus: &CpuSet,
        saved: SavedMask,
        writer: BlockedWriter,
    ) -> Result<(SavedMask, Vec<CpuSet>), MaskError> {
        let saved = self.probe_saved_mask(process, saved)?;
        Ok((saved, self.set_mask(process, cpus, cpus, Threads::All, writer)?))
    }

    fn set_mask(
        &self,
        process: &FakeProcess,
        cpus: &CpuSet,
        _: &CpuSet,
        threads: Threads,
        _: BlockedWriter,
    ) -> Result<Vec<CpuSet>, MaskError> {
        self.world.step(Step::SetMask(process.id, cpus.clone()));
        let mut state = self.world.state.lock();
        let offline = state.offline.clone();
        let task = state.alive(process.id)?;
        let got = cpus.intersection(&task.allowed).difference(&offline);
        if got.is_empty() {
            return Err(MaskError::Refused);
        }
        if got != *cpus {
            return Err(MaskError::Narrowed { got });
        }
        let before = task.masks.clone();
        for mask in &mut task.masks {
            if threads == Threads::All || !mask.is_subset(cpus) {
                mask.clone_from(cpus);
            }
        }
        Ok(before)
    }

    fn undo(&self, process: &FakeProcess, before: Vec<CpuSet>, _: BlockedWriter) {
        self.world.step(Step::UndoMask(process.id));
        if let Ok(task) = self.world.state.lock().alive(process.id) {
            task.masks = before;
        }
    }

    fn restore_mask(&self, process: &FakeProcess, mask: &SavedMask, _: BlockedWriter) {
        self.world.step(Step::RestoreMask(process.id));
        if let Ok(task) = self.world.state.lock().alive(process.id) {
            let wanted = match mask {
                SavedMask::All => task.allowed.clone(),
                SavedMask::Cpus(cpus) => cpus.intersection(&task.allowed),
            };
            let mask = if wanted.is_empty() { task.allowed.clone() } else { wanted };
            task.masks.fill(mask);
        }
    }
}

impl AsFd for FakeProcesses {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.readiness.as_fd()
    }
}

impl Watch for FakeProcesses {
    fn watch(&self, process: Arc<FakeProcess>) -> io::Result<()> {
        self.world.step(Step::Watch(process.id));
        self.world.state.lock().watched.insert(process.id, process);
        Ok(())
    }

    fn unwatch(&self, task: &TaskId) {
        self.world.state.lock().watched.remove(task);
    }

    fn watched(&self, task: &TaskId) -> Option<Arc<FakeProcess>> {
        self.world.state.lock().watched.get(task).cloned()
    }

    fn any_dead(&self) -> bool {
        !self.dead().is_empty()
    }

    fn dead(&self) -> Vec<TaskId> {
        let state = self.world.state.lock();
        let is_dead = |task: &&TaskId| state.tasks[&task.pid.get()].ending.is_some();
        let mut dead: Vec<TaskId> = state.watched.keys().filter(is_dead).copied().collect();
        dead.sort();
        dead
    }

    fn limit(&self) -> usize {
        100
    }
}

#[derive(Debug)]
pub(crate) struct FakeJournal(Arc<World>);

impl Journal for FakeJournal {
    fn append(&self, record: &Record) -> Result<(), AppendError> {
        self.0.step(Step::Append(record.clone()));
        let mut state = self.0.state.lock();
        if let Some(error) = state.failing {
            return Err(error());
        }
        state.write_queue();
        state.file.push(record.clone());
        Ok(())
    }

    fn defer(&self, record: Record) {
        self.0.state.lock().queue.push(record);
    }

    fn note_event(&self, _: u32, line: &str) {
        self.0.state.lock().events.push(line.to_owned());
    }

    fn flush(&self) -> Result<(), AppendError> {
        if self.0.deferred() == 0 {
            return Ok(());
        }
        self.0.step(Step::Flush);
        let mut state = self.0.state.lock();
        match state.failing {
            Some(error) => Err(error()),
            None => {
                state.write_queue();
                Ok(())
            }
        }
    }

    fn flush_deferred(&self) {
        let _ = self.flush();
    }

    fn request_flush(&self) {
        self.0.state.lock().flush_requests += 1;
    }

    fn flush_within(&self, _: Duration) {
        self.request_flush();
        if self.0.state.lock().failing.is_none() {
            self.0.flush();
        }
    }

    fn flush_forever(&self) {}

    fn is_stalled(&self) -> bool {
        matches!(self.0.state.lock().failing.map(|error| error()), Some(AppendError::Stalled))
    }

    fn store_config(&self, config: &Config) -> io::Result<()> {
        self.0.step(Step::Store);
        let mut state = self.0.state.lock();
        if state.failing.is_some() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        state.config = config.clone();
        Ok(())
    }

    fn mount(&self) -> u64 {
        1
    }

    fn answer(&self, request: u64) -> Option<i32> {
        let answers = |record: &Record| {
            flat(record).find_map(|record| match record {
                Record::Answered { request: it, errno, .. } if *it == request => Some(*errno),
                Record::Refused { request: it, refusal, .. } if *it == request => Some(refusal.errno),
                _ => None,
            })
        };
        self.0.state.lock().file.iter().rev().find_map(answers)
    }

    fn retries(&self, request: u64) -> usize {
        let retried = Record::Retried { request };
        self.0.state.lock().file.iter().filter(|record| **record == retried).count()
    }
}

/// A partition is there or not, with the processes in it.
#[derive(Debug)]
pub(crate) struct FakePartitions(Arc<World>);

impl Partitions for FakePartitions {
    fn missing(&self) -> Option<Missing> {
        self.0.state.lock().missing
    }

    fn plan(
        &self,
        pid: Pid,
        list: ListId,
        cpus: &CpuSet,
        extent: &Extent,
        _: &dyn Fn(&str) -> bool,
    ) -> Result<Partition, PartitionError> {
        let state = self.0.state.lock();
        if let Some(missing) = state.missing {
            return Err(missing.into());
        }
        let parent = state.tasks.get(&pid.get()).ok_or(PartitionError::Gone)?.cgroup;
        let parent = parent.trim_end_matches('/').to_owned();
        let is_whole_cgroup = *extent != Extent::Task;
        let (levels, workqueues) = (Vec::new(), CpuSet::new());
        Ok(Partition { list, cpus: cpus.clone(), parent, is_whole_cgroup, levels, workqueues })
    }

    fn make(&self, partition: &Partition, pid: Pid) -> Result<(), PartitionError> {
        self.0.step(Step::MakePartition(partition.list));
        let mut state = self.0.state.lock();
        assert!(!state.partitions.contains_key(&partition.list), "two partitions of one list");
        state.partitions.insert(partition.list, Vec::new());
        if let Some(error) = &state.refusing {
            return Err(error.clone());
        }
        drop(state);
        self.0.step(Step::EnterPartition(partition.list));
        self.0.state.lock().partitions.insert(partition.list, vec![pid.get()]);
        Ok(())
    }

    fn look(&self, partition: &Partition, pid: Pid) -> Found {
        match self.0.state.lock().partitions.get(&partition.list) {
            Some(members) if members.contains(&pid.get()) => Found::Isolated,
            Some(_) => Found::Broken("its task was moved to another cgroup".to_owned()),
            None => Found::Broken("its cgroup was removed".to_owned()),
        }
    }

    fn members(&self, partition: &Partition) -> Vec<Pid> {
        let state = self.0.state.lock();
        let members = state.partitions.get(&partition.list).cloned().unwrap_or_default();
        members.into_iter().filter_map(Pid::new).collect()
    }

    fn partition_of(&self, pid: Pid, partitions: &[Partition]) -> Option<Partition> {
        let state = self.0.state.lock();
        let has = |it: &&Partition| {
            state.partitions.get(&it.list).is_some_and(|members| members.contains(&pid.get()))
        };
        partitions.iter().find(has).cloned()
    }

    fn leave(&self, partition: &Partition, pid: Pid) -> io::Result<()> {
        let mut state = self.0.state.lock();
        state.partitions.entry(partition.list).or_default().retain(|member| *member != pid.get());
        if let Some(task) = state.tasks.get_mut(&pid.get()) {
            task.allowed = cpus(ONLINE);
        }
        Ok(())
    }

    fn enter(&self, partition: &Partition, pid: Pid) -> io::Result<()> {
        let mut state = self.0.state.lock();
        state.partitions.entry(partition.list).or_default().push(pid.get());
        if let Some(task) = state.tasks.get_mut(&pid.get()) {
            task.allowed.clone_from(&partition.cpus);
        }
        Ok(())
    }

    fn watch(&self, _: &Partition) -> Vec<File> {
        Vec::new()
    }

    fn take_back(&self, partition: &Partition, _: &[Partition]) -> io::Result<Vec<Partition>> {
        self.0.step(Step::TakeBackPartition(partition.list));
        self.0.state.lock().partitions.remove(&partition.list);
        Ok(Vec::new())
    }
}

/// The record, or the records of a batch.
pub(crate) fn flat(record: &Record) -> Box<dyn Iterator<Item = &Record> + '_> {
    match record {
        Record::Batch(records) => Box::new(records.iter().flat_map(flat)),
        other => Box::new(std::iter::once(other)),
    }
}

#[derive(Debug)]
pub(crate) struct FakeClock(Arc<World>);

impl Clock for FakeClock {
    fn since_boot(&self) -> u64 {
        let mut state = self.0.state.lock();
        state.now += 1;
        state.now
    }

    fn wall_ms(&self) -> u64 {
        self.0.state.lock().now / 1_000_000
    }

    fn tick(&self) -> u64 {
        TICK
    }

    fn spent(&self) -> u64 {
        self.0.state.lock().spent
    }
}
