//! Points in time until which a command waits.
//!
//! Owns their arithmetic, which never overflows. Does not know what is waited for.

use std::time::{Duration, Instant};

use nix::poll::PollTimeout;

/// The end of a wait, which may be never.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Deadline(Option<Instant>);

impl Deadline {
    /// Never comes.
    pub(crate) const NEVER: Self = Self(None);

    /// Comes after `wait`. One that is too far away to be represented never comes.
    pub(crate) fn after(wait: Duration) -> Self {
        Self(Instant::now().checked_add(wait))
    }

    /// Whether it has passed.
    pub(crate) fn has_passed(self) -> bool {
        self.0.is_some_and(|deadline| deadline <= Instant::now())
    }

    /// Returns the timeout for poll(2). A deadline beyond the longest timeout of poll(2), 24 days, needs several
    /// calls.
    pub(crate) fn poll_timeout(self) -> PollTimeout {
        let Some(deadline) = self.0 else { return PollTimeout::NONE };
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up, so that the deadline has passed when poll(2) returns.
        PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_beyond_the_clock_never_comes() {
        assert_eq!(Deadline::after(Duration::MAX), Deadline::NEVER);
        assert_eq!(Deadline::NEVER.poll_timeout(), PollTimeout::NONE);
        assert!(!Deadline::NEVER.has_passed());
    }

    #[test]
    fn the_timeout_is_rounded_up_and_bounded() {
        assert_eq!(Deadline::after(Duration::ZERO).poll_timeout(), PollTimeout::from(1u16));
        assert_eq!(Deadline::after(Duration::from_secs(1 << 40)).poll_timeout(), PollTimeout::MAX);
        assert!(Deadline::after(Duration::ZERO).has_passed());
    }
}
