//! Which part of the directory `kcm describe` shows: `--pool`, `--cpu` and `--pid`.
//!
//! Owns what the flags select, and the messages if they select nothing. Does not know the formats.

use anyhow::{Error, anyhow, bail};
use kcm_mount::model::cpuset::CpuSet;

use super::{shown, task};
use crate::cli;
use crate::confdir::{self, Pools};
use crate::host::Host;

/// The selected part of a directory.
#[derive(Debug)]
pub(super) struct Selected {
    /// The selected pools, with their selected lists.
    pub(super) pools: Pools,
    /// The selected CPUs; `None` for all CPUs of the machine.
    pub(super) cpus: Option<CpuSet>,
}

impl Selected {
    /// Selects the lists that all flags of the command line select.
    ///
    /// # Errors
    /// There is no such pool or CPU, or the PID is on no list.
    pub(super) fn new(mut pools: Pools, args: &cli::Describe, host: &Host) -> Result<Self, Error> {
        if let Some(unknown) = args.pool.iter().find(|name| !pools.contains_key(*name)) {
            let names: Vec<String> = pools.keys().map(|name| shown(name)).collect();
            let existing = if names.is_empty() { "no pools".to_owned() } else { names.join(", ") };
            bail!("{}: no such pool; there is: {existing}", shown(unknown));
        }
        if let Some(cpus) = &args.cpu {
            let known = host.topology()?.cpus();
            let unknown = cpus.difference(&known);
            if !unknown.is_empty() {
                bail!("this machine has no CPU {unknown}; it has {known}");
            }
        }
        let pid = args.pid.map(|pid| on_a_list(pid, &pools, host)).transpose()?;
        if !args.pool.is_empty() {
            pools.retain(|name, _| args.pool.contains(name));
        }
        let cpus = |list: &str| confdir::parse_cpu_list(list).unwrap_or_default();
        if args.cpu.is_some() || pid.is_some() {
            for pool in pools.values_mut() {
                pool.lists.retain(|list, tasks| {
                    let has_cpu = |wanted: &CpuSet| !cpus(list).intersection(wanted).is_empty();
                    args.cpu.as_ref().is_none_or(has_cpu) && pid.is_none_or(|pid| tasks.contains(&pid))
                });
            }
            pools.retain(|_, pool| !pool.lists.is_empty());
        }
        let of_lists = || {
            let lists = pools.values().flat_map(|pool| pool.lists.keys());
            lists.fold(CpuSet::new(), |all, list| all.union(&cpus(list)))
        };
        let selected = match (&args.cpu, args.pool.is_empty() && pid.is_none()) {
            (Some(cpus), true) => Some(cpus.clone()),
            (Some(cpus), false) => Some(of_lists().intersection(cpus)),
            (None, true) => None,
            (None, false) => Some(of_lists()),
        };
        Ok(Self { pools, cpus: selected })
    }

    /// Whether a CPU is selected.
    pub(super) fn has(&self, cpu: kcm_mount::model::cpuset::CpuId) -> bool {
        self.cpus.as_ref().is_none_or(|cpus| cpus.contains(cpu))
    }
}

/// Returns the process with this PID, or with this thread, if it is on a list.
///
/// # Errors
/// It is on none; the message says if an ancestor of it is.
fn on_a_list(pid: u32, pools: &Pools, host: &Host) -> Result<u32, Error> {
    let list_of = |pid: u32| {
        let mut lists = pools.iter().flat_map(|(name, pool)| pool.lists.iter().map(move |it| (name, it)));
        lists.find(|(_, (_, tasks))| tasks.contains(&pid)).map(|(name, (list, _))| (name, list))
    };
    let process = if list_of(pid).is_some() { pid } else { host.process_of_thread(pid).unwrap_or(pid) };
    if list_of(process).is_some() {
        return Ok(process);
    }
    let named = task(process, host);
    let mut ancestors = std::iter::successors(host.parent(process), |&pid| host.parent(pid));
    let Some((ancestor, (pool, list))) = ancestors.find_map(|pid| Some((pid, list_of(pid)?))) else {
        let why = if host.is_alive(process) { "it is on no CPU list" } else { "no such process" };
        return Err(anyhow!("{named}: {why}; kcm describe --format=table shows the lists with their tasks"));
    };
    let (ancestor, pool, list) = (task(ancestor, host), shown(pool), shown(list));
    Err(anyhow!("{named}: it is on no CPU list itself; its ancestor {ancestor} is on {pool} {list}"))
}
