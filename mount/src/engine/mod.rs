//! The engine: carries out what the claim machine decides.
//!
//! Owns: the one lock around the claims, and the order of things: decide, record the intent, set masks, read
//! them back, record, settle, answer. Joins the model with the processes and the state directory. Must not
//! know: FUSE, paths, or how a file shows what it shows.
//!
//! Locks are taken in this order, and never the other way: `configuring`, `reaping`, `claims`, and then at
//! most one of `events`, `refusals`, `shown`, those of `changes` and of the state directory. No system call on another process, and no
//! fsync, happens under `claims`.

mod changes;
mod configure;
mod events;
mod last_error;
mod lookup;
mod reap;
mod replay;
mod show;
mod write;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use parking_lot::{Condvar, Mutex, RwLock};

use crate::clock;
use crate::failpoint::{Step, reached};
use crate::journal::{Record, Recovered, StateDir};
use crate::metrics::{Counter, Metrics};
use crate::model::claims::Claims;
use crate::model::command::{Change, Claim, Effects, SavedMask, TaskInfo};
use crate::model::pool::{ListId, PoolId};
use crate::model::refusal::Refusal;
use crate::model::task::{Pid, TaskId};
use crate::model::topology::Topology;
use crate::process::{BlockedWriter, Facts, Process, Processes, Watch};

pub(crate) use changes::{Changes, Notify};
pub(crate) use configure::{Attributes, NODES_EACH};
use events::{Event, Events};
use last_error::Refusals;
pub(crate) use replay::{Admission, RequestId};

/// How many numbers of events are reserved in the log at a time.
const RESERVED_EVENTS: u64 = 1 << 16;
/// How many numbers of open files are reserved in the log at a time.
pub(crate) const RESERVED_HANDLES: u32 = 1 << 12;
/// How long an operation waits for another one on the same task. Setting masks takes microseconds a thread.
const IN_FLIGHT_TIMEOUT: Duration = Duration::from_secs(5);

/// Who sends a request: a thread, as the kernel names it in our PID namespace, and its user.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Caller {
    /// 0 where it has no number in our PID namespace.
    pub(crate) tid: u32,
    pub(crate) uid: u32,
    /// The same if the request comes again; 0 if the request does not come from a client.
    pub(crate) request: RequestId,
}

impl Caller {
    fn waiting(&self) -> BlockedWriter {
        if self.request == 0 { BlockedWriter::NONE } else { BlockedWriter::thread(self.tid) }
    }
}

/// The text of a `tasks` file and the version of the file that it shows.
type Shown = (u64, Arc<[u8]>);

/// Everything that the files show and change.
#[derive(Debug)]
pub(crate) struct Engine {
    claims: Mutex<Claims>,
    /// Told when a plan was settled or abandoned.
    plan_finished: Condvar,
    /// Held while the dead are taken off, so that whoever comes second sees them gone.
    reaping: Mutex<()>,
    /// The next node id. Held for the whole of a change to the configuration: one at a time.
    configuring: Mutex<u64>,
    attributes: RwLock<HashMap<u64, Attributes>>,
    processes: Processes,
    watch: Watch,
    state: StateDir,
    events: Mutex<Events>,
    reserved_events: AtomicU64,
    /// By node.
    shown: Mutex<HashMap<u64, Shown>>,
    refusals: Mutex<Refusals>,
    pub(crate) changes: Changes,
    pub(crate) metrics: Metrics,
    topology: Topology,
    /// The daemon's own processes, which are never claimed: this one, and the supervisor.
    ours: Pid,
    /// 0 where there is none just now.
    supervisor: AtomicU32,
    tick: u64,
}

/// Why the engine could not start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error("cannot look at processes: {0}; is /proc mounted?")]
    Processes(#[source] std::io::Error),
    #[error("cannot make an eventfd: {0}; raise the limit of open files")]
    Doorbell(#[source] nix::Error),
}

impl Engine {
    /// Takes up what an earlier daemon has left: pools, lists, the claims of tasks that still live.
    /// Gives the number of the first open file beside the engine.
    pub(crate) fn start(
        state: StateDir,
        recovered: Recovered,
        topology: Topology,
        supervisor: Option<u32>,
    ) -> Result<(Self, u32), StartError> {
        let processes = Processes::new().map_err(StartError::Processes)?;
        let watch = Watch::new().map_err(StartError::Processes)?;
        let handles = recovered.next_handle;
        let mut refusals = Refusals::default();
        recovered.refusals.iter().for_each(|filed| refusals.file(Arc::clone(filed)));
        let mut events = Events::new(
            recovered.next_event,
            recovered.events.clone(),
            recovered.reclaimed.clone(),
            recovered.reclaimed_dropped,
        );
        for damage in &recovered.damage {
            log::warn!("{damage}");
            let reason = Some(damage.to_string());
            events.push(&state, &Event { event: "damaged", reason, ..Event::default() });
        }
        let engine = Self {
            claims: Mutex::new(Claims::new(watch.limit())),
            plan_finished: Condvar::new(),
            reaping: Mutex::new(()),
            configuring: Mutex::new(recovered.config.next_node),
            attributes: RwLock::new(HashMap::new()),
            processes,
            watch,
            state,
            reserved_events: AtomicU64::new(events.next() + RESERVED_EVENTS),
            events: Mutex::new(events),
            shown: Mutex::default(),
            refusals: Mutex::new(refusals),
            changes: Changes::new().map_err(StartError::Doorbell)?,
            metrics: Metrics::new(clock::wall_ms(), recovered.damage.len()),
            topology,
            ours: Pid::new(std::process::id())
                .ok_or_else(|| StartError::Processes(std::io::ErrorKind::NotFound.into()))?,
            supervisor: AtomicU32::new(supervisor.unwrap_or(0)),
            tick: clock::tick(),
        };
        let reserved = Record::Reserved {
            events: recovered.next_event + RESERVED_EVENTS,
            handles: handles.wrapping_add(2 * RESERVED_HANDLES),
        };
        if let Err(error) = engine.state.append(&reserved) {
            // A full disk must not keep the mount down: releases and reaps go on without a log.
            log::warn!(
                "the state directory cannot be written: {error}; claims are refused until there is room"
            );
        }
        engine.recover(recovered);
        engine.update_daemon_affinity();
        engine.state.flush_deferred();
        Ok((engine, handles))
    }

    /// The machine, as it was when the daemon started.
    pub(crate) fn topology(&self) -> &Topology {
        &self.topology
    }

    /// Runs `look` on the claims, the dead taken off first.
    pub(crate) fn with_claims<T>(&self, look: impl FnOnce(&Claims) -> T) -> T {
        self.reap();
        look(&self.claims.lock())
    }

    /// Runs `look` on the pools and lists, which no death can change.
    pub(crate) fn with_configuration<T>(&self, look: impl FnOnce(&Claims) -> T) -> T {
        look(&self.claims.lock())
    }

    /// Forgets the reclaimed claims up to `seq`.
    ///
    /// # Errors
    /// [`Refusal::NoSeq`] where the bytes are no number.
    pub(crate) fn acknowledge(&self, caller: Caller, bytes: &[u8]) -> Result<(), Refusal> {
        let text = std::str::from_utf8(bytes).map_err(|_| Refusal::NoSeq)?.trim();
        if text.is_empty() {
            return Ok(());
        }
        let seq: u64 = text.parse().map_err(|_| Refusal::NoSeq)?;
        let records = std::iter::once(Record::Acknowledged { seq }).chain(replay::answered(caller.request));
        let mut events = self.events.lock();
        self.state.append(&Record::Batch(records.collect())).map_err(|_| Refusal::LogFull)?;
        reached(Step::AcknowledgementRecorded);
        events.acknowledge(seq);
        Ok(())
    }

    /// Watches deaths and tells the kernel of changed files; for a thread of its own. Sleeps for ever while
    /// nobody polls.
    pub(crate) fn notify_forever(&self) {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd;
        loop {
            let (due, waiting) = self.changes.take_due();
            for notifier in due {
                notifier.notify();
            }
            let mut fds = vec![PollFd::new(self.changes.doorbell().as_fd(), PollFlags::POLLIN)];
            if waiting {
                fds.push(PollFd::new(self.watch.as_fd(), PollFlags::POLLIN));
            }
            let _ = poll(&mut fds, PollTimeout::NONE);
            self.reap();
        }
    }

    /// Writes deferred records whenever that is asked for; for a thread of its own, which sleeps otherwise.
    pub(crate) fn flush_forever(&self) {
        self.state.flush_forever();
    }

    /// Notes what has changed: events, counters, versions of files. For whoever holds the lock on the claims,
    /// so that events come in the order in which things happened.
    fn note(&self, claims: &Claims, effects: &Effects) {
        for change in &effects.changes {
            let (event, counter, claim, from) = match change {
                Change::Claimed(claim) => ("claimed", Counter::Claimed, claim, None),
                Change::Moved { from, to } => {
                    self.list_changed(claims, *from);
                    ("moved", Counter::Moved, to, claims.list(*from).map(|list| list.name().to_string()))
                }
                Change::Released(claim) => ("released", Counter::Released, claim, None),
                Change::Inherited { from, to } => {
                    ("inherited", Counter::Inherited, to, Some(from.pid.to_string()))
                }
                // Its cause of death decides what it is called: the reaper notes it.
                Change::Ended(claim) => {
                    self.list_changed(claims, claim.list);
                    continue;
                }
            };
            self.list_changed(claims, claim.list);
            self.metrics.count(counter);
            self.event(Event { from, ..list_event(event, claims, claim) });
        }
    }

    fn event(&self, event: Event) -> u64 {
        let mut events = self.events.lock();
        let reserved = self.reserved_events.load(Ordering::Relaxed);
        if events.next() >= reserved {
            let record = Record::Reserved { events: reserved + RESERVED_EVENTS, handles: 0 };
            if self.state.append(&record).is_ok() {
                self.reserved_events.store(reserved + RESERVED_EVENTS, Ordering::Relaxed);
            }
        }
        events.push(&self.state, &event)
    }

    fn list_changed(&self, claims: &Claims, id: ListId) {
        if let Some(list) = claims.list(id) {
            self.changes.changed([id.tasks_node(), list.pool().tasks_node()]);
        }
    }

    /// What the model has to know of a process. None: it has gone.
    fn task_info(&self, process: &Process) -> Result<Option<TaskInfo>, Refusal> {
        let facts = self.processes.facts(process).map_err(self.fault("looking at the process"))?;
        Ok(facts.map(|facts| self.task_info_of(process.id(), &facts)))
    }

    /// For what the kernel refuses us and has no business to.
    fn fault(&self, what: &'static str) -> impl Fn(std::io::Error) -> Refusal {
        let limit = self.watch.limit();
        move |error| match Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)) {
            // We are out of descriptors: that is the limit on tasks, met from another side.
            Errno::EMFILE | Errno::ENFILE => Refusal::TooMany { limit },
            errno => Refusal::Fault { what, errno },
        }
    }

    fn task_info_of(&self, task: TaskId, facts: &Facts) -> TaskInfo {
        TaskInfo {
            task,
            uids: facts.uids,
            kernel_thread: facts.kernel_thread,
            ours: task.pid == self.ours || task.pid.get() == self.supervisor.load(Ordering::Relaxed),
        }
    }

    /// Whether the process lives and its leader's mask lies within the list.
    pub(crate) fn is_within(&self, id: ListId, pid: u32) -> bool {
        let cpus = self.with_configuration(|claims| claims.list(id).map(|list| list.cpus().clone()));
        let mask = Pid::new(pid).and_then(|pid| self.processes.leader_mask(pid).ok());
        matches!((cpus, mask), (Some(cpus), Some(mask)) if mask.is_subset(&cpus))
    }

    /// A claim is over; the masks of its task are as they were before it.
    fn restore_mask_of(&self, task: &TaskId, saved: &SavedMask, waiting: BlockedWriter) {
        if let Some(process) = self.watch.get(task) {
            self.processes.restore_mask(&process, saved, waiting);
        }
    }

    /// Another process keeps the mount from now on.
    pub(crate) fn set_supervisor(&self, pid: u32) {
        self.supervisor.store(pid, Ordering::Relaxed);
        self.update_daemon_affinity();
    }

    /// Keeps the daemon itself off the exclusive lists, as far as there is a CPU elsewhere.
    fn update_daemon_affinity(&self) {
        // This thread is one of ours and makes no other meanwhile.
        let waiting = BlockedWriter::thread(nix::unistd::gettid().as_raw() as u32);
        let exclusive = self.claims.lock().exclusive_cpus();
        let elsewhere = self.topology.online().difference(&exclusive);
        let mask = if elsewhere.is_empty() { SavedMask::All } else { SavedMask::Cpus(elsewhere) };
        for pid in [Some(self.ours), Pid::new(self.supervisor.load(Ordering::Relaxed))].into_iter().flatten()
        {
            match self.processes.open(pid) {
                Ok(Some(daemon)) => self.processes.restore_mask(&daemon, &mask, waiting),
                _ => log::warn!("the daemon's own mask cannot be set"),
            }
        }
    }
}

fn list_event(event: &'static str, claims: &Claims, claim: &Claim) -> Event {
    let name = claims.list(claim.list).map(|list| list.name().clone());
    Event {
        event,
        pool: name.as_ref().map(|name| name.pool.to_string()),
        cpus: name.map(|name| name.cpus),
        pid: Some(claim.task.pid.get()),
        ..Event::default()
    }
}

impl ListId {
    /// The node of the list's `tasks` file.
    pub(crate) fn tasks_node(self) -> u64 {
        self.0 + 1
    }
}

impl PoolId {
    /// The node of the pool's `exclusive` file.
    pub(crate) fn exclusive_node(self) -> u64 {
        self.0 + 1
    }

    /// The node of the pool's `tasks` file.
    pub(crate) fn tasks_node(self) -> u64 {
        self.0 + 2
    }
}
