//! Undo: whatever fails in the middle of a write, everything is as it was before.

use std::sync::atomic::{AtomicUsize, Ordering};

use nix::errno::Errno;

use super::fakes::{Step, cpus};
use super::*;
use crate::journal::AppendError;
use crate::model::command::Ending;
use crate::model::refusal::Refusal;

fn full() -> AppendError {
    std::io::Error::from(std::io::ErrorKind::StorageFull).into()
}

fn stalled() -> AppendError {
    AppendError::Stalled
}

/// 100 has the list 1, 101 the list 2-3; 102 to 104 have CPUs of their own; 102 has two threads.
fn bed() -> Bed {
    let bed = Bed::new();
    bed.world.spawn(SHELL, ONLINE, |_| ());
    for pid in [100, 101, 103, 104] {
        bed.world.spawn(pid, "0,6-7", |_| ());
    }
    bed.world.spawn(102, "0,6-7", |task| task.masks.push(cpus("6")));
    bed.write(Target::List(EXCL_1), SHELL, "100").unwrap();
    bed.write(Target::List(EXCL_23), SHELL, "101").unwrap();
    bed.world.take_steps();
    bed
}

const PIDS: [u32; 5] = [100, 101, 102, 103, 104];

type Seen = (Vec<(u32, ListId)>, Vec<Vec<String>>);

fn seen(bed: &Bed) -> Seen {
    (bed.claims(), PIDS.iter().map(|&pid| bed.world.masks(pid)).collect())
}

/// A first claim, a move, several at once, one in the place of another, and all with a pool.
const WRITES: [(Target, &str); 6] = [
    (Target::List(SHARED_45), "102"),
    (Target::List(SHARED_45), "100"),
    (Target::List(SHARED_45), "100 102 103 104"),
    (Target::List(EXCL_1), "-100 102"),
    (Target::Pool(SHARED), "102 101"),
    (Target::Pool(EXCL), "-101 102"),
];

#[test]
fn a_journal_that_fails_at_any_record_changes_nothing() {
    for (target, data) in WRITES {
        for fails_at in 0..2 {
            for (error, errno) in [(full as fn() -> AppendError, Errno::ENOSPC), (stalled, Errno::EIO)] {
                let bed = bed();
                let before = seen(&bed);
                let appends = AtomicUsize::new(0);
                bed.on_step(move |step, world| {
                    if matches!(step, Step::Append(_)) && appends.fetch_add(1, Ordering::Relaxed) == fails_at
                    {
                        world.fail_appends(Some(error));
                    }
                });
                let refused = bed.write(target, SHELL, data).unwrap_err();
                assert_eq!(refused.refusal.errno(), errno, "{data}: record {fails_at}");
                assert_eq!(seen(&bed), before, "{data}: record {fails_at}");
                bed.world.fail_appends(None);
                bed.check_consistency();
                bed.check_locks_at_each_step();
                bed.write(target, SHELL, data).unwrap();
                bed.check_consistency();
            }
        }
    }
}

#[test]
fn a_release_never_fails() {
    for error in [full, stalled] {
        let bed = bed();
        bed.world.fail_appends(Some(error));
        bed.write(Target::List(EXCL_1), SHELL, "-100").unwrap();
        assert_eq!((bed.tasks(EXCL_1), bed.world.masks(100)), (String::new(), vec!["0,6-7".to_owned()]));
        bed.world.fail_appends(None);
        bed.check_consistency();
    }
}

#[test]
fn a_mask_that_is_refused_or_narrowed_at_any_task_changes_nothing() {
    for (allowed, narrowed) in [("0", false), ("0,4", true)] {
        for pid in [102, 103, 104] {
            let bed = bed();
            bed.world.change(pid, |task| task.allowed = cpus(allowed));
            let before = seen(&bed);
            let refused = bed.write(Target::List(SHARED_45), SHELL, "102 103 104").unwrap_err();
            let Refusal::MaskRefused { got, .. } = refused.refusal else { panic!("{refused:?}") };
            assert_eq!(got.is_some(), narrowed);
            assert_eq!(seen(&bed), before, "{pid}");
            bed.check_consistency();
        }
    }
}

#[test]
fn another_list_of_the_pool_is_tried_if_the_kernel_refuses_one() {
    let bed = bed();
    bed.write(Target::Pool(EXCL), SHELL, "-100 -101").unwrap();
    bed.world.change(102, |task| task.allowed = cpus("2-7"));
    bed.write(Target::Pool(EXCL), SHELL, "102").unwrap();
    assert_eq!(bed.tasks(EXCL_23), "102");
    bed.world.change(103, |task| task.allowed = cpus("6"));
    let refused = bed.write(Target::Pool(EXCL), SHELL, "103").unwrap_err();
    assert!(matches!(refused.refusal, Refusal::NoneSuits { .. }), "{refused:?}");
    bed.check_consistency();
}

#[test]
fn a_task_may_die_at_any_step_of_a_write() {
    for (target, data) in WRITES {
        for dies_at in 0..12 {
            for victim in PIDS {
                for is_reaped in [false, true] {
                    check_death(target, data, dies_at, victim, is_reaped);
                }
            }
        }
    }
}

/// Kills a task at a step of a write. If it `is_reaped`, another thread reads at that step and finds it dead.
fn check_death(target: Target, data: &str, dies_at: usize, victim: u32, is_reaped: bool) {
    let bed = bed();
    let (steps, engine) = (AtomicUsize::new(0), Arc::downgrade(&bed.engine));
    bed.on_step(move |_, world| {
        if steps.fetch_add(1, Ordering::Relaxed) == dies_at {
            world.kill(victim, Ending::Killed(9));
            if let Some(engine) = engine.upgrade().filter(|_| is_reaped) {
                engine.reap();
            }
        }
    });
    let written = bed.write(target, SHELL, data);
    bed.check_locks_at_each_step();
    let context = format!("{data}: {victim} dies at step {dies_at}, reaped {is_reaped}: {written:?}");
    if let Err(refused) = &written {
        assert_eq!(refused.refusal.errno(), Errno::ESRCH, "{context}");
        assert!(!data.contains(' '), "{context}");
    }
    bed.check_consistency();
    let claims = bed.claims();
    for word in data.split(' ').filter(|word| !word.starts_with('-')) {
        let pid: u32 = word.parse().unwrap();
        let has_claim = claims.iter().any(|(it, _)| *it == pid);
        assert_eq!(has_claim, bed.world.is_alive(pid), "{context}: {claims:?}");
    }
}

#[test]
fn a_list_is_free_after_the_death_of_its_holder() {
    let bed = bed();
    let refused = bed.write(Target::List(EXCL_1), SHELL, "102").unwrap_err();
    assert_eq!((refused.refusal.errno(), refused.pid), (Errno::EBUSY, Some(102)));
    bed.world.kill(100, Ending::Exited(0));
    bed.write(Target::List(EXCL_1), SHELL, "102").unwrap();
    bed.check_consistency();
}

#[test]
fn a_recorded_claim_that_is_dropped_is_reported() {
    let world = World::after_crash(&bed().world.snapshot());
    world.change(100, |task| task.masks = vec![cpus(ONLINE)]);
    let mut recovered = world.snapshot().recovered();
    // A part of the records may be missing, so the mask decides.
    recovered.suspect = true;
    let (engine, _) =
        Engine::with_ports(world.ports(), recovered, topology(), OwnProcesses::default()).unwrap();
    let next = Bed { world, engine: Arc::new(engine) };
    assert_eq!(next.claims(), [(101, EXCL_23)]);
    let reclaimed = next.engine.show_reclaimed();
    assert!(reclaimed.contains("\"pid\":100") && !reclaimed.contains("\"pid\":101"), "{reclaimed}");
    next.check_consistency();
}
