//! Wakes clients that wait in poll(2).
//!
//! Owns the two ways to tell the kernel that a polled file has changed. Does not know why a file has changed.

use fuser::{Notifier, PollHandle, PollNotifier};

use crate::engine::Notify;

impl Notify for PollNotifier {
    fn notify(self: Box<Self>) {
        // An error means that the poller has gone.
        let _ = PollNotifier::notify(*self);
    }
}

/// Wakes pollers that waited when an earlier worker died, by their poll handles.
#[derive(Debug)]
pub(crate) struct PollWaker(Notifier);

impl PollWaker {
    pub(super) fn new(notifier: Notifier) -> Self {
        Self(notifier)
    }

    /// Makes the clients behind this poll handle poll again.
    pub(crate) fn wake(&self, handle: u64) {
        // The kernel no longer knows the handles of pollers that have gone.
        let _ = self.0.poll(PollHandle(handle));
    }
}
