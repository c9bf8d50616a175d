//! Affinity masks of whole tasks.
//!
//! Owns what "the affinity of the task is the CPU list" means, and how a task gets back the masks that it had. Does not
//! know claims or pools.
//!
//! [`super::passes`] explains how every thread of a task is reached.

use std::collections::HashSet;
use std::io;
use std::os::unix::fs::FileExt as _;

use super::passes::{BlockedWriter, PassesEnd};
use super::{Process, Processes, sys};
use crate::model::command::SavedMask;
use crate::model::cpuset::CpuSet;
use crate::model::task::Pid;

/// Which threads get the mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Threads {
    /// All of them.
    All,
    /// Only those whose mask is not a subset of it: a program may pin its own threads within its list.
    OnlyStrays,
}

/// The masks that the threads of a task had, the leader's first.
#[derive(Debug, Default)]
pub(crate) struct SavedMasks {
    masks: Vec<(u32, CpuSet)>,
    /// The leader's mask was all that its cpuset allowed. Then the leader, and every thread with the same mask, gets
    /// all CPUs back, so that it follows its cpuset again.
    all: bool,
}

/// Why a task does not have the mask.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MaskError {
    #[error("the task has died")]
    Gone,
    /// None of the CPUs is both online and allowed by the task's cpuset.
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
    /// Returns the mask of the task's first thread, without offline CPUs.
    ///
    /// # Errors
    /// Returns [`MaskError::Gone`] if the task has died.
    pub(crate) fn leader_mask(&self, pid: Pid) -> Result<CpuSet, MaskError> {
        mask_of(pid.get())?.ok_or(MaskError::Gone)
    }

    /// Returns the mask to restore when the task's first claim ends, as far as it can be found out without touching
    /// the task.
    ///
    /// # Errors
    /// Returns [`MaskError::Gone`] if the task has died, or the kernel's error.
    pub(crate) fn saved_mask(&self, process: &Process) -> Result<SavedMask, MaskError> {
        let mask = self.leader_mask(process.id().pid)?;
        Ok(if self.online()?.is_subset(&mask) { SavedMask::All } else { SavedMask::Cpus(mask) })
    }

    /// Finds out whether a saved mask that is narrower than the machine is all that the task's cpuset allows, and
    /// returns [`SavedMask::All`] if so: then the task follows its cpuset again after the claim.
    ///
    /// The mask is widened to all CPUs, read, and set to what it was: this needs no cgroup filesystem and works for
    /// every version of cgroups. Call it only for a task that is about to be pinned and whose mask has been recorded.
    ///
    /// # Errors
    /// Returns [`MaskError::Gone`] if the task has died, or the kernel's error.
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

    /// Sets the mask of the task's threads and reads it back. Returns the masks from before, for
    /// [`Processes::undo`].
    ///
    /// # Errors
    /// Returns a [`MaskError`]; the task then has the masks from before.
    pub(crate) fn set_mask(
        &self,
        process: &Process,
        cpus: &CpuSet,
        threads: Threads,
        writer: BlockedWriter,
    ) -> Result<SavedMasks, MaskError> {
        self.set_or_undo(process, cpus, threads, writer, SavedMasks::default())
    }

    /// Like [`Processes::set_mask`], for the first claim of a task, after which it will get `saved` back.
    ///
    /// # Errors
    /// Returns a [`MaskError`]; the task then has the masks from before, and follows its cpuset if it did before.
    pub(crate) fn set_first_mask(
        &self,
        process: &Process,
        cpus: &CpuSet,
        saved: &SavedMask,
        writer: BlockedWriter,
    ) -> Result<SavedMasks, MaskError> {
        let before = SavedMasks { all: *saved == SavedMask::All, ..SavedMasks::default() };
        self.set_or_undo(process, cpus, Threads::All, writer, before)
    }

    fn set_or_undo(
        &self,
        process: &Process,
        cpus: &CpuSet,
        threads: Threads,
        writer: BlockedWriter,
        mut before: SavedMasks,
    ) -> Result<SavedMasks, MaskError> {
        match self.set_all(process, cpus, threads, writer, &mut before) {
            Ok(()) => Ok(before),
            Err(error) => {
                self.undo(process, before, writer);
                Err(error)
            }
        }
    }

    fn set_all(
        &self,
        process: &Process,
        cpus: &CpuSet,
        threads: Threads,
        writer: BlockedWriter,
        before: &mut SavedMasks,
    ) -> Result<(), MaskError> {
        let leader = process.id().pid.get();
        let (mut known, mut right) = (HashSet::new(), HashSet::new());
        let end = self.in_passes(process, writer, |pass, tids| -> Result<bool, MaskError> {
            let is_right = |mask: &CpuSet| match threads {
                // The first pass sets the mask even if it looks right: it may look right only because of the
                // cpuset, which can change.
                Threads::All => mask == cpus && pass > 0,
                Threads::OnlyStrays => !mask.is_empty() && mask.is_subset(cpus),
            };
            let mut wrong = Vec::new();
            // All masks are read before the first one is set, so that undoing restores each. A new thread whose mask
            // is right has it from another thread, so it has nothing to restore. A thread that was right once has
            // been read back.
            for &tid in tids {
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
                    before.masks.push((tid, mask));
                }
            }
            for &tid in &wrong {
                // The first pass leaves reading back to the second, except for the leader: a mask that the kernel
                // narrows is noticed before the other threads are touched.
                let read_back = pass > 0 || tid == leader;
                self.set_thread(tid, leader, cpus, read_back)?;
            }
            Ok(!wrong.is_empty())
        });
        match end? {
            PassesEnd::Done => Ok(()),
            PassesEnd::Gone => Err(MaskError::Gone),
            PassesEnd::KeepsChanging => Err(MaskError::KeepsChanging),
        }
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
            // A mask with other CPUs was set by the task itself; the next pass sets it again.
            Some(got) if got != *cpus && got.is_subset(cpus) => Err(MaskError::Narrowed { got }),
            _ => Ok(()),
        }
    }

    /// Restores the masks of all threads. Threads that are not in `before` get the leader's.
    pub(crate) fn undo(&self, process: &Process, before: SavedMasks, writer: BlockedWriter) {
        let SavedMasks { masks, all } = before;
        let Some((_, first)) = masks.first() else { return };
        let was = |tid: u32| masks.iter().find(|(other, _)| *other == tid).map_or(first, |(_, mask)| mask);
        self.apply_all(process, writer, |tid| match was(tid) {
            mask if all && mask == first => ALL.to_vec(),
            mask => mask.words().to_vec(),
        });
    }

    /// Sets the mask of all threads, or all CPUs if the kernel refuses the mask. Never fails: a task that has died
    /// needs no mask.
    pub(crate) fn restore_mask(&self, process: &Process, mask: &SavedMask, writer: BlockedWriter) {
        let words = match mask {
            SavedMask::All => ALL.to_vec(),
            SavedMask::Cpus(cpus) => cpus.words().to_vec(),
        };
        self.apply_all(process, writer, |_| words.clone());
    }

    /// Sets the mask of each thread once, whatever the thread does with it afterwards.
    fn apply_all(&self, process: &Process, writer: BlockedWriter, mask: impl Fn(u32) -> Vec<u64>) {
        let mut known = HashSet::new();
        // The task has died, or it creates threads without end: neither is an error here.
        let _ = self.in_passes(process, writer, |_, tids| -> io::Result<bool> {
            let mut any_new = false;
            for &tid in tids {
                if known.insert(tid) {
                    any_new = true;
                    if let Ok(Some(Set::Refused)) = set(tid, &mask(tid)) {
                        let _ = set(tid, &ALL);
                    }
                }
            }
            Ok(any_new)
        });
    }

    fn is_pinned_by_kernel(&self, tid: u32) -> bool {
        self.proc.stat(tid).ok().flatten().is_some_and(|stat| stat.is_pinned_by_kernel())
    }

    /// The online CPUs: the mask that sched_getaffinity(2) returns for a task without any limit.
    fn online(&self) -> io::Result<CpuSet> {
        let file = self.online.as_ref().ok_or(io::ErrorKind::NotFound)?;
        let mut text = [0; 4096];
        // The kernel generates the text for each read from offset 0.
        let filled = file.read_at(&mut text, 0)?;
        let text = str::from_utf8(text.get(..filled).unwrap_or_default()).map_err(io::Error::other)?;
        text.trim().parse().map_err(io::Error::other)
    }
}

/// The mask of every possible CPU.
const ALL: [u64; sys::MASK_WORDS] = [u64::MAX; sys::MASK_WORDS];

enum Set {
    Done,
    Refused,
}

/// Sets the mask of one thread; `None` if it has gone.
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

/// Returns the mask of one thread; `None` if it has gone.
pub(crate) fn mask_of(tid: u32) -> io::Result<Option<CpuSet>> {
    let mut words = [0; sys::MASK_WORDS];
    match sys::get_affinity(tid, &mut words) {
        Ok(valid) => Ok(words.get(..valid).map(CpuSet::from_words)),
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        Err(error) => Err(error),
    }
}
