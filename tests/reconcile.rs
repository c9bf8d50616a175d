//! `kcm reconcile`: claims taken back are told once, threads outside their list are found and brought back.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test fails by panicking"
)]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use common::{Mount, Plain, Sleeper, again, data, fails, masks, pin, run, says, text, threads, until, write};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// A process that was killed while it was on the list.
fn killed_on(tasks: &Path) -> u32 {
    let task = Sleeper::new();
    let pid = task.pid();
    write(tasks, pid.to_string()).expect("a claim");
    task.end();
    pid
}

/// A number that no process has.
fn dead_pid() -> u32 {
    let task = Sleeper::new();
    let pid = task.pid();
    task.end();
    pid
}

fn report(command: &mut Command) -> Value {
    let (out, err, code) = run(command);
    assert_eq!((err.as_str(), code), ("", Some(0)), "{command:?}: {out}");
    serde_json::from_str(&out).unwrap()
}

/// The PIDs of one part of a report.
fn pids(report: &Value, part: &str) -> Vec<u64> {
    report[part].as_array().unwrap().iter().map(|entry| entry["pid"].as_u64().unwrap()).collect()
}

/// A program of four threads.
#[test]
fn helper_of_four_threads() {
    if std::env::var_os("KCM_TEST_THREADS").is_some() {
        // Beside the first one and the one of this test.
        for _ in 0..2 {
            std::thread::spawn(|| std::thread::sleep(common::PATIENCE * 10));
        }
        std::thread::sleep(common::PATIENCE * 10);
    }
}

fn four_threads() -> Sleeper {
    let program =
        Sleeper::spawn(again("helper_of_four_threads", "KCM_TEST_THREADS", "1").stdout(Stdio::null()));
    until("it has four threads", || threads(program.pid()).len() == 4);
    program
}

#[test]
fn the_report_of_a_mount_is_that_of_2017_to_the_byte() {
    let mount = Mount::new();
    mount.make_pool("b", true, &["0", "1"]);
    let killed = killed_on(&mount.tasks("b", "0"));
    let stray = Sleeper::new();
    write(&mount.tasks("b", "1"), stray.pid().to_string()).unwrap();
    pin(stray.pid(), &[0, 1]);
    let names = [("stray", &*stray.pid().to_string()), ("killed", &*killed.to_string())];
    let expected = data("reconcile.json", &names);
    says(&mut mount.kcm(&["reconcile"]), &expected);
    let read: Value = serde_json::from_str(&expected).unwrap();
    assert_eq!(pids(&read, "mismatchedCpuMasks"), [u64::from(stray.pid())]);
    assert_eq!(pids(&read, "reclaimedCpuLists"), [u64::from(killed)]);

    pin(stray.pid(), &[1]);
    says(&mut mount.kcm(&["reconcile"]), &data("reconcile-nothing.json", &[]));
}

#[test]
fn the_report_of_a_plain_directory_is_that_of_2017_to_the_byte() {
    let plain = Plain::new();
    let (killed, stray) = (dead_pid(), Sleeper::new());
    pin(stray.pid(), &[0, 1]);
    plain.make_pool("b", false, &[("0", &killed.to_string()), ("1", &stray.pid().to_string())]);
    let names = [("stray", &*stray.pid().to_string()), ("killed", &*killed.to_string())];
    says(&mut plain.kcm(&["reconcile"]), &data("reconcile.json", &names));
    assert_eq!(fs::read_to_string(plain.tasks("b", "0")).unwrap(), "");
    assert_eq!(fs::read_to_string(plain.tasks("b", "1")).unwrap(), stray.pid().to_string());

    pin(stray.pid(), &[1]);
    says(&mut plain.kcm(&["reconcile"]), &data("reconcile-nothing.json", &[]));
}

#[test]
fn on_a_plain_directory_the_dead_are_taken_off_and_the_living_stay() {
    let plain = Plain::new();
    let (dead, living) = ([dead_pid(), dead_pid(), 4_194_303], [Sleeper::new(), Sleeper::new()]);
    let mut zombie = Sleeper::new();
    zombie.child().kill().unwrap();
    let file = format!(
        "{}, {},{},{},{},{}\n",
        dead[0],
        living[0].pid(),
        dead[1],
        zombie.pid(),
        living[1].pid(),
        dead[2]
    );
    plain.make_pool("p", false, &[("0-1", &file)]);
    until("it is dead", || {
        fs::read_to_string(format!("/proc/{}/stat", zombie.pid())).unwrap().contains(") Z ")
    });
    let found = report(&mut plain.kcm(&["reconcile"]));
    let expected = [dead[0], dead[1], zombie.pid(), dead[2]].map(u64::from);
    assert_eq!(pids(&found, "reclaimedCpuLists"), expected);
    let left = fs::read_to_string(plain.tasks("p", "0-1")).unwrap();
    assert_eq!(left, format!("{},{}", living[0].pid(), living[1].pid()));
}

#[test]
fn each_reclaimed_claim_is_told_exactly_once_whoever_asks() {
    let mount = Mount::with_shared();
    let tasks = [mount.tasks("shared", "0"), mount.tasks("shared", "1")];
    let ask = || {
        let mut told = Vec::new();
        for _ in 0..6 {
            told.extend(pids(&report(&mut mount.kcm(&["reconcile"])), "reclaimedCpuLists"));
        }
        told
    };
    let (killed, mut told) = std::thread::scope(|scope| {
        let askers: Vec<_> = (0..4).map(|_| scope.spawn(ask)).collect();
        let killed: Vec<u64> = (0..60).map(|round| u64::from(killed_on(&tasks[round % 2]))).collect();
        (killed, askers.into_iter().flat_map(|asker| asker.join().unwrap()).collect::<Vec<_>>())
    });
    told.extend(pids(&report(&mut mount.kcm(&["reconcile"])), "reclaimedCpuLists"));
    told.sort_unstable();
    let mut expected = killed;
    expected.sort_unstable();
    assert_eq!(told, expected);
}

#[test]
fn what_could_not_be_printed_is_told_the_next_time() {
    let mount = Mount::with_dataplane();
    let killed = killed_on(&mount.tasks("dataplane", "0"));
    let (_, err, code) =
        run(mount.kcm(&["reconcile"]).stdout(fs::File::options().write(true).open("/dev/full").unwrap()));
    assert_eq!(code, Some(1));
    assert!(err.starts_with("ERROR:root:") && err.lines().count() == 1, "{err}");
    let closed = "$KCM reconcile --conf-dir=$C | :; echo ${PIPESTATUS[0]}";
    // Whether the reader has gone by then is a matter of luck; no message in any case.
    let (out, err, _) = run(&mut mount.bash(closed));
    assert_eq!(err, "");
    let left = report(&mut mount.kcm(&["reconcile"]));
    match out.trim() {
        "1" => assert_eq!(pids(&left, "reclaimedCpuLists"), [u64::from(killed)]),
        _ => assert_eq!(pids(&left, "reclaimedCpuLists"), [0_u64; 0]),
    }
}

#[test]
fn a_warning_tells_how_many_were_forgotten() {
    let mount = Mount::with_shared();
    let tasks = mount.tasks("shared", "0");
    let killed: Vec<u64> = (0..1027).map(|_| u64::from(killed_on(&tasks))).collect();
    let (out, err, code) = run(&mut mount.kcm(&["reconcile"]));
    assert_eq!(code, Some(0));
    assert_eq!(
        err,
        "WARNING:root:3 reclaimed claims were forgotten before anybody asked; reconcile more often\n"
    );
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(pids(&report, "reclaimedCpuLists"), killed[3..]);
    says(&mut mount.kcm(&["reconcile"]), &data("reconcile-nothing.json", &[]));
}

#[test]
fn a_stray_of_every_thread_is_told_by_its_number_and_brought_back() {
    let mount = Mount::new();
    mount.make_pool("a", true, &["1"]);
    mount.make_pool("b", false, &["0"]);
    let (program, other, free) = (four_threads(), Sleeper::new(), Sleeper::new());
    write(&mount.tasks("a", "1"), program.pid().to_string()).unwrap();
    write(&mount.tasks("b", "0"), other.pid().to_string()).unwrap();
    pin(free.pid(), &[0]);
    let tids = threads(program.pid());
    pin(tids[1], &[0]);
    pin(tids[3], &[0, 1]);
    let expected = json!([
        { "actualCpus": [0], "cpus": "1", "pid": tids[1], "pool": "a" },
        { "actualCpus": [0, 1], "cpus": "1", "pid": tids[3], "pool": "a" },
    ]);
    assert_eq!(report(&mut mount.kcm(&["reconcile"]))["mismatchedCpuMasks"], expected);
    assert_eq!(masks(program.pid()), ["1", "0", "1", "0-1"], "a report alone changes nothing");

    assert_eq!(report(&mut mount.kcm(&["reconcile", "--repair"]))["mismatchedCpuMasks"], expected);
    assert_eq!(masks(program.pid()), ["1"; 4]);
    assert_eq!(masks(other.pid()), ["0"]);
    assert_eq!(masks(free.pid()), ["0"], "who has no claim is nobody's business");
    says(&mut mount.kcm(&["reconcile"]), &data("reconcile-nothing.json", &[]));
}

#[test]
fn a_pinned_subset_is_no_mismatch_and_no_business_of_repair() {
    let mount = Mount::new();
    mount.make_pool("a", false, &["0-1"]);
    let plain = Plain::new();
    let program = four_threads();
    write(&mount.tasks("a", "0-1"), program.pid().to_string()).unwrap();
    plain.make_pool("a", false, &[("0-1", &program.pid().to_string())]);
    pin(threads(program.pid())[2], &[0]);
    for mut command in [mount.kcm(&["reconcile", "--repair"]), plain.kcm(&["reconcile", "--repair"])] {
        says(&mut command, &data("reconcile-nothing.json", &[]));
        assert_eq!(masks(program.pid()), ["0-1", "0-1", "0", "0-1"]);
    }
}

#[test]
fn repair_of_a_plain_directory_brings_strays_back_and_touches_no_other() {
    let plain = Plain::new();
    let (program, other) = (four_threads(), Sleeper::new());
    plain.make_pool("a", false, &[("1", &program.pid().to_string())]);
    for tid in threads(program.pid()) {
        pin(tid, &[1]);
    }
    pin(threads(program.pid())[2], &[0]);
    pin(other.pid(), &[0]);
    let found = report(&mut plain.kcm(&["reconcile", "--repair"]));
    assert_eq!(pids(&found, "mismatchedCpuMasks"), [u64::from(threads(program.pid())[2])]);
    assert_eq!(masks(program.pid()), ["1"; 4]);
    assert_eq!(masks(other.pid()), ["0"]);
}

#[test]
fn who_is_just_moving_is_not_astray() {
    let mount = Mount::with_shared();
    let task = Sleeper::new();
    let lists = [mount.tasks("shared", "0"), mount.tasks("shared", "1")];
    write(&lists[0], task.pid().to_string()).unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let mover = || {
            for round in 0.. {
                write(&lists[round % 2], task.pid().to_string()).unwrap();
                std::thread::sleep(std::time::Duration::from_millis(20));
                if done.load(std::sync::atomic::Ordering::Relaxed) {
                    return round % 2;
                }
            }
            0
        };
        let mover = scope.spawn(mover);
        let mut found = Vec::new();
        for _ in 0..10 {
            found.push(report(&mut mount.kcm(&["reconcile", "--repair"])));
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        let last = mover.join().unwrap();
        assert_eq!(masks(task.pid()), [last.to_string()]);
        for report in found {
            assert_eq!(report["mismatchedCpuMasks"], json!([]));
        }
    });
}

/// A `kcm reconcile --interval` whose output and messages go to files.
struct Looking {
    process: Sleeper,
    out: std::path::PathBuf,
    err: std::path::PathBuf,
}

impl Looking {
    fn start(home: &Path, mut command: Command) -> Self {
        let (out, err) = (home.join("reports"), home.join("messages"));
        command.stdout(fs::File::create(&out).unwrap()).stderr(fs::File::create(&err).unwrap());
        Self { process: Sleeper::spawn(&mut command), out, err }
    }

    fn reports(&self) -> Vec<Value> {
        let text = fs::read_to_string(&self.out).unwrap();
        let reports = serde_json::Deserializer::from_str(&text).into_iter::<Value>();
        // The last one may be half written.
        reports.map_while(Result::ok).collect()
    }

    fn told(&self) -> Vec<u64> {
        self.reports().iter().flat_map(|report| pids(report, "reclaimedCpuLists")).collect()
    }

    fn end(mut self, signal: Signal) -> (Vec<Value>, String) {
        kill(Pid::from_raw(self.process.pid() as i32), signal).unwrap();
        let status = self.process.child().wait().unwrap();
        assert_eq!(status.code(), Some(0), "{signal}: {status}");
        let text = fs::read_to_string(&self.out).unwrap();
        assert!(text.is_empty() || text.ends_with("}\n"), "it ends with a whole report");
        (self.reports(), fs::read_to_string(&self.err).unwrap())
    }
}

#[test]
fn an_interval_misses_nothing_and_tells_nothing_twice_whatever_happens_to_the_daemon() {
    let mount = Mount::with_shared();
    let tasks = mount.tasks("shared", "0");
    let started = std::time::Instant::now();
    let looking = Looking::start(mount.home(), mount.kcm(&["reconcile", "--interval=1"]));
    let mut killed: Vec<u64> = Vec::new();
    for round in 0..5 {
        let beats = looking.reports().len();
        killed.extend((0..10).map(|_| u64::from(killed_on(&tasks))));
        let unseen = Sleeper::new();
        killed.push(u64::from(unseen.pid()));
        write(&tasks, unseen.pid().to_string()).unwrap();
        match round {
            0 => until("a beat has passed", || looking.reports().len() > beats),
            1 | 2 => mount.kill_daemon(),
            _ => mount.stop(),
        }
        // While nobody watches.
        unseen.end();
        if round == 3 {
            until("it has noticed", || fs::read_to_string(&looking.err).unwrap().contains("not running"));
        }
        if round > 0 {
            mount.start();
        }
        until("all are told of", || looking.told().len() >= killed.len());
    }
    let beats = looking.reports().len();
    until("another beat has passed", || looking.reports().len() > beats + 1);
    let (reports, messages) = looking.end(Signal::SIGTERM);
    let told: Vec<u64> = reports.iter().flat_map(|report| pids(report, "reclaimedCpuLists")).collect();
    let (mut once, mut expected) = (told.clone(), killed.clone());
    once.sort_unstable();
    expected.sort_unstable();
    assert_eq!(once, expected, "each exactly once");
    assert!(reports.len() as u64 <= started.elapsed().as_secs() + 1, "no beat comes before its time");
    let expected = format!("ERROR:root:{}: kcm mount is not running; start it", mount.conf().display());
    for message in messages.lines() {
        let known = message.starts_with(&expected) || message.contains("kcm mount is not running; start it");
        assert!(known, "{messages}");
    }
}

#[test]
fn an_interval_ends_cleanly_on_either_signal() {
    let plain = Plain::new();
    plain.make_pool("p", false, &[("0", "")]);
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let looking = Looking::start(plain.home(), plain.kcm(&["reconcile", "--interval=1000"]));
        until("it has told", || looking.reports().len() == 1);
        let (reports, messages) = looking.end(signal);
        assert_eq!((reports.len(), messages.as_str()), (1, ""));
    }
}

#[test]
fn an_interval_on_a_plain_directory_takes_off_whoever_dies() {
    let plain = Plain::new();
    let task = Sleeper::new();
    plain.make_pool("p", false, &[("0-1", &task.pid().to_string())]);
    let looking = Looking::start(plain.home(), plain.kcm(&["reconcile", "--interval=0.1"]));
    until("it has told", || looking.reports().len() > 1);
    let pid = u64::from(task.pid());
    assert!(looking.told().is_empty());
    task.end();
    until("it has told of the death", || looking.told() == [pid]);
    assert_eq!(fs::read_to_string(plain.tasks("p", "0-1")).unwrap(), "");
    looking.end(Signal::SIGTERM);
}

/// Another mount of procfs; unmounted when dropped.
struct OtherProc(std::path::PathBuf);

impl OtherProc {
    fn new(home: &Path) -> Self {
        let path = home.join("proc");
        fs::create_dir(&path).unwrap();
        nix::mount::mount(Some("proc"), &path, Some("proc"), nix::mount::MsFlags::empty(), None::<&str>)
            .unwrap();
        Self(path)
    }
}

impl Drop for OtherProc {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn kcm_proc_fs_tells_where_the_hosts_processes_are() {
    let plain = Plain::new();
    let proc = OtherProc::new(plain.home());
    let (living, dead) = (Sleeper::new(), dead_pid());
    pin(living.pid(), &[0]);
    plain.make_pool("p", false, &[("0", &format!("{},{dead}", living.pid()))]);
    // In a PID namespace of its own, whose /proc shows nothing of the machine.
    let apart = |words: &[&str], proc: &Path| {
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--mount-proc"]).arg(common::KCM).args(words);
        command.arg("--conf-dir").arg(plain.conf()).env("KCM_PROC_FS", proc);
        command
    };
    let found = report(&mut apart(&["reconcile"], &proc.0));
    assert_eq!(pids(&found, "reclaimedCpuLists"), [u64::from(dead)]);
    assert_eq!(found["mismatchedCpuMasks"], json!([]));
    assert_eq!(fs::read_to_string(plain.tasks("p", "0")).unwrap(), living.pid().to_string());

    pin(living.pid(), &[0, 1]);
    let found = report(&mut apart(&["reconcile"], &proc.0));
    assert_eq!(pids(&found, "mismatchedCpuMasks"), [u64::from(living.pid())]);
    fails(
        &mut apart(&["reconcile", "--repair"], &proc.0),
        "cannot repair: KCM_PROC_FS shows another PID namespace",
        "run in the host's",
    );
    let nowhere = plain.home().join("nowhere");
    fails(
        plain.kcm(&["reconcile"]).env("KCM_PROC_FS", &nowhere),
        &format!("{}/self/stat: cannot be read; set KCM_PROC_FS to a procfs", nowhere.display()),
        "",
    );
    assert_eq!(fs::read_to_string(plain.tasks("p", "0")).unwrap(), living.pid().to_string());
}

#[test]
fn a_mount_is_reconciled_from_another_pid_namespace_too() {
    let mount = Mount::with_dataplane();
    let proc = OtherProc::new(mount.home());
    let stray = Sleeper::new();
    write(&mount.tasks("dataplane", "1"), stray.pid().to_string()).unwrap();
    pin(stray.pid(), &[0]);
    let killed = killed_on(&mount.tasks("dataplane", "0"));
    let mut apart = Command::new("unshare");
    apart.args(["--pid", "--fork", "--mount-proc"]).arg(common::KCM).arg("reconcile");
    apart.arg("--conf-dir").arg(mount.conf()).env("KCM_PROC_FS", &proc.0);
    let found = report(&mut apart);
    assert_eq!(pids(&found, "mismatchedCpuMasks"), [u64::from(stray.pid())]);
    assert_eq!(pids(&found, "reclaimedCpuLists"), [u64::from(killed)]);
}

#[test]
fn pools_that_come_and_go_disturb_no_report() {
    let mount = Mount::with_shared();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                mount.sh("cd $C/pools; for p in a b c; do mkdir $p; rmdir $p; done");
            }
        });
        let mut seen = BTreeSet::new();
        for _ in 0..20 {
            let (out, err, code) = run(&mut mount.kcm(&["reconcile"]));
            seen.insert((text(out.as_bytes()), err, code));
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        let nothing = data("reconcile-nothing.json", &[]);
        assert_eq!(seen, BTreeSet::from([(nothing, String::new(), Some(0))]));
    });
}

#[test]
fn what_cannot_be_reconciled_is_said_in_one_line() {
    let mount = Mount::not_mounted();
    let conf = mount.conf().display().to_string();
    let cure = "run kcm mount, or give --conf-dir";
    fails(&mut mount.kcm(&["reconcile"]), &format!("{conf}: no such directory"), cure);
    mount.start();
    mount.stop();
    fails(
        &mut mount.kcm(&["reconcile"]),
        &format!("{conf}: kcm mount is not running; start it"),
        &format!("kcm mount --conf-dir={conf}"),
    );
    let plain = Plain::new();
    plain.make_pool("p", false, &[("0", "1 2 x")]);
    let file = plain.tasks("p", "0").display().to_string();
    fails(&mut plain.kcm(&["reconcile"]), &format!("{file}: not a list of PIDs"), "repair it by hand");
}
