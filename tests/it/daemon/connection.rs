//! The FUSE connection: processes that only ask do not hold it, and one that was aborted is replaced.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::harness::dir::{Dir as _, pinned};
use crate::harness::{Mount, Sleeper, kernel, until, write};
use nix::errno::Errno;

#[test]
fn a_process_that_only_asks_holds_no_device() {
    let mount = Mount::new();
    let paused = mount.pause();
    // As the supervisor starts it: with the device under its number.
    let line = "exec \"$KCM\" __daemon probe --conf-dir=\"$C\" --state-dir=\"$S\" 3<>/dev/fuse 5</dev/zero";
    let probe = Sleeper::spawn(&mut mount.bash(line));
    let open = || -> Vec<String> {
        let entries = fs::read_dir(format!("/proc/{}/fd", probe.pid())).unwrap().filter_map(Result::ok);
        let links = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
        links.map(|link| link.to_string_lossy().into_owned()).collect()
    };
    until("it has closed the device", || {
        let is_probe =
            fs::read_link(format!("/proc/{}/exe", probe.pid())).is_ok_and(|exe| exe.ends_with("kcm"));
        is_probe && !open().iter().any(|file| file == "/dev/fuse" || file == "/dev/zero")
    });
    drop(paused);
    assert_eq!(mount.read("info/version").lines().count(), 1);
}

/// Aborts the connection of the mount.
fn abort(mount: &Mount) {
    let connection = rustix::fs::minor(fs::metadata(mount.conf()).unwrap().dev());
    let line = format!("mount -t fusectl none \"$H\" && echo 1 > \"$H/{connection}/abort\"; umount \"$H\"");
    let control = mount.home().join("control");
    let _ = fs::create_dir(&control);
    let mut command = Command::new("unshare");
    let status = command.args(["--mount", "sh", "-ec", &line]).env("H", &control).status().unwrap();
    assert!(status.success(), "{line}");
}

#[test]
fn an_aborted_connection_is_replaced_once() {
    let mount = Mount::with_dataplane();
    let task = pinned("0-1");
    write(&mount.tasks("dataplane", "0"), task.pid().to_string()).unwrap();
    let supervisor = mount.supervisor();
    let conf = mount.conf();
    let ended = AtomicBool::new(false);
    let errors = std::thread::scope(|scope| {
        let client = scope.spawn(|| {
            let mut errors = BTreeSet::new();
            let deadline = Instant::now() + Duration::from_secs(20);
            while !ended.load(Ordering::Relaxed) && Instant::now() < deadline {
                errors
                    .extend(fs::metadata(conf.join("info/version")).err().map(|error| error.raw_os_error()));
            }
            errors
        });
        abort(&mount);
        until("it is mounted again", || {
            mount.log().contains("mounting again") && fs::read(mount.conf().join("info/version")).is_ok()
        });
        ended.store(true, Ordering::Relaxed);
        client.join().unwrap()
    });
    // On older kernels the directory below is visible for a moment.
    if kernel() >= (6, 5) {
        let known = [Errno::ENOTCONN, Errno::ECONNABORTED].map(|errno| Some(errno as i32));
        assert!(errors.iter().all(|errno| known.contains(errno)), "{errors:?}");
    }
    assert_eq!(mount.tasks_of("dataplane", "0"), task.pid().to_string(), "claims are kept");
    assert_eq!((mount.supervisor(), mount.mounted()), (supervisor, 1));
    assert!(mount.log().contains("the FUSE connection was aborted"), "{}", mount.log());
    // Again: there is an end, and it has a reason.
    abort(&mount);
    until("the daemon has ended", || mount.daemons().is_empty());
    assert_eq!(mount.mounted(), 0);
    assert!(mount.log().contains("the FUSE connection was aborted twice within a minute"), "{}", mount.log());
    mount.start();
    assert_eq!(mount.tasks_of("dataplane", "0"), task.pid().to_string());
}
