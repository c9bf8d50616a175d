//! Containers of a real runtime: podman with runc, whose root file system is busybox. No image is needed.
//!
//! Owns podman, its storage and the specs for it. Does not know what a test checks. podman looks for specs in `/etc/cdi` and
//! `/var/run/cdi` only, so each test has pools with names of its own, and removes its specs.

pub mod pod;
pub mod podman;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::harness::{Cgroup, Mount, run};
use serde_json::Value;

/// Where the specs are: gone after a reboot, whatever a test leaves there.
const SPECS: &str = "/var/run/cdi";

/// A mount whose lists are devices of podman; everything ends when it is dropped.
pub struct Node {
    pub mount: Mount,
    /// The pool with the lists.
    pub pool: String,
    /// Of all containers, so that the daemons of other tests do not look at them.
    cgroup: Cgroup,
}

impl Node {
    /// One with a pool of these lists, whose name begins so.
    pub fn new(name: &str, exclusive: bool, lists: &[&str]) -> Self {
        Self::with(Mount::new(), name, exclusive, lists)
    }

    /// The same on this mount.
    pub fn with(mount: Mount, name: &str, exclusive: bool, lists: &[&str]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let pool = format!("{name}{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        mount.make_pool(&pool, exclusive, lists);
        let node = Self { mount, pool, cgroup: Cgroup::new() };
        let bin = node.root().join("bin");
        fs::create_dir_all(&bin).unwrap();
        let busybox = run(Command::new("sh").args(["-c", "command -v busybox"])).0;
        assert!(!busybox.is_empty(), "this test needs busybox (the package busybox-static)");
        fs::copy(busybox.trim(), bin.join("busybox")).unwrap();
        for name in ["sh", "cat", "grep", "sleep", "echo", "env"] {
            std::os::unix::fs::symlink("busybox", bin.join(name)).unwrap();
        }
        for directory in ["proc", "sys", "dev", "tmp", "etc", "run"] {
            fs::create_dir(node.root().join(directory)).unwrap();
        }
        node.install();
        node
    }

    /// Writes the specs.
    pub fn install(&self) {
        let (_, err, code) = run(&mut self.mount.kcm(&["cdi", "install", "--dir", SPECS]));
        assert_eq!(code, Some(0), "{err}");
    }

    /// The file of the spec of the pool.
    pub fn spec(&self) -> PathBuf {
        Path::new(SPECS).join(format!("{}.json", self.device("").trim_end_matches('=').replace('/', "-")))
    }

    fn root(&self) -> PathBuf {
        self.mount.home().join("root")
    }

    /// A device of the pool, as podman takes it.
    pub fn device(&self, name: &str) -> String {
        let class = if self.pool.starts_with(|c: char| c.is_ascii_digit()) { "pool_" } else { "" };
        format!("kcm.intel.com/{class}{}={name}", self.pool)
    }

    pub fn podman(&self, words: &[&str]) -> Command {
        let mut podman = Command::new("podman");
        for place in ["root", "runroot", "tmpdir"] {
            podman.arg(format!("--{place}={}", self.mount.home().join("podman").join(place).display()));
        }
        podman.args([
            "--runtime=runc",
            "--cgroup-manager=cgroupfs",
            "--storage-driver=vfs",
            "--events-backend=none",
        ]);
        podman.args(words);
        podman
    }

    /// `podman run <options> <root file system> <command>`.
    pub fn container(&self, options: &[&str], command: &[&str]) -> Command {
        let mut podman = self.podman(&["run", "--network=none", "--log-driver=none"]);
        // podman raises limits, which not every machine allows.
        podman.args(["--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024"]);
        podman.arg(format!("--cgroup-parent=/{}", self.cgroup.name())).args(options);
        podman.arg("--rootfs").arg(self.root()).args(command);
        podman
    }

    /// Starts a container with a device, which sleeps. Returns its ID and the PID of its first process.
    pub fn start(&self, device: &str) -> (String, u32) {
        let device = format!("--device={}", self.device(device));
        let (id, err, code) = run(&mut self.container(&["--detach", &device], &["sleep", "1000"]));
        assert_eq!(code, Some(0), "{err}");
        let id = id.trim().to_owned();
        let pid = self.pid(&id);
        (id, pid)
    }

    /// The PID of the first process of a container.
    pub fn pid(&self, id: &str) -> u32 {
        let (out, err, code) = run(&mut self.podman(&["inspect", "--format={{.State.Pid}}", id]));
        assert_eq!(code, Some(0), "{err}");
        out.trim().parse().expect("a PID")
    }

    /// The error of a container with these devices, which is not started.
    pub fn refused(&self, options: &[&str]) -> String {
        let (out, err, code) = run(&mut self.container(options, &["echo", "it runs"]));
        assert!(code.is_some_and(|code| code > 0) && out.is_empty(), "{code:?}: {out}{err}");
        err
    }

    /// The tasks of a list.
    pub fn held(&self, list: &str) -> Vec<u32> {
        crate::harness::held(&self.mount.tasks(&self.pool, list))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.podman(&["rm", "--all", "--force", "--time=0"]).output();
        let _ = self.mount.kcm(&["cdi", "uninstall", "--dir", SPECS]).output();
        // podman keeps a bind mount of its storage.
        let storage = self.mount.home().join("podman/root");
        let _ = Command::new("umount").args(["--lazy", "--recursive"]).arg(storage).output();
    }
}

/// The devices in the spec of a node's pool.
pub fn devices(node: &Node) -> Vec<String> {
    let text = fs::read_to_string(node.spec()).unwrap_or_default();
    let spec: Value = serde_json::from_str(&text).unwrap_or_default();
    let names = spec["devices"].as_array().into_iter().flatten();
    names.map(|device| device["name"].as_str().expect("a name").to_owned()).collect()
}
