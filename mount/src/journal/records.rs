//! The records of the claims log: each says that one thing happened.
//!
//! Owns what there is to record. Does not know how a record is written ([`super::format`]), or what records add up to
//! ([`super::claims_log`]).

use std::sync::Arc;

use crate::model::command::Claim;
use crate::model::partition::Partition;
use crate::model::pool::ListId;
use crate::model::queue::Waiter;
use crate::model::refusal::Holder;
use crate::model::task::TaskId;

/// A claim that ended because its task was killed, or because nobody can tell how the task ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reclaimed {
    /// The number of its event.
    pub(crate) seq: u64,
    /// Wall time in milliseconds.
    pub(crate) time: u64,
    pub(crate) pid: u32,
    pub(crate) pool: String,
    pub(crate) cpus: String,
    /// The user of the claim; `None` in records of earlier versions.
    pub(crate) uid: Option<u32>,
}

/// A refusal, for `self/last_error` of the processes that it concerns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RefusalRecord {
    /// Wall time in milliseconds.
    pub(crate) time: u64,
    /// The PID that was refused, as it was written.
    pub(crate) pid: u32,
    pub(crate) errno: i32,
    /// The reason and the cure, with [`HOLDER`] in place of the holder's name.
    pub(crate) text: String,
    pub(crate) holder: Option<Holder>,
    /// The writer and some of its ancestors.
    pub(crate) subjects: Vec<TaskId>,
    /// The user who was refused; `None` in records of earlier versions.
    pub(crate) uid: Option<u32>,
    /// The session of the writer (setsid(2)), as the daemon sees it; `None` in records of earlier versions.
    pub(crate) session: Option<u32>,
}

/// Returns the user to whom a record belongs. Those of earlier versions, which name none, belong to root.
pub(crate) fn owner(uid: Option<u32>) -> u32 {
    uid.unwrap_or(0)
}

/// The placeholder for a holder, whose name depends on the reader.
pub(crate) const HOLDER: &str = "\u{0}";

/// One thing that happened to a claim, a request or an open file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    /// Masks are about to be set for this claim. Its kin are not stored.
    Intent(Arc<Claim>),
    /// The claim is made; it replaces any other claim of the task.
    Claimed(Arc<Claim>),
    /// The intent was undone.
    Abandoned { task: TaskId },
    /// The claim is over; the masks are about to be restored.
    Releasing { task: TaskId },
    /// The masks are restored.
    Released { task: TaskId },
    /// The claim of a dead task passed to its heir.
    Inherited { from: TaskId, heir: Arc<Claim> },
    /// The task died, and its claim ended.
    Ended { task: TaskId, reclaimed: Option<Reclaimed> },
    /// A reclaimed claim that is still unacknowledged. Written by compaction only.
    RetainedReclaim(Reclaimed),
    /// How many reclaimed claims were dropped because there were too many. Written by compaction only.
    Dropped { count: u64 },
    /// The reclaimed claims up to this event were acknowledged.
    Acknowledged { seq: u64 },
    /// The following records belong to this mount; requests and open files of another mount mean nothing.
    Mounted { mount: u64 },
    /// The session thread has decided the request with this errno; 0 for success. A session thread answers a request
    /// before it reads the next one.
    Answered { request: u64, errno: i32, session_thread: u32 },
    /// A request was refused. `request` is 0 if the kernel did not send it.
    Refused { request: u64, session_thread: u32, refusal: Arc<RefusalRecord> },
    /// An operation was carried out for these processes, so the refusals before it do not concern them any more.
    Succeeded { tasks: Vec<TaskId> },
    /// A request that was in flight when a worker died is carried out again.
    Retried { request: u64 },
    /// The open file is polled under this handle of the kernel.
    Polled { fh: u64, kh: u64 },
    /// A task waits for a CPU list of a pool, through an open file. Replaces an earlier record of the file, whose place is lost.
    Queued(Waiter),
    /// A command through the open file was truncated; no other command is accepted through it.
    Truncated { fh: u64 },
    /// An open file that an earlier record names was closed.
    Closed { fh: u64 },
    /// Numbers below these may have been given out. 0 for no change.
    Reserved { events: u64, handles: u32 },
    /// This is going to be written to cgroups for the partition of a list, or has been. Replaces an earlier one of the list.
    Partition(Partition),
    /// The partition of the list is taken back.
    Unpartitioned { list: ListId },
    /// All of these or none.
    Batch(Vec<Record>),
}
