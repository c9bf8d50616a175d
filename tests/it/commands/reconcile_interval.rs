//! `kcm reconcile --interval`: what it prints, how it ends, and what it does on a plain directory. The `soak` target runs it for a
//! minute beside a daemon that dies again and again.

use std::fs;

use crate::harness::reconcile_loop::ReconcileLoop;
use crate::harness::{Mount, Plain, Sleeper, killed_on, pin, until, write};
use nix::sys::signal::Signal;
use serde_json::json;

#[test]
fn either_signal_ends_an_interval_cleanly() {
    let plain = Plain::new();
    plain.make_pool("p", false, &[("0", "")]);
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let looking = ReconcileLoop::start(plain.home(), plain.kcm(&["reconcile", "--interval=1000"]));
        until("it has reported", || looking.reports().len() == 1);
        let (reports, messages) = looking.end(signal);
        assert_eq!((reports.len(), messages.as_str()), (1, ""));
    }
}

#[test]
fn an_interval_removes_dead_tasks_of_a_plain_directory() {
    let plain = Plain::new();
    let task = Sleeper::new();
    plain.make_pool("p", false, &[("0-1", &task.pid().to_string())]);
    let looking = ReconcileLoop::start(plain.home(), plain.kcm(&["reconcile", "--interval=0.1"]));
    until("it has reported", || looking.reports().len() == 1);
    let pid = u64::from(task.pid());
    assert!(looking.reclaimed().is_empty());
    task.end();
    until("it has reported the death", || looking.reclaimed() == [pid]);
    assert_eq!(fs::read_to_string(plain.tasks("p", "0-1")).unwrap(), "");
    looking.end(Signal::SIGTERM);
}

#[test]
fn an_interval_prints_one_line_per_report_with_news() {
    let mount = Mount::with_shared();
    let tasks = mount.tasks("shared", "0");
    let task = Sleeper::new();
    write(&tasks, task.pid().to_string()).unwrap();
    let mut command = mount.kcm(&["reconcile", "--interval=0.02"]);
    // Each run says when the next one is.
    command.env("KCM_LOG_LEVEL", "DEBUG");
    let looking = ReconcileLoop::start(mount.home(), command);
    let some_runs_pass = || {
        let runs = || looking.messages().matches("The next run is in").count();
        let before = runs();
        until("it has run again and again", || runs() > before + 3);
    };
    some_runs_pass();
    assert_eq!(looking.lines().len(), 1, "the first report is always printed");
    // Two reclaims, one after the other, and a thread that leaves its list and comes back.
    let mut changed = vec![json!([""])];
    for _ in 0..2 {
        killed_on(&tasks);
        some_runs_pass();
        changed.push(json!(["/reclaimedCpuLists"]));
    }
    for mask in [&[0, 1][..], &[0]] {
        pin(task.pid(), mask);
        some_runs_pass();
        changed.push(json!(["/mismatchedCpuMasks"]));
    }
    let lines = looking.lines();
    let found: Vec<_> = lines.iter().map(|line| line["changed"].clone()).collect();
    assert_eq!(found, changed, "{lines:#?}");
    assert_eq!(lines[3]["report"]["mismatchedCpuMasks"][0]["pid"], task.pid());
    assert_eq!(lines[4]["report"], json!({ "mismatchedCpuMasks": [], "reclaimedCpuLists": [] }));
    let times: Vec<&str> = lines.iter().map(|line| line["time"].as_str().unwrap()).collect();
    assert!(
        times.is_sorted() && times.iter().all(|time| time.len() == "2026-11-24T10:15:02.250Z".len()),
        "{times:?}"
    );
    let text = fs::read_to_string(mount.home().join("reports")).unwrap();
    assert!(text.lines().all(|line| line.starts_with("{\"time\":\"2")), "{text}");
    looking.end(Signal::SIGTERM);
}
