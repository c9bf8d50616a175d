//! The claim machine: who holds which CPU list, and what may change that.
//!
//! Owns: every rule of claiming, moving, releasing, inheriting and configuring, and the invariants
//! - **lists are disjoint**, over all pools;
//! - **a task has at most one claim**;
//! - **an exclusive list has at most one task on it or on its way to it**, but for one that leaves it in the
//!   write that brings the other.
//!
//! [`Claims::apply`] is the only way to change anything. It decides at once, so that one lock around it makes
//! a decision atomic; what takes time (masks, logs) is handed out as a [`Plan`], for which the lists are
//! reserved until it is settled or abandoned. Must not know: how masks are set, records kept, deaths noticed
//! or PIDs translated. Time, rights and liveness come in as values.
//!
//! What a write would do is worked out in `deciding`; how pools and lists come and go is in `configuring`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::command::{
    Change, Claim, ClaimKind, Command, Effects, HeirCandidate, Placement, Plan, Request, TaskInfo,
};
use super::cpuset::{CpuId, CpuSet};
use super::pool::{Exclusivity, ListId, PoolId, PoolName};
use super::refusal::{Holder, ListName, Refusal};
use super::task::TaskId;

mod configuring;
mod deciding;
#[cfg(test)]
mod tests;

/// Where a list is between mkdir and rmdir.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// It is being stored; nobody gets on it yet.
    Creating,
    Open,
    /// Its removal is being stored; nobody gets on it any more.
    Removing,
}

/// A CPU list and the tasks on it.
#[derive(Clone, Debug)]
pub struct List {
    pool: PoolId,
    name: ListName,
    cpus: CpuSet,
    stage: Stage,
    tasks: BTreeSet<TaskId>,
    reserved: BTreeSet<TaskId>,
}

impl List {
    /// Its pool.
    #[must_use]
    pub fn pool(&self) -> PoolId {
        self.pool
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &ListName {
        &self.name
    }

    /// Its CPUs.
    #[must_use]
    pub fn cpus(&self) -> &CpuSet {
        &self.cpus
    }

    /// The tasks on it, by PID.
    #[must_use]
    pub fn tasks(&self) -> &BTreeSet<TaskId> {
        &self.tasks
    }

    /// Whether its removal is under way.
    #[must_use]
    pub fn is_being_removed(&self) -> bool {
        self.stage == Stage::Removing
    }

    /// Somebody on the list or on the way to it who is not in `excluding`.
    fn other_task(&self, excluding: &BTreeSet<TaskId>) -> Option<TaskId> {
        self.tasks.iter().chain(&self.reserved).find(|&task| !excluding.contains(task)).copied()
    }

    /// How many tasks are on the list or on the way to it, without those in `excluding`.
    fn task_count(&self, excluding: &BTreeSet<TaskId>) -> usize {
        let leaving = excluding.iter().filter(|task| self.tasks.contains(task)).count();
        let arriving = self.reserved.iter().filter(|task| !self.tasks.contains(task)).count();
        self.tasks.len() - leaving + arriving
    }
}

/// A pool and its lists.
#[derive(Clone, Debug)]
pub struct Pool {
    name: PoolName,
    exclusivity: Exclusivity,
    /// By their first CPU: lists are disjoint, so no two have the same.
    lists: BTreeMap<CpuId, ListId>,
    /// Those of them that have tasks.
    taken: BTreeSet<ListId>,
}

impl Pool {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &PoolName {
        &self.name
    }

    /// How many tasks a list of it takes.
    #[must_use]
    pub fn exclusivity(&self) -> Exclusivity {
        self.exclusivity
    }

    /// Its lists, by their first CPU.
    pub fn lists(&self) -> impl ExactSizeIterator<Item = ListId> + '_ {
        self.lists.values().copied()
    }

    /// Its lists that have tasks.
    pub fn taken(&self) -> impl ExactSizeIterator<Item = ListId> + '_ {
        self.taken.iter().copied()
    }
}

/// What a task has and what is being done with it.
#[derive(Clone, Debug, Default)]
struct TaskState {
    claim: Option<Arc<Claim>>,
    /// A plan that names the task has neither been settled nor abandoned.
    in_flight: bool,
    /// It died while it was in hand.
    dead: bool,
}

/// Who holds what.
#[derive(Clone, Debug)]
pub struct Claims {
    pools: BTreeMap<PoolId, Pool>,
    lists: BTreeMap<ListId, List>,
    tasks: HashMap<TaskId, TaskState>,
    /// How many claims somebody else than root asked for, with those on their way.
    not_by_root: usize,
    limit: usize,
}

impl Claims {
    /// No pools and no claims; at most `limit` tasks at a time.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { pools: BTreeMap::new(), lists: BTreeMap::new(), tasks: HashMap::new(), not_by_root: 0, limit }
    }

    /// The pools, the oldest first.
    pub fn pools(&self) -> impl ExactSizeIterator<Item = (PoolId, &Pool)> {
        self.pools.iter().map(|(id, pool)| (*id, pool))
    }

    /// The pool of this number.
    #[must_use]
    pub fn pool(&self, id: PoolId) -> Option<&Pool> {
        self.pools.get(&id)
    }

    /// The list of this number.
    #[must_use]
    pub fn list(&self, id: ListId) -> Option<&List> {
        self.lists.get(&id)
    }

    /// The claim of a task.
    #[must_use]
    pub fn claim(&self, task: &TaskId) -> Option<&Arc<Claim>> {
        self.tasks.get(task)?.claim.as_ref()
    }

    /// Whether a plan that names the task has neither been settled nor abandoned.
    #[must_use]
    pub fn is_in_flight(&self, task: &TaskId) -> bool {
        self.tasks.get(task).is_some_and(|state| state.in_flight)
    }

    /// All claims, in no order.
    pub fn claims(&self) -> impl Iterator<Item = &Arc<Claim>> {
        self.tasks.values().filter_map(|state| state.claim.as_ref())
    }

    /// Whether the task's claim is on an exclusive list, so that its death leaves something to inherit.
    #[must_use]
    pub fn is_inheritable(&self, claim: &Claim) -> bool {
        self.exclusivity(claim.list) == Some(Exclusivity::Exclusive)
    }

    /// Whether the claim may pass to this task once its own has died; [`heir`] knows the rest. A list that is
    /// already pending to somebody else does not.
    #[must_use]
    pub fn can_inherit(&self, claim: &Claim, heir: &TaskId) -> bool {
        let excluding = BTreeSet::from([claim.task]);
        let list = self.lists.get(&claim.list);
        self.is_inheritable(claim)
            && list.is_some_and(|list| list.other_task(&excluding).is_none())
            && !self.tasks.contains_key(heir)
    }

    /// The CPUs of all exclusive lists.
    #[must_use]
    pub fn exclusive_cpus(&self) -> CpuSet {
        let exclusive = self.lists.values().filter(|list| {
            self.pools.get(&list.pool).is_some_and(|pool| pool.exclusivity == Exclusivity::Exclusive)
        });
        exclusive.fold(CpuSet::new(), |all, list| all.union(&list.cpus))
    }

    /// Decides one command, and changes the claims accordingly. Nothing else does.
    ///
    /// # Errors
    /// A [`Refusal`]: then nothing has changed. [`Refusal::TaskBusy`] asks for another try once the operation
    /// that has one of the tasks in hand has ended.
    pub fn apply(&mut self, command: Command) -> Result<Effects, Refusal> {
        match command {
            Command::Write(request) => self.write(request),
            Command::Settle(plan) => Ok(self.settle(plan)),
            Command::Abandon(plan) => Ok(self.abandon(&plan)),
            Command::End { task, heir } => Ok(self.end(task, heir)),
            Command::Restore(claim) => self.restore(claim),
            Command::AddPool { id, name, exclusivity } => self.add_pool(id, name, exclusivity),
            Command::RemovePool(id) => self.remove_pool(id),
            Command::AddList { pool, id, name, cpus } => self.add_list(pool, id, name, cpus),
            Command::OpenList(id) => {
                self.list_mut(id).map(|list| list.stage = Stage::Open).map(|()| Effects::default())
            }
            Command::CloseList { id, now } => self.close_list(id, now),
            Command::RemoveList(id) => Ok(self.remove_list(id)),
            Command::SetExclusivity { pool, exclusivity } => self.set_exclusivity(pool, exclusivity),
        }
    }

    /// Two passes: the first decides and changes nothing, the second reserves what was decided.
    fn write(&mut self, request: Request) -> Result<Effects, Refusal> {
        let plan = self.decide(&request)?;
        for task in plan.tasks() {
            self.tasks.entry(task).or_default().in_flight = true;
        }
        for place in plan.changing() {
            self.list_mut(place.claim.list)?.reserved.insert(place.claim.task);
        }
        self.not_by_root += new_not_by_root(&plan);
        Ok(Effects { plan, ..Effects::default() })
    }

    fn settle(&mut self, plan: Plan) -> Effects {
        let mut effects = Effects::default();
        self.not_by_root -= new_not_by_root(&plan);
        for claim in plan.releases {
            if self.finish(&claim.task) {
                self.drop_claim(&claim.task);
                effects.changes.push(Change::Released(claim));
            }
        }
        for Placement { claim, kind, .. } in plan.placements {
            if let Some(list) = self.lists.get_mut(&claim.list) {
                list.reserved.remove(&claim.task);
            }
            if !self.finish(&claim.task) {
                effects.lost.push(claim.task);
                continue;
            }
            match kind {
                ClaimKind::Repeat => {}
                ClaimKind::New => effects.changes.push(Change::Claimed(claim.clone())),
                ClaimKind::Move { from } => effects.changes.push(Change::Moved { from, to: claim.clone() }),
            }
            if kind != ClaimKind::Repeat {
                self.drop_claim(&claim.task);
                self.hold(claim);
            }
        }
        effects
    }

    fn abandon(&mut self, plan: &Plan) -> Effects {
        self.not_by_root -= new_not_by_root(plan);
        for place in &plan.placements {
            if let Some(list) = self.lists.get_mut(&place.claim.list) {
                list.reserved.remove(&place.claim.task);
            }
        }
        let lost = plan.tasks().filter(|task| !self.finish(task)).collect();
        for task in plan.tasks() {
            if self.claim(&task).is_none() {
                self.tasks.remove(&task);
            }
        }
        Effects { lost, ..Effects::default() }
    }

    /// The task is no longer in hand. False where it died while it was; then it has nothing left.
    fn finish(&mut self, task: &TaskId) -> bool {
        match self.tasks.get_mut(task) {
            Some(state) if state.dead => {
                self.tasks.remove(task);
                false
            }
            Some(state) => {
                state.in_flight = false;
                true
            }
            None => false,
        }
    }

    fn hold(&mut self, claim: Arc<Claim>) {
        if let Some(list) = self.lists.get_mut(&claim.list) {
            list.tasks.insert(claim.task);
            if let Some(pool) = self.pools.get_mut(&list.pool) {
                pool.taken.insert(claim.list);
            }
        }
        if !claim.by_root {
            self.not_by_root += 1;
        }
        self.tasks.insert(claim.task, TaskState { claim: Some(claim), ..TaskState::default() });
    }

    fn drop_claim(&mut self, task: &TaskId) -> Option<Arc<Claim>> {
        let claim = self.tasks.remove(task)?.claim?;
        if let Some(list) = self.lists.get_mut(&claim.list) {
            list.tasks.remove(task);
            if list.tasks.is_empty()
                && let Some(pool) = self.pools.get_mut(&list.pool)
            {
                pool.taken.remove(&claim.list);
            }
        }
        if !claim.by_root {
            self.not_by_root -= 1;
        }
        Some(claim)
    }

    fn end(&mut self, task: TaskId, heir: Option<TaskInfo>) -> Effects {
        let in_flight = self.is_in_flight(&task);
        let claim = self.drop_claim(&task);
        if in_flight {
            self.tasks.insert(task, TaskState { claim: None, in_flight, dead: true });
        }
        let Some(claim) = claim else { return Effects::default() };
        let heir = heir.filter(|heir| self.can_inherit(&claim, &heir.task));
        let change = match heir {
            None => Change::Ended(claim),
            Some(heir) => {
                let to = Claim { task: heir.task, uid: heir.uids.real, ..Claim::clone(&claim) };
                let to = Arc::new(to);
                self.hold(to.clone());
                Change::Inherited { from: task, to }
            }
        };
        Effects { changes: vec![change], ..Effects::default() }
    }

    fn restore(&mut self, claim: Arc<Claim>) -> Result<Effects, Refusal> {
        if self.tasks.contains_key(&claim.task) {
            return Err(Refusal::Exists);
        }
        self.check_list(claim.list, claim.task, &BTreeSet::new(), claim.since)?;
        self.hold(claim);
        Ok(Effects::default())
    }

    fn list_mut(&mut self, id: ListId) -> Result<&mut List, Refusal> {
        self.lists.get_mut(&id).ok_or(Refusal::Removed)
    }

    fn exclusivity(&self, id: ListId) -> Option<Exclusivity> {
        Some(self.pools.get(&self.lists.get(&id)?.pool)?.exclusivity)
    }

    fn holder(&self, task: TaskId, list: ListId, now: u64) -> Holder {
        let since = self.claim(&task).map_or(now, |claim| claim.since);
        Holder { task, list, held: now.saturating_sub(since) }
    }

    /// The name of the first free list of the pool.
    fn free_list(&self, pool: &Pool) -> Option<String> {
        let nobody = BTreeSet::new();
        let mut lists = pool.lists().filter_map(|id| self.lists.get(&id));
        lists
            .find(|list| list.stage == Stage::Open && list.other_task(&nobody).is_none())
            .map(|list| list.name.cpus.clone())
    }
}

/// How many first claims of the plan somebody else than root asks for.
fn new_not_by_root(plan: &Plan) -> usize {
    plan.placements.iter().filter(|place| place.kind == ClaimKind::New && !place.claim.by_root).count()
}

/// The one of `candidates` to which the claim of a dead task passes: the oldest that started after the
/// claim, in the same cgroup, of the same user or of root, with its mask within the list.
///
/// `tick` is the length of a clock tick in nanoseconds: start times are only known in whole ticks.
#[must_use]
pub fn heir<'a>(
    claim: &Claim,
    cpus: &CpuSet,
    tick: u64,
    candidates: &'a [HeirCandidate],
) -> Option<&'a TaskInfo> {
    let may_inherit = |HeirCandidate { info, cgroup, started, mask }: &&HeirCandidate| {
        info.task != claim.task
            && !info.kernel_thread
            && !info.ours
            && *started >= claim.since / tick
            && *cgroup == claim.cgroup
            && (info.uids.real == claim.uid || info.uids.real == 0)
            && !mask.is_empty()
            && mask.is_subset(cpus)
    };
    let heirs = candidates.iter().filter(may_inherit);
    heirs.min_by_key(|candidate| (candidate.started, candidate.info.task)).map(|candidate| &candidate.info)
}
