//! The priority of this process.
//!
//! Owns which priorities are too low for a daemon that others wait for. Does not know what the process does.

use std::io;

use super::sys;

/// `IOPRIO_CLASS_IDLE` (linux/ioprio.h).
const IO_IDLE: i32 = 3;

/// Gives this thread, and the processes that it starts from now on, the priority of an ordinary process, if it has
/// inherited a lower one (`nice`, `chrt --batch`, `chrt --idle`, `ionice --class idle`), or a policy with which no process
/// can be started (`SCHED_DEADLINE`). A higher one is somebody's choice and stays.
///
/// # Errors
/// Returns `EPERM` without `CAP_SYS_NICE`.
pub(crate) fn raise_low_priority() -> io::Result<()> {
    if matches!(sys::policy()?, libc::SCHED_BATCH | libc::SCHED_IDLE | libc::SCHED_DEADLINE) {
        sys::set_ordinary_policy()?;
    }
    if rustix::process::getpriority_process(None)? > 0 {
        rustix::process::setpriority_process(None, 0)?;
    }
    if sys::io_class()? == IO_IDLE {
        sys::set_ordinary_io_class()?;
    }
    Ok(())
}
