//! Affinity masks of whole tasks.
//!
//! Owns what "the affinity of the task is the CPU list" means, and how a task gets back the masks that it had. Does not
//! know claims or pools.
//!
//! [`super::passes`] explains how every thread of a task is reached.
//!
//! Longer than 400 lines because setting, checking and restoring share one set of types.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::unix::fs::FileExt as _;

use super::passes::{BlockedWriter, Pass, PassesEnd, Purpose};
use super::{OFFLINE, Process, Processes, sys};
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

/// Which threads of a claimed task are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Look {
    AllThreads,
    /// Takes a microsecond.
    FirstThread,
}

/// The result of a look at the threads of a claimed task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    /// They are all within their list.
    Within,
    /// The kernel lets one run on all CPUs that its cpuset allows, which are these.
    Displaced(CpuSet),
    /// One is elsewhere, because the program has set this mask.
    Chosen(CpuSet),
}

/// The masks that the threads of a task had before they were set.
#[derive(Debug)]
pub(crate) struct SavedMasks {
    leader: u32,
    threads: HashMap<u32, SavedThread>,
    /// The mask that the task probably asked for, of which the saved ones are what its cpuset left: its list, or all
    /// CPUs. If it leads to the same mask as before it is the one to restore, because then the threads follow their
    /// cpuset again. `None` if it is known to lead to another one.
    probable: Option<SavedMask>,
    /// Which mask undoing sets for threads that were created meanwhile.
    new_threads: NewThreads,
}

#[derive(Debug)]
struct SavedThread {
    mask: CpuSet,
    is_set: bool,
}

/// How undoing handles threads that were created meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NewThreads {
    /// They get what the leader gets: every thread was set.
    AsLeader,
    /// Nothing: only strays were set, or only the leader.
    Stay,
}

impl SavedMasks {
    fn new(process: &Process, probable: Option<SavedMask>) -> Self {
        let leader = process.id().pid.get();
        Self { leader, threads: HashMap::new(), probable, new_threads: NewThreads::Stay }
    }
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
    #[error("not all threads could be proven to have the mask")]
    Unsettled,
    #[error("setting the masks of all threads takes too long")]
    OutOfTime,
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

    /// Returns whether threads of a task are within these CPUs. Changes nothing.
    ///
    /// # Errors
    /// Returns [`MaskError::Gone`] if the task has died, or the kernel's error.
    pub(crate) fn are_within(&self, process: &Process, cpus: &CpuSet, look: Look) -> Result<bool, MaskError> {
        let leader = process.id().pid.get();
        let tids = match look {
            Look::AllThreads => self.list_threads(leader),
            Look::FirstThread => vec![leader],
        };
        for tid in tids {
            if is_elsewhere(tid, cpus)? {
                return if process.is_alive() { Ok(false) } else { Err(MaskError::Gone) };
            }
        }
        Ok(true)
    }

    /// Looks at the threads of a task whose list has these CPUs, while nobody else sets its masks. `before`: the result of the
    /// last look that found one that is not within them.
    ///
    /// A thread that is not within them is either displaced or pinned elsewhere by its program. To find out, its mask is
    /// widened for a moment, once for each such mask.
    ///
    /// # Errors
    /// Returns [`MaskError::Gone`] if the task has died, or the kernel's error.
    pub(crate) fn look_at_masks(
        &self,
        process: &Process,
        cpus: &CpuSet,
        before: Option<&Seen>,
    ) -> Result<Seen, MaskError> {
        let mut seen = Seen::Within;
        for tid in self.list_threads(process.id().pid.get()) {
            let wanted = if is_elsewhere(tid, cpus)? { self.wanted_mask(tid)? } else { None };
            let Some(mask) = wanted else { continue };
            if !process.is_alive() {
                return Err(MaskError::Gone);
            }
            match before {
                Some(Seen::Chosen(chosen)) if *chosen == mask => {}
                // Before 6.2 its mask does not have the CPUs that were offline at the last look.
                Some(Seen::Displaced(_)) => return Ok(Seen::Displaced(mask)),
                _ if self.is_all_that_is_allowed(tid, &mask)? => return Ok(Seen::Displaced(mask)),
                _ => {
                    set(tid, mask.words())?;
                }
            }
            seen = Seen::Chosen(mask);
        }
        Ok(seen)
    }

    /// Returns the mask to restore when the task's first claim ends, as far as it can be found out without touching
    /// the task.
    ///
    /// # Errors
    /// Returns [`MaskError::Gone`] if the task has died, or the kernel's error.
    pub(crate) fn saved_mask(&self, process: &Process) -> Result<SavedMask, MaskError> {
        let mask = self.wanted_mask(process.id().pid.get())?.ok_or(MaskError::Gone)?;
        Ok(if self.possible.is_subset(&mask) { SavedMask::All } else { SavedMask::Cpus(mask) })
    }

    /// Finds out whether a saved mask that is narrower than the machine is all that the task's cpuset allows, and
    /// returns [`SavedMask::All`] if so: then the task follows its cpuset again after the claim.
    ///
    /// The mask is widened to all CPUs, read, and set to what it was: this needs no cgroup filesystem and works for
    /// every version of cgroups. Call it only for a task whose mask has been recorded.
    ///
    /// # Errors
    /// Returns [`MaskError::Gone`] if the task has died, or the kernel's error.
    pub(crate) fn probe_saved_mask(
        &self,
        process: &Process,
        saved: SavedMask,
    ) -> Result<SavedMask, MaskError> {
        let SavedMask::Cpus(mask) = &saved else { return Ok(saved) };
        if !process.is_alive() {
            return Err(MaskError::Gone);
        }
        let leader = process.id().pid.get();
        if self.is_all_that_is_allowed(leader, mask)? {
            return Ok(SavedMask::All);
        }
        match set(leader, mask.words())? {
            Some(Set::Done | Set::Refused) => Ok(saved),
            None => Err(MaskError::Gone),
        }
    }

    /// Widens the mask of a thread to all CPUs, and returns whether that leads to `mask`.
    fn is_all_that_is_allowed(&self, tid: u32, mask: &CpuSet) -> Result<bool, MaskError> {
        set(tid, &ALL)?.ok_or(MaskError::Gone)?;
        Ok(self.wanted_mask(tid)?.ok_or(MaskError::Gone)? == *mask)
    }

    /// Sets the mask of the task's threads and reads it back, for a task that has a claim on the CPUs `own`. Returns the
    /// masks from before, for [`Processes::undo`].
    ///
    /// # Errors
    /// Returns a [`MaskError`]; the task then has the masks from before.
    pub(crate) fn set_mask(
        &self,
        process: &Process,
        cpus: &CpuSet,
        own: &CpuSet,
        threads: Threads,
        writer: BlockedWriter,
    ) -> Result<SavedMasks, MaskError> {
        let mut before = SavedMasks::new(process, Some(SavedMask::Cpus(own.clone())));
        let set = match threads {
            Threads::All => self.try_leader(process, cpus, &mut before),
            Threads::OnlyStrays => Ok(()),
        }
        .and_then(|()| self.set_all(process, cpus, threads, writer, &mut before));
        self.undone_on_error(process, set, before, writer)
    }

    /// Like [`Processes::set_mask`], for the first claim of a task. Returns the mask that it will get back, too: `saved`,
    /// or all CPUs if that is all that its cpuset allows.
    ///
    /// # Errors
    /// Returns a [`MaskError`]; the task then has the masks from before, and follows its cpuset if it did before.
    pub(crate) fn set_first_mask(
        &self,
        process: &Process,
        cpus: &CpuSet,
        saved: SavedMask,
        writer: BlockedWriter,
    ) -> Result<(SavedMask, SavedMasks), MaskError> {
        let mut before = SavedMasks::new(process, Some(SavedMask::All));
        let mut found = saved;
        // The leader first: a task that is refused here was not touched, not even to find out what to save.
        let set = self
            .try_leader(process, cpus, &mut before)
            .and_then(|()| {
                let SavedMask::Cpus(mask) = &found else { return Ok(()) };
                let leader = process.id().pid.get();
                if self.is_all_that_is_allowed(leader, mask)? {
                    found = SavedMask::All;
                } else {
                    before.probable = None;
                }
                self.set_thread(leader, leader, cpus).map(|_| ())
            })
            .and_then(|()| self.set_all(process, cpus, Threads::All, writer, &mut before));
        self.undone_on_error(process, set, before, writer).map(|before| (found, before))
    }

    fn undone_on_error(
        &self,
        process: &Process,
        result: Result<(), MaskError>,
        before: SavedMasks,
        writer: BlockedWriter,
    ) -> Result<SavedMasks, MaskError> {
        match result {
            Ok(()) => Ok(before),
            Err(error) => {
                self.undo(process, before, writer);
                Err(error)
            }
        }
    }

    /// Sets the mask of the leader and reads it back, so that a mask that the kernel refuses or narrows is noticed
    /// before the other threads are touched.
    fn try_leader(&self, process: &Process, cpus: &CpuSet, before: &mut SavedMasks) -> Result<(), MaskError> {
        let leader = process.id().pid.get();
        let mask = self.wanted_mask(leader)?.ok_or(MaskError::Gone)?;
        // Checked after the mask was read: so it is the mask of this task, not of one that reused its PID.
        if !process.is_alive() {
            return Err(MaskError::Gone);
        }
        if self.set_thread(leader, leader, cpus)? == ThreadSet::Done {
            before.threads.insert(leader, SavedThread { mask, is_set: true });
        }
        read_back(leader, cpus)
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
        let mut known = HashSet::new();
        if threads == Threads::All {
            before.new_threads = NewThreads::AsLeader;
        }
        let purpose = match threads {
            Threads::All => Purpose::Claim,
            Threads::OnlyStrays => Purpose::Check,
        };
        let end = self.in_passes(process, writer, purpose, |tids| -> Result<Pass, MaskError> {
            let first_pass = known.is_empty();
            let is_right = |mask: &CpuSet| match threads {
                // The first pass sets the mask even if it looks right: it may look right only because of the
                // cpuset, which can change.
                Threads::All => mask == cpus && !first_pass,
                Threads::OnlyStrays => !mask.is_empty() && mask.is_subset(cpus),
            };
            let mut found = Pass::default();
            // All masks are read before the first one is set, so that undoing restores each. A new thread whose mask
            // is right has it from another thread, so it has nothing to restore.
            let mut wrong = Vec::new();
            for (n, &tid) in tids.iter().enumerate() {
                check_time(writer, n)?;
                let Some(mask) = mask_of(tid)? else { continue };
                found.alive += 1;
                let is_right = is_right(&mask);
                let is_new = known.insert(tid);
                if is_right {
                    continue;
                }
                found.relapse |= !is_new;
                if first_pass && threads == Threads::All && tid == leader && mask == *cpus {
                    // It was set a moment ago.
                    found.set.push(tid);
                    continue;
                }
                if is_new && !before.threads.contains_key(&tid) {
                    let Some(mask) = self.wanted_mask(tid)? else {
                        found.alive -= 1;
                        continue;
                    };
                    before.threads.insert(tid, SavedThread { mask, is_set: false });
                }
                wrong.push(tid);
            }
            for (n, tid) in wrong.into_iter().enumerate() {
                check_time(writer, n)?;
                match self.set_thread(tid, leader, cpus)? {
                    ThreadSet::Done => {}
                    // It may have created another thread with its mask since the threads were counted.
                    ThreadSet::Gone => {
                        found.alive -= 1;
                        continue;
                    }
                    ThreadSet::OfKernel => continue,
                }
                if let Some(thread) = before.threads.get_mut(&tid) {
                    thread.is_set = true;
                }
                found.set.push(tid);
                // The first pass leaves reading back to the second.
                if !first_pass || threads == Threads::OnlyStrays {
                    read_back(tid, cpus)?;
                }
            }
            Ok(found)
        });
        match end? {
            PassesEnd::Done => Ok(()),
            PassesEnd::Gone => Err(MaskError::Gone),
            PassesEnd::KeepsChanging => Err(MaskError::KeepsChanging),
            PassesEnd::Unsettled => Err(MaskError::Unsettled),
        }
    }

    /// Sets the mask of one thread.
    fn set_thread(&self, tid: u32, leader: u32, cpus: &CpuSet) -> Result<ThreadSet, MaskError> {
        match set(tid, cpus.words())? {
            None => Ok(ThreadSet::Gone),
            Some(Set::Done) => Ok(ThreadSet::Done),
            Some(Set::Refused) if tid != leader && self.is_pinned_by_kernel(tid) => Ok(ThreadSet::OfKernel),
            Some(Set::Refused) => Err(MaskError::Refused),
        }
    }

    /// Restores the masks of all threads that were set.
    pub(crate) fn undo(&self, process: &Process, before: SavedMasks, writer: BlockedWriter) {
        let SavedMasks { leader, threads, probable, new_threads } = before;
        if threads.values().all(|thread| !thread.is_set) {
            return;
        }
        let first = threads.get(&leader).map(|thread| &thread.mask);
        self.apply_all(process, writer, Purpose::Undo, |tid| {
            let mask = match (threads.get(&tid), new_threads, first) {
                (Some(SavedThread { mask, is_set: true }), ..) => mask,
                (None, NewThreads::AsLeader, Some(mask)) => mask,
                _ => return Ok(None),
            };
            let probable = match &probable {
                // A thread that pinned itself is not moved to all CPUs, not even for a moment.
                Some(SavedMask::All) if Some(mask) != first => None,
                Some(SavedMask::All) => Some(ALL.to_vec()),
                Some(SavedMask::Cpus(own)) => Some(own.words().to_vec()),
                None => None,
            };
            if let Some(probable) = probable
                && let Some(Set::Done) = set(tid, &probable)?
                && self.wanted_mask(tid)?.as_ref() == Some(mask)
            {
                return Ok(Some(Set::Done));
            }
            set(tid, mask.words())
        });
    }

    /// Sets the mask of all threads, or all CPUs if the kernel refuses the mask. Never fails: a task that has died
    /// needs no mask.
    pub(crate) fn restore_mask(&self, process: &Process, mask: &SavedMask, writer: BlockedWriter) {
        let words = match mask {
            SavedMask::All => ALL.to_vec(),
            SavedMask::Cpus(cpus) => cpus.words().to_vec(),
        };
        self.apply_all(process, writer, Purpose::Release, |tid| set(tid, &words));
    }

    /// Calls `apply` once for each thread, whatever the thread does with its mask afterwards. A thread for which the
    /// kernel refuses the mask gets all CPUs.
    fn apply_all(
        &self,
        process: &Process,
        writer: BlockedWriter,
        purpose: Purpose,
        apply: impl Fn(u32) -> io::Result<Option<Set>>,
    ) {
        let mut known = HashSet::new();
        // The task has died, or it creates threads without end: neither is an error here.
        let _ = self.in_passes(process, writer, purpose, |tids| -> io::Result<Pass> {
            let mut found = Pass::default();
            for &tid in tids {
                let is_new = known.insert(tid);
                found.alive += u64::from(!matches!(mask_of(tid), Ok(None)));
                if is_new {
                    if let Ok(Some(Set::Refused)) = apply(tid) {
                        let _ = set(tid, &ALL);
                    }
                    found.set.push(tid);
                }
            }
            Ok(found)
        });
    }

    fn is_pinned_by_kernel(&self, tid: u32) -> bool {
        self.proc.stat(tid).ok().flatten().is_some_and(|stat| stat.is_pinned_by_kernel())
    }

    /// Returns the mask of one thread with its offline CPUs; `None` if it has gone. A cpuset may have made it narrower
    /// than what the program asked for; the kernel does not show that.
    ///
    /// sched_getaffinity(2) does not return offline CPUs, and `/proc` takes ten times as long. So `/proc` is read
    /// only if the machine has offline CPUs.
    fn wanted_mask(&self, tid: u32) -> io::Result<Option<CpuSet>> {
        if self.all_are_online() {
            return mask_of(tid);
        }
        Ok(self.proc.status(tid)?.and_then(|status| status.allowed_cpus()))
    }

    /// Returns the CPUs that are offline.
    pub(crate) fn offline(&self) -> CpuSet {
        if self.all_are_online() {
            return CpuSet::new();
        }
        let read = std::fs::read_to_string(OFFLINE);
        read.ok().and_then(|text| text.trim().parse().ok()).unwrap_or_default()
    }

    fn all_are_online(&self) -> bool {
        let Some(file) = &self.offline else { return false };
        let mut text = [0; 8];
        // The kernel generates the text for each read from offset 0.
        file.read_at(&mut text, 0)
            .is_ok_and(|filled| text.get(..filled).is_some_and(|text| text.trim_ascii().is_empty()))
    }
}

/// The mask of every possible CPU.
const ALL: [u64; sys::MASK_WORDS] = [u64::MAX; sys::MASK_WORDS];

enum Set {
    Done,
    Refused,
}

/// The result of setting the mask of one thread of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ThreadSet {
    Done,
    Gone,
    /// The thread works for the kernel inside the process (io_uring), so its mask is not the program's.
    OfKernel,
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

/// Whether a thread may run on other CPUs than these. If all CPUs of its mask are offline, the kernel returns none, and resets
/// the mask when the thread wakes up.
fn is_elsewhere(tid: u32, cpus: &CpuSet) -> io::Result<bool> {
    Ok(mask_of(tid)?.is_some_and(|mask| !mask.is_subset(cpus)))
}

/// Checks every now and then whether there is time for more threads of a task.
fn check_time(writer: BlockedWriter, nth_thread: usize) -> Result<(), MaskError> {
    /// A thread takes some microseconds.
    const INTERVAL: usize = 32;
    let is_over = nth_thread % INTERVAL == INTERVAL - 1 && writer.is_out_of_time();
    if is_over { Err(MaskError::OutOfTime) } else { Ok(()) }
}

/// Checks that a thread whose mask was set does not have a narrower one.
fn read_back(tid: u32, cpus: &CpuSet) -> Result<(), MaskError> {
    match mask_of(tid)? {
        // A mask with other CPUs was set by the task itself; the next pass sets it again.
        Some(got) if got != *cpus && got.is_subset(cpus) => Err(MaskError::Narrowed { got }),
        _ => Ok(()),
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
