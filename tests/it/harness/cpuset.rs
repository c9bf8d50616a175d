//! A cpuset cgroup of version 1.

use std::fs;

use super::Cgroup;

const ROOT: &str = "/sys/fs/cgroup/cpuset";

/// Killed and removed when dropped.
pub struct Cpuset(Cgroup);

impl Cpuset {
    /// One with these CPUs.
    pub fn new(cpus: &str) -> Self {
        let cpuset = Self(Cgroup::new(ROOT));
        cpuset.set(cpus);
        cpuset
            .0
            .write("cpuset.mems", &fs::read_to_string(format!("{ROOT}/cpuset.mems")).expect("cpuset.mems"));
        cpuset
    }

    pub fn set(&self, cpus: &str) {
        self.0.write("cpuset.cpus", cpus);
    }

    /// Takes a process in.
    pub fn take(&self, pid: u32) {
        self.0.add(pid);
    }
}
