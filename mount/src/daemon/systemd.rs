//! The service manager: readiness, and descriptors that it keeps while no daemon process lives.
//!
//! Owns the names under which systemd stores the descriptors (sd_notify(3), `FDSTORE=1`). Does nothing without a
//! service manager.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use sd_notify::NotifyState;

use super::fds::{HandoffMemfd, InheritedFds};
use crate::process::{self, KeptPidfds};

/// The names in the service manager's store: the FUSE device, the handoff memfd, and the kept pidfds. Older programs look
/// for the first two under these names.
const STORED: [&str; 3] = ["kcm-device", "kcm-letter", "kcm-pidfds"];

/// The descriptors that an earlier supervisor has stored.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) device: OwnedFd,
    pub(super) handoff: HandoffMemfd,
    /// An older program does not store it.
    pub(super) kept: Option<KeptPidfds>,
}

/// Reports that the mount is served. Stores copies of the descriptors that must outlive this process, if a later process
/// can continue the mount: otherwise a connection that stays open would keep its clients waiting.
pub(super) fn notify_ready(fds: &InheritedFds, can_continue: bool) {
    let fds = [fds.device.as_fd(), fds.handoff.as_fd(), fds.kept.as_fd()];
    let stored = STORED.into_iter().zip(fds).try_for_each(|(name, fd)| {
        remove(name);
        if can_continue { store(name, fd) } else { Ok(()) }
    });
    if let Err(error) = stored.and_then(|()| sd_notify::notify(&[NotifyState::Ready])) {
        log::warn!("cannot notify the service manager: {error}");
    }
}

fn store(name: &str, fd: BorrowedFd<'_>) -> std::io::Result<()> {
    sd_notify::notify_with_fds(&[NotifyState::FdStore, NotifyState::FdName(name)], &[fd])
}

fn remove(name: &str) {
    let _ = sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)]);
}

/// Takes the descriptors that an earlier supervisor has stored.
pub(super) fn take_stored() -> [Option<OwnedFd>; 3] {
    let mut taken = [const { None }; 3];
    let Ok(stored) = sd_notify::listen_fds_with_names() else { return taken };
    for (number, name) in stored {
        let Ok(fd) = process::inherited_fd(number) else { continue };
        let at = STORED.iter().position(|known| *known == name);
        if let Some(place) = at.and_then(|at| taken.get_mut(at)) {
            *place = process::dup_above(fd).ok();
        }
    }
    taken
}

impl Stored {
    /// The descriptors of [`take_stored`]; `None` if they are not enough to continue a mount.
    pub(super) fn from_taken([device, handoff, kept]: [Option<OwnedFd>; 3]) -> Option<Self> {
        let kept = kept.and_then(KeptPidfds::from_fd);
        Some(Self { device: device?, handoff: HandoffMemfd::from_fd(handoff?), kept })
    }
}

/// Removes the stored descriptors: the mount ends, and a connection that stays open would keep its clients waiting.
pub(super) fn remove_stored() {
    STORED.into_iter().for_each(remove);
}
