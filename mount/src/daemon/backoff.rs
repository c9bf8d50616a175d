//! How long the supervisor waits before it starts the next worker.
//!
//! Owns the delays. Does not know why a worker exited. Has no effects.

use std::time::Duration;

/// A worker that served for no longer than this has failed at once: the requests that the kernel sends again arrive
/// within milliseconds, and one of them may be what kills workers.
const MIN_UPTIME: Duration = Duration::from_millis(50);
/// The first delay: short, because clients wait.
const FIRST_DELAY: Duration = Duration::from_millis(5);
/// The longest delay: a worker per second costs the machine little and fills no log quickly.
const MAX_DELAY: Duration = Duration::from_secs(1);

/// The delay between workers: none after one that served, and growing after each that failed at once.
#[derive(Debug, Default)]
pub(super) struct RestartBackoff {
    /// The delay before the present worker.
    delay: Duration,
}

impl RestartBackoff {
    /// Returns the delay before the next worker. `uptime`: for how long the last one served; `None` if it never
    /// served, or could not be started.
    pub(super) fn next_delay(&mut self, uptime: Option<Duration>) -> Duration {
        self.delay = match uptime {
            Some(uptime) if uptime > MIN_UPTIME => Duration::ZERO,
            _ => (self.delay * 2).clamp(FIRST_DELAY, MAX_DELAY),
        };
        self.delay
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_served_is_followed_at_once() {
        let mut backoff = RestartBackoff::default();
        for _ in 0..3 {
            assert_eq!(backoff.next_delay(Some(MIN_UPTIME * 2)), Duration::ZERO);
        }
    }

    #[test]
    fn workers_that_fail_at_once_are_started_with_growing_delays_up_to_the_longest() {
        let mut backoff = RestartBackoff::default();
        let uptimes = [None, Some(MIN_UPTIME)].into_iter().cycle();
        let delays: Vec<u128> =
            uptimes.take(10).map(|uptime| backoff.next_delay(uptime).as_millis()).collect();
        assert_eq!(delays, [5, 10, 20, 40, 80, 160, 320, 640, 1000, 1000]);
    }

    #[test]
    fn a_worker_that_served_ends_the_delays() {
        let mut backoff = RestartBackoff::default();
        for _ in 0..5 {
            backoff.next_delay(None);
        }
        assert_eq!(backoff.next_delay(Some(Duration::from_secs(1))), Duration::ZERO);
        assert_eq!(backoff.next_delay(None), FIRST_DELAY);
    }
}
