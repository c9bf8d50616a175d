//! System calls without a safe wrapper in nix or rustix, or whose wrapper does not fit.
//!
//! Owns all unsafe code of the crate, one call per function. Does not know what the calls are for.
//!
//! Request numbers and structs are the same on x86-64 and arm64: both use the kernel's generic ioctl encoding, and all
//! fields have fixed sizes.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{SigSet, SigmaskHow};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags};

/// The length of the largest CPU mask, in words of 64 bits: 8,192 CPUs. (The CPU sets of nix and rustix stop at 1,024.)
pub(super) const MASK_WORDS: usize = 128;

/// `struct pidfd_info` (linux/pidfd.h) in its first version of 64 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PidfdInfo {
    pub(super) mask: u64,
    pub(super) cgroup: u64,
    pub(super) pid: u32,
    pub(super) tgid: u32,
    pub(super) ppid: u32,
    pub(super) ruid: u32,
    rgid: u32,
    pub(super) euid: u32,
    egid: u32,
    pub(super) suid: u32,
    sgid: u32,
    fsuid: u32,
    fsgid: u32,
    pub(super) exit_code: i32,
}

/// Bits of [`PidfdInfo::mask`].
pub(super) const INFO_PID: u64 = 1;
pub(super) const INFO_CREDS: u64 = 1 << 1;
pub(super) const INFO_CGROUP: u64 = 1 << 2;
pub(super) const INFO_EXIT: u64 = 1 << 3;

const PIDFD_GET_INFO: libc::Ioctl = 0xC040_FF0B_u32 as libc::Ioctl;
const PIDFD_GET_PID_NAMESPACE: libc::Ioctl = 0xFF05;
/// Requests to a PID namespace (linux/nsfs.h).
pub(super) const NS_GET_PARENT: libc::Ioctl = 0xB702;
const NS_GET_OWNER_UID: libc::Ioctl = 0xB704;
pub(super) const NS_GET_TGID_FROM_PIDNS: libc::Ioctl = 0x8004_B707_u32 as libc::Ioctl;
pub(super) const NS_GET_TGID_IN_PIDNS: libc::Ioctl = 0x8004_B709_u32 as libc::Ioctl;

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// One instruction of a socket filter (linux/filter.h): code, jumps and operand.
pub(crate) type FilterStep = libc::sock_filter;

/// Lets a socket receive only the messages that the program accepts (socket(7), `SO_ATTACH_FILTER`).
pub(crate) fn attach_filter(socket: BorrowedFd<'_>, program: &[FilterStep]) -> io::Result<()> {
    let length = u16::try_from(program.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut() };
    let size = size_of::<libc::sock_fprog>() as libc::socklen_t;
    // SAFETY: the kernel copies the program, which lives through the call.
    let result = unsafe {
        let value = (&raw const program).cast();
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, value, size)
    };
    check(result.into())?;
    Ok(())
}

pub(super) fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
}

pub(super) fn pidfd_info(pidfd: BorrowedFd<'_>, mask: u64) -> io::Result<PidfdInfo> {
    let mut info = PidfdInfo { mask, ..PidfdInfo::default() };
    // SAFETY: the request says the size of the struct, which lives through the call.
    check(unsafe { libc::ioctl(pidfd.as_raw_fd(), PIDFD_GET_INFO, &raw mut info) }.into())?;
    Ok(info)
}

pub(super) fn pidfd_pid_namespace(pidfd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: takes no memory; the returned descriptor has no other owner.
    unsafe {
        let fd = check(libc::ioctl(pidfd.as_raw_fd(), PIDFD_GET_PID_NAMESPACE, 0).into())?;
        Ok(OwnedFd::from_raw_fd(fd as RawFd))
    }
}

pub(super) fn parent_namespace(namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: takes no memory; the returned descriptor has no other owner.
    unsafe {
        let fd = check(libc::ioctl(namespace.as_raw_fd(), NS_GET_PARENT).into())?;
        Ok(OwnedFd::from_raw_fd(fd as RawFd))
    }
}

/// Returns the uid, in the daemon's user namespace, of the user who made a user namespace.
pub(super) fn owner_of_user_namespace(namespace: BorrowedFd<'_>) -> io::Result<u32> {
    let mut uid: libc::uid_t = 0;
    // SAFETY: the kernel writes one uid, which lives through the call.
    check(unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_OWNER_UID, &raw mut uid) }.into())?;
    Ok(uid)
}

/// Makes one of the requests that translate a PID. The PID is passed by value, and the result is the answer.
pub(super) fn translate(namespace: BorrowedFd<'_>, request: libc::Ioctl, number: u32) -> io::Result<u32> {
    // SAFETY: takes two numbers and no memory.
    check(unsafe { libc::ioctl(namespace.as_raw_fd(), request, number as libc::c_ulong) }.into())
        .map(|n| n as u32)
}

/// Writes the mask of a thread to `words` and returns the number of valid words.
pub(super) fn get_affinity(tid: u32, words: &mut [u64; MASK_WORDS]) -> io::Result<usize> {
    // SAFETY: the length is the buffer's.
    let bytes = check(unsafe {
        libc::syscall(libc::SYS_sched_getaffinity, tid as libc::pid_t, size_of_val(words), words.as_mut_ptr())
    })?;
    Ok(bytes as usize / size_of::<u64>())
}

pub(super) fn set_affinity(tid: u32, words: &[u64]) -> io::Result<()> {
    // SAFETY: the length is the buffer's, which the kernel only reads.
    check(unsafe {
        libc::syscall(libc::SYS_sched_setaffinity, tid as libc::pid_t, size_of_val(words), words.as_ptr())
    })?;
    Ok(())
}

/// Makes malloc use one heap for all threads and separate mappings for large blocks, so that memory of past requests is
/// reused or returned to the kernel. With one heap per thread and a threshold that grows, 10,000 claims take 1.5 times as
/// much memory.
pub(crate) fn keep_heap_small() {
    const LARGE: libc::c_int = 128 * 1024;
    // SAFETY: takes numbers and no memory.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
    }
}

/// Returns the free pages of the heap to the kernel.
pub(crate) fn trim_heap() {
    // SAFETY: takes a number and no memory.
    unsafe { libc::malloc_trim(0) };
}

/// Runs `work` in the child between fork and exec.
pub(super) fn before_exec(
    command: &mut std::process::Command,
    work: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
) {
    use std::os::unix::process::CommandExt as _;
    // SAFETY: `work` consists of system calls that take numbers. It takes no lock that another thread could have held
    // at the fork.
    unsafe { command.pre_exec(work) };
}

/// Makes the first thread of this process exit, and no other, when the process gets SIGUSR1.
#[cfg(test)]
pub(super) fn end_first_thread_on_sigusr1() -> io::Result<()> {
    extern "C" fn end_thread(_: libc::c_int) {
        // SAFETY: takes one number and ends only the calling thread.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
    }
    use nix::sys::signal::{SigHandler, Signal, signal};
    // SAFETY: the handler makes one system call and touches no memory.
    unsafe { signal(Signal::SIGUSR1, SigHandler::Handler(end_thread)) }.map(|_| ()).map_err(io::Error::from)
}

/// Takes ownership of the inherited descriptor `number`.
pub(super) fn inherited_fd(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the number is open, and by the agreement in `daemon::fds` not owned by other code.
    unsafe {
        check(libc::fcntl(number, libc::F_GETFD).into())?;
        Ok(OwnedFd::from_raw_fd(number))
    }
}

/// Duplicates `fd` as `number`, without close-on-exec, and closes what `number` was (dup2(2)).
pub(super) fn dup_to(fd: BorrowedFd<'_>, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: by the agreement in `daemon::fds` no other code owns the number.
    unsafe {
        check(libc::dup2(fd.as_raw_fd(), number).into())?;
        Ok(OwnedFd::from_raw_fd(number))
    }
}

/// Makes `other` refer to the same file as `fd` (dup2(2)).
pub(super) fn replace_fd(fd: BorrowedFd<'_>, other: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: both descriptors stay open, and their owners stay the same.
    check(unsafe { libc::dup2(fd.as_raw_fd(), other.as_raw_fd()) }.into()).map(|_| ())
}

/// Whether `SIGPIPE` was ignored when this program was started.
static SIGPIPE_WAS_IGNORED: AtomicBool = AtomicBool::new(false);

/// Runs before the runtime of Rust, which ignores `SIGPIPE`.
extern "C" fn look_at_sigpipe() {
    // SAFETY: `action` is a buffer of the right type; nothing is changed. A failure leaves the default action there.
    let handler = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(libc::SIGPIPE, std::ptr::null(), &raw mut action);
        action.sa_sigaction
    };
    SIGPIPE_WAS_IGNORED.store(handler == libc::SIG_IGN, Ordering::Relaxed);
}

// SAFETY: the linker collects the pointers of this section, and the C library calls them in turn before `main`.
#[used]
#[unsafe(link_section = ".init_array")]
static LOOK_AT_SIGPIPE: extern "C" fn() = look_at_sigpipe;

pub(super) fn sigpipe_was_ignored() -> bool {
    SIGPIPE_WAS_IGNORED.load(Ordering::Relaxed)
}

pub(super) fn set_sigpipe(ignored: bool) -> io::Result<()> {
    use nix::sys::signal::{SigHandler, Signal, signal};
    let action = if ignored { SigHandler::SigIgn } else { SigHandler::SigDfl };
    // SAFETY: neither action runs code of this program.
    unsafe { signal(Signal::SIGPIPE, action) }.map(|_| ()).map_err(io::Error::from)
}

/// A question of a child process to a filesystem.
#[derive(Clone, Copy, Debug)]
pub(super) enum Question {
    /// For the attributes of a file.
    Stat,
    /// To remove a directory.
    Rmdir,
}

/// A child process that asks a filesystem something. It shares the memory of this process, because
/// fork(2) copies page tables, which takes longer than the question. So its stack and its input are here.
#[repr(C, align(16))]
pub(super) struct AskingChild {
    stack: [u8; 32 * 1024],
    path: CString,
    question: Question,
    answer: RawFd,
}

impl AskingChild {
    /// Starts the child. It writes the errno (0 for none) to `answer`, and exits. It has no other descriptor of this
    /// process, so that nobody waits for it.
    pub(super) fn start(
        path: CString,
        question: Question,
        answer: BorrowedFd<'_>,
    ) -> io::Result<(nix::unistd::Pid, Box<Self>)> {
        let child = Self { stack: [0; 32 * 1024], path, question, answer: answer.as_raw_fd() };
        let child = Box::into_raw(Box::new(child));
        // No handler may run in it.
        let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
        // SAFETY: the child makes only system calls and takes no lock. It writes to its stack, and to `errno`, while this
        // thread waits for the answer; a caller that waits no longer kills it. It does not return.
        let (pid, child) = unsafe {
            let top = (&raw mut (*child).path).cast();
            let pid = libc::clone(ask_and_answer, top, libc::CLONE_VM | libc::SIGCHLD, child.cast());
            (check(pid.into()), Box::from_raw(child))
        };
        before.thread_set_mask()?;
        Ok((nix::unistd::Pid::from_raw(pid? as libc::pid_t), child))
    }
}

extern "C" fn ask_and_answer(child: *mut libc::c_void) -> libc::c_int {
    // SAFETY: whoever starts it keeps the input until it has exited.
    unsafe {
        let AskingChild { path, question, answer, .. } = &*child.cast::<AskingChild>();
        libc::dup2(*answer, 0);
        libc::syscall(libc::SYS_close_range, 1, libc::c_uint::MAX, 0);
        // `struct statx` (linux/stat.h) has 256 bytes.
        let mut found = [0_u64; 32];
        // The kernel may not answer from its own memory.
        let flags = libc::AT_STATX_FORCE_SYNC | libc::AT_SYMLINK_NOFOLLOW;
        let mask = libc::STATX_BASIC_STATS;
        let (at, path) = (libc::AT_FDCWD, path.as_ptr());
        let done = match question {
            Question::Stat => libc::syscall(libc::SYS_statx, at, path, flags, mask, found.as_mut_ptr()),
            Question::Rmdir => libc::syscall(libc::SYS_unlinkat, at, path, libc::AT_REMOVEDIR),
        };
        let errno = if done == 0 { 0 } else { *libc::__errno_location() };
        libc::write(0, (&raw const errno).cast(), size_of_val(&errno));
        libc::_exit(0)
    }
}

pub(super) fn default_sigchld() -> io::Result<()> {
    use nix::sys::signal::{SigHandler, Signal, signal};
    // SAFETY: the default action runs no code of this program.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigDfl) }.map(|_| ()).map_err(io::Error::from)
}

/// The scheduling policy of this thread. (The C library of some systems has no such function.)
pub(super) fn policy() -> io::Result<i32> {
    // SAFETY: takes a number.
    let policy = check(unsafe { libc::syscall(libc::SYS_sched_getscheduler, 0) })?;
    Ok(policy as i32 & !libc::SCHED_RESET_ON_FORK)
}

/// Gives this thread the policy `SCHED_OTHER`.
pub(super) fn set_ordinary_policy() -> io::Result<()> {
    // `struct sched_param` (linux/sched/types.h): the priority, which is 0 for this policy.
    let parameter: libc::c_int = 0;
    // SAFETY: the kernel reads the parameter.
    let set =
        unsafe { libc::syscall(libc::SYS_sched_setscheduler, 0, libc::SCHED_OTHER, &raw const parameter) };
    check(set).map(|_| ())
}

/// `IOPRIO_WHO_PROCESS` (linux/ioprio.h).
const IOPRIO_WHO_PROCESS: libc::c_int = 1;

/// The class of the I/O priority of this thread (ioprio_set(2)).
pub(super) fn io_class() -> io::Result<i32> {
    // SAFETY: takes numbers.
    let priority = check(unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, 0) })?;
    Ok(priority as i32 >> 13)
}

/// Gives this thread the I/O priority that follows from its nice value.
pub(super) fn set_ordinary_io_class() -> io::Result<()> {
    // SAFETY: takes numbers.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, 0) }).map(|_| ())
}

pub(super) fn kill(pid: u32, signal: u32) -> io::Result<()> {
    // SAFETY: takes numbers.
    check(unsafe { libc::kill(pid as libc::pid_t, signal as libc::c_int) }.into()).map(|_| ())
}

pub(super) fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: takes numbers and no memory.
    let null = std::ptr::null::<libc::siginfo_t>();
    check(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, null, 0) })
        .map(|_| ())
}

/// Duplicates the descriptor `number` of the process.
pub(super) fn pidfd_getfd(pidfd: BorrowedFd<'_>, number: RawFd) -> io::Result<OwnedFd> {
    Ok(rustix::process::pidfd_getfd(pidfd, number, PidfdGetfdFlags::empty())?)
}

/// Closes all descriptors from `first` to `last`.
pub(super) fn close_range(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: called only right after the start of the program, when no value owns one of them.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) }).map(|_| ())
}
