//! The tasks that hold a claim, watched for their death; and who has asked lately.
//!
//! Owns: one epoll instance over pidfds, asked and never waited for on the way of a request. A dead
//! task is reported until it is removed, so that nobody can miss it. The descriptors of others are kept for a while:
//! whoever writes writes again, and opening one takes longer than asking whether it still is the same process.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use parking_lot::Mutex;

use super::Process;
use crate::model::task::{Pid, TaskId};

/// Watched tasks.
#[derive(Debug)]
pub(crate) struct Watch {
    epoll: Epoll,
    state: Mutex<State>,
    limit: usize,
    /// How many processes are remembered.
    memory: usize,
}

#[derive(Debug, Default)]
struct State {
    tasks: BTreeMap<TaskId, Arc<Process>>,
    by_fd: HashMap<u64, TaskId>,
    /// Not watched, the latest last.
    remembered: VecDeque<(Pid, Arc<Process>)>,
}

/// No more than this many are remembered: they are searched one by one.
const MAX_MEMORY: usize = 256;

impl Watch {
    /// Raises the soft limit of open files to the hard one: each watched task takes one.
    ///
    /// # Errors
    /// No descriptors are left.
    pub(crate) fn new() -> io::Result<Self> {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        let hard = usize::try_from(hard).unwrap_or(usize::MAX).min(1 << 20);
        // What requests open for a moment, and what the daemon has open all the time.
        let reserve = (hard / 16).max(64);
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let memory = MAX_MEMORY.min(reserve / 2);
        Ok(Self { epoll, state: Mutex::default(), limit: hard.saturating_sub(reserve), memory })
    }

    /// One that remembers so many processes.
    #[cfg(test)]
    pub(super) fn with_memory(memory: usize) -> io::Result<Self> {
        Ok(Self { memory, ..Self::new()? })
    }

    /// How many tasks can be watched.
    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    /// Watches a task. One that has died already is reported like any other.
    ///
    /// # Errors
    /// The kernel watches no more.
    pub(crate) fn add(&self, process: Arc<Process>) -> io::Result<()> {
        let mut state = self.state.lock();
        let fd = process.pidfd().as_raw_fd() as u64;
        self.epoll.add(process.pidfd(), EpollEvent::new(EpollFlags::EPOLLIN, fd))?;
        state.by_fd.insert(fd, process.id());
        if let Some(old) = state.tasks.insert(process.id(), process) {
            let _ = self.epoll.delete(old.pidfd());
            state.by_fd.remove(&(old.pidfd().as_raw_fd() as u64));
        }
        Ok(())
    }

    /// Watches a task no longer.
    pub(crate) fn remove(&self, task: &TaskId) -> Option<Arc<Process>> {
        let mut state = self.state.lock();
        let process = state.tasks.remove(task)?;
        state.by_fd.remove(&(process.pidfd().as_raw_fd() as u64));
        let _ = self.epoll.delete(process.pidfd());
        Some(process)
    }

    /// A watched task.
    pub(crate) fn get(&self, task: &TaskId) -> Option<Arc<Process>> {
        self.state.lock().tasks.get(task).cloned()
    }

    /// The process that has this number, if there is a descriptor of it: one that lives has had its number all the
    /// time since it was opened.
    pub(super) fn with_number(&self, pid: Pid) -> Option<Arc<Process>> {
        self.newest_with_number(pid).filter(|process| process.is_alive())
    }

    fn newest_with_number(&self, pid: Pid) -> Option<Arc<Process>> {
        let (first, last) = (TaskId { pid, ino: 0 }, TaskId { pid, ino: u64::MAX });
        let State { tasks, remembered, .. } = &mut *self.state.lock();
        let watched = tasks.range(first..=last).next_back().map(|(_, process)| Arc::clone(process));
        watched.or_else(|| {
            let at = remembered.iter().position(|(other, _)| *other == pid)?;
            let found = remembered.remove(at)?;
            let process = Arc::clone(&found.1);
            remembered.push_back(found);
            Some(process)
        })
    }

    /// Keeps the descriptor of a process that asks, as long as there is room.
    pub(super) fn remember(&self, process: &Arc<Process>) {
        let pid = process.id().pid;
        let State { remembered, .. } = &mut *self.state.lock();
        remembered.retain(|(other, _)| *other != pid);
        remembered.push_back((pid, Arc::clone(process)));
        if remembered.len() > self.memory {
            remembered.pop_front();
        }
    }

    /// Whether one of them has died: one system call.
    pub(crate) fn any_dead(&self) -> bool {
        let mut event = [EpollEvent::empty()];
        loop {
            match self.epoll.wait(&mut event, EpollTimeout::ZERO) {
                Err(Errno::EINTR) => {}
                found => return matches!(found, Ok(1..)),
            }
        }
    }

    /// Those that have died and have not been removed.
    pub(crate) fn dead(&self) -> Vec<TaskId> {
        let state = self.state.lock();
        let mut events = vec![EpollEvent::empty(); state.tasks.len().max(1)];
        let found = self.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap_or(0);
        events.iter().take(found).filter_map(|event| state.by_fd.get(&event.data()).copied()).collect()
    }
}

impl AsFd for Watch {
    /// Readable while a task has died and has not been removed.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}
