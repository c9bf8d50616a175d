//! The daemon's error type.
//!
//! Owns: the messages of the daemon's errors. Must not know: when they occur.

use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use crate::journal::StateError;

/// Why the directory cannot be mounted or unmounted; each with its cure.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the message says it")]
pub enum MountError {
    #[error("only root can mount {0}; run kcm mount as root")]
    NotRoot(PathBuf),
    #[error("/dev/fuse: {0}; load the module (modprobe fuse), or give the container the device")]
    NoFuse(io::Error),
    #[error("{0}: not an empty directory; kcm mount --import takes a layout of 2017 over, else empty it")]
    NotEmpty(PathBuf),
    #[error("{0}: already mounted; kcm unmount ends that first")]
    AlreadyMounted(PathBuf),
    #[error(
        "{0}: mounted, but its daemon does not answer; kill the daemon, then kcm mount takes the mount over"
    )]
    NotAnswering(PathBuf),
    #[error("{0}: not mounted; nothing to do")]
    NotMounted(PathBuf),
    #[error("{state}: lies inside {conf}, which it would be hidden by; give another --state-dir")]
    StateInside { state: PathBuf, conf: PathBuf },
    #[error(transparent)]
    State(#[from] StateError),
    // The cause stands before the cure; as the source it would be told once more behind it.
    #[error("{path}: {what}: {cause}; {cure}")]
    Io { path: PathBuf, what: &'static str, cause: io::Error, cure: &'static str },
    #[error("{0}: detached here, but its daemon goes on, perhaps in another mount namespace; stop it there")]
    StillServed(PathBuf),
    #[error("cannot start: {0}")]
    Start(String),
    #[error("not upgraded, the old daemon goes on: {0}")]
    NotUpgraded(String),
    /// The daemon in the background has said why.
    #[error("the daemon did not start; its message stands above")]
    Background,
}

pub(crate) fn at(path: &Path, what: &'static str, cause: io::Error) -> MountError {
    let cure = match cause.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EPERM | Errno::EACCES) => "do it as root, and look at the directory's owner and mode",
        Some(Errno::ENOSPC) => "make room on the disk",
        Some(Errno::EBUSY) => "something is mounted there or uses it; end that first",
        Some(Errno::ENOTDIR | Errno::EEXIST) => "give a directory",
        Some(Errno::ENOENT) => "look at the path",
        _ => "the kernel's log may say more",
    };
    MountError::Io { path: path.to_path_buf(), what, cause, cure }
}
