//! `kcm reconcile --interval=1` for a minute beside claims, deaths and restarts of the daemon: it never dies, misses
//! nothing, and tells nothing twice.

use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::harness::looking::Looking;
use crate::harness::{Mount, Sleeper, killed_on, told_of, until, write};

/// How long it is looked on beside claims, deaths and restarts.
const A_MINUTE: Duration = Duration::from_secs(60);

/// What happens to the daemon while somebody dies whom nobody watches.
enum Fault {
    None,
    Worker,
    Killed,
    Stopped,
    /// For so long that the beat has come meanwhile.
    StoppedForLong,
}

#[test]
fn for_a_minute_an_interval_misses_nothing_and_tells_nothing_twice_whatever_happens_to_the_daemon() {
    let mount = Mount::with_shared();
    let tasks = mount.tasks("shared", "0");
    let started = Instant::now();
    let looking = Looking::start(mount.home(), mount.kcm(&["reconcile", "--interval=1"]));
    let mut killed: Vec<u64> = Vec::new();
    let faults = [Fault::None, Fault::Worker, Fault::Killed, Fault::Stopped, Fault::StoppedForLong];
    for (round, fault) in faults.iter().cycle().enumerate() {
        if started.elapsed() > A_MINUTE {
            break;
        }
        killed.extend((0..10).map(|_| u64::from(killed_on(&tasks))));
        // Who ends by himself, or is released, is no reclaim.
        let ended = Command::new("sh").args(["-c", "echo 0 > \"$0\""]).arg(&tasks).status().unwrap();
        assert!(ended.success());
        let released = Sleeper::new();
        write(&tasks, format!("{0}", released.pid())).unwrap();
        write(&tasks, format!("-{0}", released.pid())).unwrap();
        released.end();
        let unseen = Sleeper::new();
        killed.push(u64::from(unseen.pid()));
        write(&tasks, unseen.pid().to_string()).unwrap();
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
        until("all are told of", || looking.told().len() >= killed.len());
        assert_eq!(looking.told().len(), killed.len(), "round {round}");
    }
    let beats = looking.reports().len();
    until("another beat has passed", || looking.reports().len() > beats + 1);
    let elapsed = started.elapsed().as_secs();
    let (reports, messages) = looking.end(Signal::SIGTERM);
    let mut told: Vec<u64> = reports.iter().flat_map(|report| told_of(report, "reclaimedCpuLists")).collect();
    told.sort_unstable();
    killed.sort_unstable();
    assert_eq!(told, killed, "each exactly once");
    let beats = (reports.len() + messages.lines().count()) as u64;
    assert!(beats <= elapsed + 1, "no beat comes before its time: {beats} in {elapsed} s");
    assert!(beats >= elapsed / 2, "it keeps its beat: {beats} in {elapsed} s");
    for message in messages.lines() {
        assert!(message.contains("kcm mount is not running; start it"), "{messages}");
    }
}
