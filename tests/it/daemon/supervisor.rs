//! A worker or a supervisor dies or hangs: clients see only a pause, and open files keep their meaning.
//!
//! Longer than 400 lines because it is a list of independent tests.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::harness::{Mount, Sleeper, errno, masks, signal, sleeps, until, write};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

#[test]
fn clients_see_a_killed_worker_as_a_pause() {
    let mount = Mount::with_shared();
    // Each client counts its own operations: a request in flight at one death is finished before the next death.
    let (stop, done) = (AtomicBool::new(false), [0; 3].map(AtomicUsize::new));
    let going_on = |client: usize| {
        done[client].fetch_add(1, Ordering::Relaxed);
        !stop.load(Ordering::Relaxed)
    };
    std::thread::scope(|scope| {
        for n in 0..2 {
            let (mount, going_on) = (&mount, &going_on);
            scope.spawn(move || {
                let task = Sleeper::new();
                let list = n.to_string();
                while going_on(n) {
                    write(&mount.tasks("shared", &list), task.pid().to_string()).expect("claim");
                    let text = fs::read(mount.tasks("shared", &list)).or_else(|error| {
                        // A restart may show only this: the rest of a snapshot is lost.
                        assert_eq!(error.raw_os_error(), Some(Errno::ESTALE as i32), "{error}");
                        fs::read(mount.tasks("shared", &list))
                    });
                    let text = String::from_utf8(text.expect("read")).unwrap();
                    assert!(text.trim().split(',').any(|pid| pid == task.pid().to_string()), "{text:?}");
                    assert_eq!(masks(task.pid()), std::slice::from_ref(&list));
                    write(&mount.tasks("shared", &list), format!("-{}", task.pid())).expect("release");
                    fs::metadata(mount.tasks("shared", &list)).expect("stat");
                }
            });
        }
        scope.spawn(|| {
            while going_on(2) {
                fs::create_dir(mount.pool("made")).expect("mkdir");
                fs::read_dir(mount.conf().join("pools"))
                    .expect("readdir")
                    .for_each(|e| drop(e.expect("an entry")));
                fs::remove_dir(mount.pool("made")).expect("rmdir");
            }
        });
        for n in 0..20 {
            let counts = || done.each_ref().map(|count| count.load(Ordering::Relaxed));
            let before = counts();
            until("all clients work", || {
                let now = counts();
                now.iter().zip(&before).all(|(now, before)| *now > before + 1)
                    && now.iter().sum::<usize>() > before.iter().sum::<usize>() + 20
            });
            mount.signal_worker(if n % 5 == 4 { Signal::SIGSEGV } else { Signal::SIGKILL });
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(!mount.log().contains("ERROR"), "{}", mount.log());
}

#[test]
fn last_error_survives_a_restart() {
    let mount = Mount::with_dataplane();
    let (holder, other) = (Sleeper::new(), Sleeper::new());
    write(&mount.tasks("dataplane", "0"), holder.pid().to_string()).unwrap();
    assert_eq!(errno(write(&mount.tasks("dataplane", "0"), other.pid().to_string())), Errno::EBUSY);
    let before = mount.read("self/last_error");
    assert!(before.contains("EBUSY"), "{before}");
    mount.replace_worker();
    assert_eq!(mount.read("self/last_error"), before);
    // It must survive a stop and a start, so it is not only in the daemon's memory.
    mount.stop();
    mount.start();
    assert_eq!(mount.read("self/last_error"), before);
}

#[test]
fn a_command_that_was_too_long_stays_refused() {
    let mount = Mount::with_shared();
    let file = OpenOptions::new().write(true).open(mount.tasks("shared", "0")).unwrap();
    let me = std::process::id().to_string();
    let long = " ".repeat(65537 - me.len()) + &me;
    assert_eq!(errno((&file).write(long.as_bytes())), Errno::E2BIG);
    mount.replace_worker();
    assert_eq!(errno((&file).write(me.as_bytes())), Errno::E2BIG);
    write(&mount.tasks("shared", "0"), " ").expect("another open file is not affected");
    drop(file);
    mount.replace_worker();
    write(&mount.tasks("shared", "0"), " ").expect("a closed file is forgotten");
}

#[test]
fn an_open_file_remembers_its_opener() {
    let mount = Mount::with_shared();
    let nobody = nix::unistd::User::from_name("nobody").unwrap().expect("the user nobody").uid;
    let tasks = mount.tasks("shared", "0");
    fs::set_permissions(&tasks, fs::Permissions::from_mode(0o666)).unwrap();
    fs::set_permissions(mount.home(), fs::Permissions::from_mode(0o755)).unwrap();
    let victim = Sleeper::new();
    let open = || {
        // Only in this thread.
        nix::unistd::setfsuid(nobody);
        OpenOptions::new().write(true).open(&tasks).expect("open as nobody")
    };
    let file = std::thread::scope(|scope| scope.spawn(open).join().unwrap());
    assert_eq!(errno((&file).write(victim.pid().to_string().as_bytes())), Errno::EPERM, "before");
    mount.replace_worker();
    assert_eq!(errno((&file).write(victim.pid().to_string().as_bytes())), Errno::EPERM, "after");
    write(&tasks, victim.pid().to_string()).expect("root's own open file");
}

#[test]
fn node_ids_are_never_reused_after_a_restart() {
    let mount = Mount::with_shared();
    let ino = |path: &str| fs::metadata(mount.conf().join(path)).unwrap().ino();
    let paths = ["", "pools", "pools/shared", "pools/shared/0/tasks", "pools/shared/exclusive", "self/claim"];
    let before = paths.map(ino);
    fs::create_dir(mount.pool("other")).unwrap();
    let other = ino("pools/other");
    let open = File::open(mount.pool("other").join("exclusive")).unwrap();
    fs::remove_dir(mount.pool("other")).unwrap();
    mount.replace_worker();
    assert_eq!(paths.map(ino), before);
    fs::create_dir(mount.pool("other")).unwrap();
    assert_ne!(ino("pools/other"), other, "the same name, but another node");
    assert_eq!(errno(open.read_at(&mut [0; 8], 0)), Errno::ENODEV, "an open file of a removed node");
}

#[test]
fn the_next_change_wakes_a_poller_after_a_restart() {
    let mount = Mount::with_shared();
    let mut file = File::open(mount.tasks("shared", "0")).unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    let events = |file: &File, timeout: PollTimeout| {
        let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
        poll(&mut fds, timeout).unwrap();
        fds[0].revents().unwrap()
    };
    assert_eq!(events(&file, PollTimeout::ZERO), PollFlags::empty());
    let task = Sleeper::new();
    std::thread::scope(|scope| {
        let sleeper = scope.spawn(|| {
            let mut file = file.try_clone().unwrap();
            // A restart may wake it without a change; a client that reads again sees that.
            loop {
                let found = events(&file, PollTimeout::from(20_000_u16));
                assert!(found.contains(PollFlags::POLLPRI), "not woken");
                let mut text = String::new();
                file.seek(SeekFrom::Start(0)).unwrap();
                file.read_to_string(&mut text).unwrap();
                if !text.is_empty() {
                    return text;
                }
            }
        });
        for _ in 0..3 {
            mount.replace_worker();
            std::thread::sleep(Duration::from_millis(50));
            assert!(!sleeper.is_finished());
        }
        write(&mount.tasks("shared", "0"), task.pid().to_string()).unwrap();
        assert_eq!(sleeper.join().unwrap(), format!("{}\n", task.pid()));
    });
    // The poll starts just before the worker dies; the next worker makes a change.
    std::thread::scope(|scope| {
        let sleeper = scope.spawn(|| events(&file, PollTimeout::from(20_000_u16)));
        mount.signal_worker(Signal::SIGKILL);
        write(&mount.tasks("shared", "0"), format!("-{}", task.pid())).unwrap();
        assert!(sleeper.join().unwrap().contains(PollFlags::POLLPRI));
    });
}

#[test]
fn the_rest_of_a_lost_snapshot_is_estale() {
    let mount = Mount::with_shared();
    let task = Sleeper::new();
    write(&mount.tasks("shared", "0"), task.pid().to_string()).unwrap();
    let (plain, polled) = (File::open(mount.tasks("shared", "0")), File::open(mount.tasks("shared", "0")));
    let (plain, polled) = (plain.unwrap(), polled.unwrap());
    let poll_it = || poll(&mut [PollFd::new(polled.as_fd(), PollFlags::POLLPRI)], PollTimeout::ZERO).unwrap();
    poll_it();
    let mut byte = [0; 1];
    for file in [&plain, &polled] {
        file.read_exact_at(&mut byte, 0).unwrap();
    }
    mount.replace_worker();
    poll_it();
    for file in [&plain, &polled] {
        assert_eq!(errno(file.read_at(&mut byte, 1)), Errno::ESTALE);
        file.read_exact_at(&mut byte, 0).expect("from the start");
        file.read_exact_at(&mut byte, 1).expect("and continues from there");
    }
}

#[test]
fn event_numbers_continue() {
    let mount = Mount::with_shared();
    let die = || {
        let task = Sleeper::new();
        write(&mount.tasks("shared", "0"), task.pid().to_string()).unwrap();
        task.end();
        assert_eq!(fs::read_to_string(mount.tasks("shared", "0")).unwrap(), "");
    };
    die();
    let seqs = |file: &str| -> Vec<u64> {
        let seq = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["seq"].as_u64();
        mount.read(file).lines().map(|line| seq(line).unwrap()).collect()
    };
    let (events, reclaimed) = (seqs("info/events"), seqs("info/reclaimed"));
    mount.replace_worker();
    assert_eq!(seqs("info/reclaimed"), reclaimed);
    die();
    let later = seqs("info/events");
    assert!(later.starts_with(&events) && later.is_sorted_by(|a, b| a < b), "{events:?} {later:?}");
    let both = seqs("info/reclaimed");
    assert_eq!((both.len(), both[0]), (2, reclaimed[0]));
    assert!(both[1] > both[0] && later.contains(&both[1]));
    write(&mount.conf().join("info/reclaimed"), reclaimed[0].to_string()).unwrap();
    mount.replace_worker();
    assert_eq!(seqs("info/reclaimed"), both[1..]);
}

#[test]
fn a_killed_supervisor_is_replaced_by_its_worker() {
    let mount = Mount::with_dataplane();
    let device = fs::metadata(mount.conf()).unwrap().dev();
    let task = Sleeper::new();
    write(&mount.tasks("dataplane", "0"), task.pid().to_string()).unwrap();
    for _ in 0..3 {
        let (supervisor, worker) = (mount.supervisor(), mount.worker().unwrap());
        signal(supervisor, Signal::SIGKILL);
        write(&mount.tasks("dataplane", "0"), task.pid().to_string()).expect("without a supervisor");
        until("there is a new supervisor", || mount.supervisor() != supervisor);
        assert_eq!(mount.worker(), Some(worker), "the worker keeps running");
        // The new supervisor does its work.
        mount.replace_worker();
        assert_eq!(fs::read_to_string(mount.tasks("dataplane", "0")).unwrap(), format!("{}\n", task.pid()));
    }
    assert_eq!(fs::metadata(mount.conf()).unwrap().dev(), device);
    assert_eq!(mount.daemons().len(), 2);
    assert_eq!(errno(write(&mount.tasks("dataplane", "1"), mount.supervisor().to_string())), Errno::EINVAL);
    mount.stop();
}

#[test]
fn a_stopped_daemon_is_taken_over() {
    let mount = Mount::with_shared();
    let device = fs::metadata(mount.conf()).unwrap().dev();
    let task = Sleeper::new();
    let open = OpenOptions::new().write(true).open(mount.tasks("shared", "0")).unwrap();
    let old = mount.daemons();
    old.iter().for_each(|pid| signal(*pid, Signal::SIGSTOP));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| (&open).write(task.pid().to_string().as_bytes()));
        mount.start();
        waiting.join().unwrap().expect("a write during all of this");
    });
    assert_eq!(fs::metadata(mount.conf()).unwrap().dev(), device);
    assert_eq!(fs::read_to_string(mount.tasks("shared", "0")).unwrap(), format!("{}\n", task.pid()));
    assert!(mount.daemons().iter().all(|pid| !old.contains(pid)) && mount.daemons().len() == 2);
}

#[test]
fn a_hanging_worker_is_replaced() {
    let mount = Mount::with_shared();
    let task = Sleeper::new();
    let worker = mount.signal_worker(Signal::SIGSTOP);
    // Until every thread has stopped, one of them may still serve.
    until("it is stopped", || {
        let mut threads = fs::read_dir(format!("/proc/{worker}/task")).unwrap();
        threads.all(|thread| {
            fs::read_to_string(thread.unwrap().path().join("stat")).is_ok_and(|stat| stat.contains(") T "))
        })
    });
    let started = Instant::now();
    write(&mount.tasks("shared", "0"), task.pid().to_string()).expect("only a pause");
    assert!(started.elapsed() < Duration::from_secs(19), "{:?}", started.elapsed());
    assert_ne!(mount.worker(), Some(worker));
    assert!(mount.log().contains("the worker does not answer; it is replaced"), "{}", mount.log());
}

#[test]
fn sigterm_to_either_process_is_a_clean_stop() {
    type Whom = fn(&Mount) -> u32;
    let whom: [Whom; 3] = [Mount::supervisor, |mount| mount.worker().unwrap(), Mount::supervisor];
    for (n, whom) in whom.into_iter().enumerate() {
        let mount = Mount::with_shared();
        let task = Sleeper::new();
        write(&mount.tasks("shared", "0"), task.pid().to_string()).unwrap();
        let open = File::open(mount.tasks("shared", "0")).unwrap();
        signal(whom(&mount), if n == 2 { Signal::SIGINT } else { Signal::SIGTERM });
        until("it has ended", || mount.daemons().is_empty());
        assert!(fs::read_dir(mount.conf()).unwrap().next().is_none(), "the mount point without a mount");
        assert_eq!(errno(open.read_at(&mut [0; 8], 0)), Errno::ENOTCONN);
        mount.start();
        assert_eq!(fs::read_to_string(mount.tasks("shared", "0")).unwrap(), format!("{}\n", task.pid()));
    }
}

#[test]
fn a_request_that_kills_workers_is_given_up() {
    let mount = Mount::with_shared();
    mount.stop();
    mount.start_with("KCM_FAULT", "intent-recorded*");
    let (task, worker) = (Sleeper::new(), mount.worker());
    assert_eq!(errno(write(&mount.tasks("shared", "0"), task.pid().to_string())), Errno::EIO);
    assert_ne!(mount.worker(), worker);
    let given_up: Vec<_> =
        mount.event_lines().into_iter().filter(|event| event["event"] == "given-up").collect();
    assert_eq!(given_up.len(), 1, "{:?}", mount.event_lines());
    assert_eq!(given_up[0]["errno"], "EIO");
    assert!(mount.log().contains("was in flight at three deaths"), "{}", mount.log());
    // No effect of the request is left, and operations that kill no worker succeed.
    assert_eq!(fs::read_to_string(mount.tasks("shared", "0")).unwrap(), "");
    assert!(masks(task.pid()) != ["0"]);
    fs::create_dir(mount.pool("other")).expect("another request");
}

#[test]
fn workers_that_die_at_once_are_restarted_slowly() {
    let mount = Mount::with_shared();
    // The state cannot be read, so each worker exits at once.
    let aside = mount.home().join("aside");
    fs::rename(mount.state(), &aside).unwrap();
    mount.signal_worker(Signal::SIGKILL);
    // The test counts the workers that were started in a period.
    std::thread::sleep(Duration::from_secs(4));
    let deaths = fs::read_to_string(aside.join("log")).unwrap().matches("the worker has died").count();
    assert!((5..20).contains(&deaths), "{deaths} workers died in four seconds");
    let task = Sleeper::new();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| write(&mount.tasks("shared", "0"), task.pid().to_string()));
        fs::rename(&aside, mount.state()).unwrap();
        waiting.join().unwrap().expect("only a pause");
    });
    assert_eq!(fs::read_to_string(mount.tasks("shared", "0")).unwrap(), format!("{}\n", task.pid()));
}

#[test]
fn damaged_state_does_not_end_the_mount() {
    let mount = Mount::with_shared();
    let task = Sleeper::new();
    write(&mount.tasks("shared", "0"), task.pid().to_string()).unwrap();
    // A directory in place of the file cannot be read as a file.
    fs::rename(mount.state().join("claims"), mount.home().join("claims")).unwrap();
    fs::create_dir(mount.state().join("claims")).unwrap();
    mount.replace_worker();
    assert_eq!(fs::read_to_string(mount.tasks("shared", "0")).unwrap(), "");
    assert!(mount.event_lines().iter().any(|event| event["event"] == "damaged"), "{:?}", mount.event_lines());
    write(&mount.tasks("shared", "0"), task.pid().to_string()).expect("claims work as before");
    let set_aside = fs::read_dir(mount.state())
        .unwrap()
        .filter_map(Result::ok)
        .any(|entry| entry.file_name().to_string_lossy().starts_with("claims.damaged-"));
    assert!(set_aside);
}

/// Private memory in KiB, without the pages that relocation of the program changes: in a debug build these are most
/// of it and say nothing about the supervisor.
fn private(pid: u32) -> u64 {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let (mut of_program, mut sum) = (false, 0);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        match first.strip_suffix(':') {
            // The first line of a mapping: addresses, modes, offset, device, inode, file.
            None => of_program = line.contains(" r--p ") && line.contains('/'),
            Some("Private_Clean" | "Private_Dirty") if !of_program => {
                sum += words.next().and_then(|kb| kb.parse::<u64>().ok()).unwrap_or(0);
            }
            Some(_) => {}
        }
    }
    sum
}

#[test]
fn an_idle_daemon_costs_almost_nothing() {
    // In a mount namespace in which nothing is mounted during the test: each change of the mount table wakes the
    // supervisor.
    let mount = Mount::not_mounted();
    let command = mount.bash("umount -a -l -t fuse.kcm; exec $KCM mount --conf-dir=$C --state-dir=$S");
    let mut arguments = vec!["--mount".as_ref(), "--propagation=private".as_ref(), command.get_program()];
    arguments.extend(command.get_args());
    let envs = command.get_envs().filter_map(|(name, value)| Some((name, value?)));
    assert!(Command::new("unshare").args(arguments).envs(envs).status().unwrap().success());
    let supervisor = mount.supervisor();
    let conf = format!("/proc/{supervisor}/root{}", mount.conf().display());
    fs::create_dir(format!("{conf}/pools/shared")).unwrap();
    let old = mount.signal_worker(Signal::SIGKILL);
    assert_eq!(fs::read_to_string(format!("{conf}/pools/shared/exclusive")).unwrap(), "0\n");
    let worker = mount.worker().unwrap();
    assert_ne!(worker, old);
    assert!(private(supervisor) <= 1024, "the supervisor's private memory: {} KiB", private(supervisor));
    until("closed files are forgotten", || {
        let before = sleeps(worker);
        std::thread::sleep(Duration::from_millis(200));
        sleeps(worker) == before
    });
    let (of_supervisor, of_worker) = (sleeps(supervisor), sleeps(worker));
    std::thread::sleep(Duration::from_secs(12));
    let (of_supervisor, of_worker) = (sleeps(supervisor) - of_supervisor, sleeps(worker) - of_worker);
    assert_eq!(of_worker, 0, "the worker was woken");
    assert!(of_supervisor <= 2, "the supervisor was woken {of_supervisor} times in 12 s");
}

/// The kernel here sends requests again; this daemon believes that it does not.
#[test]
fn without_resend_the_directory_is_mounted_again() {
    let mount = Mount::not_mounted();
    mount.start_with("KCM_FAULT_NO_RESEND", "1");
    mount.make_pool("shared", false, &["0"]);
    let (task, device) = (Sleeper::new(), fs::metadata(mount.conf()).unwrap().dev());
    write(&mount.tasks("shared", "0"), task.pid().to_string()).unwrap();
    for _ in 0..3 {
        let old = File::open(mount.tasks("shared", "0")).unwrap();
        let worker = mount.signal_worker(Signal::SIGKILL);
        until("the next worker serves", || {
            mount.worker().is_some_and(|now| now != worker)
                // A client in the moment of the new mount sees the end of the old one, or the empty directory.
                && fs::read_to_string(mount.tasks("shared", "0")).is_ok_and(|text| text == format!("{}\n", task.pid()))
        });
        assert_eq!(masks(task.pid()), ["0"]);
        let error = old.read_at(&mut [0; 8], 0).unwrap_err();
        let errno = Errno::from_raw(error.raw_os_error().unwrap());
        assert!(
            matches!(errno, Errno::ENOTCONN | Errno::ECONNABORTED),
            "an open file of the old mount: {errno}"
        );
    }
    assert_ne!(fs::metadata(mount.conf()).unwrap().dev(), device);
    assert!(mount.log().contains("mounting again"), "{}", mount.log());
    write(&mount.tasks("shared", "0"), format!("-{}", task.pid())).expect("a command on the new mount");
    mount.stop();
}
