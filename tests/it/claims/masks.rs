//! A claim sets the mask of every thread, or none; a release restores the earlier masks.
//!
//! Longer than 400 lines because it is a list of independent tests with one set-up.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::harness::program::{self, Program};
use crate::harness::{Cpuset, Machine, Mount, Sleeper, errno, free, held, masks, pin, threads, until, write};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Returns whether each thread has this mask.
fn all_have(pid: u32, cpus: &str) -> bool {
    masks(pid).iter().all(|mask| mask == cpus)
}

pub fn program(kind: &str) -> Program {
    Program::start(&mut program::command(&[], kind))
}

/// Claims for a task that creates threads all the time. On a busy machine the daemon may not get its proof in time; then
/// nothing has changed, and the same write is right.
fn claim_busy(list: &Path, pid: u32) {
    until("the claim is settled", || match write(list, pid.to_string()) {
        Ok(()) => true,
        refused => {
            assert_eq!(errno(refused), Errno::EAGAIN);
            false
        }
    });
}

/// Returns whether the pool has no task.
fn is_empty(mount: &Mount, pool: &str) -> bool {
    held(&mount.pool(pool).join("tasks")).is_empty()
}

#[test]
fn no_new_thread_escapes_a_claim() {
    let mount = Mount::with_dataplane();
    let lists = ["0", "1"].map(|list| (list, mount.tasks("dataplane", list)));
    for _ in 0..4 {
        let thread_spawner = program("thread-spawner");
        let pid = thread_spawner.pid();
        for attempt in 0..50 {
            let (cpus, list) = &lists[attempt % 2];
            claim_busy(list, pid);
            for _ in 0..3 {
                let found = masks(pid);
                assert!(found.iter().all(|mask| mask == cpus), "{attempt}: {found:?} on {cpus}");
            }
            // First claims, repeated claims and moves.
            if attempt % 5 == 4 {
                write(list, format!("-{pid}")).unwrap();
            }
            if attempt % 7 == 0 {
                claim_busy(list, pid);
                assert!(all_have(pid, cpus), "{attempt}");
            }
        }
        thread_spawner.end();
    }
}

#[test]
fn a_release_restores_the_masks_of_new_threads() {
    let mount = Mount::with_dataplane();
    let list = mount.tasks("dataplane", "0");
    let thread_spawner = program("thread-spawner");
    for _ in 0..20 {
        claim_busy(&list, thread_spawner.pid());
        write(&list, format!("-{}", thread_spawner.pid())).unwrap();
        assert!(all_have(thread_spawner.pid(), &free()), "{:?}", masks(thread_spawner.pid()));
    }
}

#[test]
fn a_thread_id_stands_for_its_process() {
    let mount = Mount::with_dataplane();
    let list = mount.tasks("dataplane", "1");
    let threads = program("threads");
    let thread = *tids(threads.pid()).last().unwrap();
    assert_ne!(thread, threads.pid());
    write(&list, thread.to_string()).unwrap();
    assert_eq!(held(&list), [threads.pid()]);
    assert!(all_have(threads.pid(), "1"));
    write(&list, format!("-{thread}")).unwrap();
    assert!(is_empty(&mount, "dataplane") && all_have(threads.pid(), &free()));
}

#[test]
fn a_refusal_by_a_cpuset_changes_nothing() {
    let mount = Mount::with_dataplane();
    let lists = ["0", "1"].map(|list| mount.tasks("dataplane", list));
    let cpuset = Cpuset::new("1");
    let task = Sleeper::new();
    cpuset.add(task.pid());
    let pid = task.pid().to_string();
    assert_eq!(errno(write(&lists[0], &pid)), Errno::EINVAL);
    assert!(is_empty(&mount, "dataplane") && all_have(task.pid(), "1"));
    // It still follows its cpuset.
    cpuset.set("0-1");
    assert!(all_have(task.pid(), "0-1"));
    cpuset.set("1");

    write(&lists[1], &pid).unwrap();
    assert_eq!(errno(write(&lists[0], &pid)), Errno::EINVAL, "a move");
    assert_eq!(held(&lists[1]), [task.pid()]);
    assert!(held(&lists[0]).is_empty() && all_have(task.pid(), "1"));
    let message = mount.read("self/last_error");
    assert!(message.contains(&format!(" {pid}: EINVAL: ")) && message.contains("dataplane 0"), "{message}");
}

#[test]
fn an_unfinished_claim_leaves_the_cpuset_in_charge() {
    let mount = Mount::not_mounted();
    mount.start_with("KCM_FAULT", "masks-set!");
    mount.make_pool("dataplane", true, &["1"]);
    let cpuset = Cpuset::new("1");
    let task = Sleeper::new();
    cpuset.add(task.pid());
    write(&mount.tasks("dataplane", "1"), task.pid().to_string()).expect_err("the daemon has died");
    mount.kill_daemon();
    mount.start();
    assert!(is_empty(&mount, "dataplane") && all_have(task.pid(), "1"));
    cpuset.set("0-1");
    assert!(all_have(task.pid(), "0-1"));
}

#[test]
fn one_task_refused_by_the_kernel_refuses_all() {
    let mount = Mount::with_dataplane();
    mount.make_pool("shared", false, &[]);
    let lists = ["0", "1"].map(|list| mount.tasks("dataplane", list));
    let cpuset = Cpuset::new("1");
    let (confined, holder) = (Sleeper::new(), Sleeper::new());
    cpuset.add(confined.pid());
    write(&lists[0], holder.pid().to_string()).unwrap();
    let instead = format!("-{} {}", holder.pid(), confined.pid());
    assert_eq!(errno(write(&lists[0], instead)), Errno::EINVAL);
    assert_eq!((held(&lists[0]), masks(holder.pid())), (vec![holder.pid()], vec!["0".to_owned()]));

    write(&mount.pool("dataplane").join("exclusive"), "0").unwrap();
    let (a, b) = (program("threads"), Sleeper::new());
    let [first, second, ..] = tids(a.pid())[..] else { panic!("threads") };
    pin(second, &[1]);
    let masks_of_a = || [first, second].map(|tid| mask_of_thread(a.pid(), tid));
    write(&lists[1], b.pid().to_string()).unwrap();
    let all = format!("{} {} {}", a.pid(), b.pid(), confined.pid());
    assert_eq!(errno(write(&lists[0], all)), Errno::EINVAL);
    assert_eq!((held(&lists[0]), held(&lists[1])), (vec![holder.pid()], vec![b.pid()]));
    assert_eq!((masks_of_a(), masks(b.pid())), ([free(), "1".to_owned()], vec!["1".to_owned()]));
    assert!(all_have(confined.pid(), "1"));
    cpuset.add(a.pid());
    cpuset.set("0-1");
    assert_eq!(masks_of_a(), ["0-1", "1"], "a thread that followed its cpuset still does");
}

#[test]
fn a_pool_skips_lists_that_cannot_serve_the_task() {
    for exclusive in [true, false] {
        let mount = Mount::new();
        mount.make_pool("pool", exclusive, &["0", "1"]);
        let pool = mount.pool("pool").join("tasks");
        let lists = ["0", "1"].map(|list| mount.tasks("pool", list));
        let cpuset = Cpuset::new("1");
        let (confined, also, holder) = (Sleeper::new(), Sleeper::new(), Sleeper::new());
        cpuset.add(confined.pid());
        cpuset.add(also.pid());
        write(&pool, confined.pid().to_string()).unwrap();
        assert_eq!((held(&lists[0]), held(&lists[1])), (vec![], vec![confined.pid()]));
        if exclusive {
            let refused = errno(write(&pool, also.pid().to_string()));
            assert_eq!(refused, Errno::EINVAL, "a list is free, but none that suits");
            assert!(mount.read("self/last_error").contains(": EINVAL: "));
            assert!(all_have(also.pid(), "1"));
            write(&pool, holder.pid().to_string()).unwrap();
            assert_eq!(held(&lists[0]), [holder.pid()]);
            assert_eq!(errno(write(&pool, also.pid().to_string())), Errno::EBUSY, "no list is free now");
        } else {
            write(&pool, also.pid().to_string()).expect("even if the other list has fewer tasks");
            assert_eq!((held(&lists[0]).len(), held(&lists[1]).len()), (0, 2));
            write(&pool, holder.pid().to_string()).unwrap();
            assert_eq!(held(&lists[0]), [holder.pid()]);
        }
    }
}

#[test]
fn a_list_that_the_kernel_narrows_is_refused() {
    let mount = Mount::new();
    mount.make_pool("wide", true, &["0-1"]);
    let list = mount.tasks("wide", "0-1");
    let cpuset = Cpuset::new("1");
    let (confined, free_one) = (Sleeper::new(), Sleeper::new());
    cpuset.add(confined.pid());
    assert_eq!(errno(write(&list, confined.pid().to_string())), Errno::EINVAL);
    assert!(mount.read("self/last_error").contains("wide 0-1"), "{}", mount.read("self/last_error"));
    assert!(is_empty(&mount, "wide") && all_have(confined.pid(), "1"));
    write(&list, free_one.pid().to_string()).unwrap();
    assert!(all_have(free_one.pid(), "0-1"));
}

#[test]
fn lists_with_offline_cpus_are_skipped() {
    // The first two CPUs of the machine are real.
    let mount = Mount::on_machine(&Machine::new(1, 512, 2));
    mount.make_pool("pool", true, &["0,1022", "1", "1020-1021"]);
    let pool = mount.pool("pool").join("tasks");
    let (a, b) = (Sleeper::new(), Sleeper::new());
    for list in ["0,1022", "1020-1021"] {
        assert_eq!(errno(write(&mount.tasks("pool", list), a.pid().to_string())), Errno::EINVAL, "{list}");
        assert!(is_empty(&mount, "pool") && all_have(a.pid(), &free()), "{list}");
    }
    write(&pool, a.pid().to_string()).unwrap();
    assert_eq!(held(&mount.tasks("pool", "1")), [a.pid()]);
    assert_eq!(errno(write(&pool, b.pid().to_string())), Errno::EINVAL);
    assert_eq!(errno(write(&mount.tasks("pool", "0,1022"), a.pid().to_string())), Errno::EINVAL, "a move");
    assert_eq!(held(&mount.tasks("pool", "1")), [a.pid()]);
    assert!(all_have(a.pid(), "1") && all_have(b.pid(), &free()));
}

#[test]
fn a_release_restores_the_earliest_mask() {
    let mount = Mount::with_dataplane();
    let lists = ["0", "1"].map(|list| mount.tasks("dataplane", list));
    for before in [&[0][..], &[1], &[]] {
        for moves in 0..3 {
            let task = Sleeper::new();
            if !before.is_empty() {
                pin(task.pid(), before);
            }
            let mask = masks(task.pid());
            let pid = task.pid();
            write(&lists[1], pid.to_string()).unwrap();
            for to in 0..moves {
                write(&lists[to % 2], pid.to_string()).unwrap();
                assert_eq!(masks(pid), [(to % 2).to_string()]);
            }
            // Some tasks claim again, which must not change their saved mask.
            write(&mount.pool("dataplane").join("tasks"), pid.to_string()).unwrap();
            write(&mount.pool("dataplane").join("tasks"), format!("-{pid}")).unwrap();
            assert_eq!(masks(pid), mask, "{moves} moves");
            assert!(is_empty(&mount, "dataplane"));
        }
    }
}

#[test]
fn the_saved_mask_survives_the_daemon() {
    for by_worker in [true, false] {
        let mount = Mount::with_dataplane();
        let task = Sleeper::new();
        let pid = task.pid();
        pin(pid, &[0]);
        write(&mount.tasks("dataplane", "1"), pid.to_string()).unwrap();
        if by_worker {
            kill(Pid::from_raw(mount.worker().unwrap() as i32), Signal::SIGKILL).unwrap();
        } else {
            mount.kill_daemon();
            mount.start();
        }
        assert_eq!(held(&mount.tasks("dataplane", "1")), [pid]);
        assert_eq!(masks(pid), ["1"]);
        write(&mount.tasks("dataplane", "1"), format!("-{pid}")).unwrap();
        assert_eq!(masks(pid), ["0"]);
    }
}

#[test]
fn after_a_release_the_task_follows_its_cpuset() {
    let mount = Mount::with_dataplane();
    let cpuset = Cpuset::new("0");
    let task = Sleeper::new();
    cpuset.add(task.pid());
    let list = mount.tasks("dataplane", "0");
    write(&list, task.pid().to_string()).unwrap();
    write(&list, format!("-{}", task.pid())).unwrap();
    assert_eq!(masks(task.pid()), ["0"]);
    cpuset.set("0-1");
    assert_eq!(masks(task.pid()), ["0-1"]);
    cpuset.set("1");
    assert_eq!(masks(task.pid()), ["1"]);
    // This includes a thread that could use the whole machine.
    let task = Sleeper::new();
    write(&list, task.pid().to_string()).unwrap();
    write(&list, format!("-{}", task.pid())).unwrap();
    cpuset.add(task.pid());
    assert_eq!(masks(task.pid()), ["1"]);
    cpuset.set("0-1");
    assert_eq!(masks(task.pid()), ["0-1"]);
}

#[test]
fn an_impossible_saved_mask_becomes_all_cpus() {
    let mount = Mount::with_dataplane();
    let cpuset = Cpuset::new("0-1");
    let task = Sleeper::new();
    cpuset.add(task.pid());
    pin(task.pid(), &[0]);
    let list = mount.tasks("dataplane", "1");
    write(&list, task.pid().to_string()).unwrap();
    cpuset.set("1");
    write(&list, format!("-{}", task.pid())).expect("a release never fails");
    assert!(is_empty(&mount, "dataplane") && all_have(task.pid(), "1"));
    cpuset.set("0-1");
    assert_eq!(masks(task.pid()), ["0-1"], "it follows its cpuset");
}

#[test]
fn a_task_that_is_put_on_all_cpus_is_moved_back() {
    let mount = Mount::new();
    mount.make_pool("narrow", true, &["0", "1"]);
    let [displaced, chosen] = [Sleeper::new(), Sleeper::new()];
    write(&mount.tasks("narrow", "0"), displaced.pid().to_string()).unwrap();
    write(&mount.tasks("narrow", "1"), chosen.pid().to_string()).unwrap();
    // As the kernel does it when the last CPU of a list goes offline.
    pin(displaced.pid(), &[0, 1]);
    pin(chosen.pid(), &[0]);
    until("it is moved back", || all_have(displaced.pid(), "0"));
    assert!(all_have(chosen.pid(), "0"), "that is its own choice");
    let told: Vec<u32> =
        mount.events().into_iter().filter(|(kind, _)| kind == "displaced").map(|(_, pid)| pid).collect();
    assert_eq!(told, [displaced.pid()]);
    let metrics = mount.read("info/metrics");
    assert!(
        metrics.contains("kcm_displaced_total 1\n") && metrics.contains("kcm_displaced_now 0\n"),
        "{metrics}"
    );
}

#[test]
fn a_repeated_claim_pins_only_stray_threads() {
    let mount = Mount::new();
    mount.make_pool("wide", true, &["0-1"]);
    let threads = program("threads");
    let [first, second, ..] = tids(threads.pid())[..] else { panic!("threads") };
    let mask = |tid: u32| mask_of_thread(threads.pid(), tid);
    pin(second, &[1]);
    let list = mount.tasks("wide", "0-1");
    write(&list, threads.pid().to_string()).unwrap();
    assert!(all_have(threads.pid(), "0-1"), "the first claim is for all threads");
    pin(second, &[1]);
    for file in [&list, &mount.pool("wide").join("tasks")] {
        write(file, threads.pid().to_string()).unwrap();
        assert_eq!(
            (mask(first), mask(second)),
            ("0-1".to_owned(), "1".to_owned()),
            "a program pins its own threads"
        );
    }

    write(&list, format!("-{}", threads.pid())).unwrap();
    fs::remove_dir(list.parent().unwrap()).unwrap();
    mount.make_pool("narrow", true, &["0", "1"]);
    let list = mount.tasks("narrow", "0");
    write(&list, threads.pid().to_string()).unwrap();
    for left in [&[1][..], &[0, 1]] {
        pin(second, left);
        write(&list, threads.pid().to_string()).unwrap();
        assert!(all_have(threads.pid(), "0"), "a stray thread is repaired");
    }
    assert_eq!(
        mount.events().iter().filter(|(event, _)| event == "claimed").count(),
        2,
        "nothing else changes"
    );
}

#[test]
fn a_refused_repeated_claim_keeps_the_claim() {
    let mount = Mount::with_dataplane();
    let cpuset = Cpuset::new("0-1");
    let task = Sleeper::new();
    cpuset.add(task.pid());
    let list = mount.tasks("dataplane", "0");
    write(&list, task.pid().to_string()).unwrap();
    // As a kubelet does it: the kernel moves the task, and the daemon gets no message.
    cpuset.set("1");
    assert_eq!(masks(task.pid()), ["1"]);
    assert_eq!(errno(write(&list, task.pid().to_string())), Errno::EINVAL);
    assert_eq!((held(&list), masks(task.pid())), (vec![task.pid()], vec!["1".to_owned()]));
    cpuset.set("0-1");
    write(&list, task.pid().to_string()).unwrap();
    assert_eq!(masks(task.pid()), ["0"]);
}

#[test]
fn a_vain_repair_does_not_forget_the_list() {
    let mount = Mount::new();
    mount.make_pool("wide", true, &["0-1"]);
    let list = mount.tasks("wide", "0-1");
    let cpuset = Cpuset::new("0-1");
    let threads = program("threads");
    write(&list, threads.pid().to_string()).unwrap();
    let [_, stray, ..] = tids(threads.pid())[..] else { panic!("threads") };
    cpuset.add(threads.pid());
    cpuset.set("1");
    assert!(all_have(threads.pid(), "1"));
    // Within the list, so nothing is wrong.
    write(&list, threads.pid().to_string()).unwrap();
    assert_eq!(mask_of_thread(threads.pid(), stray), "1");
    cpuset.set("0-1");
    assert!(all_have(threads.pid(), "0-1"), "{:?}", masks(threads.pid()));
}

#[test]
fn a_refused_move_does_not_forget_the_list() {
    let mount = Mount::on_machine(&Machine::new(1, 512, 2));
    // The kernel refuses the second list.
    mount.make_pool("pool", true, &["0-1", "1022"]);
    let list = mount.tasks("pool", "0-1");
    let cpuset = Cpuset::new("0-1");
    let task = Sleeper::new();
    cpuset.add(task.pid());
    write(&list, task.pid().to_string()).unwrap();
    cpuset.set("1");
    assert_eq!(masks(task.pid()), ["1"]);
    assert_eq!(errno(write(&mount.tasks("pool", "1022"), task.pid().to_string())), Errno::EINVAL);
    assert_eq!((held(&list), masks(task.pid())), (vec![task.pid()], vec!["1".to_owned()]));
    cpuset.set("0-1");
    assert_eq!(masks(task.pid()), ["0-1"], "it follows its cpuset within its list");
}

#[test]
fn a_thread_with_a_deadline_is_refused_with_its_reason() {
    let mount = Mount::with_dataplane();
    let task = Sleeper::new();
    let deadline = ["--deadline", "--sched-runtime=1000000", "--sched-deadline=100000000"];
    let period = ["--sched-period=100000000", "--pid", "0", &task.pid().to_string()];
    let status = std::process::Command::new("chrt").args(deadline).args(period).status().expect("chrt");
    assert!(status.success(), "this test needs SCHED_DEADLINE");
    assert_eq!(errno(write(&mount.tasks("dataplane", "1"), task.pid().to_string())), Errno::EINVAL);
    let message = mount.read("self/last_error");
    assert!(message.contains("SCHED_DEADLINE") && message.contains("chrt"), "{message}");
    assert!(is_empty(&mount, "dataplane") && all_have(task.pid(), &free()));
}

#[test]
fn a_padded_buffer_is_a_command() {
    let mount = Mount::with_dataplane();
    let (task, list) = (Sleeper::new(), mount.tasks("dataplane", "0"));
    let mut buffer = vec![0; 4096];
    let text = task.pid().to_string();
    buffer[..text.len()].copy_from_slice(text.as_bytes());
    for bytes in [format!("{text}\0").as_bytes(), buffer.as_slice()] {
        write(&list, bytes).unwrap();
        assert_eq!(held(&list), [task.pid()]);
        write(&list, format!("-{text}\0")).unwrap();
        assert!(is_empty(&mount, "dataplane"));
    }
    assert_eq!(errno(write(&list, "\0")), Errno::EINVAL);
    write(&mount.pool("dataplane").join("exclusive"), "0\0").unwrap();
}

#[test]
fn a_task_that_widens_its_masks_gets_eagain() {
    let mount = Mount::with_dataplane();
    let lists = ["0", "1"].map(|list| mount.tasks("dataplane", list));
    let mask_widener = program("mask-widener");
    let pid = mask_widener.pid();
    until("the claim is given up", || match write(&lists[0], pid.to_string()) {
        // The program may not have changed its mask yet.
        Ok(()) => {
            assert_eq!(held(&lists[0]), [pid]);
            write(&lists[0], format!("-{pid}")).unwrap();
            false
        }
        error => {
            assert_eq!(errno(error), Errno::EAGAIN);
            true
        }
    });
    assert!(mount.read("self/last_error").contains(&format!(" {pid}: EAGAIN: ")));
    assert!(is_empty(&mount, "dataplane"));
    let other = Sleeper::new();
    write(&lists[0], other.pid().to_string()).expect("the list is free");
    let result = write(&mount.pool("dataplane").join("tasks"), pid.to_string());
    match result {
        Ok(()) => assert_eq!(held(&lists[1]), [pid]),
        error => {
            assert_eq!(errno(error), Errno::EAGAIN);
            assert!(held(&lists[1]).is_empty());
        }
    }
}

/// The threads of a process, starting with the first one.
fn tids(pid: u32) -> Vec<u32> {
    let mut tids = threads(pid);
    tids.sort_by_key(|&tid| tid != pid);
    tids
}

fn mask_of_thread(pid: u32, tid: u32) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/task/{tid}/status")).unwrap();
    status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim().to_owned()
}

/// A thread that was just created always creates the next one.
fn make_threads() {
    loop {
        let one_more = || std::thread::spawn(|| drop(std::thread::spawn(|| ()).join()));
        let _ = one_more().join();
    }
}

/// This thread widens every mask that it gets at once.
fn widen_forever() {
    loop {
        pin(0, &(0..nix::sched::CpuSet::count()).collect::<Vec<_>>());
    }
}

pub fn sleeping_threads() {
    in_two_threads(|| std::thread::sleep(Duration::from_secs(1000)));
}

pub fn thread_spawner() {
    in_two_threads(make_threads);
}

pub fn mask_widener() {
    in_two_threads(widen_forever);
}

/// Runs `work` in two threads, besides the threads of the test binary.
fn in_two_threads(work: fn()) {
    (0..2).for_each(|_| drop(std::thread::spawn(work)));
    program::ready();
    program::heard();
}
