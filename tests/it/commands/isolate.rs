//! `kcm isolate`, as far as mounts and plain directories behave the same: the status and the environment of the
//! command, which of many gets a list, and that a refused isolate starts and claims nothing.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, Stdio};

use crate::harness::dir::{failure, on_both};
use crate::harness::{Sleeper, masks, run, set_mode, signal, text, until};
use nix::sys::signal::Signal;

/// The status as a shell reports it.
fn status_of(command: &mut Command) -> i32 {
    let status = command.stderr(Stdio::null()).status().unwrap();
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap()
}

#[test]
fn the_status_is_the_commands_and_the_list_is_free() {
    on_both(|dir| {
        dir.make_pool("p", true, &["0"]);
        fs::write(dir.conf().parent().unwrap().join("not-executable"), "#!/bin/sh\n").unwrap();
        for (words, status) in [
            (&["true"][..], 0),
            (&["false"], 1),
            (&["exit 42"], 42),
            (&["exit", "--", "42"], 42),
            (&["--", "sh", "-c", "exit 42"], 42),
            (&["no-such-program"], 127),
            (&["--", "no-such-program"], 127),
            (&["--", "/no/such/program"], 127),
            (&["./not-executable"], 126),
            (&["--", "./not-executable"], 126),
            (&["--", "/"], 126),
            (&["kill -TERM $$"], 143),
            (&["kill -KILL $$"], 137),
            (&["--", "sh", "-c", "kill -SEGV $$"], 139),
            (&["kill -HUP $$"], 129),
            (&["kill -PIPE $$"], 141),
        ] {
            let mut command = dir.kcm(&["isolate", "--pool=p"]);
            let found = status_of(command.args(words).current_dir(dir.conf().parent().unwrap()));
            assert_eq!(found, status, "{words:?}");
            assert_eq!(dir.tasks_of("p", "0"), "", "{words:?}");
        }
    });
}

#[test]
fn arguments_reach_the_command_unchanged() {
    on_both(|dir| {
        dir.make_pool("p", false, &["0"]);
        let args = ["a  b", "*", "$HOME", "--flag", "", "'\"", "-", "--", "new\nline", "ä"];
        let direct = [&["--", "printf", "[%s]"][..], &args].concat();
        let shell = [&["printf", "--", "[%s]"][..], &args].concat();
        // The shell prints the message about the line itself.
        let line = [&["x='[%s]'; printf \"$x\"", "--"][..], &args].concat();
        let expected: String = args.iter().map(|arg| format!("[{arg}]")).collect();
        for words in [direct, shell, line] {
            let (out, err, status) = run(dir.kcm(&["isolate", "--pool=p"]).args(&words));
            assert_eq!((out.as_str(), status), (expected.as_str(), Some(0)), "{words:?}: {err}");
        }
    });
}

#[test]
fn the_command_gets_its_cpus_and_nothing_else() {
    on_both(|dir| {
        dir.make_pool("p", true, &["1"]);
        let line = "echo $KCM_CPUS_ASSIGNED $INHERITED; pwd; cat; grep -E '^(Cpus_allowed_list|SigBlk)' /proc/self/status";
        let mut command = dir.kcm(&["isolate", "--pool=p", line]);
        command.env("INHERITED", "yes").current_dir("/").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"from stdin\n").unwrap();
        let output = child.wait_with_output().unwrap();
        let expected = "1 yes\n/\nfrom stdin\n\
            SigBlk:\t0000000000000000\nCpus_allowed_list:\t1\n";
        assert_eq!(text(&output.stdout), expected, "{}", text(&output.stderr));
    });
}

/// Runs that were started at once.
struct Runs(Vec<Child>);

impl Drop for Runs {
    fn drop(&mut self) {
        for run in &mut self.0 {
            let _ = run.kill();
            let _ = run.wait();
        }
    }
}

#[test]
fn of_forty_as_many_run_as_there_are_lists() {
    on_both(|dir| {
        dir.make_pool("p", true, &["0", "1"]);
        for round in 0..3 {
            let start = |_| {
                let mut command = dir.kcm(&["isolate", "--pool=p", "--", "sleep", "1000"]);
                command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap()
            };
            let mut runs = Runs((0..40).map(start).collect());
            until("all but two have ended", || {
                runs.0.iter_mut().map(|run| usize::from(run.try_wait().unwrap().is_some())).sum::<usize>()
                    >= 38
            });
            let (mut ended, running): (Vec<Child>, Vec<Child>) =
                runs.0.drain(..).partition(|run| has_ended(run.id()));
            let mut running = Runs(running);
            assert_eq!(running.0.len(), 2, "round {round}");
            for run in &mut ended {
                assert_eq!(run.wait().unwrap().code(), Some(1));
                let mut printed = String::new();
                std::io::Read::read_to_string(&mut run.stderr.take().unwrap(), &mut printed).unwrap();
                // On a slow machine it says who holds the lock of a plain directory.
                let waited = |line: &&str| line.starts_with("WARNING:root:") && line.contains(" holds it");
                let rest: Vec<&str> = printed.lines().filter(|line| !waited(line)).collect();
                assert_eq!(rest.len(), 1, "{printed}");
                assert!(rest[0].starts_with("ERROR:root:No free cpu lists in pool p"), "{printed}");
            }
            let pids: BTreeSet<String> = running.0.iter().map(|run| run.id().to_string()).collect();
            let held: BTreeSet<String> = ["0", "1"].map(|list| dir.tasks_of("p", list)).into();
            assert_eq!(held, pids, "each list has one of the two tasks");
            for list in ["0", "1"] {
                let pid = dir.tasks_of("p", list).parse().unwrap();
                until("it is on its list", || masks(pid).iter().all(|mask| mask == list));
                signal(pid, Signal::SIGTERM);
            }
            for run in &mut running.0 {
                run.wait().unwrap();
            }
            assert_eq!((dir.tasks_of("p", "0"), dir.tasks_of("p", "1")), (String::new(), String::new()));
        }
    });
}

/// Returns whether a child of the test has been reaped.
fn has_ended(pid: u32) -> bool {
    !fs::exists(format!("/proc/{pid}")).unwrap()
}

#[test]
fn a_shared_pool_gives_the_list_with_fewest_tasks() {
    on_both(|dir| {
        dir.make_pool("p", false, &["0", "1"]);
        let start = || Sleeper::spawn(&mut dir.kcm(&["isolate", "--pool=p", "--", "sleep", "1000"]));
        let count = |list| dir.tasks_of("p", list).split(',').filter(|pid| !pid.is_empty()).count();
        let mut running = Vec::new();
        for (zero, one) in [(1, 0), (1, 1), (2, 1), (2, 2)] {
            running.push(start());
            until("it holds its list", || (count("0"), count("1")) == (zero, one));
        }
    });
}

#[test]
fn an_error_is_one_line_and_starts_nothing() {
    on_both(|dir| {
        dir.make_pool("p", true, &["0"]);
        dir.make_pool("empty", true, &[]);
        let witness = dir.conf().parent().unwrap().join("started");
        set_mode(dir.conf().parent().unwrap(), 0o777);
        let touch = format!("touch {}", witness.display());
        for (pool, message) in [
            ("zz", "Requested pool zz does not exist; the pools are empty, p"),
            (
                "empty",
                "No free cpu lists in pool empty: empty has no CPU lists; make one: mkdir pools/empty/<cpulist>",
            ),
            ("", "Requested pool  does not exist; the pools are empty, p"),
            ("..", "Requested pool .. does not exist; the pools are empty, p"),
        ] {
            let line = failure(&mut dir.kcm(&["isolate", "--pool", pool, &touch]));
            assert!(line.starts_with(message), "{line}");
        }
        let line = failure(&mut dir.kcm_as_nobody(&["isolate", "--pool=p", &touch]));
        assert!(line.contains("Permission denied; run it as root, or let root grant access"), "{line}");
        assert!(!witness.exists());
        assert_eq!(dir.tasks_of("p", "0"), "");
        assert_eq!(status_of(&mut dir.kcm(&["isolate", "--pool=p", &touch])), 0);
        assert!(witness.exists(), "only the witness");
    });
}

#[test]
fn wait_waits_exactly_that_long() {
    on_both(|dir| {
        dir.make_pool("p", true, &["0"]);
        let holder = Sleeper::spawn(&mut dir.kcm(&["isolate", "--pool=p", "--", "sleep", "1000"]));
        until("it holds the list", || dir.tasks_of("p", "0") == holder.pid().to_string());
        let mut command = dir.kcm(&["isolate", "--pool=p", "--wait=0.3", "true"]);
        command.env("KCM_LOG_LEVEL", "ERROR");
        assert!(failure(&mut command).starts_with("No free cpu lists in pool p"));
        let mut waiting = dir.kcm(&["isolate", "--pool=p", "--wait", "echo ran"]);
        let mut waiting = waiting.stdout(Stdio::piped()).spawn().unwrap();
        signal(holder.pid(), Signal::SIGTERM);
        let output = {
            let _collected = holder;
            until("its turn has come", || waiting.try_wait().unwrap().is_some());
            waiting.wait_with_output().unwrap()
        };
        assert_eq!((text(&output.stdout).as_str(), output.status.code()), ("ran\n", Some(0)));
    });
}

#[test]
fn an_ignored_sigpipe_stays_ignored() {
    on_both(|dir| {
        dir.make_pool("p", false, &["0"]);
        for (before, is_ignored) in [("trap '' PIPE", true), ("trap - PIPE", false)] {
            let kcm = dir.kcm(&["isolate", "--pool=p", "--", "grep", "SigIgn", "/proc/self/status"]);
            let mut shell = Command::new("sh");
            shell
                .args(["-c", &format!("{before}; exec \"$@\""), "sh"])
                .arg(kcm.get_program())
                .args(kcm.get_args());
            let (out, err, _) = run(&mut shell);
            let ignored = u64::from_str_radix(out.trim_start_matches("SigIgn:").trim(), 16).expect(&err);
            assert_eq!(ignored & (1 << 12) != 0, is_ignored, "{out}");
        }
    });
}
