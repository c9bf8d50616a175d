//! The records of the claims log: each says that one thing happened.
//!
//! Owns what there is to record. Does not know how a record is written ([`super::format`]), or what records add up to
//! ([`super::claims_log`]).

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::model::command::Claim;
use crate::model::refusal::Holder;
use crate::model::task::TaskId;

/// A claim that was taken back from a task that was killed, or of which nobody can tell how it ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Reclaimed {
    /// The number of its event.
    pub(crate) seq: u64,
    /// Wall time in milliseconds.
    pub(crate) time: u64,
    pub(crate) pid: u32,
    pub(crate) pool: String,
    pub(crate) cpus: String,
}

/// A refusal, for those whom it concerns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Filed {
    /// Wall time in milliseconds.
    pub(crate) time: u64,
    /// The PID that was refused, as it was written.
    pub(crate) number: u32,
    pub(crate) errno: i32,
    /// What happened and what to do, with [`HOLDER`] where the holder is named.
    pub(crate) text: String,
    pub(crate) holder: Option<Holder>,
    /// The writer and some of its ancestors.
    pub(crate) concerned: Vec<TaskId>,
}

/// Stands for a holder whose name depends on the reader.
pub(crate) const HOLDER: &str = "\u{0}";

/// One thing that happened to a claim, or to a request of the kernel's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Record {
    /// Masks are about to be set for this claim.
    Intent(Arc<Claim>),
    /// The claim is a fact; it replaces any other of the task.
    Claimed(Arc<Claim>),
    /// The intent was undone.
    Abandoned { task: TaskId },
    /// The claim is over; the masks are about to be given back.
    Releasing { task: TaskId },
    /// They are back.
    Released { task: TaskId },
    /// The claim of a dead task has passed on.
    Inherited { from: TaskId, heir: Arc<Claim> },
    /// The task died, and its claim with it.
    Ended { task: TaskId, reclaimed: Option<Reclaimed> },
    /// A reclaimed claim, told again when the log is compacted.
    Kept(Reclaimed),
    /// How many reclaimed claims have had to make room.
    Dropped { count: u64 },
    /// Somebody has read of reclaimed claims up to this event.
    Acknowledged { seq: u64 },
    /// What follows belongs to this mount: requests and open files of another one mean nothing any more.
    Mounted { mount: u64 },
    /// The request has been decided by this hand: 0, or the error number. A hand answers the kernel before it
    /// takes the next request.
    Answered { request: u64, errno: i32, hand: u32 },
    /// A request has been refused; 0 where it was none of the kernel's.
    Refused { request: u64, hand: u32, filed: Arc<Filed> },
    /// A request that was in hand when a worker died is taken in hand again.
    Tried { request: u64 },
    /// The open file is polled under this handle of the kernel's.
    Polled { fh: u64, kh: u64 },
    /// No command is taken through the open file any more.
    Rest { fh: u64 },
    /// The open file, of which something was noted, is closed.
    Closed { fh: u64 },
    /// Numbers below these may have been given out. 0: says nothing.
    Reserved { events: u64, handles: u32 },
    /// All of it or nothing.
    Batch(Vec<Record>),
}
