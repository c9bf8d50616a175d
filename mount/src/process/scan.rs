//! One look at all processes of the machine, and at their threads.
//!
//! Owns finding processes by the affinity masks of their threads. Does not know why they are looked for.
//!
//! # The cost
//!
//! A process costs an entry of `/proc` and one `sched_getaffinity`. Threads other than the first are looked at only if
//! the caller continues after that, and only in processes that have more than one. To ask each process for the number of
//! its threads would cost more than all the rest. So the processes that had several threads last time are asked first:
//! if the kernel's number of all threads leaves none for other processes, no other process is asked.

use std::collections::HashSet;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::AsFd as _;

use nix::fcntl::OFlag;

use super::mask::mask_of;
use super::{Facts, Processes};
use crate::model::command::CgroupId;
use crate::model::cpuset::CpuSet;
use crate::model::task::{Pid, TaskId};
use crate::procfs;

/// How many threads one scan looks at, so that it ends: ten times as many as a user may have by default.
const MAX_THREADS: usize = 1 << 18;
/// How many threads of one process are returned, each with another mask.
const MAX_MASKS: usize = 16;
/// How often the threads of a process are listed if the listing is incomplete because threads end meanwhile.
const LISTINGS: usize = 3;

/// A process that the scan found.
#[derive(Debug)]
pub(crate) struct ScannedProcess {
    pub(crate) task: TaskId,
    pub(crate) facts: Facts,
    /// The real uids of its first thread, unless that has exited, and of `threads`.
    pub(crate) users: Vec<u32>,
    /// Their cgroups, see [`Processes::cgroup`].
    pub(crate) cgroups: Vec<CgroupId>,
    /// The start time in clock ticks since boot.
    pub(crate) started: u64,
    /// Threads whose mask is wanted, with their masks; one for each mask.
    pub(crate) threads: Vec<(u32, CpuSet)>,
}

/// The threads with a wanted mask of a process that is not yet looked at.
struct Found {
    pid: u32,
    threads: Vec<(u32, CpuSet)>,
}

/// Whether the scan continues.
type Go = ControlFlow<()>;

impl Processes {
    /// Calls `visit` with the processes that have a living thread for whose mask `wanted` returns true, without kernel
    /// threads: first those whose first thread has such a mask, then those with such another thread. Both are in the
    /// order of their age, the oldest first. The scan ends when `visit` says so.
    ///
    /// # Errors
    /// Returns an error if `/proc` cannot be read.
    pub(crate) fn scan(
        &self,
        wanted: &dyn Fn(&CpuSet) -> bool,
        visit: &mut dyn FnMut(ScannedProcess) -> Go,
    ) -> io::Result<()> {
        let (mut pids, mut found) = (Vec::new(), Vec::new());
        self.proc.each_pid(|pid| {
            pids.push(pid);
            if let Ok(Some(mask)) = mask_of(pid)
                && wanted(&mask)
            {
                found.push(Found { pid, threads: vec![(pid, mask)] });
            }
        })?;
        // Every CPU has about ten kernel threads; one cheap check excludes each, and the first threads that have exited.
        found.retain(|found| self.proc.may_have_program(found.pid));
        if self.visit_by_age(found, visit).is_continue() {
            let found = self.with_wanted_threads(&pids, wanted);
            let _ = self.visit_by_age(found, visit);
        }
        Ok(())
    }

    fn visit_by_age(&self, found: Vec<Found>, visit: &mut dyn FnMut(ScannedProcess) -> Go) -> Go {
        let with_age = |found: Found| {
            let first = self.proc.thread_stat(found.pid, found.pid).ok().flatten()?;
            Some((first.started, found.pid, first.has_exited(), found.threads))
        };
        let mut by_age: Vec<_> = found.into_iter().filter_map(with_age).collect();
        by_age.sort_unstable_by_key(|&(started, pid, ..)| (started, pid));
        by_age.into_iter().try_for_each(|(started, pid, first_has_exited, threads)| {
            match self.look_at(pid, first_has_exited, threads) {
                Some(process) => visit(ScannedProcess { started, ..process }),
                None => Go::Continue(()),
            }
        })
    }

    fn look_at(
        &self,
        pid: u32,
        first_has_exited: bool,
        threads: Vec<(u32, CpuSet)>,
    ) -> Option<ScannedProcess> {
        let process = self.open_leader(Pid::new(pid)?).ok().flatten()?;
        let facts = self.facts(&process).ok().flatten().filter(|facts| !facts.kernel_thread)?;
        let (mut users, mut cgroups) = (Vec::new(), Vec::new());
        if !first_has_exited {
            users.push(facts.uids.real);
            cgroups.push(self.cgroup(&process)?);
        }
        // A thread has credentials and, in some hierarchies, a cgroup of its own.
        let is_alive = |(tid, _): &(u32, CpuSet)| {
            if *tid == pid {
                return !first_has_exited;
            }
            let Ok(Some(status)) = self.proc.thread_status(pid, *tid) else { return false };
            if status.has_exited() {
                return false;
            }
            users.extend(status.numbers("Uid").first());
            cgroups.extend(self.cgroup_of_thread(pid, *tid));
            true
        };
        let threads: Vec<(u32, CpuSet)> = threads.into_iter().filter(is_alive).collect();
        let task = process.id();
        (!threads.is_empty() && process.is_alive()).then_some(ScannedProcess {
            task,
            facts,
            users,
            cgroups,
            started: 0,
            threads,
        })
    }

    /// Returns the processes of which a thread other than the first has a wanted mask.
    fn with_wanted_threads(&self, pids: &[u32], wanted: &dyn Fn(&CpuSet) -> bool) -> Vec<Found> {
        let mut left = MAX_THREADS;
        let mut found = Vec::new();
        for pid in self.with_several_threads(pids) {
            let tids = self.list_threads(pid);
            if tids.len() > left {
                log::warn!(
                    "there are more than {MAX_THREADS} threads; process {pid} and later ones are left out"
                );
                break;
            }
            left -= tids.len();
            let mut seen = HashSet::new();
            let others = tids.into_iter().filter(|tid| *tid != pid);
            let masks = others.filter_map(|tid| Some((tid, mask_of(tid).ok().flatten()?)));
            let threads = masks.filter(|(_, mask)| wanted(mask) && seen.insert(mask.clone()));
            let threads: Vec<_> = threads.take(MAX_MASKS).collect();
            if !threads.is_empty() {
                found.push(Found { pid, threads });
            }
        }
        found
    }

    /// Returns the wanted threads of all processes that have several threads.
    fn with_several_threads(&self, pids: &[u32]) -> Vec<u32> {
        let others_of = |pid: u32| {
            let count = self.proc.count_subdirectories(&format!("{pid}/task")).ok().flatten();
            count.map_or(0, |count| count.saturating_sub(1))
        };
        let mut known = self.multi_threaded.lock().clone();
        known.retain(|&pid| others_of(pid) > 0);
        // The kernel's number has 16 bits (sysinfo(2)); a difference that is a multiple of 65,536 is not to be expected.
        let all = nix::sys::sysinfo::sysinfo().map(|info| info.process_count());
        let threads =
            known.iter().fold(pids.len() as u16, |sum, &pid| sum.wrapping_add(others_of(pid) as u16));
        if all != Ok(threads) {
            known = pids.iter().copied().filter(|&pid| others_of(pid) > 0).collect();
        }
        self.multi_threaded.lock().clone_from(&known);
        known
    }

    pub(super) fn list_threads(&self, pid: u32) -> Vec<u32> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
        let Ok(Some(tasks)) = self.proc.open(&format!("{pid}/task"), flags) else { return Vec::new() };
        let mut most = Vec::new();
        for _ in 0..LISTINGS {
            let Ok((tids, leader)) = procfs::list_threads(tasks.as_fd(), Some(pid)) else { break };
            let is_complete = tids.len() as u64 >= leader.map_or(0, |stat| stat.threads);
            if tids.len() > most.len() {
                most = tids;
            }
            if is_complete {
                break;
            }
        }
        most
    }
}
