//! The system calls of the attackers that have no safe wrapper.
#![allow(unsafe_code, reason = "there is no safe way")]

use std::io;

use nix::unistd::{ForkResult, Pid};

/// Forks; returns the PID of the child, and `None` in the child. Must be called while this process has one thread.
pub fn fork() -> io::Result<Option<Pid>> {
    // SAFETY: the process has one thread, so that no lock of another thread stays locked in the child.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(Some(child)),
        ForkResult::Child => Ok(None),
    }
}

/// Lets the calling thread run before all ordinary ones. Its children and the threads that it creates are ordinary again.
/// Only root may.
pub fn run_before_others() -> io::Result<()> {
    let none = libc::sched_param { sched_priority: 0 };
    // SAFETY: the kernel reads the parameter, which lives until the call returns.
    let flagged = unsafe {
        libc::sched_setscheduler(0, libc::SCHED_OTHER | libc::SCHED_RESET_ON_FORK, &raw const none)
    };
    // SAFETY: plain numbers.
    if flagged != 0 || unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -20) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Lets the calling thread run only when its CPU would otherwise be idle: the lowest priority, which everybody may take.
pub fn run_when_idle() -> io::Result<()> {
    let none = libc::sched_param { sched_priority: 0 };
    // SAFETY: the kernel reads the parameter, which lives until the call returns.
    match unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const none) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
