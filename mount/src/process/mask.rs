//! Affinity masks: those of all threads of a task, set until a pass over them brings nothing new.
//!
//! Owns: what "the affinity of the task is the CPU list" means, and the way back to what it was.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use nix::fcntl::OFlag;

use super::{Process, Processes, sys};
use crate::model::command::SavedMask;
use crate::model::cpuset::CpuSet;
use crate::model::task::Pid;
use crate::procfs;

/// How often the threads of a task are gone through before it is given up.
const PASSES: u32 = 16;
/// How many passes in a row have to bring nothing new, where a thread runs: it may just be making another,
/// which nobody sees yet and which has the mask from before.
const QUIET_PASSES: u32 = 4;
/// What such a thread is given to be done with it before the next pass, twice as much each time.
const PAUSE: Duration = Duration::from_micros(50);
/// Of more threads than this it is not asked whether they are asleep, as so many answers take longer than all
/// pauses, nor are they listed more often than has to be: they get all pauses in one.
const MAX_STATE_CHECKS: usize = 100;
const LONG_PAUSE: Duration = PAUSE.saturating_mul(2_u32.pow(QUIET_PASSES) - 1);

/// Which threads are given the mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Threads {
    /// All of them.
    All,
    /// Those whose mask is not within it: a program may pin its own threads.
    OnlyStrays,
}

/// The thread, if any, that waits in a write(2) for our answer. Until it has that it makes no threads and sets no
/// masks, whatever /proc says of it: once any client of the mount was interrupted, all wait in state `D`. (No write
/// comes from a thread that goes on: `FUSE_ASYNC_DIO` is not asked for.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockedWriter(Option<u32>);

impl BlockedWriter {
    /// Nobody is known to wait.
    pub(crate) const NONE: Self = Self(None);

    /// The thread with this number in our PID namespace.
    pub(crate) const fn thread(tid: u32) -> Self {
        Self(Some(tid))
    }

    fn is(self, tid: u32) -> bool {
        self.0 == Some(tid)
    }
}

/// Where the threads of a task are found.
enum Listing {
    /// There is this one alone, which waits for our answer and so makes no other.
    SingleThread(u32),
    /// `/proc/PID/task`.
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

    /// Whether no thread can be just making another that nobody sees yet: all wait for something, or were given
    /// time enough. Where that cannot be said, they are given a moment.
    fn is_complete_or_pause(&self, tids: &[u32], waiting: BlockedWriter, quiet: u32) -> bool {
        let Self::Directory(tasks) = self else { return true };
        if tids.len() > MAX_STATE_CHECKS {
            std::thread::sleep(LONG_PAUSE);
            return true;
        }
        // One that has gone makes none; those that it made are seen by the next pass.
        let is_asleep = |&tid: &u32| {
            waiting.is(tid)
                || !matches!(procfs::stat_of_thread(tasks.as_fd(), tid), Ok(Some(stat)) if stat.state != b'S')
        };
        let all = tids.iter().all(is_asleep);
        if !all {
            std::thread::sleep(PAUSE * 2_u32.pow(quiet));
        }
        all
    }
}

/// The masks that threads had, the leader's first.
#[derive(Debug, Default)]
pub(crate) struct SavedMasks {
    masks: Vec<(u32, CpuSet)>,
    /// The leader's was all that its cpuset allowed: it gets all CPUs back, and so does who had the same.
    all: bool,
}

/// Why a task does not have the mask.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MaskError {
    #[error("the task has died")]
    Gone,
    /// No CPU of it is online and allowed by the task's cpuset.
    #[error("the kernel refuses the mask")]
    Refused,
    #[error("the kernel narrows the mask to {got}")]
    Narrowed { got: CpuSet },
    #[error("the task changes its masks as fast as they are set")]
    KeepsChanging,
    #[error(transparent)]
    Other(#[from] io::Error),
}

impl Processes {
    /// The mask of the task's first thread: the online CPUs of it.
    ///
    /// # Errors
    /// [`MaskError::Gone`].
    pub(crate) fn leader_mask(&self, pid: Pid) -> Result<CpuSet, MaskError> {
        mask_of(pid.get())?.ok_or(MaskError::Gone)
    }

    /// What the task gets back when its first claim ends, as far as it can be told without touching the task.
    ///
    /// # Errors
    /// [`MaskError::Gone`], or what the kernel says.
    pub(crate) fn saved_mask(&self, process: &Process) -> Result<SavedMask, MaskError> {
        let mask = self.leader_mask(process.id().pid)?;
        Ok(if self.online()?.is_subset(&mask) { SavedMask::All } else { SavedMask::Cpus(mask) })
    }

    /// Whether a mask that is narrower than the machine is all that the task's cpuset allows: then "all" is
    /// what it gets back, so that it follows its cpuset again. The kernel is asked in the one way that needs
    /// no cgroup filesystem and no luck: the mask is widened to all CPUs, read, and set to what it was. For a
    /// task that is about to be pinned and whose mask has been recorded.
    ///
    /// # Errors
    /// [`MaskError::Gone`], or what the kernel says.
    pub(crate) fn probe_saved_mask(
        &self,
        process: &Process,
        saved: SavedMask,
    ) -> Result<SavedMask, MaskError> {
        let SavedMask::Cpus(mask) = &saved else { return Ok(saved) };
        let pid = process.id().pid;
        if !process.is_alive() {
            return Err(MaskError::Gone);
        }
        set(pid.get(), &ALL)?.ok_or(MaskError::Gone)?;
        let allowed = self.leader_mask(pid)?;
        if allowed == *mask {
            return Ok(SavedMask::All);
        }
        match set(pid.get(), mask.words())? {
            Some(Set::Done | Set::Refused) => Ok(saved),
            None => Err(MaskError::Gone),
        }
    }

    /// Gives the threads of the task the mask, and reads it back. What was there before is returned for
    /// [`Processes::undo`].
    ///
    /// # Errors
    /// A [`MaskError`]; the task then has what it had.
    pub(crate) fn set_mask(
        &self,
        process: &Process,
        cpus: &CpuSet,
        threads: Threads,
        waiting: BlockedWriter,
    ) -> Result<SavedMasks, MaskError> {
        self.set_or_undo(process, cpus, threads, waiting, SavedMasks::default())
    }

    /// The same for a task that has no claim yet and will get `saved` back.
    ///
    /// # Errors
    /// A [`MaskError`]; the task then has what it had, and follows its cpuset if it did.
    pub(crate) fn set_first_mask(
        &self,
        process: &Process,
        cpus: &CpuSet,
        saved: &SavedMask,
        waiting: BlockedWriter,
    ) -> Result<SavedMasks, MaskError> {
        let previous = SavedMasks { all: *saved == SavedMask::All, ..SavedMasks::default() };
        self.set_or_undo(process, cpus, Threads::All, waiting, previous)
    }

    fn set_or_undo(
        &self,
        process: &Process,
        cpus: &CpuSet,
        threads: Threads,
        waiting: BlockedWriter,
        mut previous: SavedMasks,
    ) -> Result<SavedMasks, MaskError> {
        match self.set_all(process, cpus, threads, waiting, &mut previous) {
            Ok(()) => Ok(previous),
            Err(error) => {
                self.undo(process, previous, waiting);
                Err(error)
            }
        }
    }

    fn set_all(
        &self,
        process: &Process,
        cpus: &CpuSet,
        threads: Threads,
        waiting: BlockedWriter,
        previous: &mut SavedMasks,
    ) -> Result<(), MaskError> {
        let leader = process.id().pid.get();
        let listing = self.listing(process, waiting)?.ok_or(MaskError::Gone)?;
        let (mut known, mut right) = (HashSet::new(), HashSet::new());
        let (mut quiet, mut complete) = (0, true);
        for pass in 0..PASSES {
            let tids = listing.tids()?;
            if tids.is_empty() || !process.is_alive() {
                return Err(MaskError::Gone);
            }
            let is_right = |mask: &CpuSet| match threads {
                // On the first pass it is set even where it looks right: it may only look so because of
                // the cpuset, which can change.
                Threads::All => mask == cpus && pass > 0,
                Threads::OnlyStrays => !mask.is_empty() && mask.is_subset(cpus),
            };
            let mut wrong = Vec::new();
            // All are looked at before one is touched, so that undoing gives each what it had. One that has
            // come since and is right has that from another thread. Who was right once has been read back.
            for &tid in &tids {
                if right.contains(&tid) {
                    continue;
                }
                let Some(mask) = mask_of(tid)? else { continue };
                let is_right = is_right(&mask);
                if is_right {
                    right.insert(tid);
                } else {
                    wrong.push(tid);
                }
                if known.insert(tid) && (pass == 0 || !is_right) {
                    previous.masks.push((tid, mask));
                }
            }
            quiet = if wrong.is_empty() { quiet + 1 } else { 0 };
            if quiet == QUIET_PASSES || quiet > 0 && complete {
                return Ok(());
            }
            for tid in wrong {
                // Later threads of the first pass are read back by the second; the first one at once, so that
                // a mask that the kernel narrows is noticed before all others are touched.
                let read_back = pass > 0 || tid == leader;
                self.set_thread(tid, leader, cpus, read_back)?;
            }
            complete = listing.is_complete_or_pause(&tids, waiting, quiet);
        }
        Err(MaskError::KeepsChanging)
    }

    fn set_thread(&self, tid: u32, leader: u32, cpus: &CpuSet, read_back: bool) -> Result<(), MaskError> {
        match set(tid, cpus.words())? {
            None => return Ok(()),
            Some(Set::Done) => {}
            // A thread that works for the kernel inside the process (io_uring) is not the program's.
            Some(Set::Refused) if tid != leader && self.is_pinned_by_kernel(tid) => return Ok(()),
            Some(Set::Refused) => return Err(MaskError::Refused),
        }
        if !read_back {
            return Ok(());
        }
        match mask_of(tid)? {
            // Wider or elsewhere is the task's own doing; the next pass sees to it.
            Some(got) if got != *cpus && got.is_subset(cpus) => Err(MaskError::Narrowed { got }),
            _ => Ok(()),
        }
    }

    /// Gives threads back what they had. Threads that have come since have what the leader had.
    pub(crate) fn undo(&self, process: &Process, previous: SavedMasks, waiting: BlockedWriter) {
        let SavedMasks { masks, all } = previous;
        let Some((_, first)) = masks.first() else { return };
        let was = |tid: u32| masks.iter().find(|(other, _)| *other == tid).map_or(first, |(_, mask)| mask);
        self.apply_all(process, waiting, |tid| match was(tid) {
            mask if all && mask == first => ALL.to_vec(),
            mask => mask.words().to_vec(),
        });
    }

    /// Gives all threads the mask, or all CPUs where that is not possible. Never fails: a task that has died
    /// needs none.
    pub(crate) fn restore_mask(&self, process: &Process, mask: &SavedMask, waiting: BlockedWriter) {
        let words = match mask {
            SavedMask::All => ALL.to_vec(),
            SavedMask::Cpus(cpus) => cpus.words().to_vec(),
        };
        self.apply_all(process, waiting, |_| words.clone());
    }

    fn apply_all(&self, process: &Process, waiting: BlockedWriter, mask: impl Fn(u32) -> Vec<u64>) {
        let Ok(Some(listing)) = self.listing(process, waiting) else { return };
        let mut known = HashSet::new();
        let (mut quiet, mut complete) = (0, false);
        for _ in 0..PASSES {
            let tids = listing.tids().unwrap_or_default();
            let new: Vec<u32> = tids.iter().copied().filter(|tid| known.insert(*tid)).collect();
            quiet = if new.is_empty() { quiet + 1 } else { 0 };
            if quiet == QUIET_PASSES || quiet > 0 && complete || !process.is_alive() {
                return;
            }
            for tid in new {
                if let Ok(Some(Set::Refused)) = set(tid, &mask(tid)) {
                    let _ = set(tid, &ALL);
                }
            }
            if matches!(listing, Listing::SingleThread(_)) {
                return;
            }
            complete = listing.is_complete_or_pause(&tids, waiting, quiet);
        }
    }

    /// None: it has gone.
    fn listing(&self, process: &Process, waiting: BlockedWriter) -> io::Result<Option<Listing>> {
        let leader = process.id().pid.get();
        let tasks = format!("{leader}/task");
        if waiting.is(leader) && self.proc.count_subdirectories(&tasks)? == Some(1) {
            return Ok(Some(Listing::SingleThread(leader)));
        }
        Ok(self.proc.open(&tasks, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?.map(Listing::Directory))
    }

    fn is_pinned_by_kernel(&self, tid: u32) -> bool {
        self.proc.stat(tid).ok().flatten().is_some_and(|stat| stat.is_pinned_by_kernel())
    }

    /// The online CPUs, as the mask of a task without any limit has them.
    fn online(&self) -> io::Result<CpuSet> {
        let file = self.online.as_ref().ok_or(io::ErrorKind::NotFound)?;
        let mut text = [0; 4096];
        // What is read from the beginning is made anew.
        let filled = file.read_at(&mut text, 0)?;
        let text = str::from_utf8(text.get(..filled).unwrap_or_default()).map_err(io::Error::other)?;
        text.trim().parse().map_err(io::Error::other)
    }
}

/// Every CPU that can be.
const ALL: [u64; sys::MASK_WORDS] = [u64::MAX; sys::MASK_WORDS];

enum Set {
    Done,
    Refused,
}

/// None: the thread has gone.
fn set(tid: u32, words: &[u64]) -> io::Result<Option<Set>> {
    match sys::set_affinity(tid, words) {
        Ok(()) => Ok(Some(Set::Done)),
        Err(error) => match error.raw_os_error() {
            Some(libc::EINVAL) => Ok(Some(Set::Refused)),
            Some(libc::ESRCH) => Ok(None),
            _ => Err(error),
        },
    }
}

/// None: the thread has gone.
pub(crate) fn mask_of(tid: u32) -> io::Result<Option<CpuSet>> {
    let mut words = [0; sys::MASK_WORDS];
    match sys::get_affinity(tid, &mut words) {
        Ok(valid) => Ok(words.get(..valid).map(CpuSet::from_words)),
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        Err(error) => Err(error),
    }
}
