//! Replayed requests: those that the kernel resends after a worker died while serving them.
//!
//! Owns that nothing is carried out twice, that a request that kills workers is given up, and what the next
//! worker has to know of open files. Does not know what a request asks for.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::errno::Errno;

use super::events::Event;
use super::ports::{Journal as _, Ports};
use super::{Caller, Engine, RESERVED_HANDLES};
use crate::failpoint::{delay_replay, delay_write};
use crate::journal::Record;

/// How long poll(2) waits for the record of the poll. Writing it takes microseconds.
const POLL_FLUSH_LIMIT: Duration = Duration::from_millis(200);

/// How often a request is carried out again. At the first death it may only have waited for its turn, so that death says
/// nothing about it: two others must follow while it is carried out.
const MAX_RETRIES: usize = 2;

/// Identifies a request of this mount; the same if it comes again.
pub(crate) type RequestId = u64;

/// What to do with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    /// Carry it out.
    New,
    /// Repeat the answer: an errno, or success.
    Answered(Option<Errno>),
    /// Answer an error: three workers died while serving it.
    Poisoned,
}

/// Returns the record that a request was carried out.
pub(super) fn answered(request: RequestId) -> Option<Record> {
    (request != 0).then(|| Record::Answered { request, errno: 0, session_thread: session_thread() })
}

/// Returns a number for this thread. Each thread answers one request before it takes the next.
pub(super) fn session_thread() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    thread_local!(static NUMBER: u32 = NEXT.fetch_add(1, Ordering::Relaxed));
    NUMBER.with(|number| *number)
}

impl<P: Ports> Engine<P> {
    /// Returns whether an earlier worker has answered this request.
    pub(crate) fn is_answered(&self, request: RequestId) -> bool {
        self.journal.answer(request).is_some()
    }

    /// A write is carried out from here on. Tests make it slow.
    pub(crate) fn begin_write(&self, caller: Caller) {
        delay_write(caller.uid);
    }

    /// Decides whether a request is carried out. A request that does not come again costs nothing.
    pub(crate) fn admit(&self, request: RequestId, is_replay: bool) -> Admission {
        if !is_replay {
            return Admission::New;
        }
        delay_replay();
        match self.journal.answer(request) {
            Some(0) => Admission::Answered(None),
            Some(errno) => Admission::Answered(Some(Errno::from_raw(errno))),
            None if self.journal.retries(request) >= MAX_RETRIES => {
                let reason = format!("request {request} was in flight at three deaths of a worker");
                log::error!("{reason}; it is answered EIO");
                self.event(Event {
                    event: "given-up",
                    errno: Some("EIO".into()),
                    reason: Some(reason),
                    ..Event::default()
                });
                self.journal.request_flush();
                Admission::Poisoned
            }
            None => {
                log::debug!("request {request} comes again; it is carried out");
                self.append_if_possible(&Record::Retried { request });
                Admission::New
            }
        }
    }

    /// Records that the open file is polled under the kernel's handle `kh`, which the next worker has to notify.
    /// Waits for the record, but not in this thread's own I/O: poll(2) must not wait for a disk that does not answer.
    pub(crate) fn note_poll(&self, fh: u64, kh: u64) {
        self.journal.defer(Record::Polled { fh, kh });
        self.journal.flush_within(POLL_FLUSH_LIMIT);
    }

    /// Records that no more commands are accepted through the open file, not even by the next worker.
    pub(crate) fn note_truncated(&self, fh: u64) {
        self.append_if_possible(&Record::Truncated { fh });
    }

    /// Records that an open file is closed of which something was recorded. Nobody waits for that.
    pub(crate) fn note_closed(&self, fh: u64) {
        self.journal.defer(Record::Closed { fh });
    }

    /// Reserves the numbers of open files up to `last` and some more, so that the next worker uses others. They
    /// are reserved well in advance, so that open(2) need not wait for the disk.
    pub(crate) fn reserve_handles(&self, last: u32) {
        let handles = last.wrapping_add(2 * RESERVED_HANDLES).max(1);
        self.journal.defer(Record::Reserved { events: 0, handles });
        self.journal.request_flush();
    }

    /// Appends a record that is useful to the next worker, but not essential. If it cannot be written now, it is deferred.
    pub(super) fn append_if_possible(&self, record: &Record) {
        if self.journal.append(record).is_err() {
            self.journal.defer(record.clone());
        }
    }
}
