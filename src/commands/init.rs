//! `kcm init`: creates the pools dataplane, controlplane and infra from whole cores.
//!
//! Owns the assignment of cores to pools, and its messages, which are the legacy ones. Does not know how pools are
//! created.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Error, bail};
use kcm_mount::model::cpuset::CpuSet;
use kcm_mount::model::topology::{Core, Topology};
use serde_json::json;

use crate::cli;
use crate::confdir::{self, ConfDir, Pool, Pools};
use crate::host::Host;

const DATAPLANE: &str = "dataplane";
const CONTROLPLANE: &str = "controlplane";
const INFRA: &str = "infra";

/// The requested numbers of cores.
#[derive(Clone, Copy, Debug)]
struct Counts {
    dataplane: usize,
    controlplane: usize,
}

/// A pool that should exist.
#[derive(Debug, PartialEq, Eq)]
struct PlannedPool {
    name: &'static str,
    exclusive: bool,
    lists: Vec<CpuSet>,
}

/// Creates the pools, completes an interrupted init, or checks the existing pools.
pub(super) fn run(args: &cli::Init) -> Result<ExitCode, Error> {
    let path = &args.dir.conf_dir;
    let counts = Counts { dataplane: args.num_dp_cores, controlplane: args.num_cp_cores };
    log::info!("Writing config to {}.", path.display());
    log::info!("Requested data plane cores = {}.", counts.dataplane);
    log::info!("Requested control plane cores = {}.", counts.controlplane);
    confdir::check_answers(path)?;
    // An error does not mean that nothing is there: it may be a mount whose daemon has ended.
    let is_new = matches!(path.try_exists(), Ok(false));
    if !is_new && !is_unconfigured(&ConfDir::open(path)?)? {
        let dir = ConfDir::open(path)?;
        if !dir.pools_dir().is_dir() {
            bail!(
                "{}: neither empty nor a configuration directory; empty it, or give another --conf-dir",
                dir.path().display()
            );
        }
        let _lock = dir.lock()?;
        return complete_or_check(&dir, counts);
    }
    // Before anything is created, so that a refused init leaves nothing behind.
    let topology = Host::from_env().topology()?;
    let plan = plan(&topology, counts)?;
    if is_new {
        std::fs::create_dir_all(path).map_err(|error| confdir::file_error(path, error))?;
    }
    let dir = ConfDir::open(path)?;
    let lock = dir.lock();
    let created = lock.and_then(|_lock| match is_unconfigured(&dir)? {
        true => create(&dir, &plan, &Pools::new()),
        // Another init was faster.
        false => complete_or_check(&dir, counts).map(|_| ()),
    });
    if created.is_err() && is_new {
        let _ = std::fs::remove_file(path.join("lock"));
        let _ = std::fs::remove_dir(path);
    }
    created.map(|()| ExitCode::SUCCESS)
}

/// Whether the directory has no configuration: a mount without pools, or a plain directory that is empty but for the
/// lock.
fn is_unconfigured(dir: &ConfDir) -> Result<bool, Error> {
    if dir.is_mounted() {
        return Ok(dir.pools()?.is_empty());
    }
    let entries = std::fs::read_dir(dir.path()).map_err(|error| confdir::file_error(dir.path(), error))?;
    Ok(entries.filter_map(Result::ok).all(|entry| entry.file_name() == "lock"))
}

/// Completes the pools of an interrupted init, or checks that the existing pools are the requested ones. The caller
/// holds the lock.
fn complete_or_check(dir: &ConfDir, counts: Counts) -> Result<ExitCode, Error> {
    dir.remove_incomplete();
    let topology = Host::from_env().topology()?;
    let existing = dir.pools()?;
    if !is_complete(&existing)
        && let Ok(plan) = plan(&topology, counts)
        && is_part_of(&existing, &plan)
    {
        log::info!("Completing what an earlier init began.");
        create(dir, &plan, &existing)?;
        return Ok(ExitCode::SUCCESS);
    }
    log::info!("Configuration directory already exists.");
    check(&existing, &topology, counts)
}

/// Whether an init has created everything: infra's list comes last.
fn is_complete(existing: &Pools) -> bool {
    [DATAPLANE, CONTROLPLANE, INFRA].iter().all(|name| existing.contains_key(*name))
        && existing.get(INFRA).is_some_and(|infra| !infra.lists.is_empty())
}

/// Whether an interrupted init with this plan can have created the existing pools.
fn is_part_of(existing: &Pools, plan: &[PlannedPool]) -> bool {
    existing.iter().all(|(name, pool)| {
        let planned = plan.iter().find(|planned| planned.name == name);
        planned.is_some_and(|planned| {
            let is_planned = |list: &String| planned.lists.iter().any(|cpus| cpus.to_string() == *list);
            pool.lists.keys().all(is_planned)
                && (pool.lists.is_empty() || pool.exclusive == planned.exclusive)
        })
    })
}

/// Checks that the pools have the requested numbers of cores.
fn check(existing: &Pools, topology: &Topology, counts: Counts) -> Result<ExitCode, Error> {
    let mut code = ExitCode::SUCCESS;
    for (name, requested) in [(DATAPLANE, counts.dataplane), (CONTROLPLANE, counts.controlplane)] {
        let Some(pool) = existing.get(name) else {
            bail!("{name} pool does not exist; make it by hand, or remove all pools and run kcm init again")
        };
        let cores = cores_of(pool, topology);
        if cores != requested {
            log::error!("{cores} {name} cores ({requested} requested)");
            code = ExitCode::FAILURE;
        }
    }
    Ok(code)
}

/// Returns the number of cores in the lists of a pool. Each list counts as at least one core, because its CPUs may be
/// offline now.
fn cores_of(pool: &Pool, topology: &Topology) -> usize {
    let cores = topology.cores();
    let of_list = |list: &String| {
        let cpus = confdir::parse_cpu_list(list).unwrap_or_default();
        cores.iter().filter(|core| !core.cpus.is_disjoint(&cpus)).count().max(1)
    };
    pool.lists.keys().map(of_list).sum()
}

/// Creates the part of the plan that does not exist yet. If that fails, removes everything that it has created.
fn create(dir: &ConfDir, plan: &[PlannedPool], existing: &Pools) -> Result<(), Error> {
    let mut created = Vec::new();
    let result = create_all(dir, plan, existing, &mut created);
    if result.is_err() {
        created.iter().rev().for_each(|directory| dir.remove_created(directory));
    }
    result
}

/// As [`create`]; adds each directory to `created` before it creates it.
fn create_all(
    dir: &ConfDir,
    plan: &[PlannedPool],
    existing: &Pools,
    created: &mut Vec<PathBuf>,
) -> Result<(), Error> {
    if dir.create_pools_dir()? {
        created.push(dir.pools_dir());
    }
    for PlannedPool { name, exclusive, lists } in plan {
        let existing = existing.get(*name);
        log::info!("Adding {name} pool.");
        if existing.is_none() {
            created.push(dir.pool(name));
            dir.create_pool(name)?;
        }
        if existing.is_none_or(|pool| pool.exclusive != *exclusive) {
            dir.set_exclusive(name, *exclusive)?;
        }
        for list in lists.iter().map(CpuSet::to_string) {
            if existing.is_some_and(|pool| pool.lists.contains_key(&list)) {
                continue;
            }
            log::info!("Adding cpu list {list} to {name} pool.");
            created.push(dir.pool(name).join(&list));
            dir.create_list(name, &list)?;
        }
    }
    Ok(())
}

/// Assigns cores to pools.
///
/// # Errors
/// There are not enough cores.
fn plan(topology: &Topology, counts: Counts) -> Result<[PlannedPool; 3], Error> {
    let cores = topology.cores();
    let isolated = isolated_cores(topology, &cores);
    let (mut reserved, mut rest) = if isolated.is_empty() {
        log::info!(
            "No isolated physical cores detected: allocating control plane and data plane from full core list"
        );
        (cores.into_iter().map(|core| core.cpus).collect(), None)
    } else {
        check_isolated(isolated.len(), counts)?;
        // Isolated cores that nobody requested go to no pool: infra needs the scheduler's balancing.
        let is_isolated = topology.isolated();
        let others = cores.iter().map(|core| core.cpus.difference(&is_isolated));
        let others: Vec<CpuSet> = others.filter(|cpus| !cpus.is_empty()).collect();
        (isolated, Some(others))
    };
    let dataplane = take(&mut reserved, DATAPLANE, counts.dataplane)?;
    let controlplane = take(&mut reserved, CONTROLPLANE, counts.controlplane)?;
    for cpus in dataplane.iter().filter(|cpus| topology.may_be_a_part_of_a_core(cpus)) {
        log::warn!(
            "CPU list {cpus} of {DATAPLANE} may be a part of a core, because CPU {} is offline; bring it online before kcm init",
            topology.cpus().difference(&topology.online())
        );
    }
    let infra = rest.get_or_insert(reserved);
    if infra.is_empty() {
        bail!("No more free cores left to assign for {INFRA}");
    }
    let one_list = |cores: &[CpuSet]| {
        let all = cores.iter().fold(CpuSet::new(), |all, cpus| all.union(cpus));
        Some(all).filter(|all| !all.is_empty()).into_iter().collect()
    };
    Ok([
        PlannedPool { name: DATAPLANE, exclusive: true, lists: dataplane },
        PlannedPool { name: CONTROLPLANE, exclusive: false, lists: one_list(&controlplane) },
        PlannedPool { name: INFRA, exclusive: false, lists: one_list(infra) },
    ])
}

/// Removes the first `count` cores from `cores` and returns them.
fn take(cores: &mut Vec<CpuSet>, pool: &str, count: usize) -> Result<Vec<CpuSet>, Error> {
    if count > 0 && cores.is_empty() {
        bail!("No more free cores left to assign for {pool}");
    }
    if count > cores.len() {
        bail!("{count} cores requested for {pool}. Only {} cores available", cores.len());
    }
    Ok(cores.drain(..count).collect())
}

/// Returns the CPUs of each core whose threads are all isolated.
fn isolated_cores(topology: &Topology, cores: &[Core]) -> Vec<CpuSet> {
    let isolated = topology.isolated();
    if isolated.is_empty() {
        return Vec::new();
    }
    let (whole, others): (Vec<&Core>, Vec<&Core>) =
        cores.iter().partition(|core| core.cpus.is_subset(&isolated));
    log::info!("Isolated logical cores: {}", joined(isolated.iter()));
    log::info!("Isolated physical cores: {}", joined(whole.iter().map(|core| core.id)));
    for core in others.into_iter().filter(|core| !core.cpus.is_disjoint(&isolated)) {
        let cpus = core.cpus.iter().map(|cpu| json!({ "id": cpu.get(), "isolated": isolated.contains(cpu) }));
        let shown = json!({ "cpus": cpus.collect::<Vec<_>>(), "id": core.id });
        log::warn!("Physical core {} is partially isolated: {shown}", core.id);
    }
    whole.into_iter().map(|core| core.cpus.clone()).collect()
}

/// Checks that the isolated cores suffice.
fn check_isolated(isolated: usize, counts: Counts) -> Result<(), Error> {
    let requested = counts.dataplane.saturating_add(counts.controlplane);
    if isolated < requested {
        bail!(
            "Cannot use isolated cores for data plane and control plane cores: not enough isolated cores {isolated} compared to requested {requested}"
        );
    }
    if isolated > requested {
        log::warn!(
            "Not all isolated cores will be used by data and control plane. {isolated} isolated but only {requested} used"
        );
    }
    Ok(())
}

fn joined(numbers: impl Iterator<Item = impl ToString>) -> String {
    numbers.map(|number| number.to_string()).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use kcm_mount::model::cpuset::CpuId;
    use kcm_mount::model::topology::Cpu;

    /// `sockets` of `cores` each with two threads: the second thread of core `n` is CPU `n + half`.
    fn machine(sockets: u32, cores: u32, isolated: &str) -> Topology {
        let half = sockets * cores;
        let isolated: CpuSet = isolated.parse().unwrap_or_default();
        let cpu = |number: u32| {
            let (id, core) = (CpuId::new(number).unwrap(), number % half);
            let socket = Some(core / cores);
            Cpu { id, core: Some(core), socket, node: socket, online: true, isolated: isolated.contains(id) }
        };
        Topology::new((0..half * 2).map(cpu).collect())
    }

    fn planned(topology: &Topology, dataplane: usize, controlplane: usize) -> Result<[String; 3], String> {
        let plan = plan(topology, Counts { dataplane, controlplane }).map_err(|error| error.to_string())?;
        Ok(plan.map(|pool| pool.lists.iter().map(CpuSet::to_string).collect::<Vec<_>>().join(" ")))
    }

    fn expected(pools: [&str; 3]) -> Result<[String; 3], String> {
        Ok(pools.map(String::from))
    }

    #[test]
    fn the_example_of_the_legacy_documentation() {
        let expected = expected(["0,8 1,9 2,10 3,11", "4,12", "5-7,13-15"]);
        assert_eq!(planned(&machine(1, 8, "0-4,8-12"), 4, 1), expected);
        assert_eq!(planned(&machine(1, 8, ""), 4, 1), expected);
    }

    #[test]
    fn cores_are_taken_socket_by_socket() {
        assert_eq!(planned(&machine(2, 2, ""), 1, 1), expected(["0,4", "1,5", "2-3,6-7"]));
        assert_eq!(planned(&machine(2, 2, ""), 3, 0), expected(["0,4 1,5 2,6", "", "3,7"]));
    }

    #[test]
    fn isolated_cores_that_nobody_requested_are_in_no_pool() {
        assert_eq!(planned(&machine(1, 4, "0-2,4-6"), 1, 1), expected(["0,4", "1,5", "3,7"]));
        // One thread of core 1 is isolated; infra gets the other.
        assert_eq!(planned(&machine(1, 4, "0,4,1"), 1, 0), expected(["0,4", "", "2-3,5-7"]));
    }

    #[test]
    fn partially_isolated_cores_do_not_count_as_isolated() {
        assert_eq!(planned(&machine(1, 2, "0,1"), 1, 0), expected(["0,2", "", "1,3"]));
    }

    #[test]
    fn errors_are_the_legacy_ones() {
        for (isolated, dataplane, controlplane, message) in [
            ("", 99, 1, "99 cores requested for dataplane. Only 8 cores available"),
            ("", 8, 1, "No more free cores left to assign for controlplane"),
            ("", 7, 1, "No more free cores left to assign for infra"),
            (
                "0,8",
                4,
                1,
                "Cannot use isolated cores for data plane and control plane cores: not enough isolated cores 1 compared to requested 5",
            ),
        ] {
            let refusal = planned(&machine(1, 8, isolated), dataplane, controlplane);
            assert_eq!(refusal, Err(message.to_owned()));
        }
    }

    fn pool(exclusive: bool, lists: &[&str]) -> Pool {
        Pool {
            exclusive,
            partial: false,
            lists: lists.iter().map(|list| ((*list).to_owned(), Vec::new())).collect(),
        }
    }

    fn pools(pools: &[(&str, Pool)]) -> Pools {
        pools.iter().map(|(name, pool)| ((*name).to_owned(), pool.clone())).collect()
    }

    #[test]
    fn an_interrupted_init_is_part_of_its_plan() {
        let plan = plan(&machine(1, 4, ""), Counts { dataplane: 1, controlplane: 1 }).unwrap();
        for (existing, expected) in [
            (pools(&[]), true),
            (pools(&[("dataplane", pool(true, &["0,4"]))]), true),
            // A pool is created as a shared one, and then made exclusive.
            (pools(&[("dataplane", pool(false, &[]))]), true),
            (pools(&[("dataplane", pool(false, &["0,4"]))]), false),
            (pools(&[("dataplane", pool(true, &["2,6"]))]), false),
            (pools(&[("other", pool(true, &[]))]), false),
        ] {
            assert_eq!(is_part_of(&existing, &plan), expected, "{existing:?}");
        }
    }

    #[test]
    fn pools_are_complete_once_infra_has_its_list() {
        let [dataplane, controlplane] = [("dataplane", pool(true, &[])), ("controlplane", pool(false, &[]))];
        let with_infra = |infra: Pool| pools(&[dataplane.clone(), controlplane.clone(), ("infra", infra)]);
        assert!(is_complete(&with_infra(pool(false, &["0"]))));
        assert!(!is_complete(&with_infra(pool(false, &[]))));
        assert!(!is_complete(&pools(&[("infra", pool(false, &["0"]))])));
    }

    #[test]
    fn a_list_counts_the_cores_that_it_touches() {
        let topology = machine(1, 4, "");
        assert_eq!(cores_of(&pool(true, &["0,4", "1,5"]), &topology), 2);
        assert_eq!(cores_of(&pool(true, &["0-3"]), &topology), 4);
        assert_eq!(cores_of(&pool(true, &["0", "4000"]), &topology), 2, "offline CPUs count as one core");
    }
}
