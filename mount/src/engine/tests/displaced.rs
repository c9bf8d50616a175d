//! Claimed tasks that the kernel takes off their lists.

use super::fakes::cpus;
use super::*;
use crate::model::refusal::Refusal;
use crate::process::Look;

/// 100 has the exclusive list 1.
fn bed() -> Bed {
    let bed = Bed::new();
    bed.world.spawn(100, ONLINE, |_| ());
    bed.write(Target::List(EXCL_1), 100, "0").unwrap();
    bed
}

/// How often the task was reported.
fn reports(bed: &Bed) -> usize {
    bed.engine.show_events(None).0.matches("\"event\":\"displaced\"").count()
}

fn set_mask(bed: &Bed, mask: &str, allowed: &str) {
    bed.world.change(100, |task| {
        task.masks = vec![cpus(mask)];
        task.allowed = cpus(allowed);
    });
}

#[test]
fn a_displaced_task_is_moved_back_and_reported() {
    let bed = bed();
    bed.engine.check_masks(Look::FirstThread);
    assert_eq!(reports(&bed), 0);
    for times in 1..3 {
        set_mask(&bed, ONLINE, ONLINE);
        bed.engine.check_masks(Look::FirstThread);
        assert_eq!((bed.world.masks(100), reports(&bed)), (vec!["1".to_owned()], times));
        assert!(bed.engine.show_metrics().contains("kcm_displaced_now 0\n"));
    }
    bed.check_consistency();
}

#[test]
fn a_task_that_cannot_be_moved_back_is_reported_once() {
    let bed = bed();
    set_mask(&bed, "6-7", "6-7");
    for _ in 0..3 {
        bed.engine.check_masks(Look::AllThreads);
        assert_eq!((bed.world.masks(100), reports(&bed)), (vec!["6-7".to_owned()], 1));
        assert!(bed.engine.show_metrics().contains("kcm_displaced_now 1\n"));
    }
    set_mask(&bed, ONLINE, ONLINE);
    bed.engine.check_masks(Look::AllThreads);
    assert_eq!((bed.world.masks(100), reports(&bed)), (vec!["1".to_owned()], 1));
    assert!(bed.engine.show_metrics().contains("kcm_displaced_now 0\n"));
    bed.check_consistency();
}

#[test]
fn a_task_without_its_claim_is_left_alone() {
    let bed = bed();
    set_mask(&bed, "6-7", "6-7");
    bed.engine.check_masks(Look::AllThreads);
    bed.write(Target::List(EXCL_1), 100, "-0").unwrap();
    set_mask(&bed, ONLINE, ONLINE);
    bed.engine.check_masks(Look::AllThreads);
    assert_eq!((bed.world.masks(100), reports(&bed)), (vec![ONLINE.to_owned()], 1));
    assert!(bed.engine.show_metrics().contains("kcm_displaced_now 0\n"));
}

#[test]
fn a_shared_list_serves_with_the_cpus_that_are_online() {
    let bed = bed();
    for (pid, mask) in [(101, ONLINE), (102, "4")] {
        bed.world.spawn(pid, mask, |_| ());
    }
    bed.world.set_offline(&cpus("2,5"));
    bed.write(Target::List(SHARED_45), 101, "0").unwrap();
    bed.write(Target::List(SHARED_45), 102, "0").unwrap();
    assert_eq!(bed.world.masks(101), ["4"]);
    bed.write(Target::List(EXCL_23), 101, "0").unwrap_err();
    assert_eq!(bed.world.masks(101), ["4"], "an exclusive list does not");
    bed.world.set_offline(&cpus("2"));
    bed.world.change(102, |task| task.masks = vec![cpus("5")]);
    bed.engine.widen(&cpus("5"));
    assert_eq!(bed.world.masks(101), ["4-5"]);
    assert_eq!(bed.world.masks(102), ["5"], "its program has pinned it");
    bed.world.set_offline(&cpus("4-5"));
    bed.world.spawn(103, ONLINE, |_| ());
    bed.write(Target::List(SHARED_45), 103, "0").unwrap_err();
    bed.world.set_offline(&CpuSet::new());
    bed.check_consistency();
}

#[test]
fn an_exclusive_list_of_a_partial_pool_serves_with_the_cpus_that_are_online() {
    let bed = bed();
    bed.world.spawn(101, ONLINE, |_| ());
    bed.world.set_offline(&cpus("2"));
    bed.world.take_steps();
    let refused = bed.write(Target::List(EXCL_23), 101, "0").unwrap_err().refusal;
    assert!(matches!(&refused, Refusal::Offline { offline, .. } if *offline == cpus("2")), "{refused:?}");
    let is_touched = bed.world.take_steps().iter().any(|step| matches!(step, Step::SetMask(..)));
    assert!(!is_touched, "a task that is refused stays as it is");
    bed.engine.set_partial(caller(SHELL, 0), 0.into(), EXCL, b"1").unwrap();
    bed.write(Target::List(EXCL_23), 101, "0").unwrap();
    assert_eq!(bed.world.masks(101), ["3"]);
    bed.world.set_offline(&CpuSet::new());
    bed.engine.widen(&cpus("2"));
    assert_eq!(bed.world.masks(101), ["2-3"]);
    bed.check_consistency();
}

#[test]
fn a_mask_that_the_program_has_chosen_stays() {
    let bed = bed();
    set_mask(&bed, "6", ONLINE);
    bed.engine.check_masks(Look::AllThreads);
    assert_eq!((bed.world.masks(100), reports(&bed)), (vec!["6".to_owned()], 0));
}
