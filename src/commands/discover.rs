//! `kcm discover`: slots, label and taint of this node, and taking them back.
//!
//! Owns: what is advertised, and in which order. Must not know: how a request is sent.

use std::ops::RangeInclusive;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Error, bail};
use serde_json::Value;

use super::common::cluster::connected;
use super::common::node::node_name;
use super::common::{interval, output};
use crate::backoff::Backoff;
use crate::cli::{self, Repeat, ResourceName};
use crate::confdir::{ConfDir, Pools};
use crate::kubernetes::Cluster;
use crate::kubernetes::objects::Request;
use crate::kubernetes::objects::node::{self, Slots};

/// How long a request is tried, and how long somebody else's changes are followed.
const PATIENCE: Duration = Duration::from_secs(30);
/// The same for one beat of many: the next one comes.
const PATIENCE_OF_A_BEAT: Duration = Duration::from_secs(5);
/// The pauses after conflicts.
const PAUSES: RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_secs(1);
/// The pool whose slots the document sells.
const DATAPLANE: &str = "dataplane";

/// Advertises this node, once or on a beat.
pub(super) fn run(args: &cli::Discover) -> Result<ExitCode, Error> {
    let node = node_name(&args.node)?;
    let patience = if args.interval == Repeat::Once { PATIENCE } else { PATIENCE_OF_A_BEAT };
    let mut cluster = None;
    interval::run(args.interval, || {
        let pools = ConfDir::open(&args.dir.conf_dir)?.pools()?;
        let slots = slots(&pools, args.resource_name)?;
        let cluster = connected(&mut cluster, patience)?;
        let steps: [&Step<'_>; 2] = [&|node| node::capacity(node, &slots), &|node| node::marks(node, true)];
        if args.dry_run {
            return show(cluster, &node, &steps);
        }
        if carry_out(cluster, &node, &steps, patience)? {
            log::info!("Node {node} advertises {}.", told(&slots));
        } else {
            log::debug!("Node {node} is as it should be.");
        }
        Ok(())
    })
}

/// Takes back what discover has set on the node.
pub(super) fn withdraw(node: &str) -> Result<(), Error> {
    let cluster = Cluster::find(PATIENCE)?;
    let none = Slots::new();
    let steps: [&Step<'_>; 2] = [&|node| node::capacity(node, &none), &|node| node::marks(node, false)];
    if carry_out(&cluster, node, &steps, PATIENCE)? {
        log::info!("Node {node} advertises nothing of ours any more.");
    }
    Ok(())
}

/// What this node has to sell.
fn slots(pools: &Pools, name: ResourceName) -> Result<Slots, Error> {
    let slots: Slots = match name {
        ResourceName::Opaque => {
            let dataplane = pools.get(DATAPLANE).into_iter();
            dataplane.map(|pool| (node::OPAQUE.to_owned(), pool.lists.len())).collect()
        }
        ResourceName::Extended => {
            let exclusive = pools.iter().filter(|(_, pool)| pool.exclusive);
            exclusive.map(|(name, pool)| (node::extended(name), pool.lists.len())).collect()
        }
    };
    if slots.values().all(|&count| count == 0) {
        match pools.contains_key(DATAPLANE) {
            false => bail!("Dataplane pool does not exist; make it: kcm init"),
            true => bail!("No CPU list in dataplane pool; make one: mkdir pools/{DATAPLANE}/<cpulist>"),
        }
    }
    Ok(slots.into_iter().filter(|(_, count)| *count > 0).collect())
}

fn told(slots: &Slots) -> String {
    slots.iter().map(|(name, count)| format!("{count} {name}")).collect::<Vec<_>>().join(", ")
}

/// What is missing of one thing on a node, as it is.
type Step<'a> = dyn Fn(&Value) -> Option<Request> + 'a;

/// Brings the node to where no step has anything left to do. Says whether anything was.
fn carry_out(cluster: &Cluster, name: &str, steps: &[&Step<'_>], patience: Duration) -> Result<bool, Error> {
    let deadline = Instant::now() + patience;
    let mut node = cluster.send(&node::get(name))?;
    let mut has_changed = false;
    for step in steps {
        let mut backoff = Backoff::new(PAUSES);
        while let Some(request) = step(&node) {
            match cluster.send(&request) {
                Ok(changed) => {
                    node = changed;
                    has_changed = true;
                    if step(&node).is_some() {
                        bail!(
                            "{}: the server took the change and did not make it; is a webhook in between?",
                            request.subject
                        );
                    }
                }
                // Somebody else was faster. What they did is kept.
                Err(failure) if failure.code() == Some(409) && Instant::now() < deadline => {
                    std::thread::sleep(backoff.next());
                    node = cluster.send(&node::get(name))?;
                }
                Err(failure) => return Err(failure.into()),
            }
        }
    }
    Ok(has_changed)
}

fn show(cluster: &Cluster, name: &str, steps: &[&Step<'_>]) -> Result<(), Error> {
    let node = cluster.send(&node::get(name))?;
    let requests: Vec<String> =
        steps.iter().filter_map(|step| step(&node)).map(|request| request.shown()).collect();
    if requests.is_empty() {
        log::info!("Node {name} is as it should be.");
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
            (name.to_owned(), Pool { exclusive, lists })
        };
        pools.iter().map(pool).collect()
    }

    #[test]
    fn what_is_sold() {
        let all =
            pools(&[("dataplane", true, 4), ("fast", true, 2), ("empty", true, 0), ("infra", false, 1)]);
        assert_eq!(
            told(&slots(&all, ResourceName::Opaque).unwrap()),
            "4 pod.alpha.kubernetes.io/opaque-int-resource-kcm"
        );
        assert_eq!(
            told(&slots(&all, ResourceName::Extended).unwrap()),
            "4 kcm.intel.com/dataplane, 2 kcm.intel.com/fast"
        );
    }

    #[test]
    fn nothing_to_sell_is_what_2017_says() {
        for name in [ResourceName::Opaque, ResourceName::Extended] {
            let error = |all: &Pools| slots(all, name).unwrap_err().to_string();
            assert!(error(&pools(&[("infra", false, 1)])).starts_with("Dataplane pool does not exist"));
            assert!(error(&pools(&[("dataplane", true, 0)])).starts_with("No CPU list in dataplane pool"));
        }
    }
}
