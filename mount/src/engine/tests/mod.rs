//! The engine on fakes: order, undo, crashes, concurrency. Runs without root.
//!
//! Owns the [`Bed`], an engine with two pools on a fake machine. After every step of every test it checks that the
//! engine does no I/O under a lock that reads need.

mod apply;
mod configure;
mod crash;
mod displaced;
pub(crate) mod fakes;
mod faults;
mod heirs;
mod isolate;
mod order;
mod reads;
mod rename;
mod retry;
mod shares;
mod time;
mod transient;

use std::sync::{Arc, Weak};

use fakes::{Fake, ONLINE, Snapshot, Step, World, cpus, task};

use super::{Caller, Engine, OwnProcesses, Refused};
use crate::model::command::Target;
use crate::model::cpuset::CpuSet;
use crate::model::pool::{ListId, PoolId};
use crate::model::topology::{Cpu, Topology};

/// The exclusive pool, with the lists `1` and `2-3`.
pub(crate) const EXCL: PoolId = PoolId(64);
pub(crate) const EXCL_1: ListId = ListId(68);
pub(crate) const EXCL_23: ListId = ListId(72);
/// The shared pool, with the list `4-5`.
pub(crate) const SHARED: PoolId = PoolId(76);
pub(crate) const SHARED_45: ListId = ListId(80);

/// An engine on a fake machine.
pub(crate) struct Bed {
    pub(crate) world: Arc<World>,
    pub(crate) engine: Arc<Engine<Fake>>,
}

impl Bed {
    /// With both pools.
    pub(crate) fn new() -> Self {
        let bed = Self::start(World::new());
        let root = caller(0, 0);
        let engine = &bed.engine;
        assert_eq!(engine.add_pool(root, "excl").unwrap(), EXCL);
        assert_eq!(engine.add_list(root, EXCL, "1").unwrap(), EXCL_1);
        assert_eq!(engine.add_list(root, EXCL, "2-3").unwrap(), EXCL_23);
        engine.set_exclusive(root, 0.into(), EXCL, b"1").unwrap();
        assert_eq!(engine.add_pool(root, "shared").unwrap(), SHARED);
        assert_eq!(engine.add_list(root, SHARED, "4-5").unwrap(), SHARED_45);
        bed.world.take_steps();
        bed.world.take_snapshots();
        bed
    }

    /// After the death of the daemon at this snapshot.
    pub(crate) fn after_crash(snapshot: &Snapshot) -> Self {
        Self::start(World::after_crash(snapshot))
    }

    fn start(world: Arc<World>) -> Self {
        let recovered = world.snapshot().recovered();
        let (engine, _) =
            Engine::with_ports(world.ports(), recovered, topology(), OwnProcesses::default()).unwrap();
        let bed = Self { world, engine: Arc::new(engine) };
        bed.check_locks_at_each_step();
        bed
    }

    /// Replaces the hook of the world by the check of locks.
    pub(crate) fn check_locks_at_each_step(&self) {
        let engine = Arc::downgrade(&self.engine);
        self.world.on_step(move |step, _| check_locks(&engine, step));
    }

    /// Calls `hook` at every step, after the check of locks.
    pub(crate) fn on_step(&self, mut hook: impl FnMut(&Step, &World) + Send + 'static) {
        let engine = Arc::downgrade(&self.engine);
        self.world.on_step(move |step, world| {
            check_locks(&engine, step);
            hook(step, world);
        });
    }

    /// Writes `data` to a `tasks` file, as root and as the process `writer`.
    pub(crate) fn write(&self, target: Target, writer: u32, data: &str) -> Result<(), Refused> {
        self.engine.write_tasks(target, caller(writer, 0), 0.into(), data.as_bytes(), false)
    }

    /// The PIDs on a list, as a reader sees them.
    pub(crate) fn tasks(&self, list: ListId) -> String {
        let shown = self.engine.show_list_tasks(list);
        String::from_utf8(shown.to_vec()).unwrap().trim_end().to_owned()
    }

    /// Each claim as PID, list, and CPUs of the list; without looking for deaths.
    pub(crate) fn claims(&self) -> Vec<(u32, ListId)> {
        let claims = self.engine.configuration();
        let mut found: Vec<(u32, ListId)> = claims.claims().map(|c| (c.task.pid.get(), c.list)).collect();
        found.sort_unstable();
        found
    }

    /// The claims that the next worker would find, and how many intents and unfinished releases.
    pub(crate) fn recorded(&self) -> (Vec<(u32, ListId)>, usize) {
        self.world.flush();
        let recovered = self.world.snapshot().recovered();
        let mut claims: Vec<(u32, ListId)> =
            recovered.claims.iter().map(|claim| (claim.task.pid.get(), claim.list)).collect();
        claims.sort_unstable();
        (claims, recovered.intents.len() + recovered.releasing.len())
    }

    /// The journal says the same as the claims, nothing is in flight, and every exclusive list has one live task.
    pub(crate) fn check_consistency(&self) {
        self.check_consistency_except(|_| false);
    }

    /// The same, without the masks of the tasks for which `has_lost_its_release` is true.
    pub(crate) fn check_consistency_except(&self, has_lost_its_release: impl Fn(u32) -> bool) {
        self.engine.reap_all();
        assert_eq!(self.recorded(), (self.claims(), 0), "{:#?}", self.world.records());
        for (pid, list) in self.claims() {
            assert!(!self.engine.configuration().is_in_flight(&task(pid)));
            assert!(self.world.is_alive(pid), "{pid} is dead");
            for mask in self.world.task(pid).masks {
                let cpus = self.engine.configuration().list(list).unwrap().cpus().clone();
                let is_right = mask.is_subset(&cpus) || has_lost_its_release(pid);
                assert!(is_right, "{pid} runs on {mask}");
            }
        }
        for list in [EXCL_1, EXCL_23] {
            let tasks = self.claims().into_iter().filter(|(_, it)| *it == list).count();
            assert!(tasks <= 1, "{tasks} tasks on {list:?}");
        }
    }
}

/// No thread does I/O under a lock that a read needs.
fn check_locks(engine: &Weak<Engine<Fake>>, step: &Step) {
    let Some(engine) = engine.upgrade() else { return };
    let is_io = matches!(step, Step::Append(_) | Step::Flush | Step::Store);
    let on_process = matches!(step, Step::SetMask(..) | Step::UndoMask(_) | Step::RestoreMask(_));
    let on_cgroups =
        matches!(step, Step::MakePartition(_) | Step::EnterPartition(_) | Step::TakeBackPartition(_));
    if is_io || on_process || on_cgroups || *step == Step::Scan {
        assert!(!engine.claims.is_locked(), "{step:?} under the lock of the claims");
    }
    if is_io || *step == Step::Scan {
        assert!(!engine.reaping.is_locked(), "{step:?} under `reaping`");
        assert!(!engine.events.is_locked(), "{step:?} under `events`");
        assert!(!engine.refusals.is_locked(), "{step:?} under `refusals`");
        assert!(!engine.shown.is_locked(), "{step:?} under `shown`");
        assert!(!engine.attributes.is_locked(), "{step:?} under `attributes`");
    }
}

/// The PID of a process of root that writes.
pub(crate) const SHELL: u32 = 900;

pub(crate) fn caller(pid: u32, uid: u32) -> Caller {
    Caller { tid: pid, uid, request: 0 }
}

pub(crate) fn topology() -> Topology {
    let cpu = |id| Cpu { id, core: None, socket: Some(0), node: None, online: true, isolated: false };
    Topology::new(cpus(ONLINE).iter().map(cpu).collect())
}
