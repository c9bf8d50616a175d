//! Intruders: processes that are pinned within an exclusive list without a claim.
//!
//! Owns who is one, and the message. Does not know who asks.

use std::fmt;

use kcm_mount::model::cpuset::CpuSet;

use super::{List, lists};
use crate::confdir::Pools;
use crate::host::Host;

/// A process with a thread whose affinity lies within an exclusive list, while neither the process nor an ancestor is a task
/// of that list. Such a thread was pinned with taskset(1) or similar.
pub(in crate::commands) struct Intruder {
    pub(in crate::commands) pid: u32,
    pub(in crate::commands) program: String,
    tid: u32,
    /// The affinity of the thread.
    pub(in crate::commands) mask: CpuSet,
    /// `pool:list`.
    list: String,
}

impl fmt::Display for Intruder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pid, program, tid, mask, list } = self;
        if tid != pid {
            write!(f, "thread {tid} of ")?;
        }
        write!(f, "{pid} ({program}) is pinned to {mask}, within CPU list {list}, without a claim")
    }
}

/// Returns the intruders, each with its first such thread.
pub(in crate::commands) fn find(pools: &Pools, online: &CpuSet, host: &Host) -> Vec<Intruder> {
    let exclusive: Vec<List<'_>> = lists(pools).filter(|list| list.exclusive).collect();
    if exclusive.is_empty() {
        return Vec::new();
    }
    let intruder = |pid: u32| {
        let mut masks = host.thread_masks(pid).into_iter();
        let (tid, mask, list) = masks
            .find_map(|(tid, mask)| pinned_to(&exclusive, &mask, online).map(|list| (tid, mask, list)))?;
        let mut ancestors = std::iter::successors(Some(pid), |&pid| host.parent(pid));
        if ancestors.any(|pid| list.tasks.contains(&pid)) {
            return None;
        }
        // A process without a name has exited since.
        let program = host.program_name(pid)?;
        Some(Intruder { pid, program, tid, mask, list: list.name.clone() })
    };
    host.user_processes().into_iter().filter_map(intruder).collect()
}

/// Returns the exclusive list that contains the whole affinity of a thread. A thread that may run on every CPU is not
/// pinned, even if one list has all CPUs.
fn pinned_to<'a>(exclusive: &'a [List<'a>], mask: &CpuSet, online: &CpuSet) -> Option<&'a List<'a>> {
    if mask.is_empty() || online.is_subset(mask) {
        return None;
    }
    exclusive.iter().find(|list| mask.is_subset(&list.cpus))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::confdir::Pool;

    pub(in crate::commands::node_report) fn pools(pools: &[(&str, bool, &[&str])]) -> Pools {
        let pool = |&(name, exclusive, lists): &(&str, bool, &[&str])| {
            let lists = lists.iter().map(|list| ((*list).to_owned(), Vec::new())).collect();
            (name.to_owned(), Pool { exclusive, lists, ..Pool::default() })
        };
        pools.iter().map(pool).collect()
    }

    pub(in crate::commands::node_report) fn cpus(text: &str) -> CpuSet {
        text.parse().unwrap()
    }

    #[test]
    fn a_thread_is_pinned_if_it_may_only_use_the_list() {
        let pools = pools(&[("a", true, &["0-1", "2-3"])]);
        let exclusive: Vec<List<'_>> = lists(&pools).collect();
        let list = |mask: CpuSet, online: &str| {
            pinned_to(&exclusive, &mask, &cpus(online)).map(|list| list.name.clone())
        };
        assert_eq!(list(cpus("3"), "0-3").as_deref(), Some("a:2-3"));
        assert_eq!(list(cpus("1-2"), "0-3"), None, "in no single list");
        assert_eq!(list(cpus("0-1"), "0-1"), None, "all CPUs that are online");
        assert_eq!(list(CpuSet::new(), "0-3"), None);
    }
}
