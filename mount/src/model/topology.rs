//! The machine: sockets, cores, CPUs, NUMA nodes, and which CPUs the kernel isolates.
//!
//! Owns: how CPUs belong together, and the JSON of it. Must not know: where it was read.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::cpuset::{CpuId, CpuSet};

/// One CPU and where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    /// Its number.
    pub id: CpuId,
    /// Its core, numbered over the whole machine; an offline CPU's is not known.
    pub core: Option<u32>,
    /// Its socket.
    pub socket: Option<u32>,
    /// Its NUMA node, where the machine has them.
    pub node: Option<u32>,
    /// Whether it can be used now.
    pub online: bool,
    /// Whether the kernel keeps other tasks off it (`isolcpus=`).
    pub isolated: bool,
}

/// A core: the CPUs that share it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Core {
    /// Its number.
    pub id: u32,
    /// Its CPUs.
    pub cpus: CpuSet,
}

/// All CPUs of a machine, online or not.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// Ascending.
    cpus: Vec<Cpu>,
}

impl Topology {
    /// A machine with these CPUs.
    #[must_use]
    pub fn new(mut cpus: Vec<Cpu>) -> Self {
        cpus.sort_by_key(|cpu| cpu.id);
        cpus.dedup_by_key(|cpu| cpu.id);
        Self { cpus }
    }

    /// Each CPU, ascending.
    #[must_use]
    pub fn all(&self) -> &[Cpu] {
        &self.cpus
    }

    /// All CPUs, offline ones too.
    #[must_use]
    pub fn cpus(&self) -> CpuSet {
        self.cpus.iter().map(|cpu| cpu.id).collect()
    }

    /// The CPUs that can be used now.
    #[must_use]
    pub fn online(&self) -> CpuSet {
        self.cpus.iter().filter(|cpu| cpu.online).map(|cpu| cpu.id).collect()
    }

    /// The CPUs that the kernel isolates.
    #[must_use]
    pub fn isolated(&self) -> CpuSet {
        self.cpus.iter().filter(|cpu| cpu.isolated).map(|cpu| cpu.id).collect()
    }

    /// The cores with online CPUs: by socket, then by number.
    #[must_use]
    pub fn cores(&self) -> Vec<Core> {
        self.sockets().into_values().flatten().collect()
    }

    /// The cores of each socket, by number.
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

    /// `{"sockets": {"0": {"id": 0, "cores": [{"id": 0, "cpus": [{"id": 0, "isolated": false}]}]}}}`: the shape
    /// of 2017.
    #[must_use]
    pub fn report(&self) -> Value {
        self.json(|cpu| json!({ "id": cpu.id.get(), "isolated": cpu.isolated }))
    }

    /// The same, with the NUMA node of each CPU, and the offline CPUs as a list beside.
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
