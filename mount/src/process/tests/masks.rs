//! Tests of the affinity masks of real processes: set on every thread, restored, refused and narrowed by the kernel.

use super::super::mask::mask_of;
use super::*;

#[test]
fn a_mask_is_set_on_all_threads_and_undone() {
    let [one, other] = two_cpus();
    let all = one.union(&other);
    for mut child in [start(Command::new("sleep").arg("1000")), program("threads")] {
        for processes in both() {
            let process = open(&processes, child.pid());
            let tids = tids(child.pid());
            let (first, last) = (tids[0], tids[tids.len() - 1]);
            pin(last, &other);
            let before = of(child.pid());
            let previous =
                processes.set_mask(&process, &one, &one, Threads::All, BlockedWriter::NONE).unwrap();
            assert!(of(child.pid()).iter().all(|mask| *mask == one));
            processes.undo(&process, previous, BlockedWriter::NONE);
            assert_eq!(of(child.pid()), before);
            assert_eq!(processes.leader_mask(first).unwrap(), before[0]);
            processes.restore_mask(&process, &SavedMask::All, BlockedWriter::NONE);
            assert!(of(child.pid()).iter().all(|mask| all.is_subset(mask)));
        }
        child.0.kill().unwrap();
    }
}

#[test]
fn threads_within_the_list_keep_their_masks() {
    let [one, other] = two_cpus();
    let all = one.union(&other);
    let child = program("threads");
    for processes in both() {
        let process = open(&processes, child.pid());
        let tids = tids(child.pid());
        let of_tid = |n: usize| of(child.pid())[n].clone();
        processes.set_mask(&process, &all, &all, Threads::All, BlockedWriter::NONE).unwrap();
        pin(tids[1], &one);
        pin(tids[2], &other);
        let previous =
            processes.set_mask(&process, &all, &all, Threads::OnlyStrays, BlockedWriter::NONE).unwrap();
        assert_eq!([of_tid(0), of_tid(1), of_tid(2)], [all.clone(), one.clone(), other.clone()]);
        processes.undo(&process, previous, BlockedWriter::NONE);
        assert_eq!([of_tid(0), of_tid(1), of_tid(2)], [all.clone(), one.clone(), other.clone()]);
        // Strays are brought back, even if only a part of their mask is outside.
        let previous =
            processes.set_mask(&process, &one, &one, Threads::OnlyStrays, BlockedWriter::NONE).unwrap();
        assert!(of(child.pid()).iter().all(|mask| *mask == one));
        processes.undo(&process, previous, BlockedWriter::NONE);
        assert_eq!([of_tid(0), of_tid(1), of_tid(2)], [all.clone(), one.clone(), other.clone()]);
        processes.set_mask(&process, &all, &all, Threads::All, BlockedWriter::NONE).unwrap();
        assert!(of(child.pid()).iter().all(|mask| *mask == all));
    }
}

#[test]
fn no_new_thread_escapes_the_mask() {
    let [one, _] = two_cpus();
    let kinds = [("thread_spawner", 200), ("many_thread_spawner", 40)];
    for (processes, (kind, tries)) in both().iter().flat_map(|it| kinds.map(|kind| (it, kind))) {
        let child = program(kind);
        let process = open(processes, child.pid());
        for n in 0..tries {
            processes.set_mask(&process, &one, &one, Threads::All, BlockedWriter::NONE).unwrap();
            for _ in 0..3 {
                assert!(of(child.pid()).iter().all(|mask| *mask == one), "{kind}: try {n}");
            }
            processes.restore_mask(&process, &SavedMask::All, BlockedWriter::NONE);
        }
    }
}

#[test]
fn without_time_no_proof_is_waited_for() {
    let [one, _] = two_cpus();
    let child = program("many_thread_spawner");
    let processes = Processes::new().unwrap();
    let process = open(&processes, child.pid());
    let second = Duration::from_secs(1);
    let before = waited();
    for _ in 0..50 {
        let limit = TimeLimit::new(Instant::now(), 60 * second, Duration::ZERO);
        let set = processes.set_mask(&process, &one, &one, Threads::All, BlockedWriter::NONE.within(limit));
        match set {
            Ok(_) => assert!(of(child.pid()).iter().all(|mask| *mask == one)),
            Err(error) => assert!(matches!(error, MaskError::Unsettled), "{error}"),
        }
        processes.restore_mask(&process, &SavedMask::All, BlockedWriter::NONE.within(limit));
    }
    // Only stacks are looked at.
    let waited = waited() - before;
    assert!(waited < 2 * second, "{waited:?}");
}

#[test]
fn a_blocked_writer_counts_as_asleep() {
    let [one, other] = two_cpus();
    let all = one.union(&other);
    for child in [start(Command::new("sleep").arg("1000")), program("threads")] {
        for processes in both() {
            let process = open(&processes, child.pid());
            for tid in tids(child.pid()) {
                let waiting = BlockedWriter::thread(tid.get());
                let previous = processes.set_mask(&process, &one, &one, Threads::All, waiting).unwrap();
                assert!(of(child.pid()).iter().all(|mask| *mask == one));
                processes.undo(&process, previous, waiting);
                assert!(of(child.pid()).iter().all(|mask| all.is_subset(mask)));
                processes.set_mask(&process, &one, &one, Threads::OnlyStrays, waiting).unwrap();
                processes.restore_mask(&process, &SavedMask::Cpus(other.clone()), waiting);
                assert!(of(child.pid()).iter().all(|mask| *mask == other));
                processes.restore_mask(&process, &SavedMask::All, waiting);
            }
            let refused = processes.set_mask(
                &process,
                &"500".parse().unwrap(),
                &one,
                Threads::All,
                BlockedWriter::thread(child.pid().get()),
            );
            assert!(matches!(refused, Err(MaskError::Refused)), "{refused:?}");
        }
    }
}

#[test]
fn a_task_that_keeps_widening_its_masks_is_given_up() {
    let [one, _] = two_cpus();
    let [processes, _] = both();
    let child = program("mask_widener");
    let process = open(&processes, child.pid());
    until("it is given up", || {
        match processes.set_mask(&process, &one, &one, Threads::All, BlockedWriter::NONE) {
            // The program may not have widened its mask in time.
            Ok(_) => false,
            Err(MaskError::KeepsChanging) => true,
            Err(error) => panic!("{error}"),
        }
    });
}

#[test]
fn a_refused_mask_changes_nothing() {
    let [one, _] = two_cpus();
    let unknown: CpuSet = "500".parse().unwrap();
    let child = program("threads");
    for processes in both() {
        let process = open(&processes, child.pid());
        pin(tids(child.pid())[1], &one);
        let before = of(child.pid());
        for threads in [Threads::All, Threads::OnlyStrays] {
            let refused = processes.set_mask(&process, &unknown, &one, threads, BlockedWriter::NONE);
            assert!(matches!(refused, Err(MaskError::Refused)), "{refused:?}");
            assert_eq!(of(child.pid()), before);
        }
        let partly =
            processes.set_mask(&process, &one.union(&unknown), &one, Threads::All, BlockedWriter::NONE);
        assert!(matches!(&partly, Err(MaskError::Narrowed { got }) if *got == one), "{partly:?}");
        assert_eq!(of(child.pid()), before);
    }
}

#[test]
fn the_saved_mask_or_all_cpus_are_restored() {
    let [one, other] = two_cpus();
    let child = program("threads");
    for processes in both() {
        let process = open(&processes, child.pid());
        for (saved, expected) in [
            (SavedMask::Cpus(one.clone()), one.clone()),
            (SavedMask::All, online()),
            (SavedMask::Cpus(other.clone()), other.clone()),
            (SavedMask::Cpus("500".parse().unwrap()), online()),
        ] {
            processes.restore_mask(&process, &saved, BlockedWriter::NONE);
            assert!(of(child.pid()).iter().all(|mask| *mask == expected), "{saved:?}");
        }
    }
}

#[test]
fn all_cpus_are_saved_as_all() {
    let [one, _] = two_cpus();
    let child = start(Command::new("sleep").arg("1000"));
    for processes in both() {
        let process = open(&processes, child.pid());
        processes.restore_mask(&process, &SavedMask::All, BlockedWriter::NONE);
        assert_eq!(processes.saved_mask(&process).unwrap(), SavedMask::All);
        assert_eq!(processes.probe_saved_mask(&process, SavedMask::All).unwrap(), SavedMask::All);
        pin(child.pid(), &one);
        let saved = processes.saved_mask(&process).unwrap();
        assert_eq!(saved, SavedMask::Cpus(one.clone()));
        assert_eq!(processes.probe_saved_mask(&process, saved.clone()).unwrap(), saved);
        assert_eq!(of(child.pid()), std::slice::from_ref(&one), "it is restored after the probe");
    }
}

#[test]
fn a_thread_that_the_kernel_has_moved_is_told_from_one_that_has_moved_itself() {
    let [one, other] = two_cpus();
    let child = program("threads");
    for processes in both() {
        let process = open(&processes, child.pid());
        let tids = tids(child.pid());
        processes.set_mask(&process, &one, &one, Threads::All, BlockedWriter::NONE).unwrap();
        let within = |look| processes.are_within(&process, &one, look).unwrap();
        let look = |before| processes.look_at_masks(&process, &one, before).unwrap();
        assert!(within(Look::AllThreads) && within(Look::FirstThread));
        assert_eq!(look(None), Seen::Within);
        // As after the last CPU of its mask went offline.
        processes.restore_mask(&open(&processes, tids[1]), &SavedMask::All, BlockedWriter::NONE);
        let all = of(child.pid())[0].clone();
        assert!(!within(Look::AllThreads) && !within(Look::FirstThread));
        assert_eq!(look(None), Seen::Displaced(all));
        processes.set_mask(&process, &one, &one, Threads::OnlyStrays, BlockedWriter::NONE).unwrap();
        pin(tids[1], &other);
        assert!(!within(Look::AllThreads) && within(Look::FirstThread));
        let chosen = Seen::Chosen(other.clone());
        for before in [None, Some(&chosen)] {
            assert_eq!(look(before), chosen);
            assert_eq!(of(child.pid())[1], other, "it stays as its program wants it");
        }
        let displaced = Seen::Displaced(other.clone());
        assert_eq!(look(Some(&displaced)), displaced);
    }
}

/// Widens the mask of this thread again and again.
pub(super) fn widen_masks() {
    let mut all = nix::sched::CpuSet::new();
    (0..nix::sched::CpuSet::count()).for_each(|cpu| all.set(cpu).unwrap());
    loop {
        let _ = nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &all);
    }
}

/// Returns two CPUs of this machine.
pub(super) fn two_cpus() -> [CpuSet; 2] {
    let online: Vec<CpuId> = online().iter().take(2).collect();
    let [one, other] = online.as_slice() else { panic!("these tests need two CPUs") };
    [*one, *other].map(|cpu| CpuSet::from_iter([cpu]))
}

pub(super) fn online() -> CpuSet {
    std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap().trim().parse().unwrap()
}

/// Returns the mask of each thread as /proc shows it, the first thread's first.
pub(super) fn of(pid: Pid) -> Vec<CpuSet> {
    let mask = |tid: Pid| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
        Some(line.trim().parse().unwrap())
    };
    tids(pid).into_iter().filter_map(mask).collect()
}

fn pin(tid: Pid, cpus: &CpuSet) {
    let mut set = nix::sched::CpuSet::new();
    cpus.iter().for_each(|cpu| set.set(cpu.get() as usize).unwrap());
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(tid.get() as i32), &set).unwrap();
    assert_eq!(mask_of(tid.get()).unwrap().as_ref(), Some(cpus));
}
