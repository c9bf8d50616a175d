//! Renames: a pool or a list gets another name, and a list other CPUs or another pool. Its tasks keep their claims.
//!
//! Owns the order of these changes. A list whose CPUs change moves its tasks first, and the stored configuration decides
//! whether that has happened: each task has an intent meanwhile, and a worker that finds it after a death puts the task back
//! on the CPUs that its list has by then. Does not know which change is allowed: the claim machine does.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::ports::{Clock as _, Journal as _, Masks as _, Ports, Watch as _};
use super::requester::Allowance;
use super::write::{UndoLog, not_recorded};
use super::{Caller, Engine};
use crate::failpoint::{Step, reached};
use crate::journal::Record;
use crate::model::claims::Pool;
use crate::model::command::{ClaimKind, Command, CompletedPlan, Placement, Plan, Rejected};
use crate::model::cpuset::CpuSet;
use crate::model::pool::{ListId, PoolId, PoolName};
use crate::model::refusal::{ListName, Refusal};
use crate::process::Threads;

impl<P: Ports> Engine<P> {
    /// Gives a pool another name.
    ///
    /// # Errors
    /// `EPERM` if the caller lacks the capability; `EINVAL` for an invalid name; `EEXIST`; or it cannot be stored.
    pub(crate) fn rename_pool(&self, caller: Caller, id: PoolId, name: &str) -> Result<(), Refusal> {
        self.require_admin(caller)?;
        let name: PoolName = name.parse().map_err(Refusal::BadPoolName)?;
        let mut next = self.configuring.lock(&self.clock)?;
        self.store_and_apply(&mut next, 0, caller, &[Command::RenamePool { id, name }])?;
        reached(Step::ConfigApplied);
        Ok(())
    }

    /// Gives a list another name, and with it other CPUs, or moves it to another pool. Its tasks stay on it.
    ///
    /// # Errors
    /// `EPERM` if the caller lacks the capability; `EINVAL` for an invalid list, unknown CPUs, or CPUs that the kernel does
    /// not allow one of the tasks; `EBUSY` if it overlaps another list, if the pool takes fewer tasks, or if one of them is
    /// in a partition that would have to change; `EEXIST`; or it cannot be stored.
    pub(crate) fn change_list(
        &self,
        caller: Caller,
        id: ListId,
        pool: PoolId,
        name: &str,
    ) -> Result<(), Refusal> {
        self.require_admin(caller)?;
        let cpus = self.known_cpus(name)?;
        let time = self.allowance(caller, self.user(caller));
        let mut next = self.configuring.lock(&self.clock)?;
        let change = Command::ChangeList { id, pool, name: name.to_owned(), cpus: cpus.clone() };
        let (prepare, before, target) = {
            let claims = self.configuration();
            claims.preview(std::slice::from_ref(&change))?;
            let before = claims.list(id).ok_or(Refusal::Removed)?.pool();
            let target = claims.pool(pool).ok_or(Refusal::Removed)?;
            let (exclusivity, mode, now) = (target.exclusivity(), target.mode(), self.clock.since_boot());
            let prepare = Command::PrepareList { id, exclusivity, mode, cpus, now };
            (prepare, before, Target::new(target, name))
        };
        let plan = self.reserve(prepare, time.waiting)?;
        let mut undo = UndoLog::default();
        let changed = self
            .move_tasks(&plan, &target, caller, time, &mut undo)
            .and_then(|()| self.store_and_apply(&mut next, 0, caller, &[change]));
        if let Err(refusal) = changed {
            self.apply_stored(&[Command::CancelList(id)]);
            self.undo(plan, undo, caller.waiting().within(time.limit));
            return Err(refusal);
        }
        let abandoned = undo.intents.iter().map(|&task| Record::Abandoned { task });
        self.journal.defer(Record::Batch(abandoned.collect()));
        // Claims wait for it.
        self.settle(CompletedPlan::unchanged(&plan));
        self.files_changed(&self.configuration(), id);
        self.changes.changed([before.tasks_node()]);
        self.update_daemon_affinity();
        self.journal.flush_deferred();
        reached(Step::ConfigApplied);
        Ok(())
    }

    /// Applies a command that reserves tasks or lists. Waits while a write has one of the tasks in flight.
    pub(super) fn reserve(&self, command: Command, patience: Duration) -> Result<Plan, Refusal> {
        let deadline = Instant::now() + patience;
        let mut claims = self.live_claims();
        loop {
            match claims.apply(command.clone()) {
                Ok(effects) => return Ok(effects.plan),
                Err(Rejected::Refused(refusal)) => return Err(refusal),
                Err(Rejected::Busy) if self.plan_finished.wait_until(&mut claims, deadline).timed_out() => {
                    return Err(Refusal::TaskBusy);
                }
                Err(Rejected::Busy) => {}
            }
        }
    }

    /// Moves the tasks of a plan to the new CPUs of their list. `undo` says how far that went.
    fn move_tasks(
        &self,
        plan: &Plan,
        target: &Target,
        caller: Caller,
        time: Allowance,
        undo: &mut UndoLog<P>,
    ) -> Result<(), Refusal> {
        if plan.placements.is_empty() {
            return Ok(());
        }
        let offline = self.processes.offline();
        let intents = plan.placements.iter().filter_map(|placement| match &placement.kind {
            ClaimKind::Repeat(claim) => Some(Record::Intent(Arc::clone(claim))),
            ClaimKind::New(_) | ClaimKind::Move { .. } => None,
        });
        self.journal.append(&Record::Batch(intents.collect())).map_err(not_recorded)?;
        undo.intents.extend(plan.tasks());
        reached(Step::IntentRecorded);
        for placement in &plan.placements {
            let cpus = target.usable(&placement.cpus, &offline)?;
            self.move_task(placement, &cpus, target, caller, time, undo)?;
        }
        reached(Step::MasksSet);
        Ok(())
    }

    fn move_task(
        &self,
        placement: &Placement,
        cpus: &CpuSet,
        target: &Target,
        caller: Caller,
        time: Allowance,
        undo: &mut UndoLog<P>,
    ) -> Result<(), Refusal> {
        let own = self.configuration().list(placement.list).map(|list| list.cpus().clone());
        let (Some(process), Some(own)) = (self.processes.watched(&placement.task), own) else {
            // It has died, which is noticed soon.
            return Ok(());
        };
        let waiting = caller.waiting().within(time.limit);
        match self.processes.set_mask(&process, cpus, &own, Threads::All, waiting) {
            Ok(previous) => {
                undo.masks.push((placement.task, previous));
                Ok(())
            }
            Err(error) => match self.mask_failure(error, placement, caller, time).into_refusal() {
                None => Ok(()),
                Some(Refusal::MaskRefused { got, .. }) => {
                    Err(Refusal::MaskRefused { list: target.name.clone(), got })
                }
                Some(refusal) => Err(refusal),
            },
        }
    }
}

/// The list as it is going to be.
struct Target {
    name: ListName,
    /// Whether it serves with those of its CPUs that are online.
    serves_partly: bool,
}

impl Target {
    fn new(pool: &Pool, name: &str) -> Self {
        let name = ListName { pool: pool.name().clone(), cpus: name.to_owned() };
        Self { name, serves_partly: pool.serves_partly() }
    }

    /// Returns the CPUs for a mask.
    ///
    /// # Errors
    /// Some are offline that the list needs.
    fn usable(&self, cpus: &CpuSet, offline: &CpuSet) -> Result<CpuSet, Refusal> {
        let (online, offline) = (cpus.difference(offline), cpus.intersection(offline));
        match offline.is_empty() || self.serves_partly {
            false => Err(Refusal::Offline { list: self.name.clone(), offline }),
            true if online.is_empty() => Ok(cpus.clone()),
            true => Ok(online),
        }
    }
}
