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
//! Reading a stack waits while a thread of that process is inside execve(2), which a hostile user can prolong. So
//! stacks are read by threads of their own, and one that does not answer is left behind.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use parking_lot::Mutex;

use crate::procfs::{self, ProcFs};

/// The number of threads that read stacks, at most. As many as there are requests at a time, and some that are left
/// behind.
const MAX_READERS: usize = 12;
/// How long a reader may take to answer. It needs about 15 us for each stack.
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
    answers: Receiver<Vec<u32>>,
}

/// The directory `/proc/PID/task`, and some threads of it.
type Job = (Arc<OwnedFd>, Vec<u32>);

impl Stacks {
    /// Has the kernel tried out in the background, once for this process.
    pub(super) fn new() -> Self {
        static TRIAL: Once = Once::new();
        TRIAL.call_once(|| {
            let _ = std::thread::Builder::new().name("stack-trial".into()).spawn(|| {
                TRUSTED.store(kernel_hides_running_stacks().unwrap_or(false), Ordering::Relaxed);
            });
        });
        Self::default()
    }

    /// Returns those of the threads that are proven to be outside clone(2): perhaps none, because that is not known or
    /// takes too long to find out.
    pub(super) fn outside_clone(&self, tasks: &Arc<OwnedFd>, mut tids: Vec<u32>) -> Vec<u32> {
        if !TRUSTED.load(Ordering::Relaxed) {
            return Vec::new();
        }
        tids.truncate(MAX_STACKS);
        let Some(reader) = self.idle.lock().pop().or_else(|| self.start_reader()) else { return Vec::new() };
        if reader.jobs.send((Arc::clone(tasks), tids)).is_err() {
            return Vec::new();
        }
        match reader.answers.recv_timeout(ANSWER_TIME) {
            Ok(outside) => {
                self.idle.lock().push(reader);
                outside
            }
            Err(_) => Vec::new(),
        }
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
                while let Ok((tasks, mut tids)) = job.recv() {
                    tids.retain(|&tid| is_outside_clone(tasks.as_fd(), tid));
                    if answer.send(tids).is_err() {
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

/// Whether the stack of a thread proves that it is outside clone(2).
fn is_outside_clone(tasks: BorrowedFd<'_>, tid: u32) -> bool {
    let turns = || procfs::run_time_of_thread(tasks, tid).ok().flatten().map(|run_time| run_time.turns);
    let Some(before) = turns() else { return false };
    let Ok(Some(stack)) = procfs::stack_of_thread(tasks, tid) else { return false };
    shows_no_clone(&stack) && turns() == Some(before)
}

/// Whether this is a whole stack with names, and none of them creates threads.
fn shows_no_clone(stack: &str) -> bool {
    let functions = stack.lines().count();
    let are_names = stack.lines().all(|line| line.contains("+0x"));
    functions > 0 && functions < MAX_DEPTH && are_names && !stack.contains("copy_process")
}

/// Set if the stack of a thread that runs is empty on this kernel.
static TRUSTED: AtomicBool = AtomicBool::new(false);

/// Finds out whether the kernel shows an empty stack for a thread that runs. `None` if it shows no stacks at all.
fn kernel_hides_running_stacks() -> Option<bool> {
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
