//! The state directory keeps configuration, claims, owners and modes over a stop and over SIGKILL. Some state
//! directories are refused.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, chown, symlink};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use crate::harness::dir::{Dir as _, failure, pinned};
use crate::harness::{KCM, Mount, NOBODY, masks, run, set_mode, until, write};

/// A way to end the daemon, after which it is started again.
type Restart = fn(&Mount);

const RESTARTS: [Restart; 2] = [
    |mount| {
        mount.stop();
        mount.start();
    },
    |mount| {
        mount.kill_daemon();
        mount.start();
    },
];

/// For how many seconds `excl 0` has been held, according to a refusal.
fn held_for(mount: &Mount) -> u64 {
    let text = mount.sh("echo $$ > $C/pools/excl/0/tasks 2> /dev/null; cat $C/self/last_error");
    let (_, rest) = text.split_once(" for ").unwrap_or_else(|| panic!("{text}"));
    rest.split_once(" s;").expect("seconds").0.parse().expect("a number")
}

#[test]
fn the_state_survives_a_stop_and_a_kill() {
    for restart in RESTARTS {
        let mount = Mount::new();
        mount.make_pool("excl", true, &["0"]);
        mount.make_pool("shared", false, &["1"]);
        chown(mount.tasks("excl", "0"), Some(NOBODY), Some(NOBODY)).unwrap();
        set_mode(&mount.tasks("excl", "0"), 0o660);
        set_mode(&mount.pool("shared"), 0o750);
        chown(mount.conf().join("info/events"), None, Some(NOBODY)).unwrap();
        let (one, other) = (pinned("1"), pinned("0-1"));
        write(&mount.tasks("excl", "0"), one.pid().to_string()).unwrap();
        write(&mount.tasks("shared", "1"), other.pid().to_string()).unwrap();
        let claimed = Instant::now();
        until("a second has passed", || held_for(&mount) >= 1);
        let attributes = |mount: &Mount| {
            let attributes =
                |(path, stat): (String, fs::Metadata)| (path, (stat.uid(), stat.gid(), stat.mode()));
            mount.walk().into_iter().map(attributes).collect::<BTreeMap<_, _>>()
        };
        let before = attributes(&mount);
        restart(&mount);
        assert_eq!(attributes(&mount), before);
        assert_eq!(mount.read("pools/excl/exclusive"), "1\n");
        assert_eq!(mount.read("pools/shared/exclusive"), "0\n");
        let stat = fs::metadata(mount.tasks("excl", "0")).unwrap();
        assert_eq!((stat.uid(), stat.gid(), stat.mode() & 0o777), (NOBODY, NOBODY, 0o660));
        for (pool, list, task, original) in [("excl", "0", &one, "1"), ("shared", "1", &other, "0-1")] {
            assert_eq!(mount.tasks_of(pool, list), task.pid().to_string());
            assert_eq!(masks(task.pid()), [list]);
            if pool == "excl" {
                // It counts from the claim, not from the restart of the daemon.
                let held = held_for(&mount);
                assert!((1..=claimed.elapsed().as_secs()).contains(&held), "{held} s");
            }
            write(&mount.tasks(pool, list), format!("-{}", task.pid())).unwrap();
            assert_eq!(masks(task.pid()), [original]);
        }
    }
}

#[test]
fn a_task_that_died_without_a_daemon_holds_nothing() {
    for restart in RESTARTS {
        let mount = Mount::with_dataplane();
        let (dying, staying) = (pinned("0-1"), pinned("0-1"));
        write(&mount.tasks("dataplane", "0"), dying.pid().to_string()).unwrap();
        write(&mount.tasks("dataplane", "1"), staying.pid().to_string()).unwrap();
        let pid = dying.pid();
        // It dies in between: the next daemon finds it dead.
        mount.kill_daemon();
        dying.collect();
        mount.start();
        restart(&mount);
        assert_eq!(mount.tasks_of("dataplane", "0"), "");
        assert_eq!(mount.tasks_of("dataplane", "1"), staying.pid().to_string());
        // Nobody was there to be told how it ended.
        let told: Vec<_> = mount.events().into_iter().filter(|(kind, _)| kind != "claimed").collect();
        assert_eq!(told, [("died".to_owned(), pid)]);
        assert_eq!(mount.read("info/reclaimed"), "");
    }
}

#[test]
fn claims_of_another_boot_are_dropped() {
    let mount = Mount::new();
    mount.make_pool("excl", true, &["0"]);
    let task = pinned("0-1");
    write(&mount.tasks("excl", "0"), task.pid().to_string()).unwrap();
    mount.stop();
    let boot = mount.home().join("boot");
    fs::write(&boot, "00000000-0000-4000-8000-000000000000\n").unwrap();
    // In a mount namespace with another boot id.
    let script = format!(
        "mount --bind {boot} /proc/sys/kernel/random/boot_id &&
        {KCM} mount --conf-dir={conf} --state-dir={state} 2> /dev/null &&
        cat {conf}/pools/excl/exclusive {conf}/pools/excl/0/tasks {conf}/info/reclaimed;
        {KCM} unmount --conf-dir={conf}",
        boot = boot.display(),
        conf = mount.conf().display(),
        state = mount.state().display(),
    );
    let (out, err, status) = run(Command::new("unshare").args(["--mount", "sh", "-c", &script]));
    assert_eq!((out.as_str(), status), ("1\n", Some(0)), "{err}");
    // The identity of the task is unknown now, so its mask stays as it is.
    assert_eq!(masks(task.pid()), ["0"]);
    // This boot does not know it either.
    mount.start();
    assert_eq!(mount.tasks_of("excl", "0"), "");
}

#[test]
fn a_second_daemon_on_a_state_directory_is_refused() {
    let mount = Mount::with_dataplane();
    let second = mount.home().join("second");
    let mut command = Command::new(KCM);
    command.arg("mount").arg("--conf-dir").arg(&second).arg("--state-dir").arg(mount.state());
    let line = failure(command.env("KCM_LOG_LEVEL", "ERROR"));
    let state = mount.state();
    assert_eq!(
        line,
        format!(
            "{}: in use by another kcm mount; give another --state-dir, or kcm unmount that one first",
            state.display()
        )
    );
    assert!(!fs::read_to_string("/proc/mounts").unwrap().contains(second.to_str().unwrap()));
    let task = pinned("0-1");
    write(&mount.tasks("dataplane", "0"), task.pid().to_string()).expect("the first daemon keeps running");
}

#[test]
fn a_state_directory_inside_the_mount_is_refused() {
    let mount = Mount::not_mounted();
    let (conf, link) = (mount.conf(), mount.home().join("link"));
    fs::create_dir(&conf).unwrap();
    symlink(&conf, &link).unwrap();
    let dotted = mount.home().join("elsewhere/../conf/state");
    for state in [conf.clone(), conf.join("state"), conf.join("deep/er"), link.join("state"), dotted] {
        let mut command = mount.kcm(&["mount", "--state-dir"]);
        let line = failure(command.arg(&state).env("KCM_LOG_LEVEL", "ERROR"));
        let expected = format!(
            "{}: is inside {}, which would hide it; choose another --state-dir",
            state.display(),
            conf.display()
        );
        assert_eq!(line, expected);
        assert_eq!(fs::read_dir(&conf).unwrap().count(), 0, "nothing was created");
    }
}

#[test]
fn state_of_a_newer_version_is_refused() {
    let mount = Mount::with_dataplane();
    mount.stop();
    for (name, header) in [
        ("config", r#"{"header":{"kcm":"config","version":2}}"#),
        ("claims", r#"{"kcm":"claims","version":2,"boot":"x"}"#),
    ] {
        let file = mount.state().join(name);
        let before = fs::read(&file).unwrap();
        let newer = format!("{:08x} {header}\nsomething new\n", crc32fast::hash(header.as_bytes()));
        fs::write(&file, &newer).unwrap();
        let line = mount.mount_failure();
        let expected =
            format!("{}: written by a newer kcm (format 2, this one knows 1); run that one", file.display());
        assert!(line.ends_with(&expected), "{line}");
        assert_eq!(fs::read_to_string(&file).unwrap(), newer);
        assert_eq!(set_aside(&mount.state()), Vec::<String>::new());
        fs::write(&file, before).unwrap();
    }
    mount.start();
    assert_eq!(mount.read("pools/dataplane/exclusive"), "1\n");
}

/// The files that were set aside as damaged.
fn set_aside(state: &Path) -> Vec<String> {
    let names = fs::read_dir(state).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.contains(".damaged-")).collect()
}

#[test]
fn node_ids_are_never_reused() {
    let mount = Mount::new();
    let mut seen: BTreeMap<u64, String> = BTreeMap::new();
    let mut look = |round: usize| {
        for (path, stat) in mount.walk() {
            // A pool or list that was created again is another node with the same name.
            let name = if path.starts_with("pools/gone") { format!("{path} of round {round}") } else { path };
            let known = seen.entry(stat.ino()).or_insert_with(|| name.clone());
            assert_eq!(*known, name);
        }
        seen.len()
    };
    mount.make_pool("stays", true, &["0"]);
    let mut nodes = look(0);
    for round in 0..6 {
        mount.make_pool("gone", false, &["1"]);
        let now = look(round);
        assert_eq!(now, nodes + 10, "a pool has seven nodes, a list three");
        nodes = now;
        fs::remove_dir(mount.pool("gone").join("1")).unwrap();
        fs::remove_dir(mount.pool("gone")).unwrap();
        RESTARTS[round % 2](&mount);
    }
    assert_eq!(look(6), nodes);
}

#[test]
fn a_copy_of_the_configuration_can_be_restored() {
    let mount = Mount::with_dataplane();
    mount.sh("chgrp 65534 $C/pools/dataplane/tasks");
    let copy = mount.home().join("copy");
    fs::copy(mount.state().join("config"), &copy).unwrap();
    let (kept, lost) = (pinned("0-1"), pinned("0-1"));
    mount.sh("rmdir $C/pools/dataplane/1 && mkdir $C/pools/other $C/pools/other/1");
    write(&mount.tasks("dataplane", "0"), kept.pid().to_string()).unwrap();
    write(&mount.tasks("other", "1"), lost.pid().to_string()).unwrap();
    mount.stop();
    fs::copy(&copy, mount.state().join("config")).unwrap();
    mount.start();
    assert_eq!(mount.sh("ls $C/pools; stat -c %g $C/pools/dataplane/tasks"), "dataplane\n65534\n");
    assert_eq!(mount.tasks_of("dataplane", "0"), kept.pid().to_string());
    assert_eq!(
        mount.tasks_of("dataplane", "1"),
        "",
        "the claim of a list that is gone is no claim of another"
    );
    mount.replace_worker();
    mount.make_pool("third", true, &[]);
    let expected = (String::new(), vec!["0-1".to_owned()]);
    assert_eq!((mount.tasks_of("dataplane", "1"), masks(lost.pid())), expected, "it has its mask again");
}
