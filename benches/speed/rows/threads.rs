//! A task of many threads.

use std::path::Path;

use super::put;
use crate::client::{Job, Op};
use crate::common::Mount;
use crate::harness::{Effort, USUAL, pinned, race, row, together};
use crate::null_fs::NullFs;
use crate::process_group::ProcessGroup;
use crate::table::{Row, Target};

const FLOOR: &str = "the first baseline is a write to an empty filesystem, followed by the bare loop. Beyond that, kcm \
reads each mask before it sets it, to be able to restore it, and it proves that no thread is creating another one, \
which would be invisible and would have the old mask: it reads the state of each thread whose mask it has set, which \
takes about 9 us. The second baseline reads each state too";

pub(super) fn rows() -> Vec<Row> {
    let mount = Mount::with_dataplane();
    let null_fs = NullFs::new();
    together([mount.worker().expect("a worker"), null_fs.pid()]);
    let rows = |count: usize| {
        let task = ProcessGroup::of_threads(count);
        let claim = |file: &Path| put(file, &task.pid().to_string(), &format!("-{}", task.pid()));
        let mut floor: Job = claim(&null_fs.tasks("0"));
        floor.before.push(Op::Masks { pid: task.pid(), all: true });
        floor.timed.push(Op::Masks { pid: task.pid(), all: false });
        let mut states = floor.clone();
        states.timed.push(Op::States { pid: task.pid() });
        let effort = if count > 100 { Effort { times: 20, ..USUAL } } else { USUAL };
        let measured = race(&[claim(&mount.tasks("dataplane", "0")), floor, states].map(pinned), effort);
        let (name, work) = (format!("threads-{count}"), format!("first claim for a task of {count} threads"));
        let beside = "empty FUSE, then sched_setaffinity and sched_getaffinity of each thread";
        let and_states = "the same, then the state of each thread";
        let row = |name: &str, beside, theirs, target| Row {
            note: FLOOR.into(),
            ..row(name, &work, &measured[0], beside, &measured[theirs], target)
        };
        [
            row(&name, beside, 1, Target::Informational),
            row(&format!("{name}-states"), and_states, 2, Target::AtMost(1.5)),
        ]
    };
    [1, 10, 1_000].map(rows).into_iter().flatten().collect()
}
