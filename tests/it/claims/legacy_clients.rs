//! Unchanged legacy clients work on a mount: the lists that they write back do no harm.
//!
//! Longer than 400 lines because it is a list of independent tests with one set-up.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::time::Instant;

use super::legacy_client::{Client, STEPS, legacy_client};
use crate::harness::{Mount, Plain, Sleeper, TIMEOUT, errno, if_collected, masks, pin, run, until, write};
use nix::errno::Errno;
use serde_json::{Value, json};

fn isolate(mount: &Mount, pool: &str, list: &str) -> Command {
    let mut command = legacy_client(&mount.conf(), &format!("isolate {pool}"));
    command.env("KCM_LEGACY_LIST", list);
    command
}

fn read(tasks: &Path) -> String {
    fs::read_to_string(tasks).unwrap()
}

/// The text of `tasks` for these PIDs.
fn shown(pids: &[u32]) -> String {
    let mut pids = pids.to_vec();
    pids.sort_unstable();
    let words: Vec<String> = pids.iter().map(u32::to_string).collect();
    if words.is_empty() { String::new() } else { words.join(",") + "\n" }
}

fn assert_done(client: Client) {
    let (messages, status) = client.finish();
    assert_eq!((messages.as_str(), status.code()), ("", Some(0)));
}

#[test]
fn the_legacy_client_has_one_thread() {
    let plain = Plain::new();
    plain.make_pool("p", true, &[("0", "")]);
    let mut client = Client::start(&mut legacy_client(&plain.conf(), "isolate p"));
    client.at("pinned");
    assert_eq!(masks(client.pid()), ["0"]);
    assert_eq!(read(&plain.tasks("p", "0")), client.pid().to_string());
    assert_done(client);
    assert_eq!(read(&plain.tasks("p", "0")), "");
}

#[test]
fn isolate_holds_its_list_until_it_ends() {
    let mount = Mount::with_dataplane();
    mount.make_pool("empty", true, &[]);
    let tasks = mount.tasks("dataplane", "0");
    let seen = mount.home().join("seen");
    let command = format!("grep Cpus_allowed_list /proc/self/status > {}", seen.display());
    let mut client =
        Client::start(legacy_client(&mount.conf(), "isolate dataplane").env("KCM_LEGACY_COMMAND", command));
    client.at("opened");
    assert_eq!(read(&tasks), "");
    client.go();
    client.at("written");
    assert_eq!(read(&tasks), shown(&[client.pid()]));
    assert_eq!(masks(client.pid()), ["0"], "it is on its CPU before it has set its own mask");
    client.go();
    client.at("ended");
    assert_eq!(read(&seen), "Cpus_allowed_list:\t0\n");
    assert_eq!(read(&tasks), shown(&[client.pid()]));
    assert_done(client);
    assert_eq!(read(&tasks), "");
    let (_, err, code) = run(&mut legacy_client(&mount.conf(), "isolate empty"));
    assert_eq!((err.as_str(), code), ("ERROR:root:No free cpu lists in pool empty\n", Some(1)));
    let (_, err, code) = run(&mut legacy_client(&mount.conf(), "isolate none"));
    assert_eq!((err.as_str(), code), ("ERROR:root:Requested pool none does not exist\n", Some(1)));
}

#[test]
fn the_third_client_finds_no_free_list() {
    let mount = Mount::with_dataplane();
    let mut clients: Vec<Client> =
        (0..2).map(|_| Client::start(&mut legacy_client(&mount.conf(), "isolate dataplane"))).collect();
    // One after the other, because each holds the lock while it works.
    clients.iter_mut().for_each(|client| client.at("pinned"));
    assert_eq!(read(&mount.pool("dataplane").join("tasks")), shown(&[clients[0].pid(), clients[1].pid()]));
    let (_, err, code) = run(&mut legacy_client(&mount.conf(), "isolate dataplane"));
    assert_eq!((err.as_str(), code), ("ERROR:root:No free cpu lists in pool dataplane\n", Some(1)));
    clients.into_iter().for_each(assert_done);
    assert_eq!(read(&mount.pool("dataplane").join("tasks")), "");
}

#[test]
fn shared_clients_do_not_overwrite_each_other() {
    let mount = Mount::with_shared();
    let tasks = mount.tasks("shared", "0");
    let start = || Client::start(&mut isolate(&mount, "shared", "0"));
    let mut first = start();
    first.at("pinned");
    let mut second = start();
    second.at("opened");
    assert_eq!(read(&tasks), shown(&[first.pid()]), "O_TRUNC removes nobody");
    second.go();
    second.at("pinned");
    let both = shown(&[first.pid(), second.pid()]);
    assert_eq!(read(&tasks), both);
    // The second one leaves, another one comes, then the first one leaves.
    second.go();
    second.at("opened again");
    assert_eq!(read(&tasks), both);
    assert_done(second);
    assert_eq!(read(&tasks), shown(&[first.pid()]));
    let mut third = start();
    third.at("pinned");
    let fourth = Sleeper::new();
    write(&tasks, fourth.pid().to_string()).unwrap();
    first.go();
    first.at("written again");
    assert_eq!(read(&tasks), shown(&[third.pid(), fourth.pid()]));
    assert_done(first);
    assert_eq!(masks(third.pid()), ["0"]);
    assert_done(third);
    assert_eq!(read(&tasks), shown(&[fourth.pid()]));
}

#[test]
fn a_client_that_leaves_keeps_later_ones() {
    let mount = Mount::with_shared();
    let tasks = mount.tasks("shared", "0");
    let mut client = Client::start(&mut isolate(&mount, "shared", "0"));
    let stays = Sleeper::new();
    write(&tasks, stays.pid().to_string()).unwrap();
    client.at("reread again");
    let newcomer = Sleeper::new();
    write(&tasks, newcomer.pid().to_string()).unwrap();
    assert_done(client);
    assert_eq!(read(&tasks), shown(&[stays.pid(), newcomer.pid()]));
    assert_eq!(masks(newcomer.pid()), ["0"]);
}

#[test]
fn a_list_claimed_without_the_lock_is_not_shared() {
    let mount = Mount::with_dataplane();
    let tasks = mount.tasks("dataplane", "0");
    let ran = mount.home().join("ran");
    for step in ["read", "reread", "opened"] {
        let command = format!("touch {}", ran.display());
        let mut client = Client::start(isolate(&mount, "dataplane", "0").env("KCM_LEGACY_COMMAND", command));
        client.at(step);
        let claimer = Sleeper::new();
        write(&tasks, claimer.pid().to_string()).unwrap();
        let (messages, status) = client.finish();
        assert_eq!(status.code(), Some(1), "{step}");
        assert!(messages.contains("Device or resource busy"), "{step}: {messages}");
        assert!(!ran.exists(), "{step}: its command was started");
        assert_eq!(read(&tasks), shown(&[claimer.pid()]), "{step}");
        claimer.collect();
        assert_eq!(read(&tasks), "");
    }
    // In the opposite order.
    let mut client = Client::start(&mut isolate(&mount, "dataplane", "0"));
    client.at("written");
    let claimer = Sleeper::new();
    assert_eq!(errno(write(&tasks, claimer.pid().to_string())), Errno::EBUSY);
    assert_done(client);
}

#[test]
fn legacy_and_new_clients_never_share_a_list() {
    let mount = Mount::with_dataplane();
    let place = mount.home().join("taken");
    fs::create_dir(&place).unwrap();
    let place = place.display();
    let alone = format!(
        "mkdir {place}/$KCM_CPUS_ASSIGNED || touch {place}/met; sleep 0.02; rmdir {place}/$KCM_CPUS_ASSIGNED; \
         echo $KCM_CPUS_ASSIGNED >> {place}.times"
    );
    std::thread::scope(|scope| {
        for number in 0..12 {
            let (mount, alone) = (&mount, &alone);
            scope.spawn(move || {
                let mut command = match number % 2 {
                    0 => legacy_client(&mount.conf(), "isolate dataplane"),
                    _ => mount.kcm(&["isolate", "--pool=dataplane", alone]),
                };
                command.env("KCM_LEGACY_COMMAND", alone);
                for _ in 0..4 {
                    let (_, err, code) = run(&mut command);
                    let lost = err.contains("No free cpu lists") || err.contains("Device or resource busy");
                    assert!(code == Some(0) || (code == Some(1) && lost), "{code:?} {err}");
                }
            });
        }
    });
    assert!(!mount.home().join("taken/met").exists(), "two tasks were on one list");
    let times = read(&mount.home().join("taken.times"));
    assert!(times.contains("0\n") && times.contains("1\n"), "{times}");
    assert_eq!(mount.read("pools/dataplane/tasks"), "");
}

#[test]
fn a_dead_pid_in_its_list_is_skipped() {
    let mount = Mount::with_shared();
    let tasks = mount.tasks("shared", "0");
    let other = Sleeper::new();
    write(&tasks, other.pid().to_string()).unwrap();
    let mut client = Client::start(&mut isolate(&mount, "shared", "0"));
    client.at("reread");
    other.collect();
    client.go();
    client.at("pinned");
    assert_eq!(read(&tasks), shown(&[client.pid()]));
    assert_done(client);
}

/// Serialises the tests that choose a PID.
static NUMBERS: Mutex<()> = Mutex::new(());

/// A process with the PID of one that has died and was reaped.
fn reborn(pid: u32) -> Sleeper {
    let _one = NUMBERS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let deadline = Instant::now() + TIMEOUT;
    loop {
        fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).unwrap();
        let process = Sleeper::new();
        if process.pid() == pid {
            return process;
        }
        assert!(Instant::now() < deadline, "{pid} is in use");
    }
}

#[test]
fn a_reused_pid_in_its_list_is_not_pinned() {
    let mount = Mount::with_shared();
    let tasks = mount.tasks("shared", "0");
    for step in ["reread", "opened", "reread again", "opened again"] {
        let other = Sleeper::new();
        let pid = other.pid();
        write(&tasks, pid.to_string()).unwrap();
        let mut client = Client::start(&mut isolate(&mount, "shared", "0"));
        client.at(step);
        other.collect();
        let stranger = reborn(pid);
        let before = masks(stranger.pid());
        assert_ne!(before, ["0"]);
        assert_done(client);
        assert_eq!(masks(stranger.pid()), before, "{step}: a stranger was pinned");
        assert_eq!(read(&tasks), "", "{step}");
    }
}

#[test]
fn a_moved_pid_in_its_list_stays_moved() {
    let mount = Mount::with_shared();
    let (here, there) = (mount.tasks("shared", "0"), mount.tasks("shared", "1"));
    let other = Sleeper::new();
    for step in ["reread", "opened", "reread again", "opened again"] {
        write(&here, other.pid().to_string()).unwrap();
        let mut client = Client::start(&mut isolate(&mount, "shared", "0"));
        client.at(step);
        write(&there, other.pid().to_string()).unwrap();
        assert_done(client);
        assert_eq!((read(&here), read(&there)), (String::new(), shown(&[other.pid()])), "{step}");
        assert_eq!(masks(other.pid()), ["1"], "{step}");
    }
}

#[test]
fn a_released_pid_in_its_list_stays_free() {
    let mount = Mount::with_shared();
    let tasks = mount.tasks("shared", "0");
    let other = Sleeper::new();
    let before = masks(other.pid());
    write(&tasks, other.pid().to_string()).unwrap();
    let mut client = Client::start(&mut isolate(&mount, "shared", "0"));
    client.at("reread");
    write(&tasks, format!("-{}", other.pid())).unwrap();
    assert_done(client);
    assert_eq!(read(&tasks), "");
    assert_eq!(masks(other.pid()), before);
}

#[test]
fn a_moved_client_leaves_its_new_list_by_ending() {
    let mount = Mount::with_shared();
    let (here, there) = (mount.tasks("shared", "0"), mount.tasks("shared", "1"));
    let mut client = Client::start(&mut isolate(&mount, "shared", "0"));
    client.at("pinned");
    write(&there, client.pid().to_string()).unwrap();
    client.go();
    client.at("closed again");
    assert_eq!((read(&here), read(&there)), (String::new(), shown(&[client.pid()])));
    assert_done(client);
    assert_eq!(read(&there), "");
}

#[test]
fn a_kill_after_any_step_leaves_nothing() {
    let mount = Mount::with_dataplane();
    let tasks = mount.tasks("dataplane", "0");
    for step in STEPS {
        let mut client = Client::start(&mut isolate(&mount, "dataplane", "0"));
        client.at(step);
        client.kill();
        assert_eq!(read(&tasks), "", "{step}");
        let (_, err, code) = run(&mut mount.bash("flock -n $C/lock true"));
        assert_eq!((err.as_str(), code), ("", Some(0)), "the lock after {step}");
        let next = Sleeper::new();
        write(&tasks, next.pid().to_string()).unwrap_or_else(|error| panic!("{step}: {error}"));
        assert_eq!(masks(next.pid()), ["0"], "{step}");
        next.collect();
        assert_eq!(mount.read("pools/dataplane/tasks"), "", "{step}");
    }
}

#[test]
fn if_killed_its_command_keeps_the_list() {
    let mount = Mount::with_dataplane();
    let tasks = mount.tasks("dataplane", "0");
    let number = mount.home().join("number");
    let command = format!("echo $$ > {}.new; mv {0}.new {0}; exec sleep 1000", number.display());
    let mut client = Client::start(isolate(&mount, "dataplane", "0").env("KCM_LEGACY_COMMAND", command));
    client.at("pinned");
    client.go();
    until("the command runs", || number.exists());
    let heir: u32 = read(&number).trim().parse().unwrap();
    client.kill();
    assert_eq!(read(&tasks), shown(&[heir]));
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(heir as i32), nix::sys::signal::Signal::SIGKILL)
        .unwrap();
    until("the list is free", || read(&tasks).is_empty());
}

#[test]
fn host_pids_work_from_inside_a_pid_namespace() {
    let mount = Mount::with_shared();
    mount.make_pool("apart", true, &[]);
    let tasks = mount.tasks("shared", "0");
    let other = Sleeper::new();
    write(&tasks, other.pid().to_string()).unwrap();
    // It sees the host's /proc, as legacy containers do with KCM_PROC_FS.
    let apart = |part: &str| {
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--kill-child"]).arg(std::env::current_exe().unwrap());
        command.env("KCM_LEGACY", part).env("KCM_LEGACY_CONF", mount.conf());
        command.env("KCM_LEGACY_LIST", "0").env("KCM_PROC_FS", "/proc");
        command
    };
    let mut client = Client::start(&mut apart("isolate shared"));
    client.at("written");
    let found: Vec<u32> = read(&tasks).trim().split(',').map(|pid| pid.parse().unwrap()).collect();
    let inside: Vec<u32> = found.into_iter().filter(|&pid| pid != other.pid()).collect();
    assert_eq!(inside.len(), 1, "only the client has come");
    let status = read(Path::new(&format!("/proc/{}/status", inside[0])));
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap();
    assert_eq!(numbers.split_whitespace().last(), Some("1"), "it is the first process of its namespace");
    assert_eq!(masks(inside[0]), ["0"]);
    client.go();
    client.at("written again");
    assert_eq!(read(&tasks), shown(&[other.pid()]), "it leaves by that PID, too");
    assert_done(client);

    let stray = Sleeper::new();
    write(&mount.tasks("shared", "1"), stray.pid().to_string()).unwrap();
    let (out, err, code) = run(&mut apart("describe"));
    assert_eq!((err.as_str(), code), ("", Some(0)));
    assert_eq!(out, run(&mut mount.kcm(&["describe"])).0);
}

#[test]
fn reconcile_finds_no_dead_task() {
    let mount = Mount::with_shared();
    let tasks = mount.tasks("shared", "0");
    let (dies, stays, stray) = (Sleeper::new(), Sleeper::new(), Sleeper::new());
    for (tasks, task) in [(&tasks, &dies), (&tasks, &stays), (&mount.tasks("shared", "1"), &stray)] {
        write(tasks, task.pid().to_string()).unwrap();
    }
    pin(stray.pid(), &[0, 1]);
    let mut client = Client::start(&mut legacy_client(&mount.conf(), "reconcile"));
    client.at("read");
    let (dead, newcomer) = (dies.pid(), Sleeper::new());
    dies.collect();
    write(&tasks, newcomer.pid().to_string()).unwrap();
    client.go();
    client.at("written");
    assert_eq!(read(&tasks), shown(&[stays.pid(), newcomer.pid()]), "without the dead task that it had read");
    assert_done(client);
    assert_eq!(read(&tasks), shown(&[stays.pid(), newcomer.pid()]));

    let (out, err, code) = run(&mut legacy_client(&mount.conf(), "reconcile"));
    assert_eq!((err.as_str(), code), ("", Some(0)));
    let report: Value = serde_json::from_str(&out).unwrap();
    let mismatch = json!([{ "actualCpus": [0, 1], "cpus": "1", "pid": stray.pid(), "pool": "shared" }]);
    assert_eq!(report, json!({ "mismatchedCpuMasks": mismatch, "reclaimedCpuLists": [] }));
    // `kcm reconcile` agrees, and also reports the death, if the kernel tells how a collected task has ended.
    let (out, _, _) = run(&mut mount.kcm(&["reconcile"]));
    let report: Value = serde_json::from_str(&out).unwrap();
    let reclaimed = match if_collected("reclaimed") {
        "reclaimed" => json!([{ "cpus": "0", "pid": dead, "pool": "shared" }]),
        _ => json!([]),
    };
    assert_eq!(report, json!({ "mismatchedCpuMasks": mismatch, "reclaimedCpuLists": reclaimed }));
}

#[test]
fn describe_prints_the_same_bytes() {
    let mount = Mount::new();
    let same = |state: &str| {
        let theirs = run(&mut legacy_client(&mount.conf(), "describe"));
        assert_eq!(theirs, run(&mut mount.kcm(&["describe"])), "{state}");
        assert_eq!((theirs.1.as_str(), theirs.2), ("", Some(0)), "{state}");
    };
    same("without pools");
    mount.make_pool("dataplane", true, &["0"]);
    mount.make_pool("infra", false, &["1"]);
    mount.make_pool("nothing", false, &[]);
    same("without tasks");
    let tasks: Vec<Sleeper> = (0..5).map(|_| Sleeper::new()).collect();
    write(&mount.tasks("dataplane", "0"), tasks[0].pid().to_string()).unwrap();
    for task in &tasks[1..] {
        write(&mount.tasks("infra", "1"), task.pid().to_string()).unwrap();
    }
    same("with tasks");
}

#[test]
fn init_refuses_the_mount_and_changes_nothing() {
    let mount = Mount::new();
    let names = || mount.walk().into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    let before = names();
    let (out, err, code) = run(&mut legacy_client(&mount.conf(), "init"));
    assert_eq!((out.as_str(), code), ("", Some(1)));
    assert!(err.starts_with("INFO:root:Configuration directory already exists.\n"), "{err}");
    assert_eq!(names(), before);
}

#[test]
fn legacy_clients_do_not_notice_a_worker_death() {
    let mount = Mount::with_shared();
    let tasks = mount.tasks("shared", "0");
    for step in ["reread", "opened", "written", "pinned", "reread again", "opened again"] {
        let mut client = Client::start(&mut isolate(&mount, "shared", "0"));
        client.at(step);
        mount.signal_worker(nix::sys::signal::Signal::SIGKILL);
        assert_done(client);
        assert_eq!(read(&tasks), "", "{step}");
    }
}
