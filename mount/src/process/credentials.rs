//! The capabilities of processes, and the user namespaces in which they count.
//!
//! Owns these questions to the kernel. Does not know which operation needs which capability.
//!
//! A capability counts in the user namespace of its process and in those below it (user_namespaces(7)). A thread that
//! waits for the answer to its request cannot change its credentials meanwhile.

use std::os::fd::{AsFd as _, OwnedFd};

use nix::fcntl::OFlag;
use nix::sys::stat::fstat;
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::{Process, Processes, sys};
use crate::model::rights::User;

/// The kernel nests no more user namespaces (user_namespaces(7)).
const MAX_NESTED: usize = 33;

impl Processes {
    /// Returns the user on whose behalf a thread asks, with the capabilities that the thread has now. One system call
    /// for a thread without capabilities, two for root.
    ///
    /// The capabilities of a user other than root count only if the user is the thread's effective uid: a server that
    /// acts for its client (setfsuid(2)) has kept its own capabilities, and the client has no right to them.
    pub(crate) fn user(&self, tid: u32, uid: u32) -> User {
        let nobody = User::without_capabilities(uid);
        let Some(sets) = capabilities(tid).filter(|sets| !sets.permitted.is_empty()) else { return nobody };
        if uid != 0 && !self.acts_for_itself(tid, uid) {
            return nobody;
        }
        let has = |capability| sets.effective.contains(capability);
        let (admin, nice) = (has(CapabilitySet::SYS_ADMIN), has(CapabilitySet::SYS_NICE));
        let count = (admin || nice) && self.is_in_our_user_namespace(tid);
        User { uid, admin: admin && count, nice: nice && count, permitted: sets.permitted.bits() }
    }

    /// Returns whether a thread has `CAP_SYS_NICE` over a process in a user namespace below the daemon's: because it
    /// has the capability in that namespace or above it, or because it owns that namespace from above.
    pub(crate) fn is_covered(&self, tid: u32, uid: u32, target: &Process) -> bool {
        let Some(sets) = capabilities(tid) else { return false };
        if uid != 0 && !self.acts_for_itself(tid, uid) {
            return false;
        }
        let Some(own) = self.user_namespace(tid).and_then(|fd| inode(&fd)) else { return false };
        let has_capability = sets.effective.contains(CapabilitySet::SYS_NICE);
        let Some(mut namespace) = self.user_namespace(target.id().pid.get()) else { return false };
        for _ in 0..MAX_NESTED {
            let Some(ino) = inode(&namespace) else { return false };
            if ino == own {
                return has_capability && target.is_alive();
            }
            // The kernel shows no namespace above the daemon's.
            let Ok(parent) = sys::parent_namespace(namespace.as_fd()) else { return false };
            let is_owner = || sys::owner_of_user_namespace(namespace.as_fd()).is_ok_and(|owner| owner == uid);
            if inode(&parent) == Some(own) && is_owner() {
                return target.is_alive();
            }
            namespace = parent;
        }
        false
    }

    /// Returns the permitted capabilities of a process; all if it has gone, so that nobody may.
    pub(crate) fn permitted(&self, process: &Process) -> u64 {
        let sets = capabilities(process.id().pid.get()).filter(|_| process.is_alive());
        sets.map_or(u64::MAX, |sets| sets.permitted.bits())
    }

    fn acts_for_itself(&self, tid: u32, uid: u32) -> bool {
        let status = self.proc.status(tid).ok().flatten();
        status.is_some_and(|status| status.numbers("Uid").get(1) == Some(&uid))
    }

    fn is_in_our_user_namespace(&self, tid: u32) -> bool {
        self.user_namespace.is_none() || self.proc.link(&format!("{tid}/ns/user")) == self.user_namespace
    }

    fn user_namespace(&self, tid: u32) -> Option<OwnedFd> {
        self.proc.open(&format!("{tid}/ns/user"), OFlag::O_RDONLY).ok().flatten()
    }
}

fn capabilities(tid: u32) -> Option<CapabilitySets> {
    // 0 would be this process.
    let tid = i32::try_from(tid).ok().and_then(rustix::process::Pid::from_raw)?;
    rustix::thread::capabilities(Some(tid)).ok()
}

fn inode(fd: &OwnedFd) -> Option<u64> {
    fstat(fd).ok().map(|stat| stat.st_ino)
}
