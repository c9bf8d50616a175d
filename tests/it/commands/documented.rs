//! The node commands, row by row as docs/compatibility.md describes them: flags, defaults, messages, statuses and
//! environment variables, on a mount and on a plain directory.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::harness::{KCM, Machine, Mount, Plain, Sleeper, data, kcm_for, pin, run, says, write};
use nix::fcntl::{Flock, FlockArg};

/// A command, a flag, a value for it, and the default that the help shows.
const FLAGS: &[(&str, &str, &str, &str)] = &[
    ("init", "--conf-dir", "/dev/null/x", "[default: /etc/kcm]"),
    ("init", "--num-dp-cores", "1", "[default: 4]"),
    ("init", "--num-cp-cores", "0", "[default: 1]"),
    ("describe", "--conf-dir", "/dev/null/x", "[default: /etc/kcm]"),
    ("reconcile", "--conf-dir", "/dev/null/x", "[default: /etc/kcm]"),
    ("reconcile", "--interval", "0", "[default: 0]"),
    ("isolate", "--conf-dir", "/dev/null/x", "[default: /etc/kcm]"),
    ("isolate", "--pool", "p", ""),
    ("install", "--install-dir", "/dev/null/x", "[default: /opt/bin]"),
    ("node-report", "--conf-dir", "/dev/null/x", "[default: /etc/kcm]"),
    ("node-report", "--interval", "0", "[default: 0]"),
];

fn kcm(words: &[&str]) -> Command {
    let mut command = Command::new(KCM);
    command.args(words);
    command
}

#[test]
fn every_flag_works_in_both_spellings_with_its_default() {
    for (command, flag, value, default) in FLAGS {
        let (help, err, code) = run(&mut kcm(&[command, "--help"]));
        assert_eq!((err.as_str(), code), ("", Some(0)), "{command}");
        let about = help.split("\n      --").find(|part| part.starts_with(&flag[2..])).expect(flag);
        assert!(about.contains(default), "{command} {flag}: {about}");
        for spelling in [vec![format!("{flag}={value}")], vec![(*flag).into(), (*value).into()]] {
            let mut typed = kcm(&[command]);
            typed.args(&spelling);
            // Other arguments that the command needs.
            match (*command, *flag) {
                ("isolate", "--pool") => typed.args(["true", "--conf-dir=/dev/null/x"]),
                ("isolate", _) => typed.args(["true", "--pool=p"]),
                (_, "--conf-dir" | "--install-dir") => &mut typed,
                _ => typed.arg("--conf-dir=/dev/null/x"),
            };
            // All of these fail because there is no directory; the test only checks that the flags were parsed.
            assert_ne!(
                run(typed.env("KCM_DEV_LSCPU_SYSFS", "/nowhere")).2,
                Some(2),
                "{command} {spelling:?}"
            );
        }
    }
}

#[test]
fn every_command_has_an_example_in_its_help() {
    let (help, _, _) = run(&mut kcm(&["--help"]));
    let commands = help.split_once("Commands:\n").unwrap().1.split_once("\n\n").unwrap().0;
    let names = commands.lines().filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    let names: Vec<&str> = names.filter(|name| !name.is_empty() && *name != "help").collect();
    for documented in ["init", "describe", "reconcile", "isolate", "install", "node-report"] {
        assert!(names.contains(&documented), "{documented}");
    }
    for name in names {
        let (help, err, code) = run(&mut kcm(&[name, "--help"]));
        assert_eq!((err.as_str(), code), ("", Some(0)), "{name}");
        assert!(help.contains(&format!("  kcm {name}")), "{name}: {help}");
        assert_eq!(run(&mut kcm(&[name, "-h"])).2, Some(0), "{name}");
    }
}

#[test]
fn usage_version_and_mistyped_words() {
    for words in [&["-h"][..], &["--help"]] {
        let (out, err, code) = run(&mut kcm(words));
        assert!(out.contains("Usage: kcm"), "{out}");
        assert_eq!((err.as_str(), code), ("", Some(0)), "{words:?}");
    }
    let (version, err, code) = run(&mut kcm(&["--version"]));
    assert_eq!((err.as_str(), code), ("", Some(0)));
    let package = concat!("kcm ", env!("CARGO_PKG_VERSION"));
    // A machine that only runs the tests has no repository.
    match Command::new("git").args(["log", "-1", "--format=%h %cs"]).output() {
        Ok(log) if log.status.success() => {
            let commit = String::from_utf8_lossy(&log.stdout).trim_end().to_owned();
            assert_eq!(version, format!("{package} ({commit})\n"));
        }
        _ => assert!(version.starts_with(package), "{version}"),
    }
    for (words, printed) in [
        (&[][..], "Usage: kcm"),
        (&["isolat"], "isolate"),
        (&["reconsile"], "reconcile"),
        (&["reconcile", "--intervall=1"], "'--interval'"),
        (&["init", "--num-dp-corez=1"], "'--num-dp-cores'"),
        (&["init", "--num-dp-cores=-1"], "--num-dp-cores"),
        (&["init", "--num-dp-cores=many"], "--num-dp-cores"),
        (&["init", "more"], "unexpected argument"),
        (&["isolate", "true"], "--pool"),
        (&["isolate", "--pool=p"], "<command>"),
        (&["reconcile", "--interval=-1"], "--interval"),
        (&["reconcile", "--interval=soon"], "not a number of seconds"),
        (&["node-report", "--interval=inf"], "not a number of seconds"),
        (&["describe", "--format=xml"], "json, table, map"),
    ] {
        let (out, err, code) = run(&mut kcm(words));
        assert_eq!((out.as_str(), code), ("", Some(2)), "{words:?}");
        assert!(err.contains(printed), "{words:?}: {err}");
    }
}

#[test]
fn flags_can_precede_the_command_and_be_abbreviated() {
    let plain = Plain::new();
    plain.make_pool("p", true, &[("0", "")]);
    let conf = plain.conf().display().to_string();
    let with = |words: &[&str]| {
        let words = words.iter().map(|word| word.replace("CONF", &conf));
        let (out, err, status) = run(Command::new(KCM).args(words));
        assert_eq!((err.as_str(), status), ("", Some(0)));
        out
    };
    let described = with(&["describe", "--conf-dir=CONF"]);
    for words in [
        &["--conf-dir=CONF", "describe"][..],
        &["--conf-dir", "CONF", "describe"],
        &["--conf=CONF", "describe"],
        &["--format=json", "--conf", "CONF", "describe"],
        &["describe", "--conf=CONF"],
    ] {
        assert_eq!(with(words), described, "{words:?}");
    }
    assert_eq!(
        with(&["--conf-dir=CONF", "--po=p", "isolate", "echo", "--", "--conf-dir=x"]),
        "--conf-dir=x\n"
    );
    // An option of another command is still refused.
    let (_, err, status) = run(Command::new(KCM).args(["--num-dp-cores=1", "describe"]));
    assert!(err.contains("unexpected argument '--num-dp-cores'"), "{err}");
    assert_eq!(status, Some(2));
}

#[test]
fn the_default_directory_is_etc_kcm() {
    let plain = Plain::new();
    plain.make_pool("p", true, &[("0", "")]);
    // In a mount namespace with its own /etc.
    let script = "mount -t tmpfs none /etc && cp -a \"$C\" /etc/kcm && exec \"$KCM\" \"$@\"";
    for (words, says) in [
        (&["describe"][..], "\"path\": \"/etc/kcm\""),
        (&["node-report"], "\"path\": \"/etc/kcm\""),
        (&["reconcile"], "\"reclaimedCpuLists\": []"),
        (&["isolate", "--pool=p", "cat /etc/kcm/pools/p/0/tasks | wc -w"], "1\n"),
    ] {
        let mut command = Command::new("unshare");
        command.args(["--mount", "bash", "-c", script, "bash"]).args(words);
        let (out, err, code) = run(command.env("C", plain.conf()).env("KCM", KCM));
        assert_eq!((err.as_str(), code), ("", Some(0)), "{words:?}");
        assert!(out.contains(says), "{words:?}: {out}");
    }
}

/// The same small configuration in both kinds of directory: a free list, a taken one, a shared pool.
fn with_pools() -> (Mount, Plain, Sleeper) {
    let (mount, plain, holder) = (Mount::new(), Plain::new(), Sleeper::new());
    mount.make_pool("full", true, &["0"]);
    mount.make_pool("infra", false, &["1"]);
    write(&mount.tasks("full", "0"), holder.pid().to_string()).unwrap();
    plain.make_pool("full", true, &[("0", &holder.pid().to_string())]);
    plain.make_pool("infra", false, &[("1", "")]);
    (mount, plain, holder)
}

#[test]
fn messages_and_statuses_of_isolate() {
    let (mount, plain, _holder) = with_pools();
    let absent = mount.home().join("absent");
    let nowhere =
        format!("ERROR:root:{}: no such directory; run kcm mount, or give --conf-dir\n", absent.display());
    for conf in [mount.conf(), plain.conf()] {
        for (words, out, err, status) in [
            (
                &["--pool=infra", "echo", "--", "a  b", "*", "$HOME", "--flag"][..],
                "a  b * $HOME --flag\n",
                "",
                0,
            ),
            (&["--pool=infra", "echo $KCM_CPUS_ASSIGNED; exit 42"], "1\n", "", 42),
            (&["--pool", "infra", "exit", "--", "7"], "", "", 7),
            (&["--pool=infra", "--", "sh", "-c", "exit 1"], "", "", 1),
            (&["--pool=infra", "kill -TERM $$"], "", "", 143),
            (&["--pool=infra", "kill -KILL $$"], "", "", 137),
            (&["--pool=full", "true"], "", "ERROR:root:No free cpu lists in pool full\n", 1),
            (
                &["--pool=zz", "true"],
                "",
                "ERROR:root:Requested pool zz does not exist; the pools are full, infra\n",
                1,
            ),
            (
                &["--pool=infra", "--", "/nowhere"],
                "",
                "ERROR:root:/nowhere: No such file or directory; look at its name and at PATH\n",
                127,
            ),
            (
                &["--pool=infra", "--", "/dev/null"],
                "",
                "ERROR:root:/dev/null: Permission denied; look at its mode\n",
                126,
            ),
        ] {
            // A shell reports a death by a signal as 128 plus its number.
            let mut shell = Command::new("bash");
            shell.args(["-c", "\"$0\" \"$@\" 2>&3; exit $?", KCM, "isolate", "--conf-dir"]).arg(&conf);
            let messages = mount.home().join("messages");
            let mut shell = redirected(shell, &messages);
            let found = run(shell.args(words));
            // The reason follows.
            let printed = fs::read_to_string(&messages).unwrap();
            let reasons = [": no list of full is free (1 taken); full 0 is held by ", ": 0 is held by "];
            let reason = reasons.iter().find_map(|reason| printed.find(reason)).unwrap_or(printed.len());
            let printed = printed[..reason].trim_end().to_owned();
            let printed = if printed.is_empty() { printed } else { printed + "\n" };
            assert_eq!(
                (found.0.as_str(), printed.as_str(), found.2),
                (out, err, Some(status)),
                "{conf:?} {words:?}"
            );
        }
        for list in ["full/0/tasks", "infra/1/tasks"] {
            let left = fs::read_to_string(conf.join("pools").join(list)).unwrap();
            assert_eq!(
                left.split_whitespace().count(),
                usize::from(list.starts_with("full")),
                "{conf:?} {list}"
            );
        }
    }
    let found = run(&mut kcm_for(&absent, &["isolate", "--pool=p", "true"]));
    assert_eq!(found, (String::new(), nowhere, Some(1)));
}

/// Descriptor 3 is this file, so that the shell's own message about the signal does not appear in the output.
fn redirected(inner: Command, file: &Path) -> Command {
    let mut outer = Command::new("bash");
    outer.arg("-c").arg("exec 3> \"$0\"; exec \"$@\"").arg(file);
    outer.arg(inner.get_program()).args(inner.get_args());
    outer
}

#[test]
fn the_legacy_describe_is_printed_byte_for_byte() {
    let (mount, plain, holder) = with_pools();
    for conf in [mount.conf(), plain.conf()] {
        let names = [("conf", conf.to_str().unwrap()), ("pid", &*holder.pid().to_string())];
        says(&mut kcm_for(&conf, &["describe"]), &data("describe.json", &names));
    }
}

#[test]
fn a_held_lock_ends_the_command_after_the_timeout() {
    let (mount, plain, _holder) = with_pools();
    let hold = |conf: &Path| {
        Flock::lock(fs::File::open(conf.join("lock")).unwrap(), FlockArg::LockExclusive).unwrap()
    };
    let _locks = [hold(&mount.conf()), hold(&plain.conf())];
    let commands: &[&[&str]] = &[
        &["isolate", "--pool=infra", "true"],
        &["reconcile"],
        &["init", "--num-dp-cores=1"],
        &["uninstall", "--install-dir=/nowhere", "--systemd=/nowhere", "--share-dir=/nowhere"],
    ];
    for words in commands {
        for (timeout, printed) in [("0.2", "0.2"), ("0", "0.0")] {
            let (out, err, code) = run(plain.kcm(words).env("KCM_LOCK_TIMEOUT", timeout));
            let expected = format!("ERROR:root:Lock timed out after {printed} seconds");
            assert_eq!((out.as_str(), code), ("", Some(1)), "{words:?}: {err}");
            assert_eq!(err.lines().last(), Some(&*expected), "{words:?}");
        }
        let (_, err, code) = run(plain.kcm(words).env("KCM_LOCK_TIMEOUT", "soon"));
        let expected = "ERROR:root:KCM_LOCK_TIMEOUT=soon: not a number of seconds; give one like 30";
        assert_eq!((err.lines().last(), code), (Some(expected), Some(1)), "{words:?}");
    }
    for words in &commands[..2] {
        assert_eq!(run(mount.kcm(words).env("KCM_LOCK_TIMEOUT", "0.2")).2, Some(0), "a mount needs no lock");
        let (out, err, code) = run(mount.kcm(words).env("KCM_LOCK_TIMEOUT", "soon"));
        let expected = "ERROR:root:KCM_LOCK_TIMEOUT=soon: not a number of seconds; give one like 30\n";
        assert_eq!((out.as_str(), err.as_str(), code), ("", expected, Some(1)), "{words:?}");
    }
}

#[test]
fn kcm_log_level_has_five_levels() {
    let place = Plain::new();
    let root = place.home().join("machine");
    Machine::new(1, 8, 2).write(&root);
    fs::write(root.join("proc/cmdline"), "isolcpus=0,8,1\n").unwrap();
    // An information, a warning and an error; with DEBUG also details.
    let levels = |level: Option<&str>| {
        let mut found = Vec::new();
        for words in [&["init"][..], &["node-report"]] {
            let mut command = kcm_for(&place.home().join("absent"), words);
            command.env("KCM_PROC_FS", root.join("proc")).env("KCM_DEV_LSCPU_SYSFS", &root);
            match level {
                Some(level) => command.env("KCM_LOG_LEVEL", level),
                None => command.env_remove("KCM_LOG_LEVEL"),
            };
            let (_, err, code) = run(&mut command);
            assert_eq!(code, Some(i32::from(words == ["init"])), "{err}");
            for line in err.lines() {
                let (level, _) = line.split_once(":root:").unwrap_or_else(|| panic!("{line}"));
                if !found.contains(&level.to_owned()) {
                    found.push(level.to_owned());
                }
            }
        }
        found
    };
    assert_eq!(levels(Some("CRITICAL")), [""; 0]);
    assert_eq!(levels(Some("ERROR")), ["ERROR"]);
    assert_eq!(levels(Some("WARNING")), ["WARNING", "ERROR"]);
    assert_eq!(levels(Some("INFO")), ["INFO", "WARNING", "ERROR"]);
    assert_eq!(levels(Some("DEBUG")), ["INFO", "WARNING", "ERROR", "DEBUG"]);
    assert_eq!(levels(Some("warning")), ["WARNING", "ERROR"]);
    assert_eq!(levels(None), ["INFO", "WARNING", "ERROR"]);
    let (_, err, code) =
        run(kcm_for(&place.home().join("absent"), &["describe"]).env("KCM_LOG_LEVEL", "loud"));
    let first = "WARNING:root:KCM_LOG_LEVEL=loud: not a level; using INFO; give CRITICAL, ERROR, WARNING, INFO or DEBUG";
    assert_eq!((err.lines().next(), code), (Some(first), Some(1)));
}

#[test]
fn kcm_proc_fs_sets_pid_and_isolated_cpus() {
    let plain = Plain::new();
    plain.make_pool("p", true, &[("0", "")]);
    let proc = plain.home().join("proc");
    fs::create_dir_all(proc.join("self")).unwrap();
    fs::write(proc.join("self/stat"), "4194301 (kcm) R 1 1 1 0\n").unwrap();
    let mut command = plain.kcm(&["isolate", "--pool=p", "cat"]);
    command.arg("--").arg(plain.tasks("p", "0")).env("KCM_PROC_FS", &proc);
    assert_eq!(run(&mut command), ("4194301".into(), String::new(), Some(0)));
    assert_eq!(fs::read_to_string(plain.tasks("p", "0")).unwrap(), "");
    command.env("KCM_PROC_FS", plain.home().join("nowhere"));
    let (out, err, code) = run(&mut command);
    assert_eq!((out.as_str(), code), ("", Some(1)));
    assert!(err.contains("set KCM_PROC_FS to a procfs") && err.lines().count() == 1, "{err}");
    // It also names the kernel's command line: see the tests of init.
}

#[test]
fn kcm_dev_lscpu_sysfs_sets_the_machine() {
    let plain = Plain::new();
    let root = plain.home().join("machine");
    Machine::new(2, 3, 2).write(&root);
    let (out, _, _) = run(plain.kcm(&["node-report"]).env("KCM_DEV_LSCPU_SYSFS", &root));
    let report: serde_json::Value = serde_json::from_str(&out).unwrap();
    let sockets = report["topology"]["sockets"].as_object().unwrap();
    assert_eq!(sockets.keys().collect::<Vec<_>>(), ["0", "1"]);
    assert_eq!(sockets["1"]["cores"].as_array().unwrap().len(), 3);
    assert_eq!(sockets["1"]["cores"][2]["cpus"].as_array().unwrap().len(), 2);
    let (_, err, code) = run(plain.kcm(&["node-report"]).env("KCM_DEV_LSCPU_SYSFS", "/nowhere"));
    assert!(err.ends_with("look at KCM_DEV_LSCPU_SYSFS\n"), "{err}");
    assert_eq!(code, Some(1));
}

#[test]
fn an_interval_of_0_runs_once() {
    let (mount, plain, holder) = with_pools();
    pin(holder.pid(), &[0]);
    for conf in [mount.conf(), plain.conf()] {
        for command in ["reconcile", "node-report"] {
            let (once, err, code) = run(&mut kcm_for(&conf, &[command, "--interval=0"]));
            assert_eq!((err.as_str(), code), ("", Some(0)), "{command}");
            assert_eq!(serde_json::Deserializer::from_str(&once).into_iter::<serde_json::Value>().count(), 1);
        }
    }
}

#[test]
fn another_parser_prints_the_same_json() {
    let (mount, plain, holder) = with_pools();
    pin(holder.pid(), &[1]);
    for conf in [mount.conf(), plain.conf()] {
        for command in ["describe", "reconcile", "node-report"] {
            let (out, err, code) = run(&mut kcm_for(&conf, &[command]));
            assert_eq!((err.as_str(), code), ("", Some(0)), "{command}");
            let line = "import json, sys; print(json.dumps(json.load(sys.stdin), indent=2, sort_keys=True))";
            let mut python = Command::new("bash");
            python.args(["-c", "printf %s \"$1\" | python3 -c \"$2\"", "bash", &out, line]);
            says(&mut python, &out);
        }
    }
}
