//! The search for the heirs of dead tasks.
//!
//! Owns when the processes of the machine are looked over, for whom, and who waits for it. Does not decide who
//! inherits: the model does. Does not know how processes are found.
//!
//! From the death of its holder to the end of the search an exclusive list stays closed: the dead task still holds it. A
//! search takes about a microsecond per process, and a user can make it slow with thousands of processes that have the
//! mask of one list. So nobody waits for a search because of another list, and nobody waits without a bound:
//!
//! - A caller who could see one of the dead tasks carries out the search itself, if the last one was quick. Otherwise a
//!   thread of its own does, and the caller waits for it no longer than a limit.
//! - One search serves all deaths that were noticed before it began.
//! - After a slow search there is a pause, so that searches take at most a quarter of one CPU's time.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::Engine;
use super::intruders::Pinned;
use super::ports::{Clock as _, Journal as _, Ports, Processes as _};
use crate::clock;
use crate::failpoint::{self, Step, reached};
use crate::model::claims::{ListToPassOn, is_intruder};
use crate::model::command::{Claim, Ending, Heir, HeirCandidate};
use crate::model::cpuset::CpuSet;
use crate::model::pool::{ListId, PoolId};
use crate::model::task::TaskId;
use crate::process::ScannedProcess;

/// How long a request waits for a search that concerns its list or pool.
pub(super) const LIMIT: Duration = Duration::from_secs(2);
/// How long a request waits that depends on no single list.
pub(super) const BRIEF: Duration = Duration::from_millis(40);
/// A search that takes no more CPU time is carried out by the request that needs it: to wait for another thread would take
/// about as long on a machine with 300 processes.
const QUICK: Duration = Duration::from_millis(5);
/// After a search that took more CPU time than this there is a pause of `PAUSES` times as long.
const NO_PAUSE: Duration = Duration::from_millis(10);
const PAUSES: u32 = 3;
/// How long lists that were released wait until they are looked at, so that one look serves many.
const GATHERING: Duration = Duration::from_millis(100);
/// Looks at released lists are apart by this many times the length of the last one.
const APART: u32 = 20;

/// The claim of a dead task.
#[derive(Clone, Debug)]
pub(super) struct DeadClaim {
    pub(super) claim: Arc<Claim>,
    pub(super) pool: PoolId,
    pub(super) cpus: CpuSet,
    pub(super) ending: Ending,
    /// The real uid at the death, if the kernel could still tell.
    pub(super) user: Option<u32>,
    pub(super) is_inheritable: bool,
    /// Whether a plan named the task when it was found dead: then it may be on another list soon.
    pub(super) is_in_flight: bool,
}

/// The lists that a caller could see.
#[derive(Clone, Copy, Debug)]
pub(super) enum Concern<'a> {
    List(ListId),
    Pool(PoolId),
    /// The list on which a process with this mask runs.
    Around(&'a CpuSet),
    Everything,
}

impl Concern<'_> {
    fn includes(self, dead: &DeadClaim) -> bool {
        dead.is_in_flight
            || match self {
                Self::List(list) => dead.claim.list == list,
                Self::Pool(pool) => dead.pool == pool,
                Self::Around(mask) => mask.is_subset(&dead.cpus),
                Self::Everything => true,
            }
    }
}

/// The deaths that wait for a search.
#[derive(Debug, Default)]
pub(super) struct Search {
    /// The number of dead tasks in `waiting`.
    pending: AtomicUsize,
    waiting: Mutex<Waiting>,
    /// Notified when there is something to look for and the thread sleeps.
    wanted: Condvar,
    ended: Condvar,
    /// Held by the thread that searches.
    running: Mutex<()>,
}

#[derive(Debug, Default)]
struct Waiting {
    dead: BTreeMap<TaskId, Arc<DeadClaim>>,
    /// The exclusive lists that a living task has left since the last look.
    released: BTreeSet<ListId>,
    released_since: Option<Instant>,
    /// How much CPU time the last search took, and when it ended.
    took: Duration,
    ended: Option<Instant>,
    /// Whether the thread sleeps without knowing of a death.
    is_asleep: bool,
}

impl Waiting {
    /// Returns when the next search may begin; `None` if there is nothing to look for.
    fn due(&self) -> Option<Instant> {
        let after = |pause: Duration| self.ended.map(|ended| ended + pause);
        let now = Instant::now();
        if !self.dead.is_empty() {
            return Some(after(self.pause()).unwrap_or(now));
        }
        let gathered = self.released_since? + GATHERING;
        Some(after(self.took * APART).map_or(gathered, |after| after.max(gathered)))
    }

    fn pause(&self) -> Duration {
        if self.took > NO_PAUSE { self.took * PAUSES } else { Duration::ZERO }
    }

    fn is_quick(&self) -> bool {
        self.took <= QUICK
    }
}

impl Search {
    /// Adds a death.
    pub(super) fn add(&self, dead: DeadClaim) {
        let mut waiting = self.waiting.lock();
        waiting.dead.insert(dead.claim.task, Arc::new(dead));
        self.pending.store(waiting.dead.len(), Ordering::Release);
    }

    /// Adds an exclusive list that a living task has left.
    pub(super) fn add_released(&self, list: ListId) {
        let mut waiting = self.waiting.lock();
        waiting.released.insert(list);
        if waiting.released_since.is_none() {
            waiting.released_since = Some(Instant::now());
            self.wake(&mut waiting);
        }
    }

    /// Whether no death waits for a search.
    pub(super) fn is_idle(&self) -> bool {
        self.pending.load(Ordering::Acquire) == 0
    }

    fn wake(&self, waiting: &mut Waiting) {
        if std::mem::take(&mut waiting.is_asleep) {
            self.wanted.notify_one();
        }
    }
}

/// The results of a search.
#[derive(Debug, Default)]
struct Findings {
    heirs: BTreeMap<TaskId, Heir>,
    pinned: BTreeMap<ListId, Vec<Pinned>>,
}

impl<P: Ports> Engine<P> {
    /// Looks for heirs and for intruders on lists that came free, for a thread of its own. Sleeps while there is
    /// nothing to look for.
    pub(crate) fn search_forever(&self) {
        loop {
            let mut waiting = self.search.waiting.lock();
            loop {
                waiting.is_asleep = waiting.dead.is_empty();
                match waiting.due() {
                    None => self.search.wanted.wait(&mut waiting),
                    Some(due) if due > Instant::now() => {
                        self.search.wanted.wait_until(&mut waiting, due);
                    }
                    Some(_) => break,
                }
            }
            waiting.is_asleep = false;
            drop(waiting);
            let _running = self.search.running.lock();
            self.search();
        }
    }

    /// Waits until no dead task that the caller could see holds a list, but no longer than `limit`.
    pub(super) fn await_search(&self, concern: Concern<'_>, limit: Duration) {
        if self.search.is_idle() {
            return;
        }
        let deadline = Instant::now() + limit;
        loop {
            let mut waiting = self.search.waiting.lock();
            if !waiting.dead.values().any(|dead| concern.includes(dead)) {
                // Somebody has to look for the heirs of the others.
                if !waiting.dead.is_empty() {
                    self.search.wake(&mut waiting);
                }
                return;
            }
            if waiting.is_quick()
                && let Some(_running) = self.search.running.try_lock()
            {
                drop(waiting);
                self.search();
                continue;
            }
            self.search.wake(&mut waiting);
            if self.search.ended.wait_until(&mut waiting, deadline).timed_out() {
                return;
            }
        }
    }

    /// Looks for the heirs of all deaths that wait, however long it takes.
    pub(super) fn search_now(&self) {
        let _running = self.search.running.lock();
        self.search();
    }

    /// Looks over the processes of the machine once. The caller holds `running`.
    fn search(&self) {
        let (dead, mut released) = {
            let mut waiting = self.search.waiting.lock();
            waiting.released_since = None;
            let dead: Vec<Arc<DeadClaim>> = waiting.dead.values().cloned().collect();
            (dead, std::mem::take(&mut waiting.released))
        };
        let begun = clock::of_this_thread();
        released.retain(|&list| self.claims.lock().list(list).is_some_and(|list| list.is_free()));
        if dead.is_empty() && released.is_empty() {
            return;
        }
        let (in_partitions, elsewhere): (Vec<_>, Vec<_>) =
            dead.iter().cloned().partition(|dead| self.isolation.is_written(dead.claim.list));
        let mut findings = Findings::default();
        if !elsewhere.is_empty() || !released.is_empty() {
            findings = self.look_over_processes(&elsewhere, &released);
        }
        for dead in in_partitions {
            findings.heirs.extend(self.heir_in_partition(&dead).map(|heir| (dead.claim.task, heir)));
        }
        for dead in &dead {
            let heir = findings.heirs.remove(&dead.claim.task);
            if heir.is_none() {
                let pinned = findings.pinned.remove(&dead.claim.list).unwrap_or_default();
                self.note_pinned(dead.claim.list, pinned);
            }
            self.end_claim(dead, heir);
            reached(Step::DeathReaped);
        }
        for list in released {
            self.note_pinned(list, findings.pinned.remove(&list).unwrap_or_default());
        }
        {
            let mut waiting = self.search.waiting.lock();
            waiting.dead.retain(|task, _| !dead.iter().any(|it| it.claim.task == *task));
            self.search.pending.store(waiting.dead.len(), Ordering::Release);
            waiting.took = Duration::from_nanos(clock::of_this_thread().saturating_sub(begun));
            waiting.ended = Some(Instant::now());
        }
        self.search.ended.notify_all();
        self.plan_finished.notify_all();
        self.journal.request_flush();
    }

    fn look_over_processes(&self, dead: &[Arc<DeadClaim>], released: &BTreeSet<ListId>) -> Findings {
        let online = &self.topology.get().online();
        let released: Vec<(ListId, CpuSet)> = {
            let claims = self.claims.lock();
            released.iter().filter_map(|id| Some((*id, claims.list(*id)?.cpus().clone()))).collect()
        };
        let lists = dead.iter().map(|dead| &dead.cpus).chain(released.iter().map(|(_, cpus)| cpus));
        let lists: Vec<&CpuSet> = lists.collect();
        let wanted = |mask: &CpuSet| !mask.is_empty() && lists.iter().any(|cpus| mask.is_subset(cpus));
        let mut found = Findings::default();
        let mut visit = |process: ScannedProcess| {
            let (candidate, pinned) = self.candidate(process);
            if candidate.cgroups.iter().any(|it| failpoint::is_of_another_test(it.cgroups.paths())) {
                return ControlFlow::Continue(());
            }
            let claim = self.claims.lock().claim(&candidate.info.task).cloned();
            for it in dead.iter().filter(|_| claim.is_none()) {
                let (user_at_death, tick) = (it.user, self.clock.tick());
                let list = ListToPassOn { claim: &it.claim, user_at_death, cpus: &it.cpus, online, tick };
                let has_none = !found.heirs.contains_key(&it.claim.task);
                let is_other = !found.heirs.values().any(|heir| heir.info.task == candidate.info.task);
                if has_none
                    && is_other
                    && let Some(heir) = list.heir(&candidate)
                {
                    found.heirs.insert(it.claim.task, heir);
                }
            }
            let on = dead.iter().map(|dead| (dead.claim.list, &dead.cpus));
            for (list, cpus) in on.chain(released.iter().map(|(list, cpus)| (*list, cpus))) {
                let has_it = claim.as_ref().is_some_and(|claim| claim.list == list);
                if !has_it && is_intruder(&candidate, cpus, online) {
                    found
                        .pinned
                        .entry(list)
                        .or_default()
                        .extend(pinned.iter().filter(|it| it.is_on(cpus)).cloned());
                }
            }
            let is_done = found.heirs.len() == dead.len() && released.is_empty();
            if is_done { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        // Without /proc there are no heirs; the daemon has other problems then.
        let _ = self.processes.scan(&wanted, &mut visit);
        found
    }

    fn candidate(&self, found: ScannedProcess) -> (HeirCandidate, Vec<Pinned>) {
        let ScannedProcess { task, facts, users, cgroups, started, threads } = found;
        let uid = facts.uids.real;
        let pinned = threads.iter().map(|(tid, mask)| Pinned { task, tid: *tid, uid, mask: mask.clone() });
        let pinned = pinned.collect();
        let masks = threads.into_iter().map(|(_, mask)| mask).collect();
        let info = self.task_info_of(task, &facts);
        (HeirCandidate { info, users, cgroups, started, masks }, pinned)
    }
}
