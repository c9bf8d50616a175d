//! The versions of `tasks` files, and the clients that wait for a change in poll(2).
//!
//! Owns a version for each file, and the armed polls. Only the thread that calls [`Changes::take_due`] notifies the
//! kernel of a change, never a thread that holds a lock or that the kernel waits for. Does not know what is in a
//! file.

use std::collections::{HashMap, HashSet};
use std::fmt;

use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::Mutex;

/// The version of a file that has not changed.
pub(crate) const FIRST_VERSION: u64 = 1;

/// Wakes one client that waits in poll(2).
pub(crate) trait Notify: fmt::Debug + Send {
    /// Wakes the client, once.
    fn notify(self: Box<Self>);
}

/// Versions and armed polls.
#[derive(Debug)]
pub(crate) struct Changes {
    state: Mutex<State>,
    /// Readable when the notifying thread has something to do.
    doorbell: EventFd,
}

#[derive(Debug, Default)]
struct State {
    /// Keyed by node id; a file that is not here has [`FIRST_VERSION`].
    versions: HashMap<u64, u64>,
    /// Keyed by file handle: the kernel waits for one event per open file.
    armed: HashMap<u64, (u64, Box<dyn Notify>)>,
    /// The same handles, keyed by node id.
    by_node: HashMap<u64, HashSet<u64>>,
    due: Vec<Box<dyn Notify>>,
}

impl Changes {
    pub(crate) fn new() -> nix::Result<Self> {
        let doorbell = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Self { state: Mutex::default(), doorbell })
    }

    pub(crate) fn version(&self, node: u64) -> u64 {
        self.state.lock().versions.get(&node).copied().unwrap_or(FIRST_VERSION)
    }

    /// Notes that the content of these files has changed.
    pub(crate) fn changed(&self, nodes: impl IntoIterator<Item = u64>) {
        let mut state = self.state.lock();
        for node in nodes {
            *state.versions.entry(node).or_insert(FIRST_VERSION) += 1;
            let State { armed, by_node, due, .. } = &mut *state;
            let ready = by_node.remove(&node).into_iter().flatten();
            due.extend(ready.filter_map(|fh| armed.remove(&fh)).map(|(_, notifier)| notifier));
        }
        if !state.due.is_empty() {
            self.ring();
        }
    }

    /// Forgets removed files, and wakes the clients that wait for them.
    pub(crate) fn removed(&self, nodes: &[u64]) {
        self.changed(nodes.iter().copied());
        let mut state = self.state.lock();
        for node in nodes {
            state.versions.remove(node);
        }
    }

    /// Arms a poll: `notifier` is called when the file changes from version `seen`. Returns the current version; if
    /// that differs from `seen`, nothing is armed.
    pub(crate) fn arm(&self, fh: u64, node: u64, seen: u64, notifier: Box<dyn Notify>) -> u64 {
        let mut state = self.state.lock();
        let version = state.versions.get(&node).copied().unwrap_or(FIRST_VERSION);
        if version == seen {
            let first = state.armed.is_empty();
            state.armed.insert(fh, (node, notifier));
            state.by_node.entry(node).or_default().insert(fh);
            if first {
                // From now on the notifying thread waits for deaths, too.
                self.ring();
            }
        }
        version
    }

    pub(crate) fn disarm(&self, fh: u64) {
        let mut state = self.state.lock();
        let Some((node, _)) = state.armed.remove(&fh) else { return };
        state.forget(node, fh);
    }

    /// Wakes the client that waits for this open file, whatever has changed.
    pub(crate) fn wake(&self, fh: u64) {
        let mut state = self.state.lock();
        let Some((node, notifier)) = state.armed.remove(&fh) else { return };
        state.forget(node, fh);
        state.due.push(notifier);
        self.ring();
    }

    /// Returns the polls to answer now, and whether others are still waiting.
    pub(crate) fn take_due(&self) -> (Vec<Box<dyn Notify>>, bool) {
        let _ = self.doorbell.read();
        let mut state = self.state.lock();
        (std::mem::take(&mut state.due), !state.armed.is_empty())
    }

    pub(crate) fn doorbell(&self) -> &EventFd {
        &self.doorbell
    }

    /// Wakes the notifying thread.
    pub(crate) fn ring(&self) {
        let _ = self.doorbell.write(1);
    }
}

impl State {
    fn forget(&mut self, node: u64, fh: u64) {
        if let Some(handles) = self.by_node.get_mut(&node) {
            handles.remove(&fh);
            if handles.is_empty() {
                self.by_node.remove(&node);
            }
        }
    }
}
