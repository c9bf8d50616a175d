//! No command is stopped or fooled by files of a plain directory, by names of programs, pools and lists, by the holder
//! of the lock, or by the kernel's command line.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use crate::harness::dir::{Dir as _, failure};
use crate::harness::{Machine, Mount, Plain, Sleeper, run, set_mode, until, write};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::mkfifo;
use serde_json::Value;

/// Runs a command that must not wait for anything.
fn at_once(command: &mut Command) -> (String, String, Option<i32>) {
    let mut bounded = Command::new("timeout");
    bounded.arg("10").arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        bounded.env(name, value.expect("a value"));
    }
    run(&mut bounded)
}

/// A way to damage a list: its name, the beginning of the warning, and the damage to the `tasks` file.
type Damage = (&'static str, &'static str, Box<dyn Fn(&Path)>);

fn damages(outside: &Path) -> Vec<Damage> {
    let outside = outside.to_path_buf();
    let to = outside.clone();
    vec![
        (
            "text",
            "not a list of PIDs; repair it by hand",
            Box::new(|tasks| fs::write(tasks, "make").unwrap()),
        ),
        (
            "bytes",
            "not a list of PIDs; repair it by hand",
            Box::new(|tasks| fs::write(tasks, b"\xff").unwrap()),
        ),
        ("missing", "No such file or directory", Box::new(|_| ())),
        ("fifo", "not a regular file", Box::new(|tasks| mkfifo(tasks, Mode::S_IRWXU).unwrap())),
        ("directory", "", Box::new(|tasks| fs::create_dir(tasks).unwrap())),
        (
            "link",
            "a symbolic link, which is not followed",
            Box::new(move |tasks| symlink(&outside, tasks).unwrap()),
        ),
        ("loop", "a symbolic link, which is not followed", Box::new(|tasks| symlink(tasks, tasks).unwrap())),
        (
            "device",
            "not a regular file",
            Box::new(|tasks| {
                mknod(tasks, SFlag::S_IFCHR, Mode::S_IRWXU, makedev(1, 5)).unwrap();
            }),
        ),
        (
            "socket",
            "not a regular file",
            Box::new(|tasks| drop(std::os::unix::net::UnixListener::bind(tasks).unwrap())),
        ),
        (
            "huge",
            "larger than 1 MiB",
            Box::new(|tasks| File::create(tasks).unwrap().set_len(1 << 40).unwrap()),
        ),
        (
            "hard-link",
            "not a list of PIDs; repair it by hand",
            Box::new(move |tasks| fs::hard_link(&to, tasks).unwrap()),
        ),
    ]
}

#[test]
fn a_damaged_list_is_named_and_the_others_are_used() {
    let home = tempfile::tempdir().unwrap();
    let outside = home.path().join("outside");
    fs::write(&outside, "root:x:0\n").unwrap();
    for (name, said, damage) in damages(&outside) {
        let plain = Plain::new();
        plain.make_pool("p", true, &[("1", "4194300"), ("0", "")]);
        fs::create_dir(plain.conf().join("pools/p/0-1")).unwrap();
        let tasks = plain.tasks("p", "0-1");
        damage(&tasks);
        let named = |err: &str, words: &[&str]| {
            let begin = format!("WARNING:root:{}: {said}", tasks.display());
            assert!(err.starts_with(&begin) && err.ends_with("; passed over\n"), "{name} {words:?}: {err}");
            assert_eq!(err.lines().count(), 1, "{name} {words:?}: {err}");
        };
        for words in [
            &["describe"][..],
            &["describe", "--format=table"],
            &["describe", "--format=map"],
            &["isolate", "--pool=p", "echo $KCM_CPUS_ASSIGNED"],
            &["reconcile"],
        ] {
            let (out, err, code) = at_once(&mut plain.kcm(words));
            assert_eq!(code, Some(0), "{name} {words:?}: {err}");
            named(&err, words);
            match words {
                ["describe"] => {
                    let described: Value = serde_json::from_str(&out).unwrap();
                    let lists = described["pools"]["p"]["cpuLists"].as_object().unwrap();
                    assert_eq!(lists.keys().collect::<Vec<_>>(), ["0", "1"], "{name}");
                }
                ["isolate", ..] => assert_eq!(out, "0\n", "{name}"),
                ["reconcile"] => assert!(out.contains("4194300"), "{name}: {out}"),
                _ => {}
            }
        }
        assert_eq!((plain.tasks_of("p", "0"), plain.tasks_of("p", "1")), (String::new(), String::new()));
        let (out, err, code) = at_once(&mut plain.kcm(&["node-report"]));
        assert_eq!((err.as_str(), code), ("", Some(0)), "{name}");
        let report: Value = serde_json::from_str(&out).unwrap();
        let errors = report["checks"]["configDirectory"]["errors"].to_string();
        assert!(errors.contains(tasks.to_str().unwrap()), "{name}: {errors}");
        if name == "missing" {
            // An init that was interrupted leaves such a list, and the next one removes it.
            continue;
        }
        // A command that makes or removes lists does all or nothing.
        for words in [
            &["init", "--num-dp-cores=1"][..],
            &["uninstall", "--install-dir=/nowhere", "--systemd=/nowhere", "--share-dir=/nowhere"],
        ] {
            let (_, err, code) = at_once(&mut plain.kcm(words));
            assert!(code == Some(1) && err.contains(tasks.to_str().unwrap()), "{name} {words:?}: {err}");
        }
    }
    assert_eq!(fs::read_to_string(&outside).unwrap(), "root:x:0\n");
}

#[test]
fn a_damaged_pool_is_named_and_the_others_are_used() {
    let plain = Plain::new();
    plain.make_pool("good", true, &[("0", "")]);
    for name in ["fifo", "link", "absent"] {
        fs::create_dir_all(plain.conf().join("pools").join(name).join("1")).unwrap();
        fs::write(plain.tasks(name, "1"), "").unwrap();
    }
    mkfifo(&plain.conf().join("pools/fifo/exclusive"), Mode::S_IRWXU).unwrap();
    symlink("/etc/passwd", plain.conf().join("pools/link/exclusive")).unwrap();
    symlink("good", plain.conf().join("pools/linked-pool")).unwrap();
    fs::create_dir(plain.conf().join("pools").join(OsStr::from_bytes(b"\xff\n"))).unwrap();
    let (out, err, code) = at_once(&mut plain.kcm(&["describe"]));
    assert_eq!(code, Some(0), "{err}");
    let described: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(described["pools"].as_object().unwrap().keys().collect::<Vec<_>>(), ["good"]);
    assert_eq!(err.lines().filter(|line| line.starts_with("WARNING:root:")).count(), 4, "{err}");
    assert!(err.contains(r"\xff\n") && err.contains("not UTF-8"), "{err}");
    let (_, err, code) = at_once(&mut plain.kcm(&["isolate", "--pool=good", "true"]));
    assert_eq!(code, Some(0), "{err}");
    let (_, err, code) = at_once(&mut plain.kcm(&["isolate", "--pool=fifo", "true"]));
    assert_eq!(code, Some(1));
    assert!(err.contains("pools/fifo/exclusive: not a regular file"), "{err}");
}

/// Names that try to look like something else, as bytes of a file name or of a program's name.
const NAMES: &[&[u8]] = &[
    b"x), 1 (init",
    b"x\nERROR:root:y",
    b"\x1b[2J\x07",
    b"a\tb  c",
    b"\", \"b\": \"",
    b"a\\",
    b"#'$(id)`",
    "\u{202e}tini".as_bytes(),
    "a\u{2028}b\u{2066}".as_bytes(),
    "\u{200b}\u{feff}".as_bytes(),
    b"a,b",
];

/// Checks that the text has no character that a terminal obeys.
fn assert_harmless(text: &str) {
    let bad = |c: char| {
        c != '\n' && (c.is_control() || c != ' ' && c.escape_debug().len() > 1 && !"\"'\\".contains(c))
    };
    assert!(!text.contains(bad), "{text:?}");
}

#[test]
fn names_of_pools_and_lists_stay_in_their_place() {
    for name in NAMES {
        let plain = Plain::new();
        plain.make_pool("p", true, &[("0", "")]);
        let list = plain.conf().join("pools/p").join(OsStr::from_bytes(name));
        fs::create_dir(&list).unwrap();
        fs::write(list.join("tasks"), "4194300").unwrap();
        let pool = plain.conf().join("pools").join(OsStr::from_bytes(name));
        fs::create_dir_all(pool.join("1")).unwrap();
        fs::write(pool.join("exclusive"), "1").unwrap();
        fs::write(pool.join("1/tasks"), "4194301").unwrap();
        for words in [&["describe"][..], &["node-report"], &["reconcile"]] {
            let (out, err, code) = at_once(&mut plain.kcm(words));
            assert_eq!((err.as_str(), code), ("", Some(0)), "{name:?}");
            assert!(out.is_ascii());
            assert_harmless(&out);
            let value: Value = serde_json::from_str(&out).unwrap();
            if words == ["describe"] {
                let text = str::from_utf8(name).unwrap();
                assert_eq!(value["pools"][text]["name"], text);
                assert_eq!(value["pools"]["p"]["cpuLists"][text]["cpus"], text);
            }
        }
        let (table, err, _) = at_once(&mut plain.kcm(&["describe", "--format=table"]));
        assert_eq!((table.lines().count(), err.as_str()), (4, ""), "{name:?}: {table}");
        let online = fs::read_to_string("/sys/devices/system/cpu/present").unwrap();
        let (map, err, _) = at_once(&mut plain.kcm(&["describe", "--format=map"]));
        assert_eq!(err, "", "{name:?}");
        if online == "0-1\n" {
            assert_eq!(map.lines().count(), 3, "{name:?}: {map}");
        }
        assert_harmless(&(table + &map));
        // A message about it is one line.
        fs::write(list.join("tasks"), "no PID").unwrap();
        let (_, err, _) = at_once(&mut plain.kcm(&["describe"]));
        assert_eq!(err.lines().count(), 1, "{name:?}: {err}");
        assert_harmless(&err);
        fs::remove_dir_all(&list).unwrap();
        fs::write(pool.join("1/tasks"), "no PID").unwrap();
        let line = failure(
            plain
                .kcm(&["uninstall", "--install-dir=/nowhere", "--share-dir=/nowhere"])
                .arg("--systemd=/nowhere"),
        );
        assert_harmless(&line);
    }
}

#[test]
fn a_programs_name_forges_no_second_holder() {
    let mount = Mount::with_dataplane();
    let list = mount.tasks("dataplane", "0");
    for name in NAMES {
        let name = &name[..name.len().min(15)];
        let script = mount.home().join("script");
        fs::write(
            &script,
            [
                &b"printf %s '"[..],
                &name.iter().map(|&b| if b == b'\'' { b'_' } else { b }).collect::<Vec<u8>>(),
                b"' > /proc/$$/comm; echo $$ > $T; read x",
            ]
            .concat(),
        )
        .unwrap();
        let mut command = Command::new("bash");
        let holder = Sleeper::spawn(command.arg(&script).env("T", &list).stdin(std::process::Stdio::piped()));
        until("it holds the list", || crate::harness::held(&list) == [holder.pid()]);
        let other = Sleeper::new();
        write(&list, other.pid().to_string()).unwrap_err();
        let last_error = mount.read("self/last_error");
        assert_eq!(last_error.lines().count(), 1, "{last_error:?}");
        assert_harmless(&last_error);
        let (map, _, _) = at_once(&mut mount.kcm(&["describe", "--format=map"]));
        assert_harmless(&map);
        for text in [&last_error, &map] {
            let shown = text.split_once(&format!("{} (", holder.pid())).unwrap().1;
            let (shown, behind) = shown.split_once(')').unwrap();
            assert!(!shown.contains(['(', ',']), "{text}");
            assert!(behind.starts_with(" for ") || behind.starts_with('\n'), "{text}");
        }
        holder.end();
    }
}

#[test]
fn the_lock_is_a_regular_file_of_the_directory() {
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("target");
    for kind in ["dangling", "link", "fifo"] {
        let plain = Plain::new();
        plain.make_pool("p", true, &[("0", "")]);
        let lock = plain.conf().join("lock");
        fs::remove_file(&lock).unwrap();
        match kind {
            "dangling" => symlink(&target, &lock).unwrap(),
            "link" => symlink("/etc/passwd", &lock).unwrap(),
            _ => mkfifo(&lock, Mode::S_IRWXU).unwrap(),
        }
        for words in [&["reconcile"][..], &["isolate", "--pool=p", "true"]] {
            let (_, err, code) = at_once(&mut plain.kcm(words));
            assert_eq!(code, Some(1), "{kind} {words:?}");
            assert!(err.starts_with(&format!("ERROR:root:{}: ", lock.display())), "{kind}: {err}");
        }
        assert!(!target.exists());
    }
}

#[test]
fn who_holds_the_lock_is_named() {
    let plain = Plain::new();
    plain.make_pool("p", true, &[("0", "")]);
    set_mode(&plain.conf().join("lock"), 0o644);
    // Reading is enough to hold it.
    let _held = Flock::lock(File::open(plain.conf().join("lock")).unwrap(), FlockArg::LockExclusive).unwrap();
    let started = Instant::now();
    let (_, err, code) = at_once(plain.kcm(&["reconcile"]).env("KCM_LOCK_TIMEOUT", "1.2"));
    assert!(started.elapsed().as_secs() < 5);
    let lines: Vec<&str> = err.lines().collect();
    let [warning, error] = lines[..] else { panic!("{err}") };
    let begin = format!("WARNING:root:{}: {} (", plain.conf().join("lock").display(), std::process::id());
    assert!(warning.starts_with(&begin), "{err}");
    assert!(warning.ends_with(" holds it; whoever may read this file can hold it: chmod 600"), "{err}");
    assert_eq!((error, code), ("ERROR:root:Lock timed out after 1.2 seconds", Some(1)));
}

#[test]
fn the_kernels_command_line_is_bytes() {
    let plain = Plain::new();
    let root = plain.home().join("machine");
    Machine::new(1, 4, 1).write(&root);
    fs::write(root.join("proc/cmdline"), b"root=LABEL=\xfcber quiet isolcpus=1-2\n").unwrap();
    let on = |mut command: Command| {
        command.env("KCM_DEV_LSCPU_SYSFS", &root).env("KCM_PROC_FS", root.join("proc"));
        at_once(&mut command)
    };
    let (_, err, code) = on(plain.kcm(&["init", "--num-dp-cores=1", "--num-cp-cores=1"]));
    assert_eq!(code, Some(0), "{err}");
    assert_eq!(fs::read_dir(plain.conf().join("pools/dataplane")).unwrap().count(), 2);
    let (out, err, code) = on(plain.kcm(&["node-report"]));
    assert_eq!(code, Some(0), "{err}");
    assert_eq!(out.matches("\"isolated\": true").count(), 2, "{out}");
    let mount = Mount::not_mounted();
    let (_, err, code) = on(mount.mount_command());
    assert_eq!(code, Some(0), "{err}");
    assert!(mount.read("info/topology").contains("true"));
}
