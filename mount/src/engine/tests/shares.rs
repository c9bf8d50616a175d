//! One user cannot use up the records that the daemon keeps for others.

use super::fakes::flat;
use super::*;
use crate::journal::{EVENTS_KEPT, REFUSALS_KEPT, Record};
use crate::model::refusal::Refusal;

const NOISY: u32 = 1000;
const WRITER: u32 = 300;

/// A bed with a refusal of root and one of another user.
fn bed() -> Bed {
    let bed = Bed::new();
    bed.world.off_step();
    for pid in [WRITER, SHELL, SHELL + 1] {
        bed.world.spawn(pid, ONLINE, |_| ());
    }
    refuse(&bed, SHELL, 0, "root");
    refuse(&bed, SHELL + 1, 7, "other");
    bed
}

fn refuse(bed: &Bed, pid: u32, uid: u32, word: &str) {
    bed.engine.record_refusal(caller(pid, uid), &Refusal::Nonsense { word: word.into() }.into(), None);
}

fn last_error(bed: &Bed, pid: u32) -> String {
    bed.engine.last_error_of_reader(caller(pid, 0), |_| true)
}

fn recorded_refusals(bed: &Bed, uid: u32) -> usize {
    let is_own =
        |record: &Record| matches!(record, Record::Refused { refusal, .. } if refusal.uid == Some(uid));
    bed.world.records().iter().flat_map(flat).filter(|record| is_own(record)).count()
}

fn metric(bed: &Bed, name: &str) -> u64 {
    let text = bed.engine.show_metrics();
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
    value.unwrap_or_else(|| panic!("no {name} in {text}"))
}

#[test]
fn nonsense_of_one_user_pushes_out_nobody_elses_refusal() {
    let bed = bed();
    for n in 0..2 * REFUSALS_KEPT {
        refuse(&bed, WRITER, NOISY, &format!("x{n}"));
    }
    let dropped = REFUSALS_KEPT as u64 + 2;
    assert_eq!(metric(&bed, "kcm_records_dropped_total{record=\"refusal\"}"), dropped);
    for bed in [&bed, &Bed::after_crash(&bed.world.snapshot())] {
        assert!(last_error(bed, SHELL).contains("\"root\" is not a PID"));
        assert!(last_error(bed, SHELL + 1).contains("\"other\" is not a PID"));
    }
    let last = format!("\"x{}\" is not a PID", 2 * REFUSALS_KEPT - 1);
    assert!(last_error(&bed, WRITER).contains(&last), "{}", last_error(&bed, WRITER));
}

#[test]
fn nonsense_of_one_user_is_recorded_at_a_bounded_rate() {
    let bed = bed();
    for n in 0..2 * EVENTS_KEPT {
        refuse(&bed, WRITER, NOISY, &format!("x{n}"));
    }
    let recorded = recorded_refusals(&bed, NOISY);
    assert!((512..600).contains(&recorded), "{recorded}");
    let unrecorded = (2 * EVENTS_KEPT - recorded) as u64;
    assert_eq!(metric(&bed, "kcm_refusals_unrecorded_total"), unrecorded);
    let (events, _) = bed.engine.show_events(None);
    assert_eq!(events.matches("\"uid\":1000").count(), recorded);
    // Root's are recorded as before.
    for n in 0..2 * EVENTS_KEPT {
        refuse(&bed, SHELL, 0, &format!("x{n}"));
    }
    assert_eq!(recorded_refusals(&bed, 0), 2 * EVENTS_KEPT + 1);
    assert!(bed.engine.show_events(None).0.matches("\"uid\":1000").count() >= 500);
}

#[test]
fn only_so_many_ancestors_of_a_reader_are_looked_at() {
    let bed = bed();
    // 2000 is the child of 100, and so on.
    bed.world.spawn(100, ONLINE, |_| ());
    bed.write(Target::List(EXCL_1), SHELL, "100").unwrap();
    for depth in 0..100_u32 {
        bed.world
            .spawn(2000 + depth, "1", |it| it.parent = Some(if depth == 0 { 100 } else { 1999 + depth }));
    }
    let shown = |depth: u32| bed.engine.claim_of_reader(caller(2000 + depth, 0)).map(|list| list.to_string());
    for depth in [0, 1, 62, 63] {
        assert_eq!(shown(depth).as_deref(), Some("excl 1"), "{depth}");
    }
    assert_eq!((shown(64), shown(99)), (None, None));
}
