//! Commands that run periodically (`--interval`).
//!
//! Owns the timing, and the clean exit on SIGTERM and SIGINT. Does not know what runs.

use std::os::fd::AsFd as _;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Error};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::deadline::Deadline;
use super::output;
use crate::cli::Repeat;

/// Runs `work` once, or periodically until SIGTERM or SIGINT. A periodic run that fails is logged and does not
/// end the loop: what it needs may come back. Runs that were missed are skipped, so that the next one is on time.
///
/// # Errors
/// The error of `work`, if it runs only once.
pub(crate) fn run(repeat: Repeat, mut work: impl FnMut() -> Result<(), Error>) -> Result<ExitCode, Error> {
    run_with_end(repeat, |_| work())
}

/// The same for work that waits meanwhile, and looks whether it should end.
///
/// # Errors
/// As for [`run`].
pub(crate) fn run_with_end(
    repeat: Repeat,
    mut work: impl FnMut(&End) -> Result<(), Error>,
) -> Result<ExitCode, Error> {
    let Repeat::Every(interval) = repeat else {
        return work(&End(None)).map(|()| ExitCode::SUCCESS);
    };
    let end = End::on_signals()?;
    let start = Instant::now();
    loop {
        if let Err(error) = work(&end) {
            match output::display_error(&error) {
                Some(line) => log::error!("{line}"),
                // stdout is closed, so further reports have no reader.
                None => return Ok(ExitCode::FAILURE),
            }
        }
        let left = until_next(interval, start.elapsed());
        log::debug!("The next run is in {left:?}.");
        if end.comes_within(left) {
            log::debug!("A signal ends the command.");
            return Ok(ExitCode::SUCCESS);
        }
    }
}

/// The end of a periodic command: SIGTERM or SIGINT.
pub(crate) struct End(Option<SignalFd>);

impl End {
    fn on_signals() -> Result<Self, Error> {
        let mut end = SigSet::empty();
        end.extend([Signal::SIGTERM, Signal::SIGINT]);
        let signals = end.thread_block().and_then(|()| SignalFd::with_flags(&end, SfdFlags::SFD_CLOEXEC));
        signals.context("cannot catch signals").map(|signals| Self(Some(signals)))
    }

    /// Waits, and returns whether the command should end.
    pub(crate) fn comes_within(&self, time: Duration) -> bool {
        let deadline = Deadline::after(time);
        while !deadline.has_passed() {
            let mut signals: Vec<PollFd<'_>> =
                self.0.iter().map(|signals| PollFd::new(signals.as_fd(), PollFlags::POLLIN)).collect();
            if let Ok(1..) = poll(&mut signals, deadline.poll_timeout()) {
                return true;
            }
        }
        false
    }
}

/// Returns the time until the next multiple of `interval`, `elapsed` after the start.
fn until_next(interval: Duration, elapsed: Duration) -> Duration {
    let since_last = elapsed.as_nanos().checked_rem(interval.as_nanos()).unwrap_or(0);
    interval.saturating_sub(Duration::from_nanos(u64::try_from(since_last).unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missed_runs_are_skipped() {
        let second = Duration::from_secs(1);
        for (elapsed_ms, left_ms) in [(0, 1000), (999, 1), (1000, 1000), (3500, 500)] {
            let left = until_next(second, Duration::from_millis(elapsed_ms));
            assert_eq!(left, Duration::from_millis(left_ms), "after {elapsed_ms} ms");
        }
        assert_eq!(until_next(Duration::MAX, second), Duration::MAX - second);
    }
}
