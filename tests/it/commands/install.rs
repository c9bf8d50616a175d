//! `kcm install`: what is installed on a machine. `uninstall` has the removal.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::harness::{KCM, Mount, fails, require_static_kcm, run};
use tempfile::TempDir;

/// How `kcm --version` begins; the commit follows.
const VERSION: &str = concat!("kcm ", env!("CARGO_PKG_VERSION"));

/// `kcm <words>` with this place for the program and the unit.
pub(super) fn kcm(words: &[&str], place: &Path) -> Command {
    let mut command = Command::new(KCM);
    command.args(words).arg(flag("--install-dir", &place.join("bin")));
    command
}

pub(super) fn flag(name: &str, path: &Path) -> String {
    format!("{name}={}", path.display())
}

/// Asserts success with these messages and no output.
pub(super) fn logs(command: &mut Command, expected: &[String]) {
    let (out, err, code) = run(command);
    assert_eq!((out.as_str(), code), ("", Some(0)), "{command:?}: {err}");
    // A daemon prints this on a machine on which root may not change the OOM score.
    let lines: Vec<&str> = err.lines().filter(|line| !line.contains("/proc/self/oom_score_adj")).collect();
    assert_eq!(lines, expected.iter().map(|line| format!("INFO:root:{line}")).collect::<Vec<_>>());
}

pub(super) fn names(directory: &Path) -> Vec<String> {
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
    let share_dir = home.path().join("share");
    let expected = [
        format!("Installed {}.", program.display()),
        format!("Installed the man pages and completions below {}.", share_dir.display()),
        format!(
            "Installed {}; start it: systemctl daemon-reload && systemctl enable --now kcm",
            unit.display()
        ),
        format!(
            "Installed {}; for containers: systemctl enable --now kcm-cdi",
            units.join("kcm-cdi.service").display()
        ),
    ];
    let share = flag("--share-dir", &share_dir);
    logs(kcm(&["install", &share], home.path()).arg(flag("--systemd", &units)), &expected);
    for (words, file) in [
        (&["man"][..], "man/man1/kcm.1"),
        (&["man", "isolate"], "man/man1/kcm-isolate.1"),
        (&["man", "5"], "man/man5/kcm.5"),
        (&["completions", "bash"], "bash-completion/completions/kcm"),
        (&["completions", "fish"], "fish/vendor_completions.d/kcm.fish"),
        (&["completions", "zsh"], "zsh/site-functions/_kcm"),
    ] {
        let shown = Command::new(KCM).args(words).output().unwrap().stdout;
        assert_eq!(fs::read(share_dir.join(file)).unwrap(), shown, "{words:?}");
    }
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
    let cdi = units.join("kcm-cdi.service");
    let text = fs::read_to_string(&cdi).unwrap();
    let start = format!("\nExecStart=\"{}\" cdi install --follow\n", program.display());
    assert!(text.contains(&start) && text.contains("\nAfter=kcm.service\n"), "{text}");
    for unit in [&unit, &cdi] {
        if let Ok(output) = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(unit).output() {
            assert!(output.status.success(), "{}", crate::harness::text(&output.stderr));
            assert_eq!(crate::harness::text(&output.stderr), "");
        }
    }
}

#[test]
fn pages_that_cannot_be_written_are_left_out() {
    let (home, program) = place();
    fs::write(home.path().join("file"), "").unwrap();
    let share = flag("--share-dir", &home.path().join("file"));
    let units = home.path().join("units");
    let (_, err, code) = run(kcm(&["install", &share], home.path()).arg(flag("--systemd", &units)));
    assert_eq!(code, Some(0), "{err}");
    assert!(err.contains("; the man pages and completions are not installed"), "{err}");
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
    let share = flag("--share-dir", &home.path().join("share"));
    let mut command = kcm(&["install", &share], &home.path().join("a$b"));
    let begin = format!("{}: systemd does not accept such a name", home.path().join("a$b/bin/kcm").display());
    fails(
        command.arg(flag("--systemd", &home.path().join("units"))).env("KCM_LOG_LEVEL", "ERROR"),
        &begin,
        "",
    );
}

#[test]
fn a_package_has_the_same_files_below_a_root() {
    let home = tempfile::tempdir().unwrap();
    let mut command = Command::new(KCM);
    command.args([
        "install",
        "--install-dir=/usr/bin",
        "--systemd=/usr/lib/systemd/system",
        "--share-dir=/usr/share",
    ]);
    let (_, err, code) = run(command.arg(flag("--root", home.path())));
    assert_eq!(code, Some(0), "{err}");
    assert_eq!(fs::read(home.path().join("usr/bin/kcm")).unwrap(), fs::read(KCM).unwrap());
    let unit = fs::read_to_string(home.path().join("usr/lib/systemd/system/kcm.service")).unwrap();
    assert!(unit.contains("\nExecStart=\"/usr/bin/kcm\" mount --foreground\n"), "{unit}");
    let pages = names(&home.path().join("usr/share/man/man1"));
    let (help, _, _) = run(Command::new(KCM).arg("--help"));
    let commands = help.split_once("Commands:\n").unwrap().1.split_once("\n\n").unwrap().0;
    for name in commands.lines().filter_map(|line| line.strip_prefix("  ")?.split(' ').next()) {
        let has_page = pages.contains(&format!("kcm-{name}.1"));
        assert_eq!(has_page, !name.is_empty() && name != "help", "{name}: {pages:?}");
    }
}
