//! The samples that the process that looks passes to the process that shows them.
//!
//! Owns the types. Does not know how they are found out or shown.

use std::collections::BTreeMap;

use kcm_mount::model::cpuset::CpuSet;
use kcm_mount::model::topology::Cpu;
use serde::{Deserialize, Serialize};

/// The answer to one request, as one line of JSON.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    Sample(Box<Sample>),
    /// Why there is none, and what to do.
    Error(String),
}

/// The machine and its pools at one moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Sample {
    /// All CPUs, ascending.
    pub(super) cpus: Vec<Cpu>,
    /// The lists of all pools, by the names of the pools.
    pub(super) lists: Vec<List>,
    /// The share of the time in which each CPU was busy, from 0 to 1. Empty in the first sample.
    pub(super) busy: BTreeMap<u32, f64>,
    /// The use of the CPUs of lists by processes. Empty in the first sample.
    pub(super) uses: Vec<Use>,
    pub(super) intruders: Vec<Intruder>,
    pub(super) strays: Vec<Stray>,
}

/// A CPU list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct List {
    /// The name of its pool, safe to show.
    pub(super) pool: String,
    /// Its name, safe to show.
    pub(super) name: String,
    pub(super) cpus: CpuSet,
    pub(super) exclusive: bool,
    pub(super) tasks: Vec<Task>,
}

/// A task on a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Task {
    pub(super) pid: u32,
    /// The name of its program, safe to show; `None` if it has exited.
    pub(super) program: Option<String>,
    /// For how many seconds it has had the list.
    pub(super) held: u64,
    /// Whether it had the list already when it was first seen, and the beginning is not known.
    pub(super) at_least: bool,
}

/// The use of a CPU by a process since the last sample.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Use {
    pub(super) cpu: u32,
    pub(super) pid: u32,
    pub(super) program: String,
    /// From 0 to 1.
    pub(super) share: f64,
    /// Whether the process, or an ancestor, is a task of the list with the CPU.
    pub(super) own: bool,
}

/// A process that is pinned within an exclusive list without a claim.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Intruder {
    pub(super) pid: u32,
    pub(super) program: String,
    /// The CPUs to which it is pinned.
    pub(super) cpus: CpuSet,
}

/// A task with a thread that may run outside its list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Stray {
    /// The names of pool and list, as in [`List`].
    pub(super) pool: String,
    pub(super) list: String,
    /// The thread.
    pub(super) tid: u32,
    /// The CPUs on which it may run.
    pub(super) cpus: CpuSet,
}
