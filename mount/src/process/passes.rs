//! Passes over all threads of a task, until no thread can have been missed.
//!
//! Owns how threads are listed and when the listing is complete. Does not know what a pass does with a thread.
//!
//! # How all threads of a task get a mask
//!
//! The kernel sets the mask of one thread per system call, and a new thread starts with the mask of the thread that
//! created it. A thread that already runs inside clone(2) while its mask is set may therefore leave behind a new
//! thread with the old mask, which no listing has shown yet. So the threads are gone through in passes:
//!
//! ```text
//!     +--> list the threads       /proc/PID/task
//!     |    count them             `num_threads` of /proc/PID/stat
//!     |    the pass               look at every mask; set the wrong ones
//!     |         |
//!     |    is it over? ---------> yes: before the listing every thread that got a mask was outside clone(2),
//!     |         | no                   nothing was wrong, and the listed threads that still exist are as many as
//!     |         |                      the count says
//!     |    wait until every thread that got a mask has been outside clone(2) since: see `clone`
//!     +---------+
//! ```
//!
//! Why the last pass has seen every thread: the threads that it found alive existed when they were counted, and they
//! are as many as were counted, so there was no other thread at that moment. A listing alone proves nothing: the kernel
//! ends it early if the thread at its position exits. Each thread of that moment has the mask and does not create a
//! thread with another one, so no later thread has another one either, unless the program sets it.
//!
//! A task of one thread that waits for the daemon's answer needs one pass, because it cannot create threads meanwhile.
//! For any other task of one thread, `stat` tells at once that the thread is outside clone(2) and that there is no other.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;

use super::clone::{Doubtful, is_outside_clone};
use super::{Process, Processes};
use crate::procfs::{self, Stat};

/// How often a task may widen masks that were set before it is given up.
const RELAPSES: u32 = 16;
/// How long a task is waited for after the first pass. In that time a thread that runs leaves clone(2), which takes
/// microseconds, however busy the machine is; and a user cannot occupy the daemon for longer with one write.
pub(super) const PATIENCE: Duration = Duration::from_millis(600);
/// The same when a refused claim is undone, so that a refusal takes 0.7 s at most.
pub(super) const PATIENCE_TO_UNDO: Duration = Duration::from_millis(50);
/// The first pause before doubtful threads are looked at again; the others are twice as long each.
const FIRST_PAUSE: Duration = Duration::from_micros(50);
/// How often doubtful threads are looked at before the next pass, which gives their children the mask.
const LOOKS: u32 = 6;

/// The thread, if any, that is blocked in a write(2) until the daemon answers.
///
/// Such a thread creates no threads and sets no masks, although /proc may show it in state `D` instead of `S`: once a
/// client of the mount was interrupted, all of them wait in that state. (Every write comes from a blocked thread,
/// because the mount does not request `FUSE_ASYNC_DIO`.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockedWriter {
    tid: Option<u32>,
    limit: Option<TimeLimit>,
}

impl BlockedWriter {
    /// No thread is known to be blocked.
    pub(crate) const NONE: Self = Self { tid: None, limit: None };

    /// The thread `tid` of the daemon's PID namespace.
    pub(crate) const fn thread(tid: u32) -> Self {
        Self { tid: Some(tid), limit: None }
    }

    /// The same, for a request with a limit.
    pub(crate) const fn within(self, limit: TimeLimit) -> Self {
        Self { limit: Some(limit), ..self }
    }

    /// Returns whether there is no time left to set more masks.
    pub(super) fn is_out_of_time(self) -> bool {
        self.limit.is_some_and(|limit| limit.is_over())
    }

    fn is(self, tid: u32) -> bool {
        self.tid == Some(tid)
    }
}

/// Until when the daemon works and waits for one request. All tasks of the request share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TimeLimit {
    /// No more masks are set for a claim.
    work: Instant,
    /// No proof is waited for.
    proofs: Instant,
    /// No proof is waited for while masks are restored; they are restored in any case.
    undoing: Instant,
}

impl TimeLimit {
    /// A request that may work for `work` from now on, and may wait for `waiting`, of which a fifth is left for undoing it.
    pub(crate) fn new(now: Instant, work: Duration, waiting: Duration) -> Self {
        Self { work: now + work, proofs: now + waiting * 4 / 5, undoing: now + waiting }
    }

    /// Returns whether there is no time left for more work.
    pub(crate) fn is_over(self) -> bool {
        Instant::now() >= self.work
    }
}

/// The purpose of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Masks are set for a claim.
    Claim,
    /// The masks of a claim are checked.
    Check,
    /// A claim is undone.
    Undo,
    /// A claim has ended.
    Release,
}

impl Purpose {
    /// Returns until when threads are waited for after the first pass.
    fn deadline(self, writer: BlockedWriter) -> Instant {
        let patience = match self {
            Self::Claim | Self::Check | Self::Release => PATIENCE,
            Self::Undo => PATIENCE_TO_UNDO,
        };
        let deadline = Instant::now() + patience;
        match (writer.limit, self) {
            (None, _) => deadline,
            (Some(limit), Self::Claim | Self::Check) => deadline.min(limit.proofs),
            (Some(limit), Self::Undo | Self::Release) => deadline.min(limit.undoing),
        }
    }
}

thread_local!(static WAITED: Cell<Duration> = const { Cell::new(Duration::ZERO) });

/// Returns how long this thread has waited for proofs since it was started.
pub(crate) fn waited() -> Duration {
    WAITED.get()
}

fn counted_as_waiting(wait: impl FnOnce()) {
    let started = Instant::now();
    wait();
    WAITED.set(WAITED.get() + started.elapsed());
}

/// How the threads of a task are listed.
enum Listing {
    /// The task has one thread, which is blocked in a write(2) and so creates no other.
    SingleThread(u32),
    /// The open directory `/proc/PID/task`, and the PID.
    Directory(Arc<OwnedFd>, u32),
}

impl Listing {
    /// Lists the threads. The newest come first: they are the most likely to exit before they are looked at. If they are
    /// to be `counted`, the state of the first thread and the number of threads are read after that.
    fn threads(&self, counted: bool) -> io::Result<(Vec<u32>, Option<Stat>)> {
        match self {
            Self::SingleThread(tid) => Ok((vec![*tid], None)),
            Self::Directory(tasks, leader) => {
                let (mut tids, stat) = procfs::list_threads(tasks.as_fd(), counted.then_some(*leader))?;
                // The kernel lists them by age.
                tids.reverse();
                Ok((tids, stat))
            }
        }
    }
}

/// The results of one pass.
#[derive(Debug, Default)]
pub(super) struct Pass {
    /// How many of the listed threads still existed, apart from those that had a wrong mask and ended before it was set.
    pub(super) alive: u64,
    /// The threads whose mask it set.
    pub(super) set: Vec<u32>,
    /// Whether a thread that an earlier pass had set has another mask again.
    pub(super) relapse: bool,
}

/// How the passes ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PassesEnd {
    /// Every thread was seen, and nothing was wrong.
    Done,
    /// The task has died.
    Gone,
    /// The task changes masks as fast as they are set.
    KeepsChanging,
    /// Threads came and went, or did not run, for so long that not all of them could be proven to have the mask.
    Unsettled,
}

impl Processes {
    /// Calls `pass` with the threads of the task until it has nothing more to do, as the head of this file shows.
    pub(super) fn in_passes<E: From<io::Error>>(
        &self,
        process: &Process,
        writer: BlockedWriter,
        purpose: Purpose,
        mut pass: impl FnMut(&[u32]) -> Result<Pass, E>,
    ) -> Result<PassesEnd, E> {
        let Some(listing) = self.listing(process, writer)? else { return Ok(PassesEnd::Gone) };
        let mut doubtful = Doubtful::default();
        let (mut relapses, mut deadline) = (0, None);
        loop {
            let is_first = deadline.is_none();
            // The first pass sets masks, so it is not the last one.
            let (tids, stat) = listing.threads(!is_first || purpose == Purpose::Check)?;
            let count = stat.as_ref().map_or(0, |stat| stat.threads);
            if count == 1 && stat.is_some_and(|stat| is_outside_clone(&stat)) {
                doubtful.clear();
            }
            let settled = doubtful.is_empty();
            // Checked after the listing: so the ids belong to this task, and not to one that reused its PID.
            if tids.is_empty() || !process.is_alive() {
                return Ok(PassesEnd::Gone);
            }
            let Pass { alive, set, relapse } = pass(&tids)?;
            let Listing::Directory(tasks, _) = &listing else { return Ok(PassesEnd::Done) };
            if settled && set.is_empty() && alive == count {
                return Ok(PassesEnd::Done);
            }
            relapses += u32::from(relapse);
            if relapses == RELAPSES {
                return Ok(PassesEnd::KeepsChanging);
            }
            doubtful.add(set.into_iter().filter(|&tid| !writer.is(tid)));
            // A task of many threads is not refused because its first pass takes long.
            let deadline = *deadline.get_or_insert_with(|| purpose.deadline(writer));
            if is_first && tids.len() == 1 {
                continue;
            }
            for look in 0..LOOKS {
                if look == 0 {
                    doubtful.look(tasks, &self.stacks, false, || writer.is_out_of_time());
                } else {
                    // Another thread reads the stacks.
                    counted_as_waiting(|| {
                        doubtful.look(tasks, &self.stacks, true, || writer.is_out_of_time());
                    });
                }
                if doubtful.is_empty() {
                    break;
                }
                // Without time to wait, the stacks are looked at once.
                if look > 0 && Instant::now() >= deadline {
                    log::debug!(
                        "task {}: threads that may be inside clone(2): {doubtful:?}",
                        process.id().pid
                    );
                    return Ok(PassesEnd::Unsettled);
                }
                if Instant::now() < deadline {
                    counted_as_waiting(|| std::thread::sleep(FIRST_PAUSE * 2_u32.pow(look)));
                }
            }
            if settled && Instant::now() >= deadline {
                log::debug!("task {}: {alive} threads found, {count} counted", process.id().pid);
                return Ok(PassesEnd::Unsettled);
            }
        }
    }

    /// `None` if the task has gone.
    fn listing(&self, process: &Process, writer: BlockedWriter) -> io::Result<Option<Listing>> {
        let leader = process.id().pid.get();
        let tasks = format!("{leader}/task");
        if writer.is(leader) && self.proc.count_subdirectories(&tasks)? == Some(1) {
            return Ok(Some(Listing::SingleThread(leader)));
        }
        let directory = self.proc.open(&tasks, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
        Ok(directory.map(|tasks| Listing::Directory(Arc::new(tasks), leader)))
    }
}
