//! What `kcm uninstall` has to know about a daemon, and the removal of its state directory.
//!
//! Owns the question who serves a mount point, without changing anything. Does not know what else is installed.

use std::fs;
use std::path::{Path, PathBuf};

use super::error::{MountError, io_error};
use super::{fds, identity};
use crate::journal::{StateLock, trust};
use crate::mountpoint::{self, Status};

/// The daemon of a mount point, as far as this process can see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Served {
    /// Nothing is mounted there.
    No,
    /// A daemon has died and left its mount.
    Stale,
    /// A daemon of this mount namespace, with this state directory.
    Here(Option<PathBuf>),
    /// A daemon of another mount namespace, or one that this process may not examine.
    Elsewhere,
}

/// Returns who serves the directory.
///
/// # Errors
/// It cannot be examined, or its daemon does not answer.
pub fn served(conf_dir: &Path) -> Result<Served, MountError> {
    let failed = |source| io_error(conf_dir, "cannot be examined", source);
    match mountpoint::status(conf_dir).map_err(failed)? {
        Status::Absent | Status::Plain | Status::Marked => return Ok(Served::No),
        Status::Stale => return Ok(Served::Stale),
        Status::NotAnswering => return Err(MountError::NotAnswering(conf_dir.to_path_buf())),
        Status::Live => {}
    }
    let Some(mounted) = mountpoint::topmost(conf_dir).map_err(failed)? else { return Ok(Served::No) };
    let servers = identity::servers(mounted.connection, &mountpoint::resolved(conf_dir));
    let is_elsewhere = |server: &identity::Server| mountpoint::is_elsewhere(server.pid, mounted.connection);
    if servers.is_empty() || servers.iter().any(is_elsewhere) {
        return Ok(Served::Elsewhere);
    }
    let state_of = |server: &identity::Server| {
        let lock = fs::read_link(format!("/proc/{}/fd/{}", server.pid, fds::LOCK)).ok()?;
        lock.parent().map(Path::to_path_buf)
    };
    Ok(Served::Here(servers.iter().find_map(state_of)))
}

/// Removes the files of a state directory that no daemon uses, and the directory. Returns whether it is gone: it stays if it
/// has files that are not kcm's.
///
/// # Errors
/// A daemon uses it, or somebody other than root can change it.
pub fn remove_state(state_dir: &Path) -> Result<bool, MountError> {
    // Held until all is removed, so that no daemon begins to use the directory.
    let _lock = StateLock::take(state_dir)?;
    let removed = trust::remove(state_dir);
    Ok(removed.is_ok())
}
