//! Locks between programs that use a configuration directory.
//!
//! Owns `KCM_LOCK_TIMEOUT`. Does not know what is done under a lock. Both locks are flock(2), as legacy clients take
//! it, and end with the file descriptor.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Error, bail};
use nix::sys::signal::{SigSet, SigmaskHow};

use super::{ConfDir, file_error};

/// The longest time to wait for a lock, and to hold the directory's; in seconds, a decimal number.
const LOCK_TIMEOUT: &str = "KCM_LOCK_TIMEOUT";
/// The default of `KCM_LOCK_TIMEOUT`, in seconds, as in the legacy kcm.
const DEFAULT_LOCK_TIMEOUT: &str = "30";
/// The interval between attempts on a lock that another process holds: flock(2) has no timeout.
const RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// The lock of a configuration directory. It is released when this is dropped.
#[derive(Debug)]
pub(crate) struct Lock {
    /// Dropping it ends the thread that watches the time.
    _watch: mpsc::Sender<()>,
    _file: File,
}

impl ConfDir {
    /// Takes the lock that legacy clients take. As in the legacy kcm, the program exits if the lock has not been
    /// acquired *and released* within `KCM_LOCK_TIMEOUT`. That includes the time under the lock, so a thread
    /// watches it; a timeout of the acquisition would not be enough.
    ///
    /// # Errors
    /// The file cannot be opened, or the timeout is not a number.
    pub(crate) fn lock(&self) -> Result<Lock, Error> {
        let path = self.path.join("lock");
        let timeout = lock_timeout()?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(&path).map_err(|error| file_error(&path, error))?;
        let (released, watch) = mpsc::channel::<()>();
        // The thread may still run for a moment after the release. It must not receive signals that a command waits
        // for then, so it starts with all of them blocked.
        let mask = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK).map_err(io::Error::from)?;
        std::thread::spawn(move || {
            if watch.recv_timeout(timeout) == Err(RecvTimeoutError::Timeout) {
                log::error!("Lock timed out after {:?} seconds", timeout.as_secs_f64());
                std::process::exit(1);
            }
        });
        mask.thread_set_mask().map_err(io::Error::from)?;
        let started = Instant::now();
        file.lock().map_err(|error| file_error(&path, error))?;
        log::debug!("{}: locked after {:?}", path.display(), started.elapsed());
        Ok(Lock { _watch: released, _file: file })
    }
}

/// Locks `file`, which was opened from `path`, against other kcm processes until it is closed.
///
/// # Errors
/// Another process holds the lock for longer than `KCM_LOCK_TIMEOUT`.
pub(crate) fn lock_file(path: &Path, file: &File) -> Result<(), Error> {
    let timeout = lock_timeout()?;
    let started = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => {
                log::debug!("{}: locked after {:?}", path.display(), started.elapsed());
                return Ok(());
            }
            Err(TryLockError::WouldBlock) if started.elapsed() < timeout => {
                std::thread::sleep(RETRY_INTERVAL);
            }
            Err(TryLockError::WouldBlock) => bail!(
                "{}: locked for {:?} seconds; end the other kcm process that holds it",
                path.display(),
                timeout.as_secs_f64()
            ),
            Err(TryLockError::Error(error)) => return Err(file_error(path, error)),
        }
    }
}

fn lock_timeout() -> Result<Duration, Error> {
    let text = std::env::var(LOCK_TIMEOUT).unwrap_or_else(|_| DEFAULT_LOCK_TIMEOUT.into());
    parse_timeout(&text)
        .with_context(|| format!("{LOCK_TIMEOUT}={text}: not a number of seconds; give one like 30"))
}

fn parse_timeout(text: &str) -> Option<Duration> {
    text.trim().parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_timeout_is_a_number_of_seconds() {
        assert_eq!(parse_timeout("30"), Some(Duration::from_secs(30)));
        assert_eq!(parse_timeout(" 0.5\n"), Some(Duration::from_millis(500)));
        for text in ["", "soon", "-1", "nan", "1e99"] {
            assert_eq!(parse_timeout(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_lock_excludes_other_descriptors_until_it_is_dropped() {
        let home = tempfile::tempdir().unwrap();
        let dir = ConfDir::open(home.path()).unwrap();
        let lock = dir.lock().unwrap();
        let other = File::open(home.path().join("lock")).unwrap();
        assert!(matches!(other.try_lock(), Err(TryLockError::WouldBlock)));
        drop(lock);
        lock_file(&home.path().join("lock"), &other).unwrap();
    }
}
