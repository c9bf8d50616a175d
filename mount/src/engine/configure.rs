//! Changes to pools, lists, flags, owners and modes: decided, stored durably, then applied.
//!
//! Owns the order of such a change. Nobody sees a change, and no claim is granted by it, before it is stored: the
//! next worker may find it or not. A list that goes, and room on a list that becomes exclusive, are reserved while
//! the change is stored, so that no claim is granted that the stored configuration forbids. Does not know which
//! change is allowed: the claim machine does.
//!
//! Longer than 400 lines because all kinds of changes are made in the same order, and are read together.

use std::collections::HashMap;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use parking_lot::{Mutex, MutexGuard};

use super::ports::{Clock, Journal as _, Partitions as _, Ports};
use super::replay::answered;
use super::{CONFIG, Caller, Engine};
use crate::failpoint::{Step, reached};
use crate::journal::{Config, LastRequest, ListConfig, NodeAttributes, PoolConfig};
use crate::model::claims::{Claims, Pool};
use crate::model::command::Command;
use crate::model::cpuset::CpuSet;
use crate::model::pool::{Exclusivity, ListId, Mode, PoolId, PoolName};
use crate::model::refusal::Refusal;
use crate::model::rights::User;
use crate::model::task::before_nul;

/// The distance of node ids: a pool has four nodes, a list three.
pub(crate) const NODES_EACH: u64 = 4;
/// The distance of a pool's fifth node. No node of another pool or list is as far away.
pub(crate) const MODE_OFFSET: u64 = 1 << 62;
/// How long a change waits for another change to be stored before it is refused. A store takes a few fsyncs, each
/// of which may take a second on a busy disk; longer means that the disk does not answer.
const CONFIGURE_TIMEOUT: Duration = Duration::from_secs(5);

/// Owner and mode of a node, if they were changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Attributes {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// The permission bits.
    pub(crate) mode: u16,
}

/// The lock of the configuration, which is held while a change is stored.
#[derive(Debug)]
pub(super) struct Configuring {
    /// The next node id.
    next_node: Mutex<u64>,
    /// Since when the lock has been held, in nanoseconds since boot; 0 if it is free.
    since: AtomicU64,
}

/// The locked configuration; dereferences to the next node id.
pub(super) struct ConfiguringGuard<'a> {
    next_node: MutexGuard<'a, u64>,
    since: &'a AtomicU64,
}

impl Configuring {
    pub(super) fn new(next_node: u64) -> Self {
        Self { next_node: Mutex::new(next_node), since: AtomicU64::new(0) }
    }

    /// Locks the configuration, unless another change has held it for [`CONFIGURE_TIMEOUT`]: changes must not
    /// queue up behind a disk that does not answer, and occupy every thread.
    pub(super) fn lock(&self, clock: &impl Clock) -> Result<ConfiguringGuard<'_>, Refusal> {
        let held = match self.since.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            since => Duration::from_nanos(clock.since_boot().saturating_sub(since)),
        };
        let timeout = CONFIGURE_TIMEOUT.saturating_sub(held);
        let next_node = self.next_node.try_lock_for(timeout).ok_or(Refusal::DiskStalled)?;
        self.since.store(clock.since_boot().max(1), Ordering::Relaxed);
        Ok(ConfiguringGuard { next_node, since: &self.since })
    }
}

impl Drop for ConfiguringGuard<'_> {
    fn drop(&mut self) {
        self.since.store(0, Ordering::Relaxed);
    }
}

impl Deref for ConfiguringGuard<'_> {
    type Target = u64;

    fn deref(&self) -> &u64 {
        &self.next_node
    }
}

impl DerefMut for ConfiguringGuard<'_> {
    fn deref_mut(&mut self) -> &mut u64 {
        &mut self.next_node
    }
}

impl<P: Ports> Engine<P> {
    /// Adds a pool.
    ///
    /// # Errors
    /// `EPERM` if the caller lacks the capability; `EINVAL` for an invalid name; `EEXIST`; or it cannot be stored.
    pub(crate) fn add_pool(&self, caller: Caller, name: &str) -> Result<PoolId, Refusal> {
        self.require_admin(caller)?;
        let name: PoolName = name.parse().map_err(Refusal::BadPoolName)?;
        let mut next = self.configuring.lock(&self.clock)?;
        let id = PoolId(*next);
        let add = Command::AddPool { id, name, exclusivity: Exclusivity::Shared };
        self.store_and_apply(&mut next, NODES_EACH, caller, &[add])?;
        reached(Step::ConfigApplied);
        Ok(id)
    }

    /// Adds a CPU list.
    ///
    /// # Errors
    /// `EPERM` if the caller lacks the capability; `EINVAL` for an invalid list or unknown CPUs; `EBUSY` if it overlaps
    /// another list; `EEXIST`; or it cannot be stored.
    pub(crate) fn add_list(&self, caller: Caller, pool: PoolId, name: &str) -> Result<ListId, Refusal> {
        self.require_admin(caller)?;
        let cpus = self.known_cpus(name)?;
        let mut next = self.configuring.lock(&self.clock)?;
        let id = ListId(*next);
        let add = Command::AddList { pool, id, name: name.to_owned(), cpus };
        self.store_and_apply(&mut next, NODES_EACH, caller, &[add, Command::OpenList(id)])?;
        self.update_daemon_affinity();
        reached(Step::ConfigApplied);
        Ok(id)
    }

    /// Returns the CPUs of a list with this name.
    ///
    /// # Errors
    /// There can be no such list on this machine.
    pub(super) fn known_cpus(&self, name: &str) -> Result<CpuSet, Refusal> {
        let cpus = CpuSet::from_name(name).map_err(Refusal::BadCpuList)?;
        self.check_known(&cpus).map(|()| cpus)
    }

    /// # Errors
    /// The machine does not have all of these CPUs.
    pub(super) fn check_known(&self, cpus: &CpuSet) -> Result<(), Refusal> {
        let known = self.topology.get().cpus();
        let unknown = cpus.difference(&known);
        if unknown.is_empty() { Ok(()) } else { Err(Refusal::UnknownCpus { unknown, known }) }
    }

    /// Removes a pool.
    ///
    /// # Errors
    /// `EPERM` if the caller lacks the capability; `ENOTEMPTY` if it has lists; or the change cannot be stored.
    pub(crate) fn remove_pool(&self, caller: Caller, id: PoolId) -> Result<(), Refusal> {
        self.require_admin(caller)?;
        let mut next = self.configuring.lock(&self.clock)?;
        self.store_and_apply(&mut next, 0, caller, &[Command::RemovePool(id)])?;
        self.remove_queue(id);
        self.forget(&id.nodes());
        reached(Step::ConfigApplied);
        Ok(())
    }

    /// Removes a CPU list without tasks.
    ///
    /// # Errors
    /// `EPERM` if the caller lacks the capability; `EBUSY` if it has live tasks; or the change cannot be stored.
    pub(crate) fn remove_list(&self, caller: Caller, id: ListId) -> Result<(), Refusal> {
        self.require_admin(caller)?;
        let mut next = self.configuring.lock(&self.clock)?;
        let now = self.clock.since_boot();
        self.live_claims().apply(Command::CloseList { id, force: false, now })?;
        self.store_and_apply(&mut next, 0, caller, &[Command::RemoveList(id)])
            .inspect_err(|_| self.apply_stored(&[Command::OpenList(id)]))?;
        self.forget(&id.nodes());
        self.update_daemon_affinity();
        reached(Step::ConfigApplied);
        Ok(())
    }

    /// Carries out one write to `exclusive`. `opener` is the user who opened the file.
    ///
    /// # Errors
    /// `EPERM` if caller or opener lacks the capability; `EINVAL` for anything but 0 and 1; `EBUSY` if a list has several
    /// tasks; or the change cannot be stored.
    pub(crate) fn set_exclusive(
        &self,
        caller: Caller,
        opener: User,
        pool: PoolId,
        data: &[u8],
    ) -> Result<(), Refusal> {
        let exclusivity =
            if self.new_flag(caller, opener, data)? { Exclusivity::Exclusive } else { Exclusivity::Shared };
        let mut next = self.configuring.lock(&self.clock)?;
        {
            let mut claims = self.live_claims();
            if claims.pool(pool).ok_or(Refusal::Removed)?.exclusivity() == exclusivity {
                return Ok(());
            }
            claims.apply(Command::PrepareExclusivity { pool, exclusivity })?;
        }
        self.store_and_apply(&mut next, 0, caller, &[Command::SetExclusivity { pool, exclusivity }])
            .inspect_err(|_| self.apply_stored(&[Command::CancelExclusivity(pool)]))?;
        self.update_daemon_affinity();
        reached(Step::ConfigApplied);
        Ok(())
    }

    /// Carries out one write to `partial`. `opener` is the user who opened the file.
    ///
    /// # Errors
    /// `EPERM` if caller or opener lacks the capability; `EINVAL` for anything but 0 and 1; or the change cannot be
    /// stored.
    pub(crate) fn set_partial(
        &self,
        caller: Caller,
        opener: User,
        pool: PoolId,
        data: &[u8],
    ) -> Result<(), Refusal> {
        let change = |partial| Command::SetPartial { pool, partial };
        self.set_flag(caller, opener, data, pool, Pool::is_partial, change)
    }

    /// Carries out one write to `transient`. `opener` is the user who opened the file.
    ///
    /// # Errors
    /// As for [`Engine::set_partial`].
    pub(crate) fn set_transient(
        &self,
        caller: Caller,
        opener: User,
        pool: PoolId,
        data: &[u8],
    ) -> Result<(), Refusal> {
        let change = |transient| Command::SetTransient { pool, transient };
        self.set_flag(caller, opener, data, pool, Pool::is_transient, change)
    }

    /// Carries out one write to a flag of a pool that has no effect on its tasks: `is` returns its value, and `change` changes
    /// it.
    fn set_flag(
        &self,
        caller: Caller,
        opener: User,
        data: &[u8],
        pool: PoolId,
        is: impl Fn(&Pool) -> bool,
        change: impl Fn(bool) -> Command,
    ) -> Result<(), Refusal> {
        let value = self.new_flag(caller, opener, data)?;
        let mut next = self.configuring.lock(&self.clock)?;
        if is(self.configuration().pool(pool).ok_or(Refusal::Removed)?) != value {
            self.store_and_apply(&mut next, 0, caller, &[change(value)])?;
            reached(Step::ConfigApplied);
        }
        Ok(())
    }

    /// Carries out one write to `mode`. `opener` is the user who opened the file.
    ///
    /// # Errors
    /// `EPERM` if caller or opener lacks the capability; `EINVAL` for another word, or if a shared pool is to be isolated;
    /// `EOPNOTSUPP` if this machine cannot isolate CPUs; `EBUSY` if the pool has tasks; or the change cannot be stored.
    pub(crate) fn set_mode(
        &self,
        caller: Caller,
        opener: User,
        pool: PoolId,
        data: &[u8],
    ) -> Result<(), Refusal> {
        self.require_admins(caller, opener)?;
        let mode = match before_nul(data).trim_ascii() {
            b"affinity" => Mode::Affinity,
            b"isolated" => Mode::Isolated,
            _ => return Err(Refusal::NotAMode),
        };
        let mut next = self.configuring.lock(&self.clock)?;
        if self.configuration().pool(pool).ok_or(Refusal::Removed)?.mode() == mode {
            return Ok(());
        }
        let now = self.clock.since_boot();
        self.live_claims().apply(Command::PrepareMode { pool, mode, now })?;
        let missing = if mode == Mode::Isolated { self.partitions.missing() } else { None };
        let stored = missing
            .map_or(Ok(()), |missing| Err(Refusal::CannotIsolate { missing }))
            .and_then(|()| self.store_and_apply(&mut next, 0, caller, &[Command::SetMode { pool, mode }]))
            .inspect_err(|_| self.apply_stored(&[Command::CancelMode(pool)]));
        // Claims wait for it.
        self.plan_finished.notify_all();
        stored?;
        reached(Step::ConfigApplied);
        Ok(())
    }

    /// Carries out one write to `state` of a list: whether it takes new tasks. `opener` is the user who opened the file.
    ///
    /// # Errors
    /// `EPERM` if caller or opener lacks the capability; `EINVAL` for another word; or the change cannot be stored.
    pub(crate) fn set_state(
        &self,
        caller: Caller,
        opener: User,
        list: ListId,
        data: &[u8],
    ) -> Result<(), Refusal> {
        self.require_admins(caller, opener)?;
        let draining = match before_nul(data).trim_ascii() {
            b"drain" => true,
            b"undrain" => false,
            _ => return Err(Refusal::NotAStateChange),
        };
        let mut next = self.configuring.lock(&self.clock)?;
        if self.configuration().list(list).ok_or(Refusal::Removed)?.is_draining() != draining {
            self.store_and_apply(&mut next, 0, caller, &[Command::SetDraining { list, draining }])?;
            self.files_changed(&self.configuration(), list);
            reached(Step::ConfigApplied);
        }
        Ok(())
    }

    /// Returns the value that a write to a flag of a pool sets: 0 or 1.
    fn new_flag(&self, caller: Caller, opener: User, data: &[u8]) -> Result<bool, Refusal> {
        self.require_admins(caller, opener)?;
        match before_nul(data).trim_ascii() {
            b"0" => Ok(false),
            b"1" => Ok(true),
            _ => Err(Refusal::NotAFlag),
        }
    }

    /// Returns owner and mode of a node, if they were changed.
    pub(crate) fn attributes(&self, node: u64) -> Option<Attributes> {
        self.attributes.read().get(&node).copied()
    }

    /// Sets owner and mode of a node. The kernel has checked that the caller owns the node or may change nodes of
    /// others.
    ///
    /// # Errors
    /// `EPERM` if the caller lacks the capability, or they cannot be stored.
    pub(crate) fn set_attributes(
        &self,
        caller: Caller,
        node: u64,
        attributes: Attributes,
    ) -> Result<(), Refusal> {
        self.require_admin(caller)?;
        let mut next = self.configuring.lock(&self.clock)?;
        let mut all = self.attributes.read().clone();
        all.insert(node, attributes);
        let pools = self.configuration().preview(&[])?;
        self.store(&mut next, 0, caller, &pools, &all, Vec::new())?;
        self.attributes.write().insert(node, attributes);
        self.changes.changed([CONFIG]);
        reached(Step::ConfigApplied);
        Ok(())
    }

    /// Forgets removed nodes.
    pub(super) fn forget(&self, nodes: &[u64]) {
        self.attributes.write().retain(|node, _| !nodes.contains(node));
        self.shown.lock().retain(|node, _| !nodes.contains(node));
        self.changes.removed(nodes);
    }

    /// Stores the configuration as it is after these changes, and then applies them.
    pub(super) fn store_and_apply(
        &self,
        next: &mut u64,
        nodes: u64,
        caller: Caller,
        changes: &[Command],
    ) -> Result<(), Refusal> {
        let after = self.configuration().preview(changes)?;
        let attributes = self.attributes.read().clone();
        self.store(next, nodes, caller, &after, &attributes, Vec::new())?;
        self.apply_stored(changes);
        self.changes.changed([CONFIG]);
        self.transient.wake();
        self.wake_queues();
        Ok(())
    }

    /// Applies changes that cannot be refused: they were decided under the lock of the configuration, and what they
    /// need is reserved.
    pub(super) fn apply_stored(&self, changes: &[Command]) {
        let mut claims = self.claims.lock();
        for change in changes {
            if let Err(rejected) = claims.apply(change.clone()) {
                log::error!("a change that was stored is refused: {change:?}: {rejected:?}");
            }
        }
    }

    /// Stores the configuration, in which `nodes` more node ids are used, and the fact that the caller's request
    /// has been carried out. `stale`: the paths that the kernel has to look at after that.
    pub(super) fn store(
        &self,
        next: &mut u64,
        nodes: u64,
        caller: Caller,
        after: &Claims,
        attributes: &HashMap<u64, Attributes>,
        stale: Vec<String>,
    ) -> Result<(), Refusal> {
        reached(Step::ConfigDecided);
        // Even if storing fails: the file may hold the new number.
        *next += nodes;
        let last = (caller.request != 0)
            .then(|| LastRequest { mount: self.journal.mount(), request: caller.request });
        let config =
            Config { pools: pools_of(after), attributes: sorted(attributes), next_node: *next, last, stale };
        self.journal.store_config(&config).map_err(|error| Refusal::CannotStore {
            errno: Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
        })?;
        reached(Step::ConfigStored);
        // The configuration names one request only, which may still be unanswered when it names the next one.
        if let Some(answered) = answered(caller.request) {
            self.append_if_possible(&answered);
        }
        Ok(())
    }
}

/// Returns the pools and lists as they are stored.
fn pools_of(claims: &Claims) -> Vec<PoolConfig> {
    let list = |id: ListId| {
        let list = claims.list(id)?;
        let (name, cpus) = (list.name().cpus.clone(), list.cpus().clone());
        Some(ListConfig { id, name, cpus, draining: list.is_draining() })
    };
    let pool = |(id, pool): (PoolId, &Pool)| PoolConfig {
        name: pool.name().clone(),
        exclusivity: pool.exclusivity(),
        partial: pool.is_partial(),
        mode: pool.mode(),
        transient: pool.is_transient(),
        node: id.0,
        lists: pool.lists().filter_map(list).collect(),
    };
    claims.pools().map(pool).collect()
}

/// Returns owners and modes as they are stored.
fn sorted(attributes: &HashMap<u64, Attributes>) -> Vec<NodeAttributes> {
    let stored =
        |(&node, a): (&u64, &Attributes)| NodeAttributes { node, uid: a.uid, gid: a.gid, mode: a.mode };
    let mut all: Vec<NodeAttributes> = attributes.iter().map(stored).collect();
    all.sort_by_key(|attributes| attributes.node);
    all
}
