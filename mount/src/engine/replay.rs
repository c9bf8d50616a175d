//! Requests that come again because a worker died with them in hand, and what open files mean to the next one.
//!
//! Owns: that nothing is carried out twice, and that a request that kills workers is given up. Must not know:
//! what a request asks for.

use std::sync::atomic::{AtomicU32, Ordering};

use nix::errno::Errno;

use super::events::Event;
use super::{Engine, RESERVED_HANDLES};
use crate::failpoint::delay_replay;
use crate::journal::Record;

/// Identifies a request of this mount; the same if it comes again.
pub(crate) type RequestId = u64;

/// What is to be done with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    /// It is to be carried out.
    New,
    /// It was carried out: with this error number, or with success.
    Answered(Option<Errno>),
    /// It was in hand at two deaths, and is not tried a third time.
    Deadly,
}

/// That a request was carried out.
pub(super) fn answered(request: RequestId) -> Option<Record> {
    (request != 0).then(|| Record::Answered { request, errno: 0, session_thread: session_thread() })
}

/// Which thread this is. Each answers one request before it takes the next.
pub(super) fn session_thread() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    thread_local!(static HAND: u32 = NEXT.fetch_add(1, Ordering::Relaxed));
    HAND.with(|hand| *hand)
}

impl Engine {
    /// Decides whether a request is carried out. A request that does not come again costs nothing.
    pub(crate) fn admit(&self, request: RequestId, is_replay: bool) -> Admission {
        if !is_replay {
            return Admission::New;
        }
        delay_replay();
        let (answer, is_poisoned) =
            self.state.with_requests(|requests| (requests.answer(request), requests.is_poisoned(request)));
        match answer {
            Some(0) => Admission::Answered(None),
            Some(errno) => Admission::Answered(Some(Errno::from_raw(errno))),
            None if is_poisoned => {
                log::error!("request {request} was in hand at two deaths of a worker; it is answered EIO");
                let reason = format!("request {request} was in hand at two deaths of a worker");
                self.event(Event {
                    event: "given-up",
                    errno: Some("EIO".into()),
                    reason: Some(reason),
                    ..Event::default()
                });
                self.state.flush_deferred();
                Admission::Deadly
            }
            None => {
                self.record_if_possible(Record::Retried { request });
                Admission::New
            }
        }
    }

    /// The open file is polled under this handle of the kernel's, which the next worker has to know.
    pub(crate) fn note_poll(&self, fh: u64, kh: u64) {
        self.record_if_possible(Record::Polled { fh, kh });
    }

    /// No command is taken through the open file any more, by the next worker neither.
    pub(crate) fn note_rest(&self, fh: u64) {
        self.record_if_possible(Record::Truncated { fh });
    }

    /// An open file of which something was noted is closed.
    pub(crate) fn note_closed(&self, fh: u64) {
        self.record_if_possible(Record::Closed { fh });
    }

    /// Open files up to and with this number are given out by this worker.
    pub(crate) fn reserve_handles(&self, last: u32) {
        let handles = last.wrapping_add(2 * RESERVED_HANDLES).max(1);
        self.record_if_possible(Record::Reserved { events: 0, handles });
    }
}
