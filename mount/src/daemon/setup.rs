//! What every process of the daemon sets up once: signals, log, working directory.
//!
//! Owns: the process-wide settings. Must not know: what the process is for.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::error::MountError;
use crate::clock;

/// Tells a daemon that it runs in the background: it says on its standard output when it serves, and from then
/// on writes to a log.
pub(super) const BACKGROUND: &str = "KCM_MOUNT_BACKGROUND";
/// A log that is larger than this is moved aside at the next start.
const MAX_LOG: u64 = 1 << 20;

static WRITES_TO_LOG: AtomicBool = AtomicBool::new(false);

/// Whether standard error is the daemon's log: there is no person at the other end any more.
#[must_use]
pub fn writes_to_log() -> bool {
    WRITES_TO_LOG.load(Ordering::Relaxed)
}

/// The time as a log shows it: RFC 3339 in UTC, to the millisecond.
#[must_use]
pub fn timestamp() -> String {
    clock::rfc3339_ms(clock::wall_ms())
}

/// From here on nobody else gets the signals that mean something to us.
pub(crate) fn catch_signals() -> Result<SignalFd, MountError> {
    let mut mask = SigSet::empty();
    mask.extend([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGUSR1]);
    let caught = mask.thread_block().and_then(|()| SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC));
    caught.map_err(|errno| MountError::Start(format!("cannot catch signals: {errno}")))
}

/// What a daemon does once: nobody's directory is kept busy, and memory is found elsewhere first.
pub(super) fn settle_in() {
    let _ = nix::unistd::chdir("/");
    nix::sys::stat::umask(nix::sys::stat::Mode::empty());
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-900") {
        log::warn!("/proc/self/oom_score_adj: {error}; the daemon may be killed for memory before others");
    }
}

/// From here on messages have the time before them.
pub(crate) fn log_with_time() {
    WRITES_TO_LOG.store(std::env::var_os(BACKGROUND).is_some(), Ordering::Relaxed);
}

pub(super) fn open_log(path: &Path) -> io::Result<File> {
    if path.metadata().is_ok_and(|log| log.len() > MAX_LOG) {
        let _ = std::fs::rename(path, path.with_extension("old"));
    }
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}
