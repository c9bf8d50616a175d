//! `kcm isolate` on a plain directory: the legacy workflow under the lock. kcm waits for the command, passes signals
//! on, and removes its PID.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{ChildStdout, Command, Stdio};
use std::time::Duration;

use crate::harness::dir::{Dir as _, failure};
use crate::harness::{Plain, Sleeper, children, has_died, kcm_for, run, set_mode, signal, stat, until};
use nix::fcntl::{Flock, FlockArg};
use nix::pty::openpty;
use nix::sys::signal::Signal;

/// A kcm and the output of its command.
struct Running {
    kcm: Sleeper,
    output: BufReader<ChildStdout>,
}

impl Running {
    fn start(plain: &Plain, line: &str) -> Self {
        let command = plain.kcm(&["isolate", "--pool=p", "--", "bash", "-c", line]);
        Self::spawn(command)
    }

    fn spawn(mut command: Command) -> Self {
        let mut kcm = Sleeper::spawn(command.stdout(Stdio::piped()));
        let output = BufReader::new(kcm.child().stdout.take().unwrap());
        Self { kcm, output }
    }

    fn pid(&self) -> u32 {
        self.kcm.pid()
    }

    fn hear(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn status(&mut self) -> Option<i32> {
        let mut status = None;
        until("kcm has ended", || {
            status = self.kcm.child().try_wait().unwrap();
            status.is_some()
        });
        status.unwrap().code()
    }
}

fn with_list(tasks: &str) -> Plain {
    let plain = Plain::new();
    plain.make_pool("p", false, &[("0", tasks)]);
    plain
}

fn raw(plain: &Plain) -> String {
    fs::read_to_string(plain.tasks("p", "0")).unwrap()
}

fn lock(plain: &Plain) -> Flock<File> {
    let file = File::options().read(true).write(true).open(plain.conf().join("lock")).unwrap();
    Flock::lock(file, FlockArg::LockExclusive).unwrap()
}

fn until_it_waits_for_the_lock(pid: u32) {
    let pid = pid.to_string();
    until("it waits for the lock", || {
        let locks = fs::read_to_string("/proc/locks").unwrap();
        locks.lines().any(|line| line.contains("-> FLOCK") && line.split_whitespace().any(|word| word == pid))
    });
}

/// Stops a kcm whose PID is in the file and whose command was not started yet.
fn stopped_before_its_command(plain: &Plain, start: impl Fn() -> Sleeper) -> Sleeper {
    loop {
        let mut kcm = start();
        while raw(plain).is_empty() && kcm.child().try_wait().unwrap().is_none() {}
        signal(kcm.pid(), Signal::SIGSTOP);
        until("it has stopped", || stat(kcm.pid(), 3) == "T");
        if children(kcm.pid()).is_empty() && raw(plain) == kcm.pid().to_string() {
            return kcm;
        }
        // The command was started already.
        kcm.end();
        fs::write(plain.tasks("p", "0"), "").unwrap();
    }
}

#[test]
fn its_pid_is_in_the_file_while_the_command_runs() {
    let plain = with_list("4711");
    let mut running = Running::start(&plain, "echo started; exec sleep 1000");
    assert_eq!(running.hear(), "started");
    assert_eq!(raw(&plain), format!("4711,{}", running.pid()), "as a legacy program writes it");
    signal(running.pid(), Signal::SIGTERM);
    assert_eq!(running.status(), Some(143));
    assert_eq!(raw(&plain), "4711");
}

#[test]
fn it_waits_for_the_lock_and_does_nothing() {
    let plain = with_list("");
    let lock = lock(&plain);
    let mut running = Running::start(&plain, "echo started");
    until_it_waits_for_the_lock(running.pid());
    assert_eq!(raw(&plain), "");
    drop(lock);
    assert_eq!((running.hear().as_str(), running.status()), ("started", Some(0)));
}

#[test]
fn a_held_lock_ends_it_after_the_timeout() {
    let plain = with_list("");
    let _lock = lock(&plain);
    let mut command = plain.kcm(&["isolate", "--pool=p", "echo started"]);
    assert_eq!(failure(command.env("KCM_LOCK_TIMEOUT", "0.5")), "Lock timed out after 0.5 seconds");
    assert_eq!(raw(&plain), "");
}

#[test]
fn every_signal_for_a_program_reaches_the_command() {
    let plain = with_list("");
    let names = "TERM INT HUP QUIT USR1 USR2 ALRM WINCH CONT URG IO PWR PROF VTALRM XCPU XFSZ RTMIN RTMAX";
    for name in names.split(' ') {
        let line =
            format!("trap 'echo got {name}; exit 3' {name}; echo started; while :; do sleep 0.01; done");
        let mut running = Running::start(&plain, &line);
        assert_eq!(running.hear(), "started");
        let kill = format!("kill -{name} {}", running.pid());
        assert!(Command::new("bash").args(["-c", &kill]).status().unwrap().success());
        assert_eq!(running.hear(), format!("got {name}"));
        assert_eq!(running.status(), Some(3), "{name}");
        assert_eq!(raw(&plain), "", "{name}");
    }
}

#[test]
fn a_death_by_signal_is_128_plus_its_number() {
    let plain = with_list("");
    for (name, status) in [("TERM", 143), ("HUP", 129), ("PWR", 158), ("RTMIN", 162), ("SEGV", 139)] {
        let (_, err, found) = run(&mut plain.kcm(&["isolate", "--pool=p", &format!("kill -{name} $$")]));
        assert_eq!((err.as_str(), found), ("", Some(status)), "{name}");
    }
    // The sender sees how the command ends, not how kcm ends.
    for (name, status) in [("TERM", 143), ("PWR", 158), ("RTMIN", 162)] {
        let mut running = Running::start(&plain, "echo started; exec sleep 1000");
        assert_eq!(running.hear(), "started");
        let number = status - 128;
        let kill = format!("kill -{number} {}", running.pid());
        assert!(Command::new("bash").args(["-c", &kill]).status().unwrap().success());
        assert_eq!(running.status(), Some(status), "{name}");
        assert_eq!(raw(&plain), "", "{name}");
    }
}

#[test]
fn a_signal_while_it_waits_for_the_lock_ends_it() {
    let plain = with_list("");
    let lock = lock(&plain);
    let mut running = Running::start(&plain, "echo started");
    until_it_waits_for_the_lock(running.pid());
    signal(running.pid(), Signal::SIGTERM);
    assert_eq!(running.status(), None, "ended by the signal");
    drop(lock);
    assert_eq!((running.hear().as_str(), raw(&plain).as_str()), ("", ""));
}

#[test]
fn a_signal_before_the_command_starts_reaches_it() {
    let plain = with_list("");
    let start = || Sleeper::spawn(&mut plain.kcm(&["isolate", "--pool=p", "--", "sleep", "1000"]));
    for kind in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let mut kcm = stopped_before_its_command(&plain, start);
        signal(kcm.pid(), kind);
        signal(kcm.pid(), Signal::SIGCONT);
        assert_eq!(kcm.child().wait().unwrap().code(), Some(128 + kind as i32));
        assert_eq!(raw(&plain), "");
    }
}

#[test]
fn ctrl_c_before_the_command_starts_is_not_lost() {
    let plain = with_list("");
    let pty = openpty(None, None).unwrap();
    let end = || Stdio::from(pty.slave.try_clone().unwrap());
    let start = || {
        let kcm = kcm_for(&plain.conf(), &["isolate", "--pool=p", "--", "sleep", "1000"]);
        let mut command = Command::new("setsid");
        command.arg("--ctty").arg(kcm.get_program()).args(kcm.get_args());
        Sleeper::spawn(command.stdin(end()).stdout(end()).stderr(end()))
    };
    let mut kcm = stopped_before_its_command(&plain, start);
    File::from(pty.master.try_clone().unwrap()).write_all(b"\x03").unwrap();
    until("the signal is pending", || {
        let status = fs::read_to_string(format!("/proc/{}/status", kcm.pid())).unwrap();
        status.lines().any(|line| line == "ShdPnd:\t0000000000000002")
    });
    signal(kcm.pid(), Signal::SIGCONT);
    assert_eq!(kcm.child().wait().unwrap().code(), Some(130));
    assert_eq!(raw(&plain), "");
}

#[test]
fn a_late_signal_changes_nothing() {
    let plain = with_list("4711");
    let mut command = plain.kcm(&["isolate", "--pool=p", "echo started; read x; exit 42"]);
    command.stdin(Stdio::piped());
    let mut running = Running::spawn(command);
    assert_eq!(running.hear(), "started");
    let lock = lock(&plain);
    drop(running.kcm.child().stdin.take());
    until_it_waits_for_the_lock(running.pid());
    for kind in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        signal(running.pid(), kind);
    }
    drop(lock);
    assert_eq!(running.status(), Some(42));
    assert_eq!(raw(&plain), "4711");
}

#[test]
fn a_signal_at_any_moment_leaves_no_pid() {
    let plain = with_list("4711");
    for delay in 0..40 {
        let mut running = Running::start(&plain, "sleep 0.01");
        std::thread::sleep(Duration::from_micros(500 * delay));
        signal(running.pid(), Signal::SIGTERM);
        running.kcm.child().wait().unwrap();
        assert_eq!(raw(&plain), "4711", "after {delay} half milliseconds");
    }
}

#[test]
fn a_kill_at_any_moment_removes_nobody_else() {
    let plain = with_list(&std::process::id().to_string());
    let own = std::process::id().to_string();
    for delay in 0..40 {
        let mut running = Running::start(&plain, "sleep 0.01");
        std::thread::sleep(Duration::from_micros(500 * delay));
        signal(running.pid(), Signal::SIGKILL);
        running.kcm.child().wait().unwrap();
        // Empty parts have no meaning, as for legacy programs.
        let left = || raw(&plain).trim_end_matches(',').to_owned();
        let found = left();
        assert!(found == own || found == format!("{own},{}", running.pid()), "{found}");
        assert_eq!(run(&mut plain.kcm(&["reconcile"])).2, Some(0));
        assert_eq!(left(), own);
    }
}

#[test]
fn a_killed_kcm_kills_its_command() {
    let plain = with_list("");
    let mut running = Running::start(&plain, "echo $$; exec sleep 1000");
    let command: u32 = running.hear().parse().unwrap();
    let pid = running.pid();
    assert_ne!(command, pid);
    signal(pid, Signal::SIGKILL);
    running.kcm.child().wait().unwrap();
    until("the command has died", || has_died(command));
    assert_eq!(raw(&plain), pid.to_string());
    let (out, err, status) = run(&mut plain.kcm(&["reconcile"]));
    assert!(status == Some(0) && out.contains(&format!("\"pid\": {pid}")), "{out} {err}");
    assert_eq!(raw(&plain), "");
}

#[test]
fn it_works_if_its_starter_ignores_sigchld() {
    let plain = with_list("");
    let kcm = plain.kcm(&["isolate", "--pool=p", "exit 42"]);
    let mut command = Command::new("env");
    command.arg("--ignore-signal=CHLD").arg(kcm.get_program()).args(kcm.get_args());
    assert_eq!(Running::spawn(command).status(), Some(42));
    assert_eq!(raw(&plain), "");
}

#[test]
fn as_the_first_process_of_a_container_it_reaps() {
    let plain = with_list("");
    let line = "(sleep 0 & echo $! > orphan); kill -STOP $$; \
        while [ -e /proc/$(cat orphan) ]; do sleep 0.01; done; echo collected; sleep 1000";
    let kcm = plain.kcm(&["isolate", "--pool=p", "--", "bash", "-c", line]);
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--mount-proc", "--kill-child"]).current_dir(plain.home());
    command.arg(kcm.get_program()).args(kcm.get_args());
    let mut running = Running::spawn(command);
    let find = || {
        let kcm = *children(running.pid()).first()?;
        children(kcm).first().copied()
    };
    let mut shell = 0;
    until("the command has stopped", || {
        shell = find().unwrap_or(0);
        shell != 0 && stat(shell, 3) == "T"
    });
    // It stays stopped until SIGCONT.
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(stat(shell, 3), "T");
    signal(shell, Signal::SIGCONT);
    assert_eq!(running.hear(), "collected");
}

#[test]
fn impossible_cpus_are_an_error_and_remove_the_pid() {
    let plain = Plain::new();
    for (pool, list) in [("absent", "4000"), ("in-part", "0,4000"), ("nonsense", "x")] {
        plain.make_pool(pool, true, &[(list, "")]);
        let line = failure(&mut plain.kcm(&["isolate", "--pool", pool, "echo started"]));
        assert!(line.contains(list), "{line}");
        assert_eq!(plain.tasks_of(pool, list), "");
    }
}

#[test]
fn a_tasks_file_with_other_text_is_left_alone() {
    for content in ["not a PID", "1 2", "-1", "4711,x"] {
        let plain = with_list(content);
        let line = failure(&mut plain.kcm(&["isolate", "--pool=p", "echo started"]));
        let file = plain.tasks("p", "0");
        assert_eq!(line, format!("{}: not a list of PIDs; repair it by hand", file.display()));
        assert_eq!(raw(&plain), content);
    }
    for content in ["\n", "4711\n", ",4711,,", " 4711 , 4712 "] {
        let plain = with_list(content);
        assert_eq!(run(&mut plain.kcm(&["isolate", "--pool=p", "true"])).2, Some(0), "{content:?}");
    }
}

#[test]
fn a_full_disk_keeps_the_other_pids() {
    let plain = with_list("4711,4712");
    // The limit for the size of a file is 0.
    let kcm = plain.kcm(&["isolate", "--pool=p", "echo started"]);
    let mut command = Command::new("bash");
    command.args(["-c", "trap '' XFSZ; ulimit -f 0; exec \"$@\"", "bash"]);
    let line = failure(command.arg(kcm.get_program()).args(kcm.get_args()));
    assert_eq!(line, format!("{}: File too large", plain.tasks("p", "0").display()));
    assert_eq!(raw(&plain), "4711,4712");
}

#[test]
fn missing_or_forbidden_is_one_line_and_starts_nothing() {
    let witness = tempfile::tempdir().unwrap();
    set_mode(witness.path(), 0o777);
    let touch = format!("touch {}/started", witness.path().display());
    let words = ["isolate", "--pool=p", &*touch];
    let says = |plain: &Plain, beginning: &str, end: &str| {
        let line = failure(&mut plain.kcm(&words));
        let expected = format!("{}{beginning}", plain.conf().display());
        assert!(line.starts_with(&expected) && line.ends_with(end), "{line}");
    };
    let plain = with_list("");
    fs::remove_file(plain.tasks("p", "0")).unwrap();
    says(&plain, "/pools/p/0/tasks: No such file or directory", "");
    fs::remove_dir_all(plain.conf().join("pools")).unwrap();
    says(&plain, ": no pools; run kcm init (is kcm mount running?)", "");
    fs::remove_dir_all(plain.conf()).unwrap();
    says(&plain, ": no such directory; run kcm mount, or give --conf-dir", "");
    fs::write(plain.conf(), "").unwrap();
    says(&plain, ": not a directory", "");

    let cure = "run it as root, or let root grant access with chown or chmod";
    for (closed, mode) in [("lock", 0o600), ("pools/p/0/tasks", 0o644), ("pools/p", 0o700), ("pools", 0o700)]
    {
        let plain = with_list("");
        set_mode(&plain.conf().join("lock"), 0o666);
        set_mode(&plain.tasks("p", "0"), 0o666);
        set_mode(&plain.conf().join(closed), mode);
        let line = failure(&mut plain.kcm_as_nobody(&words));
        let path = plain.conf().join(closed);
        assert!(line.starts_with(path.to_str().unwrap()) && line.ends_with(cure), "{closed}: {line}");
        assert_eq!(raw(&plain), "");
    }
    assert!(!witness.path().join("started").exists());
    // With the capabilities that it removes, it has no more rights than a user.
    let plain = with_list("");
    set_mode(&plain.conf().join("lock"), 0o666);
    set_mode(&plain.tasks("p", "0"), 0o666);
    let (_, err, status) = run(&mut plain.kcm_as_nobody(&words));
    assert_eq!((err.as_str(), status), ("", Some(0)));
    assert!(witness.path().join("started").exists());
}
