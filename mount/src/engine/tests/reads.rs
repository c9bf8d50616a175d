//! Reads: they never do I/O, whatever they find.

use nix::errno::Errno;

use super::fakes::{Step, flat, task};
use super::*;
use crate::journal::{AppendError, Record};
use crate::model::command::Ending;
use crate::model::refusal::Refusal;

fn bed() -> Bed {
    let bed = Bed::new();
    bed.world.spawn(SHELL, ONLINE, |_| ());
    for pid in [100, 101] {
        bed.world.spawn(pid, ONLINE, |_| ());
    }
    bed.write(Target::List(EXCL_1), SHELL, "100").unwrap();
    bed.world.take_steps();
    bed
}

/// Reads everything that there is to read.
fn read_all(bed: &Bed) {
    let engine = &bed.engine;
    let reader = caller(SHELL, 0);
    engine.show_list_tasks(EXCL_1);
    engine.show_pool_tasks(EXCL);
    engine.show_events(None);
    engine.show_reclaimed();
    engine.show_metrics();
    engine.claim_of_reader(reader);
    engine.last_error_of_reader(reader, |_| true);
    engine.attributes(EXCL_1.0);
    engine.reserve_handles(7);
    engine.note_closed(7);
}

#[test]
fn a_read_after_a_death_does_no_io_and_asks_for_a_flush() {
    let bed = bed();
    let requests = bed.world.flush_requests();
    bed.world.kill(100, Ending::Killed(9));
    assert_eq!(bed.tasks(EXCL_1), "");
    assert!(bed.world.flush_requests() > requests);
    assert!(bed.world.deferred() > 0);
    read_all(&bed);
    bed.engine.note_poll(7, 8);
    assert_eq!(bed.world.take_steps(), [Step::Scan]);
    bed.check_consistency();
}

#[test]
fn a_read_that_finds_an_heir_does_no_io() {
    let bed = bed();
    bed.world.spawn(101, "1", |_| ());
    bed.world.kill(100, Ending::Exited(0));
    read_all(&bed);
    assert_eq!(bed.tasks(EXCL_1), "101");
    let is_io = |step: &Step| !matches!(step, Step::Watch(_) | Step::Scan);
    assert!(!bed.world.take_steps().iter().any(is_io));
    bed.check_consistency();
}

#[test]
fn a_stalled_disk_stops_no_read_and_refuses_claims() {
    let bed = bed();
    bed.world.fail_appends(Some(|| AppendError::Stalled));
    bed.world.kill(100, Ending::Killed(9));
    read_all(&bed);
    assert_eq!(bed.tasks(EXCL_1), "");
    let refused = bed.write(Target::List(EXCL_1), SHELL, "101").unwrap_err();
    assert_eq!((&refused.refusal, refused.refusal.errno()), (&Refusal::DiskStalled, Errno::EIO));
    bed.engine.record_refusal(caller(SHELL, 0), &refused, None);
    assert!(bed.engine.last_error_of_reader(caller(SHELL, 0), |_| true).contains("EIO: the disk of the"));
    bed.world.fail_appends(None);
    bed.write(Target::List(EXCL_1), SHELL, "101").unwrap();
    bed.check_consistency();
}

#[test]
fn a_list_seen_as_free_is_recorded_before_its_next_claim() {
    let bed = bed();
    bed.world.kill(100, Ending::Killed(9));
    assert_eq!(bed.tasks(EXCL_1), "", "a reader sees it as free");
    let is_ended = |record: &Record| matches!(record, Record::Ended { task: it, .. } if *it == task(100));
    assert!(bed.world.records().iter().any(|record| flat(record).any(is_ended)), "its record is queued");
    bed.write(Target::List(EXCL_1), SHELL, "101").unwrap();
    let file = bed.world.snapshot().file;
    let ended = file.iter().position(|record| flat(record).any(is_ended)).unwrap();
    let claimed = file.iter().rposition(|record| matches!(record, Record::Batch(_))).unwrap();
    assert!(ended < claimed, "{file:#?}");
}

#[test]
fn a_worker_that_dies_before_it_wrote_a_death_reaps_again() {
    let bed = bed();
    bed.world.kill(100, Ending::Killed(9));
    assert_eq!(bed.tasks(EXCL_1), "");
    let next = Bed::after_crash(&bed.world.snapshot());
    assert_eq!(next.tasks(EXCL_1), "");
    assert!(next.engine.show_reclaimed().contains("\"pid\":100"));
    next.check_consistency();
}

#[test]
fn an_ancestors_list_is_shown_to_its_children_only() {
    let bed = bed();
    bed.world.spawn(200, "1", |task| task.parent = Some(100));
    bed.world.spawn(201, "6", |task| task.parent = Some(100));
    let shown = |pid| bed.engine.claim_of_reader(caller(pid, 0)).map(|list| list.to_string());
    assert_eq!(shown(100).as_deref(), Some("excl 1"));
    assert_eq!(shown(200).as_deref(), Some("excl 1"), "it started later and runs on the list");
    assert_eq!(shown(201), None, "it runs elsewhere");
    assert_eq!(shown(SHELL), None);
}

#[test]
fn a_refusal_is_shown_to_ancestors_and_to_nobody_else() {
    let bed = bed();
    bed.world.spawn(300, ONLINE, |task| task.parent = Some(SHELL));
    let refused = bed.write(Target::List(EXCL_1), 300, "101").unwrap_err();
    assert_eq!(refused.pid, Some(101));
    bed.engine.record_refusal(caller(300, 0), &refused, None);
    let line = |pid| bed.engine.last_error_of_reader(caller(pid, 0), |_| true);
    assert!(line(300).contains(" 101: EBUSY: excl 1 is held by 100 (fake) for "), "{}", line(300));
    assert_eq!(line(SHELL), line(300));
    assert_eq!(line(101), "");
    let unseen = bed.engine.last_error_of_reader(caller(300, 0), |_| false);
    assert!(unseen.contains("is held by a task for "), "{unseen}");
    let other_user = bed.engine.last_error_of_reader(caller(300, 1000), |_| true);
    assert_eq!(other_user, "");
}
