//! The order of records, masks and answers.

use super::fakes::{Step, cpus, flat, task};
use super::*;
use crate::journal::Record;
use crate::model::command::Ending;

fn bed() -> Bed {
    let bed = Bed::new();
    bed.world.spawn(SHELL, ONLINE, |_| ());
    for pid in [100, 101, 102] {
        bed.world.spawn(pid, ONLINE, |_| ());
    }
    bed
}

/// The steps of one write, in words.
fn steps(bed: &Bed, target: Target, data: &str) -> Vec<String> {
    bed.world.take_steps();
    bed.write(target, SHELL, data).unwrap();
    bed.world.take_steps().iter().map(describe).collect()
}

fn describe(step: &Step) -> String {
    let name = |record: &Record| match record {
        Record::Intent(claim) => format!("intent {}", claim.task.pid),
        Record::Claimed(claim) => format!("claimed {}", claim.task.pid),
        Record::Answered { request, .. } => format!("answered {request}"),
        Record::Partition(partition) => format!("partition {}", partition.list.0),
        Record::Unpartitioned { list } => format!("no partition {}", list.0),
        other => format!("{other:?}"),
    };
    match step {
        Step::Watch(task) => format!("watch {}", task.pid),
        Step::Scan => "scan".into(),
        Step::SetMask(task, cpus) => format!("set {} to {cpus}", task.pid),
        Step::UndoMask(task) => format!("undo {}", task.pid),
        Step::RestoreMask(task) => format!("restore {}", task.pid),
        Step::MakePartition(list) => format!("make the partition of {}", list.0),
        Step::EnterPartition(list) => format!("enter the partition of {}", list.0),
        Step::TakeBackPartition(list) => format!("take back the partition of {}", list.0),
        Step::Append(record) => format!("append {}", flat(record).map(name).collect::<Vec<_>>().join(", ")),
        Step::Flush => "flush".into(),
        Step::Store => "store".into(),
    }
}

#[test]
fn a_claim_is_recorded_before_and_after_its_mask_is_set() {
    let bed = bed();
    let expected = ["watch 100", "append intent 100", "set 100 to 1", "append claimed 100"];
    assert_eq!(steps(&bed, Target::List(EXCL_1), "100"), expected);
    assert_eq!((bed.world.masks(100), bed.tasks(EXCL_1)), (vec!["1".to_owned()], "100".to_owned()));
    bed.check_consistency();
}

#[test]
fn one_write_has_one_record_of_intents_and_one_of_claims() {
    let bed = bed();
    let expected = [
        "watch 101",
        "watch 100",
        "append intent 101, intent 100",
        "set 101 to 4-5",
        "set 100 to 4-5",
        "append claimed 101, claimed 100",
    ];
    assert_eq!(steps(&bed, Target::List(SHARED_45), "101 100"), expected);
    bed.check_consistency();
}

#[test]
fn a_move_sets_the_mask_once() {
    let bed = bed();
    bed.write(Target::List(EXCL_1), SHELL, "100").unwrap();
    let expected = ["append intent 100", "set 100 to 2-3", "append claimed 100"];
    assert_eq!(steps(&bed, Target::List(EXCL_23), "100"), expected);
    bed.check_consistency();
}

#[test]
fn a_repeated_claim_records_nothing() {
    let bed = bed();
    bed.write(Target::List(EXCL_1), SHELL, "100").unwrap();
    bed.world.change(100, |task| task.masks.push(cpus("0-7")));
    assert_eq!(steps(&bed, Target::List(EXCL_1), "100"), ["set 100 to 1"]);
    assert_eq!(bed.world.masks(100), ["1", "1"], "a thread that left the list is back");
    bed.check_consistency();
}

#[test]
fn a_release_is_recorded_before_and_after_its_mask_is_restored() {
    let bed = bed();
    bed.write(Target::List(EXCL_1), SHELL, "100").unwrap();
    assert_eq!(steps(&bed, Target::List(EXCL_1), "-100"), ["flush", "restore 100", "flush"]);
    let records = bed.world.records();
    let [.., Record::Batch(before), Record::Batch(after)] = records.as_slice() else { panic!("{records:?}") };
    assert_eq!(before.as_slice(), [Record::Releasing { task: task(100) }]);
    assert_eq!(after.as_slice(), [Record::Released { task: task(100) }]);
    assert_eq!(bed.world.masks(100), [ONLINE]);
    bed.check_consistency();
}

#[test]
fn the_answer_to_a_request_is_recorded_together_with_its_claim() {
    let bed = bed();
    let caller = Caller { request: 42, ..caller(SHELL, 0) };
    bed.engine.write_tasks(Target::List(EXCL_1), caller, 0.into(), b"100", false).unwrap();
    let last = describe(bed.world.take_steps().last().unwrap());
    assert_eq!(last, "append claimed 100, answered 42");
    assert_eq!(bed.engine.admit(42, true), crate::engine::Admission::Answered(None));
    for _ in 0..2 {
        assert_eq!(bed.engine.admit(43, true), crate::engine::Admission::New);
    }
    assert_eq!(bed.engine.admit(43, true), crate::engine::Admission::Poisoned, "three workers died with it");
}

#[test]
fn a_refusal_is_recorded_before_its_answer_and_shown_to_the_writer() {
    let bed = bed();
    let caller = Caller { request: 42, ..caller(SHELL, 0) };
    let refused = bed.engine.write_tasks(Target::List(EXCL_1), caller, 0.into(), b"x", false).unwrap_err();
    bed.engine.record_refusal(caller, &refused, None);
    assert!(matches!(bed.world.records().last(), Some(Record::Refused { request: 42, .. })));
    let line = bed.engine.last_error_of_reader(caller, |_| true);
    assert!(line.contains(" 900: EINVAL: \"x\" is not a PID; "), "{line}");
}

#[test]
fn the_record_of_a_death_precedes_the_next_claim_of_the_list() {
    let bed = bed();
    bed.write(Target::List(EXCL_1), SHELL, "100").unwrap();
    bed.world.kill(100, Ending::Killed(9));
    bed.write(Target::List(EXCL_1), SHELL, "101").unwrap();
    let records = bed.world.records();
    let position =
        |wanted: &dyn Fn(&Record) -> bool| records.iter().position(|r| flat(r).any(wanted)).unwrap();
    let ended = position(&|record| matches!(record, Record::Ended { task: it, .. } if *it == task(100)));
    let claimed = position(&|record| matches!(record, Record::Claimed(claim) if claim.task == task(101)));
    assert!(ended < claimed, "{records:#?}");
    bed.check_consistency();
}

#[test]
fn a_death_is_ended_or_reclaimed_or_died_or_inherited() {
    let bed = bed();
    for (pid, ending) in [(100, Ending::Exited(0)), (101, Ending::Killed(9)), (102, Ending::Unknown)] {
        bed.write(Target::List(EXCL_1), SHELL, &pid.to_string()).unwrap();
        bed.world.kill(pid, ending);
        assert_eq!(bed.tasks(EXCL_1), "");
    }
    let reclaimed = bed.engine.show_reclaimed();
    assert!(!reclaimed.contains("\"pid\":100"), "{reclaimed}");
    assert!(reclaimed.contains("\"pid\":101") && !reclaimed.contains("\"pid\":102"), "{reclaimed}");
    bed.world.spawn(103, ONLINE, |_| ());
    bed.write(Target::List(EXCL_1), SHELL, "103").unwrap();
    bed.world.spawn(104, "1", |_| ());
    bed.world.kill(103, Ending::Killed(9));
    assert_eq!(bed.tasks(EXCL_1), "104", "the child inherits");
    bed.check_consistency();
}

#[test]
fn a_refused_chown_takes_effect_nowhere() {
    let bed = bed();
    bed.world.fail_appends(Some(|| std::io::Error::from(std::io::ErrorKind::StorageFull).into()));
    let attributes = crate::engine::Attributes { uid: 7, gid: 7, mode: 0o600 };
    bed.engine.set_attributes(caller(SHELL, 0), EXCL_1.0, attributes).unwrap_err();
    assert_eq!(bed.engine.attributes(EXCL_1.0), None);
    assert_eq!(bed.engine.add_pool(caller(SHELL, 0), "new").unwrap_err().errno(), nix::errno::Errno::EIO);
    bed.world.fail_appends(None);
    bed.engine.add_pool(caller(SHELL, 0), "new").unwrap();
    bed.engine.set_attributes(caller(SHELL, 0), EXCL_1.0, attributes).unwrap();
    assert_eq!(bed.engine.attributes(EXCL_1.0), Some(attributes));
}
