//! Pools and CPU lists, and the tasks on them.
//!
//! Owns their data. Does not know the rules: the machine changes them.

use std::collections::{BTreeMap, BTreeSet};

use crate::model::cpuset::{CpuId, CpuSet};
use crate::model::pool::{Exclusivity, ListId, Mode, PoolId, PoolName};
use crate::model::refusal::ListName;
use crate::model::task::TaskId;

/// The stage of a list between mkdir and rmdir.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// It has been added and not opened yet. It cannot be claimed.
    Creating,
    /// It can be claimed.
    Open,
    /// Its removal is being stored. It can no longer be claimed.
    Removing,
}

/// A CPU list and the tasks on it.
#[derive(Clone, Debug)]
pub struct List {
    pub(super) pool: PoolId,
    pub(super) name: ListName,
    pub(super) cpus: CpuSet,
    pub(super) stage: Stage,
    /// Whether it takes no new tasks.
    pub(super) draining: bool,
    /// Whether a change of its name, pool or CPUs is being stored. Until then nobody is let in.
    pub(super) changing: bool,
    /// Whether a process without a claim was found pinned within it.
    pub(super) has_intruders: bool,
    pub(super) tasks: BTreeSet<TaskId>,
    pub(super) reserved: BTreeSet<TaskId>,
}

impl List {
    /// Returns its pool.
    #[must_use]
    pub fn pool(&self) -> PoolId {
        self.pool
    }

    /// Returns its name.
    #[must_use]
    pub fn name(&self) -> &ListName {
        &self.name
    }

    /// Returns its CPUs.
    #[must_use]
    pub fn cpus(&self) -> &CpuSet {
        &self.cpus
    }

    /// Returns the tasks on it, ordered by PID.
    #[must_use]
    pub fn tasks(&self) -> &BTreeSet<TaskId> {
        &self.tasks
    }

    /// Returns whether a process without a claim was found pinned within it.
    #[must_use]
    pub fn has_intruders(&self) -> bool {
        self.has_intruders
    }

    /// Returns whether it takes no new tasks. Those that are on it stay, and so does an heir.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.draining
    }

    /// Returns whether nobody is on it or on the way to it. It may be draining.
    #[must_use]
    pub fn is_free(&self) -> bool {
        self.stage == Stage::Open && self.tasks.is_empty() && self.reserved.is_empty()
    }

    /// Returns whether it takes new tasks, if there is room.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.stage == Stage::Open && !self.draining && !self.changing
    }

    /// Returns whether somebody is on it or on the way to it.
    #[must_use]
    pub fn is_used(&self) -> bool {
        !self.tasks.is_empty() || !self.reserved.is_empty()
    }

    /// Returns whether its removal is being stored.
    #[must_use]
    pub fn is_being_removed(&self) -> bool {
        self.stage == Stage::Removing
    }

    /// Returns a task on the list or reserved for it that is not in `excluding`.
    pub(super) fn other_task(&self, excluding: &BTreeSet<TaskId>) -> Option<TaskId> {
        self.tasks.iter().chain(&self.reserved).find(|&task| !excluding.contains(task)).copied()
    }

    /// Returns how many tasks are on the list or reserved for it, without those in `excluding`.
    pub(super) fn task_count(&self, excluding: &BTreeSet<TaskId>) -> usize {
        let leaving = excluding.iter().filter(|task| self.tasks.contains(task)).count();
        let arriving = self.reserved.iter().filter(|task| !self.tasks.contains(task)).count();
        self.tasks.len() - leaving + arriving
    }
}

/// A pool and its lists.
#[derive(Clone, Debug)]
pub struct Pool {
    pub(super) name: PoolName,
    pub(super) exclusivity: Exclusivity,
    /// The exclusivity that is being stored. Until it is in effect, a task is let in only if both allow it.
    pub(super) coming: Option<Exclusivity>,
    /// Whether an exclusive list with offline CPUs can be claimed.
    pub(super) partial: bool,
    /// Whether its lists are removed when their last task leaves, and the pool with its last list.
    pub(super) transient: bool,
    pub(super) mode: Mode,
    /// The mode that is being stored. Until it is in effect, nobody is let in.
    pub(super) coming_mode: Option<Mode>,
    /// Keyed by their first CPU: lists are disjoint, so no two have the same.
    pub(super) lists: BTreeMap<CpuId, ListId>,
    /// The lists that have tasks.
    pub(super) taken: BTreeSet<ListId>,
}

impl Pool {
    /// Returns its name.
    #[must_use]
    pub fn name(&self) -> &PoolName {
        &self.name
    }

    /// Returns how many tasks each of its lists takes.
    #[must_use]
    pub fn exclusivity(&self) -> Exclusivity {
        self.exclusivity
    }

    /// Returns whether an exclusive list with offline CPUs can be claimed. A shared one can in any case.
    #[must_use]
    pub fn is_partial(&self) -> bool {
        self.partial
    }

    /// Returns whether its lists are removed when their last task leaves, and the pool with its last list.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        self.transient
    }

    /// Returns what keeps others off its lists.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Returns whether its lists serve with those of their CPUs that are online.
    #[must_use]
    pub fn serves_partly(&self) -> bool {
        self.partial || self.exclusivity == Exclusivity::Shared
    }

    /// Returns whether a list of it with these CPUs can be claimed while some are offline.
    #[must_use]
    pub fn can_serve(&self, cpus: &CpuSet, offline: &CpuSet) -> bool {
        self.serves_partly() || cpus.is_disjoint(offline)
    }

    /// Returns whether each of its lists takes one task only: now, or after a change that is being stored.
    pub(super) fn admits_one(&self) -> bool {
        self.strictest() == Exclusivity::Exclusive
    }

    /// Returns the stricter of the exclusivity in effect and the one that is being stored.
    pub(super) fn strictest(&self) -> Exclusivity {
        self.coming.filter(|coming| *coming == Exclusivity::Exclusive).unwrap_or(self.exclusivity)
    }

    /// Returns its lists, ordered by their first CPU.
    pub fn lists(&self) -> impl ExactSizeIterator<Item = ListId> + '_ {
        self.lists.values().copied()
    }

    /// Returns its lists that have tasks.
    pub fn taken(&self) -> impl ExactSizeIterator<Item = ListId> + '_ {
        self.taken.iter().copied()
    }
}
