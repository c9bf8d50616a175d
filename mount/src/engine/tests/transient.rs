//! Transient pools: what is removed, and when.

use std::time::{Duration, Instant};

use super::*;
use crate::engine::Unused;
use crate::engine::transient::Schedule;
use crate::model::command::Ending;

const PATIENCE: Duration = Duration::from_secs(10);
const AGAIN: Duration = Duration::from_secs(1);

fn transient() -> (Bed, Schedule, Instant) {
    let bed = Bed::new();
    bed.engine.set_transient(caller(0, 0), 0.into(), EXCL, b"1").unwrap();
    (bed, Schedule::default(), Instant::now())
}

/// What is to be removed at this time, sorted.
fn due(bed: &Bed, schedule: &mut Schedule, now: Instant) -> Vec<String> {
    let due = bed.engine.due_removals(schedule, true, now).now;
    let mut all: Vec<String> = due
        .into_iter()
        .map(|unused| match unused {
            Unused::Directory(name) => name,
            Unused::Mount => "the mount".to_owned(),
        })
        .collect();
    all.sort();
    all
}

#[test]
fn a_list_goes_when_its_last_task_leaves() {
    let (bed, mut schedule, now) = transient();
    bed.world.spawn(100, ONLINE, |_| ());
    bed.write(Target::List(EXCL_1), 100, "0").unwrap();
    assert_eq!(due(&bed, &mut schedule, now), Vec::<String>::new());
    assert!(bed.engine.due_removals(&mut schedule, true, now).has_tasks, "its death matters");
    bed.write(Target::List(EXCL_1), 100, "-0").unwrap();
    assert_eq!(due(&bed, &mut schedule, now), ["excl/1"]);
    assert_eq!(due(&bed, &mut schedule, now), Vec::<String>::new(), "that is tried");
    assert_eq!(bed.engine.due_removals(&mut schedule, true, now).next, Some(now + AGAIN));
    assert_eq!(due(&bed, &mut schedule, now + AGAIN), ["excl/1"], "and again");
    bed.write(Target::List(EXCL_1), 100, "0").unwrap();
    assert_eq!(due(&bed, &mut schedule, now + AGAIN * 3), Vec::<String>::new(), "unless somebody takes it");
    bed.world.kill(100, Ending::Exited(0));
    bed.engine.reap();
    assert_eq!(due(&bed, &mut schedule, now + AGAIN * 4), ["excl/1"]);
}

#[test]
fn whoever_makes_a_list_has_time_to_claim_it() {
    let (bed, mut schedule, now) = transient();
    assert_eq!(due(&bed, &mut schedule, now), Vec::<String>::new());
    assert_eq!(bed.engine.due_removals(&mut schedule, true, now).next, Some(now + PATIENCE));
    assert_eq!(due(&bed, &mut schedule, now + PATIENCE / 2), Vec::<String>::new());
    assert_eq!(due(&bed, &mut schedule, now + PATIENCE), ["excl/1", "excl/2-3"]);
    let empty = bed.engine.add_pool(caller(0, 0), "empty").unwrap();
    bed.engine.set_transient(caller(0, 0), 0.into(), empty, b"1").unwrap();
    assert_eq!(due(&bed, &mut schedule, now), Vec::<String>::new());
    assert_eq!(due(&bed, &mut schedule, now + PATIENCE / 2), Vec::<String>::new());
    assert!(due(&bed, &mut schedule, now + PATIENCE).contains(&"empty".to_owned()));
}

#[test]
fn a_pool_goes_with_its_last_list_and_the_mount_with_its_last_pool() {
    let (bed, mut schedule, now) = transient();
    let root = caller(0, 0);
    assert_eq!(due(&bed, &mut schedule, now), Vec::<String>::new());
    bed.engine.remove_list(root, EXCL_1).unwrap();
    assert_eq!(due(&bed, &mut schedule, now), Vec::<String>::new());
    bed.engine.remove_list(root, EXCL_23).unwrap();
    assert_eq!(due(&bed, &mut schedule, now), ["excl"]);
    bed.engine.remove_pool(root, EXCL).unwrap();
    assert_eq!(due(&bed, &mut schedule, now), Vec::<String>::new(), "another pool is there");
    bed.engine.remove_list(root, SHARED_45).unwrap();
    assert_eq!(due(&bed, &mut schedule, now + PATIENCE), Vec::<String>::new(), "which is not transient");
    bed.engine.remove_pool(root, SHARED).unwrap();
    assert_eq!(due(&bed, &mut schedule, now), Vec::<String>::new(), "the answer is on its way");
    assert_eq!(due(&bed, &mut schedule, now + AGAIN), ["the mount"]);
    let stays = bed.engine.due_removals(&mut Schedule::default(), false, now + PATIENCE);
    assert!(stays.now.is_empty() && stays.next.is_none(), "{stays:?}");
}

#[test]
fn the_next_worker_knows_what_is_transient() {
    let (bed, ..) = transient();
    bed.world.spawn(100, ONLINE, |_| ());
    bed.write(Target::List(EXCL_1), 100, "0").unwrap();
    let next = Bed::after_crash(&bed.world.snapshot());
    let (mut schedule, now) = (Schedule::default(), Instant::now());
    assert_eq!(due(&next, &mut schedule, now), Vec::<String>::new());
    next.world.kill(100, Ending::Exited(0));
    next.engine.reap();
    assert_eq!(due(&next, &mut schedule, now), ["excl/1"], "it has had a task");
    assert_eq!(due(&next, &mut schedule, now + PATIENCE), ["excl/1", "excl/2-3"]);
}
