//! The daemon is killed at random moments while several clients claim, move, release and configure: everything
//! acknowledged is there after the restart, and an exclusive list never has two tasks.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, RwLock};
use std::time::Duration;

use crate::harness::{Machine, Mount, Sleeper, masks, until};
use nix::errno::Errno;
use nix::sys::signal::Signal;

/// The kills during the load. Every third one kills both processes of the daemon, the others kill the worker.
const KILLS: usize = 24;
const LISTS: [(&str, &str); 2] = [("excl", "0"), ("shared", "1")];

/// Pseudo-random numbers (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// The possible states, as far as its one client knows: more than one if an answer is missing.
#[derive(Debug, Default)]
struct Known<T>(BTreeSet<T>);

impl<T: Ord + Copy + std::fmt::Debug> Known<T> {
    fn is(value: T) -> Self {
        Self([value].into())
    }

    fn learn(&mut self, result: &io::Result<()>, value: T) {
        match result {
            Ok(()) => *self = Self::is(value),
            // It was refused and nothing has happened.
            Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32) => {}
            Err(_) => {
                self.0.insert(value);
            }
        }
    }

    fn check(&mut self, value: T, what: &str) {
        assert!(self.0.contains(&value), "{what} is {value:?}, should be one of {:?}", self.0);
        *self = Self::is(value);
    }
}

/// A task that one client claims, moves and releases, and its list, an index of [`LISTS`].
struct Claimed {
    task: Sleeper,
    list: Known<Option<usize>>,
}

struct World {
    mount: Mount,
    machine: Machine,
    tasks: Vec<Mutex<Claimed>>,
    /// Whether the list `shared 2-3` is there.
    configured: Mutex<Known<bool>>,
    /// Clients hold it for reading during an operation, the checker for writing while it compares everything.
    gate: RwLock<()>,
    is_over: AtomicBool,
    acknowledged: Mutex<u64>,
}

impl World {
    fn claim_and_release(&self, number: usize) {
        let mut random = Random(number as u64 + 1);
        while !self.is_over.load(Ordering::Relaxed) {
            let _gate = self.gate.read().unwrap();
            let Claimed { task, list } = &mut *self.tasks[number].lock().unwrap();
            let result = match random.below(3) {
                choice @ 0..2 => {
                    let (pool, cpus) = LISTS[choice as usize];
                    let result = write(&self.mount, pool, cpus, &task.pid().to_string());
                    list.learn(&result, Some(choice as usize));
                    result
                }
                _ => {
                    let on = list.0.iter().next().copied().flatten().unwrap_or(0);
                    let (pool, cpus) = LISTS[on];
                    let result = write(&self.mount, pool, cpus, &format!("-{}", task.pid()));
                    if list.0.iter().all(|list| list.is_none_or(|list| list == on)) {
                        list.learn(&result, None);
                    } else {
                        // If the task may be elsewhere, a release here shows nothing.
                        list.0.insert(None);
                    }
                    result
                }
            };
            *self.acknowledged.lock().unwrap() += u64::from(result.is_ok());
        }
    }

    fn configure(&self) {
        let list = self.mount.pool("shared").join("2-3");
        while !self.is_over.load(Ordering::Relaxed) {
            let _gate = self.gate.read().unwrap();
            let mut there = self.configured.lock().unwrap();
            let make = there.0.contains(&false);
            let result = if make { fs::create_dir(&list) } else { fs::remove_dir(&list) };
            there.learn(&result, make);
            *self.acknowledged.lock().unwrap() += u64::from(result.is_ok());
        }
    }

    /// No operation is in flight: everything must be as acknowledged.
    fn check(&self) {
        let _gate = self.gate.write().unwrap();
        let there = self.mount.pool("shared").join("2-3").exists();
        self.configured.lock().unwrap().check(there, "shared 2-3");
        let lists = LISTS.map(|(pool, list)| {
            let text = fs::read_to_string(self.mount.tasks(pool, list)).unwrap();
            text.trim().split(',').filter_map(|pid| pid.parse::<u32>().ok()).collect::<Vec<u32>>()
        });
        assert!(lists[0].len() <= 1, "{lists:?}");
        for claimed in &self.tasks {
            let Claimed { task, list } = &mut *claimed.lock().unwrap();
            let on: Vec<usize> = (0..LISTS.len()).filter(|&list| lists[list].contains(&task.pid())).collect();
            assert!(on.len() <= 1, "{lists:?}");
            let on = on.first().copied();
            list.check(on, &format!("the list of {}", task.pid()));
            assert_eq!(masks(task.pid()), [on.map_or("0-1", |on| LISTS[on].1)], "of {}", task.pid());
        }
    }
}

/// As [`crate::harness::write`], for a mount that may be gone.
fn write(mount: &Mount, pool: &str, list: &str, text: &str) -> io::Result<()> {
    crate::harness::write(&mount.tasks(pool, list), text)
}

#[test]
fn no_kill_under_load_loses_or_repeats_a_claim() {
    let (mount, machine) = (Mount::not_mounted(), Machine::legacy_example());
    mount.start_on(&machine);
    mount.make_pool("excl", true, &["0"]);
    mount.make_pool("shared", false, &["1"]);
    let claimed = || Mutex::new(Claimed { task: Sleeper::new(), list: Known::is(None) });
    let world = World {
        mount,
        machine,
        tasks: (0..4).map(|_| claimed()).collect(),
        configured: Mutex::new(Known::is(false)),
        gate: RwLock::default(),
        is_over: AtomicBool::new(false),
        acknowledged: Mutex::default(),
    };
    let mut random = Random(std::process::id().into());
    std::thread::scope(|scope| {
        // Also if a check fails: then the clients end, and the scope with them.
        struct Over<'a>(&'a AtomicBool);
        impl Drop for Over<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let _over = Over(&world.is_over);
        let world = &world;
        for number in 0..world.tasks.len() {
            scope.spawn(move || world.claim_and_release(number));
        }
        scope.spawn(|| world.configure());
        for number in 0..KILLS {
            let acknowledged = || *world.acknowledged.lock().unwrap();
            let before = acknowledged();
            until("operations are acknowledged", || acknowledged() > before + 10);
            std::thread::sleep(Duration::from_micros(random.below(40_000)));
            if number % 3 == 2 {
                world.mount.kill_daemon();
                world.mount.start_on(&world.machine);
            } else {
                world.mount.signal_worker(Signal::SIGKILL);
            }
            world.check();
        }
    });
}
