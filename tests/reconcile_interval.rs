//! `kcm reconcile --interval`: it goes on whatever happens, misses nothing, and ends when it is told to.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test fails by panicking"
)]

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::{Mount, Plain, Sleeper, killed_on, told_of, until, write};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// A `kcm reconcile --interval` whose output and messages go to files.
struct Looking {
    process: Sleeper,
    out: std::path::PathBuf,
    err: std::path::PathBuf,
}

impl Looking {
    fn start(home: &Path, mut command: Command) -> Self {
        let (out, err) = (home.join("reports"), home.join("messages"));
        command.stdout(fs::File::create(&out).unwrap()).stderr(fs::File::create(&err).unwrap());
        Self { process: Sleeper::spawn(&mut command), out, err }
    }

    fn reports(&self) -> Vec<Value> {
        let text = fs::read_to_string(&self.out).unwrap();
        let reports = serde_json::Deserializer::from_str(&text).into_iter::<Value>();
        // The last one may be half written.
        reports.map_while(Result::ok).collect()
    }

    fn told(&self) -> Vec<u64> {
        self.reports().iter().flat_map(|report| told_of(report, "reclaimedCpuLists")).collect()
    }

    fn end(mut self, signal: Signal) -> (Vec<Value>, String) {
        kill(Pid::from_raw(self.process.pid() as i32), signal).unwrap();
        let status = self.process.child().wait().unwrap();
        assert_eq!(status.code(), Some(0), "{signal}: {status}");
        let text = fs::read_to_string(&self.out).unwrap();
        assert!(text.is_empty() || text.ends_with("}\n"), "it ends with a whole report");
        (self.reports(), fs::read_to_string(&self.err).unwrap())
    }
}

#[test]
fn an_interval_misses_nothing_and_tells_nothing_twice_whatever_happens_to_the_daemon() {
    let mount = Mount::with_shared();
    let tasks = mount.tasks("shared", "0");
    let started = std::time::Instant::now();
    let looking = Looking::start(mount.home(), mount.kcm(&["reconcile", "--interval=1"]));
    let mut killed: Vec<u64> = Vec::new();
    for round in 0..5 {
        let beats = looking.reports().len();
        killed.extend((0..10).map(|_| u64::from(killed_on(&tasks))));
        let unseen = Sleeper::new();
        killed.push(u64::from(unseen.pid()));
        write(&tasks, unseen.pid().to_string()).unwrap();
        match round {
            0 => until("a beat has passed", || looking.reports().len() > beats),
            1 | 2 => mount.kill_daemon(),
            _ => mount.stop(),
        }
        // While nobody watches.
        unseen.end();
        if round == 3 {
            until("it has noticed", || fs::read_to_string(&looking.err).unwrap().contains("not running"));
        }
        if round > 0 {
            mount.start();
        }
        until("all are told of", || looking.told().len() >= killed.len());
    }
    let beats = looking.reports().len();
    until("another beat has passed", || looking.reports().len() > beats + 1);
    let (reports, messages) = looking.end(Signal::SIGTERM);
    let told: Vec<u64> = reports.iter().flat_map(|report| told_of(report, "reclaimedCpuLists")).collect();
    let (mut once, mut expected) = (told.clone(), killed.clone());
    once.sort_unstable();
    expected.sort_unstable();
    assert_eq!(once, expected, "each exactly once");
    assert!(reports.len() as u64 <= started.elapsed().as_secs() + 1, "no beat comes before its time");
    let expected = format!("ERROR:root:{}: kcm mount is not running; start it", mount.conf().display());
    for message in messages.lines() {
        let known = message.starts_with(&expected) || message.contains("kcm mount is not running; start it");
        assert!(known, "{messages}");
    }
}

#[test]
fn an_interval_ends_cleanly_on_either_signal() {
    let plain = Plain::new();
    plain.make_pool("p", false, &[("0", "")]);
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let looking = Looking::start(plain.home(), plain.kcm(&["reconcile", "--interval=1000"]));
        until("it has told", || looking.reports().len() == 1);
        let (reports, messages) = looking.end(signal);
        assert_eq!((reports.len(), messages.as_str()), (1, ""));
    }
}

#[test]
fn an_interval_on_a_plain_directory_takes_off_whoever_dies() {
    let plain = Plain::new();
    let task = Sleeper::new();
    plain.make_pool("p", false, &[("0-1", &task.pid().to_string())]);
    let looking = Looking::start(plain.home(), plain.kcm(&["reconcile", "--interval=0.1"]));
    until("it has told", || looking.reports().len() > 1);
    let pid = u64::from(task.pid());
    assert!(looking.told().is_empty());
    task.end();
    until("it has told of the death", || looking.told() == [pid]);
    assert_eq!(fs::read_to_string(plain.tasks("p", "0-1")).unwrap(), "");
    looking.end(Signal::SIGTERM);
}
