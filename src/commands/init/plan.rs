//! Which cores each pool gets.
//!
//! Owns the assignment, which is the legacy one, and the numbers that `auto` stands for. Does not know what exists already, or
//! how pools are created.

use anyhow::{Error, bail};
use kcm_mount::model::cpuset::CpuSet;
use kcm_mount::model::topology::{Core, Topology};
use serde_json::json;

use super::layout::Layout;
use crate::cli::Cores;

pub(super) const DATAPLANE: &str = "dataplane";
pub(super) const CONTROLPLANE: &str = "controlplane";
pub(super) const INFRA: &str = "infra";

/// The requested numbers of cores.
#[derive(Clone, Copy, Debug)]
pub(super) struct Counts {
    pub(super) dataplane: usize,
    pub(super) controlplane: usize,
    /// Whether the data plane is isolated.
    pub(super) isolated: bool,
}

impl Counts {
    /// Returns the numbers of cores for this machine. `auto` leaves one core to infra, unless cores are isolated at boot, because
    /// infra gets the others then. One core is for the control plane if the data plane keeps one, and the rest for the data
    /// plane.
    ///
    /// # Errors
    /// `auto` leaves no core for the data plane.
    pub(super) fn of(layout: Layout, topology: &Topology) -> Result<Self, Error> {
        let cores = topology.cores();
        let isolated = whole_isolated(topology, &cores).len();
        let usable = if isolated > 0 { isolated } else { cores.len().saturating_sub(1) };
        let controlplane = match (layout.controlplane, layout.dataplane) {
            (Cores::Number(number), _) => number,
            (Cores::Auto, Cores::Number(dataplane)) => usable.saturating_sub(dataplane).min(1),
            (Cores::Auto, Cores::Auto) => usable.saturating_sub(1).min(1),
        };
        let dataplane = match layout.dataplane {
            Cores::Number(number) => number,
            Cores::Auto => usable.saturating_sub(controlplane),
        };
        if layout.dataplane == Cores::Auto && dataplane == 0 {
            bail!(
                "auto leaves no core for {DATAPLANE}: {usable} of {} cores can be in {DATAPLANE} and {CONTROLPLANE}, which gets {controlplane}",
                cores.len()
            );
        }
        if layout.dataplane == Cores::Auto || layout.controlplane == Cores::Auto {
            log::info!(
                "auto: {DATAPLANE} {dataplane}, {CONTROLPLANE} {controlplane} of {} cores.",
                cores.len()
            );
        }
        Ok(Self { dataplane, controlplane, isolated: layout.isolated })
    }
}

/// A pool that should exist.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct PlannedPool {
    pub(super) name: &'static str,
    pub(super) exclusive: bool,
    pub(super) isolated: bool,
    pub(super) lists: Vec<CpuSet>,
}

/// Assigns cores to pools.
///
/// # Errors
/// There are not enough cores.
pub(super) fn plan(topology: &Topology, counts: Counts) -> Result<[PlannedPool; 3], Error> {
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
    let all_controlplane = union(&controlplane);
    if rest.is_some() && all_controlplane.len() > 1 {
        log::warn!(
            "CPU list {all_controlplane} of {CONTROLPLANE} is isolated at boot: the kernel does not spread programs over its CPUs"
        );
    }
    let infra = rest.get_or_insert(reserved);
    if infra.is_empty() {
        bail!("No more free cores left to assign for {INFRA}");
    }
    let one_list = |all: CpuSet| Some(all).filter(|all| !all.is_empty()).into_iter().collect();
    let shared = |name, lists| PlannedPool { name, exclusive: false, isolated: false, lists };
    Ok([
        PlannedPool { name: DATAPLANE, exclusive: true, isolated: counts.isolated, lists: dataplane },
        shared(CONTROLPLANE, one_list(all_controlplane)),
        shared(INFRA, one_list(union(infra))),
    ])
}

fn union(cores: &[CpuSet]) -> CpuSet {
    cores.iter().fold(CpuSet::new(), |all, cpus| all.union(cpus))
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

/// Returns the cores whose threads are all isolated.
fn whole_isolated<'a>(topology: &Topology, cores: &'a [Core]) -> Vec<&'a Core> {
    let isolated = topology.isolated();
    cores.iter().filter(|core| !core.cpus.is_empty() && core.cpus.is_subset(&isolated)).collect()
}

/// Returns the CPUs of each core whose threads are all isolated, and says what is isolated.
fn isolated_cores(topology: &Topology, cores: &[Core]) -> Vec<CpuSet> {
    let isolated = topology.isolated();
    if isolated.is_empty() {
        return Vec::new();
    }
    let whole = whole_isolated(topology, cores);
    let others = cores.iter().filter(|core| !core.cpus.is_subset(&isolated));
    log::info!("Isolated logical cores: {}", joined(isolated.iter()));
    log::info!("Isolated physical cores: {}", joined(whole.iter().map(|core| core.id)));
    for core in others.filter(|core| !core.cpus.is_disjoint(&isolated)) {
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
pub(super) mod tests {
    use super::*;
    use kcm_mount::model::cpuset::CpuId;
    use kcm_mount::model::topology::Cpu;

    /// `sockets` of `cores` each with two threads: the second thread of core `n` is CPU `n + half`.
    pub(in super::super) fn machine(sockets: u32, cores: u32, isolated: &str) -> Topology {
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
        let plan = plan(topology, Counts { dataplane, controlplane, isolated: false })
            .map_err(|error| error.to_string())?;
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
    fn auto_leaves_a_core_for_infra_and_fits_small_machines() {
        let counts = |topology: &Topology, dataplane, controlplane| {
            let counts = Counts::of(Layout { dataplane, controlplane, isolated: false }, topology);
            counts.map(|counts| (counts.dataplane, counts.controlplane)).map_err(|error| error.to_string())
        };
        use Cores::{Auto, Number};
        for (cores, dataplane, controlplane, expected) in [
            (64, Auto, Auto, (62, 1)),
            (4, Auto, Auto, (2, 1)),
            (3, Auto, Auto, (1, 1)),
            (2, Auto, Auto, (1, 0)),
            (8, Auto, Number(3), (4, 3)),
            (8, Number(4), Auto, (4, 1)),
            (8, Number(7), Auto, (7, 0)),
            (8, Number(1), Number(2), (1, 2)),
        ] {
            let topology = machine(1, cores, "");
            assert_eq!(counts(&topology, dataplane, controlplane), Ok(expected), "{cores}");
            let counts = Counts { dataplane: expected.0, controlplane: expected.1, isolated: false };
            assert!(plan(&topology, counts).is_ok(), "{cores}");
        }
        assert_eq!(counts(&machine(1, 8, "0-3,8-11"), Auto, Auto), Ok((3, 1)), "the isolated cores");
        for (cores, controlplane) in [(1, Auto), (2, Number(1)), (4, Number(9))] {
            let refusal = counts(&machine(1, cores, ""), Auto, controlplane).unwrap_err();
            assert!(refusal.starts_with("auto leaves no core for dataplane"), "{refusal}");
        }
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
}
