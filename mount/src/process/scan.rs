//! One pass over all processes of the machine.
//!
//! Owns finding processes by their affinity mask. Does not know why they are looked for.

use std::io;

use super::mask::mask_of;
use super::{Facts, Processes};
use crate::model::cpuset::CpuSet;
use crate::model::task::{Pid, TaskId};

/// A process that the scan found.
#[derive(Debug)]
pub(crate) struct ScannedProcess {
    pub(crate) task: TaskId,
    pub(crate) facts: Facts,
    /// The number of its cgroup, see [`Processes::cgroup`].
    pub(crate) cgroup: u64,
    /// The start time in clock ticks since boot.
    pub(crate) started: u64,
    /// The mask of its first thread.
    pub(crate) mask: CpuSet,
}

impl Processes {
    /// Returns the processes for whose first thread's mask `wanted` returns true, without kernel threads. Every
    /// other process costs one system call.
    ///
    /// # Errors
    /// Returns an error if `/proc` cannot be read.
    pub(crate) fn scan(&self, wanted: impl Fn(&CpuSet) -> bool) -> io::Result<Vec<ScannedProcess>> {
        let mut found = Vec::new();
        self.proc.each_pid(|pid| {
            if let Ok(Some(mask)) = mask_of(pid)
                && wanted(&mask)
            {
                found.push((pid, mask));
            }
        })?;
        let candidate = |(pid, mask): (u32, CpuSet)| {
            // Every CPU has about ten kernel threads; one cheap check excludes each.
            self.proc.may_have_program(pid).then_some(())?;
            let process = self.open(Pid::new(pid)?).ok().flatten()?;
            let facts = self.facts(&process).ok().flatten().filter(|facts| !facts.kernel_thread)?;
            let cgroup = self.cgroup(&process)?;
            let started = self.started(&process)?;
            Some(ScannedProcess { task: process.id(), facts, cgroup, started, mask })
        };
        Ok(found.into_iter().filter_map(candidate).collect())
    }
}
