//! Reading `tasks`.

use crate::bed::{USUAL, pinned, race, row, together};
use crate::client::{Job, Op};
use crate::common::Mount;
use crate::crowd::Crowd;
use crate::empty::Empty;
use crate::table::{Aim, Row};

pub(super) fn rows() -> Vec<Row> {
    let empty = Empty::new();
    let crowd = Crowd::of_processes(10_000);
    let row = |count: usize| {
        let mount = Mount::with_shared();
        together([mount.worker().expect("a worker"), empty.pid()]);
        let file = mount.tasks("shared", "1");
        crowd.claim(&file, count);
        let bytes = std::fs::read(&file).expect("tasks").len();
        let get = |file| pinned(Job { timed: vec![Op::Get { file }], ..Job::default() });
        let measured = race(&[get(file), get(empty.tasks(&bytes.to_string()))], USUAL);
        let work = format!("open, read, close of tasks with {count} tasks");
        let beside = format!("empty FUSE, {bytes} bytes");
        row(&format!("read-{count}"), &work, &measured[0], &beside, &measured[1], Aim::AtMost(1.3))
    };
    [1, 100, 10_000].map(row).into()
}
