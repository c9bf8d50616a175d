//! Commands that run again and again (`--interval`).
//!
//! Owns: the beat, and ending cleanly on SIGTERM and SIGINT. Must not know: what is run.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Error};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::os::fd::AsFd as _;

/// Runs `work` once, or every `interval` seconds until it is told to end. One that fails is run again at the
/// next beat: what it needs may come back. A beat that was missed is left out, the next one is on time.
///
/// # Errors
/// Those of `work`, where it runs only once.
pub(super) fn run(interval: f64, mut work: impl FnMut() -> Result<(), Error>) -> Result<ExitCode, Error> {
    if interval == 0.0 {
        return work().map(|()| ExitCode::SUCCESS);
    }
    let interval = Duration::from_secs_f64(interval);
    let mut ends = SigSet::empty();
    ends.extend([Signal::SIGTERM, Signal::SIGINT]);
    let signals = ends.thread_block().and_then(|()| SignalFd::with_flags(&ends, SfdFlags::SFD_CLOEXEC));
    let signals = signals.context("signals cannot be caught")?;
    let mut next = Instant::now();
    loop {
        if let Err(error) = work() {
            match super::one_line(&error) {
                Some(line) => log::error!("{line}"),
                // Nobody reads any more.
                None => return Ok(ExitCode::FAILURE),
            }
        }
        while next <= Instant::now() {
            next += interval;
        }
        // Rounded up: a beat must not come before its time.
        let left = next.saturating_duration_since(Instant::now()).as_millis() + 1;
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        if let Ok(1..) = poll(&mut [PollFd::new(signals.as_fd(), PollFlags::POLLIN)], timeout) {
            return Ok(ExitCode::SUCCESS);
        }
    }
}
