//! Reading `tasks`.

use crate::client::{Job, Op};
use crate::common::Mount;
use crate::harness::{USUAL, pinned, race, row, together};
use crate::null_fs::NullFs;
use crate::process_group::ProcessGroup;
use crate::table::{Row, Target};

pub(super) fn rows() -> Vec<Row> {
    let null_fs = NullFs::new();
    let group = ProcessGroup::of_processes(10_000);
    let row = |count: usize| {
        let mount = Mount::with_shared();
        together([mount.worker().expect("a worker"), null_fs.pid()]);
        let file = mount.tasks("shared", "1");
        group.claim(&file, count);
        let bytes = std::fs::read(&file).expect("tasks").len();
        let get = |file| pinned(Job { timed: vec![Op::Get { file }], ..Job::default() });
        let measured = race(&[get(file), get(null_fs.tasks(&bytes.to_string()))], USUAL);
        let work = format!("open, read, close of tasks with {count} tasks");
        let beside = format!("empty FUSE, {bytes} bytes");
        row(&format!("read-{count}"), &work, &measured[0], &beside, &measured[1], Target::AtMost(1.3))
    };
    [1, 100, 10_000].map(row).into()
}
