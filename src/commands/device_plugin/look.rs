//! The process that looks: which lists there are, and which of them the kubelet may allocate.
//!
//! Owns the health of a list. It may hang with the mount; the process that serves does not. Does not know the kubelet.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Error};
use kcm_mount::model::document::Document;
use kcm_mount::model::topology::Topology;
use nix::poll::PollTimeout;
use serde::{Deserialize, Serialize};

use crate::commands::common::follow::{Follower, follow};
use crate::commands::common::output::{display_error, print};
use crate::confdir::{self, ConfDir, Pools};
use crate::host::{self, Host};

/// How often what poll(2) does not report is looked at: draining lists, tasks, and offline CPUs.
const INTERVAL: Duration = Duration::from_secs(1);
/// This many times as long as looking takes, nothing is looked at, so that it needs at most a twentieth of a CPU.
const REST: u32 = 20;
/// The longest time without a line.
pub(super) const LONGEST: Duration = Duration::from_secs(3);

/// The exclusive pools by name, each with its lists in ascending order.
pub(super) type Offer = BTreeMap<String, Vec<List>>;

/// A CPU list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct List {
    pub(super) name: String,
    pub(super) is_healthy: bool,
    /// The NUMA nodes of its CPUs.
    pub(super) nodes: Vec<u32>,
}

/// An observation, as one line of JSON.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Seen {
    Offer(Offer),
    /// No daemon answers.
    Away,
    /// Nothing can be seen, and why.
    Failed(String),
}

impl Seen {
    fn print(&self) -> Result<(), Error> {
        print(&format!("{}\n", serde_json::to_string(self)?))
    }
}

/// Prints what there is at first, after each change, and periodically. Ends when nobody reads it.
pub(super) fn run(conf_dir: &Path) -> Result<ExitCode, Error> {
    let mut looker = Looker { host: Host::with_processes()? };
    loop {
        let error = match follow(conf_dir, &mut looker) {
            Ok(never) => match never {},
            Err(error) => error,
        };
        let Some(line) = display_error(&error) else { return Ok(ExitCode::SUCCESS) };
        Seen::Failed(line).print()?;
        std::thread::sleep(INTERVAL);
    }
}

struct Looker {
    host: Host,
}

impl Follower for Looker {
    fn changed(&mut self, dir: &ConfDir, _pools: Document) -> Result<PollTimeout, Error> {
        let begun = Instant::now();
        let found = dir.find()?.pools;
        let topology = host::current_topology()?;
        Seen::Offer(offer(&found, &topology, |pid| self.host.container_of(pid).is_some())).print()?;
        let rest = (begun.elapsed() * REST).clamp(INTERVAL, LONGEST);
        PollTimeout::try_from(rest).context("it takes too long to read the pools")
    }

    fn away(&mut self) -> Result<(), Error> {
        Seen::Away.print()
    }
}

/// Returns what these pools offer.
///
/// A list that a pod holds is healthy whatever else is true of it: the kubelet has allocated it, and counts it as used. Without it,
/// the node would have one list less than there is, and a kubelet that restarts might refuse the pod. A list that somebody else
/// holds is not: the kubelet does not know that it is used.
fn offer(pools: &Pools, topology: &Topology, is_of_pod: impl Fn(u32) -> bool) -> Offer {
    let offline = topology.cpus().difference(&topology.online());
    let offered = pools.iter().filter(|(_, pool)| pool.is_for_pods());
    offered
        .map(|(name, pool)| {
            let list = |(list, tasks): (&str, &[u32])| List {
                name: list.to_owned(),
                is_healthy: match tasks {
                    [] => pool.can_serve(list, &offline),
                    tasks => tasks.iter().all(|&pid| is_of_pod(pid)),
                },
                nodes: nodes(list, topology),
            };
            (name.clone(), pool.lists_by_cpu().into_iter().map(list).collect())
        })
        .collect()
}

/// Returns the NUMA nodes of a list, ascending.
fn nodes(list: &str, topology: &Topology) -> Vec<u32> {
    let Some(cpus) = confdir::parse_cpu_list(list) else { return Vec::new() };
    let of_list = topology.all().iter().filter(|cpu| cpus.contains(cpu.id));
    let mut nodes: Vec<u32> = of_list.filter_map(|cpu| cpu.node).collect();
    nodes.sort_unstable();
    nodes.dedup();
    nodes
}

#[cfg(test)]
mod tests {
    use kcm_mount::model::cpuset::CpuId;
    use kcm_mount::model::topology::Cpu;

    use super::*;
    use crate::confdir::Pool;

    /// A machine with two NUMA nodes of two CPUs each.
    fn machine(offline: &[u32]) -> Topology {
        let cpu = |id: u32| Cpu {
            id: CpuId::new(id).unwrap(),
            core: Some(id),
            socket: Some(id / 2),
            node: Some(id / 2),
            online: !offline.contains(&id),
            isolated: false,
        };
        Topology::new((0..4).map(cpu).collect())
    }

    /// Lists with their tasks, those of the pod with the PIDs from 100 on; the healthy ones.
    fn healthy(lists: &[(&str, &[u32])], change: impl Fn(&mut Pool), offline: &[u32]) -> Vec<String> {
        let lists = lists.iter().map(|(list, tasks)| ((*list).to_owned(), tasks.to_vec())).collect();
        let mut pool = Pool { exclusive: true, lists, ..Pool::default() };
        change(&mut pool);
        let transient = Pool { exclusive: true, transient: true, ..Pool::default() };
        let others = [("infra", Pool::default()), ("shield", transient)];
        let pools =
            others.into_iter().chain([("dp", pool)]).map(|(name, pool)| (name.to_owned(), pool)).collect();
        let offer = offer(&pools, &machine(offline), |pid| pid >= 100);
        assert_eq!(offer.keys().collect::<Vec<_>>(), ["dp"], "shared and transient pools are no resources");
        offer["dp"].iter().filter(|list| list.is_healthy).map(|list| list.name.clone()).collect()
    }

    #[test]
    fn a_list_is_healthy_if_it_can_be_claimed_or_a_pod_has_it() {
        let lists: &[(&str, &[u32])] = &[("0", &[]), ("1", &[7]), ("2", &[100]), ("3", &[])];
        assert_eq!(healthy(lists, |_| (), &[]), ["0", "2", "3"]);
        assert_eq!(healthy(lists, |_| (), &[0, 2]), ["2", "3"]);
        let drain = |pool: &mut Pool| pool.draining.extend(["2".to_owned(), "3".to_owned()]);
        assert_eq!(healthy(lists, drain, &[]), ["0", "2"]);
        let partial = |pool: &mut Pool| pool.partial = true;
        assert_eq!(healthy(&[("0-1", &[]), ("2-3", &[])], partial, &[0, 2, 3]), ["0-1"]);
    }

    #[test]
    fn a_list_is_on_the_numa_nodes_of_its_cpus() {
        for (list, expected) in [("0", vec![0]), ("1,2", vec![0, 1]), ("2-3", vec![1]), ("7", vec![])] {
            assert_eq!(nodes(list, &machine(&[])), expected, "{list}");
        }
    }
}
