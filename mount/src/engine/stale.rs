//! Names that the kernel has cached and that have changed without it: a write to `info/config` makes and removes pools and
//! lists, and changes owners and modes.
//!
//! Owns the queue of their paths, and how long a request waits until the kernel has looked at them again. Does not know how
//! it is made to look.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::Engine;
use super::ports::Ports;

/// How long a request waits, at most. A look takes a tenth of a millisecond.
const PATIENCE: Duration = Duration::from_secs(1);

/// The queue.
#[derive(Debug)]
pub(super) struct Stale {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The paths, relative to `pools`.
    queue: VecDeque<String>,
    /// Whether the kernel is looking at one that is not in the queue any more.
    is_looking: bool,
    /// Whether there is a thread that makes it look.
    is_served: bool,
}

impl Stale {
    /// `left`: what the worker before may not have done.
    pub(super) fn new(left: Vec<String>) -> Self {
        let state = State { queue: left.into(), ..State::default() };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    pub(super) fn add(&self, paths: Vec<String>) {
        self.state.lock().queue.extend(paths);
        self.changed.notify_all();
    }
}

impl<P: Ports> Engine<P> {
    /// Calls `look` with each path; for a thread of its own. Sleeps while there is none.
    pub(crate) fn refresh_forever(&self, look: impl Fn(&str)) {
        let mut state = self.stale.state.lock();
        state.is_served = true;
        loop {
            match state.queue.pop_front() {
                Some(path) => {
                    state.is_looking = true;
                    MutexGuard::unlocked(&mut state, || look(&path));
                    state.is_looking = false;
                    self.stale.changed.notify_all();
                }
                None => self.stale.changed.wait(&mut state),
            }
        }
    }

    /// Waits until the kernel has looked at everything that has changed, but not for long.
    pub(crate) fn await_refresh(&self) {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.stale.state.lock();
        while state.is_served && (state.is_looking || !state.queue.is_empty()) {
            if self.stale.changed.wait_until(&mut state, deadline).timed_out() {
                return log::warn!("the kernel has not looked at all names that have changed");
            }
        }
    }
}
