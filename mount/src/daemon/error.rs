//! The daemon's error type.
//!
//! Owns the messages, each with its cure. Does not know when an error occurs.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use crate::journal::StateError;
use crate::text;

/// Why the directory cannot be mounted or unmounted; each message has its cure.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the message is the documentation")]
pub enum MountError {
    #[error("only root can mount {0}; run kcm mount as root")]
    NotRoot(PathBuf),
    #[error("/dev/fuse: {0}; load the module (modprobe fuse), or give the container the device")]
    NoFuse(io::Error),
    #[error("{0}: not an empty directory; import a legacy layout with kcm mount --import, or empty it")]
    NotEmpty(PathBuf),
    #[error(
        "{conf}: not an empty directory: it has {names}, which kcm has not put there; find out who did, remove it, then run \
         kcm mount"
    )]
    Foreign { conf: PathBuf, names: String },
    #[error(
        "{conf}: a symbolic link to {}, not a directory; remove the link, or give the directory itself: --conf-dir={}",
        shown(target),
        shown(target)
    )]
    Link { conf: PathBuf, target: PathBuf },
    #[error(
        "{conf}: not imported and not changed: {count} things (above) cannot be taken over; repair them, or leave them out: \
         kcm mount --import=partial"
    )]
    NotImported { conf: PathBuf, count: usize },
    #[error("{0}: already mounted; run kcm unmount first")]
    AlreadyMounted(PathBuf),
    #[error(
        "{0}: mounted, but its daemon does not answer; kill the daemon, then kcm mount takes the mount over"
    )]
    NotAnswering(PathBuf),
    #[error("{0}: not mounted; nothing to do")]
    NotMounted(PathBuf),
    #[error("{state}: is inside {conf}, which would hide it; choose another --state-dir")]
    StateInside { state: PathBuf, conf: PathBuf },
    #[error(transparent)]
    State(#[from] StateError),
    // The cause is part of the message, before the cure. As the source it would be printed again after the cure.
    #[error("{path}: {what}: {cause}; {cure}")]
    Io { path: PathBuf, what: &'static str, cause: io::Error, cure: &'static str },
    #[error("{conf}: its daemon uses the state directory {used}; give --state-dir={used}")]
    OtherState { conf: PathBuf, used: PathBuf },
    #[error("{conf}: detached here, but PID {pid} still serves it in another mount namespace; stop it there")]
    ServedElsewhere { conf: PathBuf, pid: u32 },
    #[error("{conf}: detached, but its daemon, PID {pid}, does not exit; kill it")]
    StillServed { conf: PathBuf, pid: u32 },
    #[error(
        "{0}: the FUSE connection was aborted twice within a minute; look for who writes to \
         /sys/fs/fuse/connections/*/abort, raise fs.fuse.max_request_timeout, then run kcm mount"
    )]
    Aborted(PathBuf),
    #[error("{name} is {now}, but must be {least}; raise it (ulimit -{letter}, or Limit...= of the service)")]
    Limit { name: &'static str, letter: char, now: u64, least: String },
    #[error(
        "the daemon lacks {name}, without which it cannot {purpose}; give it to its service or container \
         (CapabilityBoundingSet=, --cap-add)"
    )]
    Lacks { name: &'static str, purpose: &'static str },
    #[error("cannot start: {0}")]
    Start(String),
    #[error("not upgraded, the old daemon continues: {0}")]
    NotUpgraded(String),
    /// The daemon in the background has printed its message.
    #[error("the daemon did not start; see its message above")]
    Background,
    /// The command line of a daemon process is wrong; only this program writes such command lines.
    #[error("kcm __daemon: {0}; this command is for the daemon itself, use kcm mount")]
    Usage(String),
}

/// How many names a message has.
const NAMES: usize = 3;

impl MountError {
    /// The error about a mount point with entries that others have put there.
    pub(super) fn foreign(conf_dir: &Path, names: &[OsString]) -> Self {
        let mut shown: Vec<String> =
            names.iter().take(NAMES).map(|name| text::name(name.as_bytes()).into_owned()).collect();
        if names.len() > NAMES {
            shown.push(format!("{} more", names.len() - NAMES));
        }
        Self::Foreign { conf: conf_dir.to_path_buf(), names: shown.join(", ") }
    }
}

/// A path that somebody else has chosen.
fn shown(path: &Path) -> String {
    text::one_line(&path.to_string_lossy()).into_owned()
}

/// An error of the operating system at `path`, with the cure that fits its errno.
pub(super) fn io_error(path: &Path, what: &'static str, cause: io::Error) -> MountError {
    let cure = match cause.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EPERM | Errno::EACCES) => "run as root, and check the directory's owner and mode",
        Some(Errno::ENOSPC) => "make room on the disk",
        Some(Errno::EBUSY) => "something is mounted there or uses it; end that first",
        Some(Errno::ENOTDIR | Errno::EEXIST) => "give a directory",
        Some(Errno::ENOENT) => "check the path",
        _ => "the kernel's log may say more",
    };
    MountError::Io { path: path.to_path_buf(), what, cause, cure }
}
