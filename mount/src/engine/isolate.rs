//! Isolation: the partitions of the tasks in isolated pools.
//!
//! Owns when a partition is made, looked at and taken back, and that the journal has it before anything is written. A
//! partition is an effect of a claim, like a mask: the claim machine does not know it. Does not know how cgroups are written.
//!
//! A claim makes its partition before it is recorded, and a release takes it back before the mask is restored. Everything
//! else is done by [`Engine::keep_partitions_forever`]: it takes back what belongs to no claim, and makes again what
//! somebody has taken away. It sleeps while there is no partition.

mod members;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::Mutex;

use super::events::Event;
use super::ports::{Journal as _, Partitions as _, Ports, Process as _, Watch as _};
use super::{Engine, ProcessOf, list_event_of};
use crate::failpoint::{Step, reached};
use crate::journal::{AppendError, Record};
use crate::model::cpuset::CpuSet;
use crate::model::partition::{Extent, Partition, PartitionState};
use crate::model::pool::ListId;
use crate::model::task::TaskId;
use crate::partitions::{Found, PartitionError};

/// How long a change may stay unnoticed that the kernel does not report.
const INTERVAL: Duration = Duration::from_millis(500);
/// The longest pause between two attempts to make a partition that the kernel refuses.
const LONGEST: Duration = Duration::from_secs(8);

/// The partitions.
#[derive(Debug)]
pub(super) struct Isolation {
    /// Held while cgroups are written.
    writing: Mutex<()>,
    made: Mutex<BTreeMap<ListId, Made>>,
    /// Wakes the thread when there is something to do.
    bell: EventFd,
}

/// The partition of a list, and its state.
#[derive(Clone, Debug)]
struct Made {
    /// `None` if it could not be made.
    partition: Option<Partition>,
    /// The extent of the partition when it is made again.
    extent: Extent,
    state: PartitionState,
    /// When it is tried again, and after which pause, if it could not be made.
    again: Option<(Instant, Duration)>,
}

impl Made {
    fn new(partition: Partition, state: PartitionState) -> Self {
        let extent = partition.extent();
        Self { partition: Some(partition), extent, state, again: None }
    }

    fn missing(extent: Extent, state: PartitionState) -> Self {
        Self { partition: None, extent, state, again: None }
    }
}

/// Why a list was not isolated.
#[derive(Debug)]
pub(super) enum NotIsolated {
    Partition(PartitionError),
    Journal(AppendError),
}

impl From<PartitionError> for NotIsolated {
    fn from(error: PartitionError) -> Self {
        Self::Partition(error)
    }
}

impl Isolation {
    /// # Errors
    /// No descriptors are left.
    pub(super) fn new(partitions: Vec<Partition>) -> nix::Result<Self> {
        let made = |partition: Partition| {
            let state = PartitionState::Invalid("it was not looked at yet".to_owned());
            (partition.list, Made::new(partition, state))
        };
        let made = partitions.into_iter().map(made).collect();
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        Ok(Self { writing: Mutex::new(()), made: Mutex::new(made), bell: EventFd::from_flags(flags)? })
    }

    /// Has the thread look at everything.
    pub(super) fn wake(&self) {
        let _ = self.bell.write(1);
    }

    /// Whether there is something to be taken back for the list.
    pub(super) fn has(&self, list: ListId) -> bool {
        self.made.lock().contains_key(&list)
    }

    /// Whether the list has a partition, in force or not.
    pub(super) fn is_written(&self, list: ListId) -> bool {
        self.made.lock().get(&list).is_some_and(|made| made.partition.is_some())
    }

    /// Returns the state of the partition of a list.
    pub(super) fn state(&self, list: ListId) -> Option<PartitionState> {
        self.made.lock().get(&list).map(|made| made.state.clone())
    }

    /// Returns the extent of the partition of a list.
    pub(super) fn extent(&self, list: ListId) -> Extent {
        self.made.lock().get(&list).map(|made| made.extent.clone()).unwrap_or_default()
    }

    /// Partitions that were taken back have to be made again.
    pub(super) fn expect(&self, lists: Vec<(ListId, Extent)>) {
        let mut made = self.made.lock();
        for (list, extent) in lists {
            let state = PartitionState::Invalid("it was not made yet".to_owned());
            made.entry(list).or_insert(Made::missing(extent, state));
        }
    }

    /// Returns the partitions of which something is written.
    fn written(&self) -> Vec<Partition> {
        let made = self.made.lock();
        made.values().filter_map(|made| made.partition.clone()).collect()
    }

    /// Whether a cgroup was made as a partition.
    fn is_partition(&self, path: &str) -> bool {
        let made = self.made.lock();
        let mut partitions = made.values().filter_map(|made| made.partition.as_ref());
        partitions.any(|it| !it.is_whole_cgroup && it.path() == path)
    }
}

impl<P: Ports> Engine<P> {
    /// Makes a partition for a task that is about to get a list, and moves the task into it.
    ///
    /// # Errors
    /// Nothing is left of it.
    pub(super) fn isolate(
        &self,
        list: ListId,
        cpus: &CpuSet,
        process: &ProcessOf<P>,
        extent: &Extent,
    ) -> Result<(), NotIsolated> {
        let _writing = self.isolation.writing.lock();
        // Of an earlier holder.
        self.end_partition_locked(list).map_err(not_ended)?;
        self.isolate_locked(list, cpus, process, extent)
    }

    fn isolate_locked(
        &self,
        list: ListId,
        cpus: &CpuSet,
        process: &ProcessOf<P>,
        extent: &Extent,
    ) -> Result<(), NotIsolated> {
        let pid = process.id().pid;
        let is_partition = |path: &str| self.isolation.is_partition(path);
        let partition = self.partitions.plan(pid, list, cpus, extent, &is_partition)?;
        self.journal.append(&Record::Partition(partition.clone())).map_err(NotIsolated::Journal)?;
        reached(Step::PartitionRecorded);
        let unfinished = PartitionState::Invalid("it is being made".to_owned());
        self.isolation.made.lock().insert(list, Made::new(partition.clone(), unfinished));
        let result = self.partitions.make(&partition, pid);
        // The number of a process that dies meanwhile may be that of another one by now.
        let result = if process.is_alive() { result } else { Err(PartitionError::Gone) };
        reached(Step::PartitionMade);
        match result {
            Ok(()) => self.set_partition_state(list, PartitionState::Isolated),
            Err(error) => {
                let _ = self.end_partition_locked(list).inspect_err(|left| self.end_later(list, left));
                let boot = cpus.is_subset(&self.topology.get().isolated());
                if !(boot && matches!(error, PartitionError::Refused(_))) {
                    return Err(error.into());
                }
                // The kernel has isolated these CPUs at boot, and makes no partition of them.
                self.isolation.made.lock().insert(list, Made::missing(extent.clone(), PartitionState::Boot));
            }
        }
        self.isolation.wake();
        Ok(())
    }

    /// Takes back the partition of a list, if there is one.
    ///
    /// # Errors
    /// It cannot be taken back now. The thread tries again.
    pub(super) fn end_partition(&self, list: ListId) -> io::Result<()> {
        if !self.isolation.has(list) {
            return Ok(());
        }
        let _writing = self.isolation.writing.lock();
        self.end_partition_locked(list).inspect_err(|error| self.end_later(list, error))
    }

    /// Leaves a partition that cannot be taken back now to the thread.
    fn end_later(&self, list: ListId, error: &io::Error) {
        let list = self.configuration().list(list).map_or_else(String::new, |list| list.name().to_string());
        log::warn!("the partition of {list} is not removed yet: {error}");
        self.isolation.wake();
    }

    fn end_partition_locked(&self, list: ListId) -> io::Result<()> {
        let Some(made) = self.isolation.made.lock().get(&list).cloned() else { return Ok(()) };
        if let Some(partition) = made.partition {
            let mut others = self.isolation.written();
            others.retain(|other| other.list != list);
            let changed = self.partitions.take_back(&partition, &others)?;
            reached(Step::PartitionTakenBack);
            let mut known = self.isolation.made.lock();
            for other in &changed {
                if let Some(made) = known.get_mut(&other.list) {
                    made.partition = Some(other.clone());
                }
            }
            drop(known);
            let records = changed.into_iter().map(Record::Partition);
            self.journal.defer(Record::Batch(records.chain([Record::Unpartitioned { list }]).collect()));
        }
        self.isolation.made.lock().remove(&list);
        self.changes.changed([list.state_node()]);
        Ok(())
    }

    fn set_partition_state(&self, list: ListId, state: PartitionState) {
        let mut made = self.isolation.made.lock();
        let Some(made) = made.get_mut(&list).filter(|made| made.state != state) else { return };
        made.state = state;
        self.changes.changed([list.state_node()]);
    }

    /// Keeps the partitions as the claims need them; for a thread of its own.
    pub(crate) fn keep_partitions_forever(&self) {
        loop {
            // Not set after a timeout, or if the kernel has reported something.
            let is_called = self.isolation.bell.read().is_ok();
            // Before the look: a change after this is reported.
            let watched: Vec<File> =
                self.isolation.written().iter().flat_map(|it| self.partitions.watch(it)).collect();
            self.reap();
            self.end_unused_partitions();
            // Those that requests have made are right: they are looked at after the next interval.
            if !is_called {
                self.check_partitions();
            }
            self.journal.flush_deferred();
            let timeout = if self.isolation.made.lock().is_empty() {
                PollTimeout::NONE
            } else {
                PollTimeout::try_from(INTERVAL).unwrap_or(PollTimeout::MAX)
            };
            let mut fds = vec![PollFd::new(self.isolation.bell.as_fd(), PollFlags::POLLIN)];
            fds.extend(watched.iter().map(|file| PollFd::new(file.as_fd(), PollFlags::POLLPRI)));
            let _ = poll(&mut fds, timeout);
        }
    }

    /// Takes back the partitions that belong to no claim.
    fn end_unused_partitions(&self) {
        let _writing = self.isolation.writing.lock();
        let lists: Vec<ListId> = self.isolation.made.lock().keys().copied().collect();
        for list in lists {
            let is_used = self.claims.lock().list(list).is_some_and(|list| list.is_used());
            if !is_used && let Err(error) = self.end_partition_locked(list) {
                self.set_partition_state(
                    list,
                    PartitionState::Invalid(format!("it is not removed: {error}")),
                );
            }
        }
    }

    /// Takes back the partitions that belong to no claim, and makes the broken ones again.
    pub(super) fn check_partitions(&self) {
        self.end_unused_partitions();
        let _writing = self.isolation.writing.lock();
        let wanted: Vec<(ListId, CpuSet, TaskId)> = {
            let claims = self.claims.lock();
            let isolated = claims.claims().filter(|claim| claims.is_isolated(claim.list));
            let settled = isolated.filter(|claim| !claims.is_in_flight(&claim.task));
            settled.filter_map(|it| Some((it.list, claims.list(it.list)?.cpus().clone(), it.task))).collect()
        };
        for (list, cpus, task) in wanted {
            let process = self.processes.watched(&task).filter(|process| process.is_alive());
            if let Some(process) = process {
                self.check_partition(list, &cpus, &process);
            }
        }
    }

    fn check_partition(&self, list: ListId, cpus: &CpuSet, process: &ProcessOf<P>) {
        let made = self.isolation.made.lock().get(&list).cloned();
        let why = match &made {
            Some(Made { state: PartitionState::Boot, .. }) => return,
            Some(Made { again: Some((when, _)), .. }) if *when > Instant::now() => return,
            Some(Made { partition: Some(partition), .. }) => {
                match self.partitions.look(partition, process.id().pid) {
                    Found::Isolated => {
                        self.set_partition_state(list, PartitionState::Isolated);
                        return;
                    }
                    Found::Broken(why) => why,
                }
            }
            Some(Made { partition: None, .. }) | None => "it was not made yet".to_owned(),
        };
        let extent = made.as_ref().map(|made| made.extent.clone()).unwrap_or_default();
        let again = self
            .end_partition_locked(list)
            .map_err(not_ended)
            .and_then(|()| self.isolate_locked(list, cpus, process, &extent));
        let reason = match again {
            Ok(()) => format!("{why}; it is isolated again"),
            // The death is noticed soon.
            Err(NotIsolated::Partition(PartitionError::Gone)) => return,
            Err(error) => {
                let error = error.to_string();
                self.note_broken(list, error.clone(), made.as_ref());
                error
            }
        };
        if made.is_none_or(|made| made.state != PartitionState::Invalid(reason.clone())) {
            self.report_partition(list, &reason);
        }
    }

    /// Keeps in mind that a claimed list is not isolated, and why.
    fn note_broken(&self, list: ListId, why: String, before: Option<&Made>) {
        let pause =
            before.and_then(|made| made.again).map_or(INTERVAL, |(_, pause)| (2 * pause).min(LONGEST));
        let mut known = self.isolation.made.lock();
        let extent = before.map(|made| made.extent.clone()).unwrap_or_default();
        let made = known.entry(list).or_insert(Made::missing(extent, PartitionState::Isolated));
        made.state = PartitionState::Invalid(why);
        made.again = Some((Instant::now() + pause, pause));
        drop(known);
        self.changes.changed([list.state_node()]);
    }

    fn report_partition(&self, list: ListId, reason: &str) {
        log::warn!("the partition of a list: {reason}");
        let claims = self.claims.lock();
        let event = list_event_of("invalid", &claims, list);
        self.event(Event { reason: Some(reason.to_owned()), ..event });
        drop(claims);
        self.journal.request_flush();
    }
}

fn not_ended(error: io::Error) -> NotIsolated {
    NotIsolated::Partition(PartitionError::Refused(format!(
        "an earlier partition cannot be removed: {error}"
    )))
}

impl std::fmt::Display for NotIsolated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Partition(PartitionError::Gone) => f.write_str("its task has died"),
            Self::Partition(PartitionError::Missing(missing)) => write!(f, "{missing}"),
            Self::Partition(PartitionError::Unsuitable { path, why }) => write!(f, "{path}: {why}"),
            Self::Partition(PartitionError::Refused(why)) => f.write_str(why),
            Self::Journal(error) => write!(f, "it cannot be recorded: {error}"),
        }
    }
}
