//! Watches tasks for their death, and caches the pidfds of recent writers.
//!
//! Owns one epoll instance over pidfds. Requests poll it and never wait for it. A dead task is reported until it is
//! removed, so no caller can miss it. Does not know claims.
//!
//! The pidfds of other processes are cached, because writers tend to write again, and checking a pidfd is cheaper than
//! opening one.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use parking_lot::Mutex;

use super::Process;
use crate::model::task::{Pid, TaskId};

/// The watched tasks and the cached pidfds.
#[derive(Debug)]
pub(crate) struct Watch {
    epoll: Epoll,
    state: Mutex<State>,
    limit: usize,
    /// The size of the cache, in processes.
    cache_size: usize,
}

#[derive(Debug, Default)]
struct State {
    tasks: BTreeMap<TaskId, Arc<Process>>,
    /// Processes that are not watched, the most recently used last.
    cached: VecDeque<(Pid, Arc<Process>)>,
}

/// The largest size of the cache, in processes. It is searched linearly.
const MAX_CACHE: usize = 256;

impl Watch {
    /// Creates the epoll instance and raises the soft limit of open files to the hard limit, because each watched
    /// task takes a descriptor.
    ///
    /// # Errors
    /// Returns an error if no descriptors are left.
    pub(crate) fn new() -> io::Result<Self> {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        let hard = usize::try_from(hard).unwrap_or(usize::MAX).min(1 << 20);
        // For the descriptors that requests open for a moment and those that the daemon always has open.
        let reserve = (hard / 16).max(64);
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let cache_size = MAX_CACHE.min(reserve / 2);
        Ok(Self { epoll, state: Mutex::default(), limit: hard.saturating_sub(reserve), cache_size })
    }

    /// Like [`Watch::new`], with a cache of this size.
    #[cfg(test)]
    pub(super) fn with_cache(cache_size: usize) -> io::Result<Self> {
        Ok(Self { cache_size, ..Self::new()? })
    }

    /// The largest number of tasks that can be watched.
    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    /// Starts to watch a task, which may have died already.
    ///
    /// # Errors
    /// Returns an error if the kernel cannot watch more descriptors.
    pub(crate) fn add(&self, process: Arc<Process>) -> io::Result<()> {
        let mut state = self.state.lock();
        let pid = process.id().pid.get().into();
        self.epoll.add(process.pidfd(), EpollEvent::new(EpollFlags::EPOLLIN, pid))?;
        if let Some(old) = state.tasks.insert(process.id(), process) {
            let _ = self.epoll.delete(old.pidfd());
        }
        Ok(())
    }

    /// Stops watching a task.
    pub(crate) fn remove(&self, task: &TaskId) -> Option<Arc<Process>> {
        let mut state = self.state.lock();
        let process = state.tasks.remove(task)?;
        let _ = self.epoll.delete(process.pidfd());
        Some(process)
    }

    /// Returns a watched task.
    pub(crate) fn get(&self, task: &TaskId) -> Option<Arc<Process>> {
        self.state.lock().tasks.get(task).cloned()
    }

    /// Returns the process `pid` if there is a pidfd of it. A process that is alive has had its PID since the pidfd
    /// was opened.
    pub(super) fn with_pid(&self, pid: Pid) -> Option<Arc<Process>> {
        self.newest_with_pid(pid).filter(|process| process.is_alive())
    }

    fn newest_with_pid(&self, pid: Pid) -> Option<Arc<Process>> {
        let State { tasks, cached } = &mut *self.state.lock();
        let watched = tasks.range(with_pid(pid)).next_back().map(|(_, process)| Arc::clone(process));
        watched.or_else(|| {
            let at = cached.iter().position(|(other, _)| *other == pid)?;
            let found = cached.remove(at)?;
            let process = Arc::clone(&found.1);
            cached.push_back(found);
            Some(process)
        })
    }

    /// Caches the pidfd of a process that sends requests; the least recently used one makes room.
    pub(super) fn cache(&self, process: &Arc<Process>) {
        let pid = process.id().pid;
        let State { cached, .. } = &mut *self.state.lock();
        cached.retain(|(other, _)| *other != pid);
        cached.push_back((pid, Arc::clone(process)));
        if cached.len() > self.cache_size {
            cached.pop_front();
        }
    }

    /// Whether a watched task has died. Costs one system call.
    pub(crate) fn any_dead(&self) -> bool {
        let mut event = [EpollEvent::empty()];
        loop {
            match self.epoll.wait(&mut event, EpollTimeout::ZERO) {
                Err(Errno::EINTR) => {}
                found => return matches!(found, Ok(1..)),
            }
        }
    }

    /// Returns the watched tasks that have died.
    pub(crate) fn dead(&self) -> Vec<TaskId> {
        let state = self.state.lock();
        let mut events = vec![EpollEvent::empty(); state.tasks.len().max(1)];
        let found = self.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap_or(0);
        let pid_of = |event: &EpollEvent| Pid::new(u32::try_from(event.data()).ok()?);
        let pids: BTreeSet<Pid> = events.iter().take(found).filter_map(pid_of).collect();
        let tasks = pids.into_iter().flat_map(|pid| state.tasks.range(with_pid(pid)));
        // A living process may have got the PID of a dead one.
        tasks.filter(|(_, process)| !process.is_alive()).map(|(task, _)| *task).collect()
    }
}

/// The tasks that have or had this PID.
fn with_pid(pid: Pid) -> RangeInclusive<TaskId> {
    TaskId { pid, ino: 0 }..=TaskId { pid, ino: u64::MAX }
}

impl AsFd for Watch {
    /// A descriptor that is readable while a watched task is dead.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}
