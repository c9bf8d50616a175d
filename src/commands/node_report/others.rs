//! What keeps other programs off the CPUs of exclusive lists, for the check `isolation`.
//!
//! Owns the warnings if nothing does. Does not know isolated pools that do not work: those are errors.
//!
//! They are warnings, which leave the check ok: a claim keeps off other claims, and a machine on which other programs may run
//! on claimed CPUs is an ordinary one. The lists are named, and not the programs, so that a warning stays the same while
//! programs come and go.

use std::collections::BTreeMap;

use kcm_mount::model::cpuset::CpuSet;
use kcm_mount::model::topology::Topology;

use super::lists;
use crate::commands::describe::{self, Members};
use crate::confdir::Pools;
use crate::host::Host;

/// Returns a warning for each pool whose exclusive CPUs other programs may use, and for each task in a pod that gets only what
/// others leave.
pub(super) fn warnings(
    pools: &Pools,
    machine: &Topology,
    online: &CpuSet,
    host: &Host,
    members: &Members,
) -> Vec<String> {
    let isolated: CpuSet = machine.all().iter().filter(|cpu| cpu.isolated).map(|cpu| cpu.id).collect();
    let exclusive = || lists(pools).filter(|list| list.exclusive);
    let mut open: BTreeMap<&str, CpuSet> = BTreeMap::new();
    for list in exclusive().filter(|list| !list.isolated) {
        let cpus = list.cpus.intersection(online).difference(&isolated);
        let of_pool = open.entry(list.pool).or_default();
        *of_pool = of_pool.union(&cpus);
    }
    open.retain(|_, cpus| !cpus.is_empty());
    let mut warnings = Vec::new();
    // A made-up machine does not have these processes.
    let used = match host.is_this_machine() && !open.is_empty() {
        true => used_by_others(&exclusive().map(|list| list.cpus).collect::<Vec<_>>(), host),
        false => CpuSet::new(),
    };
    for (name, cpus) in open {
        let open = cpus.intersection(&used);
        if !open.is_empty() {
            warnings.push(format!(
                "nothing keeps other programs off CPU {open} of {}; make the pool isolated (kcm init --isolated, or its file \
                 mode), or start the kernel with isolcpus={cpus}",
                describe::shown(name)
            ));
        }
    }
    for list in exclusive().filter(|list| !list.isolated && !list.cpus.intersection(&used).is_empty()) {
        for pid in list.tasks.iter().filter(|pid| members.is_best_effort(**pid)) {
            let Some(program) = host.program_name(*pid) else { continue };
            warnings.push(format!(
                "{pid} ({program}) of {} is in a pod without requests, so other pods come first on its CPUs; give its \
                 container resources.requests.cpu",
                list.name
            ));
        }
    }
    warnings
}

/// Returns the CPUs on which programs may run that are not pinned to an exclusive list. Those that are, are its holder, the
/// children of the holder, or intruders.
fn used_by_others(exclusive: &[CpuSet], host: &Host) -> CpuSet {
    let masks = host.user_processes().into_iter().filter_map(|pid| host.mask(pid));
    let is_pinned = |mask: &CpuSet| exclusive.iter().any(|cpus| mask.is_subset(cpus));
    masks.filter(|mask| !is_pinned(mask)).fold(CpuSet::new(), |all, mask| all.union(&mask))
}
