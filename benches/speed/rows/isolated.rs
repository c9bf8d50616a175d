//! A claim in an isolated pool, in a virtual machine: the machine that measures may have no cgroup v2.

use std::process::Command;

use super::MILLI;
use crate::common::run;
use crate::harness::row;
use crate::stats::{Rounds, Samples};
use crate::table::{Row, Target};

const SCENARIO: &str = "isolated-speed";

pub(super) fn rows() -> Vec<Row> {
    let mut command = Command::new("scripts/vm");
    command.arg(SCENARIO).env("KCM_VM_VERBOSE", "1");
    let (out, err, code) = run(&mut command);
    assert_eq!(code, Some(0), "{out}{err}");
    let mut both = [Rounds::default(), Rounds::default()];
    for line in out.lines().filter_map(|line| line.strip_prefix("measured: ")) {
        let times: Vec<f64> = line.split(' ').map(|time| time.parse().expect("milliseconds")).collect();
        assert_eq!(times.len(), both.len(), "{line}");
        for (rounds, time) in both.iter_mut().zip(times) {
            rounds.push(Samples::new(vec![time * MILLI]));
        }
    }
    let [kcm, by_hand] = both;
    let work = "a claim in an isolated pool and its release, in a virtual machine";
    let mut row = row(
        "isolated-claim",
        work,
        &kcm,
        "the writes to cgroupfs that it needs, from a shell",
        &by_hand,
        Target::AtMost(1.5),
    );
    row.note =
        "in a machine without KVM, whose emulated CPUs make system calls expensive. Each sample is the mean of 10".into();
    vec![row]
}
