//! Other ways for a program to claim CPUs: cgroups, and a plain file with a lock.
//!
//! Owns the directories for them, which are removed when dropped. Does not know what is measured.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::client::{OWN, Op};
use crate::common::cgroup;

/// Two cgroups of one hierarchy, to enter and to move between.
pub struct Cgroups {
    /// `tasks` or `cgroup.procs` of the hierarchy's root.
    home: PathBuf,
    file: &'static str,
    dirs: [PathBuf; 2],
}

impl Cgroups {
    /// The cpuset hierarchy of cgroup v1, with one CPU per cgroup; `None` if the machine does not have it.
    pub fn v1() -> Option<Self> {
        let cgroups = Self::new(&hierarchy()?, "tasks")?;
        let cpus = fs::read_to_string(cgroups.home.with_file_name("cpuset.cpus")).ok()?;
        for (dir, cpu) in cgroups.dirs.iter().zip(["0", "1"]) {
            let cpu = if cpus.trim() == "0" { "0" } else { cpu };
            fs::write(dir.join("cpuset.cpus"), cpu).ok()?;
            fs::write(dir.join("cpuset.mems"), "0").ok()?;
        }
        Some(cgroups)
    }

    /// cgroup v2 without controllers, the cheapest hierarchy.
    pub fn v2() -> Option<Self> {
        Self::new(&cgroup::root()?, "cgroup.procs")
    }

    fn new(root: &Path, file: &'static str) -> Option<Self> {
        let dirs = ["a", "b"].map(|name| root.join(format!("kcm-bench-{}-{name}", std::process::id())));
        let cgroups = Self { home: root.join(file), file, dirs };
        cgroups.dirs.iter().try_for_each(fs::create_dir).ok()?;
        Some(cgroups)
    }

    pub fn enter(&self, which: usize) -> Op {
        Op::Put { file: self.dirs[which].join(self.file), text: OWN.into() }
    }

    pub fn enter_open(&self, which: usize) -> Op {
        Op::PutOpen { file: self.dirs[which].join(self.file), text: OWN.into() }
    }

    pub fn leave(&self) -> Op {
        Op::Put { file: self.home.clone(), text: OWN.into() }
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        for dir in &self.dirs {
            // The kernel may count a client for a moment after its end.
            for _ in 0..1000 {
                if fs::remove_dir(dir).is_ok() || !dir.exists() {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        }
    }
}

/// Returns the mount point of the cpuset hierarchy of cgroup v1.
fn hierarchy() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").ok()?;
    let mut fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let is_cpuset = |fields: &Vec<&str>| fields[2] == "cgroup" && fields[3].split(',').any(|o| o == "cpuset");
    fields.find(is_cpuset).map(|fields| PathBuf::from(fields[1]))
}

/// A directory for a plain file with a lock, on a tmpfs or on disk.
pub fn plain(tmpfs: bool) -> Option<TempDir> {
    let parent = if tmpfs { PathBuf::from("/dev/shm") } else { std::env::temp_dir() };
    tempfile::tempdir_in(parent).ok()
}
