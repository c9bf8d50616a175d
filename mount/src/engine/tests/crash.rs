//! Crashes: the worker dies at every step of random histories, and the next one recovers.
//!
//! No acknowledged claim is lost, no exclusive list is given twice, and every task runs on the CPUs of its claim, or has
//! the mask that it had before.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;

use super::fakes::{Snapshot, cpus};
use super::*;
use crate::model::command::Ending;

/// The tasks, with the masks that they have before their first claim. No mask lies within a list, so none is an heir.
const TASKS: [(u32, &str); 4] = [(100, ONLINE), (101, "0,6-7"), (102, "0"), (103, ONLINE)];
const TARGETS: [Target; 5] = [
    Target::List(EXCL_1),
    Target::List(EXCL_23),
    Target::List(SHARED_45),
    Target::Pool(EXCL),
    Target::Pool(SHARED),
];

#[derive(Clone, Debug)]
enum Op {
    Write { target: usize, claim: Vec<u32>, release: Vec<u32>, trouble: Option<(usize, Trouble)> },
    Kill(u32, bool),
    Read,
}

/// What happens at a step of a write.
#[derive(Clone, Copy, Debug)]
enum Trouble {
    JournalFails,
    Dies(u32),
}

fn op() -> impl Strategy<Value = Op> {
    let pid = || prop::sample::select(&[100_u32, 101, 102, 103][..]);
    let few = || prop::sample::subsequence(&[100_u32, 101, 102, 103][..], 0..=2);
    let trouble = prop_oneof![Just(Trouble::JournalFails), pid().prop_map(Trouble::Dies)];
    let write = (
        0..TARGETS.len(),
        prop_oneof![3 => pid().prop_map(|pid| vec![pid]), 1 => few()],
        prop_oneof![3 => Just(Vec::new()), 2 => few()],
        prop::option::weighted(0.3, (0..8_usize, trouble)),
    );
    let write =
        write.prop_map(|(target, claim, release, trouble)| Op::Write { target, claim, release, trouble });
    prop_oneof![
        8 => write,
        1 => (pid(), any::<bool>()).prop_map(|(pid, by_signal)| Op::Kill(pid, by_signal)),
        1 => Just(Op::Read),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn any_history_survives_a_crash_at_every_step(ops in prop::collection::vec(op(), 1..8)) {
        let bed = Bed::new();
        bed.world.spawn(SHELL, ONLINE, |_| ());
        for (pid, mask) in TASKS {
            bed.world.spawn(pid, mask, |_| ());
        }
        for op in ops {
            let before = by_task(&bed);
            bed.world.take_snapshots();
            let journal_failed = run(&bed, &op);
            let after = by_task(&bed);
            let mut snapshots = bed.world.take_snapshots();
            let last = snapshots.pop().unwrap();
            for (index, snapshot) in snapshots.iter().enumerate() {
                check_recovery(snapshot, &[&before, &after], journal_failed, &format!("{op:?}, step {index}"));
            }
            // The operation is acknowledged. If the journal failed, a release may not be in the file.
            let expected: &[_] = if journal_failed { &[&before, &after] } else { &[&after] };
            check_recovery(&last, expected, journal_failed, &format!("after {op:?}"));
            bed.world.fail_appends(None);
            bed.check_consistency();
            check_masks(&bed, &format!("after {op:?}"));
        }
    }
}

fn by_task(bed: &Bed) -> BTreeMap<u32, ListId> {
    bed.claims().into_iter().collect()
}

/// Runs an operation. Returns whether the journal failed meanwhile.
fn run(bed: &Bed, op: &Op) -> bool {
    match op {
        Op::Write { target, claim, release, trouble } => {
            if let Some((at, trouble)) = *trouble {
                let steps = AtomicUsize::new(0);
                bed.on_step(move |_, world| {
                    if steps.fetch_add(1, Ordering::Relaxed) == at {
                        match trouble {
                            Trouble::JournalFails => world.fail_appends(Some(|| {
                                std::io::Error::from(std::io::ErrorKind::StorageFull).into()
                            })),
                            Trouble::Dies(pid) => world.kill(pid, Ending::Killed(9)),
                        }
                    }
                });
            }
            let words = claim.iter().map(u32::to_string);
            let words: Vec<String> = words.chain(release.iter().map(|pid| format!("-{pid}"))).collect();
            let _ = bed.write(TARGETS[*target], SHELL, &words.join(" "));
            bed.check_locks_at_each_step();
            matches!(trouble, Some((_, Trouble::JournalFails)))
        }
        Op::Kill(pid, by_signal) => {
            let ending = if *by_signal { Ending::Killed(9) } else { Ending::Exited(0) };
            bed.world.kill(*pid, ending);
            false
        }
        Op::Read => {
            bed.tasks(EXCL_1);
            bed.engine.show_events(None);
            false
        }
    }
}

/// A worker that starts at this snapshot has for each live task the claim that one of `expected` has. It may die at
/// any step of its start, too.
fn check_recovery(
    snapshot: &Snapshot,
    expected: &[&BTreeMap<u32, ListId>],
    journal_failed: bool,
    context: &str,
) {
    let next = Bed::after_crash(snapshot);
    check_recovered(&next, expected, journal_failed, context);
    for (index, snapshot) in next.world.take_snapshots().iter().enumerate() {
        let after_that = Bed::after_crash(snapshot);
        check_recovered(
            &after_that,
            expected,
            journal_failed,
            &format!("{context}, then step {index} of the recovery"),
        );
    }
}

fn check_recovered(bed: &Bed, expected: &[&BTreeMap<u32, ListId>], journal_failed: bool, context: &str) {
    // The mask of a task is restored although the record of its release could not be written. If the worker dies before
    // there is room, the claim is back without its mask.
    bed.check_consistency_except(|pid| match expected {
        [before, after] => journal_failed && before.contains_key(&pid) && !after.contains_key(&pid),
        _ => false,
    });
    let found = by_task(bed);
    for (pid, _) in TASKS.into_iter().filter(|(pid, _)| bed.world.is_alive(*pid)) {
        let is_expected = expected.iter().any(|claims| claims.get(&pid) == found.get(&pid));
        assert!(is_expected, "{context}: {pid} has {:?}, not one of {expected:?}", found.get(&pid));
    }
    check_masks(bed, context);
}

/// Tasks without a claim have the mask that they had before their first one.
fn check_masks(bed: &Bed, context: &str) {
    let claims = by_task(bed);
    for (pid, original) in TASKS.into_iter().filter(|(pid, _)| bed.world.is_alive(*pid)) {
        if !claims.contains_key(&pid) {
            assert_eq!(bed.world.task(pid).masks, [cpus(original)], "{context}: {pid}");
        }
    }
}
