//! Partitions: made before the claim is recorded, taken back before the mask is restored, and kept while the claim lasts.

use nix::errno::Errno;

use super::*;
use crate::model::command::Ending;
use crate::model::cpuset::CpuId;
use crate::model::partition::{Extent, Missing};
use crate::model::refusal::Refusal;
use crate::partitions::PartitionError;

fn bed() -> Bed {
    let bed = Bed::new();
    bed.world.spawn(SHELL, ONLINE, |_| ());
    bed.world.spawn(100, ONLINE, |_| ());
    bed
}

/// The engine of `bed`, with the exclusive pool isolated.
fn isolated() -> Bed {
    let bed = bed();
    set_mode(&bed, "isolated\n").unwrap();
    bed.world.take_steps();
    bed.world.take_snapshots();
    bed
}

fn set_mode(bed: &Bed, mode: &str) -> Result<(), Refusal> {
    bed.engine.set_mode(caller(SHELL, 0), 0.into(), EXCL, mode.as_bytes())
}

fn state(bed: &Bed, list: ListId) -> String {
    bed.engine.show_state(list).trim_end().to_owned()
}

fn members(bed: &Bed, list: ListId) -> Option<Vec<u32>> {
    bed.world.partitions().get(&list).cloned()
}

#[test]
fn a_claim_makes_a_partition_and_a_release_takes_it_back() {
    let bed = isolated();
    bed.write(Target::List(EXCL_1), SHELL, "100").unwrap();
    assert_eq!(members(&bed, EXCL_1), Some(vec![100]));
    assert_eq!(state(&bed, EXCL_1), "isolated");
    assert_eq!(bed.world.masks(100), ["1"]);
    bed.write(Target::List(EXCL_1), SHELL, "100").expect("again");
    bed.engine.check_partitions();
    assert_eq!(members(&bed, EXCL_1), Some(vec![100]));
    bed.write(Target::List(EXCL_1), SHELL, "-100").unwrap();
    assert_eq!((members(&bed, EXCL_1), state(&bed, EXCL_1)), (None, "free".to_owned()));
    let is_undone = |steps: &[Step]| {
        let at = |wanted: fn(&Step) -> bool| steps.iter().position(wanted).unwrap();
        at(|it| matches!(it, Step::TakeBackPartition(_))) < at(|it| matches!(it, Step::RestoreMask(_)))
    };
    assert!(is_undone(&bed.world.take_steps()), "a task that gets its mask back is out of the partition");
    bed.check_consistency();
}

#[test]
fn the_mode_is_set_while_nobody_has_a_list() {
    let bed = bed();
    assert_eq!(set_mode(&bed, "exclusive"), Err(Refusal::NotAMode));
    let shared = bed.engine.set_mode(caller(SHELL, 0), 0.into(), SHARED, b"isolated");
    assert!(matches!(shared, Err(Refusal::NotExclusive { .. })), "{shared:?}");
    bed.world.lack(Some(Missing::Controller));
    assert_eq!(set_mode(&bed, "isolated"), Err(Refusal::CannotIsolate { missing: Missing::Controller }));
    set_mode(&bed, "affinity").expect("nothing changes");
    bed.world.lack(None);
    bed.write(Target::List(EXCL_1), SHELL, "100").unwrap();
    assert!(matches!(set_mode(&bed, "isolated"), Err(Refusal::ListInUse { .. })));
    bed.write(Target::List(EXCL_1), SHELL, "-100").unwrap();
    set_mode(&bed, "isolated").unwrap();
    let share = bed.engine.set_exclusive(caller(SHELL, 0), 0.into(), EXCL, b"0");
    assert!(matches!(share, Err(Refusal::IsolatedPool { .. })), "{share:?}");
    bed.write(Target::List(EXCL_1), SHELL, "100").unwrap();
    assert!(matches!(set_mode(&bed, "affinity"), Err(Refusal::ListInUse { .. })));
}

#[test]
fn a_partition_that_the_kernel_refuses_leaves_nothing() {
    for (why, errno) in [
        (PartitionError::Refused("no".into()), Errno::EINVAL),
        (PartitionError::Unsuitable { path: "/a".into(), why: "no".into() }, Errno::EOPNOTSUPP),
        (PartitionError::Gone, Errno::ESRCH),
    ] {
        let bed = isolated();
        bed.world.refuse_partitions(Some(why.clone()));
        let refused = bed.write(Target::List(EXCL_1), SHELL, "100").unwrap_err();
        assert_eq!(refused.refusal.errno(), errno, "{why:?}");
        assert_eq!((members(&bed, EXCL_1), bed.tasks(EXCL_1)), (None, String::new()));
        assert_eq!(bed.world.masks(100), [ONLINE]);
        bed.world.refuse_partitions(None);
        bed.write(Target::List(EXCL_1), SHELL, "100").unwrap();
        bed.check_consistency();
    }
}

#[test]
fn cpus_that_are_isolated_at_boot_get_no_partition() {
    let bed = isolated();
    let cpu =
        |id: CpuId| Cpu { id, core: None, socket: None, node: None, online: true, isolated: id.get() == 1 };
    bed.engine.topology.set(Topology::new(cpus(ONLINE).iter().map(cpu).collect()));
    bed.world.refuse_partitions(Some(PartitionError::Refused("conflicts with housekeeping".into())));
    bed.write(Target::List(EXCL_1), SHELL, "100").expect("isolated by the kernel");
    assert_eq!((members(&bed, EXCL_1), state(&bed, EXCL_1)), (None, "boot".to_owned()));
    bed.engine.check_partitions();
    assert_eq!((members(&bed, EXCL_1), state(&bed, EXCL_1)), (None, "boot".to_owned()));
    bed.write(Target::List(EXCL_23), SHELL, "100").expect_err("these are not");
    bed.write(Target::List(EXCL_1), SHELL, "-100").unwrap();
    bed.check_consistency();
}

#[test]
fn a_task_that_moves_takes_its_partition_along() {
    let bed = isolated();
    bed.write(Target::List(EXCL_1), SHELL, "100").unwrap();
    bed.write(Target::List(EXCL_23), SHELL, "100").unwrap();
    assert_eq!((members(&bed, EXCL_1), members(&bed, EXCL_23)), (None, Some(vec![100])));
    // The kernel makes no partition of the other list.
    bed.on_step(|step, world| {
        if let Step::MakePartition(list) = step {
            let refused = PartitionError::Refused("no".into());
            world.refuse_partitions((*list == EXCL_1).then_some(refused));
        }
    });
    bed.write(Target::List(EXCL_1), SHELL, "100").unwrap_err();
    bed.check_locks_at_each_step();
    assert_eq!((bed.tasks(EXCL_23), bed.world.masks(100)), ("100".to_owned(), vec!["2-3".to_owned()]));
    assert_eq!((members(&bed, EXCL_1), members(&bed, EXCL_23)), (None, Some(vec![100])), "as before");
    bed.write(Target::List(SHARED_45), SHELL, "100").unwrap();
    assert_eq!(bed.world.partitions().len(), 0);
    bed.check_consistency();
}

/// The claim of a whole cgroup stays one when it moves, is made again, and passes to the next daemon.
#[test]
fn a_cgroup_is_isolated_as_a_whole_until_its_release() {
    let bed = isolated();
    let same = |path: &str| Extent::SameCgroup(path.to_owned());
    let extent = |bed: &Bed, list| bed.engine.isolation.extent(list);
    bed.write(Target::List(EXCL_1), SHELL, "cgroup:100").unwrap();
    assert_eq!((members(&bed, EXCL_1), state(&bed, EXCL_1)), (Some(vec![100]), "isolated".to_owned()));
    let whole = extent(&bed, EXCL_1);
    assert!(matches!(whole, Extent::SameCgroup(_)), "{whole:?}");
    bed.write(Target::List(EXCL_23), SHELL, "100").unwrap();
    assert_eq!((extent(&bed, EXCL_1), extent(&bed, EXCL_23)), (Extent::Task, whole.clone()));
    // A move that is refused.
    bed.world.refuse_partitions(Some(PartitionError::Refused("no".into())));
    bed.write(Target::List(EXCL_1), SHELL, "100").unwrap_err();
    assert_eq!((extent(&bed, EXCL_23), bed.tasks(EXCL_23)), (whole.clone(), "100".to_owned()));
    bed.world.refuse_partitions(None);
    // Past the pauses after a refusal.
    bed.engine.isolation.expect(vec![(EXCL_23, same(""))]);
    let snapshot = bed.world.take_snapshots().pop().unwrap();
    let bed = Bed::after_crash(&snapshot);
    bed.engine.check_partitions();
    bed.write(Target::List(EXCL_23), SHELL, "-100").unwrap();
    assert_eq!((members(&bed, EXCL_23), extent(&bed, EXCL_23)), (None, Extent::Task));
    bed.write(Target::List(SHARED_45), SHELL, "cgroup:100").expect("a list that is not isolated");
    assert_eq!(bed.world.partitions().len(), 0);
    bed.check_consistency();
}

/// A child of the holder, which the kernel lets run only on the list of the holder.
#[test]
fn a_process_in_a_partition_can_claim_a_list_of_its_own() {
    let bed = isolated();
    let child = |task: &mut fakes::FakeTask| task.allowed = cpus("1");
    bed.write(Target::List(EXCL_1), SHELL, "100").unwrap();
    bed.world.spawn(101, "1", child);
    bed.world.change_partitions(|partitions| drop(partitions.insert(EXCL_1, vec![100, 101])));
    bed.world.refuse_partitions(Some(PartitionError::Refused("no".into())));
    bed.write(Target::List(EXCL_23), SHELL, "101").unwrap_err();
    assert_eq!(members(&bed, EXCL_1), Some(vec![100, 101]), "it is back");
    assert_eq!(bed.world.masks(101), ["1"]);
    bed.world.refuse_partitions(None);
    bed.write(Target::List(EXCL_23), SHELL, "101").unwrap();
    assert_eq!((members(&bed, EXCL_1), members(&bed, EXCL_23)), (Some(vec![100]), Some(vec![101])));
    assert_eq!(bed.world.masks(101), ["2-3"]);
    bed.write(Target::List(EXCL_23), SHELL, "-101").unwrap();
    // Also a list that is not isolated.
    bed.world.spawn(102, "1", child);
    bed.world.change_partitions(|partitions| drop(partitions.insert(EXCL_1, vec![100, 102])));
    bed.write(Target::List(SHARED_45), SHELL, "102").unwrap();
    assert_eq!((members(&bed, EXCL_1), bed.world.masks(102)), (Some(vec![100]), vec!["4-5".to_owned()]));
    // A cgroup that is on a list as a whole stays there.
    bed.write(Target::List(EXCL_1), SHELL, "-100").unwrap();
    bed.write(Target::List(EXCL_1), SHELL, "cgroup:100").unwrap();
    bed.world.spawn(103, "1", child);
    bed.world.change_partitions(|partitions| drop(partitions.insert(EXCL_1, vec![100, 103])));
    let refused = bed.write(Target::List(SHARED_45), SHELL, "103").unwrap_err();
    assert_eq!(refused.refusal.errno(), Errno::EOPNOTSUPP);
    assert_eq!(members(&bed, EXCL_1), Some(vec![100, 103]));
    bed.check_consistency();
}

#[test]
fn what_others_take_away_is_made_again_or_named() {
    let bed = isolated();
    bed.write(Target::List(EXCL_1), SHELL, "100").unwrap();
    bed.world.change_partitions(|partitions| partitions.clear());
    bed.engine.check_partitions();
    assert_eq!((members(&bed, EXCL_1), state(&bed, EXCL_1)), (Some(vec![100]), "isolated".to_owned()));
    let events = |bed: &Bed| bed.engine.show_events(None).0;
    assert!(events(&bed).contains("its cgroup was removed; it is isolated again"), "{}", events(&bed));
    bed.world.change_partitions(|partitions| partitions.clear());
    bed.world.refuse_partitions(Some(PartitionError::Refused("somebody has the CPUs".into())));
    bed.engine.check_partitions();
    assert_eq!(state(&bed, EXCL_1), "invalid: somebody has the CPUs");
    let named = |bed: &Bed| events(bed).matches("\"somebody has the CPUs\"").count();
    assert_eq!(named(&bed), 1);
    bed.engine.check_partitions();
    assert_eq!(named(&bed), 1, "one event");
    assert_eq!(bed.tasks(EXCL_1), "100", "it is still the holder");
}

#[test]
fn only_the_processes_in_a_partition_inherit_its_list() {
    let bed = isolated();
    bed.write(Target::List(EXCL_1), SHELL, "100").unwrap();
    // One is pinned there and related, the other one is in the partition, of another user.
    bed.world.spawn(300, "1", |_| ());
    bed.world.spawn(301, ONLINE, |task| task.uid = 1234);
    bed.world.change_partitions(|partitions| drop(partitions.insert(EXCL_1, vec![301])));
    bed.world.kill(100, Ending::Exited(0));
    bed.engine.notice_deaths();
    bed.engine.search_now();
    assert_eq!(bed.tasks(EXCL_1), "301");
    assert_eq!(members(&bed, EXCL_1), Some(vec![301]));
    bed.world.change_partitions(|partitions| drop(partitions.insert(EXCL_1, Vec::new())));
    bed.world.kill(301, Ending::Exited(0));
    assert_eq!(bed.tasks(EXCL_1), "");
    bed.engine.check_partitions();
    assert_eq!(members(&bed, EXCL_1), None, "the cgroup goes with the last process");
}

#[test]
fn a_crash_leaves_the_claim_with_its_partition_or_neither() {
    let bed = isolated();
    bed.write(Target::List(EXCL_1), SHELL, "100").unwrap();
    bed.write(Target::List(EXCL_23), SHELL, "100").unwrap();
    bed.write(Target::List(EXCL_23), SHELL, "-100").unwrap();
    let snapshots = bed.world.take_snapshots();
    assert!(snapshots.iter().any(|it| !it.partitions.is_empty()));
    for snapshot in &snapshots {
        let bed = Bed::after_crash(snapshot);
        bed.engine.check_partitions();
        for list in [EXCL_1, EXCL_23] {
            let holders = bed.tasks(list);
            let expected = (!holders.is_empty()).then(|| vec![100]);
            assert_eq!(members(&bed, list), expected, "{holders}");
        }
        bed.check_consistency();
    }
}
