//! The lock of a state directory: one daemon at a time.
//!
//! Owns the file `lock`, which also names the supervisor's PID. It stays locked as long as any process of the daemon has
//! it open: the supervisor locks it, and every worker inherits it. Does not know the other files.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use log::warn;

use super::{StateError, failed, trust};

/// How long to wait for a lock that is taken: a daemon that was killed holds it until the kernel has closed its files.
const LOCK_TIMEOUT: Duration = Duration::from_secs(2);
/// How often the lock is tried meanwhile.
const LOCK_INTERVAL: Duration = Duration::from_millis(5);

/// The right to use a state directory.
#[derive(Debug)]
pub(crate) struct StateLock(File);

impl StateLock {
    /// Takes the lock for this process and those that inherit it. Creates the directory if it does not exist.
    ///
    /// # Errors
    /// [`StateError::InUse`], [`StateError::Untrusted`], or the file cannot be created or locked.
    pub(crate) fn take(path: &Path) -> Result<Self, StateError> {
        // Before it is made, so that nothing is made through somebody else's link; and after, now that it exists.
        trust::check_directory(path)?;
        let created = DirBuilder::new().recursive(true).mode(0o700).create(path);
        created.map_err(failed(path, "cannot be made"))?;
        trust::check_directory(path)?;
        let path_of_lock = path.join("lock");
        let file = open(&path_of_lock).map_err(failed(&path_of_lock, "cannot be opened"))?;
        let deadline = Instant::now() + LOCK_TIMEOUT;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Self(file)),
                Err(TryLockError::WouldBlock) if Instant::now() > deadline => {
                    return Err(StateError::InUse(path.to_path_buf()));
                }
                Err(TryLockError::WouldBlock) => std::thread::sleep(LOCK_INTERVAL),
                Err(TryLockError::Error(error)) => {
                    return Err(failed(&path_of_lock, "cannot be locked")(error));
                }
            }
        }
    }

    /// Returns the lock that this process inherited as a descriptor.
    pub(crate) fn from_fd(fd: OwnedFd) -> Self {
        Self(fd.into())
    }

    /// Returns the descriptor that keeps the lock.
    pub(crate) fn into_fd(self) -> OwnedFd {
        self.0.into()
    }

    /// Whether this is the lock of the directory.
    pub(crate) fn is_of(&self, path: &Path) -> bool {
        let identity = |file: std::fs::Metadata| (file.dev(), file.ino());
        let known = std::fs::symlink_metadata(path.join("lock")).map(identity);
        known.is_ok_and(|known| self.0.metadata().map(identity).is_ok_and(|own| own == known))
    }

    /// The directory of the lock, as the kernel names it.
    pub(crate) fn directory(&self) -> Option<PathBuf> {
        let file = std::fs::read_link(format!("/proc/self/fd/{}", self.0.as_raw_fd())).ok()?;
        file.parent().map(Path::to_path_buf)
    }

    /// Writes the PID of this process, the supervisor, into the file.
    pub(crate) fn write_pid(&self) {
        // Always of the same length, so that a reader never sees part of it.
        let text = format!("{:<10}\n", std::process::id());
        // A full or read-only disk must not prevent the mount. Without the PID, only an upgrade does not find the supervisor.
        if let Err(error) = self.0.write_all_at(text.as_bytes(), 0) {
            warn!("the PID cannot be written into the lock of the state directory: {error}");
        }
    }

    /// Returns the PID of the supervisor whose daemon uses the directory, if there is one.
    pub(crate) fn supervisor(path: &Path) -> Option<u32> {
        let file = trust::open(OpenOptions::new().read(true), &path.join("lock")).ok()?;
        match file.try_lock_shared() {
            Err(TryLockError::WouldBlock) => io::read_to_string(file).ok()?.trim().parse().ok(),
            _ => None,
        }
    }
}

fn open(file: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let opened = trust::open(options.create(true).truncate(false).read(true).write(true).mode(0o600), file);
    match opened {
        // flock(2) needs no right to write, and a read-only directory is served too.
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            trust::open(OpenOptions::new().read(true), file).map_err(|_| error)
        }
        opened => opened,
    }
}
