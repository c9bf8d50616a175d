//! The settings that a daemon process makes once: signals, log, working directory, umask, priorities.
//!
//! Owns the process-wide settings. Does not know what the process is for.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::Mode;

use super::error::MountError;
use crate::clock;
use crate::journal::trust;
use crate::process;

/// The environment variable that tells a daemon process that it runs in the background: it reports on standard
/// output when it serves, and from then on writes to the daemon log.
pub(super) const BACKGROUND: &str = "KCM_MOUNT_BACKGROUND";
/// A daemon log that is larger than this (in bytes) is renamed at the next start, so that the two files stay small
/// enough to read.
const MAX_LOG: u64 = 1 << 20;
/// The OOM killer's score adjustment (proc(5), from -1000): prefer any other process, but stay killable.
const OOM_SCORE_ADJ: &str = "-900";

/// Others may not write to what the daemon makes.
const UMASK: Mode = Mode::from_bits_truncate(0o022);

static WRITES_TO_LOG: AtomicBool = AtomicBool::new(false);

/// Whether standard error is the daemon log, and not a terminal or a service manager.
#[must_use]
pub fn writes_to_log() -> bool {
    WRITES_TO_LOG.load(Ordering::Relaxed)
}

/// The current time in UTC in the format of RFC 3339, with milliseconds.
#[must_use]
pub fn timestamp() -> String {
    clock::rfc3339(clock::wall_ms())
}

/// Whether this process was started in the background.
pub(super) fn is_in_background() -> bool {
    std::env::var_os(BACKGROUND).is_some()
}

/// Blocks the signals that control the daemon and returns the descriptor that reads them.
///
/// # Errors
/// The system has no descriptors left.
pub(super) fn catch_signals() -> Result<SignalFd, MountError> {
    let start = |cause: &dyn std::fmt::Display| MountError::Start(format!("cannot catch signals: {cause}"));
    // If it is ignored, the kernel collects children itself, and nobody learns how they ended.
    process::reset_sigchld().map_err(|error| start(&error))?;
    let mut mask = SigSet::empty();
    mask.extend([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGUSR1]);
    // Blocked only, not read: a write beyond a limit fails with EFBIG, and kills nobody. Threads inherit it.
    let mut ignored = SigSet::empty();
    ignored.extend([Signal::SIGXFSZ, Signal::SIGXCPU]);
    let caught = ignored
        .thread_block()
        .and_then(|()| mask.thread_block())
        .and_then(|()| SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC));
    caught.map_err(|errno| start(&errno))
}

/// Resets what this process has inherited from its starter and what would change the daemon, before it makes files.
pub(super) fn reset_inherited() {
    // Only the mount point depends on it; files of the state directory have modes of their own.
    nix::sys::stat::umask(UMASK);
    if let Err(error) = process::raise_low_priority() {
        log::warn!("the low priority of the daemon stays: {error}; clients wait for it on a busy machine");
    }
}

/// Prepares this process for a long life.
pub(super) fn init_process() {
    // Do not keep the file system of the current directory busy.
    let _ = nix::unistd::chdir("/");
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ) {
        log::warn!("/proc/self/oom_score_adj: {error}; the daemon may be killed for memory before others");
    }
}

/// Prefixes messages with the time, if standard error is the daemon log.
pub(super) fn log_with_time() {
    WRITES_TO_LOG.store(is_in_background(), Ordering::Relaxed);
}

/// Opens the daemon log for appending.
///
/// # Errors
/// The file cannot be opened.
pub(super) fn open_log(path: &Path) -> io::Result<File> {
    if path.symlink_metadata().is_ok_and(|log| log.len() > MAX_LOG) {
        let _ = std::fs::rename(path, path.with_extension("old"));
    }
    trust::open(OpenOptions::new().create(true).append(true).mode(0o600), path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_log_is_renamed_and_a_small_one_is_continued() {
        use std::io::Write as _;
        let directory = tempfile::tempdir().unwrap();
        let (path, old) = (directory.path().join("log"), directory.path().join("log.old"));
        std::fs::write(&path, "first\n").unwrap();
        open_log(&path).unwrap().write_all(b"second\n").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "first\nsecond\n");
        File::options().write(true).open(&path).unwrap().set_len(MAX_LOG + 1).unwrap();
        open_log(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
        assert_eq!(std::fs::metadata(&old).unwrap().len(), MAX_LOG + 1);
    }
}
