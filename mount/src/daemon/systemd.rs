//! The service manager: it is told, and it holds what must outlive us.
//!
//! Owns: the names under which it holds our descriptors. Where there is none, nothing happens.

use std::os::fd::{AsFd as _, OwnedFd};

use sd_notify::NotifyState;

use super::fds::Held;
use crate::process;

/// The names of our descriptors in the service manager's store.
const STORED_DEVICE: &str = "kcm-device";
const STORED_LETTER: &str = "kcm-letter";

/// Says that the mount is served, and gives away a copy of what must outlive us.
pub(super) fn say_ready(held: &Held) {
    let Held { device, letters, .. } = held;
    let hold = |name, fd| {
        let _ = sd_notify::notify(false, &[NotifyState::FdStoreRemove, NotifyState::FdName(name)]);
        sd_notify::notify_with_fds(false, &[NotifyState::FdStore, NotifyState::FdName(name)], &[fd])
    };
    let told = hold(STORED_DEVICE, device.as_fd())
        .and_then(|()| hold(STORED_LETTER, letters.as_fd()))
        .and_then(|()| sd_notify::notify(false, &[NotifyState::Ready]));
    if let Err(error) = told {
        log::warn!("the service manager cannot be told: {error}");
    }
}

/// What an earlier keeper has given away: the device and the letter.
pub(super) fn take_stored() -> [Option<OwnedFd>; 2] {
    let (mut device, mut letter) = (None, None);
    let Ok(stored) = sd_notify::listen_fds_with_names(true) else { return [None, None] };
    for (number, name) in stored {
        let Ok(fd) = process::inherited_fd(number) else { continue };
        match name.as_str() {
            STORED_DEVICE => device = process::dup_above(fd).ok(),
            STORED_LETTER => letter = process::dup_above(fd).ok(),
            _ => {}
        }
    }
    [device, letter]
}

/// The mount ends: held on, its connection would keep its clients waiting for ever.
pub(super) fn forget_stored() {
    for name in [STORED_DEVICE, STORED_LETTER] {
        let _ = sd_notify::notify(false, &[NotifyState::FdStoreRemove, NotifyState::FdName(name)]);
    }
}
