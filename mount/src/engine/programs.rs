//! The names of the programs that hold claims, for the events of processes that have gone.
//!
//! Owns them, each name once, however many processes have it. Does not know when a claim ends.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::model::task::TaskId;

/// The names by task.
#[derive(Debug, Default)]
pub(super) struct Programs(Mutex<Names>);

#[derive(Debug, Default)]
struct Names {
    // A pointer to a string takes half as much memory as a string slice, and there are thousands of tasks.
    by_task: HashMap<TaskId, Arc<String>>,
    all: HashSet<Arc<String>>,
}

impl Programs {
    /// Notes the name of a task's program.
    pub(super) fn note(&self, task: TaskId, name: String) {
        let mut names = self.0.lock();
        let name = match names.all.get(&name) {
            Some(known) => Arc::clone(known),
            None => {
                let name = Arc::new(name);
                names.all.insert(Arc::clone(&name));
                name
            }
        };
        let before = names.by_task.insert(task, name);
        names.drop_name(before);
    }

    /// Returns the name of a task's program, if it was noted.
    pub(super) fn of(&self, task: &TaskId) -> Option<String> {
        self.0.lock().by_task.get(task).map(|name| name.as_ref().clone())
    }

    pub(super) fn forget(&self, task: &TaskId) {
        let mut names = self.0.lock();
        let name = names.by_task.remove(task);
        names.drop_name(name);
    }
}

impl Names {
    fn drop_name(&mut self, name: Option<Arc<String>>) {
        // This one and the one in the set are the last.
        if let Some(name) = name.filter(|name| Arc::strong_count(name) == 2) {
            self.all.remove(&name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::task::Pid;

    fn task(pid: u32) -> TaskId {
        TaskId { pid: Pid::new(pid).unwrap(), ino: 1 }
    }

    #[test]
    fn a_name_is_kept_once_and_until_the_last_task_is_forgotten() {
        let programs = Programs::default();
        for pid in 1..=3 {
            programs.note(task(pid), "forwarder".to_owned());
        }
        programs.note(task(3), "sh".to_owned());
        let count = || programs.0.lock().all.len();
        assert_eq!(
            (programs.of(&task(2)).as_deref(), programs.of(&task(3)).as_deref()),
            (Some("forwarder"), Some("sh"))
        );
        assert_eq!(count(), 2);
        programs.forget(&task(1));
        assert_eq!((programs.of(&task(1)), count()), (None, 2));
        programs.forget(&task(2));
        assert_eq!(count(), 1);
        programs.note(task(3), "sh".to_owned());
        programs.forget(&task(3));
        programs.forget(&task(3));
        assert_eq!(count(), 0);
    }
}
