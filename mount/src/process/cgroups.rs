//! The cgroups of processes and threads.
//!
//! Owns how they are read and how they became a number in claims. Does not know which cgroups make a process an heir.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};

use super::{Process, Processes, sys};
use crate::model::cgroup::Cgroups;
use crate::model::command::CgroupId;

/// How many cgroups are remembered. A machine has a few hundred; beyond that all are read again.
const REMEMBERED: usize = 512;
/// How often a process that is being moved is looked at again.
const TRIES: usize = 3;

/// The cgroups that were read before, so that most claims need no look at `/proc`. Kernel ids of cgroups are never reused
/// in one boot, and a cgroup of v2 cannot be renamed or moved.
#[derive(Debug, Default)]
pub(super) struct KnownCgroups {
    by_id: Mutex<HashMap<u64, Arc<Cgroups>>>,
    by_text: Mutex<HashMap<Vec<u8>, CgroupId>>,
}

impl Processes {
    /// Returns the cgroups of the process, with a number that identifies them, the same for every daemon of this boot;
    /// `None` if the process has died.
    ///
    /// The number is the kernel's cgroup id if the kernel returns it and there is only cgroup v2. Otherwise it stands
    /// for the paths in `/proc/PID/cgroup`: the kernel's id then covers only one of several hierarchies. The paths are
    /// read there, because the cgroup file systems may not be mounted in the daemon's mount namespace.
    pub(crate) fn cgroup(&self, process: &Process) -> Option<CgroupId> {
        if !self.has_cgroup_ids() {
            return self.cgroup_paths(process).map(|paths| self.by_text(paths));
        }
        let mut number = self.cgroup_id(process)?;
        if let Some(cgroups) = self.known_cgroups.by_id.lock().get(&number) {
            return Some(CgroupId { number, cgroups: Arc::clone(cgroups) });
        }
        for _ in 0..TRIES {
            let cgroups = Arc::new(Cgroups::parse(&self.cgroup_paths(process)?));
            let after = self.cgroup_id(process)?;
            if after == number {
                let mut known = self.known_cgroups.by_id.lock();
                remember(&mut known, number, Arc::clone(&cgroups));
                return Some(CgroupId { number, cgroups });
            }
            number = after;
        }
        Some(CgroupId { number, cgroups: Arc::new(Cgroups::parse(&self.cgroup_paths(process)?)) })
    }

    /// Returns the cgroups of a thread. The number is 0 where it would be the kernel's id, which a pidfd has only of
    /// processes.
    pub(super) fn cgroup_of_thread(&self, pid: u32, tid: u32) -> Option<CgroupId> {
        let text = self.proc.read(&format!("{pid}/task/{tid}/cgroup")).ok().flatten()?;
        let found = self.by_text(text);
        Some(CgroupId { number: if self.has_cgroup_ids() { 0 } else { found.number }, ..found })
    }

    /// Returns the number to use for a claim of `process` in whose record the number of its cgroups is `recorded`.
    ///
    /// Earlier versions recorded another hash of the same paths. It is replaced if it is the hash of the paths that
    /// the process has now; any other number stays, and then no process is known by its cgroup.
    pub(crate) fn upgrade_cgroup(&self, process: &Process, recorded: u64) -> u64 {
        if self.has_cgroup_ids() {
            return recorded;
        }
        let paths = self.cgroup_paths(process).filter(|paths| earlier_path_hash(paths) == recorded);
        paths.map_or(recorded, |paths| path_hash(&paths))
    }

    fn by_text(&self, text: Vec<u8>) -> CgroupId {
        let mut known = self.known_cgroups.by_text.lock();
        if let Some(found) = known.get(&text) {
            return found.clone();
        }
        let found = CgroupId { number: path_hash(&text), cgroups: Arc::new(Cgroups::parse(&text)) };
        remember(&mut known, text, found.clone());
        found
    }

    pub(super) fn has_cgroup_ids(&self) -> bool {
        self.features.info && !self.cgroup_v1
    }

    fn cgroup_id(&self, process: &Process) -> Option<u64> {
        let info = sys::pidfd_info(process.pidfd(), sys::INFO_CGROUP).ok()?;
        (info.mask & sys::INFO_CGROUP != 0).then_some(info.cgroup)
    }

    fn cgroup_paths(&self, process: &Process) -> Option<Vec<u8>> {
        let text = self.proc.read(&format!("{}/cgroup", process.id().pid)).ok().flatten()?;
        process.is_alive().then_some(text)
    }
}

fn remember<K: Eq + std::hash::Hash, V>(known: &mut HashMap<K, V>, key: K, value: V) {
    if known.len() >= REMEMBERED {
        known.clear();
    }
    known.insert(key, value);
}

/// The first 64 bits of the SHA-256 hash of a process's cgroup paths.
///
/// The number decides which process is an heir of a claim that an earlier version recorded, and users choose the paths,
/// for example in a delegated subtree or in a container. So it must be infeasible to find a path with the number of
/// another cgroup; a cryptographic hash needs 2^64 attempts for that. Two own paths with the same number are easier to
/// find, but are of no use: a process could as well stay in one of its own cgroups.
pub(super) fn path_hash(paths: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    bytes.iter_mut().zip(Sha256::digest(paths)).for_each(|(byte, hashed)| *byte = hashed);
    u64::from_le_bytes(bytes)
}

/// The hash of earlier versions: FNV-1a with 64 bits.
pub(super) fn earlier_path_hash(paths: &[u8]) -> u64 {
    paths.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &b| (hash ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}
