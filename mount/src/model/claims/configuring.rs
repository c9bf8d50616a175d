//! Adding and removing pools and lists.
//!
//! Owns their rules: names are unique, lists are disjoint, and no task loses its list unless that is forced. Does not know
//! how the configuration is stored.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::{Claims, List, Pool, Stage};
use crate::model::command::{Claim, ClaimKind, Effects, Placement, Plan, Rejected};
use crate::model::cpuset::{CpuSet, ParseCpuSetError};
use crate::model::pool::{Exclusivity, ListId, Mode, PoolId, PoolName};
use crate::model::refusal::{ListName, Refusal};

impl Claims {
    pub(super) fn add_pool(
        &mut self,
        id: PoolId,
        name: PoolName,
        exclusivity: Exclusivity,
    ) -> Result<Effects, Refusal> {
        if self.pools.values().any(|pool| pool.name == name) {
            return Err(Refusal::Exists);
        }
        self.pools.insert(
            id,
            Pool {
                name,
                exclusivity,
                coming: None,
                partial: false,
                transient: false,
                mode: Mode::Affinity,
                coming_mode: None,
                lists: BTreeMap::new(),
                taken: BTreeSet::new(),
            },
        );
        Ok(Effects::default())
    }

    pub(super) fn remove_pool(&mut self, id: PoolId) -> Result<Effects, Refusal> {
        let pool = self.pools.get(&id).ok_or(Refusal::Removed)?;
        if !pool.lists.is_empty() {
            return Err(Refusal::PoolHasLists { pool: pool.name.clone() });
        }
        self.pools.remove(&id);
        Ok(Effects::default())
    }

    pub(super) fn add_list(
        &mut self,
        pool: PoolId,
        id: ListId,
        name: String,
        cpus: CpuSet,
    ) -> Result<Effects, Refusal> {
        let name = self.check_place(id, pool, name, &cpus)?;
        self.add_to_pool(pool, id, &cpus)?;
        let list = List {
            pool,
            name,
            cpus,
            stage: Stage::Creating,
            draining: false,
            changing: false,
            has_intruders: false,
            tasks: BTreeSet::new(),
            reserved: BTreeSet::new(),
        };
        self.lists.insert(id, list);
        Ok(Effects::default())
    }

    pub(super) fn open_list(&mut self, id: ListId) -> Result<Effects, Refusal> {
        self.list_mut(id)?.stage = Stage::Open;
        Ok(Effects::default())
    }

    /// Returns the name of a list with these properties, if there can be one.
    fn check_place(
        &self,
        id: ListId,
        pool: PoolId,
        name: String,
        cpus: &CpuSet,
    ) -> Result<ListName, Refusal> {
        let owner = self.pools.get(&pool).ok_or(Refusal::Removed)?;
        let name = ListName { pool: owner.name.clone(), cpus: name };
        let others = || self.lists.iter().filter(|(other, _)| **other != id).map(|(_, list)| list);
        if others().any(|list| list.name == name) {
            return Err(Refusal::Exists);
        }
        if let Some(other) = others().find(|list| !list.cpus.is_disjoint(cpus)) {
            return Err(Refusal::Overlap { other: other.name.clone(), both: other.cpus.intersection(cpus) });
        }
        Ok(name)
    }

    fn add_to_pool(&mut self, pool: PoolId, id: ListId, cpus: &CpuSet) -> Result<(), Refusal> {
        let first = cpus.first().ok_or(Refusal::BadCpuList(ParseCpuSetError::Empty))?;
        self.pools.get_mut(&pool).ok_or(Refusal::Removed)?.lists.insert(first, id);
        Ok(())
    }

    pub(super) fn close_list(&mut self, id: ListId, force: bool, now: u64) -> Result<Effects, Rejected> {
        let list = self.lists.get(&id).ok_or(Refusal::Removed)?;
        let plan = match list.other_task(&BTreeSet::new()) {
            None => Plan::default(),
            Some(_) if force => Plan { releases: self.claims_at_rest(list)?, ..Plan::default() },
            Some(task) => {
                let (list, holder) = (list.name.clone(), self.holder(task, id, now));
                return Err(Refusal::ListInUse { list, holder }.into());
            }
        };
        self.list_mut(id)?.stage = Stage::Removing;
        Ok(self.take_off(plan))
    }

    /// Returns the claims on a list, of whose tasks none is in flight, or on the way to it.
    fn claims_at_rest(&self, list: &List) -> Result<Vec<Arc<Claim>>, Rejected> {
        if !list.reserved.is_empty() || list.tasks.iter().any(|task| self.is_in_flight(task)) {
            return Err(Rejected::Busy);
        }
        Ok(list.tasks.iter().filter_map(|task| self.tasks.get(task)).cloned().collect())
    }

    /// Puts the tasks of a plan in flight.
    fn take_off(&mut self, plan: Plan) -> Effects {
        self.in_flight.extend(plan.tasks().map(|task| (task, false)));
        Effects { plan, ..Effects::default() }
    }

    pub(super) fn set_draining(&mut self, id: ListId, draining: bool) -> Result<Effects, Refusal> {
        self.list_mut(id)?.draining = draining;
        Ok(Effects::default())
    }

    pub(super) fn prepare_list(
        &mut self,
        id: ListId,
        exclusivity: Exclusivity,
        mode: Mode,
        cpus: CpuSet,
        now: u64,
    ) -> Result<Effects, Rejected> {
        let list = self.lists.get(&id).ok_or(Refusal::Removed)?;
        let pool = self.pools.get(&list.pool).ok_or(Refusal::Removed)?;
        let tasks = list.task_count(&BTreeSet::new());
        if exclusivity == Exclusivity::Exclusive && tasks > 1 {
            return Err(Refusal::SharedByMany { list: list.name.clone(), tasks }.into());
        }
        let is_resize = list.cpus != cpus;
        // A partition has the CPUs that it was made with.
        let keeps_partitions = mode == pool.mode && !(is_resize && mode == Mode::Isolated);
        if let Some(task) = list.other_task(&BTreeSet::new()).filter(|_| !keeps_partitions) {
            let (list, holder) = (list.name.clone(), self.holder(task, id, now));
            return Err(Refusal::ListInUse { list, holder }.into());
        }
        let claims = if is_resize { self.claims_at_rest(list)? } else { Vec::new() };
        let placements = claims.into_iter().map(|claim| {
            let (task, cpus) = (claim.task, cpus.clone());
            Placement { task, list: id, cpus, kind: ClaimKind::Repeat(claim) }
        });
        let plan = Plan { placements: placements.collect(), ..Plan::default() };
        self.list_mut(id)?.changing = true;
        Ok(self.take_off(plan))
    }

    pub(super) fn cancel_list(&mut self, id: ListId) -> Result<Effects, Refusal> {
        self.list_mut(id)?.changing = false;
        Ok(Effects::default())
    }

    pub(super) fn change_list(
        &mut self,
        id: ListId,
        pool: PoolId,
        name: String,
        cpus: CpuSet,
    ) -> Result<Effects, Refusal> {
        let name = self.check_place(id, pool, name, &cpus)?;
        let before = self.lists.get(&id).ok_or(Refusal::Removed)?.pool;
        let is_taken = self.pools.get_mut(&before).is_some_and(|before| {
            before.lists.retain(|_, other| *other != id);
            before.taken.remove(&id)
        });
        self.add_to_pool(pool, id, &cpus)?;
        if is_taken && let Some(pool) = self.pools.get_mut(&pool) {
            pool.taken.insert(id);
        }
        let list = self.list_mut(id)?;
        list.has_intruders &= list.cpus == cpus;
        (list.pool, list.name, list.cpus, list.changing) = (pool, name, cpus, false);
        Ok(Effects::default())
    }

    pub(super) fn rename_pool(&mut self, id: PoolId, name: PoolName) -> Result<Effects, Refusal> {
        if self.pools.iter().any(|(other, pool)| *other != id && pool.name == name) {
            return Err(Refusal::Exists);
        }
        self.pools.get_mut(&id).ok_or(Refusal::Removed)?.name = name.clone();
        for list in self.lists.values_mut().filter(|list| list.pool == id) {
            list.name.pool = name.clone();
        }
        Ok(Effects::default())
    }

    pub(super) fn remove_list(&mut self, id: ListId) -> Effects {
        if let Some(list) = self.lists.remove(&id)
            && let Some(pool) = self.pools.get_mut(&list.pool)
        {
            pool.lists.retain(|_, other| *other != id);
        }
        Effects::default()
    }

    pub(super) fn prepare_exclusivity(
        &mut self,
        id: PoolId,
        exclusivity: Exclusivity,
    ) -> Result<Effects, Refusal> {
        self.check_exclusivity(id, exclusivity)?;
        self.pools.get_mut(&id).ok_or(Refusal::Removed)?.coming = Some(exclusivity);
        Ok(Effects::default())
    }

    pub(super) fn cancel_exclusivity(&mut self, id: PoolId) -> Result<Effects, Refusal> {
        self.pools.get_mut(&id).ok_or(Refusal::Removed)?.coming = None;
        Ok(Effects::default())
    }

    pub(super) fn set_exclusivity(
        &mut self,
        id: PoolId,
        exclusivity: Exclusivity,
    ) -> Result<Effects, Refusal> {
        // The change was checked when it was prepared, and since then nobody was let in whom it forbids. Only a task
        // that is leaving in the write that brings another one may still be there.
        if self.pools.get(&id).ok_or(Refusal::Removed)?.coming != Some(exclusivity) {
            self.check_exclusivity(id, exclusivity)?;
        }
        let pool = self.pools.get_mut(&id).ok_or(Refusal::Removed)?;
        pool.exclusivity = exclusivity;
        pool.coming = None;
        Ok(Effects::default())
    }

    pub(super) fn set_partial(&mut self, id: PoolId, partial: bool) -> Result<Effects, Refusal> {
        self.pools.get_mut(&id).ok_or(Refusal::Removed)?.partial = partial;
        Ok(Effects::default())
    }

    pub(super) fn set_transient(&mut self, id: PoolId, transient: bool) -> Result<Effects, Refusal> {
        self.pools.get_mut(&id).ok_or(Refusal::Removed)?.transient = transient;
        Ok(Effects::default())
    }

    pub(super) fn prepare_mode(&mut self, id: PoolId, mode: Mode, now: u64) -> Result<Effects, Refusal> {
        let pool = self.pools.get(&id).ok_or(Refusal::Removed)?;
        if mode == Mode::Isolated && !pool.admits_one() {
            return Err(Refusal::NotExclusive { pool: pool.name.clone() });
        }
        let lists = self.staying_lists(pool);
        let in_use =
            lists.filter_map(|(id, list)| Some((id, list, list.other_task(&BTreeSet::new())?))).next();
        if let Some((id, list, task)) = in_use {
            return Err(Refusal::ListInUse { list: list.name.clone(), holder: self.holder(task, id, now) });
        }
        self.pools.get_mut(&id).ok_or(Refusal::Removed)?.coming_mode = Some(mode);
        Ok(Effects::default())
    }

    /// Returns the lists of a pool that are not about to leave it.
    fn staying_lists<'a>(&'a self, pool: &'a Pool) -> impl Iterator<Item = (ListId, &'a List)> {
        let lists = pool.lists().filter_map(|id| Some((id, self.lists.get(&id)?)));
        lists.filter(|(_, list)| !list.is_being_removed() && !list.changing)
    }

    pub(super) fn cancel_mode(&mut self, id: PoolId) -> Result<Effects, Refusal> {
        self.pools.get_mut(&id).ok_or(Refusal::Removed)?.coming_mode = None;
        Ok(Effects::default())
    }

    pub(super) fn set_mode(&mut self, id: PoolId, mode: Mode) -> Result<Effects, Refusal> {
        let pool = self.pools.get_mut(&id).ok_or(Refusal::Removed)?;
        pool.mode = mode;
        pool.coming_mode = None;
        Ok(Effects::default())
    }

    fn check_exclusivity(&self, id: PoolId, exclusivity: Exclusivity) -> Result<(), Refusal> {
        let pool = self.pools.get(&id).ok_or(Refusal::Removed)?;
        if exclusivity == Exclusivity::Shared && pool.coming_mode.unwrap_or(pool.mode) == Mode::Isolated {
            return Err(Refusal::IsolatedPool { pool: pool.name.clone() });
        }
        if exclusivity == Exclusivity::Exclusive {
            let lists = self.staying_lists(pool);
            if let Some((list, tasks)) =
                lists.map(|(_, list)| (list, list.task_count(&BTreeSet::new()))).find(|(_, tasks)| *tasks > 1)
            {
                return Err(Refusal::SharedByMany { list: list.name.clone(), tasks });
            }
        }
        Ok(())
    }
}
