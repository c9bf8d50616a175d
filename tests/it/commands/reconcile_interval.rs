//! `kcm reconcile --interval`: how it ends, and what it does on a plain directory. A minute beside a daemon that dies
//! again and again is shown in `soak`.

use std::fs;

use crate::harness::looking::Looking;
use crate::harness::{Plain, Sleeper, until};
use nix::sys::signal::Signal;

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
