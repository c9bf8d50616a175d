//! Partitions: the cgroups in which tasks have their CPUs for themselves, and the changes in the tree of cgroups for
//! each.
//!
//! Owns these types and the reasons why there is no partition. Does not know how cgroups are written.

use std::fmt;

use super::cpuset::CpuSet;
use super::pool::ListId;

/// The part of the system that a claim puts on the CPUs of an isolated list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Extent {
    /// The task: a threaded cgroup below its cgroup is the partition.
    #[default]
    Task,
    /// The cgroup of the task, which has no other process yet, is the partition. Every process that enters it later is
    /// on these CPUs, too.
    Cgroup,
    /// The cgroup with this path was the partition of the task and is it again, if the task is in it or below it still.
    SameCgroup(String),
}

/// A partition of cgroup v2, for the task that has the claim on a list. It is a threaded cgroup below the cgroup
/// of the task, or that cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// The list.
    pub list: ListId,
    /// Its CPUs.
    pub cpus: CpuSet,
    /// The path of the task's cgroup from the root of the tree; empty for the root.
    pub parent: String,
    /// Whether that cgroup is the partition.
    pub is_whole_cgroup: bool,
    /// The changes in the cgroups on that path, from the root to the cgroup of the task.
    pub levels: Vec<Level>,
    /// Those of its CPUs on which unbound work of the kernel is not allowed because of it.
    pub workqueues: CpuSet,
}

/// The changes in one cgroup above a partition, which have to be taken back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Level {
    /// The cpuset controller is switched on for its children.
    pub enabled: bool,
    /// The CPUs are added to its `cpuset.cpus.exclusive`.
    pub exclusive: bool,
}

impl Partition {
    /// Returns the path of its cgroup from the root of the tree.
    #[must_use]
    pub fn path(&self) -> String {
        if self.is_whole_cgroup { self.parent.clone() } else { format!("{}/kcm-{}", self.parent, self.cpus) }
    }

    /// Returns its extent when it is made again.
    #[must_use]
    pub fn extent(&self) -> Extent {
        if self.is_whole_cgroup { Extent::SameCgroup(self.parent.clone()) } else { Extent::Task }
    }

    /// Returns the paths that belong to [`Partition::levels`].
    pub fn ancestors(&self) -> impl DoubleEndedIterator<Item = &str> {
        ancestors(&self.parent)
    }
}

/// Returns the paths from the root, which is empty, down to this cgroup.
pub fn ancestors(path: &str) -> impl DoubleEndedIterator<Item = &str> {
    let ends = path.match_indices('/').map(|(at, _)| at).chain([path.len()]);
    let ends: Vec<usize> = if path.is_empty() { vec![0] } else { ends.collect() };
    ends.into_iter().map(|end| path.get(..end).unwrap_or_default())
}

/// Whether a cgroup is another one or is below it.
#[must_use]
pub fn is_below(path: &str, above: &str) -> bool {
    path.strip_prefix(above).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Why a machine can make no partitions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// There is no cgroup v2, or it is not where the daemon looks.
    Mount,
    /// The daemon sees a part of the tree only.
    Root,
    /// cgroup v2 does not have the cpuset controller; cgroup v1 may have it.
    Controller,
    /// The kernel has no partitions below cgroups that others manage.
    Kernel,
    /// The tree is mounted read-only.
    Writable,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Mount => {
                "cgroup v2 is not mounted at /sys/fs/cgroup; boot with systemd.unified_cgroup_hierarchy=1"
            }
            Self::Root => {
                "the daemon sees a part of the cgroup tree only; let it share the PID namespace of the node"
            }
            Self::Controller => {
                "cgroup v2 has no cpuset controller, cgroup v1 has it; boot with cgroup_no_v1=cpuset"
            }
            Self::Kernel => "the kernel has no cpuset.cpus.exclusive; use Linux 6.8 or newer",
            Self::Writable => "cgroup v2 is mounted read-only; mount it for writing",
        })
    }
}

/// The state of a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PartitionState {
    /// Nobody else runs on its CPUs.
    Isolated,
    /// The kernel has isolated the CPUs at boot (`isolcpus=`) and makes no partition of them.
    Boot,
    /// It is not in force, for this reason.
    Invalid(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        let partition = |parent: &str| Partition {
            list: ListId(64),
            cpus: "2-3".parse().unwrap(),
            parent: parent.to_owned(),
            is_whole_cgroup: false,
            levels: Vec::new(),
            workqueues: CpuSet::new(),
        };
        let ancestors = |parent| partition(parent).ancestors().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(ancestors(""), [""]);
        assert_eq!(ancestors("/a"), ["", "/a"]);
        assert_eq!(ancestors("/a/b.scope"), ["", "/a", "/a/b.scope"]);
        assert_eq!(partition("").path(), "/kcm-2-3");
        assert_eq!(partition("/a").path(), "/a/kcm-2-3");
        assert_eq!(Partition { is_whole_cgroup: true, ..partition("/a") }.path(), "/a");
    }
}
