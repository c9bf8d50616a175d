//! The difference between the configuration and a document: the changes, and what has to be reserved for them.
//!
//! Owns which list of a document is which: the one with the same CPUs. One that is in another pool moves there and keeps its
//! tasks; all others are new, or go. Does not carry out anything.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::configure::{Attributes, NODES_EACH};
use crate::model::claims::{Claims, Pool};
use crate::model::command::Command;
use crate::model::cpuset::{CpuId, CpuSet};
use crate::model::document::{ListSpec, Permissions, PoolSpec, TasksEntry};
use crate::model::pool::{ListId, Mode, PoolId};

/// Owner and mode of a `tasks` file that nobody has changed.
pub(super) const NEW_TASKS: Attributes = Attributes { uid: 0, gid: 0, mode: 0o644 };

/// The changes that make a document the configuration.
#[derive(Debug, Default)]
pub(super) struct Difference {
    /// How many node ids are used.
    pub(super) nodes: u64,
    /// The reservations in their order, each with the command that cancels it.
    pub(super) reserve: Vec<(Command, Command)>,
    pub(super) changes: Vec<Command>,
    /// The CPUs of new lists.
    pub(super) new_cpus: Vec<CpuSet>,
    pub(super) attributes: HashMap<u64, Attributes>,
    /// The nodes that go.
    pub(super) gone: Vec<u64>,
    /// What the kernel may have cached of all this: paths, relative to `pools`.
    pub(super) stale: BTreeSet<String>,
}

/// The order of changes: room is made before it is taken, and a pool is exclusive whenever it is isolated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    AddPool,
    CloseList,
    EndIsolation,
    Exclusivity,
    Isolate,
    Flags,
    RemoveList,
    MoveList,
    AddList,
    RemovePool,
}

/// A difference that is being made.
struct Maker<'a> {
    claims: &'a Claims,
    attributes: &'a HashMap<u64, Attributes>,
    /// The lists by their first CPU, without those of transient pools that the document does not have.
    lists: BTreeMap<CpuId, ListId>,
    force: bool,
    /// Nanoseconds since boot.
    now: u64,
    /// The next node id.
    next: u64,
    reserve: Vec<(Phase, Command, Command)>,
    changes: Vec<(Phase, Command)>,
    it: Difference,
}

impl Difference {
    /// Returns what makes `wanted` the configuration. `next`: the next node id, and the nanoseconds since boot; `force`:
    /// whether lists with tasks can be removed.
    pub(super) fn new(
        claims: &Claims,
        attributes: &HashMap<u64, Attributes>,
        wanted: &[PoolSpec],
        (next, now): (u64, u64),
        force: bool,
    ) -> Self {
        let is_concerned =
            |pool: &Pool| !pool.is_transient() || wanted.iter().any(|it| it.name == *pool.name());
        let concerned = claims.pools().filter(|(_, pool)| is_concerned(pool));
        let ids = concerned.flat_map(|(_, pool)| pool.lists());
        let lists = ids.filter_map(|id| Some((claims.list(id)?.cpus().first()?, id))).collect();
        let (reserve, changes, it) = (Vec::new(), Vec::new(), Self::default());
        let mut maker = Maker { claims, attributes, lists, force, now, next, reserve, changes, it };
        let pools: Vec<PoolId> = wanted.iter().map(|pool| maker.pool(pool)).collect();
        let mut kept = BTreeSet::new();
        for (id, pool) in pools.iter().zip(wanted) {
            kept.extend(pool.lists.iter().filter_map(|list| maker.list(*id, pool, list)));
        }
        maker.remove_others(&pools, &kept);
        let Maker { mut reserve, mut changes, mut it, next: after, .. } = maker;
        // Both sorts are stable.
        reserve.sort_by_key(|(phase, ..)| *phase);
        changes.sort_by_key(|(phase, _)| *phase);
        it.reserve = reserve.into_iter().map(|(_, reserve, cancel)| (reserve, cancel)).collect();
        it.changes = changes.into_iter().map(|(_, change)| change).collect();
        it.nodes = after - next;
        it
    }

    pub(super) fn is_empty(&self) -> bool {
        self.changes.is_empty() && self.attributes.is_empty()
    }
}

impl Maker<'_> {
    fn node(&mut self) -> u64 {
        let node = self.next;
        self.next += NODES_EACH;
        node
    }

    fn change(&mut self, phase: Phase, change: Command) {
        self.changes.push((phase, change));
    }

    /// Makes a pool, or sets the values of the one with its name.
    fn pool(&mut self, wanted: &PoolSpec) -> PoolId {
        let claims = self.claims;
        let found = claims.pools().find(|(_, pool)| *pool.name() == wanted.name);
        let id = match found {
            Some((id, pool)) => {
                self.values(id, pool, wanted);
                id
            }
            None => {
                let id = PoolId(self.node());
                let (name, exclusivity) = (wanted.name.clone(), wanted.exclusivity);
                self.change(Phase::AddPool, Command::AddPool { id, name, exclusivity });
                self.flags(id, false, wanted);
                if wanted.mode == Mode::Isolated {
                    self.change(Phase::Isolate, Command::SetMode { pool: id, mode: wanted.mode });
                }
                self.it.stale.insert(String::new());
                id
            }
        };
        self.tasks(id.tasks_node(), wanted.name.to_string(), wanted.tasks);
        id
    }

    fn values(&mut self, id: PoolId, pool: &Pool, wanted: &PoolSpec) {
        self.flags(id, pool.is_partial(), wanted);
        if pool.is_transient() {
            self.change(Phase::Flags, Command::SetTransient { pool: id, transient: false });
        }
        let exclusivity = wanted.exclusivity;
        if pool.exclusivity() != exclusivity {
            let prepare = Command::PrepareExclusivity { pool: id, exclusivity };
            self.reserve.push((Phase::Exclusivity, prepare, Command::CancelExclusivity(id)));
            self.change(Phase::Exclusivity, Command::SetExclusivity { pool: id, exclusivity });
        }
        let mode = wanted.mode;
        if pool.mode() != mode {
            let phase = if mode == Mode::Isolated { Phase::Isolate } else { Phase::EndIsolation };
            let prepare = Command::PrepareMode { pool: id, mode, now: self.now };
            self.reserve.push((phase, prepare, Command::CancelMode(id)));
            self.change(phase, Command::SetMode { pool: id, mode });
        }
    }

    fn flags(&mut self, pool: PoolId, partial: bool, wanted: &PoolSpec) {
        if partial != wanted.partial {
            self.change(Phase::Flags, Command::SetPartial { pool, partial: wanted.partial });
        }
    }

    fn tasks(&mut self, node: u64, directory: String, wanted: TasksEntry) {
        let old = self.attributes.get(&node).copied().unwrap_or(NEW_TASKS);
        let new = Attributes {
            uid: wanted.owner.unwrap_or(old.uid),
            gid: wanted.group.unwrap_or(old.gid),
            mode: wanted.mode.map_or(old.mode, |Permissions(bits)| bits),
        };
        if new != old {
            self.it.attributes.insert(node, new);
            self.it.stale.insert(directory + "/tasks");
        }
    }

    /// Makes a list of a pool, or moves the one with its CPUs there. Returns the one that there is.
    fn list(&mut self, pool: PoolId, of: &PoolSpec, wanted: &ListSpec) -> Option<ListId> {
        let known = wanted.cpus.first().and_then(|first| self.lists.get(&first).copied());
        let known = known.and_then(|id| Some((id, self.claims.list(id)?)));
        let Some((id, list)) = known.filter(|(_, list)| *list.cpus() == wanted.cpus) else {
            let id = ListId(self.node());
            let (name, cpus) = (wanted.name.clone(), wanted.cpus.clone());
            self.it.new_cpus.push(cpus.clone());
            self.change(Phase::AddList, Command::AddList { pool, id, name, cpus });
            self.change(Phase::AddList, Command::OpenList(id));
            self.it.stale.insert(of.name.to_string());
            self.tasks(id.tasks_node(), format!("{}/{}", of.name, wanted.name), wanted.tasks);
            return None;
        };
        if list.pool() != pool {
            let (cpus, name) = (list.cpus().clone(), list.name().cpus.clone());
            let (exclusivity, mode, now) = (of.exclusivity, of.mode, self.now);
            let prepare = Command::PrepareList { id, exclusivity, mode, cpus: cpus.clone(), now };
            // Before the values of pools, which then count only the lists that stay.
            self.reserve.push((Phase::CloseList, prepare, Command::CancelList(id)));
            let (from, to) = (list.name().pool.to_string(), of.name.to_string());
            self.it.stale.extend([format!("{from}/{name}"), format!("{to}/{name}"), from, to]);
            self.change(Phase::MoveList, Command::ChangeList { id, pool, name, cpus });
        }
        self.tasks(id.tasks_node(), format!("{}/{}", of.name, list.name().cpus), wanted.tasks);
        Some(id)
    }

    /// Removes all other lists and pools. Transient ones go by themselves.
    fn remove_others(&mut self, pools: &[PoolId], lists: &BTreeSet<ListId>) {
        let claims = self.claims;
        for (id, pool) in claims.pools().filter(|(id, pool)| !pool.is_transient() || pools.contains(id)) {
            for list in pool.lists().filter(|list| !lists.contains(list)) {
                let close = Command::CloseList { id: list, force: self.force, now: self.now };
                self.reserve.push((Phase::CloseList, close, Command::OpenList(list)));
                self.change(Phase::RemoveList, Command::RemoveList(list));
                self.it.gone.extend(list.nodes());
                if let Some(list) = claims.list(list) {
                    self.it.stale.insert(format!("{}/{}", pool.name(), list.name().cpus));
                }
                self.it.stale.insert(pool.name().to_string());
            }
            if !pools.contains(&id) {
                self.change(Phase::RemovePool, Command::RemovePool(id));
                self.it.gone.extend(id.nodes());
                self.it.stale.extend([String::new(), pool.name().to_string()]);
            }
        }
    }
}
