//! Reaping: removing the claims of dead tasks, whenever somebody could see them.
//!
//! Owns how a death is noticed and carried out. Does not decide who inherits or how an ending is called: the
//! model does.

use std::sync::Arc;

use super::ports::{Clock as _, Journal as _, Ports, Process as _, Processes as _, Watch as _};
use super::{Engine, ProcessOf, list_event};
use crate::failpoint::{Step, reached};
use crate::journal::{Reclaimed, Record};
use crate::model::claims::{Claims, heir};
use crate::model::command::{Change, Claim, Command, Ending, HeirCandidate, TaskInfo};
use crate::model::cpuset::CpuSet;
use crate::model::task::TaskId;
use crate::process::ScannedProcess;

/// The claim of a dead task.
struct DeadClaim {
    claim: Arc<Claim>,
    cpus: CpuSet,
    inheritable: bool,
}

impl<P: Ports> Engine<P> {
    /// Reaps dead tasks. Costs one system call if there are none.
    pub(crate) fn reap(&self) {
        if !self.processes.any_dead() {
            return;
        }
        let changes = {
            // Another thread that comes here waits until the first one has reaped them.
            let _one = self.reaping.lock();
            self.reap_all(&self.processes.dead())
        };
        // The caller may be a read, which must not wait for a disk.
        self.journal.request_flush();
        for change in changes {
            log::debug!("reaped: {change:?}");
        }
    }

    /// Passes on or ends the claims of these dead tasks. Returns the changes.
    pub(super) fn reap_all(&self, dead: &[TaskId]) -> Vec<Change> {
        if dead.is_empty() {
            return Vec::new();
        }
        let dead_claims = dead_claims(&self.claims.lock(), dead);
        let candidates = self.heir_candidates(&dead_claims);
        let mut changes = Vec::new();
        for dead in &dead_claims {
            let heir = heir(&dead.claim, &dead.cpus, self.clock.tick(), &candidates)
                .filter(|_| dead.inheritable)
                .and_then(|info| Some((self.reopen(info)?, info.clone())));
            changes.extend(self.reap_one(dead, heir));
            reached(Step::DeathReaped);
        }
        self.plan_finished.notify_all();
        changes
    }

    /// Passes a claim to the heir or ends it. Its record is deferred under the lock of the claims, so that it
    /// precedes the record of any later claim on the list.
    fn reap_one(&self, dead: &DeadClaim, heir: Option<(ProcessOf<P>, TaskInfo)>) -> Option<Change> {
        let task = dead.claim.task;
        let process = self.processes.watched(&task);
        let ending = process.map_or(Ending::Unknown, |process| self.processes.ending(&process));
        let (heir_process, heir_info) = heir.unzip();
        let mut claims = self.claims.lock();
        let claim = claims.claim(&task).cloned()?;
        // Since the heir was found, it may have got a claim itself, or a move of the dead task may have been
        // settled; then the heir is not on the list that the dead task leaves.
        let heir = heir_info
            .filter(|heir| claim == dead.claim && claims.can_inherit(&claim, &heir.task))
            .filter(|_| heir_process.is_some_and(|process| self.processes.watch(Arc::new(process)).is_ok()));
        let mut effects = claims.apply(Command::End { task, ending, heir }).ok()?;
        self.processes.unwatch(&task);
        self.publish(&claims, &effects);
        let record = match effects.changes.first() {
            Some(Change::Inherited { from, to }) => Record::Inherited { from: *from, heir: to.clone() },
            Some(Change::Ended(_)) => Record::Ended { task, reclaimed: None },
            Some(Change::Reclaimed(claim)) => {
                Record::Ended { task, reclaimed: Some(self.reclaim(&claims, claim)) }
            }
            _ => return None,
        };
        self.journal.defer(record);
        effects.changes.pop()
    }

    /// Adds a claim to `info/reclaimed`.
    fn reclaim(&self, claims: &Claims, claim: &Claim) -> Reclaimed {
        let event = list_event("reclaimed", claims, claim);
        let reclaimed = Reclaimed {
            seq: 0,
            time: self.clock.wall_ms(),
            pid: claim.task.pid.get(),
            pool: event.pool.clone().unwrap_or_default(),
            cpus: event.cpus.clone().unwrap_or_default(),
            uid: event.uid,
        };
        let seq = self.event(event);
        let reclaimed = Reclaimed { seq, ..reclaimed };
        self.events.lock().reclaim(reclaimed.clone());
        reclaimed
    }

    /// Returns the processes whose mask lies within one of the lists to inherit, from a single scan of /proc.
    fn heir_candidates(&self, dead_claims: &[DeadClaim]) -> Vec<HeirCandidate> {
        let lists: Vec<&CpuSet> =
            dead_claims.iter().filter(|dead| dead.inheritable).map(|dead| &dead.cpus).collect();
        if lists.is_empty() {
            return Vec::new();
        }
        let within = |mask: &CpuSet| !mask.is_empty() && lists.iter().any(|cpus| mask.is_subset(cpus));
        // Without /proc there are no heirs; the daemon has other problems then.
        let found = self.processes.scan(&within).unwrap_or_default();
        let candidate = |found: ScannedProcess| HeirCandidate {
            info: self.task_info_of(found.task, &found.facts),
            cgroup: found.cgroup,
            started: found.started,
            mask: found.mask,
        };
        found.into_iter().map(candidate).collect()
    }

    /// Returns the process of a task, if it is alive.
    fn reopen(&self, info: &TaskInfo) -> Option<ProcessOf<P>> {
        let process = self.processes.open(info.task.pid).ok().flatten()?;
        (process.id() == info.task && process.is_alive()).then_some(process)
    }
}

/// Returns the claims of these dead tasks. A task whose first claim is still in flight has none: its plan ends
/// by itself.
fn dead_claims(claims: &Claims, dead: &[TaskId]) -> Vec<DeadClaim> {
    let dead_claim = |task: &TaskId| {
        let claim = claims.claim(task)?.clone();
        let list = claims.list(claim.list)?;
        Some(DeadClaim { cpus: list.cpus().clone(), inheritable: claims.is_inheritable(&claim), claim })
    };
    dead.iter().filter_map(dead_claim).collect()
}
