//! The CPUs that the cpuset cgroup of a process allows.
//!
//! Owns the paths of cgroups v1 and v2. Does not know pools, or what a thread may run on within its cpuset.

use std::fs;
use std::path::{Path, PathBuf};

use kcm_mount::model::cpuset::CpuSet;

/// A mounted hierarchy that has cpusets.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Hierarchy {
    mount_point: PathBuf,
    root: String,
    /// The file with the CPUs that a cgroup really has.
    file: &'static str,
    is_v2: bool,
}

/// Returns the CPUs that the cpuset of a process allows; `None` if that cannot be found out. `proc`: the procfs.
pub(super) fn effective(proc: &Path, pid: u32) -> Option<CpuSet> {
    let cgroups = fs::read_to_string(proc.join(format!("{pid}/cgroup"))).ok()?;
    let mounts = fs::read_to_string(proc.join("self/mountinfo")).ok()?;
    hierarchies(&mounts).into_iter().find_map(|hierarchy| {
        let path = cgroup_of(&cgroups, hierarchy.is_v2)?;
        let below = path.strip_prefix(hierarchy.root.trim_end_matches('/'))?.trim_start_matches('/');
        let own = hierarchy.mount_point.join(below);
        // A cgroup without the controller has the CPUs of the nearest one above that has it.
        let mut cgroups = own.ancestors().take_while(|cgroup| cgroup.starts_with(&hierarchy.mount_point));
        cgroups.find_map(|cgroup| fs::read_to_string(cgroup.join(hierarchy.file)).ok()?.trim().parse().ok())
    })
}

/// The hierarchies of a mount table (proc(5), `/proc/PID/mountinfo`): that of v1 first, because on a machine with both the
/// controller is in v1 if it is mounted there.
fn hierarchies(mounts: &str) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = mounts.lines().filter_map(hierarchy).collect();
    found.sort_by_key(|hierarchy| hierarchy.is_v2);
    found
}

fn hierarchy(line: &str) -> Option<Hierarchy> {
    let (before, after) = line.split_once(" - ")?;
    let mut fields = before.split(' ').skip(3);
    let (root, mount_point) = (fields.next()?, fields.next()?);
    let mut after = after.split(' ');
    let (kind, options) = (after.next()?, after.nth(1).unwrap_or_default());
    let is_v2 = kind == "cgroup2";
    let has_cpusets = is_v2 || kind == "cgroup" && options.split(',').any(|option| option == "cpuset");
    let file = if is_v2 { "cpuset.cpus.effective" } else { "cpuset.effective_cpus" };
    has_cpusets.then(|| Hierarchy { mount_point: mount_point.into(), root: root.to_owned(), file, is_v2 })
}

/// Returns the cgroup of a process in the hierarchy of v2, or in that of v1 with cpusets (cgroups(7),
/// `/proc/PID/cgroup`).
fn cgroup_of(cgroups: &str, is_v2: bool) -> Option<&str> {
    cgroups.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (number, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let is_it = if is_v2 { number == "0" } else { controllers.split(',').any(|one| one == "cpuset") };
        is_it.then_some(path)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_with_cpusets_are_found() {
        let mounts = "30 1 0:26 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw,nsdelegate\n\
            31 1 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
            32 1 0:28 /docker/x /sys/fs/cgroup/cpuset ro - cgroup cgroup rw,cpuset\n";
        let found = hierarchies(mounts);
        let v1 = Hierarchy {
            mount_point: "/sys/fs/cgroup/cpuset".into(),
            root: "/docker/x".into(),
            file: "cpuset.effective_cpus",
            is_v2: false,
        };
        assert_eq!(found.len(), 2);
        assert_eq!(found[0], v1);
        assert_eq!(found[1].file, "cpuset.cpus.effective");
    }

    #[test]
    fn a_process_has_a_cgroup_in_each_hierarchy() {
        let cgroups = "5:cpuset,cpu:/pods/a\n4:memory:/m\n0::/system.slice/a:b\n";
        assert_eq!(cgroup_of(cgroups, false), Some("/pods/a"));
        assert_eq!(cgroup_of(cgroups, true), Some("/system.slice/a:b"));
        assert_eq!(cgroup_of("0::/\n", false), None);
    }
}
