//! A thousand restarts must not make anything grow.

use std::fs;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::harness::{Mount, Sleeper, proc_number, until, write};

const RESTARTS: usize = 1000;

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
    let both = [mount.supervisor(), mount.worker().unwrap()];
    let mut state: Vec<String> =
        fs::read_dir(mount.state()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    state.sort();
    // A worker answers before all of its threads have started.
    let threads = || both.map(|pid| proc_number(&format!("/proc/{pid}/status"), "Threads"));
    until("all threads have started", || {
        let before = threads();
        std::thread::sleep(Duration::from_millis(50));
        threads() == before
    });
    Size {
        descriptors: both.map(|pid| fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()),
        threads: threads(),
        memory: both.map(|pid| {
            // Pages of the program are private or shared, depending on the other processes that run it, so they do
            // not count.
            proc_number(&format!("/proc/{pid}/smaps_rollup"), "Private_Dirty").expect("a process")
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
        // With a refusal and an open file.
        write(&mount.tasks("shared", "1"), "nonsense").unwrap_err();
        mount.read("info/events");
    };
    // Every worker shows the newest events: from the start there are as many as the limit.
    for _ in 0..1100 {
        write(&mount.tasks("shared", "1"), "nonsense").unwrap_err();
    }
    let mut before = None;
    for restart in 0..RESTARTS {
        serve(restart);
        if restart == 20 {
            before = Some(size(&mount));
        }
        // A worker that has lived for a moment is replaced at once.
        std::thread::sleep(Duration::from_millis(55));
        mount.signal_worker(Signal::SIGKILL);
    }
    serve(RESTARTS);
    let (before, after) = (before.expect("twenty restarts"), size(&mount));
    println!("{RESTARTS} restarts: {before:?} {after:?}");
    assert_eq!(after.threads, before.threads);
    assert_eq!(after.state, before.state);
    for n in 0..2 {
        assert!(after.descriptors[n] <= before.descriptors[n] + 1, "{before:?} {after:?}");
        assert!(after.memory[n] <= before.memory[n] + 512, "{before:?} {after:?}");
    }
    assert!(after.log_of_claims < 200_000, "{after:?}");
}
