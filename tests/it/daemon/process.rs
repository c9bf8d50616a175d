//! The daemon as a process: it keeps no directory or file of its starter busy, its command line says what it serves,
//! and it stays off the CPUs that it gives to tasks.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::harness::{Machine, Mount, masks, run, stat, until, write};

#[test]
fn it_keeps_nothing_of_its_starter() {
    let mount = Mount::not_mounted();
    let home = mount.home().display();
    // Open files, a pipe and a working directory.
    let line = "exec 5<>file 7<file 200>>other 8> >(cat > /dev/null)
        umask 077
        \"$KCM\" mount --conf-dir=\"$C\" --state-dir=\"$S\"";
    let (_, err, status) = run(mount.bash(line).current_dir(mount.home()));
    assert_eq!(status, Some(0), "{err}");
    let daemons = mount.daemons();
    assert_eq!(daemons.len(), 2, "a supervisor and a worker");
    for pid in daemons {
        let link = |name: &str| fs::read_link(format!("/proc/{pid}/{name}")).unwrap();
        assert_eq!(link("cwd"), Path::new("/"));
        for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
            let entry = entry.unwrap();
            let Ok(open) = fs::read_link(entry.path()) else { continue };
            let open = open.display().to_string();
            let is_ours = !open.starts_with(&home.to_string()) || open.starts_with(&format!("{home}/state"));
            assert!(is_ours, "{open}");
            assert!(!open.starts_with("pipe:"), "{open}");
        }
        for standard in ["fd/0", "fd/1"] {
            assert_eq!(link(standard), Path::new("/dev/null"));
        }
        assert_eq!(link("fd/2"), mount.state().join("log"));
        // It has no terminal and is the leader of a session.
        assert_eq!(stat(pid, 7), "0");
        assert_eq!(stat(pid, 6), mount.supervisor().to_string());
    }
}

#[test]
fn its_command_line_names_its_directories() {
    let mount = Mount::new();
    for pid in mount.daemons() {
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
        let words: Vec<&str> = line.split('\0').collect();
        assert!(words.contains(&&*format!("--conf-dir={}", mount.conf().display())), "{words:?}");
        assert!(words.contains(&&*format!("--state-dir={}", mount.state().display())), "{words:?}");
    }
}

/// The masks of all its threads.
fn its_masks(mount: &Mount) -> Vec<String> {
    let mut all: Vec<String> = mount.daemons().into_iter().flat_map(masks).collect();
    all.sort();
    all.dedup();
    all
}

#[test]
fn it_stays_off_exclusive_lists() {
    let mount = Mount::new();
    assert_eq!(its_masks(&mount), ["0-1"]);
    mount.make_pool("excl", true, &["0"]);
    assert_eq!(its_masks(&mount), ["1"]);
    // This includes a worker and a daemon that start later.
    mount.replace_worker();
    until("the next worker has come", || its_masks(&mount) == ["1"]);
    mount.kill_daemon();
    mount.start();
    assert_eq!(its_masks(&mount), ["1"]);
    // There is no other CPU.
    fs::create_dir(mount.pool("excl").join("1")).unwrap();
    assert_eq!(its_masks(&mount), ["0-1"]);
    fs::remove_dir(mount.pool("excl").join("0")).unwrap();
    assert_eq!(its_masks(&mount), ["0"]);
    write(&mount.pool("excl").join("exclusive"), "0").unwrap();
    assert_eq!(its_masks(&mount), ["0-1"]);
}

#[test]
fn it_stays_on_the_cpus_on_which_it_was_started() {
    let mount = Mount::not_mounted();
    let start_on = |cpus: &str| {
        let kcm = mount.mount_command();
        let mut command = Command::new("taskset");
        command.args(["-c", cpus]).arg(kcm.get_program()).args(kcm.get_args());
        let (_, err, status) = run(&mut command);
        assert_eq!(status, Some(0), "{err}");
    };
    start_on("1");
    mount.make_pool("excl", true, &["0"]);
    assert_eq!(its_masks(&mount), ["1"]);
    fs::remove_dir(mount.pool("excl").join("0")).unwrap();
    assert_eq!(its_masks(&mount), ["1"]);
    mount.replace_worker();
    until("the next worker has come", || its_masks(&mount) == ["1"]);
    // Its CPU is taken.
    fs::create_dir(mount.pool("excl").join("1")).unwrap();
    assert_eq!(its_masks(&mount), ["0"]);
    fs::remove_dir(mount.pool("excl").join("1")).unwrap();
    assert_eq!(its_masks(&mount), ["1"]);
    // Another one is started elsewhere.
    mount.kill_daemon();
    start_on("0");
    assert_eq!(its_masks(&mount), ["0"]);
}

#[test]
fn it_stays_off_isolated_cpus() {
    let mount = Mount::not_mounted();
    let mut machine = Machine::new(1, 2, 1);
    machine.cmdline = "isolcpus=1";
    mount.start_on(&machine);
    assert_eq!(its_masks(&mount), ["0"]);
}

#[test]
fn its_oom_score_is_lowered_or_the_log_says_why() {
    let mount = Mount::not_mounted();
    let (_, err, status) = run(&mut mount.mount_command());
    assert_eq!(status, Some(0), "{err}");
    for pid in mount.daemons() {
        let score: i32 =
            fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim().parse().unwrap();
        let says_so = err.contains("/proc/self/oom_score_adj: ") && err.contains("may be killed for memory");
        assert!(score <= -900 || says_so, "{score}: {err}");
    }
}
