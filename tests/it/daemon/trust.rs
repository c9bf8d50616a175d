//! A state directory that somebody other than root can write to is refused by name, and so is a program for an upgrade.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown, lchown, symlink};
use std::path::Path;
use std::process::Command;

use crate::harness::{KCM, Mount, NOBODY, run, set_mode, signal, until};
use nix::sys::signal::Signal;

const CURE: &str = "make it root's (chown root, chmod go-w), or give another --state-dir";

/// A name, what is done to the state directory, and the message without the cure.
type Row = (&'static str, fn(&Path), &'static str);

const ROWS: [Row; 6] = [
    (
        "somebody else's",
        |state| {
            fs::create_dir(state).unwrap();
            chown(state, Some(NOBODY), None).unwrap();
        },
        "/state: belongs to user 65534",
    ),
    (
        "writable",
        |state| {
            fs::create_dir(state).unwrap();
            set_mode(state, 0o777);
        },
        "/state: is writable by others (mode 0777)",
    ),
    (
        "somebody else's link",
        |state| {
            symlink("/var", state).unwrap();
            lchown(state, Some(NOBODY), None).unwrap();
        },
        "/state: is a symbolic link that belongs to user 65534",
    ),
    (
        "a link in it",
        |state| {
            fs::create_dir(state).unwrap();
            symlink(state.with_file_name("precious"), state.join("log")).unwrap();
        },
        "/state/log: is a symbolic link",
    ),
    (
        "a request in it",
        |state| {
            fs::create_dir(state).unwrap();
            fs::write(state.join("upgrade"), "/bin/true").unwrap();
            chown(state.join("upgrade"), Some(NOBODY), None).unwrap();
        },
        "/state/upgrade: belongs to user 65534",
    ),
    (
        "somebody else's parent",
        |state| chown(state.parent().unwrap(), Some(NOBODY), None).unwrap(),
        ": belongs to user 65534",
    ),
];

#[test]
fn a_state_directory_that_others_can_change_is_refused_by_name() {
    for (name, prepare, message) in ROWS {
        let mount = Mount::not_mounted();
        let precious = mount.home().join("precious");
        fs::write(&precious, "data").unwrap();
        prepare(&mount.state());
        let line = mount.mount_failure();
        assert!(line.contains(message) && line.ends_with(CURE), "{name}: {line}");
        assert_eq!(fs::read_to_string(&precious).unwrap(), "data", "{name}");
        assert_eq!(mount.mounted(), 0, "{name}");
        let _ = chown(mount.home(), Some(0), None);
    }
}

#[test]
fn an_upgrade_runs_only_a_program_that_is_roots() {
    let mount = Mount::new();
    let program = mount.home().join("kcm-new");
    assert!(Command::new("cp").arg(KCM).arg(&program).status().unwrap().success());
    let request = mount.state().join("upgrade");
    let ask = |what: &str| {
        fs::write(&request, program.as_os_str().as_encoded_bytes()).unwrap();
        fs::set_permissions(&request, fs::Permissions::from_mode(0o600)).unwrap();
        signal(mount.supervisor(), Signal::SIGHUP);
        until(what, || mount.log().contains("only root may be able to change the program"));
        let answer = || fs::read_to_string(&request).unwrap_or_default();
        until("it is answered", || answer().starts_with("failed: "));
        let serving = fs::read_link(format!("/proc/{}/exe", mount.supervisor())).unwrap();
        assert_ne!(serving, program, "{what}");
        fs::write(mount.state().join("log"), "").unwrap();
    };
    chown(&program, Some(NOBODY), None).unwrap();
    ask("a program of somebody else");
    chown(&program, Some(0), None).unwrap();
    set_mode(&program, 0o777);
    ask("a program that others can write to");
    set_mode(&program, 0o755);
    let mut upgrade = Command::new(&program);
    upgrade.args(["mount", "--upgrade", "--conf-dir"]).arg(mount.conf());
    let (_, err, status) = run(upgrade.arg("--state-dir").arg(mount.state()));
    assert_eq!(status, Some(0), "{err}");
    // A request that others could have written is not followed.
    fs::write(&request, "/bin/false").unwrap();
    set_mode(&request, 0o666);
    signal(mount.supervisor(), Signal::SIGHUP);
    until("it is refused", || mount.log().contains("upgrade: is writable by others (mode 0666)"));
    assert_eq!(mount.read("info/version").lines().count(), 1);
}
