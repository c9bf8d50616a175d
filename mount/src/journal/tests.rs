//! Tests on real directories: what is read back, who may use them, and how large they become. Damaged files are in
//! `damage`, failing disks in `faults`.
//!
//! The directories are on a tmpfs, which makes fsync cheap.

mod as_root;
mod damage;
mod durable;
mod faults;
mod fixtures;
mod golden;
mod inspect;
mod spare;

use std::fs::{self, File};
use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use tempfile::TempDir;

use fixtures::{State, claim, claimed, config, directory, files, moved, open, open_at, reclaimed, task};

use super::append::COMPACTED_FROM;
use super::claims_log::LogState;
use super::recovery::Damage;
use super::*;
use crate::model::command::{Claim, SavedMask};
use crate::model::pool::{Exclusivity, ListId, Mode};
use crate::model::refusal::Holder;
use crate::model::task::{Pid, TaskId};

const BOOT: &str = "4b5f4e3c-0000-4000-8000-000000000001";
const NEXT_BOOT: &str = "4b5f4e3c-0000-4000-8000-000000000002";

#[test]
fn a_new_directory_is_empty_and_private() {
    use std::os::unix::fs::PermissionsExt as _;
    let directory = directory();
    let path = directory.path().join("made/on the way");
    let (state, recovered) = open_at(&path, BOOT).unwrap();
    assert_eq!(State::of(&recovered), State { next_event: 1, next_handle: 1, ..State::default() });
    assert!(recovered.damage.is_empty() && !recovered.suspect);
    state.append(&claimed(1)).unwrap();
    for (file, mode) in [(".", 0o700), ("lock", 0o600), ("config", 0o600), ("claims", 0o600)] {
        let found = fs::metadata(path.join(file)).unwrap().permissions().mode() & 0o777;
        assert_eq!(found, mode, "{file}");
    }
}

#[test]
fn the_last_request_of_each_thread_is_remembered() {
    let directory = directory();
    let answered =
        |request, session_thread| Record::Answered { request, errno: request as i32, session_thread };
    for worker in 0..100 {
        let (state, _) = open(&directory);
        for n in 0..500 {
            state.append(&answered(worker * 1000 + n, (n % 4) as u32)).unwrap();
        }
        state.append(&Record::Retried { request: worker }).unwrap();
    }
    let (state, _) = open(&directory);
    state.with_requests(|requests| {
        assert_eq!(requests.answer(99_495), None, "its thread has answered another one since");
        assert_eq!(requests.answer(99_496), Some(99_496));
        assert_eq!(requests.answer(90_499), Some(90_499), "of an earlier worker");
        assert_eq!(requests.answer(1_499), None, "of a worker that died long ago");
        assert!(requests.retries(99) == 1 && requests.retries(9) == 0);
    });
    assert!(fs::metadata(directory.path().join("claims")).unwrap().len() < 2 * COMPACTED_FROM);
}

#[test]
fn records_are_read_back() {
    let directory = directory();
    let (state, _) = open(&directory);
    state.store_config(&config()).unwrap();
    for record in [
        Record::Reserved { events: 700, handles: 9 },
        Record::Batch(vec![Record::Intent(claim(1)), Record::Intent(claim(2))]),
        Record::Batch(vec![claimed(1), claimed(2)]),
        claimed(3),
        claimed(4),
        Record::Intent(claim(5)),
        Record::Intent(claim(6)),
        Record::Abandoned { task: task(5) },
        Record::Releasing { task: task(2) },
        Record::Releasing { task: task(3) },
        Record::Released { task: task(3) },
        Record::Inherited { from: task(1), heir: claim(7) },
        Record::Ended { task: task(4), reclaimed: Some(reclaimed(41)) },
        claimed(8),
        Record::Ended { task: task(8), reclaimed: None },
        Record::Intent(moved(7)),
        Record::Reserved { events: 800, handles: 0 },
        claimed(9),
    ] {
        state.append(&record).unwrap();
    }
    drop(state);
    let expected = State {
        config: config(),
        claims: vec![claim(9), claim(7)],
        intents: vec![claim(6), moved(7)],
        releasing: vec![claim(2)],
        reclaimed: vec![reclaimed(41)],
        dropped: 0,
        next_event: 800,
        next_handle: 9,
    };
    // First as it was appended, then again after it was opened.
    for _ in 0..2 {
        let (_, recovered) = open(&directory);
        assert_eq!(State::of(&recovered), expected);
        assert!(recovered.damage.is_empty() && !recovered.suspect);
    }
}

#[test]
fn claims_end_with_their_boot() {
    let directory = directory();
    let (state, _) = open(&directory);
    state.store_config(&config()).unwrap();
    for record in [
        Record::Reserved { events: 700, handles: 9 },
        claimed(1),
        Record::Intent(claim(2)),
        claimed(3),
        Record::Releasing { task: task(3) },
        Record::Ended { task: task(4), reclaimed: Some(reclaimed(41)) },
    ] {
        state.append(&record).unwrap();
    }
    drop(state);
    let expected = State {
        config: config(),
        reclaimed: vec![reclaimed(41)],
        next_event: 700,
        next_handle: 9,
        ..State::default()
    };
    for boot in [NEXT_BOOT, NEXT_BOOT, BOOT] {
        let (_, recovered) = open_at(directory.path(), boot).unwrap();
        assert_eq!(State::of(&recovered), expected, "{boot}");
        assert!(recovered.damage.is_empty() && !recovered.suspect, "another boot is not damage");
    }
}

#[test]
fn a_directory_in_use_is_refused() {
    let directory = directory();
    let (state, _) = open(&directory);
    state.append(&claimed(1)).unwrap();
    let before = files(&directory);
    let error = open_at(directory.path(), BOOT).map(|_| ()).unwrap_err();
    assert!(matches!(error, StateError::InUse(_)), "{error}");
    assert!(error.to_string().contains("in use by another kcm mount"), "{error}");
    assert!(files(&directory) == before, "nothing is changed");
    state.append(&claimed(2)).unwrap();
    drop(state);
    assert_eq!(open(&directory).1.claims, [claim(2), claim(1)]);
}

#[test]
fn a_dying_daemon_is_waited_for() {
    let directory = directory();
    let (state, _) = open(&directory);
    let dying = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        drop(state);
    });
    open(&directory);
    dying.join().unwrap();
}

#[test]
fn compaction_keeps_the_log_small_and_complete() {
    let directory = directory();
    let (state, _) = open(&directory);
    let mut records = Vec::new();
    let append = |record: Record, records: &mut Vec<Record>| {
        state.append(&record).unwrap();
        records.push(record);
    };
    for n in 1..=20 {
        append(claimed(n), &mut records);
    }
    append(Record::Intent(claim(21)), &mut records);
    append(claimed(22), &mut records);
    append(Record::Releasing { task: task(22) }, &mut records);
    let mut largest = 0;
    for n in 0..8_000 {
        let n = 100 + n % 50;
        append(Record::Intent(claim(n)), &mut records);
        append(claimed(n), &mut records);
        let over = if n % 2 == 0 {
            Record::Released { task: task(n) }
        } else {
            Record::Ended { task: task(n), reclaimed: Some(reclaimed(u64::from(n))) }
        };
        append(over, &mut records);
        if n % 7 == 0 {
            append(Record::Acknowledged { seq: 1_000 }, &mut records);
        }
        largest = largest.max(fs::metadata(directory.path().join("claims")).unwrap().len());
    }
    let one_record = 4096;
    assert!(largest < COMPACTED_FROM + one_record, "{largest} bytes");
    let written = records.len() as u64 * 150;
    assert!(written > 4 * COMPACTED_FROM, "it was compacted several times");
    drop(state);
    let (_, recovered) = open(&directory);
    assert_eq!(State::of(&recovered).log(), State::after(&records).log());
    assert!(recovered.damage.is_empty());
}

#[test]
fn a_log_with_many_claims_is_rarely_compacted() {
    let directory = directory();
    let (state, _) = open(&directory);
    let length = || fs::metadata(directory.path().join("claims")).unwrap().len();
    let (mut compacted, mut before) = (0, 0);
    for n in 1..=5_000 {
        state.append(&claimed(n)).unwrap();
        state.append(&Record::Abandoned { task: task(n) }).unwrap();
        compacted += usize::from(length() < before);
        before = length();
    }
    assert!((1..=4).contains(&compacted), "{compacted} times");
    drop(state);
    assert_eq!(open(&directory).1.claims.len(), 5_000);
}

#[test]
fn reclaimed_claims_are_bounded_and_counted() {
    let directory = directory();
    let (state, _) = open(&directory);
    for seq in 1..=1_030 {
        state.append(&Record::Ended { task: task(seq), reclaimed: Some(reclaimed(u64::from(seq))) }).unwrap();
    }
    drop(state);
    // As it was appended, and after a daemon of another boot has rewritten it, twice.
    for boot in [BOOT, NEXT_BOOT, BOOT] {
        let (_, recovered) = open_at(directory.path(), boot).unwrap();
        assert_eq!((recovered.reclaimed.len(), recovered.reclaimed_dropped), (1_024, 6));
        assert_eq!(recovered.reclaimed.front(), Some(&reclaimed(7)));
        assert_eq!(recovered.reclaimed.back(), Some(&reclaimed(1_030)));
    }
    let (state, _) = open(&directory);
    state.append(&Record::Acknowledged { seq: 1_028 }).unwrap();
    drop(state);
    let (_, recovered) = open(&directory);
    assert_eq!((recovered.reclaimed, recovered.reclaimed_dropped), ([1_029, 1_030].map(reclaimed).into(), 0));
}

fn any_record() -> impl Strategy<Value = Record> {
    let n = || 1..6_u32;
    let one = prop_oneof![
        n().prop_map(|n| Record::Intent(claim(n))),
        n().prop_map(|n| Record::Intent(moved(n))),
        n().prop_map(claimed),
        n().prop_map(|n| Record::Claimed(moved(n))),
        n().prop_map(|n| Record::Abandoned { task: task(n) }),
        n().prop_map(|n| Record::Releasing { task: task(n) }),
        n().prop_map(|n| Record::Released { task: task(n) }),
        (n(), n()).prop_map(|(from, heir)| Record::Inherited { from: task(from), heir: claim(heir) }),
        (n(), prop::option::of(0..9_u64))
            .prop_map(|(n, seq)| Record::Ended { task: task(n), reclaimed: seq.map(reclaimed) }),
        (0..9_u64).prop_map(|seq| Record::Acknowledged { seq }),
        (0..9_u64, 0..3_u32).prop_map(|(events, handles)| Record::Reserved { events, handles }),
    ];
    one.prop_recursive(1, 4, 3, |inner| prop::collection::vec(inner, 0..3).prop_map(Record::Batch))
}

proptest! {
    #[test]
    fn a_compacted_log_has_the_same_meaning(records in prop::collection::vec(any_record(), 0..40)) {
        let mut live = LogState::default();
        for record in records {
            live.add(record);
        }
        let said = State::of_log(&live);
        let compacted = live.clone().into_records();
        prop_assert_eq!(State::after(&compacted), said);
        // And it has no more records than necessary.
        let things = live.claims.len() + live.intents.len() + live.releasing.len() + live.reclaimed.len();
        prop_assert!(compacted.len() <= things + State::NUMBERS);
    }
}
