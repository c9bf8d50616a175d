//! Child processes of the daemon, and processes known by a pidfd.
//!
//! Owns starting a child, waiting for it and sending signals to it. Does not know what the process is for.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;
use parking_lot::Mutex;

use super::sys::{self, Question};
use crate::procfs::{ProcFs, Stat};

/// Makes the started program die with `SIGKILL` when the thread that starts it ends, and unblocks all signals in it.
pub(crate) fn set_pdeathsig(command: &mut Command) {
    let parent = nix::unistd::getpid();
    sys::before_exec(command, move || {
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
        if nix::unistd::getppid() != parent {
            // The parent died before the signal was set.
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(SigSet::empty().thread_set_mask()?)
    });
}

/// Makes the started program have the `SIGPIPE` action, ignored or default, that this program was started with.
pub(crate) fn keep_sigpipe(command: &mut Command) {
    let ignored = sys::sigpipe_was_ignored();
    sys::before_exec(command, move || sys::set_sigpipe(ignored));
}

/// The answer of [`stat_in_child`] and [`rmdir_in_child`].
#[derive(Debug)]
pub(crate) enum Asked {
    /// The file exists or was removed, or not.
    Answered(io::Result<()>),
    /// There was no answer in time, or the child of an earlier question still waits.
    NoAnswer,
}

/// The child that has not been answered in time. There is one at most.
static UNANSWERED: Mutex<Option<Pid>> = Mutex::new(None);

/// Asks the filesystem for the attributes of a file, in a child process, and waits at most `most` for the answer. A
/// process that waits for the answer of a FUSE daemon cannot be killed once its request was read, not even by its own
/// end; so another process waits.
///
/// # Errors
/// No process can be started.
pub(crate) fn stat_in_child(path: &Path, most: Duration) -> io::Result<Asked> {
    ask_in_child(path, Question::Stat, most)
}

/// Removes a directory in a child process, for the same reason, and waits at most `most` for the answer.
///
/// # Errors
/// No process can be started.
pub(crate) fn rmdir_in_child(path: &Path, most: Duration) -> io::Result<Asked> {
    ask_in_child(path, Question::Rmdir, most)
}

fn ask_in_child(path: &Path, question: Question, most: Duration) -> io::Result<Asked> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut unanswered = UNANSWERED.lock();
    if let Some(child) = *unanswered {
        if waitpid(child, Some(WaitPidFlag::WNOHANG)) == Ok(WaitStatus::StillAlive) {
            return Ok(Asked::NoAnswer);
        }
        *unanswered = None;
    }
    let (answer, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    let (child, memory) = sys::AskingChild::start(path, question, write.as_fd())?;
    drop(write);
    let timeout = PollTimeout::try_from(most).unwrap_or(PollTimeout::MAX);
    let mut errno = [0; 4];
    let answered = match poll(&mut [PollFd::new(answer.as_fd(), PollFlags::POLLIN)], timeout) {
        Ok(1..) => nix::unistd::read(&answer, &mut errno) == Ok(errno.len()),
        _ => false,
    };
    if !answered {
        let _ = nix::sys::signal::kill(child, Signal::SIGKILL);
        *unanswered = Some(child);
        // The child may use it until it dies.
        std::mem::forget(memory);
        return Ok(Asked::NoAnswer);
    }
    // It exits without waiting for anything.
    let _ = waitpid(child, None);
    drop(memory);
    let errno = i32::from_ne_bytes(errno);
    Ok(Asked::Answered(if errno == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(errno)) }))
}

/// Sets `SIGCHLD` to its default action, so that children can be waited for even if the starter ignored it.
pub(crate) fn reset_sigchld() -> io::Result<()> {
    sys::default_sigchld()
}

/// Sends a signal to a child that has not been waited for, so its PID cannot have been reused.
pub(crate) fn send_signal(pid: u32, signal: u32) -> io::Result<()> {
    sys::kill(pid, signal)
}

/// A pidfd of a process whose identity does not matter, only its life: a part of the daemon.
#[derive(Debug)]
pub(crate) struct PidFd(OwnedFd);

impl PidFd {
    /// Opens the process that has this PID now. Safe for children that have not been waited for, and for this
    /// process.
    pub(crate) fn open(pid: u32) -> io::Result<Self> {
        sys::pidfd_open(pid).map(Self)
    }

    pub(crate) fn from_fd(pidfd: OwnedFd) -> Self {
        Self(pidfd)
    }

    /// Sends `SIGKILL`. Does nothing if the process has gone.
    pub(crate) fn kill(&self) {
        let _ = sys::pidfd_send_signal(self.0.as_fd(), libc::SIGKILL);
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// The process has gone, or belongs to somebody else.
    pub(crate) fn send(&self, signal: Signal) -> io::Result<()> {
        sys::pidfd_send_signal(self.0.as_fd(), signal as i32)
    }

    /// Whether the descriptor is a pidfd, and its process is alive.
    pub(crate) fn is_of_process(&self) -> bool {
        sys::pidfd_send_signal(self.0.as_fd(), 0).is_ok()
    }

    /// Whether a signal or a debugger has stopped the process.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stat().is_some_and(|stat| stat.is_stopped())
    }

    /// Whether the first thread of the process has a processor or waits for one.
    pub(crate) fn is_runnable(&self) -> bool {
        self.stat().is_some_and(|stat| stat.is_runnable())
    }

    /// Returns how often the process has called read(2) and the like, if the kernel counts that (proc(5), `/proc/PID/io`).
    pub(crate) fn reads(&self) -> Option<u64> {
        let io = std::fs::read_to_string(format!("/proc/{}/io", self.pid()?)).ok()?;
        io.lines().find_map(|line| line.strip_prefix("syscr:"))?.trim().parse().ok()
    }

    fn stat(&self) -> Option<Stat> {
        let pid = self.pid()?;
        ProcFs::new().and_then(|proc| proc.stat(pid)).ok().flatten()
    }

    /// Returns its PID while it exists.
    fn pid(&self) -> Option<u32> {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", self.0.as_raw_fd())).ok()?;
        info.lines().find_map(|line| line.strip_prefix("Pid:"))?.trim().parse().ok()
    }

    /// Returns how the process ended, if it is a child of this process and has ended. Collects it.
    pub(crate) fn collect(&self) -> Option<WaitStatus> {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
        waitid(Id::PIDFd(self.0.as_fd()), flags).ok().filter(|status| *status != WaitStatus::StillAlive)
    }

    /// Duplicates the descriptor `number` of the process (pidfd_getfd(2)).
    pub(crate) fn descriptor(&self, number: RawFd) -> io::Result<OwnedFd> {
        sys::pidfd_getfd(self.0.as_fd(), number)
    }

    /// Waits at most `most` for the process to die. Returns whether it has died.
    pub(crate) fn wait(&self, most: Duration) -> bool {
        let timeout = PollTimeout::try_from(most).unwrap_or(PollTimeout::MAX);
        matches!(poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)], timeout), Ok(1..))
    }

    pub(crate) fn into_fd(self) -> OwnedFd {
        self.0
    }
}

impl AsFd for PidFd {
    /// Readable when the process has died.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Collects all children that have ended.
pub(crate) fn collect_children() {
    while waitpid(None, Some(WaitPidFlag::WNOHANG)).is_ok_and(|status| status != WaitStatus::StillAlive) {}
}
