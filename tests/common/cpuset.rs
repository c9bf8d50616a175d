//! A cpuset cgroup (v1), emptied and removed when dropped.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// Where the cpusets of cgroup v1 are.
const ROOT: &str = "/sys/fs/cgroup/cpuset";

pub struct Cpuset(PathBuf);

impl Cpuset {
    /// One with these CPUs.
    pub fn new(cpus: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("kcm-tests-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let cpuset = Self(Path::new(ROOT).join(name));
        fs::create_dir(&cpuset.0).expect("a cpuset of cgroup v1");
        cpuset.set(cpus);
        let memory = fs::read_to_string(Path::new(ROOT).join("cpuset.mems")).expect("cpuset.mems");
        fs::write(cpuset.0.join("cpuset.mems"), memory).expect("cpuset.mems");
        cpuset
    }

    pub fn set(&self, cpus: &str) {
        fs::write(self.0.join("cpuset.cpus"), cpus).expect("cpuset.cpus");
    }

    pub fn take(&self, pid: u32) {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).expect("cgroup.procs");
    }
}

impl Drop for Cpuset {
    fn drop(&mut self) {
        let left = || fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
        super::until("the cpuset is empty", || {
            for pid in left().lines() {
                let _ = fs::write(Path::new(ROOT).join("cgroup.procs"), pid);
            }
            fs::remove_dir(&self.0).is_ok() || !self.0.exists()
        });
    }
}
