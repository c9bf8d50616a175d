//! `kcm reconcile --interval=1` runs for a minute beside claims, deaths and restarts of the daemon: it never exits,
//! misses nothing, and reports nothing twice.

use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::harness::reconcile_loop::ReconcileLoop;
use crate::harness::{Mount, Sleeper, killed_on, pids_in, until, write};

/// How long it runs.
const A_MINUTE: Duration = Duration::from_secs(60);

/// What happens to the daemon while a task dies that no worker watches.
enum Fault {
    None,
    Worker,
    Killed,
    Stopped,
    /// So long that an interval has passed meanwhile.
    StoppedForLong,
}

#[test]
fn an_interval_reports_every_reclaim_once() {
    let mount = Mount::with_shared();
    let tasks = mount.tasks("shared", "0");
    let started = Instant::now();
    let looking = ReconcileLoop::start(mount.home(), mount.kcm(&["reconcile", "--interval=1"]));
    let mut killed: Vec<u64> = Vec::new();
    let faults = [Fault::None, Fault::Worker, Fault::Killed, Fault::Stopped, Fault::StoppedForLong];
    for (round, fault) in faults.iter().cycle().enumerate() {
        if started.elapsed() > A_MINUTE {
            break;
        }
        killed.extend((0..10).map(|_| u64::from(killed_on(&tasks))));
        // A task that exits or is released is not a reclaim.
        let ended = Command::new("sh").args(["-c", "echo 0 > \"$0\""]).arg(&tasks).status().unwrap();
        assert!(ended.success());
        let released = Sleeper::new();
        write(&tasks, format!("{0}", released.pid())).unwrap();
        write(&tasks, format!("-{0}", released.pid())).unwrap();
        released.end();
        let unseen = Sleeper::new();
        write(&tasks, unseen.pid().to_string()).unwrap();
        // If no process of the daemon is there, nobody is told how the task ended: it has died, which is no reclaim.
        if matches!(fault, Fault::None | Fault::Worker) {
            killed.push(u64::from(unseen.pid()));
        }
        match fault {
            Fault::None => {}
            Fault::Worker => mount.replace_worker(),
            Fault::Killed => mount.kill_daemon(),
            Fault::Stopped | Fault::StoppedForLong => mount.stop(),
        }
        let messages = looking.messages().len();
        unseen.end();
        if matches!(fault, Fault::StoppedForLong) {
            until("it has noticed", || looking.messages().len() > messages);
        }
        if mount.daemons().is_empty() {
            mount.start();
        }
        until("all are reported", || looking.reclaimed().len() >= killed.len());
        assert_eq!(looking.reclaimed().len(), killed.len(), "round {round}");
    }
    // A run that has nothing new prints nothing.
    for _ in 0..2 {
        killed.push(u64::from(killed_on(&tasks)));
        until("another run has reported", || looking.reclaimed().len() >= killed.len());
    }
    let elapsed = started.elapsed().as_secs();
    let (reports, messages) = looking.end(Signal::SIGTERM);
    let mut reported: Vec<u64> =
        reports.iter().flat_map(|report| pids_in(report, "reclaimedCpuLists")).collect();
    reported.sort_unstable();
    killed.sort_unstable();
    assert_eq!(reported, killed, "each exactly once");
    let beats = (reports.len() + messages.lines().count()) as u64;
    assert!(beats <= elapsed + 1, "no report is early: {beats} in {elapsed} s");
    for message in messages.lines() {
        assert!(message.contains("kcm mount is not running; start it"), "{messages}");
    }
}
