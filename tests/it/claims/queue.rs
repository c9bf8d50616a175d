//! Waiting in turn: the `queue` file of a pool.

use std::fs::{self, File};
use std::io::{Read as _, Seek as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::thread;

use crate::harness::{
    Mount, NOBODY, Sleeper, TIMEOUT, as_nobody, errno, held, set_mode, sleeper_of_nobody, until, write,
};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// A place in the queue of the pool `dataplane`.
struct Waiter(File);

impl Waiter {
    fn new(mount: &Mount, task: u32) -> Self {
        let file =
            File::options().read(true).write(true).open(mount.pool("dataplane").join("queue")).unwrap();
        (&file).write_all(task.to_string().as_bytes()).unwrap();
        Self(file)
    }

    /// Whether its turn comes within this time.
    fn has_turn(&self, timeout: PollTimeout) -> bool {
        poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLPRI)], timeout).unwrap() == 1
    }

    fn await_turn(&self) {
        assert!(self.has_turn(PollTimeout::try_from(TIMEOUT).unwrap()), "its turn does not come");
    }

    fn read(&mut self) -> String {
        let mut text = String::new();
        self.0.rewind().unwrap();
        self.0.read_to_string(&mut text).unwrap();
        text
    }
}

/// A mount whose pool `dataplane` has one list, and the holder of that list.
fn with_holder() -> (Mount, Sleeper) {
    let mount = Mount::new();
    mount.make_pool("dataplane", true, &["0"]);
    let holder = Sleeper::new();
    write(&mount.tasks("dataplane", "0"), holder.pid().to_string()).unwrap();
    (mount, holder)
}

fn claim(mount: &Mount, task: u32) -> std::io::Result<()> {
    write(&mount.pool("dataplane").join("tasks"), task.to_string())
}

#[test]
fn tasks_get_the_list_in_the_order_in_which_they_came() {
    let (mount, holder) = with_holder();
    let tasks: Vec<Sleeper> = (0..3).map(|_| Sleeper::new()).collect();
    let waiters: Vec<Waiter> = tasks.iter().map(|task| Waiter::new(&mount, task.pid())).collect();
    assert!(waiters.iter().all(|waiter| !waiter.has_turn(PollTimeout::ZERO)));
    holder.end();
    for (n, (task, waiter)) in tasks.into_iter().zip(waiters).enumerate() {
        waiter.await_turn();
        if n == 0 {
            // Those behind it, and tasks that do not wait, are refused.
            let other = Sleeper::new();
            assert_eq!(errno(claim(&mount, other.pid())), Errno::EBUSY);
            let reason = mount.read("self/last_error");
            assert!(
                reason.contains("the free lists of dataplane are for 3 tasks that wait in turn"),
                "{reason}"
            );
            assert_eq!(errno(write(&mount.tasks("dataplane", "0"), other.pid().to_string())), Errno::EBUSY);
        }
        claim(&mount, task.pid()).unwrap();
        assert_eq!(held(&mount.tasks("dataplane", "0")), [task.pid()]);
        drop(waiter);
        task.end();
    }
    assert_eq!(mount.read("pools/dataplane/queue"), "");
    claim(&mount, Sleeper::new().pid()).unwrap();
}

#[test]
fn the_file_shows_who_waits_since_when() {
    let (mount, holder) = with_holder();
    let (first, second) = (Sleeper::new(), Sleeper::new());
    let waiting = Waiter::new(&mount, first.pid());
    let mut own = Waiter::new(&mount, second.pid());
    let columns = |text: String| -> Vec<Vec<String>> {
        text.lines().map(|line| line.split(' ').map(str::to_owned).collect()).collect()
    };
    let lines = columns(own.read());
    for (line, task, rest) in
        [(&lines[0], &first, &["waiting", "sleep"][..]), (&lines[1], &second, &["waiting", "self", "sleep"])]
    {
        assert_eq!(line[..2], [task.pid().to_string(), "0".to_owned()]);
        assert!(line[2].len() == "2026-11-24T10:15:02.250Z".len() && line[2].ends_with('Z'), "{line:?}");
        assert_eq!(line[3..], *rest);
    }
    holder.end();
    waiting.await_turn();
    let lines = columns(mount.read("pools/dataplane/queue"));
    assert_eq!((&*lines[0][3], &*lines[1][3]), ("turn", "waiting"));
    assert_eq!(lines[1].len(), 5, "another open file");
}

#[test]
fn a_waiter_that_is_killed_costs_nothing() {
    let (mount, holder) = with_holder();
    let queue = || mount.read("pools/dataplane/queue").lines().count();
    let mut shell = mount.bash("exec 3<> $C/pools/dataplane/queue; echo $$ >&3; exec sleep 1000");
    let killed = Sleeper::spawn(&mut shell);
    until("it waits", || queue() == 1);
    let (dead, task) = (Sleeper::new(), Sleeper::new());
    let of_dead = Waiter::new(&mount, dead.pid());
    let waiter = Waiter::new(&mount, task.pid());
    killed.end();
    until("its place is gone", || queue() == 2);
    // The task of this one has died, although its file is open.
    dead.end();
    holder.end();
    waiter.await_turn();
    claim(&mount, task.pid()).unwrap();
    assert!(of_dead.has_turn(PollTimeout::ZERO), "nobody waits for it any more, so it is not left waiting");
    assert_eq!(queue(), 0);
}

#[test]
fn a_task_that_does_not_claim_loses_its_turn_to_the_next() {
    let (mount, holder) = with_holder();
    let (idle, task) = (Sleeper::new(), Sleeper::new());
    let first = Waiter::new(&mount, idle.pid());
    let second = Waiter::new(&mount, task.pid());
    holder.end();
    first.await_turn();
    second.await_turn();
    assert_eq!(errno(claim(&mount, idle.pid())), Errno::EBUSY, "it is behind the other one now");
    claim(&mount, task.pid()).unwrap();
}

#[test]
fn places_survive_the_daemon() {
    let (mount, holder) = with_holder();
    let tasks: Vec<Sleeper> = (0..3).map(|_| Sleeper::new()).collect();
    let waiters: Vec<Waiter> = tasks.iter().map(|task| Waiter::new(&mount, task.pid())).collect();
    let before = mount.read("pools/dataplane/queue");
    mount.replace_worker();
    assert_eq!(mount.read("pools/dataplane/queue"), before);
    let poller = {
        let file = waiters[0].0.try_clone().unwrap();
        thread::spawn(move || Waiter(file).await_turn())
    };
    mount.replace_worker();
    holder.end();
    poller.join().unwrap();
    for (task, waiter) in tasks.into_iter().zip(waiters) {
        waiter.await_turn();
        claim(&mount, task.pid()).unwrap();
        drop(waiter);
        task.end();
    }
}

#[test]
fn who_may_claim_may_wait() {
    let (mount, _holder) = with_holder();
    mount.let_everybody_in();
    let (tasks, queue) = (mount.pool("dataplane").join("tasks"), mount.pool("dataplane").join("queue"));
    let open = || as_nobody(|| File::options().read(true).write(true).open(&queue).map(drop));
    assert_eq!(errno(open()), Errno::EACCES);
    chown(&tasks, None, Some(NOBODY)).unwrap();
    set_mode(&tasks, 0o664);
    open().unwrap();
    assert_eq!(fs::metadata(&queue).unwrap().gid(), NOBODY);
    set_mode(&queue, 0o600);
    assert_eq!(errno(open()), Errno::EACCES, "its own mode, if it was changed");
    // Nobody waits for the task of another user.
    set_mode(&queue, 0o666);
    let others = Sleeper::new();
    let own = sleeper_of_nobody();
    as_nobody(|| {
        let enter = |task: u32| write(&queue, task.to_string());
        assert_eq!(errno(enter(others.pid())), Errno::EPERM);
        enter(own.pid()).unwrap();
    });
}

#[test]
fn a_queue_takes_one_living_process_at_a_time() {
    let (mount, _holder) = with_holder();
    let queue = mount.pool("dataplane").join("queue");
    let task = Sleeper::new();
    for (data, expected) in [
        ("x".to_owned(), Errno::EINVAL),
        (format!("-{}", task.pid()), Errno::EINVAL),
        (format!("{} 0", task.pid()), Errno::EINVAL),
        ("2147483647".to_owned(), Errno::ESRCH),
    ] {
        assert_eq!(errno(write(&queue, &data)), expected, "{data}");
    }
    let file = File::options().write(true).open(&queue).unwrap();
    let enter = |task: u32| (&file).write_all(task.to_string().as_bytes());
    let other = Sleeper::new();
    enter(task.pid()).unwrap();
    let second = Waiter::new(&mount, other.pid());
    enter(task.pid()).unwrap();
    let order: Vec<u32> = mount
        .read("pools/dataplane/queue")
        .lines()
        .map(|line| line.split(' ').next().unwrap().parse().unwrap())
        .collect();
    assert_eq!(
        order,
        [other.pid(), task.pid()],
        "an open file has one place, and loses it when it asks again"
    );
    drop(second);
}

#[test]
fn a_user_has_at_most_256_places() {
    let (mount, _holder) = with_holder();
    mount.let_everybody_in();
    let queue = mount.pool("dataplane").join("queue");
    set_mode(&queue, 0o666);
    let task = sleeper_of_nobody();
    let files: Vec<File> = as_nobody(|| {
        let open = |_| File::options().write(true).open(&queue).unwrap();
        let files: Vec<File> = (0..257).map(open).collect();
        let enter = |file: &File| (&*file).write_all(task.pid().to_string().as_bytes());
        assert!(files[..256].iter().all(|file| enter(file).is_ok()));
        assert_eq!(errno(enter(&files[256])), Errno::ENOSPC);
        files
    });
    let own = Sleeper::new();
    drop(Waiter::new(&mount, own.pid()));
    drop(files);
    until("all places are gone", || mount.read("pools/dataplane/queue").is_empty());
}

#[test]
fn lists_that_are_added_are_given_in_turn_and_a_removed_pool_wakes_all() {
    let (mount, _holder) = with_holder();
    let (one, two) = (Sleeper::new(), Sleeper::new());
    let (first, second) = (Waiter::new(&mount, one.pid()), Waiter::new(&mount, two.pid()));
    fs::create_dir(mount.pool("dataplane").join("1")).unwrap();
    first.await_turn();
    assert!(!second.has_turn(PollTimeout::ZERO));
    claim(&mount, one.pid()).unwrap();
    one.end();
    second.await_turn();
    claim(&mount, two.pid()).unwrap();
    let three = Sleeper::new();
    let third = Waiter::new(&mount, three.pid());
    two.end();
    third.await_turn();
    drop(_holder);
    until("the lists are free", || held(&mount.pool("dataplane").join("tasks")).is_empty());
    let fourth = Waiter::new(&mount, three.pid());
    for list in ["0", "1"] {
        fs::remove_dir(mount.pool("dataplane").join(list)).unwrap();
    }
    fs::remove_dir(mount.pool("dataplane")).unwrap();
    assert!(third.has_turn(PollTimeout::ZERO) && fourth.has_turn(PollTimeout::ZERO));
}
