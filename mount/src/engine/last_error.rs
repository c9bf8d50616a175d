//! Refusals, for `self/last_error`.
//!
//! Owns the newest refusals, keyed by the identity of the processes that they concern; each user has a share of them.
//! Does not know how processes are found.

use std::collections::HashMap;
use std::sync::Arc;

use crate::fair::FairRing;
use crate::journal::{REFUSALS_KEPT, RefusalRecord, owner};
use crate::model::command::Rejected;
use crate::model::refusal::Refusal;
use crate::model::task::TaskId;

/// A refused operation. The adapter that answers it records it with [`Engine::record_refusal`](super::Engine).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refused {
    pub(crate) refusal: Refusal,
    /// The PID that was refused, as it was written; `None` for the caller's own.
    pub(crate) pid: Option<u32>,
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        Self { refusal, pid: None }
    }
}

impl From<Rejected> for Refused {
    fn from(rejected: Rejected) -> Self {
        Refusal::from(rejected).into()
    }
}

/// The newest refusals.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    newest: FairRing<Arc<RefusalRecord>, REFUSALS_KEPT>,
    by_task: HashMap<TaskId, Arc<RefusalRecord>>,
}

impl Refusals {
    pub(super) fn add(&mut self, record: Arc<RefusalRecord>) {
        for task in &record.subjects {
            self.by_task.insert(*task, Arc::clone(&record));
        }
        let Some(dropped) = self.newest.push(owner(record.uid), record) else { return };
        for task in &dropped.subjects {
            if self.by_task.get(task).is_some_and(|record| Arc::ptr_eq(record, &dropped)) {
                self.by_task.remove(task);
            }
        }
    }

    /// Returns how many were dropped since the worker started.
    pub(super) fn dropped(&self) -> u64 {
        self.newest.dropped()
    }

    /// Returns the newest refusal that concerns the task.
    pub(super) fn of(&self, task: &TaskId) -> Option<Arc<RefusalRecord>> {
        self.by_task.get(task).cloned()
    }
}
