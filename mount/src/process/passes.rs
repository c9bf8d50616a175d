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
//!        +--> list the threads        /proc/PID/task
//!        |          |
//!        |    the pass                look at every mask; set the wrong ones
//!        |          |
//!        |    is it over?  ---------> yes: nothing was wrong, and
//!        |          | no                   - before this pass every thread was asleep, or
//!        |          |                      - this was the fourth such pass in a row
//!        |    is every thread asleep? A thread that sleeps is not inside clone(2).
//!        |          | no: pause, so that a clone(2) can end: 50, 100, 200, 400 us
//!        +----------+
//! ```
//!
//! After [`PASSES`] passes the task is given up: it changes its masks as fast as they are set. A task of one thread
//! that waits for the daemon's answer needs one pass, because it cannot create threads meanwhile.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use nix::fcntl::OFlag;

use super::{Process, Processes};
use crate::procfs;

/// The number of passes over the threads of a task before it is given up.
const PASSES: u32 = 16;
/// The number of passes in a row that must find nothing wrong if a thread was not asleep.
const QUIET_PASSES: u32 = 4;
/// The first pause, in which a thread that is not asleep can finish creating another. Doubles with each quiet pass.
const PAUSE: Duration = Duration::from_micros(50);
/// The largest number of threads whose state is checked. Checking more takes longer than all pauses together, so larger
/// tasks get all pauses at once, and are listed only once more.
const MAX_STATE_CHECKS: usize = 100;
/// The sum of all pauses.
const LONG_PAUSE: Duration = PAUSE.saturating_mul(2_u32.pow(QUIET_PASSES) - 1);

/// The thread, if any, that is blocked in a write(2) until the daemon answers.
///
/// Such a thread creates no threads and sets no masks, although /proc may show it in state `D` instead of `S`: once a
/// client of the mount was interrupted, all of them wait in that state. (Every write comes from a blocked thread,
/// because the mount does not request `FUSE_ASYNC_DIO`.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockedWriter(Option<u32>);

impl BlockedWriter {
    /// No thread is known to be blocked.
    pub(crate) const NONE: Self = Self(None);

    /// The thread `tid` of the daemon's PID namespace.
    pub(crate) const fn thread(tid: u32) -> Self {
        Self(Some(tid))
    }

    fn is(self, tid: u32) -> bool {
        self.0 == Some(tid)
    }
}

/// How the threads of a task are listed.
enum Listing {
    /// The task has one thread, which is blocked in a write(2) and so creates no other.
    SingleThread(u32),
    /// The open directory `/proc/PID/task`.
    Directory(OwnedFd),
}

impl Listing {
    fn tids(&self) -> io::Result<Vec<u32>> {
        match self {
            Self::SingleThread(tid) => Ok(vec![*tid]),
            Self::Directory(tasks) => {
                let mut tids = Vec::new();
                procfs::each_number(tasks.as_fd(), |tid| tids.push(tid))?;
                Ok(tids)
            }
        }
    }

    /// Whether no thread can be creating another one that the listing does not show yet. Returns false after a
    /// pause if that is not certain, and true after a long enough pause if there are too many threads to check.
    fn is_complete_or_pause(&self, tids: &[u32], writer: BlockedWriter, quiet: u32) -> bool {
        let Self::Directory(tasks) = self else { return true };
        if tids.len() > MAX_STATE_CHECKS {
            std::thread::sleep(LONG_PAUSE);
            return true;
        }
        // A thread that has gone creates none; the next pass shows those that it created before.
        let is_asleep = |&tid: &u32| {
            writer.is(tid)
                || !matches!(procfs::stat_of_thread(tasks.as_fd(), tid), Ok(Some(stat)) if stat.state != b'S')
        };
        let all = tids.iter().all(is_asleep);
        if !all {
            std::thread::sleep(PAUSE * 2_u32.pow(quiet));
        }
        all
    }
}

/// How the passes ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PassesEnd {
    /// Every thread was seen, and nothing was wrong.
    Done,
    /// The task has died.
    Gone,
    /// Every pass found something wrong.
    KeepsChanging,
}

impl Processes {
    /// Calls `pass` with its number and the threads of the task until it has nothing more to do, as the head of this
    /// file shows. `pass` returns whether it found something wrong.
    pub(super) fn in_passes<E: From<io::Error>>(
        &self,
        process: &Process,
        writer: BlockedWriter,
        mut pass: impl FnMut(u32, &[u32]) -> Result<bool, E>,
    ) -> Result<PassesEnd, E> {
        let Some(listing) = self.listing(process, writer)? else { return Ok(PassesEnd::Gone) };
        // Before the first pass nothing was set, so no thread can have created another with an old mask.
        let (mut quiet, mut complete) = (0, true);
        for number in 0..PASSES {
            let tids = listing.tids()?;
            // Checked after the listing: so the ids belong to this task, and not to one that reused its PID.
            if tids.is_empty() || !process.is_alive() {
                return Ok(PassesEnd::Gone);
            }
            quiet = if pass(number, &tids)? { 0 } else { quiet + 1 };
            if quiet == QUIET_PASSES || quiet > 0 && complete {
                return Ok(PassesEnd::Done);
            }
            complete = listing.is_complete_or_pause(&tids, writer, quiet);
        }
        Ok(PassesEnd::KeepsChanging)
    }

    /// `None` if the task has gone.
    fn listing(&self, process: &Process, writer: BlockedWriter) -> io::Result<Option<Listing>> {
        let leader = process.id().pid.get();
        let tasks = format!("{leader}/task");
        if writer.is(leader) && self.proc.count_subdirectories(&tasks)? == Some(1) {
            return Ok(Some(Listing::SingleThread(leader)));
        }
        Ok(self.proc.open(&tasks, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?.map(Listing::Directory))
    }
}
