//! Claims of one client, beside every baseline.

use std::path::Path;

use super::first;
use crate::baselines::{self, Cgroups};
use crate::client::{Job, OWN, Op};
use crate::common::Mount;
use crate::harness::{USUAL, pinned, pinned_to, race, row, together};
use crate::null_fs::NullFs;
use crate::stats::Rounds;
use crate::table::{Row, Target};

const SIZE: &str = "the size of tasks is always exact, so the kernel asks for the attributes at each open; an empty \
filesystem whose attributes the kernel may cache saves that";

const MOVE: &str = "from list 1 to list 0, with the daemon on CPU 0: the client is on the other CPU when it writes, and \
so is the client of the empty filesystem";
const PLAIN: &str = "a file on a tmpfs costs less than any request to another process: more system calls than a claim, \
but no switch between processes. It only records text: no CPU is claimed, nothing is checked, and no \
death is noticed";

pub(super) fn rows() -> Vec<Row> {
    let mount = Mount::with_dataplane();
    let (null_fs, remembered) = (NullFs::new(), NullFs::remembered());
    together([mount.worker().expect("a worker"), null_fs.pid(), remembered.pid()]);
    let [v1, v2] = [Cgroups::v1(), Cgroups::v2()];
    let [shm, disk] = [baselines::plain(true), baselines::plain(false)];
    let mut rows = first_claims(&mount, [&null_fs, &remembered], [&v1, &v2], [&shm, &disk]);
    rows.extend(again(&mount, &null_fs));
    rows.extend(moves(&mount, &null_fs, [&v1, &v2]));
    rows
}

fn first_claims(
    mount: &Mount,
    [null_fs, remembered]: [&NullFs; 2],
    [v1, v2]: [&Option<Cgroups>; 2],
    [shm, disk]: [&Option<tempfile::TempDir>; 2],
) -> Vec<Row> {
    let enter = |cgroups: &Cgroups| Job {
        before: vec![cgroups.leave()],
        timed: vec![cgroups.enter(0)],
        ..Job::default()
    };
    let rewrite = |dir: &tempfile::TempDir| {
        let op = |enter| Op::Rewrite { dir: dir.path().into(), enter };
        Job { before: vec![op(false)], timed: vec![op(true)], ..Job::default() }
    };
    let beside = [
        ("claim-first", "empty FUSE", Some(first(&null_fs.tasks("0"))), Target::AtMost(2.5), ""),
        (
            "claim-first-remembered",
            "empty FUSE, attributes cached",
            Some(first(&remembered.tasks("0"))),
            Target::Informational,
            SIZE,
        ),
        ("claim-first-cgroup1", "cgroup v1 (cpuset)", v1.as_ref().map(enter), Target::Informational, ""),
        ("claim-first-cgroup2", "cgroup v2", v2.as_ref().map(enter), Target::Informational, ""),
        (
            "claim-first-tmpfs",
            "flock, rewrite, rename; tmpfs",
            shm.as_ref().map(rewrite),
            Target::AtMost(1.0),
            PLAIN,
        ),
        (
            "claim-first-disk",
            "flock, rewrite, rename; disk",
            disk.as_ref().map(rewrite),
            Target::AtMost(1.0),
            "",
        ),
    ];
    let work = "first claim of an exclusive list: open, write, close";
    compare(work, first(&mount.tasks("dataplane", "0")), beside.into())
}

fn again(mount: &Mount, null_fs: &NullFs) -> Vec<Row> {
    let again = |file: &Path| Job { before: Vec::new(), ..first(file) };
    let beside =
        ("claim-again", "empty FUSE", Some(pinned(again(&null_fs.tasks("0")))), Target::AtMost(1.5), "");
    compare("the same claim again", again(&mount.tasks("dataplane", "0")), vec![beside])
}

fn moves(mount: &Mount, null_fs: &NullFs, [v1, v2]: [&Option<Cgroups>; 2]) -> Vec<Row> {
    // Two moves, of which the second is measured.
    let there_and_back =
        |there: Op, back: Op| Job { before: vec![there], timed: vec![back], ..Job::default() };
    let put = |file| Op::PutOpen { file, text: OWN.into() };
    let job = |cgroups: &Cgroups| there_and_back(cgroups.enter_open(0), cgroups.enter_open(1));
    let floor = pinned_to(1, there_and_back(put(null_fs.tasks("1")), put(null_fs.tasks("0"))));
    let beside = vec![
        ("claim-move", "empty FUSE", Some(floor), Target::AtMost(2.5), MOVE),
        ("claim-move-cgroup1", "cgroup v1 (cpuset)", v1.as_ref().map(job), Target::Informational, ""),
        ("claim-move-cgroup2", "cgroup v2", v2.as_ref().map(job), Target::Informational, ""),
    ];
    let [there, back] = ["1", "0"].map(|list| put(mount.tasks("dataplane", list)));
    let release = Op::Put { file: mount.pool("dataplane").join("tasks"), text: "-0".into() };
    let kcm = Job { after: vec![release], ..there_and_back(there, back) };
    compare("write on an open file: a move between two lists", kcm, beside)
}

/// Makes a row for each baseline that this machine has.
fn compare(
    work: &str,
    kcm: Job,
    beside: Vec<(&'static str, &'static str, Option<Job>, Target, &'static str)>,
) -> Vec<Row> {
    let here: Vec<_> =
        beside.into_iter().filter_map(|(n, b, job, target, note)| Some((n, b, job?, target, note))).collect();
    let jobs: Vec<Job> = std::iter::once(kcm).chain(here.iter().map(|(.., job, _, _)| job.clone())).collect();
    let measured = race(&jobs, USUAL);
    let [kcm, others @ ..] = measured.as_slice() else { return Vec::new() };
    let make = |((name, beside, _, target, note), theirs): (&(&str, &str, Job, Target, &str), &Rounds)| Row {
        note: (*note).into(),
        ..row(name, work, kcm, beside, theirs, *target)
    };
    here.iter().zip(others).map(make).collect()
}
