//! `kcm reconcile` reports each reclaim once; it finds threads outside their list and can repair them.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::harness::dir::Dir as _;
use crate::harness::{
    Mount, Plain, Sleeper, data, fails, killed_on, pids_in, pin, report, run, says, text, until, write,
};
use serde_json::{Value, json};

/// A PID that no process has.
fn dead_pid() -> u32 {
    let task = Sleeper::new();
    let pid = task.pid();
    task.end();
    pid
}

#[test]
fn the_report_of_a_mount_is_the_legacy_one() {
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
    assert_eq!(pids_in(&read, "mismatchedCpuMasks"), [u64::from(stray.pid())]);
    assert_eq!(pids_in(&read, "reclaimedCpuLists"), [u64::from(killed)]);

    pin(stray.pid(), &[1]);
    says(&mut mount.kcm(&["reconcile"]), &data("reconcile-nothing.json", &[]));
}

#[test]
fn the_report_of_a_plain_directory_is_the_legacy_one() {
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
fn dead_tasks_leave_a_plain_directory() {
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
    assert_eq!(pids_in(&found, "reclaimedCpuLists"), expected);
    let left = fs::read_to_string(plain.tasks("p", "0-1")).unwrap();
    assert_eq!(left, format!("{},{}", living[0].pid(), living[1].pid()));
}

#[test]
fn each_reclaim_is_reported_once() {
    let mount = Mount::with_shared();
    let tasks = [mount.tasks("shared", "0"), mount.tasks("shared", "1")];
    let ask = || {
        let mut reported = Vec::new();
        for _ in 0..6 {
            reported.extend(pids_in(&report(&mut mount.kcm(&["reconcile"])), "reclaimedCpuLists"));
        }
        reported
    };
    let (killed, mut reported) = std::thread::scope(|scope| {
        let askers: Vec<_> = (0..4).map(|_| scope.spawn(ask)).collect();
        let killed: Vec<u64> = (0..60).map(|round| u64::from(killed_on(&tasks[round % 2]))).collect();
        (killed, askers.into_iter().flat_map(|asker| asker.join().unwrap()).collect::<Vec<_>>())
    });
    reported.extend(pids_in(&report(&mut mount.kcm(&["reconcile"])), "reclaimedCpuLists"));
    reported.sort_unstable();
    let mut expected = killed;
    expected.sort_unstable();
    assert_eq!(reported, expected);
}

#[test]
fn an_unprinted_reclaim_is_reported_the_next_time() {
    let mount = Mount::with_dataplane();
    let killed = killed_on(&mount.tasks("dataplane", "0"));
    let (_, err, code) =
        run(mount.kcm(&["reconcile"]).stdout(fs::File::options().write(true).open("/dev/full").unwrap()));
    assert_eq!(code, Some(1));
    assert!(err.starts_with("ERROR:root:") && err.lines().count() == 1, "{err}");
    let closed = "$KCM reconcile --conf-dir=$C | :; echo ${PIPESTATUS[0]}";
    // The reader may or may not have ended by then; in both cases there is no message.
    let (out, err, _) = run(&mut mount.bash(closed));
    assert_eq!(err, "");
    let left = report(&mut mount.kcm(&["reconcile"]));
    match out.trim() {
        "1" => assert_eq!(pids_in(&left, "reclaimedCpuLists"), [u64::from(killed)]),
        _ => assert_eq!(pids_in(&left, "reclaimedCpuLists"), [0_u64; 0]),
    }
}

#[test]
fn a_warning_counts_the_forgotten_reclaims() {
    let mount = Mount::with_shared();
    let tasks = mount.tasks("shared", "0");
    let killed: Vec<u64> = (0..1027).map(|_| u64::from(killed_on(&tasks))).collect();
    let (out, err, code) = run(&mut mount.kcm(&["reconcile"]));
    assert_eq!(code, Some(0));
    assert_eq!(
        err,
        "WARNING:root:3 reclaims were dropped before they were reported; run reconcile more often\n"
    );
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(pids_in(&report, "reclaimedCpuLists"), killed[3..]);
    says(&mut mount.kcm(&["reconcile"]), &data("reconcile-nothing.json", &[]));
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
fn kcm_proc_fs_names_the_hosts_procfs() {
    let plain = Plain::new();
    let proc = OtherProc::new(plain.home());
    let (living, dead) = (Sleeper::new(), dead_pid());
    pin(living.pid(), &[0]);
    plain.make_pool("p", false, &[("0", &format!("{},{dead}", living.pid()))]);
    // In its own PID namespace, whose /proc does not show the host's processes.
    let apart = |words: &[&str], proc: &Path| {
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--mount-proc"]).arg(crate::harness::KCM).args(words);
        command.arg("--conf-dir").arg(plain.conf()).env("KCM_PROC_FS", proc);
        command
    };
    let found = report(&mut apart(&["reconcile"], &proc.0));
    assert_eq!(pids_in(&found, "reclaimedCpuLists"), [u64::from(dead)]);
    assert_eq!(found["mismatchedCpuMasks"], json!([]));
    assert_eq!(fs::read_to_string(plain.tasks("p", "0")).unwrap(), living.pid().to_string());

    pin(living.pid(), &[0, 1]);
    let found = report(&mut apart(&["reconcile"], &proc.0));
    assert_eq!(pids_in(&found, "mismatchedCpuMasks"), [u64::from(living.pid())]);
    fails(
        &mut apart(&["reconcile", "--repair"], &proc.0),
        "cannot repair: KCM_PROC_FS shows another PID namespace",
        "run in the host's",
    );
    let nowhere = plain.home().join("nowhere");
    fails(
        plain.kcm(&["reconcile"]).env("KCM_PROC_FS", &nowhere),
        &format!("{}: cannot be read; set KCM_PROC_FS to a procfs", nowhere.display()),
        "",
    );
    assert_eq!(fs::read_to_string(plain.tasks("p", "0")).unwrap(), living.pid().to_string());
}

#[test]
fn a_mount_is_reconciled_from_another_pid_namespace() {
    let mount = Mount::with_dataplane();
    let proc = OtherProc::new(mount.home());
    let stray = Sleeper::new();
    write(&mount.tasks("dataplane", "1"), stray.pid().to_string()).unwrap();
    pin(stray.pid(), &[0]);
    let killed = killed_on(&mount.tasks("dataplane", "0"));
    let mut apart = Command::new("unshare");
    apart.args(["--pid", "--fork", "--mount-proc"]).arg(crate::harness::KCM).arg("reconcile");
    apart.arg("--conf-dir").arg(mount.conf()).env("KCM_PROC_FS", &proc.0);
    let found = report(&mut apart);
    assert_eq!(pids_in(&found, "mismatchedCpuMasks"), [u64::from(stray.pid())]);
    assert_eq!(pids_in(&found, "reclaimedCpuLists"), [u64::from(killed)]);
}

#[test]
fn pools_that_come_and_go_do_not_disturb_reports() {
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
fn an_error_is_one_line() {
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
    // One damaged list does not stop the others.
    let (_, err, code) = run(&mut plain.kcm(&["reconcile"]));
    let expected = format!("WARNING:root:{file}: not a list of PIDs; repair it by hand; passed over\n");
    assert_eq!((err, code), (expected, Some(0)));
}

#[test]
fn a_copy_of_a_procfs_needs_only_status() {
    let plain = Plain::new();
    plain.make_pool("p", true, &[("0", "1"), ("1", "3"), ("2", "2")]);
    let proc = plain.home().join("proc");
    for (pid, state) in [("1", "S (sleeping)"), ("3", "Z (zombie)")] {
        fs::create_dir_all(proc.join(pid)).unwrap();
        let status = format!("Name:\tx\nState:\t{state}\nCpus_allowed_list:\t0\n");
        fs::write(proc.join(pid).join("status"), status).unwrap();
    }
    let (out, err, status) = run(plain.kcm(&["reconcile"]).env("KCM_PROC_FS", &proc));
    assert_eq!((err.as_str(), status), ("", Some(0)));
    let reclaimed = |list: &str| out.contains(&format!("\"cpus\": \"{list}\""));
    assert_eq!(["0", "1", "2"].map(reclaimed), [false, true, true], "{out}");
    assert!(out.find("\"pid\": 2") < out.find("\"pid\": 3"), "ordered by PID: {out}");
    assert_eq!(plain.tasks_of("p", "0"), "1");
}
