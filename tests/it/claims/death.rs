//! A dead task holds nothing: the next read shows it, no matter how the task died or which process gets its PID.

use std::fs;
use std::process::{Command, Stdio};

use crate::harness::pid_namespace::PidNamespace;
use crate::harness::program::{self, Program};
use crate::harness::{
    self, Mount, Sleeper, errno, events, free, has_died, held, if_collected, masks, stat, until, write,
};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Sends a signal and waits until no thread of the process runs. The process is not reaped.
fn signal(process: &Sleeper, signal: Signal) {
    kill(Pid::from_raw(process.pid() as i32), signal).unwrap();
    until("it has died", || has_died(process.pid()));
}

#[test]
fn the_next_read_shows_that_the_holder_died() {
    let mount = Mount::with_dataplane();
    let list = mount.tasks("dataplane", "0");
    let pool = mount.pool("dataplane").join("tasks");
    let other = Sleeper::new();
    let looks: [(&str, &dyn Fn()); 8] = [
        ("the list", &|| assert_eq!(fs::read_to_string(&list).unwrap(), "")),
        ("the pool", &|| assert_eq!(fs::read_to_string(&pool).unwrap(), "")),
        ("stat", &|| assert_eq!(fs::metadata(&list).unwrap().len(), 0)),
        ("a claim", &|| write(&list, other.pid().to_string()).unwrap()),
        ("a claim of any list", &|| {
            write(&pool, other.pid().to_string()).unwrap();
            assert_eq!(held(&list), [other.pid()]);
        }),
        ("events", &|| assert_eq!(mount.events().pop().unwrap().0, "reclaimed")),
        ("metrics", &|| {
            assert!(
                mount.read("info/metrics").contains("kcm_tasks{pool=\"dataplane\"} 0"),
                "{}",
                mount.read("info/metrics")
            );
        }),
        ("rmdir", &|| fs::remove_dir(list.parent().unwrap()).unwrap()),
    ];
    for (name, look) in looks {
        let holder = Sleeper::new();
        write(&pool, holder.pid().to_string()).unwrap();
        assert_eq!(held(&list), [holder.pid()], "{name}");
        holder.end();
        look();
        write(&pool, format!("-{}", other.pid())).unwrap();
    }
}

#[test]
fn a_zombie_holds_nothing() {
    let mount = Mount::with_dataplane();
    let list = mount.tasks("dataplane", "0");
    let (holder, next) = (Sleeper::new(), Sleeper::new());
    write(&list, holder.pid().to_string()).unwrap();
    signal(&holder, Signal::SIGKILL);
    assert_eq!(held(&list), [0_u32; 0]);
    write(&list, next.pid().to_string()).unwrap();
    for text in [holder.pid().to_string(), format!("-{}", holder.pid())] {
        assert_eq!(errno(write(&mount.tasks("dataplane", "1"), &text)), Errno::ESRCH, "{text}");
    }
    holder.end();
    assert_eq!(held(&list), [next.pid()]);
    assert_eq!(held(&mount.pool("dataplane").join("tasks")), [next.pid()]);
}

#[test]
fn a_task_without_its_first_thread_is_alive() {
    let mount = Mount::with_dataplane();
    let [list_0, list_1] = ["0", "1"].map(|list| mount.tasks("dataplane", list));
    let mut headless = Program::start(&mut program::command(&[], "headless"));
    let pid = headless.pid();
    write(&list_0, pid.to_string()).unwrap();
    kill(Pid::from_raw(pid as i32), Signal::SIGUSR1).unwrap();
    until("its first thread has exited", || stat(pid, 3) == "Z");
    let other = Sleeper::new();
    let is_on = |list: &std::path::Path, cpus: &str| {
        assert_eq!(held(list), [pid]);
        assert_eq!(errno(write(list, other.pid().to_string())), Errno::EBUSY);
        assert!(masks(pid).iter().all(|mask| mask == cpus), "{:?}", masks(pid));
    };
    is_on(&list_0, "0");
    write(&list_1, pid.to_string()).expect("a move");
    is_on(&list_1, "1");
    write(&list_1, format!("-{pid}")).expect("a release");
    assert_eq!(held(&list_1), [0_u32; 0]);
    assert!(masks(pid).iter().all(|mask| *mask == free()), "{:?}", masks(pid));
    // It writes its own PID, through a thread that is not the first.
    headless.say(&list_0.display().to_string());
    assert_eq!(headless.hear(), "written");
    is_on(&list_0, "0");
    headless.say("exit");
    until("its last thread has exited", || held(&list_0).is_empty());
    assert_eq!(mount.events().pop().unwrap(), ("ended".to_owned(), pid));
}

#[test]
fn exit_is_ended_and_a_kill_is_reclaimed() {
    let mount = Mount::with_dataplane();
    let list = mount.tasks("dataplane", "1");
    let mut killed = Vec::new();
    for (line, expected) in [
        ("exit 0", "ended"),
        ("exit 3", "ended"),
        ("exit 137", "ended"),
        ("kill -KILL $$", "reclaimed"),
        ("kill -TERM $$", "reclaimed"),
        ("kill -SEGV $$", "reclaimed"),
    ] {
        for collected in [true, false] {
            let mut command = Command::new("bash");
            command.arg("-c").arg(format!("ulimit -c 0; read -r; {line}")).stdin(Stdio::piped());
            let mut task = Sleeper::spawn(&mut command);
            let pid = task.pid();
            write(&list, pid.to_string()).unwrap();
            drop(task.child().stdin.take());
            until("it has died", || has_died(pid));
            let mut kept = Some(task);
            if collected {
                kept.take().unwrap().collect();
            }
            let expected = if collected { if_collected(expected) } else { expected };
            assert_eq!(mount.events().pop().unwrap(), (expected.to_owned(), pid), "{line} {collected}");
            killed.extend((expected == "reclaimed").then_some(pid));
        }
    }
    let reclaimed = mount.read("info/reclaimed");
    let pids: Vec<u32> = reclaimed
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["pid"].as_u64().unwrap() as u32)
        .collect();
    assert_eq!(pids, killed);
}

#[test]
fn a_new_worker_knows_how_tasks_ended_before_it_started() {
    let mount = Mount::with_dataplane();
    let lists = [mount.tasks("dataplane", "0"), mount.tasks("dataplane", "1")];
    let shell = || {
        let mut command = Command::new("bash");
        Sleeper::spawn(command.args(["-c", "read -r; exit 0"]).stdin(Stdio::piped()))
    };
    let (mut exits, killed) = (shell(), shell());
    let pids = [exits.pid(), killed.pid()];
    for (list, pid) in lists.iter().zip(pids) {
        write(list, pid.to_string()).unwrap();
    }
    // Without a supervisor that runs, nobody starts the next worker.
    harness::signal(mount.supervisor(), Signal::SIGSTOP);
    mount.signal_worker(Signal::SIGKILL);
    drop(exits.child().stdin.take());
    until("it has exited", || has_died(pids[0]));
    signal(&killed, Signal::SIGKILL);
    // Both are collected, so that nothing of them is in /proc.
    exits.collect();
    killed.collect();
    harness::signal(mount.supervisor(), Signal::SIGCONT);
    until("the lists are free", || lists.iter().all(|list| held(list).is_empty()));
    let mut events: Vec<_> = mount.events().into_iter().filter(|(_, pid)| pids.contains(pid)).collect();
    events.retain(|(kind, _)| kind != "claimed");
    events.sort_unstable_by_key(|(_, pid)| *pid != pids[0]);
    // The kernel tells this to a process that has a pidfd from before, if it tells at all.
    let expected = ["ended", "reclaimed"].map(|event| if_collected(event).to_owned());
    assert_eq!(events, expected.into_iter().zip(pids).collect::<Vec<_>>());
}

#[test]
fn a_new_daemon_finds_tasks_that_died_before() {
    for collected in [true, false] {
        let mount = Mount::with_dataplane();
        let list = mount.tasks("dataplane", "0");
        let (holder, survivor) = (Sleeper::new(), Sleeper::new());
        write(&list, holder.pid().to_string()).unwrap();
        write(&mount.tasks("dataplane", "1"), survivor.pid().to_string()).unwrap();
        mount.kill_daemon();
        signal(&holder, Signal::SIGKILL);
        let pid = holder.pid();
        let kept = if collected {
            holder.collect();
            None
        } else {
            Some(holder)
        };
        mount.start();
        assert_eq!(held(&mount.pool("dataplane").join("tasks")), [survivor.pid()]);
        // Once it is collected, the kernel no longer tells a new daemon how it ended.
        let event = if collected { "died" } else { "reclaimed" };
        assert_eq!(mount.events().pop().unwrap(), (event.to_owned(), pid));
        write(&list, Sleeper::new().pid().to_string()).expect("the list is free");
        drop(kept);
    }
}

#[test]
fn an_exit_without_a_daemon_has_ended() {
    let mount = Mount::with_dataplane();
    let mut task = Sleeper::spawn(Command::new("cat").stdin(Stdio::piped()));
    let pid = task.pid();
    write(&mount.tasks("dataplane", "0"), pid.to_string()).unwrap();
    mount.kill_daemon();
    drop(task.child().stdin.take());
    until("it has exited", || has_died(pid));
    mount.start();
    assert_eq!(mount.events().pop().unwrap(), ("ended".to_owned(), pid));
    assert_eq!(mount.read("info/reclaimed"), "");
}

#[test]
fn a_reused_pid_inherits_nothing() {
    for looked in [true, false] {
        let mut inside = PidNamespace::new("dataplane", true);
        let old = inside.sleeper();
        let full = inside.mask(old);
        inside.shell.ask(&format!("echo {old} > $P/0/tasks"));
        assert_eq!(
            (inside.read("pools/dataplane/0/tasks"), inside.mask(old)),
            (old.to_string(), "0".to_owned())
        );
        inside.kill(old);
        if looked {
            assert_eq!(inside.read("pools/dataplane/0/tasks"), "");
        }
        inside.sleeper_with(old);
        if looked {
            assert_eq!(inside.shell.ask(&format!("echo -{old} > $P/0/tasks")), "", "a release");
        }
        let output = inside.shell.ask(&format!("echo {old} > $P/1/tasks && echo ok"));
        assert_eq!(output.trim(), "ok");
        assert_eq!(inside.read("pools/dataplane/0/tasks"), "");
        assert_eq!(
            (inside.read("pools/dataplane/1/tasks"), inside.mask(old)),
            (old.to_string(), "1".to_owned())
        );
        inside.shell.ask(&format!("echo -{old} > $P/1/tasks"));
        assert_eq!(inside.mask(old), full, "only its own mask");
        let events = events(&inside.read("info/events"));
        let mut names: Vec<&str> = events.iter().map(|(event, _)| event.as_str()).collect();
        // The claim of list 1 does not wait for the end of the claim of list 0.
        names.sort_unstable();
        let mut expected = ["claimed", "claimed", if_collected("reclaimed"), "released"];
        expected.sort_unstable();
        assert_eq!(names, expected, "it was not a move");
    }
}

#[test]
fn a_reused_pid_has_no_claim_after_a_restart() {
    // There are no heirs in a shared pool, so a process whose mask is within the list has no claim either.
    for (exclusive, pinned) in [(true, false), (false, false), (false, true)] {
        let mut inside = PidNamespace::new("pool", exclusive);
        let (old, other) = (inside.sleeper(), inside.sleeper());
        let full = inside.mask(old);
        inside.shell.ask(&format!("echo {old} > $P/0/tasks; echo {other} > $P/1/tasks"));
        inside.mount.kill_daemon();
        inside.kill(old);
        inside.sleeper_with(old);
        if pinned {
            inside.shell.ask(&format!("taskset -pc 0 {old}"));
        }
        let mask = if pinned { "0".to_owned() } else { full };
        inside.start();
        assert_eq!(inside.read("pools/pool/tasks"), other.to_string());
        assert_eq!(inside.mask(old), mask);
        inside.kill(other);
        assert_eq!(inside.read("pools/pool/tasks"), "");
        assert_eq!(inside.mask(old), mask);
    }
}

/// A program of several threads; the first thread ends when it gets SIGUSR1. It claims each file that it reads from
/// its input.
pub fn headless() {
    end_first_thread_on_sigusr1();
    // The handler ends the thread that gets the signal, so this thread must not get it.
    nix::sys::signal::SigSet::from(Signal::SIGUSR1).thread_block().unwrap();
    program::ready();
    loop {
        match program::heard().as_str() {
            "exit" => std::process::exit(0),
            file => {
                write(file.as_ref(), "0").unwrap();
                println!("written");
            }
        }
    }
}

#[allow(unsafe_code, reason = "there is no safe way for a thread to end alone")]
fn end_first_thread_on_sigusr1() {
    use nix::sys::signal::{SigHandler, signal};
    extern "C" fn end_thread(_: libc::c_int) {
        // SAFETY: takes one number and ends only the thread that calls it.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
    }
    // SAFETY: the handler makes one system call and touches no memory.
    unsafe { signal(Signal::SIGUSR1, SigHandler::Handler(end_thread)) }.unwrap();
}
