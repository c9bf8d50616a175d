//! What restarts cost in the long run: nothing; and that a worker which the kernel kills for memory comes back.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test fails by panicking"
)]

mod common;

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::time::{Duration, Instant};

use common::{Cgroup, Mount, Sleeper, proc_number, until, write};
use nix::sys::signal::Signal;

/// How many restarts, and how long at most.
const RESTARTS: usize = 1000;
const MOST: Duration = Duration::from_secs(25);

/// What may grow.
#[derive(Debug)]
struct Size {
    descriptors: [usize; 2],
    threads: [Option<u64>; 2],
    /// KiB.
    memory: [u64; 2],
    state: Vec<String>,
    log_of_claims: u64,
}

fn size(mount: &Mount) -> Size {
    let both = [mount.keeper(), mount.worker().unwrap()];
    let mut state: Vec<String> =
        fs::read_dir(mount.state()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    state.sort();
    Size {
        descriptors: both.map(|pid| fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()),
        threads: both.map(|pid| proc_number(&format!("/proc/{pid}/status"), "Threads")),
        memory: both.map(|pid| {
            let rollup = format!("/proc/{pid}/smaps_rollup");
            ["Private_Clean", "Private_Dirty"].iter().filter_map(|key| proc_number(&rollup, key)).sum()
        }),
        state,
        log_of_claims: fs::metadata(mount.state().join("claims")).unwrap().len(),
    }
}

#[test]
fn a_thousand_restarts_make_nothing_grow() {
    let mount = Mount::with_shared();
    let task = Sleeper::new();
    let serve = |n: usize| {
        let sign = if n.is_multiple_of(2) { "" } else { "-" };
        write(&mount.tasks("shared", "0"), format!("{sign}{}", task.pid())).unwrap();
        // A refusal and an open file, too.
        write(&mount.tasks("shared", "1"), "nonsense").unwrap_err();
        mount.read("info/events");
    };
    // The newest events are kept for every worker to show: at first there are as many as ever.
    for _ in 0..1100 {
        write(&mount.tasks("shared", "1"), "nonsense").unwrap_err();
    }
    let mut before = None;
    let (started, mut restarts) = (Instant::now(), 0);
    while restarts < RESTARTS && started.elapsed() < MOST {
        serve(restarts);
        // One that has lived for a moment is followed at once.
        std::thread::sleep(Duration::from_millis(55));
        mount.signal_worker(Signal::SIGKILL);
        restarts += 1;
        if restarts == 20 {
            serve(restarts);
            before = Some(size(&mount));
        }
    }
    serve(restarts);
    let (before, after) = (before.expect("twenty restarts"), size(&mount));
    println!("{restarts} restarts: {before:?} {after:?}");
    assert_eq!(after.threads, before.threads);
    assert_eq!(after.state, before.state);
    for n in 0..2 {
        assert!(after.descriptors[n] <= before.descriptors[n] + 1, "{before:?} {after:?}");
        assert!(after.memory[n] <= before.memory[n] + 512, "{before:?} {after:?}");
    }
    assert!(after.log_of_claims < 200_000, "{after:?}");
}

#[test]
fn a_worker_that_the_kernel_kills_for_memory_comes_back_and_its_clients_go_on() {
    let cgroup = Cgroup::new("/sys/fs/cgroup/memory");
    cgroup.write("memory.limit_in_bytes", "32M");
    let mount = Mount::not_mounted();
    let procs = cgroup.0.join("cgroup.procs");
    let line = "echo $$ > $PROCS && exec $KCM mount --conf-dir=$C --state-dir=$S";
    assert!(mount.bash(line).env("PROCS", &procs).status().unwrap().success());
    mount.make_pool("shared", false, &["0", "1"]);
    let task = Sleeper::new();
    write(&mount.tasks("shared", "0"), task.pid().to_string()).unwrap();
    let keeper = mount.keeper();
    let killed = || killed_for_memory(&cgroup);
    // Each open file keeps what was read from it: some 200 KiB each.
    for _ in 0..1100 {
        write(&mount.tasks("shared", "1"), "nonsense that makes a long line of events ".repeat(3))
            .unwrap_err();
    }
    let mut open = Vec::new();
    until("the kernel has killed it", || {
        let mut file = File::open(mount.conf().join("info/events")).expect("open");
        let mut some = [0; 4096];
        // Not to its end: so the rest is kept for us. The events themselves end with the worker.
        let _ = file.read(&mut some[..1]).expect("a read");
        open.push(file);
        if open.len() > 2000 {
            open.clear();
        }
        killed() > 0
    });
    drop(open);
    assert_eq!(fs::read_to_string(mount.tasks("shared", "0")).unwrap(), format!("{}\n", task.pid()));
    let mut file = fs::OpenOptions::new().write(true).open(mount.tasks("shared", "1")).unwrap();
    file.write_all(task.pid().to_string().as_bytes()).expect("a move");
    assert_eq!(mount.keeper(), keeper);
    mount.kill_daemon();
}

/// How many processes the kernel has killed for the cgroup's limit.
fn killed_for_memory(cgroup: &Cgroup) -> u64 {
    let text = fs::read_to_string(cgroup.0.join("memory.oom_control")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
    line.expect("oom_kill").parse().unwrap()
}
