//! The daemon may be killed at any moment: nothing acknowledged is lost, nothing is granted twice, and an operation
//! without an answer has happened completely or not at all. These tests kill it after each step of each operation,
//! which a debug build lets them choose; `faults_under_load` kills it at random moments, and `replay` kills only the
//! worker.
//!
//! Longer than 400 lines because the operations are one table, and the world that they change is read with them.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Mutex;

use crate::harness::dir::pinned;
use crate::harness::{Machine, Mount, Sleeper, has_died, masks, missing_for_isolation, run, until, write};
use kcm_mount::failpoint::Step;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The pools `excl` (exclusive) with the list 0 and `shared` with the list 1. A resident is on `shared 1`: whatever
/// happens to other tasks, it keeps its claim and its saved mask.
struct World {
    mount: Mount,
    machine: Machine,
    tasks: RefCell<BTreeMap<&'static str, Task>>,
}

struct Task {
    /// `None` if it is the child of another process.
    process: Option<Sleeper>,
    pid: u32,
    /// The mask that it gets back.
    original: &'static str,
}

impl Drop for Task {
    fn drop(&mut self) {
        if self.process.is_none() && self.pid != 0 {
            let _ = kill(Pid::from_raw(self.pid as i32), Signal::SIGKILL);
        }
    }
}

impl World {
    fn new() -> Self {
        let (mount, machine) = (Mount::not_mounted(), Machine::legacy_example());
        let world = Self { mount, machine, tasks: RefCell::default() };
        world.start();
        world
    }

    /// Sets the step after which the daemon dies, once.
    fn fault(&self) -> PathBuf {
        self.mount.home().join("fault")
    }

    fn start_command(&self) -> Command {
        let mut command = self.mount.mount_command();
        command.env("KCM_FAULT", format!("@{}", self.fault().display()));
        self.machine.seen_by(&self.mount.home().join("machine"), &mut command);
        command
    }

    fn start(&self) {
        let (_, err, status) = run(&mut self.start_command());
        assert_eq!(status, Some(0), "{err}");
    }

    /// Starts over with new tasks.
    fn reset(&self) {
        self.tasks.borrow_mut().clear();
        write(&self.mount.conf().join("info/reclaimed"), u64::MAX.to_string()).unwrap();
        for pool in names(&self.mount.conf().join("pools")) {
            for list in names(&self.mount.pool(&pool)) {
                fs::remove_dir(self.mount.pool(&pool).join(list)).unwrap();
            }
            fs::remove_dir(self.mount.pool(&pool)).unwrap();
        }
        self.mount.make_pool("excl", true, &["0"]);
        self.mount.make_pool("shared", false, &["1"]);
        self.add("resident", "0");
        self.claim("resident", "shared", "1").unwrap();
    }

    fn add(&self, name: &'static str, original: &'static str) {
        let process = pinned(original);
        let task = Task { pid: process.pid(), process: Some(process), original };
        self.tasks.borrow_mut().insert(name, task);
    }

    fn isolate(&self) {
        write(&self.mount.pool("excl").join("mode"), "isolated").unwrap();
    }

    fn pid(&self, name: &str) -> u32 {
        self.tasks.borrow()[name].pid
    }

    fn claim(&self, name: &str, pool: &str, list: &str) -> io::Result<()> {
        write(&self.mount.tasks(pool, list), self.pid(name).to_string())
    }

    fn release(&self) -> io::Result<()> {
        write(&self.mount.tasks("excl", "0"), format!("-{}", self.pid("subject")))
    }

    /// A shell on excl 0 and its child `heir`, which started after the claim.
    fn add_with_heir(&self) {
        let script = "read go; sleep 1000 & echo $!; wait";
        let mut process = Sleeper::spawn(
            Command::new("bash").args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped()),
        );
        let (input, output) = (process.child().stdin.take(), process.child().stdout.take());
        let task = Task { pid: process.pid(), process: Some(process), original: "0-1" };
        self.tasks.borrow_mut().insert("subject", task);
        self.claim("subject", "excl", "0").unwrap();
        writeln!(input.unwrap(), "go").unwrap();
        let mut line = String::new();
        BufReader::new(output.unwrap()).read_line(&mut line).unwrap();
        let heir = Task { process: None, pid: line.trim().parse().unwrap(), original: "0-1" };
        self.tasks.borrow_mut().insert("heir", heir);
    }

    /// Kills a task; its PID keeps its name.
    fn end(&self, name: &str) {
        if let Some(process) = self.tasks.borrow_mut().get_mut(name).and_then(|task| task.process.take()) {
            process.end();
        }
    }

    fn is_alive(&self, name: &str) -> bool {
        !has_died(self.pid(name))
    }

    /// Everything that can be observed, with names instead of PIDs.
    fn observe(&self) -> Vec<String> {
        let name = |pid: &str| {
            let tasks = self.tasks.borrow();
            let known = tasks.iter().find(|(_, task)| task.pid.to_string() == pid);
            known.map_or_else(|| format!("stranger {pid}"), |(name, _)| (*name).to_owned())
        };
        let mut seen = Vec::new();
        let states = || self.mount.sh("cat $C/pools/*/*/state");
        until("partitions are made or taken back", || !states().contains("invalid"));
        for pool in names(&self.mount.conf().join("pools")) {
            let flag = self.mount.read(&format!("pools/{pool}/exclusive"));
            let mode = self.mount.read(&format!("pools/{pool}/mode"));
            seen.push(format!("{pool}: exclusive {}, {}", flag.trim(), mode.trim()));
            for list in names(&self.mount.pool(&pool)) {
                let file = self.mount.tasks(&pool, &list);
                let mode = fs::metadata(&file).unwrap().permissions().mode() & 0o777;
                let tasks = fs::read_to_string(&file).unwrap();
                let tasks: Vec<String> =
                    tasks.trim().split(',').filter(|t| !t.is_empty()).map(name).collect();
                seen.push(format!("{pool} {list}: {tasks:?}, mode {mode:o}"));
            }
        }
        for line in self.mount.read("info/reclaimed").lines() {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            let (pool, cpus) = (line["pool"].as_str().unwrap(), line["cpus"].as_str().unwrap());
            seen.push(format!("reclaimed {pool} {cpus} from {}", name(&line["pid"].to_string())));
        }
        // If all processes of the daemon die in between, the kernel has told how the task ended, and nobody knows it.
        for event in self.mount.read("info/events").lines() {
            let event: serde_json::Value = serde_json::from_str(event).unwrap();
            let pid = event["pid"].to_string();
            if event["event"] == "died"
                && self.tasks.borrow().values().any(|task| task.pid.to_string() == pid)
            {
                let (pool, cpus) = (event["pool"].as_str().unwrap(), event["cpus"].as_str().unwrap());
                seen.push(format!("reclaimed {pool} {cpus} from {}", name(&pid)));
            }
        }
        let tasks: Vec<&str> = self.tasks.borrow().keys().copied().collect();
        for task in tasks.into_iter().filter(|task| self.is_alive(task)) {
            let masks: BTreeSet<String> = masks(self.pid(task)).into_iter().collect();
            seen.push(format!("{task} runs on {masks:?}"));
            let cgroup = fs::read_to_string(format!("/proc/{}/cgroup", self.pid(task))).unwrap();
            if cgroup.contains("/kcm-0\n") {
                seen.push(format!("{task} is in a partition"));
            }
        }
        seen
    }

    /// Releases every living task; each gets back the mask from before its first claim.
    fn release_all(&self, context: &str) {
        let everybody: Vec<&str> = self.tasks.borrow().keys().copied().filter(|t| self.is_alive(t)).collect();
        for pool in names(&self.mount.conf().join("pools")) {
            for task in &everybody {
                write(&self.mount.pool(&pool).join("tasks"), format!("-{}", self.pid(task))).unwrap();
            }
        }
        for task in everybody {
            assert_eq!(masks(self.pid(task)), [self.tasks.borrow()[task].original], "{context}: {task}");
        }
    }
}

fn names(directory: &std::path::Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap());
    let dirs = entries.filter(|entry| entry.file_type().unwrap().is_dir());
    let mut names: Vec<String> = dirs.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

struct Operation {
    name: &'static str,
    before: fn(&World),
    /// `Ok` if the operation was acknowledged.
    act: fn(&World) -> io::Result<()>,
}

/// It changes nothing.
const REFUSAL: &str = "refusal";

const OPERATIONS: &[Operation] = &[
    Operation {
        name: "claim",
        before: |world| world.add("subject", "1"),
        act: |world| world.claim("subject", "excl", "0"),
    },
    Operation {
        name: "claim through the pool",
        before: |world| world.add("subject", "0-1"),
        act: |world| write(&world.mount.pool("excl").join("tasks"), world.pid("subject").to_string()),
    },
    Operation {
        name: "move",
        before: |world| {
            world.add("subject", "0");
            world.claim("subject", "shared", "1").unwrap();
        },
        act: |world| world.claim("subject", "excl", "0"),
    },
    Operation {
        name: "release",
        before: |world| {
            world.add("subject", "1");
            world.claim("subject", "excl", "0").unwrap();
        },
        act: World::release,
    },
    Operation {
        name: "release of one and claim of another in one write",
        before: |world| {
            world.add("subject", "1");
            world.add("other", "1");
            world.claim("subject", "excl", "0").unwrap();
        },
        act: |world| {
            let both = format!("-{} {}", world.pid("subject"), world.pid("other"));
            write(&world.mount.tasks("excl", "0"), both)
        },
    },
    Operation {
        name: "mkdir of a pool",
        before: |_| {},
        act: |world| fs::create_dir(world.mount.pool("new")),
    },
    Operation {
        name: "mkdir of a list",
        before: |_| {},
        act: |world| fs::create_dir(world.mount.pool("shared").join("2-3")),
    },
    Operation {
        name: "rmdir of a list",
        before: |_| {},
        act: |world| fs::remove_dir(world.mount.pool("excl").join("0")),
    },
    Operation {
        name: "rmdir of a pool",
        before: |world| world.mount.make_pool("old", true, &[]),
        act: |world| fs::remove_dir(world.mount.pool("old")),
    },
    Operation {
        name: "exclusive",
        before: |_| {},
        act: |world| write(&world.mount.pool("shared").join("exclusive"), "1"),
    },
    Operation {
        name: "chmod",
        before: |_| {},
        act: |world| fs::set_permissions(world.mount.tasks("excl", "0"), fs::Permissions::from_mode(0o660)),
    },
    Operation {
        name: "acknowledgement of a reclaimed claim",
        before: |world| {
            world.add("subject", "1");
            world.claim("subject", "excl", "0").unwrap();
            world.end("subject");
        },
        act: |world| write(&world.mount.conf().join("info/reclaimed"), u64::MAX.to_string()),
    },
    Operation {
        name: REFUSAL,
        before: |world| {
            world.add("subject", "1");
            world.add("other", "0-1");
            world.claim("subject", "excl", "0").unwrap();
        },
        act: |world| match world.claim("other", "excl", "0") {
            Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32) => Ok(()),
            Ok(()) => panic!("two tasks are on an exclusive list"),
            gone => gone,
        },
    },
    Operation {
        name: "death",
        before: |world| {
            world.add("subject", "1");
            world.claim("subject", "excl", "0").unwrap();
        },
        act: |world| {
            world.end("subject");
            fs::read(world.mount.tasks("excl", "0")).map(|_| ())
        },
    },
    Operation {
        name: "death with an heir",
        before: World::add_with_heir,
        act: |world| {
            world.end("subject");
            fs::read(world.mount.tasks("excl", "0")).map(|_| ())
        },
    },
];

/// On a machine that can isolate CPUs.
const ISOLATED: &[Operation] = &[
    Operation {
        name: "claim in an isolated pool",
        before: |world| {
            world.isolate();
            world.add("subject", "1");
        },
        act: |world| world.claim("subject", "excl", "0"),
    },
    Operation {
        name: "release in an isolated pool",
        before: |world| {
            world.isolate();
            world.add("subject", "1");
            world.claim("subject", "excl", "0").unwrap();
        },
        act: World::release,
    },
    Operation {
        name: "move out of an isolated pool",
        before: |world| {
            world.isolate();
            world.add("subject", "0");
            world.claim("subject", "excl", "0").unwrap();
        },
        act: |world| world.claim("subject", "shared", "1"),
    },
    Operation {
        name: "mode",
        before: |_| {},
        act: |world| write(&world.mount.pool("excl").join("mode"), "isolated"),
    },
];

/// Runs the operation with a daemon that dies as a whole after each step. Returns the steps that it reached.
fn with_each_step_as_the_last(operation: &Operation) -> Vec<&'static str> {
    let world = World::new();
    world.reset();
    (operation.before)(&world);
    (operation.act)(&world).unwrap();
    let after = world.observe();
    world.release_all(operation.name);
    let mut reached = Vec::new();
    for step in Step::ALL {
        let context = format!("{} until {}", operation.name, step.name());
        world.reset();
        (operation.before)(&world);
        let before = world.observe();
        assert_eq!(before == after, operation.name == REFUSAL, "{context}");
        fs::write(world.fault(), format!("{}!", step.name())).unwrap();
        let acknowledged = (operation.act)(&world).is_ok();
        if fs::remove_file(world.fault()).is_ok() {
            assert!(acknowledged, "{context}");
        } else {
            world.mount.kill_daemon();
            world.start();
            reached.push(step.name());
        }
        let now = world.observe();
        let is_right = now == after || (!acknowledged && now == before);
        assert!(is_right, "{context}: {now:#?}\nbefore: {before:#?}\nafter: {after:#?}");
        world.release_all(&context);
    }
    reached
}

#[test]
fn the_daemon_may_die_after_any_step() {
    let reached = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for operations in OPERATIONS.chunks(4) {
            let reached = &reached;
            scope.spawn(move || {
                for operation in operations {
                    let steps = with_each_step_as_the_last(operation);
                    reached.lock().unwrap().insert(operation.name, steps);
                }
            });
        }
    });
    let reached = reached.into_inner().unwrap();
    let all: BTreeSet<&str> = reached.values().flatten().copied().collect();
    let steps = Step::ALL.iter().filter(|step| !step.is_of_partitions());
    let named: BTreeSet<&str> = steps.map(|step| step.name()).collect();
    assert_eq!(all, named, "{reached:#?}");
}

/// Alone on its machine: nothing else may use the CPU of a partition. `scripts/vm` runs it; elsewhere the reason is checked.
#[test]
fn alone_the_daemon_may_die_after_any_step_of_a_partition() {
    if let Some(why) = missing_for_isolation() {
        let mount = Mount::with_dataplane();
        let refused = write(&mount.pool("dataplane").join("mode"), "isolated").unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(Errno::EOPNOTSUPP as i32), "{why}");
        return;
    }
    let reached: BTreeSet<&str> = ISOLATED.iter().flat_map(with_each_step_as_the_last).collect();
    let steps = Step::ALL.iter().filter(|step| step.is_of_partitions()).map(|step| step.name());
    let missing: Vec<&str> = steps.filter(|step| !reached.contains(step)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn the_daemon_may_die_during_recovery() {
    // Kills only the worker, or the whole daemon.
    for who in ["", "!"] {
        let world = World::new();
        world.reset();
        world.add_with_heir();
        world.mount.kill_daemon();
        world.end("subject");
        fs::write(world.fault(), format!("{}{who}", Step::DeathReaped.name())).unwrap();
        let (_, err, status) = run(&mut world.start_command());
        assert_eq!(status, Some(1), "{err}");
        assert!(!world.fault().exists());
        world.start();
        let seen = world.observe();
        assert!(seen.contains(&"excl 0: [\"heir\"], mode 644".to_owned()), "{seen:#?}");
        assert!(seen.contains(&"shared 1: [\"resident\"], mode 644".to_owned()), "{seen:#?}");
        world.release_all(who);
    }
}
