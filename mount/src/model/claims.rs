//! The claim machine: who holds which CPU list, and what may change that.
//!
//! Owns every rule of claiming, moving, releasing, inheriting and configuring, and these invariants:
//! - **Lists are disjoint**, over all pools.
//! - **A task has at most one claim.**
//! - **An exclusive list has at most one task on it or reserved for it**, except for a task that leaves it in
//!   the same write that brings the other one.
//!
//! [`Claims::apply`] is the only way to change anything. It decides at once, so a single lock around it makes
//! each decision atomic. Work that takes time (masks, records) is returned as a [`Plan`], whose lists are reserved
//! until it is settled or abandoned. Does not know how masks are set, records are kept, deaths are noticed or
//! PIDs are translated: time, rights and liveness are inputs.
//!
//! `pools` has the pools and lists, `deciding` decides what a write would do, `heirs` decides who inherits, and
//! `configuring` adds and removes pools and lists.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::command::{
    Change, Claim, ClaimKind, Command, CompletedPlacement, CompletedPlan, Effects, Ending, Heir, Origin,
    Placement, Plan, Rejected, Request,
};
use super::cpuset::CpuSet;
use super::pool::{Exclusivity, ListId, Mode, PoolId};
use super::refusal::{Holder, ListName, Refusal};
use super::task::TaskId;

mod configuring;
mod deciding;
mod heirs;
mod pools;
#[cfg(test)]
mod tests;

pub(crate) use deciding::check_permission;
pub use heirs::{ListToPassOn, is_intruder};
use pools::Stage;
pub use pools::{List, Pool};

/// The pools, the lists and all claims.
#[derive(Clone, Debug)]
pub struct Claims {
    pools: BTreeMap<PoolId, Pool>,
    lists: BTreeMap<ListId, List>,
    /// The claim of each task that has one.
    tasks: HashMap<TaskId, Arc<Claim>>,
    /// The tasks that a plan names that is neither settled nor abandoned, and whether they have died since.
    in_flight: HashMap<TaskId, bool>,
    /// How many claims other users than root asked for, including pending ones.
    not_by_root: usize,
    limit: usize,
}

impl Claims {
    /// Returns a machine without pools and claims that takes at most `limit` tasks at a time.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            pools: BTreeMap::new(),
            lists: BTreeMap::new(),
            tasks: HashMap::new(),
            in_flight: HashMap::new(),
            not_by_root: 0,
            limit,
        }
    }

    /// Returns the pools, the oldest first.
    pub fn pools(&self) -> impl ExactSizeIterator<Item = (PoolId, &Pool)> {
        self.pools.iter().map(|(id, pool)| (*id, pool))
    }

    /// Returns the pool with this number.
    #[must_use]
    pub fn pool(&self, id: PoolId) -> Option<&Pool> {
        self.pools.get(&id)
    }

    /// Returns the list with this number.
    #[must_use]
    pub fn list(&self, id: ListId) -> Option<&List> {
        self.lists.get(&id)
    }

    /// Returns the claim of a task.
    #[must_use]
    pub fn claim(&self, task: &TaskId) -> Option<&Arc<Claim>> {
        self.tasks.get(task)
    }

    /// Returns whether a plan names the task that is neither settled nor abandoned.
    #[must_use]
    pub fn is_in_flight(&self, task: &TaskId) -> bool {
        self.in_flight.contains_key(task)
    }

    /// Returns all claims, in no particular order.
    pub fn claims(&self) -> impl Iterator<Item = &Arc<Claim>> {
        self.tasks.values()
    }

    /// Returns whether an heir can get the claim: its list is exclusive.
    #[must_use]
    pub fn is_inheritable(&self, claim: &Claim) -> bool {
        self.exclusivity(claim.list) == Some(Exclusivity::Exclusive)
    }

    /// Returns whether this task can get the claim of a dead task: it has no claim itself, and the list stays and is not
    /// reserved for another task. [`ListToPassOn`] has the rest.
    #[must_use]
    pub fn can_inherit(&self, claim: &Claim, heir: &TaskId) -> bool {
        let excluding = BTreeSet::from([claim.task]);
        let list = self.lists.get(&claim.list);
        self.is_inheritable(claim)
            && list.is_some_and(|list| !list.is_being_removed() && list.other_task(&excluding).is_none())
            && !self.is_known(heir)
    }

    /// Returns whether claims on the list get a partition.
    #[must_use]
    pub fn is_isolated(&self, list: ListId) -> bool {
        let pool = self.lists.get(&list).and_then(|list| self.pools.get(&list.pool));
        pool.is_some_and(|pool| pool.mode == Mode::Isolated)
    }

    /// Whether the task has a claim or is about to get one.
    fn is_known(&self, task: &TaskId) -> bool {
        self.tasks.contains_key(task) || self.is_in_flight(task)
    }

    /// Returns the number of tasks that have a claim or are about to get one.
    fn count_known(&self) -> usize {
        let new = self.in_flight.keys().filter(|task| !self.tasks.contains_key(task));
        self.tasks.len() + new.count()
    }

    /// Returns the CPUs of all exclusive lists.
    #[must_use]
    pub fn exclusive_cpus(&self) -> CpuSet {
        let exclusive = self.lists.values().filter(|list| {
            self.pools.get(&list.pool).is_some_and(|pool| pool.exclusivity == Exclusivity::Exclusive)
        });
        exclusive.fold(CpuSet::new(), |all, list| all.union(&list.cpus))
    }

    /// Returns the pools and lists, without tasks, as they are after these changes of the configuration.
    ///
    /// # Errors
    /// One of the changes is refused.
    pub fn preview(&self, changes: &[Command]) -> Result<Self, Refusal> {
        let without_tasks =
            |list: &List| List { tasks: BTreeSet::new(), reserved: BTreeSet::new(), ..list.clone() };
        let mut after = Self::new(self.limit);
        after.pools.clone_from(&self.pools);
        after.lists = self.lists.iter().map(|(&id, list)| (id, without_tasks(list))).collect();
        for change in changes {
            after.configure(change.clone())?;
        }
        Ok(after)
    }

    /// Decides one command and changes the claims accordingly.
    ///
    /// # Errors
    /// [`Rejected`]: nothing has changed. Only [`Command::Write`], [`Command::Reserve`], [`Command::CloseList`] and
    /// [`Command::PrepareList`] are ever [`Rejected::Busy`].
    pub fn apply(&mut self, command: Command) -> Result<Effects, Rejected> {
        match command {
            Command::Write(request) => self.write(&request),
            Command::Reserve(task) => self.reserve(task),
            Command::CloseList { id, force, now } => self.close_list(id, force, now),
            Command::PrepareList { id, exclusivity, mode, cpus, now } => {
                self.prepare_list(id, exclusivity, mode, cpus, now)
            }
            Command::Settle(plan) => Ok(self.settle(plan)),
            Command::Abandon(plan) => Ok(self.abandon(&plan)),
            Command::End { task, ending, heir } => Ok(self.end(task, ending, heir)),
            Command::NoteIntruders { list, present } => {
                if let Some(list) = self.lists.get_mut(&list) {
                    list.has_intruders = present;
                }
                Ok(Effects::default())
            }
            other => Ok(self.configure(other)?),
        }
    }

    fn configure(&mut self, command: Command) -> Result<Effects, Refusal> {
        match command {
            Command::Restore(claim) => self.restore(claim),
            Command::AddPool { id, name, exclusivity } => self.add_pool(id, name, exclusivity),
            Command::RemovePool(id) => self.remove_pool(id),
            Command::AddList { pool, id, name, cpus } => self.add_list(pool, id, name, cpus),
            Command::OpenList(id) => self.open_list(id),
            Command::RemoveList(id) => Ok(self.remove_list(id)),
            Command::PrepareExclusivity { pool, exclusivity } => self.prepare_exclusivity(pool, exclusivity),
            Command::CancelExclusivity(pool) => self.cancel_exclusivity(pool),
            Command::SetExclusivity { pool, exclusivity } => self.set_exclusivity(pool, exclusivity),
            Command::SetDraining { list, draining } => self.set_draining(list, draining),
            Command::CancelList(id) => self.cancel_list(id),
            Command::ChangeList { id, pool, name, cpus } => self.change_list(id, pool, name, cpus),
            Command::RenamePool { id, name } => self.rename_pool(id, name),
            Command::SetPartial { pool, partial } => self.set_partial(pool, partial),
            Command::SetTransient { pool, transient } => self.set_transient(pool, transient),
            Command::PrepareMode { pool, mode, now } => self.prepare_mode(pool, mode, now),
            Command::CancelMode(pool) => self.cancel_mode(pool),
            Command::SetMode { pool, mode } => self.set_mode(pool, mode),
            Command::Write(_)
            | Command::Reserve(_)
            | Command::Settle(_)
            | Command::Abandon(_)
            | Command::End { .. }
            | Command::CloseList { .. }
            | Command::PrepareList { .. }
            | Command::NoteIntruders { .. } => Ok(Effects::default()),
        }
    }

    /// Works in two passes: the first decides and changes nothing, the second reserves what was decided.
    fn write(&mut self, request: &Request) -> Result<Effects, Rejected> {
        let plan = self.decide(request)?;
        for task in plan.tasks() {
            self.in_flight.insert(task, false);
        }
        for placement in plan.changes() {
            self.list_mut(placement.list)?.reserved.insert(placement.task);
        }
        self.not_by_root += new_not_by_root(&plan);
        Ok(Effects { plan, ..Effects::default() })
    }

    fn reserve(&mut self, task: TaskId) -> Result<Effects, Rejected> {
        if self.is_in_flight(&task) {
            return Err(Rejected::Busy);
        }
        let Some(claim) = self.tasks.get(&task) else { return Ok(Effects::default()) };
        let (list, kind) = (claim.list, ClaimKind::Repeat(Arc::clone(claim)));
        let Some(cpus) = self.lists.get(&list).map(|list| list.cpus.clone()) else {
            return Ok(Effects::default());
        };
        self.in_flight.insert(task, false);
        let plan = Plan { placements: vec![Placement { task, list, cpus, kind }], releases: Vec::new() };
        Ok(Effects { plan, ..Effects::default() })
    }

    fn settle(&mut self, plan: CompletedPlan) -> Effects {
        let mut effects = Effects::default();
        for claim in plan.releases {
            if self.finish(&claim.task) {
                self.drop_claim(&claim.task);
                effects.changes.push(Change::Released(claim));
            }
        }
        for CompletedPlacement { claim, origin } in plan.placements {
            if origin == Origin::New && !claim.by_root {
                self.not_by_root -= 1;
            }
            self.unreserve(claim.list, &claim.task);
            if !self.finish(&claim.task) {
                effects.lost.push(claim.task);
                continue;
            }
            match origin {
                Origin::Unchanged => continue,
                Origin::New => effects.changes.push(Change::Claimed(claim.clone())),
                Origin::Moved { from } => effects.changes.push(Change::Moved { from, to: claim.clone() }),
            }
            self.drop_claim(&claim.task);
            self.hold(claim);
        }
        effects
    }

    fn abandon(&mut self, plan: &Plan) -> Effects {
        self.not_by_root -= new_not_by_root(plan);
        for placement in &plan.placements {
            self.unreserve(placement.list, &placement.task);
        }
        let lost = plan.tasks().filter(|task| !self.finish(task)).collect();
        Effects { lost, ..Effects::default() }
    }

    fn unreserve(&mut self, list: ListId, task: &TaskId) {
        if let Some(list) = self.lists.get_mut(&list) {
            list.reserved.remove(task);
        }
    }

    /// Takes the task out of flight. Returns false if it died meanwhile; then it holds nothing.
    fn finish(&mut self, task: &TaskId) -> bool {
        let is_alive = self.in_flight.remove(task) == Some(false);
        if self.in_flight.is_empty() {
            // A command for thousands of tasks leaves no memory behind.
            self.in_flight.shrink_to(64);
        }
        is_alive
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
        self.tasks.insert(claim.task, claim);
    }

    fn drop_claim(&mut self, task: &TaskId) -> Option<Arc<Claim>> {
        let claim = self.tasks.remove(task)?;
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

    fn end(&mut self, task: TaskId, ending: Ending, heir: Option<Heir>) -> Effects {
        let claim = self.drop_claim(&task);
        if let Some(has_died) = self.in_flight.get_mut(&task) {
            *has_died = true;
        }
        let Some(claim) = claim else { return Effects::default() };
        let heir = heir.filter(|heir| self.can_inherit(&claim, &heir.info.task));
        let change = match (heir, ending) {
            (Some(Heir { info, kin }), _) => {
                let to = Claim { task: info.task, uid: info.uids.real, kin, ..Claim::clone(&claim) };
                let to = Arc::new(to);
                self.hold(to.clone());
                Change::Inherited { from: task, to }
            }
            (None, Ending::Exited(_)) => Change::Ended(claim),
            (None, Ending::Killed(_)) => Change::Reclaimed(claim),
            (None, Ending::Unknown) => Change::Died(claim),
        };
        Effects { changes: vec![change], ..Effects::default() }
    }

    fn restore(&mut self, claim: Arc<Claim>) -> Result<Effects, Refusal> {
        if self.is_known(&claim.task) {
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

    /// Returns whether the list takes one task only, by the rule in effect or by the one that is being stored.
    fn admits_one(&self, list: &List) -> bool {
        self.pools.get(&list.pool).is_some_and(Pool::admits_one)
    }

    fn holder(&self, task: TaskId, list: ListId, now: u64) -> Holder {
        let since = self.claim(&task).map_or(now, |claim| claim.since);
        Holder { task, list, held: now.saturating_sub(since) }
    }

    /// Returns the list of the pool that has been held for the longest time, with its holder.
    fn longest_holder(&self, pool: &Pool, now: u64) -> Option<(ListName, Holder)> {
        let taken = pool.taken().filter_map(|id| Some((id, self.lists.get(&id)?)));
        let holders = taken.filter_map(|(id, list)| {
            let task = list.tasks.iter().next()?;
            Some((list.name.clone(), self.holder(*task, id, now)))
        });
        holders.max_by_key(|(_, holder)| holder.held)
    }

    /// Returns the name of the free list that a claim of any list of the pool gets.
    fn free_list(&self, pool: &Pool) -> Option<String> {
        let lists = pool.lists().filter_map(|id| self.lists.get(&id));
        let free = lists.filter(|list| list.is_free() && list.is_open());
        free.min_by_key(|list| list.has_intruders).map(|list| list.name.cpus.clone())
    }
}

/// Returns how many first claims of the plan other users than root ask for.
fn new_not_by_root(plan: &Plan) -> usize {
    let is_counted = |kind: &ClaimKind| matches!(kind, ClaimKind::New(claim) if !claim.by_root);
    plan.placements.iter().filter(|placement| is_counted(&placement.kind)).count()
}
