//! Refusals, for `self/last_error`.
//!
//! Owns the newest refusals, keyed by the identity of the processes that they concern, and who is shown which. Each user has
//! a share of them. Does not know how processes are found.

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

/// The user and the session of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Origin {
    pub(super) uid: u32,
    pub(super) session: Session,
}

/// A session of setsid(2): a login, a pane of a terminal multiplexer, a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Session {
    /// This one, as the daemon sees it.
    Number(u32),
    /// Whichever a program begins that changes the user, such as sudo(8), on the terminal of a process.
    OnTerminal,
    /// That is not known: a record of an earlier version.
    Unknown,
}

impl Origin {
    /// Returns the origin of a process.
    pub(super) fn new(uid: u32, session: Option<u32>) -> Self {
        Self { uid, session: session.map_or(Session::Unknown, Session::Number) }
    }

    fn of(record: &RefusalRecord) -> Self {
        Self::new(owner(record.uid), record.session)
    }
}

/// A refusal, as it concerns a task.
#[derive(Clone, Debug)]
struct Concern {
    record: Arc<RefusalRecord>,
    origin: Origin,
    /// Whether the task is on a terminal and of another user, so that it has started sudo(8) or the like.
    is_on_terminal: bool,
}

impl Concern {
    /// The origins whose processes are told of it.
    fn origins(&self) -> impl Iterator<Item = Origin> + use<> {
        let Origin { uid, .. } = self.origin;
        let on_terminal = Origin { uid, session: Session::OnTerminal };
        [self.origin].into_iter().chain(self.is_on_terminal.then_some(on_terminal))
    }

    /// Returns whether it is about a process of this origin. Others may have caused it although it concerns an ancestor:
    /// two logins have the same sshd(8), and two panes the same tmux(1).
    fn is_about(&self, origin: Origin) -> bool {
        let is_session = self.origin.session == origin.session || self.is_on_terminal;
        origin.session != Session::Unknown && is_session && self.origin.uid == origin.uid
    }

    /// Returns whether a reader of this origin is shown it.
    fn is_shown(&self, reader: Origin) -> bool {
        let is_root_of_session = reader.uid == 0 && self.origin.session == reader.session;
        self.is_about(reader) || is_root_of_session && reader.session != Session::Unknown
    }
}

/// The newest refusals.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    newest: FairRing<Arc<RefusalRecord>, REFUSALS_KEPT>,
    by_task: HashMap<TaskId, Concern>,
    /// How many tasks of `by_task` have a refusal of each origin.
    count: HashMap<Origin, usize>,
}

impl Refusals {
    /// Adds a refusal. `is_on_terminal` says of each of its subjects whether it is on a terminal and of another user.
    pub(super) fn add(&mut self, record: Arc<RefusalRecord>, is_on_terminal: impl Fn(&TaskId) -> bool) {
        let origin = Origin::of(&record);
        for task in &record.subjects {
            let is_on_terminal = is_on_terminal(task);
            self.insert(*task, Concern { record: Arc::clone(&record), origin, is_on_terminal });
        }
        let Some(dropped) = self.newest.push(owner(record.uid), record) else { return };
        for task in &dropped.subjects {
            if self.by_task.get(task).is_some_and(|concern| Arc::ptr_eq(&concern.record, &dropped)) {
                self.remove(task);
            }
        }
    }

    fn insert(&mut self, task: TaskId, concern: Concern) {
        self.remove(&task);
        for origin in concern.origins() {
            *self.count.entry(origin).or_default() += 1;
        }
        self.by_task.insert(task, concern);
    }

    fn remove(&mut self, task: &TaskId) {
        let Some(concern) = self.by_task.remove(task) else { return };
        for origin in concern.origins() {
            if let Some(count) = self.count.get_mut(&origin) {
                *count -= 1;
                if *count == 0 {
                    self.count.remove(&origin);
                }
            }
        }
    }

    /// Returns whether a task may have a refusal that is about a process of this origin.
    pub(super) fn has(&self, origin: Origin) -> bool {
        let on_terminal = Origin { session: Session::OnTerminal, ..origin };
        self.count.contains_key(&origin) || self.count.contains_key(&on_terminal)
    }

    /// Forgets the refusals that concern these tasks and are about a process of this origin. Returns the tasks that had one.
    pub(super) fn forget(&mut self, origin: Origin, tasks: &[TaskId]) -> Vec<TaskId> {
        let is_of = |task: &&TaskId| self.by_task.get(task).is_some_and(|concern| concern.is_about(origin));
        let forgotten: Vec<TaskId> = tasks.iter().filter(is_of).copied().collect();
        forgotten.iter().for_each(|task| self.remove(task));
        forgotten
    }

    /// Returns how many were dropped since the worker started.
    pub(super) fn dropped(&self) -> u64 {
        self.newest.dropped()
    }

    /// Returns the newest refusal that concerns the task, if a reader of this origin is shown it.
    pub(super) fn of(&self, task: &TaskId, reader: Origin) -> Option<Arc<RefusalRecord>> {
        self.by_task.get(task).filter(|concern| concern.is_shown(reader)).map(|it| Arc::clone(&it.record))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::task::Pid;

    fn task(pid: u32) -> TaskId {
        TaskId { pid: Pid::new(pid).unwrap(), ino: u64::from(pid) }
    }

    fn refusal(subjects: &[u32], uid: u32, session: Option<u32>) -> Arc<RefusalRecord> {
        Arc::new(RefusalRecord {
            time: 0,
            pid: 1,
            errno: 22,
            text: String::new(),
            holder: None,
            subjects: subjects.iter().map(|pid| task(*pid)).collect(),
            uid: Some(uid),
            session,
        })
    }

    fn origin(uid: u32, session: u32) -> Origin {
        Origin::new(uid, Some(session))
    }

    fn no_terminal(_: &TaskId) -> bool {
        false
    }

    #[test]
    fn a_reader_is_shown_refusals_of_its_user_and_session() {
        let mut refusals = Refusals::default();
        refusals.add(refusal(&[10, 20], 1000, Some(7)), no_terminal);
        let shown = |task_of: u32, uid, session| refusals.of(&task(task_of), origin(uid, session)).is_some();
        assert!(shown(10, 1000, 7) && shown(20, 1000, 7));
        assert!(shown(20, 0, 7), "root is shown those of its session");
        assert!(!shown(20, 1000, 8) && !shown(20, 1001, 7) && !shown(20, 0, 8) && !shown(30, 1000, 7));
        refusals.add(refusal(&[20], 1000, None), no_terminal);
        assert!(refusals.of(&task(20), Origin::new(1000, None)).is_none(), "nobody knows whose");
    }

    #[test]
    fn what_sudo_ran_is_shown_to_what_sudo_runs_on_the_same_terminal() {
        let mut refusals = Refusals::default();
        refusals.add(refusal(&[11, 20], 0, Some(7)), |subject| *subject == task(20));
        assert!(refusals.of(&task(20), origin(0, 8)).is_some());
        assert!(
            refusals.of(&task(11), origin(0, 8)).is_none()
                && refusals.of(&task(20), origin(1000, 8)).is_none()
        );
        assert!(refusals.has(origin(0, 9)));
        assert_eq!(refusals.forget(origin(0, 9), &[task(11), task(20)]), [task(20)]);
        assert!(!refusals.has(origin(0, 9)) && refusals.has(origin(0, 7)));
    }

    #[test]
    fn a_success_forgets_the_refusals_of_its_own_tasks_and_origin() {
        let mut refusals = Refusals::default();
        refusals.add(refusal(&[11, 20], 1000, Some(7)), no_terminal);
        refusals.add(refusal(&[12, 20], 1000, Some(7)), no_terminal);
        refusals.add(refusal(&[13, 30], 0, Some(7)), no_terminal);
        let here = origin(1000, 7);
        assert!(refusals.has(here) && !refusals.has(origin(1000, 8)));
        assert_eq!(refusals.forget(here, &[task(12), task(20), task(30), task(40)]), [task(12), task(20)]);
        assert!(refusals.of(&task(20), here).is_none());
        assert!(refusals.of(&task(11), here).is_some(), "another program of the session");
        assert!(refusals.of(&task(30), origin(0, 7)).is_some());
        assert_eq!(refusals.forget(here, &[task(11)]), [task(11)]);
        assert!(!refusals.has(here) && refusals.has(origin(0, 7)));
    }

    #[test]
    fn counts_end_with_the_refusals() {
        let mut refusals = Refusals::default();
        for pid in 1..=3 * REFUSALS_KEPT as u32 {
            refusals.add(refusal(&[pid, 1], 1000, Some(pid)), no_terminal);
        }
        assert!(refusals.count.len() <= REFUSALS_KEPT && refusals.by_task.len() <= REFUSALS_KEPT + 1);
        assert_eq!(refusals.count.values().sum::<usize>(), refusals.by_task.len());
    }
}
