//! Transient pools: their lists go with their last tasks, and they go with their last lists, whoever is killed.

use std::fs;

use nix::sys::signal::Signal;

use crate::harness::dir::Dir as _;
use crate::harness::{Mount, Sleeper, run, signal, until, write};

/// The exclusive pool `brief`, which is transient, with these lists.
fn with_brief(lists: &[&str]) -> Mount {
    let mount = Mount::new();
    mount.make_pool("brief", true, &[]);
    write(&mount.pool("brief").join("transient"), "1").unwrap();
    for list in lists {
        fs::create_dir(mount.pool("brief").join(list)).unwrap();
    }
    mount
}

#[test]
fn a_list_goes_with_its_last_task_and_the_pool_with_its_last_list() {
    let mount = with_brief(&["0", "1"]);
    let tasks = [Sleeper::new(), Sleeper::new()];
    for (list, task) in ["0", "1"].iter().zip(&tasks) {
        write(&mount.tasks("brief", list), task.pid().to_string()).unwrap();
    }
    write(&mount.tasks("brief", "0"), format!("-{}", tasks[0].pid())).unwrap();
    until("a released list is removed", || !mount.pool("brief").join("0").exists());
    assert!(mount.pool("brief").join("1").exists());
    // The name is free for another list, also in another pool.
    mount.make_pool("other", true, &["0"]);
    signal(tasks[1].pid(), Signal::SIGKILL);
    until("the pool is removed", || !mount.pool("brief").exists());
    assert!(mount.pool("other").join("0").exists(), "other pools stay");
    mount.make_pool("brief", true, &["1"]);
    assert_eq!(mount.read("pools/brief/transient"), "0\n", "this one is new");
}

#[test]
fn what_is_never_used_goes_soon() {
    let mount = with_brief(&["0"]);
    assert!(mount.pool("brief").join("0").exists());
    until("an unused list is removed", || !mount.pool("brief").exists());
}

#[test]
fn an_heir_keeps_the_list() {
    let mount = with_brief(&["0"]);
    let left: u32 = mount
        .sh("echo $$ > $C/pools/brief/0/tasks && { sleep 1000 > /dev/null 2>&1 & echo $!; }")
        .trim()
        .parse()
        .unwrap();
    assert_eq!(mount.tasks_of("brief", "0"), left.to_string());
    signal(left, Signal::SIGKILL);
    until("the pool is removed", || !mount.pool("brief").exists());
}

#[test]
fn what_is_unused_goes_whoever_is_killed() {
    let mount = with_brief(&["0", "1"]);
    let (one, other) = (Sleeper::new(), Sleeper::new());
    write(&mount.tasks("brief", "0"), one.pid().to_string()).unwrap();
    write(&mount.tasks("brief", "1"), other.pid().to_string()).unwrap();
    mount.signal_worker(Signal::SIGKILL);
    one.end();
    until("the next worker removes the list", || !mount.pool("brief").join("0").exists());
    mount.kill_daemon();
    other.end();
    mount.start();
    until("the next daemon removes the pool", || !mount.pool("brief").exists());
}

#[test]
fn a_daemon_until_unused_ends_with_the_last_pool() {
    let mount = Mount::not_mounted();
    let start = || {
        let (_, err, status) = run(mount.mount_command().arg("--until-unused"));
        assert_eq!(status, Some(0), "{err}");
    };
    let is_gone = || !mount.conf().exists() && !mount.state().exists() && mount.daemons().is_empty();
    start();
    until("a daemon without pools ends", is_gone);
    start();
    mount.make_pool("a", false, &[]);
    mount.make_pool("brief", true, &[]);
    write(&mount.pool("brief").join("transient"), "1").unwrap();
    fs::create_dir(mount.pool("brief").join("0")).unwrap();
    let task = Sleeper::new();
    write(&mount.tasks("brief", "0"), task.pid().to_string()).unwrap();
    // Both processes know it, and so do the ones that replace them.
    let worker = mount.signal_worker(Signal::SIGKILL);
    until("there is another worker", || mount.worker().is_some_and(|other| other != worker));
    assert_eq!(mount.tasks_of("brief", "0"), task.pid().to_string());
    let supervisor = mount.supervisor();
    signal(supervisor, Signal::SIGKILL);
    until("there is another supervisor", || mount.supervisor() != supervisor);
    task.end();
    until("the transient pool is removed", || !mount.pool("brief").exists());
    assert!(mount.pool("a").exists());
    fs::remove_dir(mount.pool("a")).unwrap();
    until("the daemon ends", is_gone);
}

#[test]
fn other_files_of_a_state_directory_stay() {
    let mount = Mount::not_mounted();
    fs::create_dir(mount.state()).unwrap();
    fs::write(mount.state().join("mine"), "text").unwrap();
    let (_, err, status) = run(mount.mount_command().arg("--until-unused"));
    assert_eq!(status, Some(0), "{err}");
    mount.make_pool("a", false, &[]);
    fs::remove_dir(mount.pool("a")).unwrap();
    until("the daemon ends", || mount.daemons().is_empty());
    let left: Vec<_> = fs::read_dir(mount.state()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["mine"]);
}
