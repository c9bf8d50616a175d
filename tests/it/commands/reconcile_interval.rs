//! `kcm reconcile --interval`: how it ends, and what it does on a plain directory. The `soak` target runs it for a
//! minute beside a daemon that dies again and again.

use std::fs;

use crate::harness::reconcile_loop::ReconcileLoop;
use crate::harness::{Plain, Sleeper, until};
use nix::sys::signal::Signal;

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
    until("it has reported", || looking.reports().len() > 1);
    let pid = u64::from(task.pid());
    assert!(looking.reclaimed().is_empty());
    task.end();
    until("it has reported the death", || looking.reclaimed() == [pid]);
    assert_eq!(fs::read_to_string(plain.tasks("p", "0-1")).unwrap(), "");
    looking.end(Signal::SIGTERM);
}
