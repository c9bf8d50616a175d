//! Whether a claim costs more if there are more lists and more claims.

use std::path::Path;

use super::first;
use crate::client::{Job, Op};
use crate::common::{Machine, Mount};
use crate::harness::{USUAL, pin_server, race, row};
use crate::process_group::ProcessGroup;
use crate::table::{Row, Target};

const MADE_UP: &str = "only list 0 of the pool can be claimed here: the others consist of CPUs of a simulated machine. A \
claim takes the first free list of the pool (0); the other claims are on list 1 of a shared pool. \
State directories are in memory";

/// The number of lists in the pool of the measured claim, and of claims in another pool.
const SIZES: [(u32, usize); 6] = [(1, 1), (64, 1), (1024, 1), (1, 1_000), (1, 10_000), (1024, 10_000)];

pub(super) fn rows() -> Vec<Row> {
    let group = ProcessGroup::of_processes(10_000);
    let mounts = SIZES.map(|(lists, claims)| mount(lists, claims, &group));
    // Not on CPU 0: there a client or a daemon would be an intruder for the other daemons, which would then offer list 0
    // last.
    let on_other_cpu = |mount: &Mount| {
        let mut job = first(&mount.pool("dataplane").join("tasks"));
        job.before.push(Op::Pin { cpu: 1 });
        job
    };
    let jobs: Vec<Job> = mounts.iter().map(on_other_cpu).collect();
    let measured = race(&jobs, USUAL);
    let rows = SIZES.iter().zip(&measured).skip(1).map(|((lists, claims), rounds)| Row {
        note: MADE_UP.into(),
        ..row(
            &format!("scale-{lists}-{claims}"),
            &format!("first claim in a pool of {lists} lists, beside {claims} claims"),
            rounds,
            "1 list, 1 claim",
            &measured[0],
            Target::AtMost(1.2),
        )
    });
    rows.collect()
}

fn mount(lists: u32, claims: usize, group: &ProcessGroup) -> Mount {
    let mount = Mount::not_mounted_in(Path::new("/dev/shm"));
    mount.start_on(&Machine::new(1, lists + 1, 1));
    let names: Vec<String> = std::iter::once(0).chain(2..=lists).map(|cpu| cpu.to_string()).collect();
    mount.make_pool("dataplane", true, &names.iter().map(String::as_str).collect::<Vec<_>>());
    mount.make_pool("shared", false, &["1"]);
    group.claim(&mount.tasks("shared", "1"), claims);
    pin_server(mount.worker().expect("a worker"), 1);
    mount
}
