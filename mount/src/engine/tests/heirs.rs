//! Heirs and intruders: who is found, who waits for the search, and what is reported.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::fakes::{FakeTask, Step, cpus};
use super::*;
use crate::clock;
use crate::model::command::Ending;

const USER: u32 = 1000;

/// The holder 100 of a user is on the list 1, and 101 of root on the list 2-3; 102 and 103 are free.
fn bed() -> Bed {
    let bed = Bed::new();
    bed.world.spawn(SHELL, ONLINE, |_| ());
    bed.world.spawn(100, ONLINE, |task| task.uid = USER);
    for pid in [101, 102, 103] {
        bed.world.spawn(pid, ONLINE, |_| ());
    }
    bed.write(Target::List(EXCL_1), SHELL, "100").unwrap();
    bed.write(Target::List(EXCL_23), SHELL, "101").unwrap();
    bed.world.take_steps();
    bed
}

fn of(uid: u32) -> impl FnOnce(&mut FakeTask) {
    move |task| task.uid = uid
}

/// The events since the start, as `event pid`, without refusals.
fn events(bed: &Bed) -> Vec<String> {
    let (text, _) = bed.engine.show_events(None);
    let events = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    events.map(|it| format!("{} {}", it["event"].as_str().unwrap(), it["pid"])).collect()
}

fn scans(bed: &Bed) -> usize {
    bed.world.take_steps().iter().filter(|step| **step == Step::Scan).count()
}

#[test]
fn the_oldest_heir_is_taken_and_of_those_the_lowest_pid() {
    let bed = bed();
    let now = bed.world.task(SHELL).started + 1000;
    for (pid, started) in [(209, now + 60), (208, now + 55), (207, now + 55), (202, 1)] {
        bed.world.spawn(pid, "1", |task| (task.uid, task.started) = (USER, started));
    }
    let holders = [100, 207, 208, 209].map(|pid| {
        let holder = bed.tasks(EXCL_1);
        bed.world.kill(pid, Ending::Exited(0));
        holder
    });
    assert_eq!((holders.join(" "), bed.tasks(EXCL_1)), ("100 207 208 209".to_owned(), String::new()));
    bed.check_consistency();
}

#[test]
fn other_threads_count_if_no_first_thread_does() {
    let bed = bed();
    bed.world.spawn(200, "5", |task| (task.uid, task.masks) = (USER, vec![cpus("5"), cpus("5"), cpus("1")]));
    bed.world.spawn(201, "1", of(USER));
    bed.world.kill(100, Ending::Exited(0));
    assert_eq!(bed.tasks(EXCL_1), "201", "younger, but with its first thread");
    bed.world.kill(201, Ending::Exited(0));
    assert_eq!(bed.tasks(EXCL_1), "200");
    bed.world.kill(200, Ending::Exited(0));
    assert_eq!(bed.tasks(EXCL_1), "");
}

#[test]
fn in_the_root_cgroup_the_user_at_the_death_decides() {
    for (change, ending, inherits) in [
        (USER, Ending::Exited(0), false),
        (7, Ending::Exited(0), true),
        // Its parent has collected it, and the kernel has forgotten its user.
        (7, Ending::Unknown, false),
    ] {
        let bed = bed();
        bed.world.spawn(200, "1", of(8));
        bed.world.change(100, of(change));
        bed.world.kill(100, ending);
        assert_eq!(bed.tasks(EXCL_1), if inherits { "200" } else { "" }, "{change} {ending:?}");
        bed.check_consistency();
    }
}

#[test]
fn the_cgroup_decides_for_another_user() {
    for (cgroup, inherits) in [("/a", true), ("/a/b", true), ("/b", false), ("/", false)] {
        let bed = bed();
        bed.write(Target::List(EXCL_1), SHELL, "-100").unwrap();
        bed.world.change(102, |task| (task.uid, task.cgroup) = (USER, "/a"));
        bed.write(Target::List(EXCL_1), SHELL, "102").unwrap();
        bed.world.spawn(200, "1", |task| (task.uid, task.cgroup) = (8, cgroup));
        bed.world.kill(102, Ending::Killed(9));
        // The next worker knows it as well.
        let next = Bed::after_crash(&bed.world.snapshot());
        for bed in [bed, next] {
            assert_eq!(bed.tasks(EXCL_1), if inherits { "200" } else { "" }, "{cgroup}");
            bed.check_consistency();
        }
    }
}

#[test]
fn one_search_serves_all_deaths() {
    let bed = bed();
    bed.world.spawn(200, "1", of(USER));
    bed.world.spawn(201, "2", |_| ());
    bed.world.kill(100, Ending::Exited(0));
    bed.world.kill(101, Ending::Exited(0));
    assert_eq!((bed.tasks(EXCL_23), bed.tasks(EXCL_1)), ("201".to_owned(), "200".to_owned()));
    assert_eq!(scans(&bed), 1);
    bed.check_consistency();
}

#[test]
fn nobody_waits_for_the_search_of_another_list() {
    let bed = bed();
    let (engine, looked) = (Arc::downgrade(&bed.engine), Arc::new(AtomicUsize::new(0)));
    let count = Arc::clone(&looked);
    bed.on_step(move |step, world| {
        if *step != Step::Scan {
            return;
        }
        let Some(engine) = engine.upgrade() else { return };
        let begun = Instant::now();
        // While a search for list 1 runs, everything that concerns other lists is done.
        assert_eq!(&*engine.show_list_tasks(EXCL_23), b"101\n");
        engine.write_tasks(Target::List(EXCL_23), caller(SHELL, 0), 0.into(), b"-101", false).unwrap();
        engine.write_tasks(Target::Pool(EXCL), caller(SHELL, 0), 0.into(), b"102", false).unwrap();
        engine.write_tasks(Target::List(SHARED_45), caller(SHELL, 0), 0.into(), b"103", false).unwrap();
        assert_eq!(engine.claim_of_reader(caller(102, 0)).map(|list| list.cpus).as_deref(), Some("2-3"));
        engine.show_events(None);
        engine.show_metrics();
        assert!(begun.elapsed() < Duration::from_millis(100), "{:?}", begun.elapsed());
        // The list itself stays closed, and who asks for it waits for a bounded time.
        assert_eq!(&*engine.show_list_tasks(EXCL_1), b"100\n");
        assert!(begun.elapsed() > Duration::from_millis(150), "{:?}", begun.elapsed());
        world.spawn(200, "1", of(USER));
        count.fetch_add(1, Ordering::Relaxed);
    });
    bed.world.kill(100, Ending::Exited(0));
    assert_eq!(bed.tasks(EXCL_1), "200");
    assert_eq!(looked.load(Ordering::Relaxed), 1);
    bed.check_locks_at_each_step();
    bed.check_consistency();
}

#[test]
fn a_claim_waits_for_a_list_that_may_come_free_if_the_free_ones_cannot_serve() {
    let bed = bed();
    let (engine, looked) = (Arc::downgrade(&bed.engine), Arc::new(AtomicUsize::new(0)));
    let count = Arc::clone(&looked);
    bed.on_step(move |step, world| {
        if *step != Step::Scan || count.fetch_add(1, Ordering::Relaxed) > 0 {
            return;
        }
        let Some(engine) = engine.upgrade() else { return };
        engine.write_tasks(Target::List(EXCL_23), caller(SHELL, 0), 0.into(), b"-101", false).unwrap();
        world.set_offline(&"2".parse().unwrap());
        let begun = Instant::now();
        let refused = engine.write_tasks(Target::Pool(EXCL), caller(SHELL, 0), 0.into(), b"102", false);
        assert!(refused.is_err(), "list 1 is not free before the search has ended");
        assert!(begun.elapsed() > Duration::from_millis(150), "{:?}", begun.elapsed());
    });
    bed.world.kill(100, Ending::Exited(0));
    assert_eq!(bed.tasks(EXCL_1), "");
    assert!(looked.load(Ordering::Relaxed) > 0);
    bed.check_consistency();
}

#[test]
fn after_a_slow_search_there_is_a_pause_in_which_the_list_stays_closed() {
    let bed = bed();
    bed.on_step(|step, _| {
        if *step == Step::Scan {
            // CPU time counts, so that a search is not slow because others are running.
            let until = clock::of_this_thread() + 60_000_000;
            while clock::of_this_thread() < until {}
        }
    });
    for pid in [200, 201] {
        bed.world.spawn(pid, "1", of(USER));
    }
    bed.world.kill(100, Ending::Exited(0));
    assert_eq!(bed.tasks(EXCL_1), "200");
    let ended = Instant::now();
    let engine = Arc::clone(&bed.engine);
    std::thread::spawn(move || engine.search_forever());
    bed.world.kill(200, Ending::Exited(0));
    bed.engine.show_metrics();
    assert_eq!(bed.tasks(EXCL_23), "101");
    assert!(ended.elapsed() < Duration::from_millis(150), "{:?}", ended.elapsed());
    until(|| bed.tasks(EXCL_1) == "201");
    assert!(
        ended.elapsed() >= Duration::from_millis(170),
        "a pause of three times 60 ms: {:?}",
        ended.elapsed()
    );
}

#[test]
fn an_intruder_is_reported_once_while_it_stays_and_its_list_is_the_last_choice() {
    let bed = bed();
    // Older than the claim, so not an heir.
    bed.world.spawn(200, "1", |task| (task.uid, task.started) = (7, 1));
    bed.write(Target::List(EXCL_23), SHELL, "-101").unwrap();
    bed.world.kill(100, Ending::Exited(0));
    assert_eq!(bed.tasks(EXCL_1), "");
    let intruders =
        |bed: &Bed| events(bed).into_iter().filter(|it| it.starts_with("intruder")).collect::<Vec<_>>();
    assert_eq!(intruders(&bed), ["intruder 200"]);
    assert!(
        bed.engine
            .show_events(None)
            .0
            .contains(r#""event":"intruder","pool":"excl","cpus":"1","pid":200,"program":"fake","uid":7}"#)
    );
    assert!(bed.engine.show_metrics().contains("kcm_intruders_total 1\n"));
    // The other list first, although it has higher CPUs; then this one.
    bed.write(Target::Pool(EXCL), SHELL, "101").unwrap();
    assert_eq!((bed.tasks(EXCL_1), bed.tasks(EXCL_23)), (String::new(), "101".to_owned()));
    bed.write(Target::Pool(EXCL), SHELL, "102").unwrap();
    assert_eq!(bed.tasks(EXCL_1), "102");
    let last = bed.engine.show_events(None).0.lines().last().unwrap().to_owned();
    assert!(
        last.contains(
            r#""pid":102,"program":"fake","uid":0,"reason":"another process is pinned within the list""#
        ),
        "{last}"
    );
    // It is still there: no second event.
    bed.world.kill(102, Ending::Exited(0));
    assert_eq!(bed.tasks(EXCL_1), "");
    assert_eq!(intruders(&bed).len(), 1);
    // It leaves, and the list is the first choice again. When it comes back, it is reported again.
    bed.write(Target::List(EXCL_23), SHELL, "-101").unwrap();
    bed.world.change(200, |task| task.masks = vec![cpus("6")]);
    bed.write(Target::Pool(EXCL), SHELL, "103").unwrap();
    assert_eq!(bed.tasks(EXCL_1), "103");
    assert!(!bed.engine.show_events(None).0.lines().last().unwrap().contains("reason"));
    bed.world.change(200, |task| task.masks = vec![cpus("6"), cpus("1")]);
    bed.world.kill(103, Ending::Exited(0));
    assert_eq!(bed.tasks(EXCL_1), "");
    assert_eq!(intruders(&bed), ["intruder 200", "intruder 200"]);
    // It claims the list for itself: then it is no intruder.
    bed.write(Target::List(EXCL_1), SHELL, "200").unwrap();
    assert!(!bed.engine.show_events(None).0.lines().last().unwrap().contains("reason"));
    bed.check_consistency();
}

#[test]
fn what_stays_behind_on_a_released_list_is_an_intruder() {
    let bed = bed();
    bed.world.spawn(200, "1", of(USER));
    bed.world.spawn(201, "2-3", |_| ());
    bed.write(Target::List(EXCL_1), SHELL, "-100").unwrap();
    bed.write(Target::List(SHARED_45), SHELL, "101").unwrap();
    assert_eq!(scans(&bed), 0, "the writer does not look for them");
    bed.engine.search_now();
    let found = events(&bed);
    assert!(found.ends_with(&["intruder 200".to_owned(), "intruder 201".to_owned()]), "{found:?}");
    assert_eq!(scans(&bed), 1);
    bed.write(Target::List(EXCL_23), SHELL, "201").unwrap();
    bed.world.kill(201, Ending::Exited(0));
    // A list that is taken again is not looked at.
    bed.write(Target::List(EXCL_1), SHELL, "100 -100").unwrap_err();
    bed.engine.search_now();
    bed.check_consistency();
}

#[test]
fn of_many_intruders_some_are_reported() {
    let bed = bed();
    for pid in 200..300 {
        bed.world.spawn(pid, "1", |task| (task.uid, task.started) = (7, 1));
    }
    bed.world.kill(100, Ending::Exited(0));
    assert_eq!(bed.tasks(EXCL_1), "");
    assert!(bed.engine.show_metrics().contains("kcm_intruders_total 8\n"));
    bed.world.kill(200, Ending::Exited(0));
    bed.write(Target::List(EXCL_1), SHELL, "102").unwrap();
    bed.world.kill(102, Ending::Exited(0));
    assert_eq!(bed.tasks(EXCL_1), "");
    assert!(bed.engine.show_metrics().contains("kcm_intruders_total 9\n"), "one left, another is known now");
}

fn until(mut true_now: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !true_now() {
        assert!(Instant::now() < deadline);
    }
}
