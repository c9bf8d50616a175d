//! Changes of the configuration: decided, stored, applied. While one is stored, nobody sees it, and no claim is granted
//! that the old or the new configuration forbids, so the next worker keeps every claim, whichever of them it finds.

use std::sync::Arc;

use parking_lot::Mutex;

use super::fakes::Step;
use super::*;
use crate::engine::Attributes;
use crate::journal::{AppendError, Record};
use crate::model::refusal::Refusal;

/// A pool without lists.
const EMPTY: PoolId = PoolId(84);
/// Everything that takes claims; the last one is the list that a test adds.
const TARGETS: [Target; 6] = [
    Target::List(EXCL_1),
    Target::List(EXCL_23),
    Target::List(SHARED_45),
    Target::Pool(EXCL),
    Target::Pool(SHARED),
    Target::List(ListId(88)),
];

type Change = fn(&Engine<Fake>, Caller) -> Result<(), Refusal>;

const CHANGES: [(&str, Change); 15] = [
    ("echo 0 > exclusive", |engine, root| engine.set_exclusive(root, 0.into(), EXCL, b"0")),
    ("echo 1 > exclusive", |engine, root| engine.set_exclusive(root, 0.into(), SHARED, b"1")),
    ("mkdir of a pool", |engine, root| engine.add_pool(root, "new").map(|_| ())),
    ("echo 1 > partial", |engine, root| engine.set_partial(root, 0.into(), EXCL, b"1")),
    ("echo 1 > transient", |engine, root| engine.set_transient(root, 0.into(), EXCL, b"1")),
    ("mkdir of a list", |engine, root| engine.add_list(root, SHARED, "6").map(|_| ())),
    ("rmdir of a pool", |engine, root| engine.remove_pool(root, EMPTY)),
    ("rmdir of a list", |engine, root| engine.remove_list(root, EXCL_23)),
    ("chmod", |engine, root| {
        engine.set_attributes(root, EXCL_1.0, Attributes { uid: 7, gid: 7, mode: 0o600 })
    }),
    ("mv of a pool", |engine, root| engine.rename_pool(root, EXCL, "renamed")),
    ("mv of a list to another pool", |engine, root| engine.change_list(root, EXCL_1, SHARED, "1")),
    ("mv of a list to a pool of its kind", |engine, root| engine.change_list(root, EXCL_23, EXCL, "2,3")),
    ("mv of a list to other CPUs", |engine, root| engine.change_list(root, SHARED_45, SHARED, "4,6-7")),
    ("echo drain > state", |engine, root| engine.set_state(root, 0.into(), EXCL_23, b"drain\n")),
    ("a write to config", |engine, root| {
        let config = r#"{"pools":{"excl":{"exclusive":true,"lists":["1"]},"shared":{"lists":["4-5","2-3"]},"more":{"lists":["6"]}}}"#;
        engine.set_config(root, 0.into(), config.as_bytes())
    }),
];

/// 100 has the list 1 of the exclusive pool, 101 the list of the shared one.
fn bed() -> Bed {
    let bed = Bed::new();
    for pid in [SHELL, 100, 101] {
        bed.world.spawn(pid, ONLINE, |_| ());
    }
    assert_eq!(bed.engine.add_pool(caller(0, 0), "empty").unwrap(), EMPTY);
    bed.write(Target::List(EXCL_1), SHELL, "100").unwrap();
    bed.write(Target::List(SHARED_45), SHELL, "101").unwrap();
    bed.world.take_snapshots();
    bed
}

/// The configuration, as clients see it.
fn seen(engine: &Engine<Fake>) -> Vec<String> {
    let claims = engine.configuration();
    let pool = |(_, pool): (PoolId, &crate::model::claims::Pool)| {
        let lists: Vec<String> = pool
            .lists()
            .filter_map(|id| claims.list(id))
            .map(|list| format!("{} {}", list.name(), list.is_draining()))
            .collect();
        let flags = [pool.is_partial(), pool.is_transient()];
        format!("{} {:?} {flags:?}: {lists:?}", pool.name(), pool.exclusivity())
    };
    let mut all: Vec<String> = claims.pools().map(pool).collect();
    drop(claims);
    all.push(format!("{:?}", engine.attributes(EXCL_1.0)));
    all
}

/// One new task for each target. Returns the claims that are granted.
fn claim_everything(engine: &Engine<Fake>, world: &World, first: u32) -> Vec<(u32, ListId)> {
    let mut granted = Vec::new();
    for (pid, target) in (first..).zip(TARGETS) {
        world.spawn(pid, ONLINE, |_| ());
        let data = pid.to_string();
        if engine.write_tasks(target, caller(SHELL, 0), 0.into(), data.as_bytes(), false).is_ok() {
            let claims = engine.configuration();
            granted.extend(claims.claims().filter(|it| it.task.pid.get() == pid).map(|it| (pid, it.list)));
        }
    }
    granted
}

/// The worker may die at any of these moments; the next one keeps these claims.
fn check_next_workers(world: &World, claims: &[(u32, ListId)], context: &str) {
    for (index, snapshot) in world.take_snapshots().iter().enumerate() {
        let next = Bed::after_crash(snapshot);
        next.check_consistency();
        let found = next.claims();
        for claim in claims {
            assert!(found.contains(claim), "{context}: {claim:?} is lost at moment {index}: {found:?}");
        }
    }
}

fn full() -> AppendError {
    std::io::Error::from(std::io::ErrorKind::StorageFull).into()
}

#[test]
fn while_a_change_is_stored_it_is_unseen_and_claims_follow_both_rules() {
    for (name, change) in CHANGES {
        for stored in [false, true] {
            let bed = bed();
            let before = seen(&bed.engine);
            let acknowledged = Arc::new(Mutex::new(vec![(100, EXCL_1), (101, SHARED_45)]));
            let (engine, claims) = (Arc::downgrade(&bed.engine), Arc::clone(&acknowledged));
            let (expected, mut first) = (before.clone(), 1000);
            bed.on_step(move |step, world| {
                let engine = engine.upgrade().unwrap();
                let is_answer = |record: &Record| matches!(record, Record::Answered { request: 42, .. });
                // Before it is stored, and between that and its effect.
                let is_moment = matches!(step, Step::Store)
                    || matches!(step, Step::Append(record) if fakes::flat(record).any(is_answer));
                if !is_moment {
                    return;
                }
                let context = format!("{name}, stored: {stored}, at {step:?}");
                assert_eq!(seen(&engine), expected, "{context}");
                let mut claims = claims.lock();
                check_next_workers(world, &claims, &context);
                claims.extend(claim_everything(&engine, world, first));
                first += 100;
                // From here on, these claims are acknowledged.
                world.take_snapshots();
                if !stored {
                    world.fail_appends(Some(full));
                }
            });
            let root = Caller { request: 42, ..caller(SHELL, 0) };
            let changed = change(&bed.engine, root);
            bed.check_locks_at_each_step();
            bed.world.fail_appends(None);
            assert_eq!(changed.is_ok(), stored, "{name}: {changed:?}");
            assert_eq!(seen(&bed.engine) == before, !stored, "{name}: {:?}", seen(&bed.engine));
            let acknowledged = acknowledged.lock();
            assert!(acknowledged.len() > 2, "{name}: some lists had room");
            check_next_workers(&bed.world, &acknowledged, &format!("{name}, stored: {stored}"));
            bed.check_consistency();
        }
    }
}

#[test]
fn a_change_that_was_not_stored_leaves_everything_as_before() {
    for (name, change) in CHANGES {
        let bed = bed();
        bed.world.fail_appends(Some(full));
        change(&bed.engine, caller(SHELL, 0)).unwrap_err();
        bed.world.fail_appends(None);
        let granted: Vec<ListId> =
            claim_everything(&bed.engine, &bed.world, 1000).into_iter().map(|(_, list)| list).collect();
        assert_eq!(granted, [EXCL_23, SHARED_45, SHARED_45], "{name}");
        bed.check_consistency();
    }
}

#[test]
fn a_change_that_was_stored_is_in_effect() {
    let expected: [Vec<ListId>; CHANGES.len()] = [
        vec![EXCL_1, EXCL_23, SHARED_45, EXCL_23, SHARED_45],
        vec![EXCL_23],
        vec![EXCL_23, SHARED_45, SHARED_45],
        vec![EXCL_23, SHARED_45, SHARED_45],
        vec![EXCL_23, SHARED_45, SHARED_45],
        vec![EXCL_23, SHARED_45, ListId(88), ListId(88)],
        vec![EXCL_23, SHARED_45, SHARED_45],
        vec![SHARED_45, SHARED_45],
        vec![EXCL_23, SHARED_45, SHARED_45],
        vec![EXCL_23, SHARED_45, SHARED_45],
        // Both tasks of the list that is shared now, and the other list of its old pool.
        vec![EXCL_1, EXCL_23, SHARED_45, EXCL_1],
        vec![EXCL_23, SHARED_45, SHARED_45],
        vec![EXCL_23, SHARED_45, SHARED_45],
        vec![SHARED_45, SHARED_45],
        vec![EXCL_23, SHARED_45, EXCL_23],
    ];
    for ((name, change), expected) in CHANGES.into_iter().zip(expected) {
        let bed = bed();
        change(&bed.engine, caller(SHELL, 0)).unwrap();
        let granted: Vec<ListId> =
            claim_everything(&bed.engine, &bed.world, 1000).into_iter().map(|(_, list)| list).collect();
        assert_eq!(granted, expected, "{name}");
    }
}
