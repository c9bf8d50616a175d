//! The service manager: readiness, and descriptors that it keeps while no daemon process lives.
//!
//! Owns the names under which systemd stores the descriptors (sd_notify(3), `FDSTORE=1`). Does nothing without a
//! service manager.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use sd_notify::NotifyState;

use super::fds::InheritedFds;
use crate::process;

/// The name of the FUSE device in the service manager's store.
const STORED_DEVICE: &str = "kcm-device";
/// The name of the handoff memfd in the store. Older programs look for it under this name.
const STORED_HANDOFF: &str = "kcm-letter";

/// Reports that the mount is served, and stores copies of the descriptors that must outlive this process.
pub(super) fn notify_ready(fds: &InheritedFds) {
    let notified = store(STORED_DEVICE, fds.device.as_fd())
        .and_then(|()| store(STORED_HANDOFF, fds.handoff.as_fd()))
        .and_then(|()| sd_notify::notify(&[NotifyState::Ready]));
    if let Err(error) = notified {
        log::warn!("cannot notify the service manager: {error}");
    }
}

/// Replaces the stored copy.
fn store(name: &str, fd: BorrowedFd<'_>) -> std::io::Result<()> {
    let _ = sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)]);
    sd_notify::notify_with_fds(&[NotifyState::FdStore, NotifyState::FdName(name)], &[fd])
}

/// Takes the descriptors that an earlier supervisor has stored: the device and the handoff memfd.
pub(super) fn take_stored() -> [Option<OwnedFd>; 2] {
    let (mut device, mut handoff) = (None, None);
    let Ok(stored) = sd_notify::listen_fds_with_names() else { return [None, None] };
    for (number, name) in stored {
        let Ok(fd) = process::inherited_fd(number) else { continue };
        match name.as_str() {
            STORED_DEVICE => device = process::dup_above(fd).ok(),
            STORED_HANDOFF => handoff = process::dup_above(fd).ok(),
            _ => {}
        }
    }
    [device, handoff]
}

/// Removes the stored descriptors: the mount ends, and a connection that stays open would keep its clients waiting.
pub(super) fn remove_stored() {
    for name in [STORED_DEVICE, STORED_HANDOFF] {
        let _ = sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)]);
    }
}
