//! The machine's topology: sockets, cores, CPUs, NUMA nodes, and the CPUs that the kernel isolates.
//!
//! Owns how CPUs belong together, and the JSON form. Does not know how the topology is read.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::cpuset::{CpuId, CpuSet};

/// One CPU and its place in the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    /// The number of the CPU.
    pub id: CpuId,
    /// The number of its core, unique in the machine; `None` for an offline CPU.
    pub core: Option<u32>,
    /// The number of its socket; `None` for an offline CPU.
    pub socket: Option<u32>,
    /// The number of its NUMA node, if the machine has NUMA nodes.
    pub node: Option<u32>,
    /// Whether the CPU is online.
    pub online: bool,
    /// Whether the kernel keeps other tasks off the CPU (`isolcpus=`).
    pub isolated: bool,
}

/// A core: the CPUs that share it (thread siblings).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Core {
    /// The number of the core.
    pub id: u32,
    /// The CPUs of the core.
    pub cpus: CpuSet,
}

/// All CPUs of a machine, online or not.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// Ascending by number.
    cpus: Vec<Cpu>,
}

impl Topology {
    /// Creates the topology of a machine with these CPUs.
    #[must_use]
    pub fn new(mut cpus: Vec<Cpu>) -> Self {
        cpus.sort_by_key(|cpu| cpu.id);
        cpus.dedup_by_key(|cpu| cpu.id);
        Self { cpus }
    }

    /// Returns all CPUs, ascending.
    #[must_use]
    pub fn all(&self) -> &[Cpu] {
        &self.cpus
    }

    /// Returns the numbers of all CPUs, including offline ones.
    #[must_use]
    pub fn cpus(&self) -> CpuSet {
        self.cpus.iter().map(|cpu| cpu.id).collect()
    }

    /// Returns the online CPUs.
    #[must_use]
    pub fn online(&self) -> CpuSet {
        self.cpus.iter().filter(|cpu| cpu.online).map(|cpu| cpu.id).collect()
    }

    /// Returns the CPUs that the kernel isolates.
    #[must_use]
    pub fn isolated(&self) -> CpuSet {
        self.cpus.iter().filter(|cpu| cpu.isolated).map(|cpu| cpu.id).collect()
    }

    /// Returns whether a core with these online CPUs may have offline ones, too: it has fewer CPUs than other cores. The kernel
    /// does not tell to which core an offline CPU belongs.
    #[must_use]
    pub fn may_be_a_part_of_a_core(&self, cpus: &CpuSet) -> bool {
        let most = self.cores().iter().map(|core| core.cpus.iter().count()).max().unwrap_or(0);
        cpus.iter().count() < most && self.online() != self.cpus()
    }

    /// Returns the cores that have online CPUs, by socket, then by number.
    #[must_use]
    pub fn cores(&self) -> Vec<Core> {
        self.sockets().into_values().flatten().collect()
    }

    /// Returns the cores of each socket, by number.
    #[must_use]
    pub fn sockets(&self) -> BTreeMap<u32, Vec<Core>> {
        let mut sockets: BTreeMap<u32, BTreeMap<u32, CpuSet>> = BTreeMap::new();
        for cpu in self.cpus.iter().filter(|cpu| cpu.online) {
            let (socket, core) = (cpu.socket.unwrap_or(0), cpu.core.unwrap_or(0));
            sockets.entry(socket).or_default().entry(core).or_default().insert(cpu.id);
        }
        let cores =
            |cores: BTreeMap<u32, CpuSet>| cores.into_iter().map(|(id, cpus)| Core { id, cpus }).collect();
        sockets.into_iter().map(|(id, of_socket)| (id, cores(of_socket))).collect()
    }

    /// Returns the topology in the JSON form of the legacy kcm: `{"sockets": {"0": {"id": 0, "cores": [{"id": 0,
    /// "cpus": [{"id": 0, "isolated": false}]}]}}}`.
    #[must_use]
    pub fn report(&self) -> Value {
        self.json(|cpu| json!({ "id": cpu.id.get(), "isolated": cpu.isolated }))
    }

    /// Returns the JSON form with the NUMA node of each CPU, and the lists of online and offline CPUs.
    #[must_use]
    pub fn to_json(&self) -> String {
        let mut report =
            self.json(|cpu| json!({ "id": cpu.id.get(), "isolated": cpu.isolated, "node": cpu.node }));
        if let Some(fields) = report.as_object_mut() {
            fields.insert("online".into(), json!(self.online().to_string()));
            fields.insert("offline".into(), json!(self.cpus().difference(&self.online()).to_string()));
        }
        report.to_string()
    }

    fn json(&self, show: impl Fn(&Cpu) -> Value) -> Value {
        let core = |core: Core| {
            let cpus: Vec<Value> =
                self.cpus.iter().filter(|cpu| core.cpus.contains(cpu.id)).map(&show).collect();
            json!({ "id": core.id, "cpus": cpus })
        };
        let socket = |(id, cores): (u32, Vec<Core>)| {
            let cores: Vec<Value> = cores.into_iter().map(core).collect();
            (id.to_string(), json!({ "id": id, "cores": cores }))
        };
        let sockets: serde_json::Map<String, Value> = self.sockets().into_iter().map(socket).collect();
        json!({ "sockets": sockets })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_core_with_fewer_cpus_may_be_half_of_one_if_a_cpu_is_offline() {
        let cpu = |id: u32, core: Option<u32>| Cpu {
            id: CpuId::new(id).unwrap(),
            core,
            socket: core.map(|_| 0),
            node: None,
            online: core.is_some(),
            isolated: false,
        };
        let mut cpus = vec![cpu(0, Some(0)), cpu(1, Some(1)), cpu(2, Some(0))];
        let is_part = |cpus: &[Cpu], list: &str| {
            Topology::new(cpus.to_vec()).may_be_a_part_of_a_core(&list.parse().unwrap())
        };
        assert!(!is_part(&cpus, "1"), "a core of a hybrid processor");
        cpus.push(cpu(3, None));
        assert!(is_part(&cpus, "1") && !is_part(&cpus, "0,2"));
    }
}
