//! Displaced tasks: claimed tasks that the kernel has taken off their lists. They are moved back as far as the kernel allows.
//!
//! The kernel lets a task run on all CPUs that its cpuset allows when the last CPU of its mask goes offline, and when the
//! cpuset leaves the mask. Before Linux 6.2 it also does so when the cpuset controller is switched on, and when any CPU
//! goes offline. Nobody tells the task, and it then runs on the lists of others.
//!
//! Owns when masks are looked at, and which displaced tasks are reported already. Does not know how CPUs that come and go
//! are noticed, or how a mask is set. A thread that the program has pinned elsewhere is the program's own choice, and
//! stays there.

use std::collections::{HashMap, HashSet};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use parking_lot::Mutex;

use super::events::Event;
use super::ports::{Journal as _, Masks as _, Ports, Process as _, Watch as _};
use super::{Engine, ProcessOf};
use crate::metrics::Counter;
use crate::model::command::{Command, CompletedPlan, Effects};
use crate::model::cpuset::CpuSet;
use crate::model::pool::ListId;
use crate::model::task::TaskId;
use crate::process::{BlockedWriter, Look, MaskError, Seen, Threads, TimeLimit};

/// How often the masks of claimed tasks are looked at, because nothing tells of a change of a cpuset. Nothing is looked at
/// while there are no claims.
const INTERVAL: Duration = Duration::from_secs(5);
/// How long CPUs that change are waited for: one after the other goes offline when SMT is switched off.
const SETTLING: Duration = Duration::from_millis(50);
/// How long one task may be worked on, and how long proofs about its threads are waited for. The others wait meanwhile.
const WORK: Duration = Duration::from_millis(100);
const PATIENCE: Duration = Duration::from_millis(20);

/// The tasks that are not on their lists.
#[derive(Debug)]
pub(super) struct Displaced {
    /// The displaced ones are reported, and could not be moved back.
    elsewhere: Mutex<HashMap<TaskId, Seen>>,
    /// Wakes the thread that looks when there is a claim again.
    bell: EventFd,
    is_idle: AtomicBool,
}

impl Displaced {
    /// # Errors
    /// No descriptors are left.
    pub(super) fn new() -> nix::Result<Self> {
        Ok(Self { elsewhere: Mutex::default(), bell: EventFd::new()?, is_idle: AtomicBool::new(false) })
    }

    /// There is a claim.
    pub(super) fn wake(&self) {
        if self.is_idle.swap(false, Ordering::AcqRel) {
            let _ = self.bell.write(1);
        }
    }

    /// Returns how many tasks could not be moved back.
    pub(super) fn count(&self) -> usize {
        self.elsewhere.lock().values().filter(|seen| matches!(seen, Seen::Displaced(_))).count()
    }
}

impl<P: Ports> Engine<P> {
    /// Looks for displaced tasks whenever CPUs come or go and every now and then; for a thread of its own. Sleeps while
    /// nothing is claimed. `cpus`: a descriptor that is readable when CPUs may have come or gone, and a function that says
    /// whether they have.
    pub(crate) fn watch_masks_forever(&self, cpus: Option<(BorrowedFd<'_>, &dyn Fn() -> bool)>) {
        use std::os::fd::AsFd as _;
        let mut offline = self.processes.offline();
        let mut look = Some(Look::AllThreads);
        // Whether there was a claim a short time ago: many are short, and the thread is not woken for each.
        let mut was_woken = false;
        loop {
            if let Some(look) = look {
                self.check_masks(look);
            }
            // A claim after this wakes the thread.
            self.displaced.is_idle.store(true, Ordering::Release);
            let has_claims = was_woken || self.configuration().claims().next().is_some();
            self.displaced.is_idle.store(!has_claims, Ordering::Release);
            let timeout = PollTimeout::try_from(INTERVAL).unwrap_or(PollTimeout::MAX);
            let mut fds = vec![PollFd::new(self.displaced.bell.as_fd(), PollFlags::POLLIN)];
            fds.extend(cpus.map(|(fd, _)| PollFd::new(fd, PollFlags::POLLIN)));
            let _ = poll(&mut fds, if has_claims { timeout } else { PollTimeout::NONE });
            let [bell, changed] = [0, 1].map(|n| fds.get(n).and_then(PollFd::any).unwrap_or(false));
            // The masks of a new claim are right: they are looked at after the next interval.
            look = (!bell).then_some(Look::FirstThread);
            was_woken = bell;
            if bell {
                let _ = self.displaced.bell.read();
            }
            if changed {
                std::thread::sleep(SETTLING);
                if cpus.is_some_and(|(_, have_changed)| have_changed()) {
                    look = Some(Look::AllThreads);
                    self.update_daemon_affinity();
                    let was_offline = std::mem::replace(&mut offline, self.processes.offline());
                    self.note_states(&was_offline, &offline);
                    self.widen(&was_offline.difference(&offline));
                }
            }
        }
    }

    /// The states of lists change whose CPUs have come or gone.
    fn note_states(&self, was_offline: &CpuSet, offline: &CpuSet) {
        let changed = was_offline.difference(offline).union(&offline.difference(was_offline));
        let claims = self.claims.lock();
        let lists = claims.pools().flat_map(|(_, pool)| pool.lists());
        let lists =
            lists.filter(|id| claims.list(*id).is_some_and(|list| !list.cpus().is_disjoint(&changed)));
        self.changes.changed(lists.map(ListId::state_node));
    }

    /// Lets tasks run on CPUs of their lists that have come online.
    pub(super) fn widen(&self, came: &CpuSet) {
        if came.is_empty() {
            return;
        }
        let tasks: Vec<TaskId> = {
            let claims = self.claims.lock();
            let has_it =
                |list| claims.list(list).is_some_and(|list| !list.cpus().intersection(came).is_empty());
            claims.claims().filter(|claim| has_it(claim.list)).map(|claim| claim.task).collect()
        };
        for task in tasks {
            let Some(process) = self.processes.watched(&task) else { continue };
            self.while_reserved(task, |cpus| {
                let before = cpus.difference(came);
                // A task that is pinned to a part of its list stays there.
                if self.processes.leader_mask(task.pid).is_ok_and(|mask| mask == before)
                    && let Err(error) = self.set_mask_soon(&process, cpus, Threads::All)
                {
                    log::debug!("{} stays on {before}: {error}", task.pid);
                }
            });
        }
    }

    /// Calls `act` with the CPUs that a claimed task can use, while nobody else sets its masks. Does nothing if it has no claim
    /// any more, or if a write has the task in flight.
    fn while_reserved(&self, task: TaskId, act: impl FnOnce(&CpuSet)) {
        let Ok(Effects { plan, .. }) = self.claims.lock().apply(Command::Reserve(task)) else { return };
        if let Some(placement) = plan.placements.first() {
            act(&self.usable(placement, &self.processes.offline()));
        }
        self.settle(CompletedPlan::unchanged(&plan));
    }

    /// Sets the mask of a claimed task, and does not let others wait for it.
    fn set_mask_soon(
        &self,
        process: &ProcessOf<P>,
        cpus: &CpuSet,
        threads: Threads,
    ) -> Result<(), MaskError> {
        let waiting = BlockedWriter::NONE.within(TimeLimit::new(Instant::now(), WORK, PATIENCE));
        self.processes.set_mask(process, cpus, cpus, threads, waiting).map(drop)
    }

    /// Looks whether claimed tasks are displaced, reports them and moves them back.
    pub(super) fn check_masks(&self, look: Look) {
        let claims: Vec<(TaskId, CpuSet)> = {
            let claims = self.claims.lock();
            let cpus = |list| claims.list(list).map(|list| list.cpus().clone());
            claims.claims().filter_map(|claim| Some((claim.task, cpus(claim.list)?))).collect()
        };
        let claimed: HashSet<TaskId> = claims.iter().map(|(task, _)| *task).collect();
        self.displaced.elsewhere.lock().retain(|task, _| claimed.contains(task));
        for (task, cpus) in claims {
            self.check_mask(task, &cpus, look);
        }
    }

    fn check_mask(&self, task: TaskId, cpus: &CpuSet, look: Look) {
        let Some(process) = self.processes.watched(&task) else { return };
        let before = self.displaced.elsewhere.lock().get(&task).cloned();
        // It may be another thread than the first one.
        let look = if before.is_some() { Look::AllThreads } else { look };
        if self.processes.are_within(&process, cpus, look).unwrap_or(true) {
            self.displaced.elsewhere.lock().remove(&task);
            return;
        }
        // Its list may be another one by now.
        self.while_reserved(task, |cpus| self.move_back(&process, cpus, before.as_ref()));
    }

    /// Moves a displaced task back on its list, while nobody else sets its masks.
    fn move_back(&self, process: &ProcessOf<P>, cpus: &CpuSet, before: Option<&Seen>) {
        let task = process.id();
        let mut now = match self.processes.look_at_masks(process, cpus, before) {
            Ok(Seen::Within) => None,
            Ok(seen) => Some(seen),
            Err(error) => return log::debug!("the masks of {} cannot be looked at: {error}", task.pid),
        };
        if let Some(Seen::Displaced(mask)) = &now {
            let moved = self.set_mask_soon(process, cpus, Threads::OnlyStrays);
            if !matches!(before, Some(Seen::Displaced(_))) {
                let outcome = match &moved {
                    Ok(_) => "it is on its list again".to_owned(),
                    Err(error) => error.to_string(),
                };
                self.report_displaced(task, &format!("it could run on {mask}; {outcome}"));
            }
            now = now.filter(|_| moved.is_err());
        }
        let mut elsewhere = self.displaced.elsewhere.lock();
        match now {
            Some(seen) => elsewhere.insert(task, seen),
            None => elsewhere.remove(&task),
        };
    }

    fn report_displaced(&self, task: TaskId, reason: &str) {
        let claims = self.claims.lock();
        let Some(claim) = claims.claim(&task).map(Arc::clone) else { return };
        self.metrics.count(Counter::Displaced);
        let event = self.claim_event("displaced", &claims, &claim);
        self.event(Event { reason: Some(reason.to_owned()), ..event });
        self.journal.request_flush();
    }
}
