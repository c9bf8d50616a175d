//! `kcm reconcile --repair` finds threads outside their list and repairs these, and no other threads.

use std::process::Stdio;

use crate::harness::{
    Mount, Plain, Sleeper, again, data, masks, pids_in, pin, report, says, threads, until, write,
};
use serde_json::json;

/// Not a test: a program with four threads.
#[test]
fn helper_of_four_threads() {
    if std::env::var_os("KCM_TEST_THREADS").is_some() {
        // Besides the first thread and the thread of this test.
        for _ in 0..2 {
            std::thread::spawn(|| std::thread::sleep(crate::harness::TIMEOUT * 10));
        }
        std::thread::sleep(crate::harness::TIMEOUT * 10);
    }
}

fn four_threads() -> Sleeper {
    let program = Sleeper::spawn(
        again(concat!(module_path!(), "::helper_of_four_threads"), "KCM_TEST_THREADS", "1")
            .stdout(Stdio::null()),
    );
    until("it has four threads", || threads(program.pid()).len() == 4);
    program
}

#[test]
fn a_stray_of_each_thread_is_reported_and_repaired() {
    let mount = Mount::new();
    mount.make_pool("a", true, &["1"]);
    mount.make_pool("b", false, &["0"]);
    let (program, other, free) = (four_threads(), Sleeper::new(), Sleeper::new());
    write(&mount.tasks("a", "1"), program.pid().to_string()).unwrap();
    write(&mount.tasks("b", "0"), other.pid().to_string()).unwrap();
    pin(free.pid(), &[0]);
    let tids = threads(program.pid());
    pin(tids[1], &[0]);
    pin(tids[3], &[0, 1]);
    let expected = json!([
        { "actualCpus": [0], "cpus": "1", "pid": tids[1], "pool": "a" },
        { "actualCpus": [0, 1], "cpus": "1", "pid": tids[3], "pool": "a" },
    ]);
    assert_eq!(report(&mut mount.kcm(&["reconcile"]))["mismatchedCpuMasks"], expected);
    assert_eq!(masks(program.pid()), ["1", "0", "1", "0-1"], "a report changes nothing");

    assert_eq!(report(&mut mount.kcm(&["reconcile", "--repair"]))["mismatchedCpuMasks"], expected);
    assert_eq!(masks(program.pid()), ["1"; 4]);
    assert_eq!(masks(other.pid()), ["0"]);
    assert_eq!(masks(free.pid()), ["0"], "a process without a claim is left alone");
    says(&mut mount.kcm(&["reconcile"]), &data("reconcile-nothing.json", &[]));
}

#[test]
fn a_pinned_subset_is_not_a_mismatch() {
    let mount = Mount::new();
    mount.make_pool("a", false, &["0-1"]);
    let plain = Plain::new();
    let program = four_threads();
    write(&mount.tasks("a", "0-1"), program.pid().to_string()).unwrap();
    plain.make_pool("a", false, &[("0-1", &program.pid().to_string())]);
    pin(threads(program.pid())[2], &[0]);
    for mut command in [mount.kcm(&["reconcile", "--repair"]), plain.kcm(&["reconcile", "--repair"])] {
        says(&mut command, &data("reconcile-nothing.json", &[]));
        assert_eq!(masks(program.pid()), ["0-1", "0-1", "0", "0-1"]);
    }
}

#[test]
fn repair_of_a_plain_directory_moves_only_strays() {
    let plain = Plain::new();
    let (program, other) = (four_threads(), Sleeper::new());
    plain.make_pool("a", false, &[("1", &program.pid().to_string())]);
    for tid in threads(program.pid()) {
        pin(tid, &[1]);
    }
    pin(threads(program.pid())[2], &[0]);
    pin(other.pid(), &[0]);
    let found = report(&mut plain.kcm(&["reconcile", "--repair"]));
    assert_eq!(pids_in(&found, "mismatchedCpuMasks"), [u64::from(threads(program.pid())[2])]);
    assert_eq!(masks(program.pid()), ["1"; 4]);
    assert_eq!(masks(other.pid()), ["0"]);
}

#[test]
fn a_task_in_the_middle_of_a_move_is_no_stray() {
    let mount = Mount::with_shared();
    let task = Sleeper::new();
    let lists = [mount.tasks("shared", "0"), mount.tasks("shared", "1")];
    write(&lists[0], task.pid().to_string()).unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let mover = || {
            for round in 0.. {
                write(&lists[round % 2], task.pid().to_string()).unwrap();
                std::thread::sleep(std::time::Duration::from_millis(20));
                if done.load(std::sync::atomic::Ordering::Relaxed) {
                    return round % 2;
                }
            }
            0
        };
        let mover = scope.spawn(mover);
        let mut found = Vec::new();
        for _ in 0..10 {
            found.push(report(&mut mount.kcm(&["reconcile", "--repair"])));
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        let last = mover.join().unwrap();
        assert_eq!(masks(task.pid()), [last.to_string()]);
        for report in found {
            assert_eq!(report["mismatchedCpuMasks"], json!([]));
        }
    });
}
