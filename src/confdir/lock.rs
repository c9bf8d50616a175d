//! Locks between programs that use a configuration directory.
//!
//! Owns `KCM_LOCK_TIMEOUT`. Does not know what is done under a lock. Both locks are flock(2), as legacy clients take
//! it, and end with the file descriptor.

use std::fs::{File, Metadata, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Error, bail};
use kcm_mount::plain::{self, Access};
use kcm_mount::procfs::ProcFs;
use nix::sys::signal::{SigSet, SigmaskHow};

use super::{ConfDir, file_error};

/// The longest time to wait for a lock, and to hold the directory's; in seconds, a decimal number.
const LOCK_TIMEOUT: &str = "KCM_LOCK_TIMEOUT";
/// The default of `KCM_LOCK_TIMEOUT`, in seconds, as in the legacy kcm.
const DEFAULT_LOCK_TIMEOUT: &str = "30";
/// The interval between attempts on a lock that another process holds: flock(2) has no timeout.
const RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// The time after which a command that waits for the lock names its holder. Programs hold it for milliseconds.
const PATIENCE: Duration = Duration::from_secs(1);

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
        let file = plain::open(&self.path, &["lock".as_ref()], Access::Create)
            .map_err(|error| file_error(&path, error))?;
        let waiting = Arc::new(Waiting {
            path: path.clone(),
            file: file.metadata().ok(),
            ended: AtomicBool::new(false),
        });
        let started = Instant::now();
        let (released, watch) = mpsc::channel::<()>();
        // The thread may still run for a moment after the release. It must not receive signals that a command waits
        // for then, so it starts with all of them blocked.
        let mask = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK).map_err(io::Error::from)?;
        let watched = Arc::clone(&waiting);
        std::thread::spawn(move || {
            let is_held = |time| watch.recv_timeout(time) == Err(RecvTimeoutError::Timeout);
            if timeout > PATIENCE && is_held(PATIENCE) {
                watched.warn();
            }
            // If it was released, the channel is closed.
            if is_held(timeout.saturating_sub(started.elapsed())) {
                log::error!("Lock timed out after {:?} seconds", timeout.as_secs_f64());
                std::process::exit(1);
            }
        });
        mask.thread_set_mask().map_err(io::Error::from)?;
        let locked = file.lock();
        waiting.ended.store(true, Ordering::Relaxed);
        locked.map_err(|error| file_error(&path, error))?;
        log::debug!("{}: locked after {:?}", path.display(), started.elapsed());
        Ok(Lock { _watch: released, _file: file })
    }
}

/// A wait for the lock.
struct Waiting {
    path: PathBuf,
    file: Option<Metadata>,
    ended: AtomicBool,
}

impl Waiting {
    /// Says who holds the lock, unless the wait has ended.
    fn warn(&self) {
        if self.ended.load(Ordering::Relaxed) {
            return;
        }
        let holder = self.file.as_ref().and_then(holder).unwrap_or_else(|| "another process".into());
        // The legacy kcm makes the file with mode 0644.
        let is_open = self.file.as_ref().is_some_and(|file| file.mode() & 0o044 != 0);
        let cure = if is_open { "; whoever may read this file can hold it: chmod 600" } else { "" };
        log::warn!("{}: {holder} holds it{cure}", self.path.display());
    }
}

/// Returns the PID and the name of the process that has locked a file, as far as this process may see it.
fn holder(file: &Metadata) -> Option<String> {
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    let pid = holder_in(&locks, file)?;
    let program = ProcFs::new().ok().and_then(|proc| proc.program_name(pid));
    Some(program.map_or_else(|| pid.to_string(), |program| format!("{pid} ({program})")))
}

/// Returns the PID in the line of `/proc/locks` (proc_locks(5)) about a lock on the file that is held. The PID is 0 for a
/// process outside the PID namespace.
fn holder_in(locks: &str, file: &Metadata) -> Option<u32> {
    let (major, minor) = (libc::major(file.dev()), libc::minor(file.dev()));
    let id = format!("{major:02x}:{minor:02x}:{}", file.ino());
    locks.lines().find_map(|line| {
        // A process that waits has `->` in its line.
        match line.split_whitespace().skip(1).collect::<Vec<_>>()[..] {
            ["FLOCK", _, _, pid, locked, ..] if locked == id => pid.parse().ok().filter(|&pid| pid != 0),
            _ => None,
        }
    })
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
            Err(TryLockError::WouldBlock) => {
                let holder = file.metadata().ok().as_ref().and_then(holder);
                let holder = holder.unwrap_or_else(|| "the other kcm process that holds it".into());
                bail!("{}: locked for {:?} seconds; end {holder}", path.display(), timeout.as_secs_f64())
            }
            Err(TryLockError::Error(error)) => return Err(file_error(path, error)),
        }
    }
}

/// Returns the value of `KCM_LOCK_TIMEOUT`.
///
/// # Errors
/// It is not a number of seconds.
pub(crate) fn lock_timeout() -> Result<Duration, Error> {
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
        let held = holder(&other.metadata().unwrap()).unwrap();
        assert!(held.starts_with(&format!("{} (", std::process::id())), "{held}");
        drop(lock);
        lock_file(&home.path().join("lock"), &other).unwrap();
    }
}
