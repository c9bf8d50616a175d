//! A task of many threads.

use std::path::Path;

use super::put;
use crate::bed::{Effort, USUAL, pinned, race, row, together};
use crate::client::{Job, Op};
use crate::common::Mount;
use crate::crowd::Crowd;
use crate::empty::Empty;
use crate::table::{Aim, Row};

const FLOOR: &str = "the bare loop alone cannot be reached through a file, so it stands behind a write to an empty \
filesystem";

pub(super) fn rows() -> Vec<Row> {
    let mount = Mount::with_dataplane();
    let empty = Empty::new();
    together([mount.worker().expect("a worker"), empty.pid()]);
    let row = |count: usize| {
        let task = Crowd::of_threads(count);
        let claim = |file: &Path| put(file, &task.pid().to_string(), &format!("-{}", task.pid()));
        let mut floor: Job = claim(&empty.tasks("0"));
        floor.before.push(Op::Masks { pid: task.pid(), all: true });
        floor.timed.push(Op::Masks { pid: task.pid(), all: false });
        let effort = if count > 100 { Effort { times: 20, ..USUAL } } else { USUAL };
        let measured = race(&[claim(&mount.tasks("dataplane", "0")), floor].map(pinned), effort);
        let work = format!("first claim for a task of {count} threads");
        let beside = "empty FUSE, then sched_setaffinity and sched_getaffinity of each thread";
        let row =
            row(&format!("threads-{count}"), &work, &measured[0], beside, &measured[1], Aim::AtMost(1.5));
        Row { note: FLOOR.into(), ..row }
    };
    [1, 10, 1_000].map(row).into()
}
