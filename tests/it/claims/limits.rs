//! How many tasks the daemon can watch, and which share of that users other than root can take.

use std::time::{Duration, Instant};

use crate::harness::{Machine, Mount, Sleeper, as_nobody, errno, set_mode, sleeper_of_nobody, write};
use nix::errno::Errno;

/// How many tasks a daemon with [`FILES`] open files can watch.
const LIMIT: usize = FILES - 64;
const FILES: usize = 300;

/// A daemon that may open only a few files, with the pool `shared`.
fn with_few_files() -> Mount {
    let mount = Mount::not_mounted();
    mount.sh(&format!("ulimit -n {FILES}; exec $KCM mount --conf-dir=$C --state-dir=$S 2>&1"));
    mount.make_pool("shared", false, &["0", "1"]);
    mount
}

fn words(tasks: &[Sleeper]) -> String {
    tasks.iter().map(|task| format!("{} ", task.pid())).collect()
}

fn count(mount: &Mount) -> usize {
    mount.read("pools/shared/tasks").split(',').filter(|pid| !pid.is_empty()).count()
}

fn message(mount: &Mount) -> String {
    let line = mount.read("self/last_error");
    line.split_once(": ").expect("a PID and a reason").1.to_owned()
}

fn too_many(limit: usize) -> String {
    format!(
        "ENOSPC: {limit} tasks are watched, which is the limit; release some, or raise the daemon's open files \
        limit\n"
    )
}

#[test]
fn tasks_beyond_the_limit_are_refused() {
    let mount = with_few_files();
    let list = mount.tasks("shared", "0");
    let mut tasks: Vec<Sleeper> = (0..LIMIT).map(|_| Sleeper::new()).collect();
    let late = Sleeper::new();
    write(&list, words(&tasks)).expect("up to the limit in one command");
    assert_eq!(count(&mount), LIMIT);
    for file in [&list, &mount.tasks("shared", "1"), &mount.pool("shared").join("tasks")] {
        assert_eq!(errno(write(file, late.pid().to_string())), Errno::ENOSPC);
        assert_eq!(message(&mount), too_many(LIMIT));
    }
    write(&list, words(&tasks[..50])).expect("repeated tasks need no more room");
    write(&mount.tasks("shared", "1"), words(&tasks[..10])).expect("a move needs none either");
    assert_eq!(count(&mount), LIMIT);

    write(&mount.pool("shared").join("tasks"), format!("-{}", tasks[0].pid())).unwrap();
    write(&list, late.pid().to_string()).expect("there is room after a release");
    assert_eq!(errno(write(&list, tasks[0].pid().to_string())), Errno::ENOSPC);
    tasks.pop().unwrap().end();
    write(&list, tasks[0].pid().to_string()).expect("there is room after a death");
    assert_eq!(count(&mount), LIMIT);
}

#[test]
fn a_command_beyond_the_limit_does_nothing() {
    let mount = with_few_files();
    let list = mount.tasks("shared", "0");
    let tasks: Vec<Sleeper> = (0..LIMIT + 4).map(|_| Sleeper::new()).collect();
    assert_eq!(errno(write(&list, words(&tasks))), Errno::ENOSPC);
    assert_eq!(message(&mount), too_many(LIMIT));
    assert_eq!(count(&mount), 0);
    let (first, rest) = tasks.split_at(LIMIT - 10);
    write(&list, words(first)).unwrap();
    assert_eq!(errno(write(&list, words(rest))), Errno::ENOSPC);
    assert_eq!(message(&mount), too_many(LIMIT));
    assert_eq!(count(&mount), first.len());
    // More than the daemon could open at once to examine them.
    assert_eq!(errno(write(&list, words(&tasks[20..]))), Errno::ENOSPC);
    assert_eq!(message(&mount), too_many(LIMIT));
    assert_eq!(count(&mount), first.len());
    write(&list, words(&rest[..10])).unwrap();
    assert_eq!(count(&mount), LIMIT);
}

#[test]
fn dead_and_repeated_tasks_do_not_count() {
    let mount = with_few_files();
    let list = mount.tasks("shared", "0");
    let task = Sleeper::new();
    let dead: String = (0..LIMIT * 2).map(|n| format!("{} ", 2_000_000_000 + n)).collect();
    write(&list, format!("{dead}{}", task.pid())).unwrap();
    write(&list, format!("{} ", task.pid()).repeat(LIMIT * 2)).unwrap();
    write(&list, format!("-{} ", task.pid()).repeat(LIMIT * 2)).unwrap();
    assert_eq!(count(&mount), 0);
}

#[test]
fn other_users_get_at_most_half() {
    let mount = with_few_files();
    mount.let_everybody_in();
    let (list, half) = (mount.tasks("shared", "0"), LIMIT / 2);
    set_mode(&list, 0o666);
    let theirs: Vec<Sleeper> = (0..half + 2).map(|_| sleeper_of_nobody()).collect();
    // On a slow machine a user has to wait for more time to write, and a command for all of them would need too much.
    let in_time = |text: &str| loop {
        match write(&list, text) {
            Err(error) if error.raw_os_error() == Some(Errno::EAGAIN as i32) => std::thread::yield_now(),
            result => return result,
        }
    };
    as_nobody(|| {
        let (first, rest) = theirs.split_at(half - 4);
        first.chunks(10).for_each(|tasks| in_time(&words(tasks)).unwrap());
        assert_eq!(errno(in_time(&words(rest))), Errno::ENOSPC);
        assert_eq!(message(&mount), too_many(half));
        assert_eq!(count(&mount), half - 4, "the command had no effect");
        in_time(&words(&rest[..4])).unwrap();
        assert_eq!(errno(in_time(&theirs[half].pid().to_string())), Errno::ENOSPC);
        assert_eq!(message(&mount), too_many(half));
    });
    write(&list, theirs[half].pid().to_string()).expect("root may claim for them");
    let roots: Vec<Sleeper> = (0..LIMIT - half - 1).map(|_| Sleeper::new()).collect();
    write(&list, words(&roots)).expect("the other half is for root");
    assert_eq!(count(&mount), LIMIT);
    as_nobody(|| {
        in_time(&format!("-{}", theirs[0].pid())).unwrap();
        in_time(&theirs[half + 1].pid().to_string()).expect("in the room that the release has made");
    });
    assert_eq!(count(&mount), LIMIT);
}

#[test]
fn a_full_daemon_answers_everything_else() {
    let mount = with_few_files();
    let tasks: Vec<Sleeper> = (0..LIMIT).map(|_| Sleeper::new()).collect();
    write(&mount.tasks("shared", "0"), words(&tasks)).unwrap();
    mount.make_pool("other", true, &[]);
    let files: Vec<String> =
        mount.walk().into_iter().filter(|(_, stat)| stat.is_file()).map(|(path, _)| path).collect();
    let read = || files.iter().for_each(|file| drop(mount.read(file)));
    std::thread::scope(|scope| (0..8).for_each(|_| drop(scope.spawn(read))));
    mount.sh("echo -$$ > $C/pools/shared/tasks; read -r line < $C/self/claim; cat $C/info/events >/dev/null");
    drop(tasks);
    assert_eq!(count(&mount), 0);
    mount.sh("echo $$ > $C/pools/shared/tasks");
}

#[test]
fn a_crowd_and_lists_that_do_not_suit_it_end() {
    // The kernel knows none of these CPUs, so it refuses every list to every task.
    let cpus: Vec<String> = (1000..1064).map(|cpu| cpu.to_string()).collect();
    let mount = Mount::on_machine(&Machine::new(1, 1064, 1));
    mount.let_everybody_in();
    mount.make_pool("shared", false, &cpus.iter().map(String::as_str).collect::<Vec<_>>());
    let pool = mount.pool("shared").join("tasks");
    set_mode(&pool, 0o666);
    let tasks: Vec<Sleeper> = (0..50).map(|_| sleeper_of_nobody()).collect();
    let timed = |as_nobody_: bool| {
        let started = Instant::now();
        let write = || write(&pool, words(&tasks));
        let refused = errno(if as_nobody_ { as_nobody(write) } else { write() });
        (refused, started.elapsed())
    };
    let (refused, took) = timed(true);
    assert!(matches!(refused, Errno::EINVAL | Errno::EAGAIN), "{refused}");
    assert!(took < Duration::from_secs(2), "nobody waited {took:?}");
    let (refused, took) = timed(false);
    assert!(matches!(refused, Errno::EINVAL | Errno::EAGAIN), "{refused}");
    assert!(took < Duration::from_secs(15), "root waited {took:?}");
    assert_eq!(count(&mount), 0);
}
