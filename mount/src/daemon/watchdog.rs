//! The watchdog: detects a worker that hangs.
//!
//! Owns the steps from a suspicion over a probe to the conclusion, and their times. Does not know what makes a
//! worker suspicious, or how it is replaced.
//!
//! The probe is a process of its own, because a process that accesses a mount that hangs waits for it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use super::paths::{MountPaths, THIS_PROGRAM};
use super::role::Role;
use crate::process::PidFd;

/// How often the supervisor checks for unread requests. An idle daemon wakes up this often.
const CHECK_INTERVAL: Duration = Duration::from_secs(6);
/// For how long requests must stay unread to be suspicious. A worker under load reads each within milliseconds.
const SUSPICION_TIME: Duration = Duration::from_millis(300);
/// How long the answer to a probe may take. The longest bounded wait in a request takes as long.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a probe gets the same time again because the worker is only busy, at most: a minute in all.
const MAX_EXTENSIONS: u32 = 11;
/// A worker that reads this often while a probe waits is busy. One that hangs may still have a thread that reads something.
const BUSY_READS: u64 = 100;
/// How long the answer may take if the next worker has to start first.
const PROBE_TIMEOUT_AFTER_RESTART: Duration = Duration::from_secs(60);

/// The result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing.
    Fine,
    /// Start a probe, and report its end with [`Watchdog::reset`].
    StartProbe,
    /// The worker hangs: replace it.
    Hangs,
}

/// How far the suspicion against the worker has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Fine,
    Suspicious,
    Probing,
}

/// Decides when to check, when to start a probe, and when the worker hangs. Has no effects.
#[derive(Debug)]
pub(super) struct Watchdog {
    stage: Stage,
    deadline: Instant,
    /// How often the worker had read at the last call of [`Watchdog::poll`].
    reads: Option<u64>,
    extensions: u32,
}

impl Watchdog {
    pub(super) fn new(now: Instant) -> Self {
        Self { stage: Stage::Fine, deadline: now + CHECK_INTERVAL, reads: None, extensions: 0 }
    }

    /// The time of the next [`Watchdog::poll`].
    pub(super) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Checks the worker; call it at the deadline. `is_suspicious`: requests are unread, or the worker is stopped. `reads`:
    /// how often the worker has read. `probe_runs`: the probe has not asked yet, because it waits for a processor.
    pub(super) fn poll(
        &mut self,
        now: Instant,
        is_suspicious: bool,
        reads: Option<u64>,
        probe_runs: bool,
    ) -> Verdict {
        let last = std::mem::replace(&mut self.reads, reads);
        let is_busy = reads.zip(last).is_some_and(|(now, last)| now.saturating_sub(last) >= BUSY_READS);
        if self.stage == Stage::Probing && (is_busy || probe_runs) && self.extensions < MAX_EXTENSIONS {
            // On a machine with thousands of threads that run, an answer may take long.
            self.extensions += 1;
            self.deadline = now + PROBE_TIMEOUT;
            return Verdict::Fine;
        }
        let (stage, timeout, verdict) = match self.stage {
            Stage::Fine if is_suspicious => (Stage::Suspicious, SUSPICION_TIME, Verdict::Fine),
            Stage::Suspicious if is_suspicious => (Stage::Probing, PROBE_TIMEOUT, Verdict::StartProbe),
            // The probe stays: the next worker answers it.
            Stage::Probing => (Stage::Probing, PROBE_TIMEOUT_AFTER_RESTART, Verdict::Hangs),
            _ => (Stage::Fine, CHECK_INTERVAL, Verdict::Fine),
        };
        (self.stage, self.deadline) = (stage, now + timeout);
        verdict
    }

    /// The worker serves, or another one will: starts again without a suspicion.
    pub(super) fn reset(&mut self, now: Instant) {
        *self = Self::new(now);
    }
}

/// A process that accesses the mount and exits when it is answered. It is killed when dropped.
#[derive(Debug)]
pub(super) struct Probe(PidFd);

impl Probe {
    /// Starts a probe.
    ///
    /// # Errors
    /// No process can be started.
    pub(super) fn start(paths: &MountPaths) -> io::Result<Self> {
        let mut command = paths.role_command(Path::new(THIS_PROGRAM), Role::Probe);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let mut child = command.spawn()?;
        let pidfd = PidFd::open(child.id()).inspect_err(|_| {
            let _ = child.kill();
        })?;
        Ok(Self(pidfd))
    }
}

impl Probe {
    /// Whether it has a processor or waits for one, so that it does not wait for the worker.
    pub(super) fn is_runnable(&self) -> bool {
        self.0.is_runnable()
    }
}

impl AsFd for Probe {
    /// Readable after the probe has exited.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        // A probe that waits for its answer exits only after it has got the answer.
        self.0.kill();
        let _ = self.0.collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Polls at the deadline.
    fn poll(watchdog: &mut Watchdog, is_suspicious: bool) -> Verdict {
        watchdog.poll(watchdog.deadline(), is_suspicious, Some(7), false)
    }

    #[test]
    fn a_worker_that_is_only_busy_gets_more_time_but_not_without_end() {
        for (reads, probe_runs) in [(BUSY_READS, false), (0, true)] {
            let mut watchdog = Watchdog::new(Instant::now());
            assert_eq!(
                [poll(&mut watchdog, true), poll(&mut watchdog, true)],
                [Verdict::Fine, Verdict::StartProbe]
            );
            for n in 1..=u64::from(MAX_EXTENSIONS) {
                let deadline = watchdog.deadline();
                let verdict = watchdog.poll(deadline, true, Some(7 + n * reads), probe_runs);
                assert_eq!(verdict, Verdict::Fine);
                assert_eq!(watchdog.deadline(), deadline + PROBE_TIMEOUT);
            }
            let verdict = watchdog.poll(watchdog.deadline(), true, Some(1 << 40), probe_runs);
            assert_eq!(verdict, Verdict::Hangs);
        }
    }

    #[test]
    fn a_worker_that_reads_hardly_anything_is_not_busy() {
        let mut watchdog = Watchdog::new(Instant::now());
        for expected in [Verdict::Fine, Verdict::StartProbe] {
            assert_eq!(poll(&mut watchdog, true), expected);
        }
        let verdict = watchdog.poll(watchdog.deadline(), true, Some(6 + BUSY_READS), false);
        assert_eq!(verdict, Verdict::Hangs);
    }

    #[test]
    fn a_worker_that_reads_its_requests_is_never_probed() {
        let mut watchdog = Watchdog::new(Instant::now());
        for _ in 0..10 {
            let before = watchdog.deadline();
            assert_eq!(poll(&mut watchdog, false), Verdict::Fine);
            assert_eq!(watchdog.deadline(), before + CHECK_INTERVAL);
        }
    }

    #[test]
    fn one_suspicious_check_is_not_enough_for_a_probe() {
        let mut watchdog = Watchdog::new(Instant::now());
        for _ in 0..3 {
            assert_eq!(poll(&mut watchdog, true), Verdict::Fine);
            assert_eq!(poll(&mut watchdog, false), Verdict::Fine);
        }
    }

    #[test]
    fn a_probe_that_is_not_answered_in_time_means_that_the_worker_hangs() {
        let start = Instant::now();
        let mut watchdog = Watchdog::new(start);
        assert_eq!(poll(&mut watchdog, true), Verdict::Fine);
        assert_eq!(poll(&mut watchdog, true), Verdict::StartProbe);
        assert_eq!(watchdog.deadline(), start + CHECK_INTERVAL + SUSPICION_TIME + PROBE_TIMEOUT);
        // Also if the requests have been read meanwhile: the probe has not been answered.
        assert_eq!(poll(&mut watchdog, false), Verdict::Hangs);
    }

    #[test]
    fn the_next_worker_has_longer_to_answer_the_same_probe() {
        let mut watchdog = Watchdog::new(Instant::now());
        for expected in [Verdict::Fine, Verdict::StartProbe, Verdict::Hangs] {
            assert_eq!(poll(&mut watchdog, true), expected);
        }
        let replaced = watchdog.deadline() - PROBE_TIMEOUT_AFTER_RESTART;
        assert!(watchdog.deadline() > replaced + PROBE_TIMEOUT);
        assert_eq!(poll(&mut watchdog, true), Verdict::Hangs, "the next worker hangs too");
    }

    #[test]
    fn an_answer_ends_every_suspicion() {
        let now = Instant::now();
        let mut watchdog = Watchdog::new(now);
        poll(&mut watchdog, true);
        poll(&mut watchdog, true);
        watchdog.reset(now);
        assert_eq!(watchdog.deadline(), now + CHECK_INTERVAL);
        assert_eq!(poll(&mut watchdog, true), Verdict::Fine, "the first suspicious check again");
    }
}
