//! Which processes are in a partition, and in which cgroup a process is, with the paths from the root of the tree.
//!
//! Owns what `/proc` says of that, also in a container. Does not know how a partition is made.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;

use nix::sched::{CloneFlags, setns};

use super::{PartitionError, Tree};
use crate::model::partition::{Partition, is_below};
use crate::text::escaped;

/// How many cgroups of a container are searched for processes.
const MOST_CGROUPS: usize = 1000;

impl Tree {
    /// Returns the numbers of the threads in the partition, or of the processes if it is a whole cgroup.
    pub(crate) fn members(&self, partition: &Partition) -> Vec<u32> {
        let numbers = |path: &str, name: &str| -> Vec<u32> {
            let text = self.read(path, name).unwrap_or_default();
            text.lines().filter_map(|number| number.parse().ok()).collect()
        };
        let path = partition.path();
        if !partition.is_whole_cgroup {
            return numbers(&path, "cgroup.threads");
        }
        // The programs of a container may make cgroups below, as many as they like.
        let mut members = Vec::new();
        let mut paths = VecDeque::from([path]);
        for _ in 0..MOST_CGROUPS {
            let Some(path) = paths.pop_front() else { break };
            members.extend(numbers(&path, "cgroup.procs"));
            paths.extend(self.children(&path).into_iter().map(|name| format!("{path}/{name}")));
        }
        members
    }

    /// Returns that one of these partitions in which a process is.
    pub(crate) fn partition_of(&self, pid: u32, partitions: &[Partition]) -> Option<Partition> {
        let cgroup = cgroup_of(pid).ok()?;
        let has = |it: &&Partition| {
            if it.is_whole_cgroup { is_below(&cgroup, &it.parent) } else { cgroup == it.path() }
        };
        partitions.iter().find(has).cloned()
    }

    /// Moves a process out of a partition into the cgroup above it.
    ///
    /// # Errors
    /// The error of the kernel.
    pub(crate) fn leave(&self, partition: &Partition, pid: u32) -> io::Result<()> {
        self.write(&partition.parent, "cgroup.procs", &pid.to_string())
    }

    /// Moves a process into a partition.
    ///
    /// # Errors
    /// The error of the kernel.
    pub(crate) fn enter(&self, partition: &Partition, pid: u32) -> io::Result<()> {
        self.write(&partition.path(), "cgroup.procs", &pid.to_string())
    }
}

/// Does work that reads the cgroups of processes with their paths from the root of the tree. In a container, `/proc` shows
/// them from the root of the container's cgroup namespace, so a thread that has joined the node's namespace does it.
fn as_seen_from_the_root<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let namespace =
        |process: &str| fs::metadata(format!("/proc/{process}/ns/cgroup")).map(|it| it.ino()).ok();
    if namespace("1").is_none_or(|root| namespace("self") == Some(root)) {
        return work();
    }
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let joined = File::open("/proc/1/ns/cgroup")
                .and_then(|root| Ok(setns(root, CloneFlags::CLONE_NEWCGROUP)?));
            if let Err(error) = joined {
                log::warn!("the cgroup namespace of the node cannot be joined: {error}");
            }
            work()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Returns the path in a file of `/proc`: empty for the root.
fn path_of(file: &str) -> Result<String, PartitionError> {
    let text = fs::read(file).map_err(|_| PartitionError::Gone)?;
    let unsuitable =
        |path: &[u8], why: &str| PartitionError::Unsuitable { path: escaped(path), why: why.to_owned() };
    let line = text.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"0::"));
    let path = line.ok_or_else(|| unsuitable(b"", "it is in no cgroup of cgroup v2"))?;
    let text = std::str::from_utf8(path).map_err(|_| unsuitable(path, "its path is not UTF-8"))?;
    if text.starts_with("/..") {
        return Err(unsuitable(path, "the daemon is in a cgroup namespace that does not have it"));
    }
    Ok(text.trim_end_matches('/').to_owned())
}

/// Returns the cgroup of a process, empty for the root.
pub(super) fn cgroup_of(pid: u32) -> Result<String, PartitionError> {
    as_seen_from_the_root(|| path_of(&format!("/proc/{pid}/cgroup")))
}

/// Whether all threads of a process are in this cgroup, and not below it.
pub(super) fn are_at(pid: u32, path: &str) -> bool {
    as_seen_from_the_root(|| are_all(pid, |found| found == path))
}

/// Whether all threads of a process are in this cgroup or below it.
pub(super) fn are_in(pid: u32, path: &str) -> bool {
    as_seen_from_the_root(|| are_all(pid, |found| is_below(found, path)))
}

fn are_all(pid: u32, is_there: impl Fn(&str) -> bool) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().filter_map(Result::ok);
    let mut any = false;
    for thread in threads {
        let file = thread.path().join("cgroup");
        match path_of(&file.to_string_lossy()) {
            Ok(found) if is_there(&found) => any = true,
            // It has ended meanwhile.
            Err(PartitionError::Gone) => {}
            _ => return false,
        }
    }
    any
}
