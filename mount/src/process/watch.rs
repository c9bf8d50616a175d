//! Watches tasks for their death, and caches the pidfds of recent writers.
//!
//! Owns one epoll instance over pidfds. Requests poll it and never wait for it. A dead task is reported until it is
//! removed, so no caller can miss it. Does not know claims.
//!
//! The pidfds of other processes are cached, because writers tend to write again, and checking a pidfd is cheaper than
//! opening one.
//!
//! The pidfds of watched tasks are kept for the next worker too (`kept`).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use parking_lot::Mutex;

use super::Process;
use super::kept::{KeptPidfds, Taken};
use crate::model::task::{Pid, TaskId};

/// The watched tasks and the cached pidfds.
#[derive(Debug)]
pub(crate) struct Watch {
    epoll: Epoll,
    kept: KeptPidfds,
    state: Mutex<State>,
    limit: usize,
    /// The size of the cache, in processes.
    cache_size: usize,
}

#[derive(Debug, Default)]
struct State {
    tasks: BTreeMap<TaskId, Arc<Process>>,
    /// The tasks of an earlier worker that nobody has asked for yet.
    taken: Taken,
    /// How many messages keep pidfds, those of former tasks too; `None` after the kernel had no room for them.
    messages: Option<usize>,
    /// Processes that are not watched, the most recently used last.
    cached: VecDeque<(Pid, Arc<Process>)>,
}

/// The largest size of the cache, in processes. It is searched linearly.
const MAX_CACHE: usize = 256;

/// How many messages may keep the pidfds of this many watched tasks. Each new task takes one, and when there are too many,
/// all are replaced by a few large ones.
fn most_messages(tasks: usize) -> usize {
    128 + (tasks / 2).min(4096)
}

impl Watch {
    /// Creates the epoll instance and raises the soft limit of open files to the hard limit, because each watched
    /// task takes a descriptor. Of the tasks that `kept` has from an earlier worker, only those that are wanted stay.
    ///
    /// # Errors
    /// Returns an error if no descriptors are left.
    pub(crate) fn new(kept: KeptPidfds, is_wanted: impl Fn(&TaskId) -> bool) -> io::Result<Self> {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        let hard = usize::try_from(hard).unwrap_or(usize::MAX).min(1 << 20);
        // For the descriptors that requests open for a moment and those that the daemon always has open.
        let reserve = (hard / 16).max(64);
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let cache_size = MAX_CACHE.min(reserve / 2);
        let (taken, messages) = kept.take(is_wanted);
        let state = State { taken, messages: Some(messages), ..State::default() };
        Ok(Self { epoll, kept, state: Mutex::new(state), limit: hard.saturating_sub(reserve), cache_size })
    }

    /// Like [`Watch::new`], with a cache of this size.
    #[cfg(test)]
    pub(super) fn with_cache(cache_size: usize) -> io::Result<Self> {
        Ok(Self { cache_size, ..Self::new(KeptPidfds::new()?, |_| false)? })
    }

    /// The largest number of tasks that can be watched.
    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    /// Takes a task that an earlier worker watched, dead or alive.
    pub(crate) fn take_kept(&self, task: TaskId) -> Option<Process> {
        let pidfd = self.state.lock().taken.remove(&task)?;
        let process = Process::new(task, pidfd);
        process.is_kept.store(true, Ordering::Relaxed);
        Some(process)
    }

    /// Starts to watch a task, which may have died already. The next worker can take it from now on.
    ///
    /// # Errors
    /// Returns an error if the kernel cannot watch more descriptors.
    pub(crate) fn add(&self, process: Arc<Process>) -> io::Result<()> {
        let mut state = self.state.lock();
        let pid = process.id().pid.get().into();
        self.epoll.add(process.pidfd(), EpollEvent::new(EpollFlags::EPOLLIN, pid))?;
        let is_kept = process.is_kept.swap(true, Ordering::Relaxed);
        let added = Arc::clone(&process);
        if let Some(old) = state.tasks.insert(process.id(), process) {
            let _ = self.epoll.delete(old.pidfd());
        }
        if !is_kept {
            self.keep(&mut state, &added);
        }
        Ok(())
    }

    /// Keeps the pidfd of a new task for the next worker.
    fn keep(&self, state: &mut State, process: &Process) {
        let Some(messages) = state.messages else { return };
        let has_room = messages < most_messages(state.tasks.len());
        if has_room && self.kept.keep(&[(process.id(), process.pidfd())]).is_ok() {
            state.messages = Some(messages + 1);
            return;
        }
        let tasks: Vec<_> = state.tasks.values().map(|process| (process.id(), process.pidfd())).collect();
        // The old messages are removed last, because this process may be killed at any moment, unless there is no room
        // for both.
        let replaced = self.kept.keep(&tasks).inspect(|_| self.kept.drop_oldest(messages)).or_else(|_| {
            self.kept.drop_oldest(usize::MAX);
            self.kept.keep(&tasks)
        });
        if let Err(error) = &replaced {
            log::warn!("the pidfds of {} tasks cannot be kept for the next worker: {error}", tasks.len());
        }
        state.messages = replaced.ok();
    }

    /// Stops watching a task.
    pub(crate) fn remove(&self, task: &TaskId) -> Option<Arc<Process>> {
        let mut state = self.state.lock();
        let process = state.tasks.remove(task)?;
        let _ = self.epoll.delete(process.pidfd());
        process.is_kept.store(false, Ordering::Relaxed);
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
        let State { tasks, cached, .. } = &mut *self.state.lock();
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
