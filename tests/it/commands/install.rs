//! `kcm install` and `kcm uninstall`: what is installed on a node, and that all of it can be removed.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::harness::{KCM, Mount, Plain, Sleeper, fails, masks, pin, require_static_kcm, run, write};
use tempfile::TempDir;

/// How `kcm --version` begins; the commit follows.
const VERSION: &str = concat!("kcm ", env!("CARGO_PKG_VERSION"));

/// `kcm <words>` with this place for the program and the unit.
fn kcm(words: &[&str], place: &Path) -> Command {
    let mut command = Command::new(KCM);
    command.args(words).arg(flag("--install-dir", &place.join("bin")));
    command
}

fn flag(name: &str, path: &Path) -> String {
    format!("{name}={}", path.display())
}

/// Asserts success with these messages and no output.
fn logs(command: &mut Command, expected: &[String]) {
    let (out, err, code) = run(command);
    assert_eq!((out.as_str(), code), ("", Some(0)), "{command:?}: {err}");
    let lines: Vec<&str> = err.lines().collect();
    assert_eq!(lines, expected.iter().map(|line| format!("INFO:root:{line}")).collect::<Vec<_>>());
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn place() -> (TempDir, PathBuf) {
    let home = tempfile::tempdir().unwrap();
    let program = home.path().join("bin/kcm");
    (home, program)
}

#[test]
fn the_installed_file_is_this_program_for_all_users() {
    let (home, program) = place();
    let installed = [format!("Installed {}.", program.display())];
    // The mode does not depend on the umask.
    let mut command = Command::new("bash");
    command.arg("-c").arg("umask 0777; exec \"$@\"").arg("bash").arg(KCM).arg("install");
    fs::create_dir(home.path().join("bin")).unwrap();
    logs(command.arg(flag("--install-dir", &home.path().join("bin"))), &installed);
    assert_eq!(fs::read(&program).unwrap(), fs::read(KCM).unwrap());
    assert_eq!(fs::metadata(&program).unwrap().permissions().mode() & 0o7777, 0o755);
    assert_eq!(names(&home.path().join("bin")), ["kcm"], "no other file is left there");

    let first = fs::metadata(&program).unwrap().ino();
    logs(&mut kcm(&["install"], home.path()), &installed);
    assert_ne!(fs::metadata(&program).unwrap().ino(), first, "it is replaced, not overwritten");
    assert_eq!(names(&home.path().join("bin")), ["kcm"]);
}

#[test]
fn a_missing_directory_is_created() {
    let (home, _) = place();
    let deep = home.path().join("opt/local/bin");
    let mut command = Command::new(KCM);
    logs(
        command.args(["install", &flag("--install-dir", &deep)]),
        &[format!("Installed {}.", deep.join("kcm").display())],
    );
}

#[test]
fn a_replaced_program_is_always_complete() {
    let (home, program) = place();
    run(&mut kcm(&["install"], home.path()));
    std::thread::scope(|scope| {
        let installer = scope.spawn(|| {
            for _ in 0..10 {
                assert_eq!(run(&mut kcm(&["install"], home.path())).2, Some(0));
            }
        });
        while !installer.is_finished() {
            let (out, err, code) = run(Command::new(&program).arg("--version"));
            assert_eq!((err.as_str(), code), ("", Some(0)));
            assert!(out.starts_with(VERSION), "{out}");
        }
    });
}

#[test]
fn a_killed_installer_leaves_the_old_program() {
    let (home, program) = place();
    run(&mut kcm(&["install"], home.path()));
    let whole = fs::read(&program).unwrap();
    for delay in 0..15 {
        let mut child = kcm(&["install"], home.path()).stderr(std::process::Stdio::null()).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(delay));
        let _ = child.kill();
        let _ = child.wait();
        assert!(fs::read(&program).unwrap() == whole, "after {delay} ms");
    }
}

#[test]
fn the_installed_program_needs_no_other_file() {
    require_static_kcm();
    let mount = Mount::with_dataplane();
    let root = mount.home().join("root");
    let mut command = Command::new(KCM);
    command.args(["install", &flag("--install-dir", &root)]);
    run(&mut command);
    for directory in ["proc", "conf"] {
        fs::create_dir(root.join(directory)).unwrap();
    }
    // The directory holds only the file itself.
    let (out, err, code) = run(Command::new("chroot").arg(&root).args(["/kcm", "--version"]));
    assert!(out.starts_with(VERSION) && err.is_empty() && code == Some(0), "{out}{err}");
    // With /proc and the mount this is all that an image needs.
    let script = "mount --bind \"$C\" \"$R/conf\" && mount -t proc proc \"$R/proc\" &&
        exec chroot \"$R\" /kcm isolate --conf-dir=/conf --pool=dataplane -- /kcm describe --conf-dir=/conf";
    let mut apart = Command::new("unshare");
    apart.args(["--mount", "bash", "-c", script]).env("C", mount.conf()).env("R", &root);
    let (out, err, code) = run(&mut apart);
    assert_eq!((err.as_str(), code), ("", Some(0)));
    let described: serde_json::Value = serde_json::from_str(&out).unwrap();
    let tasks = &described["pools"]["dataplane"]["cpuLists"]["0"]["tasks"];
    assert_eq!(tasks.as_array().unwrap().len(), 1, "the binary prints its help: {out}");
}

#[test]
fn systemd_accepts_the_unit() {
    let (home, program) = place();
    let units = home.path().join("units");
    let unit = units.join("kcm.service");
    let page = home.path().join("man/man1/kcm.1");
    let expected = [
        format!("Installed {}.", program.display()),
        format!("Installed {}.", page.display()),
        format!(
            "Installed {}; start it: systemctl daemon-reload && systemctl enable --now kcm",
            unit.display()
        ),
    ];
    let man = flag("--man-dir", &home.path().join("man"));
    logs(kcm(&["install", &man], home.path()).arg(flag("--systemd", &units)), &expected);
    let shown = Command::new(KCM).arg("man").output().unwrap().stdout;
    assert_eq!(fs::read(&page).unwrap(), shown, "the page that the unit names");
    assert_eq!(fs::metadata(&unit).unwrap().permissions().mode() & 0o7777, 0o644);
    let text = fs::read_to_string(&unit).unwrap();
    for line in [
        "Type=notify".into(),
        format!("ExecStart=\"{}\" mount --foreground", program.display()),
        "Restart=always".into(),
        "FileDescriptorStoreMax=4".into(),
        "RestartKillSignal=SIGUSR1".into(),
        "StartLimitIntervalSec=0".into(),
        "OOMPolicy=continue".into(),
        format!("ExecReload=\"{}\" mount --upgrade", program.display()),
        "StateDirectory=kcm".into(),
        "NoNewPrivileges=yes".into(),
        "WantedBy=multi-user.target".into(),
    ] {
        assert_eq!(text.lines().filter(|other| **other == line).count(), 1, "{line}");
    }
    for forbidden in ["ProtectSystem=", "PrivateTmp=", "PrivateMounts=", "ReadOnlyPaths=", "PrivateDevices="]
    {
        let is_set = text.lines().any(|line| line.starts_with(forbidden));
        assert!(!is_set, "{forbidden} would hide the mount in another mount namespace");
    }
    let mut section = "";
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        match line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            Some(name) => section = name,
            None => assert!(!section.is_empty() && line.contains('='), "{line}"),
        }
    }
    // Without systemd there is no verifier; the lines above are what it would read.
    // The page is not where systemd looks for it.
    if let Ok(output) = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&unit).output() {
        assert!(output.status.success(), "{}", crate::harness::text(&output.stderr));
        assert_eq!(crate::harness::text(&output.stderr), "");
    }
}

#[test]
fn a_man_page_that_cannot_be_written_is_left_out() {
    let (home, program) = place();
    fs::write(home.path().join("file"), "").unwrap();
    let man = flag("--man-dir", &home.path().join("file"));
    let units = home.path().join("units");
    let (_, err, code) = run(kcm(&["install", &man], home.path()).arg(flag("--systemd", &units)));
    assert_eq!(code, Some(0), "{err}");
    assert!(err.contains("; the man page is not installed"), "{err}");
    assert!(program.exists() && units.join("kcm.service").exists());
}

#[test]
fn a_failed_install_is_one_line() {
    let (home, program) = place();
    fs::create_dir_all(&program).unwrap();
    fails(&mut kcm(&["install"], home.path()), &format!("{}: ", program.display()), "");
    assert_eq!(names(&home.path().join("bin")), ["kcm"]);
    fs::write(home.path().join("file"), "").unwrap();
    let below = home.path().join("file/bin");
    let mut command = Command::new(KCM);
    fails(command.args(["install", &flag("--install-dir", &below)]), &below.display().to_string(), "");
    let man = flag("--man-dir", &home.path().join("man"));
    let mut command = kcm(&["install", &man], &home.path().join("a$b"));
    let begin = format!("{}: systemd does not accept such a name", home.path().join("a$b/bin/kcm").display());
    fails(
        command.arg(flag("--systemd", &home.path().join("units"))).env("KCM_LOG_LEVEL", "ERROR"),
        &begin,
        "",
    );
}

/// A node with everything installed, and `kcm uninstall` for it.
struct Node {
    home: TempDir,
    conf: PathBuf,
}

impl Node {
    fn new(conf: PathBuf) -> Self {
        let home = tempfile::tempdir().unwrap();
        let units = home.path().join("units");
        let man = flag("--man-dir", &home.path().join("man"));
        run(kcm(&["install", &man], home.path()).arg(flag("--systemd", &units)));
        // As `systemctl enable` does it.
        fs::create_dir(units.join("multi-user.target.wants")).unwrap();
        let wanted = units.join("multi-user.target.wants/kcm.service");
        std::os::unix::fs::symlink(units.join("kcm.service"), wanted).unwrap();
        Self { home, conf }
    }

    fn uninstall(&self, words: &[&str]) -> Command {
        let mut command = kcm(&["uninstall"], self.home.path());
        command.args(words).arg("--conf-dir").arg(&self.conf);
        command.arg(flag("--systemd", &self.home.path().join("units")));
        command.arg(flag("--man-dir", &self.home.path().join("man")));
        command
    }

    fn is_installed(&self) -> bool {
        let files =
            ["bin/kcm", "units/kcm.service", "units/multi-user.target.wants/kcm.service", "man/man1/kcm.1"];
        let there = files.map(|file| fs::symlink_metadata(self.home.path().join(file)).is_ok());
        assert!(there == [true; 4] || there == [false; 4], "{there:?}");
        there[0]
    }

    /// The messages of an uninstall that removes everything.
    fn removed(&self) -> Vec<String> {
        let file = |name: &str| format!("Removed {}.", self.home.path().join(name).display());
        vec![
            file("bin/kcm"),
            file("units/multi-user.target.wants/kcm.service"),
            file("units/kcm.service"),
            file("man/man1/kcm.1"),
            format!("Removed the pools of {}.", self.conf.display()),
        ]
    }
}

#[test]
fn a_mount_without_tasks_is_uninstalled() {
    let mount = Mount::with_dataplane();
    let node = Node::new(mount.conf());
    let task = Sleeper::new();
    write(&mount.tasks("dataplane", "1"), task.pid().to_string()).unwrap();
    let begin = format!("dataplane 1 is held by {}", task.pid());
    fails(&mut node.uninstall(&[]), &begin, "end that first, or release it with --force");
    assert!(node.is_installed(), "a refused uninstall changes nothing");
    assert_eq!(
        mount.sh("ls $C/pools/dataplane"),
        "0\n1\nexclusive\nmode\npartial\nqueue\ntasks\ntransient\n"
    );

    task.end();
    let conf = mount.conf().display().to_string();
    let mut expected = node.removed();
    expected.push(format!("{conf} is still served; end that: kcm unmount --conf-dir={conf}"));
    logs(&mut node.uninstall(&[]), &expected);
    assert!(!node.is_installed());
    assert_eq!(mount.sh("ls $C/pools"), "");
    // The second time there is nothing to do.
    logs(&mut node.uninstall(&[]), &expected[4..]);
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
    assert_eq!(mount.sh("ls $C/pools"), "");
    assert!(!node.is_installed());
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
    logs(&mut node.uninstall(&[]), &node.removed());
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
    logs(&mut node.uninstall(&["--force"]), &node.removed());
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
    logs(&mut node.uninstall(&[]), &node.removed());
}

#[test]
fn a_dead_daemon_refuses_the_uninstall() {
    let mount = Mount::with_dataplane();
    let node = Node::new(mount.conf());
    mount.stop();
    fails(
        &mut node.uninstall(&[]),
        &format!("{}: kcm mount is not running", mount.conf().display()),
        &format!("start it: kcm mount --conf-dir={}", mount.conf().display()),
    );
    assert!(node.is_installed(), "its pools are in the state directory, and perhaps claims");
}
