//! If the holder of an exclusive list dies, a process that it started inherits the list; no other process does.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use crate::harness::{
    Cpuset, Mount, NOBODY, Shell, Sleeper, Stray, errno, free, held, let_a_tick_pass, masks, pin, run,
    sleeper_of_nobody, write,
};
use nix::errno::Errno;

/// Runs a line of bash that claims list 0 and sets `$left` to the process that it leaves behind. Returns the PID of
/// the shell, which has ended, and that process.
fn left_by(mount: &Mount, line: &str) -> (u32, Stray) {
    let line = format!("echo $$ > $C/pools/dataplane/0/tasks; {line}; echo $$ $left");
    let (output, err, _) = run(&mut mount.bash(&line));
    let (shell, stray) = output.trim().split_once(' ').unwrap_or_else(|| panic!("{line}: {output}{err}"));
    (shell.parse().unwrap(), Stray(stray.parse().unwrap()))
}

/// A process on list 0.
fn holder(mount: &Mount) -> Sleeper {
    let holder = Sleeper::new();
    write(&mount.tasks("dataplane", "0"), holder.pid().to_string()).expect("a claim");
    holder
}

/// A process that has the mask of list 0, but has not claimed it.
fn pinned(command: &mut Command) -> Sleeper {
    let process = Sleeper::spawn(command);
    pin(process.pid(), &[0]);
    process
}

fn sleep() -> Command {
    let mut command = Command::new("sleep");
    command.arg("1000");
    command
}

#[test]
fn a_child_that_outlives_the_shell_inherits() {
    let mount = Mount::with_dataplane();
    let [list, pool] = [mount.tasks("dataplane", "0"), mount.pool("dataplane").join("tasks")];
    let other = Sleeper::new();
    write(&mount.tasks("dataplane", "1"), other.pid().to_string()).unwrap();
    for line in [
        "sleep 1000 >&- 2>&- & left=$!",
        "nohup sleep 1000 >/dev/null 2>&1 & left=$!",
        "setsid sleep 1000 >&- 2>&- & left=$!",
        // The parent of the heir has ended before.
        "left=$(sleep 1000 >&- 2>&- & echo $!)",
        "sleep 1000 >&- 2>&- & left=$!; echo $$ $left; kill -KILL $$",
    ] {
        let (shell, heir) = left_by(&mount, line);
        for file in [&list, &pool] {
            assert_eq!(errno(write(file, "0")), Errno::EBUSY, "{line}");
        }
        assert_eq!(held(&list), [heir.0], "{line}");
        assert_eq!(masks(heir.0), ["0"], "{line}");
        let events = mount.read("info/events");
        let inherited: serde_json::Value =
            events.lines().rfind(|line| line.contains("\"inherited\"")).unwrap().parse().unwrap();
        assert_eq!(inherited["pid"], heir.0, "{line}");
        assert_eq!(inherited["from"], shell.to_string(), "{line}");
        let pid = heir.0;
        heir.end();
        assert_eq!(held(&list), [0_u32; 0], "{line}");
        assert_eq!(mount.events().pop().unwrap(), ("reclaimed".to_owned(), pid), "{line}");
    }
    let reclaimed = mount.read("info/reclaimed");
    assert_eq!(reclaimed.lines().count(), 5, "an inherited claim is not reclaimed: {reclaimed}");
}

#[test]
fn the_oldest_child_inherits_first() {
    let mount = Mount::with_dataplane();
    let list = mount.tasks("dataplane", "0");
    let shell = holder(&mount);
    let mut heirs = Vec::new();
    for _ in 0..4 {
        heirs.push(pinned(&mut sleep()));
        // If two processes started in the same tick, the one with the lower PID counts as older.
        let_a_tick_pass(heirs.last().unwrap().pid());
    }
    let pids: Vec<u32> = heirs.iter().map(Sleeper::pid).collect();
    shell.end();
    for heir in heirs {
        assert_eq!(held(&list), [heir.pid()]);
        assert_eq!(errno(write(&list, "0")), Errno::EBUSY);
        heir.end();
    }
    assert_eq!(held(&list), [0_u32; 0]);
    let events = mount.events();
    let events: Vec<(&str, u32)> = events
        .iter()
        .filter(|(event, _)| event != "refused")
        .map(|(event, pid)| (event.as_str(), *pid))
        .collect();
    let expected = [
        ("inherited", pids[0]),
        ("inherited", pids[1]),
        ("inherited", pids[2]),
        ("inherited", pids[3]),
        ("reclaimed", pids[3]),
    ];
    assert_eq!(events[1..], expected);
}

#[test]
fn dead_heirs_are_skipped() {
    let mount = Mount::with_dataplane();
    let shell = holder(&mount);
    let heirs: Vec<Sleeper> = (0..3).map(|_| pinned(&mut sleep())).collect();
    let_a_tick_pass(heirs[2].pid());
    let last = pinned(&mut sleep());
    shell.end();
    heirs.into_iter().for_each(Sleeper::end);
    assert_eq!(held(&mount.tasks("dataplane", "0")), [last.pid()]);
}

#[test]
fn an_heir_gets_the_claim_unchanged() {
    let mount = Mount::with_dataplane();
    let [list_0, list_1] = ["0", "1"].map(|list| mount.tasks("dataplane", list));
    let (_, heir) = left_by(&mount, "sleep 1000 >&- 2>&- & left=$!");
    write(&list_0, heir.0.to_string()).expect("it already holds the list");
    write(&list_1, heir.0.to_string()).expect("a move");
    assert_eq!((held(&list_0), held(&list_1), masks(heir.0)), (vec![], vec![heir.0], vec!["1".to_owned()]));
    write(&list_1, format!("-{}", heir.0)).expect("a release");
    assert_eq!(masks(heir.0), [free()], "the mask of the shell before its claim");
    assert_eq!(held(&list_1), [0_u32; 0]);
}

#[test]
fn a_child_inherits_if_the_holder_dies_without_a_daemon() {
    let mount = Mount::with_dataplane();
    let list = mount.tasks("dataplane", "0");
    let mut shell = Shell::start(&mut mount.bash("exec bash"));
    let heir = shell.ask("echo $$ > $C/pools/dataplane/0/tasks; sleep 1000 >&- 2>&- & echo $!");
    let heir = Stray(heir.trim().parse().unwrap());
    mount.kill_daemon();
    drop(shell);
    mount.start();
    assert_eq!(held(&list), [heir.0]);
    assert_eq!(errno(write(&list, "0")), Errno::EBUSY);
    assert_eq!(mount.events().iter().filter(|(event, _)| event == "inherited").count(), 1);
    mount.kill_daemon();
    mount.start();
    assert_eq!(held(&list), [heir.0], "and it stays there");
    heir.end();
    assert_eq!(held(&list), [0_u32; 0]);
}

#[test]
fn a_pinned_process_of_another_user_is_no_heir() {
    let mount = Mount::with_dataplane();
    let holder = holder(&mount);
    let intruder = sleeper_of_nobody();
    pin(intruder.pid(), &[0]);
    holder.end();
    assert_eq!(held(&mount.tasks("dataplane", "0")), [0_u32; 0]);
    assert_eq!(masks(intruder.pid()), ["0"], "its mask has not changed");
}

#[test]
fn root_and_the_same_user_inherit_from_a_user() {
    let mount = Mount::with_dataplane();
    let list = mount.tasks("dataplane", "0");
    let holder = sleeper_of_nobody();
    write(&list, holder.pid().to_string()).unwrap();
    let stranger = pinned(sleep().uid(1).gid(1));
    let_a_tick_pass(stranger.pid());
    let own = pinned(sleep().uid(NOBODY).gid(NOBODY));
    let_a_tick_pass(own.pid());
    let roots = pinned(&mut sleep());
    holder.end();
    assert_eq!(held(&list), [own.pid()]);
    own.end();
    assert_eq!(held(&list), [roots.pid()]);
    roots.end();
    assert_eq!(held(&list), [0_u32; 0]);
    drop(stranger);
}

#[test]
fn a_process_older_than_the_claim_is_no_heir() {
    let mount = Mount::with_dataplane();
    let older = pinned(&mut sleep());
    let_a_tick_pass(older.pid());
    let holder = holder(&mount);
    holder.end();
    assert_eq!(held(&mount.tasks("dataplane", "0")), [0_u32; 0]);
}

#[test]
fn a_process_of_another_cgroup_is_no_heir() {
    let mount = Mount::with_dataplane();
    let cpuset = Cpuset::new("0");
    let holder = holder(&mount);
    let outside = pinned(&mut sleep());
    cpuset.add(outside.pid());
    holder.end();
    assert_eq!(held(&mount.tasks("dataplane", "0")), [0_u32; 0]);
}

#[test]
fn a_process_with_a_wider_mask_is_no_heir() {
    let mount = Mount::with_dataplane();
    let holder = holder(&mount);
    let (free, elsewhere, partly) = (Sleeper::new(), Sleeper::new(), Sleeper::new());
    pin(elsewhere.pid(), &[1]);
    pin(partly.pid(), &[0, 1]);
    holder.end();
    assert_eq!(held(&mount.tasks("dataplane", "0")), [0_u32; 0]);
    drop((free, elsewhere, partly));
}

#[test]
fn a_process_with_a_claim_is_no_heir() {
    let mount = Mount::with_dataplane();
    let holder = holder(&mount);
    let other = Sleeper::new();
    write(&mount.tasks("dataplane", "1"), other.pid().to_string()).unwrap();
    // Its mask is not within its list.
    pin(other.pid(), &[0]);
    holder.end();
    assert_eq!(held(&mount.tasks("dataplane", "0")), [0_u32; 0]);
    assert_eq!(held(&mount.tasks("dataplane", "1")), [other.pid()]);
}

#[test]
fn there_are_no_heirs_in_a_shared_pool() {
    let mount = Mount::with_shared();
    let list = mount.tasks("shared", "0");
    let holder = Sleeper::new();
    write(&list, holder.pid().to_string()).unwrap();
    let child = pinned(&mut sleep());
    holder.end();
    assert_eq!(held(&list), [0_u32; 0]);
    assert_eq!(mount.events().pop().unwrap().0, "reclaimed");
    assert_eq!(masks(child.pid()), ["0"]);
}
