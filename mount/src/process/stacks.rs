//! Kernel stacks of threads, to see that a thread that does not run is outside clone(2).
//!
//! Owns reading them with a bound. Does not know why the question is asked.
//!
//! A stack proves something only if the thread did not run while it was read. The kernel shows an empty stack for a
//! thread that runs on another CPU, if it finds stack frames with the ORC tables (as on all x86-64 distributions). Other
//! kernels show where such a thread stopped earlier, which proves nothing. So this is tried out once, on a thread of
//! this process, and without it stacks are not looked at. If the thread has had no turn on a CPU between two looks at
//! its turns, and the stack between them is not empty, the thread did not run.
//!
//! The kernel counts a turn a moment before it marks the thread as running, and in a virtual machine that moment can be
//! long. A thread that begins to run while its stack is read leaves a stack that is cut short and proves nothing. So the
//! stack is read twice: the second one is empty or another one then.
//!
//! A thread that runs without a pause is looked at from its own CPU: while the reader runs there, that thread does not.
//!
//! Reading a stack waits while a thread of that process is inside execve(2), which a hostile user can prolong. So
//! stacks are read by threads of their own, and one that does not answer is left behind.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Once, OnceLock};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use parking_lot::Mutex;

use super::sys;
use crate::model::cpuset::{CpuId, CpuSet};
use crate::procfs::{self, ProcFs};

/// The number of threads that read stacks, at most. As many as there are requests at a time, and some that are left
/// behind.
const MAX_READERS: usize = 12;
/// How long a reader may take to answer. It needs about 25 us for each thread.
const ANSWER_TIME: Duration = Duration::from_millis(20);
/// The number of stacks to read at a time, so that a reader can answer in time.
const MAX_STACKS: usize = 256;
/// The number of empty stacks in a row that a thread that runs must show.
const TRIAL_LOOKS: usize = 3;
/// How long the kernel is tried out. It takes microseconds if a CPU is idle.
const TRIAL_TIME: Duration = Duration::from_millis(300);
/// The number of functions that the kernel shows at most (`MAX_STACK_TRACE_DEPTH`, fs/proc/base.c).
const MAX_DEPTH: usize = 64;

/// Reads kernel stacks.
#[derive(Debug, Default)]
pub(super) struct Stacks {
    idle: Mutex<Vec<Reader>>,
    readers: Arc<AtomicUsize>,
}

/// A thread that reads stacks. It ends when this is dropped.
#[derive(Debug)]
struct Reader {
    jobs: Sender<Job>,
    /// Each thread that is outside, then `None`.
    answers: Receiver<Option<u32>>,
}

/// The directory `/proc/PID/task`, and some threads of it.
type Job = (Arc<OwnedFd>, Vec<u32>);

impl Stacks {
    /// Has the kernel tried out in the background, once for this process.
    pub(super) fn new() -> Self {
        static TRIAL: Once = Once::new();
        TRIAL.call_once(|| {
            let _ = std::thread::Builder::new().name("stack-trial".into()).spawn(|| {
                let _ = TRUSTED.set(kernel_hides_running_stacks().unwrap_or(false));
            });
        });
        Self::default()
    }

    /// Whether the kernel was tried out, and its stacks prove nothing.
    pub(super) fn prove_nothing(&self) -> bool {
        TRUSTED.get() == Some(&false)
    }

    /// Returns the threads that are proven to be outside clone(2): perhaps none, because that is not known or
    /// takes too long to find out.
    pub(super) fn outside_clone(&self, tasks: &Arc<OwnedFd>, mut tids: Vec<u32>) -> Vec<u32> {
        if TRUSTED.get() != Some(&true) {
            return Vec::new();
        }
        tids.truncate(MAX_STACKS);
        let Some(reader) = self.idle.lock().pop().or_else(|| self.start_reader()) else { return Vec::new() };
        if reader.jobs.send((Arc::clone(tasks), tids)).is_err() {
            return Vec::new();
        }
        let deadline = Instant::now() + ANSWER_TIME;
        let mut outside = Vec::new();
        loop {
            match reader.answers.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Some(tid)) => outside.push(tid),
                Ok(None) => break,
                // The reader is left behind.
                Err(_) => return outside,
            }
        }
        self.idle.lock().push(reader);
        outside
    }

    fn start_reader(&self) -> Option<Reader> {
        let readers = Arc::clone(&self.readers);
        if readers.fetch_add(1, Ordering::Relaxed) >= MAX_READERS {
            readers.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        let (jobs, job) = channel::<Job>();
        let (answer, answers) = channel();
        let started = std::thread::Builder::new().name("stack-reader".into()).stack_size(64 * 1024).spawn({
            let readers = Arc::clone(&readers);
            move || {
                while let Ok((tasks, tids)) = job.recv() {
                    let outside = tids.into_iter().filter(|&tid| is_outside_clone(tasks.as_fd(), tid));
                    if outside.map(Some).chain([None]).any(|one| answer.send(one).is_err()) {
                        break;
                    }
                }
                readers.fetch_sub(1, Ordering::Relaxed);
            }
        });
        if started.is_err() {
            readers.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        Some(Reader { jobs, answers })
    }
}

/// The state of a thread as its stack shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shown {
    /// The thread is outside clone(2).
    Outside,
    /// The thread runs, so that its stack is empty.
    Running,
    /// The thread may be inside clone(2).
    Unknown,
}

/// Whether the stack of a thread proves that it is outside clone(2).
fn is_outside_clone(tasks: BorrowedFd<'_>, tid: u32) -> bool {
    match look(tasks, tid) {
        Shown::Outside => true,
        Shown::Running => look_from_its_cpu(tasks, tid) == Shown::Outside,
        Shown::Unknown => false,
    }
}

fn look(tasks: BorrowedFd<'_>, tid: u32) -> Shown {
    let turns = || procfs::run_time_of_thread(tasks, tid).ok().flatten().map(|run_time| run_time.turns);
    let Some(before) = turns() else { return Shown::Unknown };
    let stack = || procfs::stack_of_thread(tasks, tid).ok().flatten();
    let Some(first) = stack() else { return Shown::Unknown };
    if first.is_empty() {
        Shown::Running
    } else if shows_no_clone(&first) && stack() == Some(first) && turns() == Some(before) {
        Shown::Outside
    } else {
        Shown::Unknown
    }
}

/// Looks from the CPU on which the thread was last seen. The kernel does not let a daemon in a smaller cpuset onto it.
fn look_from_its_cpu(tasks: BorrowedFd<'_>, tid: u32) -> Shown {
    let cpu = procfs::stat_of_thread(tasks, tid).ok().flatten().and_then(|stat| CpuId::new(stat.cpu));
    let Some(cpu) = cpu else { return Shown::Unknown };
    if sys::set_affinity(THIS_THREAD, CpuSet::from_iter([cpu]).words()).is_err() {
        return Shown::Unknown;
    }
    let shown = look(tasks, tid);
    // Back to the CPUs of the daemon.
    let mut cpus = [0; sys::MASK_WORDS];
    if let Ok(valid) = sys::get_affinity(std::process::id(), &mut cpus) {
        let _ = sys::set_affinity(THIS_THREAD, cpus.get(..valid).unwrap_or_default());
    }
    shown
}

/// Whether this is a whole stack with names, and none of them creates threads.
fn shows_no_clone(stack: &str) -> bool {
    let functions = stack.lines().count();
    let are_names = stack.lines().all(|line| line.contains("+0x"));
    functions > 0 && functions < MAX_DEPTH && are_names && !stack.contains("copy_process")
}

/// Whether the stack of a thread that runs is empty on this kernel; unset until that was tried out.
static TRUSTED: OnceLock<bool> = OnceLock::new();
/// The calling thread, for sched_setaffinity(2).
const THIS_THREAD: u32 = 0;

/// Finds out whether the kernel shows an empty stack for a thread that runs. `None` if it shows no stacks at all.
fn kernel_hides_running_stacks() -> Option<bool> {
    // On one CPU the other thread never runs while this one looks.
    if super::mask_of(THIS_THREAD).ok().flatten().is_some_and(|mask| mask.len() < 2) {
        return Some(false);
    }
    let proc = ProcFs::new().ok()?;
    let tasks = proc.open("self/task", OFlag::O_RDONLY | OFlag::O_DIRECTORY).ok()??;
    let (tell, tid) = channel();
    let stop = Arc::new(AtomicBool::new(false));
    let runner = std::thread::Builder::new().name("stack-trial".into()).spawn({
        let stop = Arc::clone(&stop);
        move || {
            let _ = tell.send(nix::unistd::gettid().as_raw() as u32);
            while !stop.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        }
    });
    let tid = tid.recv().ok()?;
    let deadline = Instant::now() + TRIAL_TIME;
    let mut empty_stacks = 0;
    let found = loop {
        match procfs::stack_of_thread(tasks.as_fd(), tid) {
            Ok(Some(stack)) if stack.is_empty() => empty_stacks += 1,
            Ok(Some(_)) => empty_stacks = 0,
            _ => break None,
        }
        if empty_stacks == TRIAL_LOOKS {
            break Some(true);
        } else if Instant::now() >= deadline {
            break Some(false);
        }
        std::thread::sleep(Duration::from_micros(100));
    };
    stop.store(true, Ordering::Relaxed);
    let _ = runner.map(std::thread::JoinHandle::join);
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_stack_with_names_is_a_proof() {
        let sleeping = "[<0>] hrtimer_nanosleep+0x74/0xf0\n[<0>] do_syscall_64+0x71/0x280\n";
        assert!(shows_no_clone(sleeping));
        assert!(shows_no_clone("[<0>] fuse_simple_request+0x1/0x2 [fuse]\n"));
        for stack in [
            "",
            "[<0>] __alloc_pages+0x1/0x2\n[<0>] copy_process+0x1/0x2\n[<0>] kernel_clone+0x1/0x2\n",
            "[<0>] copy_process.part.0+0x1/0x2\n",
            "[<0>] 0xffffffff81234567\n",
            &sleeping.repeat(MAX_DEPTH / 2),
        ] {
            assert!(!shows_no_clone(stack), "{stack}");
        }
    }
}
