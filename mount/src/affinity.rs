//! The affinity masks of single threads, for programs other than the daemon.
//!
//! Owns nothing: it makes a part of `process` public. Does not know claims.

use std::io;

use crate::model::cpuset::CpuSet;
use crate::process;

/// Returns the mask of a thread (0: the calling one), without offline CPUs; `None` if the thread has gone.
///
/// # Errors
/// Returns the error of sched_getaffinity(2).
pub fn get(tid: u32) -> io::Result<Option<CpuSet>> {
    process::mask_of(tid)
}

/// Sets the mask of a thread (0: the calling one). The kernel may narrow it; [`get`] returns the mask that is in force.
///
/// # Errors
/// `ESRCH` if the thread has gone, `EINVAL` if the thread may not use any of the CPUs, `EPERM` if the caller may not set
/// the mask of this thread.
pub fn set(tid: u32, cpus: &CpuSet) -> io::Result<()> {
    process::set_mask_of(tid, cpus)
}
