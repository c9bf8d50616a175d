//! How a mount begins and ends: `kcm mount` returns once it answers, or says in one line what is wrong and what to
//! do. A new daemon takes over the mount of a dead one. Every end is clean, even if files are open.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::harness::dir::{Dir as _, failure, pinned};
use crate::harness::{KCM, Mount, Sleeper, errno, masks, run, signal, until, write};
use kcm_mount::mountpoint;
use nix::errno::Errno;
use nix::sys::signal::Signal;

/// The version that a mount of this program shows.
fn version() -> String {
    let (version, _, _) = run(Command::new(KCM).arg("--version"));
    version.strip_prefix("kcm ").unwrap().to_owned()
}

/// The line with which `kcm mount` fails if /dev is set up in this way, in a mount namespace.
fn failure_with_dev(mount: &Mount, change: &str) -> String {
    let line = format!("{change} && exec \"$KCM\" mount --conf-dir=\"$C\" --state-dir=\"$S\"");
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &line]).env("KCM_LOG_LEVEL", "ERROR");
    command.env("KCM", KCM).env("C", mount.conf()).env("S", mount.state());
    failure(&mut command)
}

#[test]
fn kcm_mount_returns_once_the_mount_answers() {
    for _ in 0..3 {
        let mount = Mount::not_mounted();
        let (out, _, status) = run(&mut mount.mount_command());
        assert_eq!(
            (fs::read_to_string(mount.conf().join("info/version")).unwrap().as_str(), status),
            (version().as_str(), Some(0))
        );
        assert_eq!(out, "", "nothing on stdout");
    }
}

#[test]
fn relative_paths_start_at_the_callers_directory() {
    let mount = Mount::not_mounted();
    let mut command = Command::new(KCM);
    command.args(["mount", "--conf-dir=./conf", "--state-dir=state"]).current_dir(mount.home());
    assert_eq!(run(&mut command).2, Some(0));
    assert_eq!(mount.read("info/version"), version());
    assert!(mount.state().join("config").exists());
    let mut unmount = Command::new(KCM);
    unmount.args(["unmount", "--conf-dir=../conf"]).current_dir(mount.state());
    assert_eq!(run(&mut unmount).2, Some(0));
    assert_eq!(mount.mounted(), 0);
}

#[test]
fn only_root_mounts_and_unmounts() {
    let mount = Mount::not_mounted();
    let conf = mount.conf();
    let line = failure(mount.kcm_as_nobody(&["mount", "--state-dir"]).arg(mount.state()));
    assert_eq!(line, format!("only root can mount {}; run kcm mount as root", conf.display()));
    assert!(!mount.state().exists() && !conf.exists(), "nothing was created");
    mount.start();
    let line = failure(&mut mount.kcm_as_nobody(&["unmount"]));
    assert!(line.contains("only root can") && line.ends_with("as root"), "{line}");
    assert_eq!(mount.read("info/version"), version());
}

#[test]
fn without_dev_fuse_the_message_has_the_cure() {
    let mount = Mount::not_mounted();
    for change in ["mount -t tmpfs tmpfs /dev && mknod /dev/null c 1 3", "mount --bind /dev/null /dev/fuse"] {
        let line = failure_with_dev(&mount, change);
        let cure = "; load the module (modprobe fuse), or give the container the device";
        assert!(line.starts_with("/dev/fuse: ") && line.ends_with(cure), "{change}: {line}");
    }
    assert_eq!(mount.daemons(), Vec::<u32>::new());
    mount.start();
}

#[test]
fn a_directory_that_is_not_empty_is_refused() {
    let mount = Mount::not_mounted();
    fs::create_dir(mount.conf()).unwrap();
    fs::write(mount.conf().join("precious"), "data").unwrap();
    let expected = format!(
        "{}: not an empty directory: it has precious, which kcm has not put there; find out who did, remove it, then run \
         kcm mount",
        mount.conf().display()
    );
    assert_eq!(mount.mount_failure(), expected);
    assert_eq!(fs::read_to_string(mount.conf().join("precious")).unwrap(), "data");
    assert!(!mountpoint::is_marked(&mount.conf()));
}

#[test]
fn entries_that_appeared_while_no_daemon_served_are_named() {
    let mount = Mount::with_dataplane();
    mount.stop();
    let refused = |names: &str| {
        let expected = format!(
            "{}: not an empty directory: it has {names}, which kcm has not put there; find out who did, remove it, then \
             run kcm mount",
            mount.conf().display()
        );
        assert_eq!(mount.mount_failure(), expected);
        assert_eq!(mount.mounted(), 0);
    };
    // Even what looks like a legacy layout: the directory was a mount point, so nobody has an old one there.
    fs::create_dir(mount.conf().join("pools")).unwrap();
    refused("pools");
    // Whatever their names are, the message is one line.
    for name in ["a\nb", "link", "x", "y"] {
        std::os::unix::fs::symlink("/etc/shadow", mount.conf().join(name)).unwrap();
    }
    refused("\"a\\nb\", link, pools, 2 more");
    for name in ["a\nb", "link", "x", "y"] {
        fs::remove_file(mount.conf().join(name)).unwrap();
    }
    fs::remove_dir(mount.conf().join("pools")).unwrap();
    mount.start();
    assert_eq!(mount.read("pools/dataplane/exclusive"), "1\n");
}

#[test]
fn a_mount_point_that_is_a_link_is_refused() {
    let mount = Mount::with_dataplane();
    mount.stop();
    let target = mount.home().join("elsewhere");
    fs::create_dir(&target).unwrap();
    fs::remove_dir(mount.conf()).unwrap();
    let (conf, home) = (mount.conf().display().to_string(), mount.home().display().to_string());
    let make = |target: &str| std::os::unix::fs::symlink(target, mount.conf()).unwrap();
    let expected = |target: &str| {
        format!(
            "{conf}: a symbolic link to {target}, not a directory; remove the link, or give the directory itself: \
             --conf-dir={target}"
        )
    };
    for to in [target.to_str().unwrap(), "/nowhere"] {
        make(to);
        assert_eq!(mount.mount_failure(), expected(to));
        let slash = format!("--conf-dir={conf}/");
        for flags in [&[][..], &["--foreground"]] {
            let mut command = Command::new(KCM);
            command.args(["mount", &slash]).args(flags).arg(format!("--state-dir={home}/state"));
            assert_eq!(failure(command.env("KCM_LOG_LEVEL", "ERROR")), expected(to), "{flags:?}");
        }
        assert!(!mountpoint::is_marked(&target));
        fs::remove_file(mount.conf()).unwrap();
    }
    // The owner of a directory above may have a link there.
    std::os::unix::fs::symlink(mount.home(), target.join("home")).unwrap();
    let through = format!("--conf-dir={}/home/conf", target.display());
    let mut command = Command::new(KCM);
    command.args(["mount", &through]).arg(format!("--state-dir={home}/state"));
    let (_, err, status) = run(&mut command);
    assert_eq!(status, Some(0), "{err}");
    assert_eq!((mount.mounted(), mount.read("pools/dataplane/exclusive").as_str()), (1, "1\n"));
}

#[test]
fn another_kind_of_file_is_refused() {
    let mount = Mount::not_mounted();
    fs::write(mount.conf(), "data").unwrap();
    let line = mount.mount_failure();
    assert!(line.starts_with(&format!("{}: ", mount.conf().display())), "{line}");
    assert!(line.ends_with("give a directory"), "{line}");
    assert_eq!(fs::read_to_string(mount.conf()).unwrap(), "data");
}

#[test]
fn a_second_mount_changes_nothing() {
    let mount = Mount::new();
    let (daemons, conf) = (mount.daemons(), mount.conf().display().to_string());
    let (_, err, status) = run(&mut mount.mount_command());
    assert_eq!((err, status), (format!("INFO:root:{conf}: already mounted; nothing to do\n"), Some(0)));
    // With another state directory, it is another mount.
    let refused = format!("{conf}: already mounted; run kcm unmount first");
    let mut other = mount.kcm(&["mount", "--state-dir"]);
    assert_eq!(failure(other.arg(mount.home().join("other")).env("KCM_LOG_LEVEL", "ERROR")), refused);
    for flag in ["--foreground", "--import"] {
        assert_eq!(failure(mount.mount_command().arg(flag).env("KCM_LOG_LEVEL", "ERROR")), refused);
    }
    assert_eq!((mount.daemons(), mount.mounted()), (daemons, 1));
    assert_eq!(mount.read("info/version"), version());
}

#[test]
fn the_mount_of_a_dead_daemon_is_taken_over() {
    let mount = Mount::with_dataplane();
    let task = pinned("0-1");
    write(&mount.tasks("dataplane", "0"), task.pid().to_string()).unwrap();
    let open = File::open(mount.tasks("dataplane", "0")).unwrap();
    mount.kill_daemon();
    assert_eq!(errno(fs::read(mount.conf().join("info/version"))), Errno::ENOTCONN);
    assert_eq!(mount.mounted(), 1);
    mount.start();
    assert_eq!(mount.mounted(), 1);
    assert_eq!(mount.tasks_of("dataplane", "0"), task.pid().to_string());
    // Files that were opened on the old mount stay unusable.
    assert_eq!(errno({ &open }.read(&mut [0; 8])), Errno::ENOTCONN);
}

/// A name, and what is done.
type End = (&'static str, fn(&Mount));

/// Everything that ends a mount.
const ENDS: [End; 6] = [
    ("kcm unmount", Mount::stop),
    ("SIGTERM", |mount| signal(mount.supervisor(), Signal::SIGTERM)),
    ("SIGINT", |mount| signal(mount.supervisor(), Signal::SIGINT)),
    ("SIGTERM to all of it", |mount| {
        mount.daemons().into_iter().for_each(|daemon| signal(daemon, Signal::SIGTERM));
    }),
    ("umount -l", |mount| umount(mount, &["-l"])),
    ("umount of one that nobody uses", |mount| umount(mount, &[])),
];

fn umount(mount: &Mount, flags: &[&str]) {
    let (_, err, status) = run(Command::new("umount").args(flags).arg(mount.conf()));
    assert_eq!(status, Some(0), "{err}");
}

#[test]
fn every_end_is_clean_even_with_open_files() {
    for (name, end) in ENDS {
        let mount = Mount::with_dataplane();
        let task = pinned("0-1");
        write(&mount.tasks("dataplane", "0"), task.pid().to_string()).unwrap();
        let is_used = !name.starts_with("umount of one");
        let busy = is_used.then(|| {
            let inside =
                Sleeper::spawn(Command::new("sleep").arg("1000").current_dir(mount.pool("dataplane")));
            (File::open(mount.conf().join("info/events")).unwrap(), inside)
        });
        end(&mount);
        until(name, || mount.daemons().is_empty());
        assert_eq!(mount.mounted(), 0, "{name}");
        if let Some((file, _inside)) = busy {
            assert_eq!(errno({ &file }.read(&mut [0; 8])), Errno::ENOTCONN, "{name}");
        }
        assert_eq!(fs::read_dir(mount.conf()).unwrap().count(), 0, "{name}");
        assert!(mountpoint::is_marked(&mount.conf()), "{name}");
        assert_eq!(masks(task.pid()), ["0"], "{name}: claims are kept");
        mount.start();
        assert_eq!(mount.tasks_of("dataplane", "0"), task.pid().to_string(), "{name}");
    }
}

#[test]
fn only_mounts_are_unmounted() {
    let mount = Mount::not_mounted();
    let expected = format!("{}: not mounted; nothing to do", mount.conf().display());
    assert_eq!(failure(&mut mount.kcm(&["unmount"])), expected);
    // A mount that has ended already is what the user wants.
    mount.start();
    mount.stop();
    let (_, err, status) = run(&mut mount.kcm(&["unmount"]));
    assert_eq!((err, status), (format!("INFO:root:{expected}\n"), Some(0)));
    // A mount whose daemon has died is still a mount.
    mount.start();
    mount.kill_daemon();
    mount.stop();
    assert_eq!(mount.mounted(), 0);
}

/// Every command that works on a configuration directory.
const COMMANDS: [&[&str]; 5] = [
    &["init", "--num-dp-cores=1", "--num-cp-cores=0"],
    &["describe"],
    &["describe", "--format=table"],
    &["reconcile"],
    &["isolate", "--pool=dataplane", "touch started"],
];

fn every_command_refuses(mount: &Mount) {
    for words in COMMANDS {
        let mut command = mount.kcm(words);
        let line = failure(command.current_dir(mount.home()).env("KCM_LOG_LEVEL", "ERROR"));
        let begin = format!("{}: kcm mount is not running; start it", mount.conf().display());
        assert!(line.starts_with(&begin), "{words:?}: {line}");
    }
    assert!(!mount.home().join("started").exists());
}

#[test]
fn without_a_daemon_every_command_says_so() {
    let mount = Mount::with_dataplane();
    mount.kill_daemon();
    every_command_refuses(&mount);
    assert_eq!(mount.mounted(), 1);
    mount.start();
    mount.stop();
    every_command_refuses(&mount);
    assert_eq!(fs::read_dir(mount.conf()).unwrap().count(), 0);
    mount.start();
    assert_eq!(mount.read("pools/dataplane/exclusive"), "1\n");
}

#[test]
fn in_the_foreground_systemd_learns_of_readiness() {
    let mount = Mount::not_mounted();
    let path = mount.home().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut command = mount.mount_command();
    let mut daemon = Sleeper::spawn(command.arg("--foreground").env("NOTIFY_SOCKET", &path));
    let mut output = Vec::new();
    while !output.iter().any(|text: &String| text.lines().any(|line| line == "READY=1")) {
        let mut buffer = [0; 4096];
        let length = socket.recv(&mut buffer).expect("readiness");
        output.push(crate::harness::text(&buffer[..length]));
    }
    assert_eq!(mount.read("info/version"), version(), "the mount answers when it is reported ready");
    assert_eq!(mount.supervisor(), daemon.pid(), "in the process that was started");
    signal(daemon.pid(), Signal::SIGTERM);
    assert_eq!(daemon.child().wait().unwrap().code(), Some(0));
    assert_eq!(mount.mounted(), 0);
    assert_eq!(mount.daemons(), Vec::<u32>::new());
}

#[test]
fn in_the_foreground_an_error_is_one_line_too() {
    let mount = Mount::not_mounted();
    fs::create_dir_all(mount.conf().join("something")).unwrap();
    let line = failure(mount.mount_command().arg("--foreground").env("KCM_LOG_LEVEL", "ERROR"));
    assert!(line.contains("not an empty directory"), "{line}");
    assert!(Path::new(&mount.conf().join("something")).exists());
}
