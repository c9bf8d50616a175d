//! A request as the operations see it, and its line in the log.
//!
//! Owns the form of the DEBUG line per request. Does not know what a request asks for.

use std::ffi::OsStr;
use std::time::Duration;

use nix::errno::Errno;

use crate::engine::Caller;

/// The sender and the kind of a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub(super) caller: Caller,
    /// Whether the kernel sends the request again because a worker died before it answered.
    pub(super) is_replay: bool,
}

/// The object of a request, for the DEBUG line.
#[derive(Clone, Copy, Debug)]
pub(super) enum Object<'a> {
    Node(u64),
    /// A name in the directory with this node ID.
    Name(u64, &'a OsStr),
}

/// Writes the DEBUG line of a request. The kernel names the thread that made the system call; for a process with one
/// thread that is its PID.
pub(super) fn log_request(
    request: Request,
    operation: &str,
    path: &str,
    errno: Option<Errno>,
    took: Duration,
) {
    let Request { caller, is_replay } = request;
    let outcome = errno.map_or_else(|| "ok".to_owned(), |errno| format!("{errno:?}"));
    log::debug!(
        "request id={} op={operation} path={path:?} pid={} uid={} outcome={outcome} us={}{}",
        caller.request,
        caller.tid,
        caller.uid,
        took.as_micros(),
        if is_replay { " replayed" } else { "" },
    );
}
