//! A write that meets a task in flight waits for the other write and decides again.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use parking_lot::Mutex;

use super::fakes::Step;
use super::*;
use crate::journal::AppendError;
use crate::model::refusal::Refusal;

/// A bed whose engine waits this long.
fn bed_with_timeout(timeout: Duration) -> Bed {
    let Bed { world, engine } = Bed::new();
    world.spawn(SHELL, ONLINE, |_| ());
    world.spawn(100, ONLINE, |_| ());
    world.off_step();
    let mut engine = Arc::into_inner(engine).unwrap();
    engine.in_flight_timeout = timeout;
    Bed { world, engine: Arc::new(engine) }
}

#[test]
fn a_write_that_waits_for_too_long_is_refused() {
    let bed = bed_with_timeout(Duration::from_millis(1));
    let (engine, inner) = (Arc::clone(&bed.engine), Arc::new(Mutex::new(None)));
    let result = Arc::clone(&inner);
    bed.world.on_step(move |step, _| {
        if matches!(step, Step::SetMask(..)) {
            let target = Target::List(EXCL_23);
            *result.lock() = Some(engine.write_tasks(target, caller(SHELL, 0), 0.into(), b"100", false));
        }
    });
    bed.write(Target::List(EXCL_1), SHELL, "100").unwrap();
    bed.world.off_step();
    let refused = inner.lock().take().unwrap().unwrap_err();
    assert_eq!((&refused.refusal, refused.refusal.errno()), (&Refusal::TaskBusy, Errno::EAGAIN));
    assert_eq!(bed.tasks(EXCL_1), "100");
    bed.check_consistency();
}

#[test]
fn a_write_does_not_wait_for_one_that_waits_for_the_disk() {
    let bed = bed_with_timeout(Duration::from_secs(60));
    let (engine, inner) = (Arc::clone(&bed.engine), Arc::new(Mutex::new(None)));
    let result = Arc::clone(&inner);
    bed.world.on_step(move |step, world| {
        if matches!(step, Step::Append(_)) {
            world.fail_appends(Some(|| AppendError::Stalled));
            let target = Target::List(EXCL_23);
            *result.lock() = Some(engine.write_tasks(target, caller(SHELL, 0), 0.into(), b"100", false));
        }
    });
    let started = Instant::now();
    let outer = bed.write(Target::List(EXCL_1), SHELL, "100").unwrap_err();
    bed.world.off_step();
    let refused = inner.lock().take().unwrap().unwrap_err();
    assert_eq!((outer.refusal, refused.refusal), (Refusal::DiskStalled, Refusal::DiskStalled));
    assert!(started.elapsed() < Duration::from_secs(30));
    bed.world.fail_appends(None);
    bed.check_consistency();
}

#[test]
fn a_write_that_waits_is_decided_when_the_other_one_has_finished() {
    let bed = bed_with_timeout(Duration::from_secs(60));
    let (entered, is_entered) = mpsc::channel();
    let (resume, may_resume) = mpsc::channel::<()>();
    let may_resume = Mutex::new(may_resume);
    bed.world.on_step(move |step, _| {
        if matches!(step, Step::SetMask(..)) && entered.send(()).is_ok() {
            let _ = may_resume.lock().recv();
        }
    });
    let (first, second) = (Arc::clone(&bed.engine), Arc::clone(&bed.engine));
    let write = |engine: Arc<Engine<Fake>>, list| {
        move || engine.write_tasks(Target::List(list), caller(SHELL, 0), 0.into(), b"100", false)
    };
    let first = std::thread::spawn(write(first, EXCL_1));
    is_entered.recv().unwrap();
    let second = std::thread::spawn(write(second, EXCL_23));
    // The second one waits, whenever it comes.
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(bed.tasks(EXCL_1), "", "not yet claimed");
    bed.world.off_step();
    drop(resume);
    first.join().unwrap().unwrap();
    second.join().unwrap().unwrap();
    assert_eq!((bed.tasks(EXCL_1), bed.tasks(EXCL_23)), (String::new(), "100".to_owned()));
    bed.check_consistency();
}

#[test]
fn two_threads_that_want_one_list_get_it_once() {
    for round in 0..200 {
        let bed = bed_with_timeout(Duration::from_secs(60));
        bed.world.spawn(101, ONLINE, |_| ());
        let won: Vec<bool> = std::thread::scope(|scope| {
            let writers: Vec<_> = [100, 101]
                .into_iter()
                .map(|pid| {
                    let bed = &bed;
                    scope.spawn(move || bed.write(Target::List(EXCL_1), SHELL, &pid.to_string()).is_ok())
                })
                .collect();
            writers.into_iter().map(|writer| writer.join().unwrap()).collect()
        });
        assert_eq!(won.iter().filter(|won| **won).count(), 1, "round {round}");
        bed.check_consistency();
    }
}
