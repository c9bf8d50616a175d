//! One look at all processes of the machine.

use std::io;

use super::mask::mask_of;
use super::{Facts, Processes};
use crate::model::cpuset::CpuSet;
use crate::model::task::{Pid, TaskId};

/// A process that was looked for.
#[derive(Debug)]
pub(crate) struct ScannedProcess {
    pub(crate) task: TaskId,
    pub(crate) facts: Facts,
    /// A number for its cgroup.
    pub(crate) cgroup: u64,
    /// In clock ticks since boot.
    pub(crate) started: u64,
    /// Its leader's mask.
    pub(crate) mask: CpuSet,
}

impl Processes {
    /// Those whose leader's mask is wanted, but none of the kernel's. The others cost one system call each.
    ///
    /// # Errors
    /// /proc cannot be read.
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
            // On every CPU sit some of the kernel's own threads: one short look at each is enough.
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
