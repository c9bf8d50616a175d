//! Why an operation was refused, told to whom it concerns (`self/last_error`).
//!
//! Owns: the newest refusals, by the identity of the processes that they concern. Must not know: how
//! processes are looked up.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use crate::journal::{REFUSALS_KEPT, RefusalRecord};
use crate::model::task::TaskId;

/// The newest refusals.
#[derive(Debug, Default)]
pub(crate) struct Refusals {
    filed: VecDeque<Arc<RefusalRecord>>,
    by_task: HashMap<TaskId, Arc<RefusalRecord>>,
}

impl Refusals {
    pub(crate) fn file(&mut self, filed: Arc<RefusalRecord>) {
        for task in &filed.subjects {
            self.by_task.insert(*task, Arc::clone(&filed));
        }
        self.filed.push_back(filed);
        if self.filed.len() > REFUSALS_KEPT
            && let Some(oldest) = self.filed.pop_front()
        {
            for task in &oldest.subjects {
                if self.by_task.get(task).is_some_and(|filed| Arc::ptr_eq(filed, &oldest)) {
                    self.by_task.remove(task);
                }
            }
        }
    }

    /// The newest refusal that concerns the task.
    pub(crate) fn of(&self, task: &TaskId) -> Option<Arc<RefusalRecord>> {
        self.by_task.get(task).cloned()
    }
}
