//! The lock of a state directory: one daemon at a time.
//!
//! Owns: the file `lock`, which also says who keeps the mount. It is locked as long as any process of the daemon
//! has it open: the keeper takes it, and every worker inherits it. Must not know: the other files.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use super::{StateError, failed};

/// How long a directory may be in use by a daemon that is just dying.
const PATIENCE: Duration = Duration::from_secs(2);

/// The right to a state directory.
#[derive(Debug)]
pub(crate) struct StateLock(OwnedFd);

impl StateLock {
    /// Takes it for this process and those that inherit it. The directory is made where it is missing.
    ///
    /// # Errors
    /// [`StateError::InUse`], or the file cannot be had.
    pub(crate) fn take(path: &Path) -> Result<Self, StateError> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
        made.map_err(failed(path, "cannot be made"))?;
        let file = path.join("lock");
        let lock = open(&file).map_err(failed(&file, "cannot be opened"))?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Self(lock.into())),
                Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() > deadline => {
                    return Err(StateError::InUse(path.to_path_buf()));
                }
                // A daemon that was killed keeps it for a moment.
                Err(rustix::io::Errno::WOULDBLOCK) => std::thread::sleep(Duration::from_millis(5)),
                Err(errno) => return Err(failed(&file, "cannot be locked")(errno.into())),
            }
        }
    }

    /// The one that was inherited.
    pub(crate) fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// The descriptor that holds the lock.
    pub(crate) fn into_fd(self) -> OwnedFd {
        self.0
    }

    /// Says that this process keeps the mount.
    pub(crate) fn sign(&self) {
        // Always as long, so that nobody ever reads half of it.
        let text = format!("{:<10}\n", std::process::id());
        // A full disk keeps nobody from mounting; only an upgrade will not find us.
        let signed = nix::sys::uio::pwrite(self.0.as_fd(), text.as_bytes(), 0);
        if let Err(errno) = signed {
            log::warn!("the lock of the state directory cannot be signed: {errno}");
        }
    }

    /// The keeper of the mount that uses the directory, if there is one.
    pub(crate) fn holder(path: &Path) -> Option<i32> {
        let file = File::open(path.join("lock")).ok()?;
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Err(rustix::io::Errno::WOULDBLOCK) => io::read_to_string(file).ok()?.trim().parse().ok(),
            _ => None,
        }
    }
}

fn open(file: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).truncate(false).read(true).write(true).mode(0o600).open(file)
}
