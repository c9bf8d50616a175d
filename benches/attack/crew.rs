//! Processes and threads of an attacker: its user and its limits, how it starts many of them, and what they count.
//!
//! Every process ends with the one that started it, unless it must outlive it, and in any case after [`LIFETIME`].

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, RwLock};
use std::thread::{Builder, sleep};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Pid, Uid, alarm, getppid, setgroups, setresgid, setresuid, setsid};

use crate::place::ATTACKER;
use crate::sys;

/// The limits of the attacker: threads and processes of the user, and open files of each process.
const THREADS: u64 = 10_000;
const OPEN_FILES: u64 = 4_096;
/// In seconds.
const LIFETIME: u32 = 60;
/// How long the start of threads and processes may take.
const TO_START: Duration = Duration::from_secs(6);
/// The stack of a thread: nothing here needs much.
const STACK: usize = 64 * 1024;

/// Makes this process an ordinary one of a user, with no right of root.
pub fn become_user(uid: u32) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(uid));
    setgroups(&[])?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    // As for a program that this user has started itself.
    prctl::set_dumpable(true)?;
    end_with_parent()
}

/// Makes this process the attacker: another user, in a session of its own as after a login, with the limits of a user.
pub fn become_attacker() -> io::Result<()> {
    setsid()?;
    become_user(ATTACKER)?;
    setrlimit(Resource::RLIMIT_NPROC, THREADS, THREADS)?;
    setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES)?;
    Ok(())
}

fn end_with_parent() -> io::Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    alarm::set(LIFETIME);
    if getppid() == Pid::from_raw(1) {
        std::process::exit(1);
    }
    Ok(())
}

/// Starts a process that ends with this one, and does not return from `work`. This process must have one thread.
pub fn process(work: impl FnOnce()) -> io::Result<Pid> {
    start_process(true, work)
}

/// The same, but it outlives this process.
pub fn surviving_process(work: impl FnOnce()) -> io::Result<Pid> {
    start_process(false, work)
}

fn start_process(ends_with_parent: bool, work: impl FnOnce()) -> io::Result<Pid> {
    if let Some(child) = sys::fork()? {
        return Ok(child);
    }
    if ends_with_parent {
        let _ = end_with_parent();
    } else {
        let _ = prctl::set_pdeathsig(None);
        alarm::set(LIFETIME);
    }
    work();
    std::process::exit(0)
}

/// Starts threads that all begin at once, as many as the limit allows. Returns how many.
pub fn threads(count: usize, work: impl Fn(usize) + Send + Sync + 'static) -> usize {
    let (gate, work) = (Arc::new(RwLock::new(())), Arc::new(work));
    let closed = gate.write();
    let start = |n: usize| {
        let (gate, work) = (Arc::clone(&gate), Arc::clone(&work));
        let begin = move || {
            drop(gate.read());
            work(n);
        };
        Builder::new().stack_size(STACK).spawn(begin).map(drop)
    };
    let started = (0..count).take_while(|&n| start(n).is_ok()).count();
    drop(closed);
    started
}

/// Does nothing until the end.
pub fn rest() {
    loop {
        sleep(Duration::from_secs(3600));
    }
}

/// Counts in the kernel, for all processes of an attacker.
#[derive(Clone)]
pub struct Tally(Arc<[EventFd; 3]>);

impl Tally {
    pub fn new() -> io::Result<Self> {
        let count = || EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC);
        Ok(Self(Arc::new([count()?, count()?, count()?])))
    }

    /// Counts an operation.
    pub fn note<T>(&self, result: io::Result<T>) {
        let _ = self.0[usize::from(result.is_err())].write(1);
    }

    /// A part of the attacker has been started.
    pub fn started(&self) {
        let _ = self.0[2].write(1);
    }

    /// Waits until this many parts have been started.
    pub fn wait(&self, parts: u64) {
        let (deadline, mut started) = (Instant::now() + TO_START, 0);
        while started < parts && Instant::now() < deadline {
            started += self.0[2].read().unwrap_or(0);
            sleep(Duration::from_millis(1));
        }
    }

    /// How many operations were successful, and how many were refused.
    pub fn total(&self) -> (u64, u64) {
        (self.0[0].read().unwrap_or(0), self.0[1].read().unwrap_or(0))
    }
}

/// Numbers that look random, the same in each run (xorshift64).
pub struct Random(u64);

impl Random {
    pub fn new(seed: usize) -> Self {
        Self((seed as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound as u64) as usize
    }

    pub fn of<'a>(&mut self, files: &'a [PathBuf]) -> &'a PathBuf {
        &files[self.below(files.len())]
    }
}
