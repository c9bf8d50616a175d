//! In which cgroups processes are, with the paths from the root of the tree.
//!
//! Owns what `/proc` says of that, also in a container. Does not know partitions.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;

use nix::sched::{CloneFlags, setns};

use super::PartitionError;
use crate::text::escaped;

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

/// Whether all threads of a process are in this cgroup.
pub(super) fn are_in(pid: u32, path: &str) -> bool {
    as_seen_from_the_root(|| are_all_in(pid, path))
}

fn are_all_in(pid: u32, path: &str) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().filter_map(Result::ok);
    let mut any = false;
    for thread in threads {
        let file = thread.path().join("cgroup");
        match path_of(&file.to_string_lossy()) {
            Ok(found) if found == path => any = true,
            // It has ended meanwhile.
            Err(PartitionError::Gone) => {}
            _ => return false,
        }
    }
    any
}
