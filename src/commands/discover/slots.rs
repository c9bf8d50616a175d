//! The slots of this node.
//!
//! Owns which CPU lists are slots, and reading them in another process, because a process that reads a mount hangs with its
//! daemon. Does not know the API server.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Error, bail};
use kcm_mount::model::cpuset::CpuSet;
use kcm_mount::mountpoint::{self, Status};
use serde::{Deserialize, Serialize};

use crate::cli::{self, ResourceName};
use crate::commands::common::other_process::output_within;
use crate::confdir::{ConfDir, Pool, Pools};
use crate::host::Host;
use crate::kubernetes::objects::node::{self, Slots};

/// How long reading the pools may take. A daemon that answers at all needs milliseconds.
const MOST: Duration = Duration::from_secs(5);
/// The pool whose CPU lists are the slots of the legacy resource.
const DATAPLANE: &str = "dataplane";

/// The result of a look at the pools.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Offer {
    /// Slots, or none if all lists are draining or offline.
    Slots(Slots),
    /// There is no list that could be a slot; the reason, with what to do.
    Nothing(String),
    /// Nobody answers; the reason, with what to do.
    Unavailable(String),
    /// The topology of the machine cannot be read.
    Unknown(String),
}

/// Looks for slots, for a bounded time.
///
/// # Errors
/// No process can be started, or the topology of the machine cannot be read.
pub(super) fn offer(args: &cli::Discover) -> Result<Offer, Error> {
    let conf_dir = &args.dir.conf_dir;
    let not_answering =
        || Offer::Unavailable(format!("{}: kcm mount does not answer; look at its log", conf_dir.display()));
    // It asks in a process of its own too, and starts no other one while that one hangs.
    if let Ok(Status::NotAnswering) = mountpoint::status(conf_dir) {
        return Ok(not_answering());
    }
    let mut command = Command::new("/proc/self/exe");
    command.args(std::env::args_os().skip(1)).arg("--look");
    let answer = output_within(command, MOST);
    match answer.context("no process can be started; look at the limits of this user")? {
        None => Ok(not_answering()),
        Some(text) => match serde_json::from_str(&text).context("the pools cannot be read")? {
            Offer::Unknown(why) => bail!(why),
            offer => Ok(offer),
        },
    }
}

/// Looks for slots in this process, which may take any time.
pub(super) fn look(args: &cli::Discover) -> Offer {
    let pools = match ConfDir::open(&args.dir.conf_dir).and_then(|dir| dir.find()) {
        Ok(found) => found.warned(),
        Err(error) => return Offer::Unavailable(format!("{error:#}")),
    };
    match offline() {
        Ok(offline) => of_pools(&pools, args.resource_name, &offline),
        Err(error) => Offer::Unknown(format!("{error:#}")),
    }
}

/// Returns the CPUs of this machine that are offline.
fn offline() -> Result<CpuSet, Error> {
    let machine = Host::from_env().topology()?;
    Ok(machine.cpus().difference(&machine.online()))
}

/// Returns the slots that these pools offer: the lists that can be claimed.
fn of_pools(pools: &Pools, name: ResourceName, offline: &CpuSet) -> Offer {
    let count = |pool: &Pool| pool.lists.keys().filter(|list| pool.can_serve(list, offline)).count();
    let named: Vec<(String, &Pool)> = match name {
        ResourceName::Opaque => {
            pools.get(DATAPLANE).into_iter().map(|pool| (node::OPAQUE.to_owned(), pool)).collect()
        }
        ResourceName::Extended => {
            let offered = pools.iter().filter(|(_, pool)| pool.is_for_pods());
            offered.map(|(name, pool)| (node::extended(name), pool)).collect()
        }
        // Label and taint are for a node with lists, and whether these can be claimed the kubelet knows.
        ResourceName::None => {
            let mut offered = pools.values().filter(|pool| pool.is_for_pods());
            return match offered.any(|pool| !pool.lists.is_empty()) {
                true => Offer::Slots(Slots::new()),
                false => Offer::Nothing("no exclusive pool has a CPU list; create some: kcm init".into()),
            };
        }
    };
    if named.iter().all(|(_, pool)| pool.lists.is_empty()) {
        return Offer::Nothing(match pools.contains_key(DATAPLANE) {
            false => "Dataplane pool does not exist; create it: kcm init".into(),
            true => format!("No CPU list in dataplane pool; create one: mkdir pools/{DATAPLANE}/<cpulist>"),
        });
    }
    let slots = named.into_iter().map(|(name, pool)| (name, count(pool)));
    Offer::Slots(slots.filter(|(_, count)| *count > 0).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pools(pools: &[(&str, bool, usize)]) -> Pools {
        let pool = |&(name, exclusive, lists): &(&str, bool, usize)| {
            let lists = (0..lists).map(|list| (list.to_string(), Vec::new())).collect();
            (name.to_owned(), Pool { exclusive, lists, ..Pool::default() })
        };
        pools.iter().map(pool).collect()
    }

    /// Returns the slots as text.
    fn slots(pools: &Pools, name: ResourceName, offline: &str) -> String {
        match of_pools(pools, name, &offline.parse().unwrap_or_default()) {
            Offer::Slots(slots) => super::super::listed(&slots),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn slots_are_named_by_resource() {
        let all =
            pools(&[("dataplane", true, 4), ("fast", true, 2), ("empty", true, 0), ("infra", false, 1)]);
        assert_eq!(
            slots(&all, ResourceName::Opaque, ""),
            "4 pod.alpha.kubernetes.io/opaque-int-resource-kcm"
        );
        assert_eq!(
            slots(&all, ResourceName::Extended, ""),
            "4 kcm.intel.com/dataplane, 2 kcm.intel.com/fast"
        );
        assert_eq!(
            slots(&all, ResourceName::Extended, "1,9"),
            "3 kcm.intel.com/dataplane, 1 kcm.intel.com/fast",
            "a list with an offline CPU cannot be claimed"
        );
        let mut partial = pools(&[("dataplane", true, 1)]);
        let pool = partial.get_mut("dataplane").unwrap();
        pool.partial = true;
        pool.lists.insert("8-9".into(), Vec::new());
        partial.get_mut("dataplane").unwrap().draining.insert("8-9".into());
        assert_eq!(slots(&partial, ResourceName::Extended, ""), "1 kcm.intel.com/dataplane");
        partial.get_mut("dataplane").unwrap().draining.clear();
        for (offline, count) in [("8", 2), ("8-9", 1)] {
            let expected = format!("{count} kcm.intel.com/dataplane");
            assert_eq!(slots(&partial, ResourceName::Extended, offline), expected);
        }
    }

    #[test]
    fn without_cpu_lists_there_is_nothing_to_offer() {
        for name in [ResourceName::Opaque, ResourceName::Extended] {
            let why = |all: &Pools| match of_pools(all, name, &CpuSet::new()) {
                Offer::Nothing(why) => why,
                other => panic!("{other:?}"),
            };
            assert!(why(&pools(&[("infra", false, 1)])).starts_with("Dataplane pool does not exist"));
            assert!(why(&pools(&[("dataplane", true, 0)])).starts_with("No CPU list in dataplane pool"));
        }
    }

    #[test]
    fn a_device_plugin_has_the_slots() {
        let look = |all: &Pools| of_pools(all, ResourceName::None, &CpuSet::new());
        assert_eq!(look(&pools(&[("fast", true, 2)])), Offer::Slots(Slots::new()));
        assert!(matches!(look(&pools(&[("dataplane", true, 0), ("infra", false, 1)])), Offer::Nothing(_)));
    }

    #[test]
    fn a_transient_pool_is_not_for_pods() {
        let mut all = pools(&[("dataplane", true, 1), ("shield", true, 1)]);
        all.get_mut("shield").unwrap().transient = true;
        assert_eq!(slots(&all, ResourceName::Extended, ""), "1 kcm.intel.com/dataplane");
        all.remove("dataplane");
        assert!(matches!(of_pools(&all, ResourceName::None, &CpuSet::new()), Offer::Nothing(_)));
    }

    #[test]
    fn lists_that_all_drain_are_no_slots_and_no_mistake() {
        let mut all = pools(&[("dataplane", true, 1)]);
        all.get_mut("dataplane").unwrap().draining.insert("0".into());
        assert_eq!(of_pools(&all, ResourceName::Opaque, &CpuSet::new()), Offer::Slots(Slots::new()));
    }
}
