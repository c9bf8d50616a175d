//! If the holder of an exclusive list dies, a process that it started inherits the list; no other process does. A process
//! that is pinned there without being an heir is reported.
//!
//! Longer than 400 lines because it is a list of independent tests with one set-up.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;

use crate::harness::program::{self, Program};
use crate::harness::{
    Cgroup, Mount, NOBODY, Shell, Sleeper, Stray, errno, free, has_died, held, if_collected, let_a_tick_pass,
    masks, pin, run, signal, sleeper_of_nobody, stat, threads, until, write,
};
use nix::errno::Errno;
use nix::sys::signal::Signal;

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
    let mut expected = 0;
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
        assert_eq!(inherited["from_pid"], shell, "{line}");
        let pid = heir.0;
        heir.end();
        assert_eq!(held(&list), [0_u32; 0], "{line}");
        // The first process of the machine collects it, before the daemon looks or after that.
        let (event, of) = mount.events().pop().unwrap();
        assert!(["reclaimed", if_collected("reclaimed")].contains(&event.as_str()), "{line}: {event}");
        assert_eq!(of, pid, "{line}");
        expected += usize::from(event == "reclaimed");
    }
    let reclaimed = mount.read("info/reclaimed");
    assert_eq!(reclaimed.lines().count(), expected, "an inherited claim is not reclaimed: {reclaimed}");
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

/// The intruders that were reported.
fn intruders(mount: &Mount) -> Vec<u32> {
    mount.events().into_iter().filter(|(event, _)| event == "intruder").map(|(_, pid)| pid).collect()
}

#[test]
fn a_pinned_process_of_another_user_is_no_heir() {
    let mount = Mount::with_dataplane();
    let holder = holder(&mount);
    let beside = Cgroup::new();
    let intruder = sleeper_of_nobody();
    beside.add(intruder.pid());
    pin(intruder.pid(), &[0]);
    holder.end();
    assert_eq!(held(&mount.tasks("dataplane", "0")), [0_u32; 0]);
    assert_eq!(masks(intruder.pid()), ["0"], "its mask has not changed");
    assert_eq!(intruders(&mount), [intruder.pid()]);
}

#[test]
fn root_and_the_same_user_inherit_from_a_user() {
    let mount = Mount::with_dataplane();
    let list = mount.tasks("dataplane", "0");
    let holder = sleeper_of_nobody();
    write(&list, holder.pid().to_string()).unwrap();
    let cgroups = [(); 3].map(|()| Cgroup::new());
    let pinned_in = |cgroup: &Cgroup, command: &mut Command| {
        let process = pinned(command);
        cgroup.add(process.pid());
        let_a_tick_pass(process.pid());
        process
    };
    let stranger = pinned_in(&cgroups[0], sleep().uid(1).gid(1));
    let own = pinned_in(&cgroups[1], sleep().uid(NOBODY).gid(NOBODY));
    let roots = pinned_in(&cgroups[2], &mut sleep());
    holder.end();
    assert_eq!(held(&list), [own.pid()]);
    own.end();
    assert_eq!(held(&list), [roots.pid()]);
    roots.end();
    assert_eq!(held(&list), [0_u32; 0]);
    assert_eq!(intruders(&mount), [stranger.pid()]);
}

#[test]
fn a_child_that_dropped_its_privileges_inherits() {
    let mount = Mount::with_dataplane();
    let list = mount.tasks("dataplane", "0");
    for line in [
        "setpriv --reuid=65534 --regid=65534 --clear-groups sleep 1000 >&- 2>&- & left=$!",
        // The launcher becomes another user itself, starts the program and ends.
        "left=$(setpriv --reuid=65534 --clear-groups bash -c 'sleep 1000 >&- 2>&- & echo $!')",
        "left=$(su -s /bin/sh nobody -c 'nohup sleep 1000 >/dev/null 2>&1 & echo $!')",
        "start-stop-daemon --start --background --make-pidfile --pidfile $S.pid --chuid nobody --startas /bin/sleep \
         -- 1000; left=$(cat $S.pid)",
    ] {
        let (_, heir) = left_by(&mount, line);
        until("it is of nobody", || uid(heir.0) == NOBODY);
        assert_eq!(held(&list), [heir.0], "{line}");
        assert_eq!(errno(write(&list, "0")), Errno::EBUSY, "{line}");
        heir.end();
        assert_eq!(held(&list), [0_u32; 0], "{line}");
    }
}

/// The effective uid of a process.
fn uid(pid: u32) -> u32 {
    use std::os::unix::fs::MetadataExt as _;
    fs::metadata(format!("/proc/{pid}")).map_or(0, |found| found.uid())
}

#[test]
fn a_child_in_a_cgroup_below_inherits_whoever_its_user_is() {
    let mount = Mount::with_dataplane();
    let list = mount.tasks("dataplane", "0");
    let (own, beside) = (Cgroup::new(), Cgroup::new());
    let below = own.path.join("below");
    fs::create_dir(&below).unwrap();
    let move_to =
        |cgroup: &PathBuf, pid: u32| fs::write(cgroup.join("cgroup.procs"), pid.to_string()).unwrap();
    for (cgroup, user, inherits) in [
        (&own.path, NOBODY, true),
        (&below, NOBODY, true),
        (&beside.path, NOBODY, false),
        (&below, 0, true),
        (&beside.path, 0, true),
    ] {
        let holder = Sleeper::new();
        move_to(&own.path, holder.pid());
        write(&list, holder.pid().to_string()).unwrap();
        let child = pinned(sleep().uid(user).gid(user));
        move_to(cgroup, child.pid());
        holder.end();
        let expected = if inherits { vec![child.pid()] } else { Vec::new() };
        assert_eq!(held(&list), expected, "user {user} in {}", cgroup.display());
        child.end();
        assert_eq!(held(&list), [0_u32; 0]);
    }
}

#[test]
fn threads_on_the_list_are_enough() {
    let mount = Mount::with_dataplane();
    let list = mount.tasks("dataplane", "0");
    let holder = holder(&mount);
    let child = Program::start(&mut program::command(&[], "threads"));
    let worker = *threads(child.pid()).last().unwrap();
    threads(child.pid()).into_iter().for_each(|tid| pin(tid, &[1]));
    pin(worker, &[0]);
    holder.end();
    assert_eq!(held(&list), [child.pid()]);
    assert_eq!(errno(write(&list, "0")), Errno::EBUSY);
    child.end();
    assert_eq!(held(&list), [0_u32; 0]);
}

#[test]
fn a_child_without_its_first_thread_inherits() {
    let mount = Mount::with_dataplane();
    let list = mount.tasks("dataplane", "0");
    let holder = holder(&mount);
    let headless = Program::start(&mut program::command(&[], "headless"));
    let pid = headless.pid();
    threads(pid).into_iter().for_each(|tid| pin(tid, &[0]));
    signal(pid, Signal::SIGUSR1);
    until("its first thread has exited", || stat(pid, 3) == "Z");
    holder.end();
    assert_eq!(held(&list), [pid]);
    headless.end();
    assert_eq!(held(&list), [0_u32; 0]);
}

/// A mount whose daemon is in a cgroup namespace, of which the cgroup of this test is the root.
fn mount_below_a_root_cgroup() -> Mount {
    let mount = Mount::not_mounted();
    let command = mount.mount_command();
    let mut inside = Command::new("unshare");
    inside.arg("--cgroup").arg(command.get_program()).args(command.get_args());
    inside.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let output = inside.output().expect("unshare");
    assert!(output.status.success(), "{output:?}");
    mount.make_pool("dataplane", true, &["0", "1"]);
    mount
}

#[test]
fn in_the_root_cgroup_another_user_inherits_from_root_only() {
    let mount = mount_below_a_root_cgroup();
    let list = mount.tasks("dataplane", "0");
    for (user, inherits) in [(NOBODY, false), (0, true)] {
        let holder = Sleeper::spawn(sleep().uid(user).gid(user));
        write(&list, holder.pid().to_string()).unwrap();
        let other = pinned(sleep().uid(1).gid(1));
        holder.end();
        let expected = if inherits { vec![other.pid()] } else { Vec::new() };
        assert_eq!(held(&list), expected, "the holder was of {user}");
        other.end();
        assert_eq!(held(&list), [0_u32; 0]);
    }
    assert_eq!(intruders(&mount).len(), 1, "the process that did not inherit");
}

#[test]
fn a_holder_that_changed_its_user_is_known_by_both() {
    let mount = mount_below_a_root_cgroup();
    let list = mount.tasks("dataplane", "0");
    // A user with the capability to change.
    let become_1 = "exec setpriv --reuid=1 sleep 1000";
    for (script, expected) in [("exec sleep 1000", false), (become_1, true)] {
        let line = format!("read -r; {script}");
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--inh-caps=+setuid", "--ambient-caps=+setuid", "bash", "-c", &line]);
        let mut holder = Sleeper::spawn(command.stdin(std::process::Stdio::piped()));
        let pid = holder.pid();
        until("it is of nobody", || uid(pid) == NOBODY);
        write(&list, pid.to_string()).unwrap();
        drop(holder.child().stdin.take());
        until("it sleeps", || {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "sleep\n")
        });
        let other = pinned(sleep().uid(2).gid(2));
        // Its parent has not collected it: then the kernel still knows its user.
        signal(pid, Signal::SIGKILL);
        until("it has died", || has_died(pid));
        assert_eq!(held(&list), if expected { vec![other.pid()] } else { Vec::new() }, "{script}");
        other.end();
        assert_eq!(held(&list), [0_u32; 0]);
    }
}

#[test]
fn an_intruder_is_reported_and_another_free_list_is_taken_first() {
    let mount = Mount::with_dataplane();
    let [list_0, list_1] = ["0", "1"].map(|list| mount.tasks("dataplane", list));
    let pool = mount.pool("dataplane").join("tasks");
    let intruder = pinned(sleep().uid(NOBODY).gid(NOBODY));
    let_a_tick_pass(intruder.pid());
    let first = holder(&mount);
    first.end();
    assert_eq!(held(&list_0), [0_u32; 0]);
    let events = mount.read("info/events");
    let event: serde_json::Value =
        events.lines().rfind(|line| line.contains("\"intruder\"")).unwrap().parse().unwrap();
    assert_eq!((&event["pid"], &event["uid"]), (&intruder.pid().into(), &NOBODY.into()));
    assert_eq!((&event["pool"], &event["cpus"]), (&"dataplane".into(), &"0".into()));
    assert!(mount.read("info/metrics").contains("kcm_intruders_total 1\n"));
    // The other list, and then this one.
    let [next, last] = [Sleeper::new(), Sleeper::new()];
    write(&pool, next.pid().to_string()).unwrap();
    assert_eq!(held(&list_1), [next.pid()]);
    write(&pool, last.pid().to_string()).expect("the last free list");
    assert_eq!(held(&list_0), [last.pid()]);
    let reason = mount.read("info/events").lines().last().unwrap().to_owned();
    assert!(reason.contains("another process is pinned within the list"), "{reason}");
    // It has left, although nobody has collected it.
    write(&pool, format!("-{} -{}", next.pid(), last.pid())).unwrap();
    signal(intruder.pid(), Signal::SIGKILL);
    until("it has died", || has_died(intruder.pid()));
    write(&pool, next.pid().to_string()).unwrap();
    assert_eq!(held(&list_0), [next.pid()]);
    assert_eq!(intruders(&mount).len(), 1, "once, although the list came free twice");
}

#[test]
fn a_child_that_stays_on_a_released_list_is_reported() {
    let mount = Mount::with_dataplane();
    let list = mount.tasks("dataplane", "0");
    let holder = holder(&mount);
    let child = pinned(&mut sleep());
    write(&list, format!("-{}", holder.pid())).unwrap();
    until("it is reported", || intruders(&mount) == [child.pid()]);
    write(&mount.pool("dataplane").join("tasks"), holder.pid().to_string()).unwrap();
    assert_eq!(held(&mount.tasks("dataplane", "1")), [holder.pid()]);
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
