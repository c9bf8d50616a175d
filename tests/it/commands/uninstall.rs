//! `kcm uninstall`: everything is removed, with a daemon and without one, and nothing that is not kcm's.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::install::{flag, kcm, logs, names};
use crate::harness::{KCM, Mount, Plain, Sleeper, fails, has_died, masks, pin, run, write};
use kcm_mount::mountpoint::is_marked;
use tempfile::TempDir;

/// A node with everything installed, and `kcm uninstall` for it.
struct Node {
    home: TempDir,
    conf: PathBuf,
}

impl Node {
    fn new(conf: PathBuf) -> Self {
        let home = tempfile::tempdir().unwrap();
        let units = home.path().join("units");
        let share = flag("--share-dir", &home.path().join("share"));
        run(kcm(&["install", &share], home.path()).arg(flag("--systemd", &units)));
        // As `systemctl enable` does it.
        fs::create_dir(units.join("multi-user.target.wants")).unwrap();
        let wanted = units.join("multi-user.target.wants/kcm.service");
        std::os::unix::fs::symlink(units.join("kcm.service"), wanted).unwrap();
        Self { home, conf }
    }

    fn uninstall(&self, words: &[&str]) -> Command {
        self.uninstall_from("bin", words)
    }

    fn uninstall_from(&self, install_dir: &str, words: &[&str]) -> Command {
        let mut command = Command::new(KCM);
        command.arg("uninstall").arg(flag("--install-dir", &self.home.path().join(install_dir)));
        command.args(words).arg("--conf-dir").arg(&self.conf);
        command.arg(flag("--systemd", &self.home.path().join("units")));
        command.arg(flag("--share-dir", &self.home.path().join("share")));
        command.arg(flag("--cdi-dir", &self.home.path().join("cdi")));
        command
    }

    fn is_installed(&self) -> bool {
        let files = [
            "bin/kcm",
            "units/kcm.service",
            "units/multi-user.target.wants/kcm.service",
            "units/kcm-cdi.service",
            "share/man/man1/kcm.1",
            "share/man/man5/kcm.5",
            "share/zsh/site-functions/_kcm",
        ];
        let there = files.map(|file| fs::symlink_metadata(self.home.path().join(file)).is_ok());
        assert!(there == [true; 7] || there == [false; 7], "{there:?}");
        there[0]
    }

    /// The messages about the installed files.
    fn files(&self) -> Vec<String> {
        let file = |name: &str| format!("Removed {}.", self.home.path().join(name).display());
        let share = self.home.path().join("share");
        vec![
            file("bin/kcm"),
            file("units/multi-user.target.wants/kcm.service"),
            file("units/kcm.service"),
            file("units/kcm-cdi.service"),
            format!("Removed the man pages and completions below {}.", share.display()),
        ]
    }

    fn pools(&self) -> String {
        format!("Removed the pools of {}.", self.conf.display())
    }

    /// The messages for a plain directory.
    fn plain(&self) -> Vec<String> {
        [vec![self.pools()], self.files()].concat()
    }

    /// The messages for a mount.
    fn mount(&self) -> Vec<String> {
        [vec![self.pools(), format!("Unmounted {}.", self.conf.display())], self.files()].concat()
    }
}

fn is_mounted(mount: &Mount) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    table.contains(&format!(" {} ", mount.conf().display()))
}

/// The message about a mount that is not purged.
fn stay(mount: &Mount) -> String {
    let (conf, state) = (mount.conf(), mount.state());
    format!("The mount point {} and {} stay; --purge removes them, too.", conf.display(), state.display())
}

#[test]
fn a_mount_without_tasks_is_taken_down() {
    let mount = Mount::with_dataplane();
    let node = Node::new(mount.conf());
    let task = Sleeper::new();
    write(&mount.tasks("dataplane", "1"), task.pid().to_string()).unwrap();
    let begin = format!("dataplane 1 is held by {}", task.pid());
    fails(&mut node.uninstall(&[]), &begin, "end that first, or release it with --force");
    fails(&mut node.uninstall(&["--dry-run"]), &begin, "end that first, or release it with --force");
    assert!(node.is_installed(), "a refused uninstall changes nothing");
    assert_eq!(
        mount.sh("ls $C/pools/dataplane"),
        "0\n1\nexclusive\nmode\npartial\nqueue\ntasks\ntransient\n"
    );

    task.end();
    let supervisor = mount.supervisor();
    logs(&mut node.uninstall(&[]), &[node.mount(), vec![stay(&mount)]].concat());
    assert!(!node.is_installed() && !is_mounted(&mount));
    assert!(has_died(supervisor), "the daemon has ended");
    // The second time there is nothing to do.
    logs(&mut node.uninstall(&[]), &[]);
    mount.start();
    assert_eq!(mount.sh("ls $C/pools"), "", "the pools were removed");
}

#[test]
fn a_rehearsal_removes_nothing() {
    let mount = Mount::with_dataplane();
    let node = Node::new(mount.conf());
    let (out, err, code) = run(&mut node.uninstall(&["--dry-run", "--purge"]));
    assert_eq!((out.as_str(), code), ("", Some(0)), "{err}");
    let (conf, state) = (mount.conf().display().to_string(), mount.state().display().to_string());
    let program = node.home.path().join("bin/kcm").display().to_string();
    for line in [
        format!("INFO:root:Would remove the pools of {conf}."),
        format!("INFO:root:Would unmount {conf}."),
        format!("INFO:root:Would remove {program}."),
        format!("INFO:root:Would remove {state}."),
        format!("INFO:root:Would remove {conf}."),
    ] {
        assert!(err.lines().any(|other| other == line), "{line}: {err}");
    }
    assert!(node.is_installed() && is_mounted(&mount) && mount.pool("dataplane").exists());
}

#[test]
fn a_purge_leaves_nothing_in_either_order() {
    for is_unmounted_first in [false, true] {
        let mount = Mount::with_dataplane();
        let node = Node::new(mount.conf());
        let (conf, state) = (mount.conf(), mount.state());
        fs::write(state.join("claims.damaged-1700000000"), "x").unwrap();
        let state_dir = flag("--state-dir", &state);
        let gone = [&state, &conf].map(|path| format!("Removed {}.", path.display())).to_vec();
        let expected = if is_unmounted_first {
            mount.stop();
            // Without claims nothing but the files is there.
            [node.files(), gone].concat()
        } else {
            [node.mount(), gone].concat()
        };
        logs(&mut node.uninstall(&["--purge", &state_dir]), &expected);
        assert!(!node.is_installed() && !conf.exists() && !state.exists(), "{is_unmounted_first}");
        logs(&mut node.uninstall(&["--purge", &state_dir]), &[]);
    }
}

/// `kcm install --install-dir=/usr/local/bin` and `kcm uninstall`.
#[test]
fn the_program_that_the_unit_names_is_removed() {
    let plain = Plain::new();
    plain.make_pool("a", true, &[("0", "")]);
    let node = Node::new(plain.conf());
    let would_remove = |node: &Node| {
        let (_, err, _) = run(&mut node.uninstall_from("opt", &["--dry-run"]));
        err.contains(&format!("Would remove {}.", node.home.path().join("bin/kcm").display()))
    };
    assert!(would_remove(&node));
    let unit = node.home.path().join("units/kcm.service");
    let text = fs::read_to_string(&unit).unwrap();
    fs::write(&unit, text.replace("bin/kcm\"", "bin/other\"")).unwrap();
    assert!(!would_remove(&node), "somebody else's unit");
    fs::write(&unit, text).unwrap();
    logs(&mut node.uninstall_from("opt", &[]), &node.plain());
    assert!(!node.is_installed());
}

#[test]
fn a_purge_keeps_files_that_are_not_of_kcm() {
    let mount = Mount::with_dataplane();
    let node = Node::new(mount.conf());
    mount.stop();
    let (conf, state) = (mount.conf(), mount.state());
    fs::write(conf.join("notes"), "mine").unwrap();
    fs::write(state.join("notes"), "mine").unwrap();
    let stay =
        [&state, &conf].map(|path| format!("{} has files that are not kcm's, and stays.", path.display()));
    let expected = [node.files(), stay.to_vec()].concat();
    logs(&mut node.uninstall(&["--purge", &flag("--state-dir", &state)]), &expected);
    assert_eq!((names(&conf), names(&state)), (vec!["notes".to_owned()], vec!["notes".to_owned()]));
    assert!(!is_marked(&conf), "kcm init works there");
}

#[test]
fn a_claim_of_a_mount_that_has_ended_is_released_by_a_daemon() {
    let mount = Mount::with_dataplane();
    let node = Node::new(mount.conf());
    let task = Sleeper::new();
    let before = masks(task.pid());
    write(&mount.tasks("dataplane", "1"), task.pid().to_string()).unwrap();
    mount.stop();
    let state_dir = flag("--state-dir", &mount.state());
    let begin = format!("dataplane 1 is held by {}", task.pid());
    let mut command = node.uninstall(&[&state_dir]);
    fails(command.env("KCM_LOG_LEVEL", "ERROR"), &begin, "end that first, or release it with --force");
    assert!(node.is_installed() && !is_mounted(&mount), "it is as it was before");
    assert_eq!(masks(task.pid()), ["1"]);
    logs(&mut node.uninstall(&[&state_dir, "--force"]), &[node.mount(), vec![stay(&mount)]].concat());
    assert_eq!(masks(task.pid()), before, "its mask is restored");
    assert!(!node.is_installed() && !is_mounted(&mount));
}

#[test]
fn a_mount_whose_daemon_has_died_is_taken_down() {
    let mount = Mount::with_dataplane();
    let node = Node::new(mount.conf());
    mount.kill_daemon();
    let gone = [mount.state(), mount.conf()].map(|path| format!("Removed {}.", path.display()));
    let expected = [&node.mount()[1..], &gone].concat();
    logs(&mut node.uninstall(&["--purge", &flag("--state-dir", &mount.state())]), &expected);
    assert!(!node.is_installed() && !is_mounted(&mount) && !mount.conf().exists());
}

#[test]
fn the_state_of_another_mount_is_never_removed() {
    let (mount, other) = (Mount::with_dataplane(), Mount::with_dataplane());
    let node = Node::new(mount.conf());
    let wrong = flag("--state-dir", &other.state());
    let begin = format!("{}: its daemon uses the state directory ", mount.conf().display());
    let end = format!("give --state-dir={}", mount.state().display());
    fails(&mut node.uninstall(&["--purge", &wrong]), &begin, &end);
    mount.stop();
    let begin = format!("{}: PID {} uses it", other.state().display(), other.supervisor());
    fails(&mut node.uninstall(&["--purge", &wrong]), &begin, "give --state-dir");
    let begin = format!("{}: its state directory is not known", mount.conf().display());
    fails(&mut node.uninstall(&["--purge"]), &begin, "give --state-dir");
    assert!(node.is_installed() && mount.state().join("config").exists());
    assert_eq!(other.read("pools/dataplane/exclusive"), "1\n");
}

#[test]
fn a_mount_of_another_namespace_stays() {
    let mount = Mount::with_dataplane();
    let node = Node::new(mount.conf());
    // As in a container that has the mount.
    let inner = node.uninstall(&[]);
    let mut apart = Command::new("unshare");
    apart.args(["--mount", "--propagation=private"]).arg(inner.get_program()).args(inner.get_args());
    let conf = mount.conf().display().to_string();
    let end = format!("end that there: kcm unmount --conf-dir={conf}");
    let still = format!("{conf} is still served by a daemon in another mount namespace; {end}");
    logs(&mut apart, &[vec![node.pools(), still], node.files()].concat());
    assert_eq!(mount.sh("ls $C/pools"), "");
}

#[test]
fn force_releases_the_tasks_of_a_mount() {
    let mount = Mount::with_dataplane();
    mount.make_pool("more", false, &[]);
    let node = Node::new(mount.conf());
    let task = Sleeper::new();
    let before = masks(task.pid());
    write(&mount.tasks("dataplane", "1"), task.pid().to_string()).unwrap();
    assert_eq!(run(&mut node.uninstall(&["--force"])).2, Some(0));
    assert_eq!(masks(task.pid()), before, "it lives, and its mask is restored");
    assert!(!node.is_installed() && !is_mounted(&mount));
}

#[test]
fn a_plain_directory_without_tasks_is_uninstalled() {
    let plain = Plain::new();
    let (dead, living) = (Sleeper::new(), Sleeper::new());
    let numbers = [dead.pid(), living.pid()];
    dead.end();
    plain.make_pool("a", true, &[("0", &numbers[0].to_string())]);
    plain.make_pool("b", false, &[("1", &numbers[1].to_string())]);
    let node = Node::new(plain.conf());
    let begin = format!("b 1 is held by {}", living.pid());
    fails(&mut node.uninstall(&[]), &begin, "end that first, or release it with --force");
    assert!(node.is_installed());
    living.end();
    logs(&mut node.uninstall(&[]), &node.plain());
    assert!(!node.is_installed());
    assert_eq!(names(&plain.conf()), [""; 0], "kcm init finds an empty directory");
    logs(&mut node.uninstall(&[]), &[]);
    fs::remove_dir(plain.conf()).unwrap();
    logs(&mut node.uninstall(&[]), &[]);
}

#[test]
fn force_removes_tasks_from_a_plain_directory() {
    let plain = Plain::new();
    let living = Sleeper::new();
    pin(living.pid(), &[1]);
    plain.make_pool("b", false, &[("1", &living.pid().to_string())]);
    let node = Node::new(plain.conf());
    logs(&mut node.uninstall(&["--force"]), &node.plain());
    assert_eq!(names(&plain.conf()), [""; 0]);
    assert!(Path::new(&format!("/proc/{}", living.pid())).exists());
}

#[test]
fn a_held_lock_refuses_the_uninstall() {
    let plain = Plain::new();
    plain.make_pool("b", false, &[("1", "")]);
    let node = Node::new(plain.conf());
    let lock = fs::File::open(plain.conf().join("lock")).unwrap();
    let lock = nix::fcntl::Flock::lock(lock, nix::fcntl::FlockArg::LockExclusive).unwrap();
    fails(node.uninstall(&[]).env("KCM_LOCK_TIMEOUT", "0.5"), "Lock timed out after 0.5 seconds", "");
    assert!(node.is_installed());
    drop(lock);
    logs(&mut node.uninstall(&[]), &node.plain());
}
