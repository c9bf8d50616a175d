//! `kcm discover`: sets the slots, the label and the taint of this node, and removes them.
//!
//! Owns what is advertised, and in which order. Does not know how a request is sent, or what is in it.

use std::ops::RangeInclusive;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Error, bail};
use k8s_openapi::api::core::v1::Node;
use kcm_mount::model::cpuset::CpuSet;

use super::common::cluster::connected;
use super::common::node::node_name;
use super::common::{interval, output};
use crate::backoff::Backoff;
use crate::cli::{self, Repeat, ResourceName};
use crate::confdir::{self, ConfDir, Pool, Pools};
use crate::host::Host;
use crate::kubernetes::Cluster;
use crate::kubernetes::objects::node::{self, Change, Slots};

/// How long a request is retried, and how long conflicts with the changes of others are.
const RETRY_TIMEOUT: Duration = Duration::from_secs(30);
/// The same for a periodic run, which the next one follows.
const PERIODIC_RETRY_TIMEOUT: Duration = Duration::from_secs(5);
/// The pauses after conflicts.
const PAUSES: RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_secs(1);
/// The pool whose CPU lists are the slots of the legacy resource.
const DATAPLANE: &str = "dataplane";

/// Advertises this node, once or periodically.
pub(super) fn run(args: &cli::Discover) -> Result<ExitCode, Error> {
    let node = node_name(&args.node)?;
    let is_periodic = args.interval != Repeat::Once;
    let retry_timeout = if is_periodic { PERIODIC_RETRY_TIMEOUT } else { RETRY_TIMEOUT };
    let mut cluster = None;
    interval::run(args.interval, || {
        let pools = ConfDir::open(&args.dir.conf_dir)?.find()?.warned();
        let slots = slots(&pools, args.resource_name, &offline()?)?;
        let cluster = connected(&mut cluster, retry_timeout)?;
        let steps: [&Step<'_>; 2] =
            [&|node| node::capacity(node, &slots), &|node| node::label_and_taint(node, true)];
        if args.dry_run {
            return show(cluster, &node, &steps);
        }
        if apply(cluster, &node, &steps, retry_timeout)? {
            log::info!("Node {node} advertises {}.", listed(&slots));
        } else {
            log::debug!("Node {node} is up to date.");
        }
        Ok(())
    })
}

/// Removes from the node what discover has set.
pub(super) fn unadvertise(node: &str) -> Result<(), Error> {
    let cluster = Cluster::find(RETRY_TIMEOUT)?;
    let none = Slots::new();
    let steps: [&Step<'_>; 2] =
        [&|node| node::capacity(node, &none), &|node| node::label_and_taint(node, false)];
    if apply(&cluster, node, &steps, RETRY_TIMEOUT)? {
        log::info!("Removed the slots, the label and the taint of node {node}.");
    }
    Ok(())
}

/// Returns the CPUs of this machine that are offline.
fn offline() -> Result<CpuSet, Error> {
    let machine = Host::from_env().topology()?;
    Ok(machine.cpus().difference(&machine.online()))
}

/// Returns the slots that these pools offer: the lists that can be claimed. These are not draining, and unless the pool is
/// partial, they have no offline CPU.
fn slots(pools: &Pools, name: ResourceName, offline: &CpuSet) -> Result<Slots, Error> {
    let can_serve = |pool: &Pool, list: &String| {
        confdir::parse_cpu_list(list).is_none_or(|cpus| {
            if pool.partial { !cpus.is_subset(offline) } else { cpus.is_disjoint(offline) }
        })
    };
    let counts = |pool: &Pool, list: &String| can_serve(pool, list) && !pool.draining.contains(list);
    let count = |pool: &Pool| pool.lists.keys().filter(|list| counts(pool, list)).count();
    let slots: Slots = match name {
        ResourceName::Opaque => {
            let dataplane = pools.get(DATAPLANE).into_iter();
            dataplane.map(|pool| (node::OPAQUE.to_owned(), count(pool))).collect()
        }
        ResourceName::Extended => {
            let exclusive = pools.iter().filter(|(_, pool)| pool.exclusive);
            exclusive.map(|(name, pool)| (node::extended(name), count(pool))).collect()
        }
    };
    if slots.values().all(|&count| count == 0) {
        match pools.contains_key(DATAPLANE) {
            false => bail!("Dataplane pool does not exist; create it: kcm init"),
            true => bail!("No CPU list in dataplane pool; create one: mkdir pools/{DATAPLANE}/<cpulist>"),
        }
    }
    Ok(slots.into_iter().filter(|(_, count)| *count > 0).collect())
}

/// Formats slots for a message: `4 kcm.intel.com/dataplane, 2 kcm.intel.com/fast`.
fn listed(slots: &Slots) -> String {
    slots.iter().map(|(name, count)| format!("{count} {name}")).collect::<Vec<_>>().join(", ")
}

/// One thing that a node should have: the request that is missing, given the node as it is.
type Step<'a> = dyn Fn(&Node) -> Change + 'a;

/// Sends what each step misses, until none misses anything. Returns whether anything was sent.
fn apply(cluster: &Cluster, name: &str, steps: &[&Step<'_>], retry_timeout: Duration) -> Result<bool, Error> {
    let deadline = Instant::now() + retry_timeout;
    let mut node = cluster.send(&node::get(name)?)?;
    let mut has_changed = false;
    for step in steps {
        let mut backoff = Backoff::new(PAUSES);
        while let Some(request) = step(&node)? {
            match cluster.send(&request) {
                Ok(changed) => {
                    node = changed;
                    has_changed = true;
                    if step(&node)?.is_some() {
                        bail!(
                            "{}: the server accepted the change and did not make it; does a webhook undo it?",
                            request.subject()
                        );
                    }
                }
                // Somebody else changed the node first. That change is kept.
                Err(failure) if failure.code() == Some(409) && Instant::now() < deadline => {
                    log::debug!("{failure}; reading the node again");
                    std::thread::sleep(backoff.next());
                    node = cluster.send(&node::get(name)?)?;
                }
                Err(failure) => return Err(failure.into()),
            }
        }
    }
    Ok(has_changed)
}

/// Prints what would be sent. The second step is shown for the node as it is before the first one.
fn show(cluster: &Cluster, name: &str, steps: &[&Step<'_>]) -> Result<(), Error> {
    let node = cluster.send(&node::get(name)?)?;
    let mut requests = Vec::new();
    for step in steps {
        requests.extend(step(&node)?.map(|request| request.shown()));
    }
    if requests.is_empty() {
        log::info!("Node {name} is up to date.");
    }
    output::print(&requests.join("---\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::confdir::Pool;

    fn pools(pools: &[(&str, bool, usize)]) -> Pools {
        let pool = |&(name, exclusive, lists): &(&str, bool, usize)| {
            let lists = (0..lists).map(|list| (list.to_string(), Vec::new())).collect();
            (name.to_owned(), Pool { exclusive, lists, ..Pool::default() })
        };
        pools.iter().map(pool).collect()
    }

    #[test]
    fn slots_are_named_by_resource() {
        let all =
            pools(&[("dataplane", true, 4), ("fast", true, 2), ("empty", true, 0), ("infra", false, 1)]);
        assert_eq!(
            listed(&slots(&all, ResourceName::Opaque, &CpuSet::new()).unwrap()),
            "4 pod.alpha.kubernetes.io/opaque-int-resource-kcm"
        );
        assert_eq!(
            listed(&slots(&all, ResourceName::Extended, &CpuSet::new()).unwrap()),
            "4 kcm.intel.com/dataplane, 2 kcm.intel.com/fast"
        );
        let offline = "1,9".parse().unwrap();
        assert_eq!(
            listed(&slots(&all, ResourceName::Extended, &offline).unwrap()),
            "3 kcm.intel.com/dataplane, 1 kcm.intel.com/fast",
            "a list with an offline CPU cannot be claimed"
        );
        let mut partial = pools(&[("dataplane", true, 1)]);
        let pool = partial.get_mut("dataplane").unwrap();
        pool.partial = true;
        pool.lists.insert("8-9".into(), Vec::new());
        partial.get_mut("dataplane").unwrap().draining.insert("8-9".into());
        let drained = slots(&partial, ResourceName::Extended, &CpuSet::new()).unwrap();
        assert_eq!(listed(&drained), "1 kcm.intel.com/dataplane");
        partial.get_mut("dataplane").unwrap().draining.clear();
        for (offline, count) in [("8", 2), ("8-9", 1)] {
            let slots = slots(&partial, ResourceName::Extended, &offline.parse().unwrap()).unwrap();
            assert_eq!(listed(&slots), format!("{count} kcm.intel.com/dataplane"));
        }
    }

    #[test]
    fn without_cpu_lists_there_are_no_slots() {
        for name in [ResourceName::Opaque, ResourceName::Extended] {
            let error = |all: &Pools| slots(all, name, &CpuSet::new()).unwrap_err().to_string();
            assert!(error(&pools(&[("infra", false, 1)])).starts_with("Dataplane pool does not exist"));
            assert!(error(&pools(&[("dataplane", true, 0)])).starts_with("No CPU list in dataplane pool"));
        }
    }
}
