//! Which partition a claim gets, and what has to be written for it.
//!
//! Owns which cgroups are suitable. Writes nothing.

use std::io::ErrorKind;

use super::members::{are_at, cgroup_of};
use super::{PartitionError, Tree, shown, workqueues};
use crate::model::cpuset::CpuSet;
use crate::model::partition::{Extent, Level, Partition, ancestors, is_below};
use crate::model::pool::ListId;

impl Tree {
    /// Returns the partition that would be made for a process. `is_partition` says whether a cgroup was made as a partition.
    ///
    /// # Errors
    /// The process has died, or its cgroup is not suitable.
    pub(crate) fn plan(
        &self,
        pid: u32,
        list: ListId,
        cpus: &CpuSet,
        extent: &Extent,
        is_partition: &dyn Fn(&str) -> bool,
    ) -> Result<Partition, PartitionError> {
        let mut parent = cgroup_of(pid)?;
        let is_whole_cgroup = match extent {
            Extent::Task => false,
            Extent::Cgroup => {
                self.check_whole(&parent, pid)?;
                true
            }
            Extent::SameCgroup(path) => {
                let is_same = is_below(&parent, path);
                if is_same {
                    parent.clone_from(path);
                }
                is_same
            }
        };
        if !is_whole_cgroup {
            if is_partition(&parent) {
                parent.truncate(parent.rfind('/').unwrap_or(0));
            }
            self.check_parent(&parent, pid)?;
        }
        let mut levels: Vec<Level> = Vec::new();
        for path in ancestors(&parent) {
            let has_cpuset = self.has_word(path, "cgroup.subtree_control", "cpuset");
            let is_partition = is_whole_cgroup && path == parent;
            let exclusive = !path.is_empty() && !cpus.is_subset(&self.cpus(path, "cpuset.cpus.exclusive"));
            levels.push(Level { enabled: !has_cpuset && !is_partition, exclusive });
        }
        let workqueues = workqueues::removable(cpus);
        Ok(Partition { list, cpus: cpus.clone(), parent, is_whole_cgroup, levels, workqueues })
    }

    /// Checks that a cgroup can have a threaded cgroup below it for the process.
    fn check_parent(&self, parent: &str, pid: u32) -> Result<(), PartitionError> {
        match self.read(parent, "cgroup.type").as_deref() {
            // Its threads may be in several cgroups, which would be lost.
            Ok("threaded") if !are_at(pid, parent) => {
                Err(unsuitable(parent, "its threads are in several cgroups"))
            }
            Ok("domain" | "domain threaded" | "threaded") => Ok(()),
            Ok(kind) => Err(unsuitable(parent, &format!("its type is {kind}"))),
            Err(error) if error.kind() == ErrorKind::NotFound && parent.is_empty() => Ok(()),
            Err(error) => Err(unsuitable(parent, &format!("its type cannot be read: {error}"))),
        }
    }

    /// Checks that a cgroup has only this process, so that nobody else's process is put on the CPUs.
    fn check_whole(&self, path: &str, pid: u32) -> Result<(), PartitionError> {
        if path.is_empty() {
            return Err(unsuitable(path, "it is the root"));
        }
        match self.read(path, "cgroup.type").as_deref() {
            Ok("domain") => {}
            Ok(kind) => return Err(unsuitable(path, &format!("its type is {kind}"))),
            Err(error) => return Err(unsuitable(path, &format!("its type cannot be read: {error}"))),
        }
        let processes = self.read(path, "cgroup.procs").unwrap_or_default();
        if processes != pid.to_string() {
            return Err(unsuitable(path, "it has other processes"));
        }
        if !self.children(path).is_empty() {
            return Err(unsuitable(path, "it has cgroups below it"));
        }
        Ok(())
    }
}

fn unsuitable(path: &str, why: &str) -> PartitionError {
    PartitionError::Unsuitable { path: shown(path), why: why.to_owned() }
}
