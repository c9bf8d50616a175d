//! poll(2) on a `tasks` file reports that the file has changed since it was read, and nothing else.

use std::fs::{self, File};
use std::io::{Read as _, Seek as _};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use crate::harness::{Mount, Sleeper, TIMEOUT, errno, run, text, until, write};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, gettid};

/// The events of poll(2) if all are asked for.
fn events(file: &File, timeout: PollTimeout) -> PollFlags {
    let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLIN | PollFlags::POLLOUT | PollFlags::POLLPRI)];
    poll(&mut fds, timeout).expect("poll");
    fds[0].revents().expect("known events")
}

fn has_changed(file: &File) -> bool {
    events(file, PollTimeout::ZERO).contains(PollFlags::POLLPRI)
}

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

fn read(file: &mut File) -> String {
    let mut content = String::new();
    file.rewind().unwrap();
    file.read_to_string(&mut content).unwrap();
    content
}

/// Returns whether the thread (or process) sleeps in poll(2).
fn sleeps(tid: Pid) -> bool {
    fs::read_to_string(format!("/proc/{tid}/wchan")).is_ok_and(|function| function.contains("poll"))
}

/// A thread that has read a file and sleeps until it changes.
struct Poller {
    thread: JoinHandle<String>,
    tid: Pid,
}

impl Poller {
    /// Returns the content of the file once it has changed.
    fn on(mut file: File) -> Self {
        read(&mut file);
        Self::asleep(move |timeout| {
            poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLPRI)], timeout).expect("poll");
            read(&mut file)
        })
    }

    fn asleep(work: impl FnOnce(PollTimeout) -> String + Send + 'static) -> Self {
        let (tell, tid) = mpsc::channel();
        let thread = thread::spawn(move || {
            tell.send(gettid()).unwrap();
            work(PollTimeout::try_from(2 * TIMEOUT).unwrap())
        });
        let tid = tid.recv().unwrap();
        until("the poller sleeps", || sleeps(tid));
        Self { thread, tid }
    }

    fn content(self) -> String {
        until("the poller was woken", || self.thread.is_finished());
        self.thread.join().unwrap()
    }
}

#[test]
fn a_file_is_ready_after_a_change_until_it_is_read() {
    let mount = Mount::with_shared();
    let task = Sleeper::new();
    let (list, pool) = (mount.tasks("shared", "0"), mount.pool("shared").join("tasks"));
    let ordinary = PollFlags::POLLIN | PollFlags::POLLOUT;
    for path in [&list, &pool] {
        let mut file = open(path);
        let all = ordinary | PollFlags::POLLPRI | PollFlags::POLLERR;
        assert_eq!(events(&file, PollTimeout::ZERO), all, "nothing has been read, as in kernfs");
        read(&mut file);
        assert_eq!(events(&file, PollTimeout::ZERO), ordinary);
        write(&list, task.pid().to_string()).unwrap();
        assert_eq!(events(&file, PollTimeout::ZERO), all);
        assert!(has_changed(&file), "also to a second poll");
        read(&mut file);
        assert_eq!(events(&file, PollTimeout::ZERO), ordinary);
        write(&list, format!("-{}", task.pid())).unwrap();
        assert!(has_changed(&file));
    }
}

#[test]
fn a_change_of_the_state_is_reported() {
    let mount = Mount::with_shared();
    let task = Sleeper::new();
    let mut file = open(&mount.pool("shared").join("0/state"));
    assert_eq!(read(&mut file), "free\n");
    assert!(!has_changed(&file));
    write(&mount.tasks("shared", "0"), task.pid().to_string()).unwrap();
    assert!(has_changed(&file));
    assert_eq!(read(&mut file), "affinity\n");
    assert!(!has_changed(&file));
}

#[test]
fn only_changes_of_the_list_are_reported() {
    let mount = Mount::with_shared();
    let (a, b) = (Sleeper::new(), Sleeper::new());
    let paths = [mount.tasks("shared", "0"), mount.tasks("shared", "1"), mount.pool("shared").join("tasks")];
    let mut files = paths.each_ref().map(|path| open(path));
    let mut changed_after = |what: &dyn Fn()| {
        files.iter_mut().for_each(|file| drop(read(file)));
        what();
        files.each_ref().map(has_changed)
    };
    let [list_0, list_1, _] = &paths;
    let (claim, release) = (a.pid().to_string(), format!("-{}", a.pid()));
    assert_eq!(changed_after(&|| ()), [false, false, false]);
    assert_eq!(changed_after(&|| write(list_0, &claim).unwrap()), [true, false, true], "a claim");
    assert_eq!(changed_after(&|| write(list_0, &claim).unwrap()), [false, false, false], "a repeated claim");
    assert_eq!(changed_after(&|| write(list_1, &claim).unwrap()), [true, true, true], "a move");
    assert_eq!(
        changed_after(&|| write(list_0, &release).unwrap()),
        [false, false, false],
        "a write of 0 bytes"
    );
    assert_eq!(changed_after(&|| write(list_1, &release).unwrap()), [false, true, true], "a release");
    assert_eq!(changed_after(&|| assert!(write(list_1, "x").is_err())), [false, false, false], "a refusal");
    write(list_1, b.pid().to_string()).unwrap();
    let b = std::cell::Cell::new(Some(b));
    assert_eq!(changed_after(&|| b.take().unwrap().end()), [false, true, true], "a death");
}

#[test]
fn all_pollers_are_woken() {
    let mount = Mount::with_shared();
    let task = Sleeper::new();
    let (list, pool) = (mount.tasks("shared", "0"), mount.pool("shared").join("tasks"));
    let mut readers: Vec<Poller> = Vec::new();
    let mut sharers: Vec<Poller> = Vec::new();
    for _ in 0..25 {
        readers.push(Poller::on(open(&list)));
        readers.push(Poller::on(open(&pool)));
        let mut file = open(&list);
        read(&mut file);
        let file = Arc::new(file);
        for file in [Arc::clone(&file), file] {
            // Without a read, which would reset the other poller's state.
            sharers.push(Poller::asleep(move |timeout| {
                let woken = poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLPRI)], timeout);
                assert_eq!(woken, Ok(1));
                String::new()
            }));
        }
    }
    assert!(readers.iter().chain(&sharers).all(|poller| !poller.thread.is_finished()));
    write(&list, task.pid().to_string()).unwrap();
    for poller in readers {
        assert_eq!(poller.content(), format!("{}\n", task.pid()));
    }
    for poller in sharers {
        poller.content();
    }
}

#[test]
fn a_death_that_nobody_saw_wakes() {
    let mount = Mount::with_dataplane();
    let task = Sleeper::new();
    write(&mount.tasks("dataplane", "1"), task.pid().to_string()).unwrap();
    let pollers = [mount.tasks("dataplane", "1"), mount.pool("dataplane").join("tasks")]
        .map(|path| Poller::on(open(&path)));
    task.end();
    assert_eq!(pollers.map(Poller::content), ["", ""]);
}

#[test]
fn a_poller_is_not_woken_by_another_list() {
    let mount = Mount::with_shared();
    let (a, b) = (Sleeper::new(), Sleeper::new());
    let poller = Poller::on(open(&mount.tasks("shared", "1")));
    let tid = poller.tid;
    for _ in 0..20 {
        write(&mount.tasks("shared", "0"), a.pid().to_string()).unwrap();
        write(&mount.tasks("shared", "0"), format!("-{}", a.pid())).unwrap();
    }
    write(&mount.tasks("shared", "0"), a.pid().to_string()).unwrap();
    a.end();
    assert_eq!(mount.read("pools/shared/tasks"), "");
    until("it still sleeps", || sleeps(tid));
    write(&mount.tasks("shared", "1"), b.pid().to_string()).unwrap();
    assert_eq!(poller.content(), format!("{}\n", b.pid()), "otherwise it would have read nothing");
}

#[test]
fn a_poller_is_woken_when_its_list_is_removed() {
    let mount = Mount::with_dataplane();
    mount.make_pool("empty", false, &[]);
    for directory in [mount.pool("dataplane").join("1"), mount.pool("empty")] {
        let mut file = open(&directory.join("tasks"));
        read(&mut file);
        let poller = Poller::asleep(move |timeout| {
            let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
            poll(&mut fds, timeout).expect("poll");
            assert_eq!(fds[0].revents(), Some(PollFlags::POLLPRI | PollFlags::POLLERR));
            file.rewind().unwrap();
            assert_eq!(errno(file.read(&mut [0; 9])), Errno::ENODEV);
            "gone".into()
        });
        fs::remove_dir(&directory).unwrap();
        assert_eq!(poller.content(), "gone");
    }
}

#[test]
fn a_poller_is_woken_after_a_worker_death() {
    let mount = Mount::with_shared();
    let task = Sleeper::new();
    let mut file = open(&mount.tasks("shared", "0"));
    read(&mut file);
    let poller = Poller::asleep(move |timeout| {
        // It wakes once without a change, because the new worker does not know what was read before.
        loop {
            poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLPRI)], timeout).expect("poll");
            match read(&mut file) {
                nothing if nothing.is_empty() => {}
                content => break content,
            }
        }
    });
    let tid = poller.tid;
    for _ in 0..3 {
        let worker = mount.worker().expect("a worker");
        kill(Pid::from_raw(worker as i32), Signal::SIGKILL).unwrap();
        until("another worker serves", || mount.worker().is_some_and(|other| other != worker));
        assert_eq!(mount.read("pools/shared/0/tasks"), "");
        until("the poller sleeps again", || sleeps(tid));
    }
    write(&mount.tasks("shared", "0"), task.pid().to_string()).unwrap();
    assert_eq!(poller.content(), format!("{}\n", task.pid()));
}

/// `kcm isolate` of a command that prints its list; it sleeps until a list is free.
fn waiting(mount: &Mount, words: &[&str]) -> Sleeper {
    let command = ["isolate", "--pool=dataplane", "--wait", "--"].iter().chain(words).copied();
    let mut command = mount.kcm(&command.collect::<Vec<_>>());
    let waiting = Sleeper::spawn(command.stdout(Stdio::piped()));
    until("it waits", || sleeps(Pid::from_raw(waiting.pid() as i32)));
    waiting
}

#[test]
fn isolate_wait_gets_the_list_when_its_holder_dies() {
    let mount = Mount::with_dataplane();
    let holders = ["0", "1"].map(|list| {
        let task = Sleeper::new();
        write(&mount.tasks("dataplane", list), task.pid().to_string()).unwrap();
        task
    });
    let [first, second] = holders;
    let mut waiting = waiting(&mount, &["sh", "-c", "echo $KCM_CPUS_ASSIGNED"]);
    second.end();
    let mut output = String::new();
    waiting.child().stdout.take().unwrap().read_to_string(&mut output).unwrap();
    assert_eq!(output, "1\n");
    assert!(waiting.child().wait().unwrap().success());
    first.end();
}

#[test]
fn two_waiters_get_the_list_one_after_the_other() {
    let mount = Mount::new();
    mount.make_pool("dataplane", true, &["0"]);
    let holder = Sleeper::new();
    write(&mount.tasks("dataplane", "0"), holder.pid().to_string()).unwrap();
    let mut both = [waiting(&mount, &["sleep", "1000"]), waiting(&mount, &["sleep", "1000"])];
    holder.end();
    let mut served = Vec::new();
    until("both had the list", || {
        if let Ok(pid) = mount.read("pools/dataplane/0/tasks").trim().parse::<u32>() {
            assert!(both.iter().any(|waiting| waiting.pid() == pid), "{pid}");
            if !served.contains(&pid) {
                served.push(pid);
            }
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGTERM);
        }
        served.len() == 2
    });
    for waiting in &mut both {
        waiting.child().wait().unwrap();
    }
}

#[test]
fn isolate_wait_ends_after_its_timeout() {
    let mount = Mount::new();
    mount.make_pool("dataplane", true, &["0"]);
    let holder = Sleeper::new();
    write(&mount.tasks("dataplane", "0"), holder.pid().to_string()).unwrap();
    let started = Instant::now();
    let (out, err, status) =
        run(&mut mount.kcm(&["isolate", "--pool=dataplane", "--wait=1", "--", "echo", "started"]));
    assert!(started.elapsed().as_secs() >= 1);
    assert_eq!((&*out, status), ("", Some(1)));
    let begin = format!(
        "ERROR:root:No free cpu lists in pool dataplane: no list of dataplane is free (1 taken); \
         dataplane 0 is held by {} (sleep) for ",
        holder.pid()
    );
    let end = " s, the longest time; wait for one with poll(2), kcm isolate --wait or kcm claim --wait\n";
    let (waiting, err) = err.split_once('\n').unwrap();
    assert!(waiting.starts_with("INFO:root:waiting for dataplane: dataplane 0 is held by "), "{waiting}");
    assert!(err.starts_with(&begin) && err.ends_with(end), "{err}");
    assert_eq!(mount.read("pools/dataplane/0/tasks"), format!("{}\n", holder.pid()));
}

#[test]
fn a_client_killed_while_it_waits_never_hangs() {
    let mount = Mount::new();
    mount.make_pool("dataplane", true, &["0"]);
    let holder = Sleeper::new();
    write(&mount.tasks("dataplane", "0"), holder.pid().to_string()).unwrap();
    let daemons = mount.daemons();
    let mut stays = waiting(&mount, &["echo", "it lives"]);
    for _ in 0..10 {
        waiting(&mount, &["false"]).end();
    }
    let killed: Vec<Sleeper> = (0..10).map(|_| waiting(&mount, &["false"])).collect();
    killed.into_iter().for_each(Sleeper::end);
    holder.end();
    let mut output = Vec::new();
    stays.child().stdout.take().unwrap().read_to_end(&mut output).unwrap();
    assert_eq!(text(&output), "it lives\n");
    assert_eq!(mount.daemons(), daemons);
}
