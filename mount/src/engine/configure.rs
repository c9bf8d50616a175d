//! Pools, lists, flags, owners and modes: decided, stored durably, then in force.
//!
//! Owns: the order of a change to the configuration, and what an earlier daemon left. Must not know: which
//! change is allowed; that is the claim machine's.

use std::sync::Arc;

use nix::errno::Errno;

use super::replay::answered;
use super::{Caller, Engine};
use crate::clock;
use crate::failpoint::{Step, reached};
use crate::journal::{Config, LastRequest, ListConfig, NodeAttributes, PoolConfig, Record, Recovered};
use crate::model::claims::Claims;
use crate::model::command::{Claim, Command, SavedMask};
use crate::model::cpuset::CpuSet;
use crate::model::pool::{Exclusivity, ListId, PoolId, PoolName};
use crate::model::refusal::Refusal;
use crate::model::task::TaskId;
use crate::process::{BlockedWriter, Process};

/// Node ids are given out in steps of this: a pool has three nodes, a list two.
pub(crate) const NODES_EACH: u64 = 4;

/// Owner and mode of a node, where somebody changed them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Attributes {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// The permission bits.
    pub(crate) mode: u16,
}

impl Engine {
    /// Makes a pool.
    ///
    /// # Errors
    /// Not root, no name for a pool, it exists, it cannot be stored.
    pub(crate) fn add_pool(&self, caller: Caller, name: &str) -> Result<PoolId, Refusal> {
        must_be_root(caller.uid)?;
        let name: PoolName = name.parse().map_err(Refusal::BadPoolName)?;
        let mut next = self.configuring.lock();
        let id = PoolId(*next);
        self.claims.lock().apply(Command::AddPool { id, name, exclusivity: Exclusivity::Shared })?;
        self.store_or(&mut next, NODES_EACH, caller, || Command::RemovePool(id))?;
        reached(Step::ConfigApplied);
        Ok(id)
    }

    /// Makes a CPU list.
    ///
    /// # Errors
    /// Not root, no CPU list, CPUs that the machine has not or another list has, it exists, it cannot be
    /// stored.
    pub(crate) fn add_list(&self, caller: Caller, pool: PoolId, name: &str) -> Result<ListId, Refusal> {
        must_be_root(caller.uid)?;
        let cpus: CpuSet = name.parse().map_err(Refusal::BadCpuList)?;
        let known = self.topology.cpus();
        let unknown = cpus.difference(&known);
        if !unknown.is_empty() {
            return Err(Refusal::UnknownCpus { unknown, known });
        }
        let mut next = self.configuring.lock();
        let id = ListId(*next);
        self.claims.lock().apply(Command::AddList { pool, id, name: name.to_owned(), cpus })?;
        self.store_or(&mut next, NODES_EACH, caller, || Command::RemoveList(id))?;
        self.claims.lock().apply(Command::OpenList(id))?;
        self.update_daemon_affinity();
        reached(Step::ConfigApplied);
        Ok(id)
    }

    /// Removes a pool.
    ///
    /// # Errors
    /// Not root, it has lists, it cannot be stored.
    pub(crate) fn remove_pool(&self, caller: Caller, id: PoolId) -> Result<(), Refusal> {
        must_be_root(caller.uid)?;
        let mut next = self.configuring.lock();
        let (name, exclusivity) = {
            let mut claims = self.claims.lock();
            let pool = claims.pool(id).ok_or(Refusal::Removed)?;
            let was = (pool.name().clone(), pool.exclusivity());
            claims.apply(Command::RemovePool(id))?;
            was
        };
        self.store_or(&mut next, 0, caller, || Command::AddPool { id, name, exclusivity })?;
        self.forget(&[id.0, id.exclusive_node(), id.tasks_node()]);
        reached(Step::ConfigApplied);
        Ok(())
    }

    /// Removes a CPU list on which nobody is.
    ///
    /// # Errors
    /// Not root, it has living tasks, it cannot be stored.
    pub(crate) fn remove_list(&self, caller: Caller, id: ListId) -> Result<(), Refusal> {
        must_be_root(caller.uid)?;
        let mut next = self.configuring.lock();
        self.reap();
        self.claims.lock().apply(Command::CloseList { id, now: clock::since_boot() })?;
        self.store_or(&mut next, 0, caller, || Command::OpenList(id))?;
        self.claims.lock().apply(Command::RemoveList(id))?;
        self.forget(&[id.0, id.tasks_node()]);
        self.update_daemon_affinity();
        reached(Step::ConfigApplied);
        Ok(())
    }

    /// One write to `exclusive`. `opener`: the user who opened the file.
    ///
    /// # Errors
    /// Not root, neither 0 nor 1, a list that holds several tasks, it cannot be stored.
    pub(crate) fn set_exclusive(
        &self,
        caller: Caller,
        opener: u32,
        pool: PoolId,
        bytes: &[u8],
    ) -> Result<(), Refusal> {
        must_be_root(caller.uid)?;
        must_be_root(opener)?;
        let exclusivity = match bytes.trim_ascii() {
            b"0" => Exclusivity::Shared,
            b"1" => Exclusivity::Exclusive,
            _ => return Err(Refusal::NoFlag),
        };
        let mut next = self.configuring.lock();
        self.reap();
        let was = {
            let mut claims = self.claims.lock();
            let was = claims.pool(pool).ok_or(Refusal::Removed)?.exclusivity();
            claims.apply(Command::SetExclusivity { pool, exclusivity })?;
            was
        };
        if was == exclusivity {
            return Ok(());
        }
        self.store_or(&mut next, 0, caller, || Command::SetExclusivity { pool, exclusivity: was })?;
        self.update_daemon_affinity();
        reached(Step::ConfigApplied);
        Ok(())
    }

    /// Owner and mode of a node, if they were changed.
    pub(crate) fn attributes(&self, node: u64) -> Option<Attributes> {
        self.attributes.read().get(&node).copied()
    }

    /// Sets owner and mode of a node. The kernel has checked that the caller may.
    ///
    /// # Errors
    /// It cannot be stored.
    pub(crate) fn set_attributes(
        &self,
        caller: Caller,
        node: u64,
        attributes: Attributes,
    ) -> Result<(), Refusal> {
        let mut next = self.configuring.lock();
        let was = self.attributes.write().insert(node, attributes);
        self.store(&mut next, 0, caller).inspect_err(|_| {
            let mut attributes = self.attributes.write();
            match was {
                Some(was) => attributes.insert(node, was),
                None => attributes.remove(&node),
            };
        })?;
        reached(Step::ConfigApplied);
        Ok(())
    }

    /// The nodes are gone for good.
    fn forget(&self, nodes: &[u64]) {
        self.attributes.write().retain(|node, _| !nodes.contains(node));
        self.shown.lock().retain(|node, _| !nodes.contains(node));
        self.changes.removed(nodes);
    }

    /// Stores the configuration; where that fails the change is taken back by `otherwise`.
    fn store_or(
        &self,
        next: &mut u64,
        nodes: u64,
        caller: Caller,
        otherwise: impl FnOnce() -> Command,
    ) -> Result<(), Refusal> {
        self.store(next, nodes, caller).inspect_err(|_| {
            if let Err(error) = self.claims.lock().apply(otherwise()) {
                log::error!("a change that could not be stored could not be taken back: {error:?}");
            }
        })
    }

    /// Stores the configuration with `nodes` more node ids given out, and that the caller's request is carried
    /// out.
    fn store(&self, next: &mut u64, nodes: u64, caller: Caller) -> Result<(), Refusal> {
        reached(Step::ConfigDecided);
        // Also where it is not stored: the new node may have been seen.
        *next += nodes;
        let last =
            (caller.request != 0).then(|| LastRequest { mount: self.state.mount(), request: caller.request });
        let config = self.config(*next, last);
        self.state.store_config(&config).map_err(|error| Refusal::CannotStore {
            errno: Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
        })?;
        reached(Step::ConfigStored);
        // The configuration names one request; this one may still be unanswered when the next one is named.
        if let Some(answered) = answered(caller.request) {
            self.record_if_possible(answered);
        }
        Ok(())
    }

    /// What the state directory has to remember. A list that is being removed is no longer in it, one that is
    /// being made is already.
    fn config(&self, next_node: u64, last: Option<LastRequest>) -> Config {
        let attributes = self.attributes.read();
        let attributes =
            attributes.iter().map(|(&node, a)| NodeAttributes { node, uid: a.uid, gid: a.gid, mode: a.mode });
        let mut attributes: Vec<NodeAttributes> = attributes.collect();
        attributes.sort_by_key(|attributes| attributes.node);
        let claims = self.claims.lock();
        let pools = claims.pools().map(|(id, pool)| PoolConfig {
            name: pool.name().clone(),
            exclusivity: pool.exclusivity(),
            node: id.0,
            lists: pool
                .lists()
                .filter_map(|id| Some((id, claims.list(id)?)))
                .filter(|(_, list)| !list.is_being_removed())
                .map(|(id, list)| ListConfig {
                    id,
                    name: list.name().cpus.clone(),
                    cpus: list.cpus().clone(),
                })
                .collect(),
        });
        Config { pools: pools.collect(), attributes, next_node, last }
    }

    /// Takes up what the state directory remembers.
    pub(super) fn recover(&self, recovered: Recovered) {
        let Recovered { config, claims: recorded, intents, releasing, suspect, .. } = recovered;
        {
            let mut claims = self.claims.lock();
            for pool in config.pools {
                restore_pool(&mut claims, pool);
            }
        }
        let known = |node: u64| node < config.next_node;
        self.attributes.write().extend(
            config
                .attributes
                .into_iter()
                .filter(|a| known(a.node))
                .map(|a| (a.node, Attributes { uid: a.uid, gid: a.gid, mode: a.mode })),
        );
        let dead: Vec<TaskId> =
            recorded.into_iter().filter_map(|claim| self.recover_claim(claim, suspect)).collect();
        self.reap_all(&dead);
        for claim in releasing {
            self.roll_back(&claim, &claim.saved.clone());
            self.record_or_owe(Record::Released { task: claim.task });
        }
        for intent in intents {
            self.roll_back_intent(&intent);
        }
        self.reap();
    }

    /// A recorded claim is in force again; also that of a task that has died meanwhile, so that its heirs are
    /// looked for: it is watched where its parent has not collected it, and given back otherwise.
    fn recover_claim(&self, claim: Arc<Claim>, suspect: bool) -> Option<TaskId> {
        let task = claim.task;
        let process = self.processes.find(task).ok().flatten();
        let claim = match &process {
            Some(process) => self.upgrade_claim(claim, process),
            None => claim,
        };
        if process.as_ref().is_some_and(Process::is_alive) && !self.mask_confirms(&claim, suspect) {
            log::warn!("the claim of {task} is dropped: its mask does not confirm it", task = task.pid);
            self.record_or_owe(Record::Ended { task, reclaimed: None });
            return None;
        }
        let mut claims = self.claims.lock();
        if let Err(refusal) = claims.apply(Command::Restore(claim)) {
            log::warn!("the claim of {} is dropped: {}", task.pid, refusal.sentence("another task"));
            self.record_or_owe(Record::Ended { task, reclaimed: None });
            return None;
        }
        match process.map(|process| self.watch.add(Arc::new(process))) {
            None => Some(task),
            Some(Ok(())) => None,
            Some(Err(error)) => {
                log::warn!("the claim of {} is dropped: it cannot be watched: {error}", task.pid);
                let _ = claims.apply(Command::End { task, heir: None });
                self.record_or_owe(Record::Ended { task, reclaimed: None });
                None
            }
        }
    }

    /// Returns the claim with the number of its cgroup as this version records it.
    fn upgrade_claim(&self, claim: Arc<Claim>, process: &Process) -> Arc<Claim> {
        let cgroup = self.processes.upgrade_cgroup(process, claim.cgroup);
        if cgroup == claim.cgroup { claim } else { Arc::new(Claim { cgroup, ..Claim::clone(&claim) }) }
    }

    /// Where the log or the kernel leaves a doubt about a claim, the mask of its task has to confirm it.
    fn mask_confirms(&self, claim: &Claim, suspect: bool) -> bool {
        if !suspect && self.processes.tells_reused_pids() {
            return true;
        }
        let cpus = self.claims.lock().list(claim.list).map(|list| list.cpus().clone());
        let mask = self.processes.leader_mask(claim.task.pid);
        matches!((cpus, mask), (Some(cpus), Ok(mask)) if mask.is_subset(&cpus))
    }

    /// An intent that never became a claim: the task gets back what it had, which is its old list where it was
    /// moving.
    fn roll_back_intent(&self, intent: &Claim) {
        let old = {
            let claims = self.claims.lock();
            claims.claim(&intent.task).and_then(|old| claims.list(old.list)).map(|list| list.cpus().clone())
        };
        self.roll_back(intent, &old.map_or_else(|| self.probe_saved_mask(intent), SavedMask::Cpus));
        self.record_or_owe(Record::Abandoned { task: intent.task });
    }

    /// The saved mask of an intent, which was recorded before the task was touched: whether it was all that the
    /// task's cpuset allowed is only found out now.
    fn probe_saved_mask(&self, intent: &Claim) -> SavedMask {
        let process = self.processes.find(intent.task).ok().flatten();
        let refined = process.and_then(|it| self.processes.probe_saved_mask(&it, intent.saved.clone()).ok());
        refined.unwrap_or_else(|| intent.saved.clone())
    }

    fn roll_back(&self, claim: &Claim, mask: &SavedMask) {
        let process = self.processes.open(claim.task.pid).ok().flatten();
        if let Some(process) = process.filter(|process| process.id() == claim.task) {
            self.processes.restore_mask(&process, mask, BlockedWriter::NONE);
        }
    }
}

fn restore_pool(claims: &mut Claims, pool: PoolConfig) {
    let id = PoolId(pool.node);
    let name = pool.name.clone();
    let restore = || {
        claims.apply(Command::AddPool { id, name: pool.name, exclusivity: pool.exclusivity })?;
        for list in pool.lists {
            claims.apply(Command::AddList { pool: id, id: list.id, name: list.name, cpus: list.cpus })?;
            claims.apply(Command::OpenList(list.id))?;
        }
        Ok::<(), Refusal>(())
    };
    if let Err(refusal) = restore() {
        log::warn!("a part of pool {name} is dropped: {}", refusal.sentence("a task"));
    }
}

fn must_be_root(uid: u32) -> Result<(), Refusal> {
    if uid == 0 { Ok(()) } else { Err(Refusal::NotRoot) }
}
