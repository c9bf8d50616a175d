//! The proof that a thread is outside clone(2).
//!
//! Owns what counts as proof. Does not know masks.
//!
//! A thread whose mask was just set may be inside a clone(2) that began before, and then creates a thread with the old
//! mask. It is doubtful until one of these is seen:
//!
//! | seen | why it is a proof |
//! | --- | --- |
//! | it has exited | its children exist, and are listed |
//! | it sleeps (state `S`) or is stopped | the kernel does not sleep so between copying the mask and showing the child |
//! | it does not run, and its kernel stack is without `copy_process` | that function copies the mask and shows the child |
//! | only where stacks prove nothing: it has run for [`ENOUGH`] | a clone(2) uses microseconds of CPU time; when it does not run, time does not count |
//!
//! The wall time that has passed proves nothing: a thread can be preempted inside clone(2) for as long as others run.
//! Nor does the CPU time prove much in a virtual machine: while the hypervisor brings in a page of the new thread's stack,
//! the time counts as the thread's own.
//! State `D` proves nothing either: clone(2) may wait for memory. (With userfaultfd(2) a privileged program can keep its
//! own clone(2) in state `S`. It could as well change its masks.)

use std::collections::HashMap;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::stacks::Stacks;
use crate::procfs::{self, RunTime, Stat};

/// The CPU time in nanoseconds after which a thread has left the clone(2) that it may have been in. A clone(2) of a
/// thread uses less than 0.1 ms; the rest is for interrupts and for the time that a hypervisor takes away, both of which
/// the kernel may count as the thread's own.
const ENOUGH: u64 = 40_000_000;
/// The same in clock ticks of 10 ms, of which the first may have been nearly full before. Only these are up to date for a
/// thread that is alone on a CPU without clock ticks (`nohz_full`).
const ENOUGH_TICKS: u64 = 5;

/// The threads that may be inside a clone(2) that began before their mask was set.
#[derive(Debug, Default)]
pub(super) struct Doubtful(HashMap<u32, Option<Used>>);

/// The CPU time that a thread had used when it was first looked at.
///
/// Setting another mask brings the kernel's figures up to date, so the difference to a later figure is time after it.
#[derive(Clone, Copy, Debug)]
struct Used {
    ticks: u64,
    run_time: Option<RunTime>,
}

impl Doubtful {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Removes all threads.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// Adds threads whose mask was set.
    pub(super) fn add(&mut self, tids: impl Iterator<Item = u32>) {
        self.0.extend(tids.map(|tid| (tid, None)));
    }

    /// Removes the threads that are proven to be outside. `with_stacks`: also by their kernel stacks, which takes longer.
    /// Stops when `is_over` returns true, which it asks every now and then.
    pub(super) fn look(
        &mut self,
        tasks: &Arc<OwnedFd>,
        stacks: &Stacks,
        with_stacks: bool,
        is_over: impl Fn() -> bool,
    ) {
        /// A look at a thread takes about 8 us.
        const INTERVAL: usize = 32;
        let (mut looks, mut over) = (0, false);
        let by_time = stacks.prove_nothing();
        self.0.retain(|&tid, used| {
            looks += 1;
            over = over || looks % INTERVAL == 0 && is_over();
            over || is_doubtful(tasks.as_fd(), tid, used, by_time)
        });
        if with_stacks && !over && !self.is_empty() {
            for tid in stacks.outside_clone(tasks, self.0.keys().copied().collect()) {
                self.0.remove(&tid);
            }
        }
    }
}

/// Whether the state of a thread proves that it is outside.
pub(super) fn is_outside_clone(stat: &Stat) -> bool {
    !matches!(stat.state, b'R' | b'D')
}

fn is_doubtful(tasks: BorrowedFd<'_>, tid: u32, used: &mut Option<Used>, by_time: bool) -> bool {
    // A thread that cannot be read has gone.
    let Ok(Some(stat)) = procfs::stat_of_thread(tasks, tid) else { return false };
    if is_outside_clone(&stat) {
        return false;
    }
    if !by_time {
        return true;
    }
    let run_time = procfs::run_time_of_thread(tasks, tid).ok().flatten();
    let before = *used.get_or_insert(Used { ticks: stat.used, run_time });
    let nanoseconds = run_time
        .zip(before.run_time)
        .map_or(0, |(now, before)| now.nanoseconds.saturating_sub(before.nanoseconds));
    nanoseconds < ENOUGH && stat.used.saturating_sub(before.ticks) < ENOUGH_TICKS
}
