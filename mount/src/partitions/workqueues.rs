//! On which CPUs unbound work of the kernel may run.
//!
//! Owns the file that says so. Does not know partitions.
//!
//! A partition of the kind `root` keeps tasks off its CPUs, not the threads of the kernel that do work for any CPU
//! (`Documentation/core-api/workqueue.rst`, "Affinity Scopes"). The kernel has one mask for all of it.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};

use crate::model::cpuset::CpuSet;

/// A mask for all unbound work. In a container it is that of the node, and may be read-only.
const MASK: &str = "/sys/devices/virtual/workqueue/cpumask";

/// Returns which of these CPUs can be kept free of unbound work: none if the mask cannot be written, or if no other CPU
/// would be left for it.
pub(super) fn removable(cpus: &CpuSet) -> CpuSet {
    let is_writable = OpenOptions::new().write(true).open(MASK).is_ok();
    match allowed() {
        Ok(allowed) if is_writable && !allowed.difference(cpus).is_empty() => allowed.intersection(cpus),
        _ => CpuSet::new(),
    }
}

/// Keeps unbound work off these CPUs. Without it the partition is still in force.
pub(super) fn keep_off(cpus: &CpuSet) {
    if let Err(error) = change(cpus, |allowed| allowed.difference(cpus)) {
        log::debug!("unbound work of the kernel cannot be kept off CPU {cpus}: {error}");
    }
}

/// Allows it again on these CPUs.
pub(super) fn allow(cpus: &CpuSet) {
    if let Err(error) = change(cpus, |allowed| allowed.union(cpus)) {
        log::warn!("unbound work of the kernel cannot be allowed on CPU {cpus} again: {error}");
    }
}

/// Writes only a change: each write has the kernel set up all its queues again.
fn change(cpus: &CpuSet, change: impl FnOnce(&CpuSet) -> CpuSet) -> io::Result<()> {
    if cpus.is_empty() {
        return Ok(());
    }
    let before = allowed()?;
    let after = change(&before);
    if after == before {
        return Ok(());
    }
    OpenOptions::new().write(true).open(MASK)?.write_all(after.to_mask().as_bytes())
}

fn allowed() -> io::Result<CpuSet> {
    let text = fs::read_to_string(MASK)?;
    CpuSet::from_mask(text.trim()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}
