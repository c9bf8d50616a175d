//! The time that one write may take, and all writes of one user.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use parking_lot::Mutex;

use super::fakes::Step;
use super::*;
use crate::model::refusal::Refusal;
use crate::model::rights::User;

const USER: u32 = 1000;
/// Processes of the user.
const FIRST: u32 = 100;

/// A bed with processes of a user, and a shell of that user.
fn bed(processes: u32) -> Bed {
    let bed = Bed::new();
    bed.world.spawn(SHELL, ONLINE, |task| task.uid = USER);
    for pid in FIRST..FIRST + processes {
        bed.world.spawn(pid, ONLINE, |task| task.uid = USER);
    }
    bed
}

fn write_as(engine: &Engine<Fake>, uid: u32, target: Target, data: &str) -> Result<(), Refusal> {
    let written = engine.write_tasks(target, caller(SHELL, uid), uid.into(), data.as_bytes(), false);
    written.map_err(|refused| refused.refusal)
}

fn pids(pids: std::ops::Range<u32>) -> String {
    pids.map(|pid| format!("{pid} ")).collect()
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

#[test]
fn each_attempt_finds_out_about_all_tasks() {
    let bed = bed(20);
    let engine = &bed.engine;
    let root = caller(0, 0);
    let pool = engine.add_pool(root, "many").unwrap();
    for cpu in ["0", "6", "7"] {
        engine.add_list(root, pool, cpu).unwrap();
    }
    for pid in FIRST..FIRST + 20 {
        bed.world.change(pid, |task| task.allowed = cpus("1-5"));
    }
    bed.world.take_steps();
    let refused = write_as(engine, USER, Target::Pool(pool), &pids(FIRST..FIRST + 20)).unwrap_err();
    assert_eq!(refused.errno(), Errno::EINVAL, "{refused:?}");
    let steps = bed.world.take_steps();
    let tried = steps.iter().filter(|step| matches!(step, Step::SetMask(..))).count();
    assert_eq!(tried, 3 * 20, "each list once for each task");
    let attempts = steps.iter().filter(|step| matches!(step, Step::Append(_))).count();
    assert_eq!(attempts, 3);
    bed.check_consistency();
}

#[test]
fn tasks_that_die_in_turn_are_found_at_once() {
    let bed = bed(20);
    bed.on_step(|step, world| {
        if let Step::SetMask(task, _) = step
            && task.pid.get() % 2 == 0
        {
            world.kill(task.pid.get(), crate::model::command::Ending::Exited(0));
        }
    });
    bed.world.take_steps();
    write_as(&bed.engine, USER, Target::Pool(SHARED), &pids(FIRST..FIRST + 20)).unwrap();
    let steps = bed.world.take_steps();
    let intents = steps.iter().filter(|step| matches!(step, Step::Append(_))).count();
    assert!(intents <= 3, "{intents}");
    assert_eq!(bed.tasks(SHARED_45).split(',').count(), 10);
    bed.check_consistency();
}

#[test]
fn a_command_is_refused_at_the_first_process_of_somebody_else() {
    let bed = bed(1);
    for pid in 200..300 {
        bed.world.spawn(pid, ONLINE, |_| ());
    }
    let before = bed.world.looks();
    let refused = write_as(&bed.engine, USER, Target::Pool(SHARED), &format!("{FIRST} {}", pids(200..300)));
    assert_eq!(refused, Err(Refusal::NotPermitted { uid: USER }));
    assert_eq!(bed.world.looks() - before, 2);
    assert_eq!(bed.tasks(SHARED_45), "");
}

#[test]
fn a_write_of_a_user_ends_when_its_time_is_over() {
    let bed = bed(40);
    bed.on_step(|step, _| {
        if matches!(step, Step::SetMask(..)) {
            std::thread::sleep(ms(20));
        }
    });
    let all = pids(FIRST..FIRST + 40);
    let started = Instant::now();
    let refused = write_as(&bed.engine, USER, Target::Pool(SHARED), &all);
    assert_eq!(refused, Err(Refusal::OutOfTime { uid: USER }));
    assert!(started.elapsed() < ms(700), "{:?}", started.elapsed());
    assert_eq!(bed.tasks(SHARED_45), "", "all of it, or nothing");
    bed.check_consistency();
    // Root has more time.
    write_as(&bed.engine, 0, Target::Pool(SHARED), &all).unwrap();
    assert_eq!(bed.tasks(SHARED_45).split(',').count(), 40);
}

#[test]
fn who_has_used_up_the_time_of_its_writes_waits_for_nothing() {
    let bed = bed(2);
    let engine = &bed.engine;
    let waiting = |uid: u32| engine.allowance(caller(SHELL, uid), User::from(uid)).waiting;
    assert_eq!(waiting(USER), ms(200), "as long as for any other write");
    let world = Arc::clone(&bed.world);
    bed.on_step(move |step, _| {
        if matches!(step, Step::SetMask(..)) {
            world.spend(ms(300));
        }
    });
    write_as(engine, USER, Target::Pool(SHARED), &FIRST.to_string()).unwrap();
    assert_eq!((waiting(USER), waiting(USER + 1), waiting(0)), (Duration::ZERO, ms(200), ms(200)));
    let unsettled = || engine.allowance(caller(SHELL, USER), User::from(USER)).unsettled(caller(SHELL, USER));
    assert_eq!(unsettled(), Refusal::OutOfTime { uid: USER });
    // A write that takes no time still works.
    bed.check_locks_at_each_step();
    write_as(engine, USER, Target::Pool(SHARED), &format!("-{FIRST}")).unwrap();
    bed.world.pass(ms(400));
    assert!((ms(40)..ms(60)).contains(&waiting(USER)), "{:?}", waiting(USER));
    bed.world.pass(ms(2_000));
    assert_eq!((waiting(USER), unsettled()), (ms(200), Refusal::Unsettled));
    // Root's writes use up nobody's time.
    let world = Arc::clone(&bed.world);
    bed.on_step(move |_, _| world.spend(ms(300)));
    write_as(engine, 0, Target::Pool(SHARED), &FIRST.to_string()).unwrap();
    assert_eq!((waiting(USER), waiting(0)), (ms(200), ms(200)));
}

#[test]
fn a_write_to_a_queue_counts_like_one_to_tasks() {
    let bed = bed(1);
    let engine = &bed.engine;
    let world = Arc::clone(&bed.world);
    bed.on_step(move |step, _| {
        if matches!(step, Step::Append(_)) {
            world.spend(ms(150));
        }
    });
    let enter = |uid: u32| {
        let data = FIRST.to_string();
        engine.enter_queue(caller(SHELL, uid), uid.into(), SHARED, data.as_bytes(), 1).unwrap();
        engine.allowance(caller(SHELL, USER), User::from(USER)).waiting
    };
    assert_eq!((enter(0), enter(USER)), (ms(200), ms(100)), "root's writes use up nobody's time");
}

#[test]
fn a_write_without_time_does_not_wait_for_another_one() {
    let bed = bed(2);
    engine_without_time(&bed);
    let (engine, inner) = (Arc::clone(&bed.engine), Arc::new(Mutex::new(None)));
    let result = Arc::clone(&inner);
    bed.world.on_step(move |step, _| {
        if matches!(step, Step::SetMask(..)) {
            let started = Instant::now();
            let refused = write_as(&engine, USER, Target::List(EXCL_23), &FIRST.to_string());
            *result.lock() = Some((refused, started.elapsed()));
        }
    });
    write_as(&bed.engine, 0, Target::List(EXCL_1), &FIRST.to_string()).unwrap();
    bed.world.off_step();
    let (refused, took) = inner.lock().take().unwrap();
    assert_eq!(refused, Err(Refusal::TaskBusy));
    assert!(took < ms(100), "{took:?}");
    bed.check_consistency();
}

fn engine_without_time(bed: &Bed) {
    bed.engine.spend_write_time(USER, 10_000_000_000);
}
