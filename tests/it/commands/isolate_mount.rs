//! `kcm isolate` on a mount: kcm becomes the command. The command and the processes that it leaves behind hold the
//! list. No end leaves a claim. It needs only itself, /proc and the directory.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::harness::dir::{Dir as _, copy_kcm, failure};
use crate::harness::{
    Mount, Sleeper, children, has_died, masks, require_static_kcm, run, signal, until, write,
};
use kcm_mount::mountpoint;
use nix::sys::signal::Signal;

#[test]
fn the_command_has_the_pid_of_kcm() {
    let mount = Mount::with_dataplane();
    for words in [
        &["echo $$; exec sleep 1000"][..],
        // The last program of a line replaces the shell.
        &["cd / && echo $$ && sleep 1000"],
        &["--", "sh", "-c", "echo $$; exec sleep 1000"],
        // A program, although it is before the dashes.
        &["sh", "--", "-c", "echo $$; exec sleep 1000"],
    ] {
        let mut command = mount.kcm(&["isolate", "--pool=dataplane"]);
        let mut running = Sleeper::spawn(command.args(words).stdout(Stdio::piped()));
        let mut line = String::new();
        BufReader::new(running.child().stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line.trim(), running.pid().to_string());
        assert_eq!(mount.tasks_of("dataplane", "0"), line.trim());
        // A signal to kcm is a signal to the command: there is no process in between.
        signal(running.pid(), Signal::SIGKILL);
        running.child().wait().unwrap();
        assert_eq!(mount.tasks_of("dataplane", "0"), "");
    }
}

#[test]
fn a_left_process_keeps_the_list_until_it_ends() {
    let mount = Mount::new();
    mount.make_pool("p", true, &["0"]);
    // No process holds the pipes of the test.
    for leave in [
        "sleep 1000 > /dev/null 2>&1 & echo $!",
        "setsid sh -c 'echo $$; exec sleep 1000 > /dev/null 2>&1' &",
    ] {
        let (out, err, status) = run(&mut mount.kcm(&["isolate", "--pool=p", leave]));
        assert_eq!(status, Some(0), "{err}");
        let left: u32 = out.trim().parse().unwrap();
        assert_eq!(mount.tasks_of("p", "0"), left.to_string(), "{leave}");
        assert_eq!(masks(left), ["0"]);
        let refused = failure(&mut mount.kcm(&["isolate", "--pool=p", "true"]));
        assert!(
            refused
                .starts_with("No free cpu lists in pool p: no list of p is free (1 taken); p 0 is held by ")
        );
        signal(left, Signal::SIGKILL);
        until("it has died", || has_died(left));
        assert_eq!(run(&mut mount.kcm(&["isolate", "--pool=p", "true"])).2, Some(0));
    }
}

#[test]
fn wait_waits_for_a_list_that_suits() {
    let mount = Mount::with_dataplane();
    let cpuset = crate::harness::Cpuset::new("1");
    // List 0 is free, but this process may not use it; list 1 is taken.
    let holder = Sleeper::new();
    write(&mount.tasks("dataplane", "1"), holder.pid().to_string()).unwrap();
    let start = |wait: &str| {
        let mut command = mount.bash(
            "read x; exec $KCM isolate --conf-dir=$C --pool=dataplane $W -- sh -c 'echo $KCM_CPUS_ASSIGNED'",
        );
        let mut command = Sleeper::spawn(
            command.env("W", wait).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()),
        );
        cpuset.add(command.pid());
        drop(command.child().stdin.take());
        command
    };
    let mut impatient = start("");
    assert_eq!(impatient.child().wait().unwrap().code(), Some(1));
    let mut patient = start("--wait=20");
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(patient.child().try_wait().unwrap(), None, "it waits");
    holder.end();
    let mut line = String::new();
    BufReader::new(patient.child().stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!((line.as_str(), patient.child().wait().unwrap().code()), ("1\n", Some(0)));
    // The free list does not suit, and no other one is taken: there is nothing to wait for.
    mount.sh("rmdir $C/pools/dataplane/1");
    assert_eq!(start("--wait=20").child().wait().unwrap().code(), Some(1));
}

/// How many tasks wait for a list of the pool `p`.
fn waiters(mount: &Mount) -> usize {
    mount.read("pools/p/queue").lines().count()
}

#[test]
fn waiters_are_served_in_the_order_in_which_they_came_and_refused_once() {
    const WAITERS: usize = 64;
    let mount = Mount::new();
    mount.make_pool("p", true, &["0"]);
    let holder = Sleeper::new();
    write(&mount.tasks("p", "0"), holder.pid().to_string()).unwrap();
    let mut waiting = Vec::new();
    for n in 1..=WAITERS {
        let words = ["isolate", "--pool=p", "--wait", "--", "true"];
        waiting.push(mount.kcm(&words).stderr(Stdio::piped()).spawn().unwrap());
        until("it waits", || waiters(&mount) == n);
    }
    let pids: Vec<u32> = waiting.iter().map(std::process::Child::id).collect();
    let pid = holder.pid();
    holder.end();
    let outputs: Vec<_> = waiting.into_iter().map(|child| child.wait_with_output().unwrap()).collect();
    let line = |n: usize| String::from_utf8_lossy(&outputs[n].stderr).into_owned();
    assert!(outputs.iter().all(|output| output.status.success()), "{}", line(0));
    let held = format!("INFO:root:waiting for p: p 0 is held by {pid} (sleep) for ");
    assert!(line(0).starts_with(&held) && line(0).ends_with(" s\n"), "{}", line(0));
    assert!(line(2).starts_with(&held) && line(2).ends_with(" s, 2 before you\n"), "{}", line(2));
    let events = mount.events();
    let of = |kind: &str| -> Vec<u32> {
        events.iter().filter(|(event, _)| event == kind).map(|(_, pid)| *pid).collect()
    };
    assert_eq!(of("claimed")[1..], pids);
    assert_eq!(of("refused"), pids, "each is refused once, before it waits");
    assert_eq!(waiters(&mount), 0);
}

#[test]
fn a_shell_claims_for_itself() {
    let mount = Mount::new();
    mount.make_pool("p", true, &["0"]);
    let claim = "$KCM claim --conf-dir=$C --pool=p";
    let out =
        mount.sh(&format!("{claim}; cat $C/pools/p/0/tasks; echo $$; taskset -c -p $$ | grep -o '[0-9]*$'"));
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!((lines[0], lines[3]), ("0", "0"), "{out}");
    assert_eq!(lines[1], lines[2]);
    // Another process, and the wait for its end.
    let holder = Sleeper::new();
    assert_eq!(mount.sh(&format!("{claim} --pid={}", holder.pid())), "0\n");
    assert_eq!(mount.tasks_of("p", "0"), holder.pid().to_string());
    let refused = failure(&mut mount.kcm(&["claim", "--pool=p"]));
    assert!(refused.starts_with("No free cpu lists in pool p: no list of p is free (1 taken)"), "{refused}");
    let mut waiting =
        mount.bash(&format!("{claim} --wait && cat $C/self/claim")).stdout(Stdio::piped()).spawn().unwrap();
    until("it waits", || waiters(&mount) == 1);
    holder.end();
    let mut out = String::new();
    waiting.stdout.take().unwrap().read_to_string(&mut out).unwrap();
    assert_eq!((out.as_str(), waiting.wait().unwrap().success()), ("0\np 0\n", true));
    assert!(
        failure(&mut mount.kcm(&["claim", "--pool=none"])).contains("Requested pool none does not exist")
    );
}

#[test]
fn wait_waits_for_the_next_daemon() {
    let mount = Mount::new();
    mount.make_pool("p", true, &["0"]);
    let holder = Sleeper::new();
    write(&mount.tasks("p", "0"), holder.pid().to_string()).unwrap();
    let start = |wait: &[&str]| {
        let words = [&["isolate", "--pool=p"], wait, &["--", "echo", "claimed"]].concat();
        let mut command = mount.kcm(&words);
        Sleeper::spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()))
    };
    let (mut patient, mut impatient) = (start(&["--wait"]), start(&["--wait=2"]));
    for kcm in [&patient, &impatient] {
        until("it waits", || in_kernel(kcm.pid(), "poll"));
    }
    mount.stop();
    assert_eq!(impatient.child().wait().unwrap().code(), Some(1), "its time is over");
    let mut error = String::new();
    impatient.child().stderr.take().unwrap().read_to_string(&mut error).unwrap();
    let errors = error.lines().filter(|line| !line.starts_with("INFO:root:waiting for "));
    assert_eq!(errors.count(), 1, "{error}");
    mount.start();
    until("it waits again", || in_kernel(patient.pid(), "poll"));
    holder.end();
    let mut line = String::new();
    patient.child().stdout.take().unwrap().read_to_string(&mut line).unwrap();
    assert_eq!((line.as_str(), patient.child().wait().unwrap().code()), ("claimed\n", Some(0)));
}

#[test]
fn wait_outlasts_everything_that_may_be_at_the_mount_point() {
    let mount = Mount::new();
    mount.make_pool("p", true, &["0"]);
    let holder = Sleeper::new();
    write(&mount.tasks("p", "0"), holder.pid().to_string()).unwrap();
    let logs = ["isolate", "claim"].map(|name| mount.home().join(name));
    let start = |line: &str, log: &std::path::Path| {
        let mut command = mount.bash(line);
        command.env("KCM_LOG_LEVEL", "DEBUG").stderr(fs::File::create(log).unwrap());
        Sleeper::spawn(command.stdout(Stdio::piped()))
    };
    let line = "exec $KCM isolate --conf-dir=$C --pool=p --wait -- echo claimed";
    let mut isolate = start(line, &logs[0]);
    until("it waits", || waiters(&mount) == 1);
    let mut claim = start("$KCM claim --conf-dir=$C --pool=p --wait && echo claimed", &logs[1]);
    until("both wait", || waiters(&mount) == 2);
    // Each of them finds the directory as it is now, and waits on.
    let both_try_again = || {
        let tried =
            || logs.each_ref().map(|log| fs::read_to_string(log).unwrap().matches("next daemon").count());
        let before = tried();
        until("both try again", || tried().iter().zip(before).all(|(now, before)| *now > before + 1));
    };
    mount.stop();
    both_try_again();
    // In a container, the directory may look like any empty directory.
    mountpoint::unmark(&mount.conf()).unwrap();
    both_try_again();
    fs::write(mount.conf().join("file"), "").unwrap();
    both_try_again();
    fs::remove_file(mount.conf().join("file")).unwrap();
    fs::remove_dir(mount.conf()).unwrap();
    both_try_again();
    std::os::unix::fs::symlink("/nowhere", mount.conf()).unwrap();
    both_try_again();
    fs::remove_file(mount.conf()).unwrap();
    mount.start();
    until("both wait again", || waiters(&mount) == 2);
    mount.kill_daemon();
    both_try_again();
    mount.start();
    until("both wait again", || waiters(&mount) == 2);
    holder.end();
    for waiter in [&mut isolate, &mut claim] {
        let mut out = String::new();
        waiter.child().stdout.take().unwrap().read_to_string(&mut out).unwrap();
        assert!(out.ends_with("claimed\n") && waiter.child().wait().unwrap().success(), "{out}");
    }
}

#[test]
fn wait_waits_for_the_first_daemon() {
    let mount = Mount::with_dataplane();
    for leave in [Mount::stop, |mount: &Mount| {
        mount.stop();
        fs::remove_dir(mount.conf()).unwrap();
    }] {
        leave(&mount);
        let refused = failure(&mut mount.kcm(&["isolate", "--pool=dataplane", "true"]));
        assert!(refused.starts_with(mount.conf().to_str().unwrap()), "{refused}");
        let mut command = mount.kcm(&["isolate", "--pool=dataplane", "--wait", "--", "true"]);
        let mut waiting = Sleeper::spawn(command.stderr(Stdio::piped()));
        let mut line = String::new();
        BufReader::new(waiting.child().stderr.take().unwrap()).read_line(&mut line).unwrap();
        let conf = mount.conf().display().to_string();
        assert_eq!(line, format!("INFO:root:waiting for {conf}: kcm mount is not running\n"));
        mount.start();
        assert!(waiting.child().wait().unwrap().success());
    }
}

#[test]
fn it_works_in_an_empty_root() {
    require_static_kcm();
    let mount = Mount::with_dataplane();
    let root = mount.home().join("root");
    for directory in ["proc", "conf"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    copy_kcm(&root.join("kcm"));
    let enter = |unshare: &[&str], proc: &str, words: &[&str]| {
        let script =
            format!("{proc} \"$R/proc\" && mount --bind \"$C\" \"$R/conf\" && exec chroot \"$R\" \"$@\"");
        let mut command = Command::new("unshare");
        command.arg("--mount").args(unshare).args(["sh", "-c", &script, "sh"]).args(words);
        command.env("R", &root).env("C", mount.conf());
        command
    };
    let isolate = ["/kcm", "isolate", "--conf-dir=/conf", "--pool=dataplane", "--", "/kcm", "describe"];
    let words = [&isolate[..], &["--conf-dir=/conf"]].concat();
    // In the host's PID namespace, and in its own, as in a container.
    let own = ["--pid", "--fork", "--kill-child"];
    for (unshare, proc) in [(&[][..], "mount --bind /proc"), (&own, "mount -t proc proc")] {
        let (out, err, status) = run(&mut enter(unshare, proc, &words));
        assert_eq!((err.as_str(), status), ("", Some(0)), "{unshare:?}: {out}");
        let described: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert_eq!(described["path"], "/conf");
        let list = &described["pools"]["dataplane"]["cpuLists"]["0"];
        assert_eq!(list["tasks"].as_array().unwrap().len(), 1, "it sees its own PID: {out}");
        assert_eq!(mount.tasks_of("dataplane", "0"), "");
        // There is no shell here.
        let shell = ["/kcm", "isolate", "--conf-dir=/conf", "--pool=dataplane", "true"];
        let (_, err, status) = run(&mut enter(unshare, proc, &shell));
        let printed = "ERROR:root:/bin/sh: No such file or directory; \
            without a shell: kcm isolate --pool=<pool> -- <program> <args>\n";
        assert_eq!((err.as_str(), status), (printed, Some(127)));
        assert_eq!(mount.tasks_of("dataplane", "0"), "");
    }
}

/// A kcm that is ended this long after its start.
fn ended_after(mount: &Mount, kind: Signal, delay: Duration) -> Option<i32> {
    let mut kcm = Sleeper::spawn(&mut mount.kcm(&["isolate", "--pool=dataplane", "--", "sleep", "1000"]));
    std::thread::sleep(delay);
    signal(kcm.pid(), kind);
    kcm.child().wait().unwrap().signal()
}

#[test]
fn a_signal_at_any_moment_leaves_no_claim() {
    let mount = Mount::with_dataplane();
    for kind in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGKILL] {
        for delay in 0..30 {
            let by = ended_after(&mount, kind, Duration::from_micros(300 * delay));
            assert_eq!(by, Some(kind as i32), "after {delay} times 0.3 ms");
            assert_eq!(held_in_all(&mount), "", "{kind} after {delay} times 0.3 ms");
        }
    }
}

fn held_in_all(mount: &Mount) -> String {
    mount.tasks_of("dataplane", "0") + &mount.tasks_of("dataplane", "1")
}

#[test]
fn a_signal_while_it_waits_leaves_the_list_to_the_next() {
    let mount = Mount::new();
    mount.make_pool("p", true, &["0"]);
    let holder = Sleeper::new();
    write(&mount.tasks("p", "0"), holder.pid().to_string()).unwrap();
    for kind in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGKILL] {
        let mut kcm =
            Sleeper::spawn(&mut mount.kcm(&["isolate", "--pool=p", "--wait", "--", "sleep", "1000"]));
        until("it waits", || in_kernel(kcm.pid(), "poll"));
        signal(kcm.pid(), kind);
        assert_eq!(kcm.child().wait().unwrap().signal(), Some(kind as i32));
        assert_eq!(mount.tasks_of("p", "0"), holder.pid().to_string());
    }
    holder.end();
    assert_eq!(run(&mut mount.kcm(&["isolate", "--pool=p", "true"])).2, Some(0));
}

/// Returns whether a process sleeps in a kernel function whose name contains `name`.
fn in_kernel(pid: u32, name: &str) -> bool {
    fs::read_to_string(format!("/proc/{pid}/wchan")).is_ok_and(|place| place.contains(name))
}

#[test]
fn a_signal_in_the_middle_of_its_request_leaves_no_claim() {
    let mount = Mount::with_dataplane();
    for kind in [Signal::SIGTERM, Signal::SIGKILL] {
        let paused = mount.pause();
        let mut kcm = Sleeper::spawn(&mut mount.kcm(&["isolate", "--pool=dataplane", "--", "sleep", "1000"]));
        // It asks in a child whether the mount answers.
        let waits = |pid| in_kernel(pid, "request_wait_answer");
        until("it waits for the daemon", || waits(kcm.pid()) || children(kcm.pid()).into_iter().any(waits));
        signal(kcm.pid(), kind);
        drop(paused);
        assert_eq!(kcm.child().wait().unwrap().signal(), Some(kind as i32));
        assert_eq!(held_in_all(&mount), "", "{kind}");
    }
}

#[test]
fn without_a_daemon_it_is_one_line_and_starts_nothing() {
    let mount = Mount::with_dataplane();
    let witness = mount.home().join("started");
    let touch = format!("touch {}", witness.display());
    let not_running =
        format!("{}: kcm mount is not running; start it: kcm mount --conf-dir={0}", mount.conf().display());
    let refused = || failure(&mut mount.kcm(&["isolate", "--pool=dataplane", &touch]));
    mount.kill_daemon();
    assert_eq!(refused(), not_running, "the mount does not answer");
    mount.start();
    mount.stop();
    assert_eq!(refused(), not_running, "an empty directory");
    assert!(!witness.exists());
    mount.start();
    assert_eq!(run(&mut mount.kcm(&["isolate", "--pool=dataplane", &touch])).2, Some(0));
    assert!(witness.exists(), "only the witness");
}

#[test]
fn the_daemons_death_does_not_affect_the_command() {
    let mount = Mount::with_dataplane();
    let line = "echo $$; read line; echo $KCM_CPUS_ASSIGNED; exit 42";
    let mut command = mount.kcm(&["isolate", "--pool=dataplane", line]);
    let mut running = Sleeper::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
    let mut output = BufReader::new(running.child().stdout.take().unwrap()).lines().map_while(Result::ok);
    assert_eq!(output.next().unwrap(), running.pid().to_string());
    mount.kill_daemon();
    mount.start();
    assert_eq!(mount.tasks_of("dataplane", "0"), running.pid().to_string());
    drop(running.child().stdin.take());
    assert_eq!(output.next().unwrap(), "0");
    assert_eq!(running.child().wait().unwrap().code(), Some(42));
    assert_eq!(held_in_all(&mount), "");
}
