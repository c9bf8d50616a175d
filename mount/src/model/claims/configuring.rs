//! Adding and removing pools and lists.
//!
//! Owns their rules: names are unique, lists are disjoint, and no task loses its list. Does not know where the
//! configuration is stored.

use std::collections::{BTreeMap, BTreeSet};

use super::{Claims, List, Pool, Stage};
use crate::model::command::Effects;
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
                changes_mode: false,
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
        let owner = self.pools.get_mut(&pool).ok_or(Refusal::Removed)?;
        let name = ListName { pool: owner.name.clone(), cpus: name };
        if self.lists.values().any(|list| list.name == name) {
            return Err(Refusal::Exists);
        }
        if let Some(other) = self.lists.values().find(|list| !list.cpus.is_disjoint(&cpus)) {
            return Err(Refusal::Overlap { other: other.name.clone(), both: other.cpus.intersection(&cpus) });
        }
        owner.lists.insert(cpus.first().ok_or(Refusal::BadCpuList(ParseCpuSetError::Empty))?, id);
        let list = List {
            pool,
            name,
            cpus,
            stage: Stage::Creating,
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

    pub(super) fn close_list(&mut self, id: ListId, now: u64) -> Result<Effects, Refusal> {
        let list = self.lists.get(&id).ok_or(Refusal::Removed)?;
        if let Some(task) = list.other_task(&BTreeSet::new()) {
            return Err(Refusal::ListInUse { list: list.name.clone(), holder: self.holder(task, id, now) });
        }
        self.list_mut(id)?.stage = Stage::Removing;
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
        if mode == Mode::Isolated && pool.exclusivity == Exclusivity::Shared {
            return Err(Refusal::NotExclusive { pool: pool.name.clone() });
        }
        let tasks = pool.lists().filter_map(|id| Some((id, self.lists.get(&id)?)));
        let in_use =
            tasks.filter_map(|(id, list)| Some((id, list, list.other_task(&BTreeSet::new())?))).next();
        if let Some((id, list, task)) = in_use {
            return Err(Refusal::ListInUse { list: list.name.clone(), holder: self.holder(task, id, now) });
        }
        self.pools.get_mut(&id).ok_or(Refusal::Removed)?.changes_mode = true;
        Ok(Effects::default())
    }

    pub(super) fn cancel_mode(&mut self, id: PoolId) -> Result<Effects, Refusal> {
        self.pools.get_mut(&id).ok_or(Refusal::Removed)?.changes_mode = false;
        Ok(Effects::default())
    }

    pub(super) fn set_mode(&mut self, id: PoolId, mode: Mode) -> Result<Effects, Refusal> {
        let pool = self.pools.get_mut(&id).ok_or(Refusal::Removed)?;
        pool.mode = mode;
        pool.changes_mode = false;
        Ok(Effects::default())
    }

    fn check_exclusivity(&self, id: PoolId, exclusivity: Exclusivity) -> Result<(), Refusal> {
        let pool = self.pools.get(&id).ok_or(Refusal::Removed)?;
        if exclusivity == Exclusivity::Shared && pool.mode == Mode::Isolated {
            return Err(Refusal::IsolatedPool { pool: pool.name.clone() });
        }
        if exclusivity == Exclusivity::Exclusive {
            let lists = pool.lists().filter_map(|id| self.lists.get(&id));
            if let Some((list, tasks)) =
                lists.map(|list| (list, list.task_count(&BTreeSet::new()))).find(|(_, tasks)| *tasks > 1)
            {
                return Err(Refusal::SharedByMany { list: list.name.clone(), tasks });
            }
        }
        Ok(())
    }
}
