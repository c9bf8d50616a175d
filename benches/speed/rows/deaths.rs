//! The time from the death of a holder to the next claim.

use crate::client::{Job, OWN, Op};
use crate::common::{Mount, pids};
use crate::harness::{Effort, race, row};
use crate::null_fs::NullFs;
use crate::process_group::ProcessGroup;
use crate::table::{Row, Target};

const HEIRS: &str = "beyond one look at each process, kcm identifies each process that may run only on the list (about \
ten kernel threads per CPU are among them), finds out how the holder ended, and writes two records \
and two events; then it makes the claim, which an empty filesystem does not have";

pub(super) fn rows() -> Vec<Row> {
    let mount = Mount::with_dataplane();
    let null_fs = NullFs::new();
    let (ours, theirs) = (mount.tasks("dataplane", "0"), null_fs.tasks("0"));
    let put = |file: &std::path::Path, text: &str| Op::Put { file: file.into(), text: text.into() };
    let hold = |file: &std::path::Path| vec![put(file, "-0"), Op::Hold { file: file.into() }];
    let mut rows = Vec::new();
    for processes in [300, 3_000_usize] {
        let _group = ProcessGroup::of_processes(processes.saturating_sub(pids().len()));
        let kcm = Job {
            before: hold(&ours),
            timed: vec![Op::Kill, put(&ours, OWN)],
            after: vec![put(&ours, "-0")],
        };
        let timed = vec![Op::Kill, Op::Scan, put(&theirs, OWN)];
        let floor = Job { before: hold(&theirs), timed, ..Job::default() };
        let measured = race(&[kcm, floor], Effort { rounds: 9, times: 20 });
        let work = format!("from the death of a holder to the next claim, {processes} processes");
        let beside = "kill and wait, readdir of /proc with sched_getaffinity, empty FUSE";
        let name = format!("death-{processes}");
        let row = row(&name, &work, &measured[0], beside, &measured[1], Target::AtMost(1.5));
        rows.push(Row { note: HEIRS.into(), ..row });
    }
    rows
}
