//! `kcm node-report`: checks this node.
//!
//! Owns the checks and their messages. Does not know the API server.

pub(super) mod intruders;
mod kubelet;
mod others;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Error, anyhow};
use kcm_mount::model::cpuset::{CpuId, CpuSet};
use kcm_mount::model::topology::{Cpu, Topology};
use kcm_mount::mountpoint::{self, Status};
use serde_json::{Value, json};

use super::common::interval;
use super::common::periodic::Printer;
use super::describe::{self, Members};
use super::publish::Publisher;
use crate::cli::{self, KubeletArg, PodsArg};
use crate::confdir::{self, ConfDir, Found, Pools};
use crate::host::Host;
use crate::kubernetes::objects::reports::NodeReport;

/// Prints the report, once or periodically.
pub(super) fn run(args: &cli::NodeReport) -> Result<ExitCode, Error> {
    let host = Host::with_processes()?;
    let mut publisher = Publisher::new(&args.publish, args.interval)?;
    let mut printer = Printer::new(args.interval);
    interval::run(args.interval, || {
        let Examined { mut report, found } = examine(&args.dir.conf_dir, &args.kubelet, &args.pods, &host)?;
        if let Ok((_, pools)) = &found {
            note_missing_pools(&mut report, pools);
        }
        printer.print(&report, &[])?;
        let Some(publisher) = &mut publisher else { return Ok(()) };
        publisher.publish(&NodeReport::new(&report)?)?;
        publisher.send_events(&report);
        Ok(())
    })
}

/// Says in a report that a directory without pools is not configured. `kcm status` does not: it is also asked whether the daemon
/// runs, before there are pools.
fn note_missing_pools(report: &mut Value, pools: &Pools) {
    if let Some(check_of_directory) =
        report.pointer_mut("/checks/configDirectory").filter(|_| pools.is_empty())
    {
        let cure = "make them by hand or with kcm init, whose message and Event say why it has made none";
        *check_of_directory = check(vec![format!("there are no pools; {cure}")]);
    }
}

/// What was found out about a node.
pub(super) struct Examined {
    /// `{"checks": {<name>: {"ok", "errors"}}, "description": …, "topology": …}`. If the directory cannot be read, the
    /// description is null and there are only the checks `configDirectory` and `mount`.
    pub(super) report: Value,
    /// The directory and its pools.
    pub(super) found: Result<(ConfDir, Pools), Error>,
}

/// Examines the node.
///
/// # Errors
/// The topology cannot be read.
pub(super) fn examine(
    conf_dir: &Path,
    kubelet: &KubeletArg,
    pods: &PodsArg,
    host: &Host,
) -> Result<Examined, Error> {
    let machine = host.topology()?;
    let topology = machine.report();
    // First, because it never blocks, whereas reading from a mount that does not answer does. It is asked once: if the
    // daemon stops now, the directory is not opened.
    let status = mountpoint::status(conf_dir).ok();
    let found = match status {
        Some(Status::NotAnswering) => Err(anyhow!("{}: does not answer", conf_dir.display())),
        _ => ConfDir::open(conf_dir).and_then(|dir| Ok((dir.find()?, dir))),
    };
    let metrics = match (status, &found) {
        (Some(Status::Live), Ok(_)) => fs::read_to_string(conf_dir.join("info/metrics")).unwrap_or_default(),
        _ => String::new(),
    };
    let mount = mount(status, &metrics);
    let (Found { pools, damaged }, dir) = match found {
        Ok(read) => read,
        Err(error) => {
            log::debug!("{error:#}");
            let unreadable = check(vec!["Unable to read the KCM configuration directory".into()]);
            let checks = json!({ "configDirectory": unreadable, "mount": mount });
            let report = json!({ "checks": checks, "description": null, "topology": topology });
            return Ok(Examined { report, found: Err(error) });
        }
    };
    let online = host.online()?;
    let members = Members::find(&pools, host, &pods.container_logs);
    let checks = json!({
        "configDirectory": check([damaged, overlaps(&pools)].concat()),
        "cpus": check(offline(&pools, &online)),
        "isolation": with_warnings(
            check(isolation(&pools, &dir)),
            others::warnings(&pools, &machine, &online, host, &members),
        ),
        "intruders": check(intruders(&pools, &online, host)),
        "kubelet": check(kubelet::check(&pools, &online, kubelet, host)),
        "masks": check(masks(&pools, &online, host)),
        "mount": mount,
        "siblings": check(siblings(&pools, &machine)),
    });
    let description = describe::description(&dir, &pools, &members);
    let report = json!({ "checks": checks, "description": description, "topology": topology });
    Ok(Examined { report, found: Ok((dir, pools)) })
}

/// Returns a check with these errors; it is ok without errors.
fn check(errors: Vec<String>) -> Value {
    json!({ "ok": errors.is_empty(), "errors": errors })
}

/// Adds warnings to a check, if there are any. They leave it ok.
fn with_warnings(mut check: Value, warnings: Vec<String>) -> Value {
    if let Some(fields) = check.as_object_mut().filter(|_| !warnings.is_empty()) {
        fields.insert("warnings".into(), json!(warnings));
    }
    check
}

/// A CPU list of the directory.
struct List<'a> {
    pool: &'a str,
    /// `pool:list`.
    name: String,
    exclusive: bool,
    /// Whether its pool is isolated.
    isolated: bool,
    tasks: &'a [u32],
    /// Empty if the directory's name is not a CPU list.
    cpus: CpuSet,
}

/// Returns every list, in the order of `describe`.
fn lists(pools: &Pools) -> impl Iterator<Item = List<'_>> {
    pools.iter().flat_map(|(pool_name, pool)| {
        pool.lists.iter().map(move |(list, tasks)| List {
            pool: pool_name,
            name: format!("{}:{}", describe::shown(pool_name), describe::shown(list)),
            exclusive: pool.exclusive,
            isolated: pool.isolated,
            tasks,
            cpus: confdir::parse_cpu_list(list).unwrap_or_default(),
        })
    })
}

/// Returns an error for each pair of lists that share CPUs.
fn overlaps(pools: &Pools) -> Vec<String> {
    let all: Vec<List<'_>> = lists(pools).collect();
    let mut errors = Vec::new();
    for (index, list) in all.iter().enumerate() {
        for other in all.iter().skip(index + 1) {
            let both: Vec<u32> = list.cpus.intersection(&other.cpus).iter().map(CpuId::get).collect();
            if !both.is_empty() {
                errors.push(format!(
                    "CPU list overlap detected in {} and {} (in both: {both:?})",
                    list.name, other.name
                ));
            }
        }
    }
    errors
}

/// Returns an error for each claimed list that should be isolated and is not.
fn isolation(pools: &Pools, dir: &ConfDir) -> Vec<String> {
    let errors = dir.not_isolated(pools).map(|(pool, list, reason)| {
        let name = format!("{}:{}", describe::shown(pool), describe::shown(list));
        format!("CPU list {name} is not isolated: {reason}")
    });
    errors.collect()
}

/// Returns an error for each list with offline CPUs.
fn offline(pools: &Pools, online: &CpuSet) -> Vec<String> {
    let offline = lists(pools).map(|list| (list.name, list.cpus.difference(online)));
    let offline = offline.filter(|(_, cpus)| !cpus.is_empty());
    offline.map(|(name, cpus)| format!("CPU list {name} has offline CPUs: {cpus}")).collect()
}

/// Returns an error for each intruder.
fn intruders(pools: &Pools, online: &CpuSet, host: &Host) -> Vec<String> {
    intruders::find(pools, online, host).iter().map(ToString::to_string).collect()
}

/// Returns an error for each task that does not run on its whole list: a thread is elsewhere, or the cpuset of the task has
/// only a part of the list. A thread that is pinned within its list is the program's own choice.
fn masks(pools: &Pools, online: &CpuSet, host: &Host) -> Vec<String> {
    let mut errors = Vec::new();
    for list in lists(pools) {
        for &pid in list.tasks {
            let Some(program) = host.program_name(pid) else { continue };
            let task = format!("{pid} ({program}) of {}", list.name);
            let elsewhere = host.thread_masks(pid).into_iter().find(|(_, mask)| !mask.is_subset(&list.cpus));
            let usable = list.cpus.intersection(online);
            let missing = host.allowed(pid).map(|allowed| usable.difference(&allowed)).unwrap_or_default();
            if let Some((tid, mask)) = elsewhere {
                let thread = if tid == pid { String::new() } else { format!("thread {tid} of ") };
                errors
                    .push(format!("{thread}{task} may run on {mask}; kcm reconcile --repair moves it back"));
            } else if !missing.is_empty() {
                errors.push(format!(
                    "{task} cannot use CPU {missing}: the cpuset of its cgroup does not have it"
                ));
            }
        }
    }
    errors
}

/// Returns an error for each exclusive list that shares a core with CPUs outside it, so that others slow it down.
fn siblings(pools: &Pools, machine: &Topology) -> Vec<String> {
    let lists: Vec<List<'_>> = lists(pools).collect();
    let core_of = |cpu: &Cpu| cpu.core.map(|core| (cpu.socket, core));
    let mut errors = Vec::new();
    for list in lists.iter().filter(|list| list.exclusive) {
        let own = machine.all().iter().filter(|cpu| list.cpus.contains(cpu.id) && cpu.online);
        let cores: BTreeSet<_> = own.filter_map(core_of).collect();
        for cpu in machine.all().iter().filter(|cpu| cpu.online && !list.cpus.contains(cpu.id)) {
            if core_of(cpu).is_some_and(|core| cores.contains(&core)) {
                let other = lists.iter().find(|other| other.cpus.contains(cpu.id));
                let place = other.map_or("no pool".to_owned(), |other| other.name.clone());
                errors.push(format!(
                    "CPU list {} shares a core with CPU {}, which is in {place}",
                    list.name, cpu.id
                ));
            }
        }
    }
    errors
}

/// Returns the check of the mount: whether it is live, since when, and whether the daemon has set damaged state aside.
/// `metrics`: the content of `info/metrics`, empty if the mount is not live.
fn mount(status: Option<Status>, metrics: &str) -> Value {
    let value = |name: &str| {
        let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
        line.parse::<f64>().ok()
    };
    let damaged = value("kcm_state_damaged").filter(|&files| files > 0.0);
    let error = match status {
        Some(Status::Stale | Status::Marked) => Some("kcm mount is not running; start it".to_owned()),
        Some(Status::NotAnswering) => Some("kcm mount does not answer; look at its log".to_owned()),
        _ => damaged.map(|files| {
            format!("{files} damaged state files were set aside when the daemon started; look at its log")
        }),
    };
    let since = value("kcm_start_time_seconds").map(|seconds| {
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs_f64(seconds.max(0.0));
        humantime::format_rfc3339_millis(time).to_string()
    });
    let mut check = check(error.into_iter().collect());
    if let Some(fields) = check.as_object_mut() {
        fields.insert("live".into(), json!(status == Some(Status::Live)));
        fields.insert("since".into(), json!(since));
    }
    check
}

#[cfg(test)]
mod tests {
    use super::intruders::tests::{cpus, pools};
    use super::*;

    #[test]
    fn each_overlap_is_reported_once() {
        let pools = pools(&[("a", true, &["0-2"]), ("b", false, &["2,4", "5", "x"])]);
        assert_eq!(overlaps(&pools), ["CPU list overlap detected in a:0-2 and b:2,4 (in both: [2])"]);
    }

    #[test]
    fn offline_cpus_are_reported_per_list() {
        let pools = pools(&[("a", true, &["0-2", "3"])]);
        assert_eq!(offline(&pools, &cpus("0-1,3")), ["CPU list a:0-2 has offline CPUs: 2"]);
    }

    #[test]
    fn the_mount_check_names_what_to_do() {
        let live = mount(Some(Status::Live), "kcm_start_time_seconds 1000.5\nkcm_state_damaged 0\n");
        let expected = json!({ "ok": true, "errors": [], "live": true, "since": "1970-01-01T00:16:40.500Z" });
        assert_eq!(live, expected);
        let damaged = mount(Some(Status::Live), "kcm_state_damaged 2\n");
        assert_eq!(damaged["ok"], false);
        for status in [Status::Stale, Status::Marked, Status::NotAnswering] {
            let check = mount(Some(status), "");
            assert_eq!((&check["ok"], &check["live"]), (&json!(false), &json!(false)));
        }
        assert_eq!(mount(None, "")["ok"], true, "a plain directory");
    }
}
