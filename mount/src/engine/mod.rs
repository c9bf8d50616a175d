//! The engine: carries out what the claim machine decides.
//!
//! Owns the lock of the claims, and the order of every change: decide, record the intent, set the masks, read
//! them back, record the claim, settle, answer. Joins the model with processes and journal, which it only knows
//! as [`ports`]. Does not know FUSE, paths, or the format of a file.
//!
//! # Locks
//!
//! Locks are taken in this order, never in the opposite one: `configuring`, the lock that is held while cgroups are written,
//! the lock of a running search, `reaping`, `claims`, and then at most one of `events`, `refusals`, `shown`, `attributes`, `write_time`, `recorded_refusals`, and
//! the internal locks of `search`, of `changes`, of `displaced`, of `transient`, of `stale` and of the ports.
//!
//! No thread does I/O while it holds `claims`, `reaping`, the lock of a running search, or a lock after them. Under these
//! locks records are only [deferred](ports::Journal::defer): that keeps their order, and they are written after the lock is
//! released. A request that changes something writes them itself before it is answered; a request that reads
//! only [asks](ports::Journal::request_flush) the journal's thread to do it, and readers of events wait for that
//! thread for a [bounded time](ports::Journal::flush_within). So if the disk of the state
//! directory stops answering, every read, listing and stat(2) is still served, and changes are refused after a
//! bounded time. At most two threads can be stuck: one in a write to the journal, and one that holds
//! `configuring` while it stores the configuration. No request that only reads takes `configuring`.
//!
//! Nothing under `claims` makes a system call on another process, except to add a process to the watch or to
//! remove it.
//!
//! Longer than 400 lines because it has what all its modules share: the engine's fields, the order of its locks, and how a
//! change becomes an event.

mod apply;
mod budget;
mod changes;
mod configure;
mod difference;
mod displaced;
mod events;
mod intruders;
mod isolate;
mod last_error;
mod live;
mod lookup;
mod machine;
mod ports;
mod programs;
mod queue;
mod reap;
mod recover;
mod rename;
mod replay;
mod requester;
mod resolve;
mod rights;
mod search;
mod show;
mod stale;
#[cfg(test)]
pub(crate) mod tests;
mod transient;
mod write;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use parking_lot::{Condvar, Mutex, MutexGuard, RwLock};

pub(crate) use apply::CONFIG;
use budget::Budget;
pub(crate) use changes::{Changes, FIRST_VERSION, Notify};
use configure::Configuring;
pub(crate) use configure::{Attributes, MODE_OFFSET, NODES_EACH};
use displaced::Displaced;
pub(crate) use events::EVENTS_NODE;
use events::{Event, Events};
use intruders::Intruders;
use isolate::Isolation;
use last_error::Refusals;
pub(crate) use last_error::Refused;
pub(crate) use live::Live;
pub(crate) use lookup::Place;
use machine::CurrentTopology;
pub use machine::ReadTopology;
pub(crate) use ports::Ports;
use ports::{Clock, Journal, Masks as _, Process as _, Processes, Watch};
use programs::Programs;
use queue::Waiting;
pub(crate) use replay::{Admission, RequestId};
use search::Search;
use stale::Stale;
use transient::Transient;
pub(crate) use transient::Unused;

use crate::failpoint::{Step, reached};
use crate::journal::{EventLine, Record, Recovered};
use crate::metrics::{Counter, Metrics};
use crate::model::claims::Claims;
use crate::model::command::{Change, Claim, Effects, SavedMask, TaskInfo};
use crate::model::cpuset::CpuSet;
use crate::model::pool::{Exclusivity, ListId, PoolId};
use crate::model::refusal::Refusal;
use crate::model::rights::{Access, User};
use crate::model::task::{Pid, TaskId, before_nul};
use crate::model::topology::Topology;
use crate::process::{BlockedWriter, Facts};

/// How many numbers of open files are reserved in the journal at a time.
pub(crate) const RESERVED_HANDLES: u32 = 1 << 12;
/// How long a write waits for another write on the same task, which may be a hostile user's. Setting masks takes
/// microseconds per thread.
const IN_FLIGHT_TIMEOUT: Duration = Duration::from_millis(200);

/// The sender of a request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Caller {
    /// Its thread in our PID namespace; 0 if it has no number there.
    pub(crate) tid: u32,
    pub(crate) uid: u32,
    /// The request, the same if it comes again; 0 if it does not come from the kernel.
    pub(crate) request: RequestId,
}

impl Caller {
    /// The thread that waits for the answer.
    fn waiting(&self) -> BlockedWriter {
        if self.request == 0 { BlockedWriter::NONE } else { BlockedWriter::thread(self.tid) }
    }
}

/// The text of a `tasks` file and the version of the file that it shows.
type Shown = (u64, Arc<[u8]>);
type ProcessOf<P> = <<P as Ports>::Processes as Processes>::Process;

/// Everything that the files show and change.
#[derive(Debug)]
pub(crate) struct Engine<P: Ports = Live> {
    claims: Mutex<Claims>,
    /// Notified when a plan has been settled or abandoned.
    plan_finished: Condvar,
    /// Held while deaths are noticed, so that another thread waits until they are.
    reaping: Mutex<()>,
    search: Search,
    intruders: Intruders,
    displaced: Displaced,
    configuring: Configuring,
    attributes: RwLock<HashMap<u64, Attributes>>,
    processes: P::Processes,
    journal: P::Journal,
    clock: P::Clock,
    partitions: P::Partitions,
    isolation: Isolation,
    transient: Transient,
    /// Locked after the claims.
    waiting: Waiting,
    programs: Programs,
    stale: Stale,
    events: Mutex<Events>,
    /// Keyed by node.
    shown: Mutex<HashMap<u64, Shown>>,
    refusals: Mutex<Refusals>,
    /// The time that each user has left for its writes, in nanoseconds.
    write_time: Mutex<Budget>,
    /// How many refusals of each user are still recorded.
    recorded_refusals: Mutex<Budget>,
    pub(crate) changes: Changes,
    pub(crate) metrics: Metrics,
    topology: CurrentTopology,
    /// This process, which is never claimed.
    own_pid: Pid,
    /// The supervisor, which is never claimed; 0 if there is none at the moment.
    supervisor: AtomicU32,
    /// The CPUs on which the daemon was started.
    own_cpus: Option<CpuSet>,
    /// The version of the program.
    pub(crate) version: &'static str,
    in_flight_timeout: Duration,
}

/// The daemon, as far as the engine needs to know it.
#[derive(Clone, Debug, Default)]
pub(crate) struct OwnProcesses {
    /// The supervisor, if there is one at the moment.
    pub(crate) supervisor: Option<u32>,
    /// The CPUs on which the daemon was started. An administrator may have chosen them.
    pub(crate) cpus: Option<CpuSet>,
    /// Reads the CPUs of the machine.
    pub(crate) read_topology: Option<ReadTopology>,
    /// The version of the program.
    pub(crate) version: &'static str,
}

/// Why the engine could not start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error("cannot look at processes: {0}; is /proc mounted?")]
    Processes(#[source] std::io::Error),
    #[error("cannot make an eventfd: {0}; raise the limit of open files")]
    Eventfd(#[source] nix::Error),
    #[error("no metrics: {0}; this is an error in kcm")]
    Metrics(#[from] prometheus::Error),
}

impl<P: Ports> Engine<P> {
    /// Restores what an earlier daemon has left: pools, lists, the claims of tasks that are still alive. Also
    /// returns the number of the first open file.
    pub(crate) fn with_ports(
        (processes, journal, clock, partitions): (P::Processes, P::Journal, P::Clock, P::Partitions),
        mut recovered: Recovered,
        topology: Topology,
        own: OwnProcesses,
    ) -> Result<(Self, u32), StartError> {
        let handles = recovered.next_handle;
        let mut refusals = Refusals::default();
        recovered.refusals.iter().for_each(|record| refusals.add(Arc::clone(record), |_| false));
        let events = Events::new(
            recovered.next_event,
            recovered.events.clone(),
            recovered.reclaimed.clone(),
            recovered.reclaimed_dropped,
        );
        let reserved = Record::Reserved {
            events: events.reserved(),
            handles: handles.wrapping_add(2 * RESERVED_HANDLES),
        };
        let own_pid = Pid::new(std::process::id());
        let engine = Self {
            claims: Mutex::new(Claims::new(processes.limit())),
            plan_finished: Condvar::new(),
            reaping: Mutex::new(()),
            search: Search::default(),
            intruders: Intruders::default(),
            displaced: Displaced::new().map_err(StartError::Eventfd)?,
            configuring: Configuring::new(recovered.config.next_node),
            attributes: RwLock::default(),
            events: Mutex::new(events),
            shown: Mutex::default(),
            refusals: Mutex::new(refusals),
            write_time: Mutex::new(budget::of_write_time()),
            recorded_refusals: Mutex::new(budget::of_recorded_refusals()),
            changes: Changes::new().map_err(StartError::Eventfd)?,
            metrics: Metrics::new(clock.wall_ms(), recovered.damage.len(), own.version)?,
            topology: CurrentTopology::new(topology, own.read_topology),
            own_pid: own_pid.ok_or_else(|| StartError::Processes(std::io::ErrorKind::NotFound.into()))?,
            supervisor: AtomicU32::new(own.supervisor.unwrap_or(0)),
            own_cpus: own.cpus,
            version: own.version,
            in_flight_timeout: IN_FLIGHT_TIMEOUT,
            processes,
            journal,
            clock,
            isolation: Isolation::new(std::mem::take(&mut recovered.partitions))
                .map_err(StartError::Eventfd)?,
            transient: Transient::new().map_err(StartError::Eventfd)?,
            waiting: Waiting::default(),
            programs: Programs::default(),
            stale: Stale::new(std::mem::take(&mut recovered.config.stale)),
            partitions,
        };
        for damage in &recovered.damage {
            log::warn!("{damage}");
            let reason = Some(damage.to_string());
            engine.event(Event { event: "damaged", reason, ..Event::default() });
        }
        if let Err(error) = engine.journal.append(&reserved) {
            // A full or read-only disk must not prevent the mount: releases and reaps work without a journal.
            log::warn!("the state directory cannot be written: {error}; claims are refused until it can");
            // The next worker must not give out the same numbers.
            engine.journal.defer(reserved);
        }
        let queued = std::mem::take(&mut recovered.queued);
        engine.recover(recovered);
        engine.recover_queues(queued);
        engine.update_daemon_affinity();
        engine.journal.flush_deferred();
        Ok((engine, handles))
    }

    /// The CPUs of the machine.
    pub(crate) fn topology(&self) -> Arc<Topology> {
        self.topology.get()
    }

    /// Locks the claims, with the dead tasks reaped. For everything that shows or decides who holds what.
    pub(crate) fn live_claims(&self) -> MutexGuard<'_, Claims> {
        self.reap_all();
        self.claims.lock()
    }

    /// Locks the claims as they are. Only for pools and lists, which no death can change.
    pub(crate) fn configuration(&self) -> MutexGuard<'_, Claims> {
        self.claims.lock()
    }

    /// Forgets the reclaimed claims up to `seq`.
    ///
    /// # Errors
    /// The data is not a number, or it cannot be recorded.
    pub(crate) fn acknowledge(&self, caller: Caller, opener: User, data: &[u8]) -> Result<(), Refusal> {
        self.require_admins(caller, opener)?;
        let text = std::str::from_utf8(before_nul(data)).map_err(|_| Refusal::NotASeq)?.trim();
        if text.is_empty() {
            return Ok(());
        }
        let seq: u64 = text.parse().map_err(|_| Refusal::NotASeq)?;
        let records = std::iter::once(Record::Acknowledged { seq }).chain(replay::answered(caller.request));
        self.journal.append(&Record::Batch(records.collect())).map_err(write::not_recorded)?;
        reached(Step::AcknowledgementRecorded);
        self.events.lock().acknowledge(seq);
        Ok(())
    }

    /// Watches deaths, gives turns to tasks that wait, and tells pollers of changed files; for a thread of its own. Sleeps
    /// while nobody polls.
    pub(crate) fn notify_forever(&self) {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd;
        loop {
            let next = self.give_turns();
            let (due, waiting) = self.changes.take_due();
            due.into_iter().for_each(Notify::notify);
            let mut fds = vec![PollFd::new(self.changes.doorbell().as_fd(), PollFlags::POLLIN)];
            if waiting {
                fds.push(PollFd::new(self.processes.as_fd(), PollFlags::POLLIN));
            }
            // Rounded up, so that the turn is over then.
            let timeout = next.and_then(|next| PollTimeout::try_from(next.as_millis() + 1).ok());
            let _ = poll(&mut fds, timeout.unwrap_or(PollTimeout::NONE));
            self.reap();
        }
    }

    /// Writes the records of reads in the background; for a thread of its own. Sleeps while there are none.
    pub(crate) fn flush_forever(&self) {
        self.journal.flush_forever();
    }

    /// Counts changes, and adds their events and the new versions of files. The caller holds the lock of the
    /// claims, so that events have the order of the changes.
    fn publish(&self, claims: &Claims, effects: &Effects) {
        for change in &effects.changes {
            let (event, counter, claim, origin) = match change {
                Change::Claimed(claim) => ("claimed", Counter::Claimed, claim, Event::default()),
                Change::Moved { from, to } => {
                    self.list_changed(claims, *from);
                    self.note_released(claims, *from);
                    let name = claims.list(*from).map(|list| list.name().clone());
                    let origin = Event {
                        from_pool: name.as_ref().map(|name| name.pool.to_string()),
                        from_cpus: name.map(|name| name.cpus),
                        ..Event::default()
                    };
                    ("moved", Counter::Moved, to, origin)
                }
                Change::Released(claim) => {
                    self.note_released(claims, claim.list);
                    ("released", Counter::Released, claim, Event::default())
                }
                Change::Inherited { from, to } => {
                    self.programs.forget(from);
                    let origin = Event { from_pid: Some(from.pid.get()), ..Event::default() };
                    ("inherited", Counter::Inherited, to, origin)
                }
                Change::Ended(claim) => ("ended", Counter::Ended, claim, Event::default()),
                Change::Died(claim) => ("died", Counter::Died, claim, Event::default()),
                // Its event has a number that its record needs: `reap_one` adds it.
                Change::Reclaimed(claim) => {
                    self.list_changed(claims, claim.list);
                    self.metrics.count(Counter::Reclaimed);
                    continue;
                }
            };
            self.list_changed(claims, claim.list);
            self.metrics.count(counter);
            self.displaced.wake();
            // The task that gets the list shares it with another process.
            let is_claim = matches!(change, Change::Claimed(_) | Change::Moved { .. });
            let list = claims.list(claim.list).filter(|list| is_claim && list.has_intruders());
            let reason = list.map(|_| "another process is pinned within the list".to_owned());
            let Event { from_pool, from_cpus, from_pid, .. } = origin;
            let event = self.claim_event(event, claims, claim);
            self.event(Event { from_pool, from_cpus, from_pid, reason, ..event });
            if matches!(change, Change::Released(_) | Change::Ended(_) | Change::Died(_)) {
                self.programs.forget(&claim.task);
            }
        }
    }

    /// Has processes looked for that stay behind on an exclusive list.
    fn note_released(&self, claims: &Claims, id: ListId) {
        let pool = claims.list(id).and_then(|list| claims.pool(list.pool()));
        if pool.is_some_and(|pool| pool.exclusivity() == Exclusivity::Exclusive) {
            self.search.add_released(id);
        }
    }

    /// Adds an event and returns its number.
    fn event(&self, event: Event) -> u64 {
        let mut events = self.events.lock();
        if let Some(reserved) = events.reserve() {
            self.journal.defer(Record::Reserved { events: reserved, handles: 0 });
        }
        let EventLine { seq, uid, line } = events.push(self.clock.wall_ms(), &event);
        self.journal.note_event(uid, &line);
        drop(events);
        self.changes.changed([EVENTS_NODE]);
        seq
    }

    /// Notes the name of a process's program for the events of its claim: those of its end may come when it has gone.
    fn note_program(&self, process: &ProcessOf<P>) {
        if let Some(name) = self.processes.comm(process) {
            self.programs.note(process.id(), name);
        }
    }

    fn claim_event(&self, event: &'static str, claims: &Claims, claim: &Claim) -> Event {
        Event {
            pid: Some(claim.task.pid.get()),
            program: self.programs.of(&claim.task),
            uid: Some(claim.uid),
            ..list_event_of(event, claims, claim.list)
        }
    }

    fn list_changed(&self, claims: &Claims, id: ListId) {
        self.transient.note(claims, id);
        self.wake_queues();
        self.files_changed(claims, id);
    }

    /// The files of a list have changed, and those of its pool that depend on it.
    fn files_changed(&self, claims: &Claims, id: ListId) {
        if let Some(list) = claims.list(id) {
            self.changes.changed([id.tasks_node(), id.state_node(), list.pool().tasks_node()]);
        }
    }

    /// Returns what the model has to know about a process; `None` if it has died.
    fn task_info(&self, process: &ProcessOf<P>) -> Result<Option<TaskInfo>, Refusal> {
        let facts = self.processes.facts(process).map_err(self.fault("looking at the process"))?;
        Ok(facts.map(|facts| self.task_info_of(process.id(), &facts)))
    }

    fn task_info_of(&self, task: TaskId, facts: &Facts) -> TaskInfo {
        TaskInfo {
            task,
            uids: facts.uids,
            access: Access::default(),
            kernel_thread: facts.kernel_thread,
            ours: task.pid == self.own_pid || task.pid.get() == self.supervisor.load(Ordering::Relaxed),
        }
    }

    /// Maps errors of system calls that should not fail.
    fn fault(&self, what: &'static str) -> impl Fn(std::io::Error) -> Refusal {
        let limit = self.processes.limit();
        move |error| match Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)) {
            // The limit of open files is the limit of tasks.
            Errno::EMFILE | Errno::ENFILE => Refusal::TooMany { limit },
            // Only processes with other credentials than the daemon's are hidden from it.
            Errno::EPERM | Errno::EACCES => Refusal::DaemonLacks { capability: "CAP_SYS_PTRACE" },
            errno => Refusal::Fault { what, errno },
        }
    }

    /// Returns whether the process is alive and its leader's mask lies within the list.
    pub(crate) fn is_within(&self, id: ListId, pid: u32) -> bool {
        let cpus = self.configuration().list(id).map(|list| list.cpus().clone());
        let mask = Pid::new(pid).and_then(|pid| self.processes.leader_mask(pid).ok());
        matches!((cpus, mask), (Some(cpus), Some(mask)) if mask.is_subset(&cpus))
    }

    /// Sets the supervisor, which is another process from now on.
    pub(crate) fn set_supervisor(&self, pid: u32) {
        self.supervisor.store(pid, Ordering::Relaxed);
        self.update_daemon_affinity();
    }

    /// Moves the daemon off the exclusive lists and the isolated CPUs, within the CPUs on which it was started, as far as
    /// there are others.
    fn update_daemon_affinity(&self) {
        // This thread belongs to the daemon and makes no other thread meanwhile.
        let waiting = BlockedWriter::thread(nix::unistd::gettid().as_raw() as u32);
        let exclusive = self.configuration().exclusive_cpus();
        let topology = self.topology.get();
        let elsewhere = topology.online().difference(&exclusive);
        let own =
            self.own_cpus.as_ref().map_or_else(|| elsewhere.clone(), |own| own.intersection(&elsewhere));
        let choices = [own.difference(&topology.isolated()), own, elsewhere];
        let mask = choices.into_iter().find(|cpus| !cpus.is_empty()).map_or(SavedMask::All, SavedMask::Cpus);
        let supervisor = Pid::new(self.supervisor.load(Ordering::Relaxed));
        for pid in [Some(self.own_pid), supervisor].into_iter().flatten() {
            match self.processes.open(pid) {
                Ok(Some(daemon)) => self.processes.restore_mask(&daemon, &mask, waiting),
                _ => log::warn!("the affinity of the daemon's process {pid} cannot be set"),
            }
        }
    }
}

fn list_event_of(event: &'static str, claims: &Claims, list: ListId) -> Event {
    let name = claims.list(list).map(|list| list.name().clone());
    Event {
        event,
        pool: name.as_ref().map(|name| name.pool.to_string()),
        cpus: name.map(|name| name.cpus),
        ..Event::default()
    }
}

impl ListId {
    /// Returns the node of the list's `tasks` file.
    pub(crate) fn tasks_node(self) -> u64 {
        self.0 + 1
    }

    /// Returns the node of the list's `state` file.
    pub(crate) fn state_node(self) -> u64 {
        self.0 + 2
    }

    /// Returns the nodes of the list.
    fn nodes(self) -> [u64; 3] {
        [self.0, self.tasks_node(), self.state_node()]
    }
}

impl PoolId {
    /// Returns the node of the pool's `exclusive` file.
    pub(crate) fn exclusive_node(self) -> u64 {
        self.0 + 1
    }

    /// Returns the node of the pool's `tasks` file.
    pub(crate) fn tasks_node(self) -> u64 {
        self.0 + 2
    }

    /// Returns the node of the pool's `mode` file, which is far from the others: earlier versions gave a pool four nodes.
    pub(crate) fn mode_node(self) -> u64 {
        self.0 + MODE_OFFSET
    }

    /// Returns the node of the pool's `transient` file, which is as far away.
    pub(crate) fn transient_node(self) -> u64 {
        self.mode_node() + 1
    }

    /// Returns the node of the pool's `queue` file, which is as far away.
    pub(crate) fn queue_node(self) -> u64 {
        self.mode_node() + 2
    }

    /// Returns the node of the pool's `partial` file.
    pub(crate) fn partial_node(self) -> u64 {
        self.0 + 3
    }

    /// Returns the nodes of the pool.
    fn nodes(self) -> [u64; 7] {
        [
            self.0,
            self.exclusive_node(),
            self.tasks_node(),
            self.partial_node(),
            self.mode_node(),
            self.transient_node(),
            self.queue_node(),
        ]
    }
}
