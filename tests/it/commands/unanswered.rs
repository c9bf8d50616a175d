//! A mount that does not answer: every command ends after a few seconds with one line, also if the daemon has read the
//! request and the kernel lets nobody kill who waits for the answer.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::harness::{Mount, kcm_for, run};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::Value;

/// The bound of the commands, and what a loaded machine adds.
const MOST: Duration = Duration::from_secs(12);

/// A daemon that reads every request and never answers one, except for the handshake.
struct Silent {
    home: tempfile::TempDir,
    /// Closing it ends the connection.
    _device: File,
}

impl Silent {
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        let device = File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        mount(Some("kcm"), home.path(), Some("fuse.kcm"), MsFlags::MS_NODEV, Some(options.as_str())).unwrap();
        let mut requests = device.try_clone().unwrap();
        std::thread::spawn(move || {
            let mut request = vec![0; 1 << 20];
            assert!(requests.read(&mut request).unwrap() >= 80, "FUSE_INIT");
            // struct fuse_out_header and struct fuse_init_out (linux/fuse.h).
            let mut answer = vec![0; 80];
            answer[..4].copy_from_slice(&80_u32.to_ne_bytes());
            answer[8..16].copy_from_slice(&request[8..16]);
            answer[16..20].copy_from_slice(&7_u32.to_ne_bytes());
            answer[20..24].copy_from_slice(&31_u32.to_ne_bytes());
            answer[36..40].copy_from_slice(&4096_u32.to_ne_bytes());
            requests.write_all(&answer).unwrap();
            while requests.read(&mut request).is_ok() {}
        });
        Self { home, _device: device }
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        // Ends the connection, so that nobody waits any longer.
        let _ = umount2(self.home.path(), MntFlags::MNT_FORCE);
        let _ = umount2(self.home.path(), MntFlags::MNT_DETACH);
    }
}

fn every_command_ends(conf: &Path) {
    let commands: &[&[&str]] = &[
        &["describe"],
        &["top", "--once"],
        &["reconcile"],
        &["isolate", "--pool=dataplane", "true"],
        &["isolate", "--pool=dataplane", "--wait", "true"],
        &["init"],
        &["discover", "--node=n"],
        &["uninstall", "--install-dir=/nowhere", "--systemd=/nowhere", "--share-dir=/nowhere"],
        &["node-report"],
    ];
    std::thread::scope(|scope| {
        for words in commands {
            scope.spawn(move || {
                let started = Instant::now();
                let (out, err, code) = run(&mut kcm_for(conf, words));
                assert!(started.elapsed() < MOST, "{words:?}: {:?}", started.elapsed());
                if words == &["node-report"] {
                    let report: Value = serde_json::from_str(&out).unwrap();
                    assert_eq!(
                        report["checks"]["mount"]["errors"][0],
                        "kcm mount does not answer; look at its log"
                    );
                    return;
                }
                let last = err.lines().last().unwrap_or_default();
                let expected = format!("ERROR:root:{}: kcm mount does not answer; ", conf.display());
                assert!(last.starts_with(&expected), "{words:?}: {err}");
                assert_eq!((out.as_str(), code), ("", Some(1)), "{words:?}: {err}");
            });
        }
    });
}

#[test]
fn every_command_ends_if_the_daemon_is_stopped() {
    let mount = Mount::with_dataplane();
    let paused = mount.pause();
    every_command_ends(&mount.conf());
    drop(paused);
    assert_eq!(mount.read("pools/dataplane/exclusive"), "1\n");
    assert_eq!(fs::read_to_string(mount.tasks("dataplane", "0")).unwrap(), "");
}

#[test]
fn every_command_ends_if_its_request_was_read_and_not_answered() {
    let silent = Silent::new();
    every_command_ends(silent.home.path());
}
