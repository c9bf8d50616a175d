//! `kcm init`: creates the pools dataplane, controlplane and infra from whole cores.
//!
//! Owns the assignment of cores to pools, and its messages, which are the legacy ones. Does not know how pools are
//! created.

mod existing;
mod if_empty;
mod layout;
mod plan;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Error, bail};
use kcm_mount::model::cpuset::CpuSet;
use kcm_mount::model::topology::Topology;

use layout::Layout;
use plan::{CONTROLPLANE, Counts, DATAPLANE, INFRA, PlannedPool, plan};

use super::common::node::node_name_if_any;
use crate::cli;
use crate::confdir::{self, ConfDir, Pool, Pools};
use crate::host::Host;

/// Creates the pools, completes an interrupted init, or checks the existing pools.
pub(super) fn run(args: &cli::Init) -> Result<ExitCode, Error> {
    let path = &args.dir.conf_dir;
    let node = node_name_if_any(&args.node)?;
    if args.if_empty {
        return if_empty::run(args, node.as_deref());
    }
    let layout = Layout::requested(args, node.as_deref())?;
    announce(path, layout);
    confdir::check_answers(path)?;
    match Target::find(path)? {
        Target::Configured(dir) => {
            let _lock = dir.lock()?;
            complete_or_check(&dir, layout)
        }
        Target::Empty { is_new } => {
            // Before anything is created, so that a refused init leaves nothing behind.
            let topology = Host::from_env().topology()?;
            let plan = plan(&topology, Counts::of(layout, &topology)?)?;
            match create_new(path, is_new, &topology, &plan)? {
                Created::All => Ok(ExitCode::SUCCESS),
                Created::Nothing(dir) => {
                    let _lock = dir.lock()?;
                    complete_or_check(&dir, layout)
                }
            }
        }
    }
}

/// Says what is done, in the legacy words.
fn announce(path: &Path, layout: Layout) {
    log::info!("Writing config to {}.", path.display());
    log::info!("Requested data plane cores = {}.", layout.dataplane);
    log::info!("Requested control plane cores = {}.", layout.controlplane);
}

/// The directory before anything is done.
enum Target {
    /// It has pools, or the remains of an interrupted init.
    Configured(ConfDir),
    /// It has no pools, or does not exist.
    Empty { is_new: bool },
}

impl Target {
    fn find(path: &Path) -> Result<Self, Error> {
        // An error does not mean that nothing is there: it may be a mount whose daemon has ended.
        if matches!(path.try_exists(), Ok(false)) {
            return Ok(Self::Empty { is_new: true });
        }
        let dir = ConfDir::open(path)?;
        if is_unconfigured(&dir)? {
            return Ok(Self::Empty { is_new: false });
        }
        if !dir.pools_dir().is_dir() {
            bail!(
                "{}: neither empty nor a configuration directory; empty it, or give another --conf-dir",
                dir.path().display()
            );
        }
        Ok(Self::Configured(dir))
    }
}

/// The result of a plan.
enum Created {
    All,
    /// Another init was faster.
    Nothing(ConfDir),
}

/// Creates the pools of a plan in a directory without pools. If that fails, nothing is left.
fn create_new(
    path: &Path,
    is_new: bool,
    topology: &Topology,
    plan: &[PlannedPool],
) -> Result<Created, Error> {
    if is_new {
        std::fs::create_dir_all(path).map_err(|error| confdir::file_error(path, error))?;
    }
    let dir = ConfDir::open(path)?;
    let lock = dir.lock();
    let created = lock.and_then(|_lock| match is_unconfigured(&dir)? {
        true => create(&dir, plan, &Pools::new()).map(|()| Created::All),
        false => Ok(Created::Nothing(ConfDir::open(path)?)),
    });
    match &created {
        Ok(Created::All) => advise(&dir, topology, plan),
        Err(_) if is_new => {
            let _ = std::fs::remove_file(path.join("lock"));
            let _ = std::fs::remove_dir(path);
        }
        _ => {}
    }
    created
}

/// Says what others may do on the CPUs of the data plane, unless it is isolated.
fn advise(dir: &ConfDir, topology: &Topology, plan: &[PlannedPool]) {
    let dataplane = plan.iter().filter(|pool| pool.exclusive && !pool.isolated);
    let mut lists = dataplane.flat_map(|pool| &pool.lists);
    if dir.is_mounted() && lists.any(|cpus| !cpus.is_subset(&topology.isolated())) {
        log::info!(
            "Other programs may run on the CPUs of {DATAPLANE}: only claims are kept off. --isolated keeps off everything."
        );
    }
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
fn complete_or_check(dir: &ConfDir, layout: Layout) -> Result<ExitCode, Error> {
    dir.remove_incomplete();
    let topology = Host::from_env().topology()?;
    let existing = dir.pools()?;
    let counts = Counts::of(layout, &topology)?;
    if !is_complete(&existing)
        && let Ok(plan) = plan(&topology, counts)
        && is_part_of(&existing, &plan)
    {
        complete(dir, &plan, &existing)?;
        return Ok(ExitCode::SUCCESS);
    }
    log::info!("Configuration directory already exists.");
    check(&existing, &topology, counts)
}

fn complete(dir: &ConfDir, plan: &[PlannedPool], existing: &Pools) -> Result<(), Error> {
    log::info!("Completing what an earlier init began.");
    create(dir, plan, existing)
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
        if name == DATAPLANE && counts.isolated && !pool.isolated {
            log::error!("{name} is not isolated; while it has no tasks, write isolated to pools/{name}/mode");
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
    for PlannedPool { name, exclusive, isolated, lists } in plan {
        let existing = existing.get(*name);
        log::info!("Adding {name} pool.");
        if existing.is_none() {
            created.push(dir.pool(name));
            dir.create_pool(name)?;
        }
        if existing.is_none_or(|pool| pool.exclusive != *exclusive) {
            dir.set_exclusive(name, *exclusive)?;
        }
        if *isolated && existing.is_none_or(|pool| !pool.isolated) {
            dir.isolate(name)?;
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

#[cfg(test)]
mod tests {
    use super::plan::tests::machine;
    use super::*;

    fn pool(exclusive: bool, lists: &[&str]) -> Pool {
        Pool {
            exclusive,
            lists: lists.iter().map(|list| ((*list).to_owned(), Vec::new())).collect(),
            ..Pool::default()
        }
    }

    fn pools(pools: &[(&str, Pool)]) -> Pools {
        pools.iter().map(|(name, pool)| ((*name).to_owned(), pool.clone())).collect()
    }

    #[test]
    fn an_interrupted_init_is_part_of_its_plan() {
        let plan =
            plan(&machine(1, 4, ""), Counts { dataplane: 1, controlplane: 1, isolated: false }).unwrap();
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
