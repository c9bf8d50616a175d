//! The CPUs in the shape of the machine: by socket, NUMA node and core, so that thread siblings stand together.
//!
//! Owns this order, and which list has a CPU. Does not know how it is shown.

use kcm_mount::model::cpuset::CpuId;
use kcm_mount::model::topology::{Cpu, Topology};

use crate::confdir::{self, Pool, Pools};

/// The CPUs of a core. Those that are offline have no core; each one is a group of its own.
pub(super) type Core<'a> = Vec<&'a Cpu>;

/// The cores of a NUMA node, or the part of them that is in one socket.
pub(super) struct Node<'a> {
    /// `None` if the machine has no NUMA nodes.
    pub(super) id: Option<u32>,
    pub(super) cores: Vec<Core<'a>>,
}

/// A socket.
pub(super) struct Socket<'a> {
    /// `None` for the CPUs that are offline: the kernel does not say where they are.
    pub(super) id: Option<u32>,
    pub(super) nodes: Vec<Node<'a>>,
}

/// Returns the CPUs for which `is_selected` is true. Those that are offline are last.
pub(super) fn sockets(machine: &Topology, is_selected: impl Fn(CpuId) -> bool) -> Vec<Socket<'_>> {
    let mut cpus: Vec<&Cpu> = machine.all().iter().filter(|cpu| is_selected(cpu.id)).collect();
    let place = |cpu: &Cpu| {
        let last = |number: Option<u32>| number.unwrap_or(u32::MAX);
        (last(cpu.socket), last(cpu.node), last(cpu.core), cpu.id)
    };
    cpus.sort_by_key(|cpu| place(cpu));
    let nodes = |cpus: &[&'_ Cpu]| cpus.first().map(|cpu| cpu.node);
    let by_socket = cpus.chunk_by(|a, b| a.socket == b.socket).map(|cpus| {
        let by_node = cpus.chunk_by(|a, b| a.node == b.node).map(|cpus| {
            let cores = cpus.chunk_by(|a, b| a.core.is_some() && a.core == b.core);
            Node { id: nodes(cpus).flatten(), cores: cores.map(<[&Cpu]>::to_vec).collect() }
        });
        Socket { id: cpus.first().and_then(|cpu| cpu.socket), nodes: by_node.collect() }
    });
    by_socket.collect()
}

/// A list with its pool.
#[derive(Clone, Copy)]
pub(super) struct List<'a> {
    pub(super) pool_name: &'a str,
    pub(super) pool: &'a Pool,
    pub(super) name: &'a str,
    pub(super) tasks: &'a [u32],
}

/// Returns the list that has `cpu`.
pub(super) fn list_with(pools: &Pools, cpu: CpuId) -> Option<List<'_>> {
    pools.iter().find_map(|(pool_name, pool)| {
        let has_cpu = |list: &str| confdir::parse_cpu_list(list).is_some_and(|cpus| cpus.contains(cpu));
        let (name, tasks) = pool.lists.iter().find(|(list, _)| has_cpu(list))?;
        Some(List { pool_name, pool, name, tasks })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu(id: u32, place: Option<(u32, u32, u32)>) -> Cpu {
        Cpu {
            id: CpuId::new(id).unwrap(),
            socket: place.map(|(socket, _, _)| socket),
            node: place.map(|(_, node, _)| node).or(Some(0)),
            core: place.map(|(_, _, core)| core),
            online: place.is_some(),
            isolated: false,
        }
    }

    #[test]
    fn siblings_stand_together_and_offline_cpus_are_last() {
        let machine = Topology::new(vec![
            cpu(0, Some((0, 0, 0))),
            cpu(1, Some((1, 1, 1))),
            cpu(2, None),
            cpu(3, Some((0, 0, 2))),
            cpu(4, Some((0, 0, 0))),
            cpu(5, None),
            cpu(6, Some((0, 2, 3))),
        ]);
        let shape = |is_selected: fn(CpuId) -> bool| -> Vec<_> {
            let sockets = sockets(&machine, is_selected).into_iter();
            let ids = |cores: Vec<Core<'_>>| -> Vec<Vec<u32>> {
                cores.iter().map(|core| core.iter().map(|cpu| cpu.id.get()).collect()).collect()
            };
            let nodes = |nodes: Vec<Node<'_>>| nodes.into_iter().map(|it| (it.id, ids(it.cores))).collect();
            sockets.map(|it| (it.id, nodes(it.nodes))).collect::<Vec<(_, Vec<_>)>>()
        };
        let expected = [
            (Some(0), vec![(Some(0), vec![vec![0, 4], vec![3]]), (Some(2), vec![vec![6]])]),
            (Some(1), vec![(Some(1), vec![vec![1]])]),
            (None, vec![(Some(0), vec![vec![2], vec![5]])]),
        ];
        assert_eq!(shape(|_| true), expected);
        assert_eq!(shape(|id| id.get() == 4), [(Some(0), vec![(Some(0), vec![vec![4]])])]);
    }

    #[test]
    fn a_cpu_is_found_in_its_list() {
        let pool = |lists: &[&str]| Pool {
            exclusive: true,
            lists: lists.iter().map(|list| ((*list).to_owned(), Vec::new())).collect(),
            ..Pool::default()
        };
        let pools: Pools =
            [("a".to_owned(), pool(&["8", "x"])), ("dataplane".to_owned(), pool(&["0-1"]))].into();
        let list =
            |cpu: u32| list_with(&pools, CpuId::new(cpu).unwrap()).map(|list| (list.pool_name, list.name));
        assert_eq!(list(1), Some(("dataplane", "0-1")));
        assert_eq!(list(2), None);
    }
}
