//! Affinity for programs that are not the daemon: the masks of threads, one by one.
//!
//! Owns: nothing; it is the door of `process` to the outside. Must not know: claims.

use std::io;

use crate::model::cpuset::CpuSet;
use crate::process;

/// The mask of a thread: its online CPUs. None: the thread has gone.
///
/// # Errors
/// What the kernel says.
pub fn get(tid: u32) -> io::Result<Option<CpuSet>> {
    process::mask_of(tid)
}

/// Sets the mask of a thread. The kernel may narrow it; [`get`] tells.
///
/// # Errors
/// `ESRCH`: the thread has gone. `EINVAL`: none of the CPUs is allowed. `EPERM`: not ours to set.
pub fn set(tid: u32, cpus: &CpuSet) -> io::Result<()> {
    process::set_mask_of(tid, cpus)
}
