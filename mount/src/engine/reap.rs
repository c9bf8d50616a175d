//! The dead: taken off lazily, by whoever would otherwise see them.
//!
//! Owns: what becomes of a dead task's claim. Must not know: which process inherits; that is the model's.

use std::sync::Arc;

use super::events::Event;
use super::{Engine, list_event};
use crate::clock;
use crate::failpoint::{Step, reached};
use crate::journal::{Reclaimed, Record};
use crate::metrics::Counter;
use crate::model::claims::{Claims, heir};
use crate::model::command::{Change, Claim, Command, HeirCandidate, TaskInfo};
use crate::model::cpuset::CpuSet;
use crate::model::task::TaskId;
use crate::process::{self, Ending, Process};

/// A dead task and what it leaves.
struct DeadClaim {
    claim: Arc<Claim>,
    cpus: CpuSet,
    /// Whether somebody may inherit.
    exclusive: bool,
}

impl Engine {
    /// Takes the dead off. Costs one system call where nobody died.
    pub(crate) fn reap(&self) {
        if !self.watch.any_dead() {
            return;
        }
        // Whoever comes second waits here until the first has taken them off.
        let _one = self.reaping.lock();
        self.reap_all(&self.watch.dead());
    }

    /// What the dead leave passes on or ends.
    pub(super) fn reap_all(&self, dead: &[TaskId]) {
        if dead.is_empty() {
            return;
        }
        let dead_claims = dead_claims(&self.claims.lock(), dead);
        let candidates = self.candidates(&dead_claims);
        for dead in &dead_claims {
            let found = heir(&dead.claim, &dead.cpus, self.tick, &candidates).filter(|_| dead.exclusive);
            let heir = found.and_then(|info| Some((self.reopen(info)?, info.clone())));
            self.reap_one(dead, heir);
        }
        self.plan_finished.notify_all();
    }

    /// The claim passes to the heir or ends; the log first, so that no later daemon sees it otherwise.
    fn reap_one(&self, dead: &DeadClaim, heir: Option<(Process, TaskInfo)>) {
        let task = dead.claim.task;
        let by_signal = self
            .watch
            .get(&task)
            .is_none_or(|process| !matches!(self.processes.ended(&process), Ending::Exited(_)));
        let (heir_process, heir_info) = heir.unzip();
        let mut claims = self.claims.lock();
        let Some(claim) = claims.claim(&task).cloned() else { return };
        let name = claims.list(claim.list).map(|list| list.name().clone());
        // Since the heir was looked for, it may have been claimed elsewhere, and the dead one's move settled:
        // then the heir is not on the list that is left.
        let heir_info = heir_info
            .filter(|heir| claim == dead.claim && claims.can_inherit(&claim, &heir.task))
            .filter(|_| heir_process.is_some_and(|process| self.watch.add(Arc::new(process)).is_ok()));
        let Ok(effects) = claims.apply(Command::End { task, heir: heir_info }) else { return };
        self.watch.remove(&task);
        self.note(&claims, &effects);
        let record = match effects.changes.first() {
            Some(Change::Inherited { from, to }) => Record::Inherited { from: *from, heir: to.clone() },
            Some(Change::Ended(claim)) => {
                let kind = if by_signal { "reclaimed" } else { "ended" };
                let seq = self.event(Event { ..list_event(kind, &claims, claim) });
                self.metrics.count(if by_signal { Counter::Reclaimed } else { Counter::Ended });
                let reclaimed = name.filter(|_| by_signal).map(|name| Reclaimed {
                    seq,
                    time: clock::wall_ms(),
                    pid: task.pid.get(),
                    pool: name.pool.to_string(),
                    cpus: name.cpus,
                });
                if let Some(reclaimed) = &reclaimed {
                    self.events.lock().reclaim(reclaimed.clone());
                }
                Record::Ended { task, reclaimed }
            }
            _ => return,
        };
        // Under the lock: the next claim of this list must come after it in the log.
        self.state.defer(record);
        drop(claims);
        let _ = self.state.flush();
        reached(Step::DeathRecorded);
    }

    /// Every process whose mask lies within a list that has to pass on. One look at the machine for all.
    fn candidates(&self, dead_claims: &[DeadClaim]) -> Vec<HeirCandidate> {
        let lists: Vec<&CpuSet> =
            dead_claims.iter().filter(|dead| dead.exclusive).map(|dead| &dead.cpus).collect();
        if lists.is_empty() {
            return Vec::new();
        }
        let within = |mask: &CpuSet| !mask.is_empty() && lists.iter().any(|cpus| mask.is_subset(cpus));
        let found = self.processes.scan(within).unwrap_or_else(|error| {
            log::warn!("looking for heirs: {error}");
            Vec::new()
        });
        let candidate = |found: process::ScannedProcess| HeirCandidate {
            info: self.task_info_of(found.task, &found.facts),
            cgroup: found.cgroup,
            started: found.started,
            mask: found.mask,
        };
        found.into_iter().map(candidate).collect()
    }

    /// The process of the info, if it still is the same one and lives.
    fn reopen(&self, info: &TaskInfo) -> Option<Process> {
        let process = self.processes.open(info.task.pid).ok().flatten()?;
        (process.id() == info.task && process.is_alive()).then_some(process)
    }
}

/// What those of the dead leave who have a claim. One whose first claim is still in hand has none: its plan
/// ends by itself.
fn dead_claims(claims: &Claims, dead: &[TaskId]) -> Vec<DeadClaim> {
    let dead_claim = |task: &TaskId| {
        let claim = claims.claim(task)?.clone();
        let list = claims.list(claim.list)?;
        Some(DeadClaim { cpus: list.cpus().clone(), exclusive: claims.is_inheritable(&claim), claim })
    };
    dead.iter().filter_map(dead_claim).collect()
}
