//! Recovery: restores what the journal of an earlier worker says.
//!
//! Owns the checks on recorded claims, and undoing what that worker had only begun. Does not know how records are
//! read.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::ports::{Journal as _, Masks as _, Ports, Process as _, Processes as _, Watch as _};
use super::{Attributes, Engine, MODE_OFFSET, ProcessOf};
use crate::journal::{PoolConfig, Record, Recovered};
use crate::model::claims::Claims;
use crate::model::command::{Claim, Command, Ending, Kin, Rejected, SavedMask};
use crate::model::pool::{Mode, PoolId};
use crate::model::refusal::Refusal;
use crate::model::task::TaskId;
use crate::process::{BlockedWriter, TimeLimit};

/// How long a new worker waits, in all, until threads are proven to have got back their masks. All clients wait meanwhile,
/// and the thread that is most often in doubt is one of them: it waits for the answer to the write that is undone.
const PATIENCE: Duration = Duration::from_millis(20);
/// How long it may restore masks, so that it starts in any case.
const ROLL_BACK_WORK: Duration = Duration::from_secs(10);

impl<P: Ports> Engine<P> {
    /// Restores pools, lists and claims, and rolls back unfinished writes.
    pub(super) fn recover(&self, recovered: Recovered) {
        let Recovered { config, claims: recorded, intents, releasing, suspect, damage, .. } = recovered;
        for pool in config.pools {
            let name = pool.name.clone();
            let restored = restore_pool(&mut self.claims.lock(), pool);
            if let Err(rejected) = restored {
                let why = Refusal::from(rejected).sentence("a task");
                log::warn!("a part of pool {name} is dropped: {why}");
            }
        }
        let is_known = |node: u64| node & !MODE_OFFSET < config.next_node;
        self.attributes.write().extend(
            config
                .attributes
                .into_iter()
                .filter(|a| is_known(a.node))
                .map(|a| (a.node, Attributes { uid: a.uid, gid: a.gid, mode: a.mode })),
        );
        let (known, orphans): (Vec<_>, Vec<_>) =
            recorded.into_iter().partition(|claim| self.configuration().list(claim.list).is_some());
        let dead: Vec<TaskId> =
            known.into_iter().filter_map(|claim| self.recover_claim(claim, suspect)).collect();
        for task in dead {
            match self.dead_claim(task) {
                Some(dead) if dead.is_inheritable => self.search.add(dead),
                Some(dead) => self.end_claim(&dead, None),
                None => {}
            }
        }
        // A task that gets back its mask must be out of its partition.
        self.check_partitions();
        let waiting = BlockedWriter::NONE.within(TimeLimit::new(Instant::now(), ROLL_BACK_WORK, PATIENCE));
        for claim in orphans {
            self.roll_back(&claim, &claim.saved.clone(), waiting);
            if damage.is_empty() {
                // A worker has removed the list by force, and died before it released the task.
                let task = claim.task;
                self.journal
                    .defer(Record::Batch(vec![Record::Releasing { task }, Record::Released { task }]));
            } else {
                self.drop_claim(&self.claims.lock(), &claim, "its list is not known any more");
            }
        }
        for claim in releasing {
            self.roll_back(&claim, &claim.saved.clone(), waiting);
            self.journal.defer(Record::Released { task: claim.task });
        }
        for intent in intents {
            self.roll_back_intent(&intent, waiting);
        }
        self.reap();
        self.search_now();
    }

    /// Restores a recorded claim. The claim of a dead task is restored too, so that its heirs are found.
    /// Returns the task if it is dead and collected: then it cannot be watched, and the caller reaps it.
    fn recover_claim(&self, claim: Arc<Claim>, suspect: bool) -> Option<TaskId> {
        let task = claim.task;
        let process = self.processes.find(task).ok().flatten();
        let claim = match &process {
            Some(process) => self.upgrade_claim(claim, process),
            None => claim,
        };
        let alive = process.as_ref().filter(|process| process.is_alive());
        if alive.is_some_and(|process| !self.mask_confirms(&claim, process, suspect)) {
            self.drop_claim(&self.claims.lock(), &claim, "its mask does not confirm it");
            return None;
        }
        let mut claims = self.claims.lock();
        if let Err(rejected) = claims.apply(Command::Restore(Arc::clone(&claim))) {
            self.drop_claim(&claims, &claim, &Refusal::from(rejected).sentence("another task"));
            return None;
        }
        if let Some(process) = &process {
            self.note_program(process);
        }
        match process.map(|process| self.processes.watch(Arc::new(process))) {
            None => Some(task),
            Some(Ok(())) => None,
            Some(Err(error)) => {
                let _ = claims.apply(Command::End { task, ending: Ending::Unknown, heir: None });
                self.drop_claim(&claims, &claim, &format!("it cannot be watched: {error}"));
                None
            }
        }
    }

    /// Reports a recorded claim that is not restored, although its task may be alive.
    fn drop_claim(&self, claims: &Claims, claim: &Claim, why: &str) {
        log::warn!("the claim of {} is dropped: {why}", claim.task.pid);
        let reclaimed = Some(self.reclaim(claims, claim));
        self.journal.defer(Record::Ended { task: claim.task, reclaimed });
    }

    /// Returns the claim with its cgroups as this version records them, if they are those of the task now.
    fn upgrade_claim(&self, claim: Arc<Claim>, process: &ProcessOf<P>) -> Arc<Claim> {
        if !claim.kin.cgroups.is_empty() {
            return claim;
        }
        let number = self.processes.upgrade_cgroup(process, claim.cgroup);
        let now = self.processes.cgroup(process).filter(|now| now.number == number);
        let cgroups = now.map(|now| now.cgroups).into_iter().collect();
        let kin = Kin { cgroups, ..claim.kin.clone() };
        Arc::new(Claim { cgroup: number, kin, ..Claim::clone(&claim) })
    }

    /// Returns whether a recorded claim is valid. If records may be missing, or if the process may have reused the PID of
    /// the task, the mask decides.
    fn mask_confirms(&self, claim: &Claim, process: &ProcessOf<P>, suspect: bool) -> bool {
        if !suspect && self.processes.is_certain(process) {
            return true;
        }
        let cpus = self.configuration().list(claim.list).map(|list| list.cpus().clone());
        let mask = self.processes.leader_mask(claim.task.pid);
        matches!((cpus, mask), (Some(cpus), Ok(mask)) if mask.is_subset(&cpus))
    }

    /// Undoes an intent that never became a claim: the task gets back the mask that it had, or the CPUs of its
    /// list if it was moving.
    fn roll_back_intent(&self, intent: &Claim, waiting: BlockedWriter) {
        let old = {
            let claims = self.configuration();
            claims.claim(&intent.task).and_then(|old| claims.list(old.list)).map(|list| list.cpus().clone())
        };
        self.roll_back(intent, &old.map_or_else(|| self.probe_saved_mask(intent), SavedMask::Cpus), waiting);
        self.journal.defer(Record::Abandoned { task: intent.task });
    }

    /// Returns the mask to restore for an intent. An intent is recorded before its task is touched, so whether
    /// the saved mask was all that the task's cpuset allowed is only found out now.
    fn probe_saved_mask(&self, intent: &Claim) -> SavedMask {
        let process = self.processes.find(intent.task).ok().flatten();
        let refined = process.and_then(|it| self.processes.probe_saved_mask(&it, intent.saved.clone()).ok());
        refined.unwrap_or_else(|| intent.saved.clone())
    }

    fn roll_back(&self, claim: &Claim, mask: &SavedMask, waiting: BlockedWriter) {
        let process = self.processes.open(claim.task.pid).ok().flatten();
        if let Some(process) = process.filter(|process| process.id() == claim.task) {
            self.processes.restore_mask(&process, mask, waiting);
        }
    }
}

fn restore_pool(claims: &mut Claims, pool: PoolConfig) -> Result<(), Rejected> {
    let id = PoolId(pool.node);
    claims.apply(Command::AddPool { id, name: pool.name, exclusivity: pool.exclusivity })?;
    if pool.partial {
        claims.apply(Command::SetPartial { pool: id, partial: true })?;
    }
    if pool.transient {
        claims.apply(Command::SetTransient { pool: id, transient: true })?;
    }
    if pool.mode == Mode::Isolated {
        claims.apply(Command::SetMode { pool: id, mode: pool.mode })?;
    }
    for list in pool.lists {
        claims.apply(Command::AddList { pool: id, id: list.id, name: list.name, cpus: list.cpus })?;
        claims.apply(Command::OpenList(list.id))?;
        if list.draining {
            claims.apply(Command::SetDraining { list: list.id, draining: true })?;
        }
    }
    Ok(())
}
