//! `kcm node-report`: whether this node is as it should be.
//!
//! Owns: the checks and their words. Must not know: where a report is sent.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Error, anyhow};
use kcm_mount::model::cpuset::{CpuId, CpuSet};
use kcm_mount::mountpoint::{self, Status};
use serde_json::{Value, json};

use super::common::interval;
use super::common::output::{json_text, print};
use super::describe;
use super::publish::Publisher;
use crate::cli;
use crate::confdir::{self, ConfDir, Pools};
use crate::host::Host;
use crate::kubernetes::objects::reports::{self, Kind};

/// Prints the report, once or on a beat.
pub(super) fn run(args: &cli::NodeReport) -> Result<ExitCode, Error> {
    let host = Host::from_env();
    let mut publisher = Publisher::new(Kind::Node, &args.publish, args.interval)?;
    interval::run(args.interval, || {
        let report = report(&args.dir.conf_dir, &args.kubelet_dir, &host)?;
        print(&json_text(&report))?;
        match &mut publisher {
            Some(publisher) => publisher.publish(&reports::node(&report)).map(|_| ()),
            None => Ok(()),
        }
    })
}

/// `{"checks": {<name>: {"ok", "errors"}}, "description": …, "topology": …}`.
pub(super) fn report(conf_dir: &Path, kubelet_dir: &Path, host: &Host) -> Result<Value, Error> {
    let topology = host.topology()?.report();
    // First, since this never hangs.
    let mount = mount(conf_dir);
    let read = match &mount {
        (Some(Status::NotAnswering), _) => Err(anyhow!("{}: does not answer", conf_dir.display())),
        _ => ConfDir::open(conf_dir).and_then(|dir| Ok((dir.pools()?, dir))),
    };
    let (pools, dir) = match read {
        Ok(read) => read,
        Err(error) => {
            log::debug!("{error:#}");
            let unreadable = check(vec!["Unable to read the KCM configuration directory".into()]);
            let checks = json!({ "configDirectory": unreadable, "mount": mount.1 });
            return Ok(json!({ "checks": checks, "description": null, "topology": topology }));
        }
    };
    let online = host.online()?;
    let checks = json!({
        "configDirectory": check(overlaps(&pools)),
        "cpus": check(offline(&pools, &online)),
        "intruders": check(intruders(&pools, &online, host)),
        "kubelet": check(kubelet(&pools, kubelet_dir)),
        "mount": mount.1,
    });
    Ok(json!({ "checks": checks, "description": describe::description(&dir, &pools), "topology": topology }))
}

fn check(errors: Vec<String>) -> Value {
    json!({ "ok": errors.is_empty(), "errors": errors })
}

/// Every list as `pool:list` with its CPUs, in the order of describe.
fn lists(pools: &Pools) -> impl Iterator<Item = (String, bool, &Vec<u32>, CpuSet)> {
    pools.iter().flat_map(|(name, pool)| {
        let cpus = |list: &String| confdir::parse_cpu_list(list).unwrap_or_default();
        pool.lists
            .iter()
            .map(move |(list, tasks)| (format!("{name}:{list}"), pool.exclusive, tasks, cpus(list)))
    })
}

/// Every pair of lists that share CPUs, once.
fn overlaps(pools: &Pools) -> Vec<String> {
    let all: Vec<_> = lists(pools).collect();
    let mut errors = Vec::new();
    for (index, (name, _, _, cpus)) in all.iter().enumerate() {
        for (other_name, _, _, other) in all.iter().skip(index + 1) {
            let both: Vec<u32> = cpus.intersection(other).iter().map(CpuId::get).collect();
            if !both.is_empty() {
                errors.push(format!(
                    "CPU list overlap detected in {name} and {other_name} (in both: {both:?})"
                ));
            }
        }
    }
    errors
}

fn offline(pools: &Pools, online: &CpuSet) -> Vec<String> {
    let offline = lists(pools).map(|(name, _, _, cpus)| (name, cpus.difference(online)));
    let offline = offline.filter(|(_, cpus)| !cpus.is_empty());
    offline.map(|(name, cpus)| format!("CPU list {name} has offline CPUs: {cpus}")).collect()
}

/// Processes with a thread whose mask lies wholly within an exclusive list, and that neither hold it nor
/// descend from one that does: somebody's taskset(1). Who may be on every CPU is pinned to none.
fn intruders(pools: &Pools, online: &CpuSet, host: &Host) -> Vec<String> {
    let exclusive: Vec<_> = lists(pools).filter(|(_, exclusive, ..)| *exclusive).collect();
    if exclusive.is_empty() {
        return Vec::new();
    }
    let home = |mask: &CpuSet| {
        let pinned = !mask.is_empty() && !online.is_subset(mask);
        exclusive.iter().find(|(.., cpus)| pinned && mask.is_subset(cpus))
    };
    let mut errors = Vec::new();
    for pid in host.user_processes() {
        let masks = host.thread_masks(pid);
        let found = masks.iter().find_map(|(tid, mask)| Some((tid, mask, home(mask)?)));
        let Some((tid, mask, (name, _, holders, _))) = found else { continue };
        let mut line = std::iter::successors(Some(pid), |&pid| host.parent(pid));
        if line.any(|pid| holders.contains(&pid)) {
            continue;
        }
        // One that has died meanwhile has no name.
        if let Some(program) = host.program_name(pid) {
            let thread = if *tid == pid { String::new() } else { format!("thread {tid} of ") };
            errors.push(format!(
                "{thread}{pid} ({program}) is pinned to {mask}, within CPU list {name}, without a claim"
            ));
        }
    }
    errors
}

/// What the kubelet's static CPU manager hands out, or may hand out, of the pools.
fn kubelet(pools: &Pools, kubelet_dir: &Path) -> Vec<String> {
    let file = kubelet_dir.join("cpu_manager_state");
    let Ok(text) = fs::read(&file) else { return Vec::new() };
    let Ok(state) = serde_json::from_slice::<Value>(&text) else {
        return vec![format!("{}: not JSON", file.display())];
    };
    let cpus =
        |value: &Value| value.as_str().and_then(|text| text.parse::<CpuSet>().ok()).unwrap_or_default();
    let mut errors = Vec::new();
    let entries = state.get("entries").and_then(Value::as_object).into_iter().flatten();
    for (pod, containers) in entries {
        for (container, given) in containers.as_object().into_iter().flatten() {
            for (name, _, _, list) in lists(pools) {
                let both = list.intersection(&cpus(given));
                if !both.is_empty() {
                    errors.push(format!(
                        "the kubelet has given CPU {both} of {name} to {container} of pod {pod}"
                    ));
                }
            }
        }
    }
    if state.get("policyName").and_then(Value::as_str) == Some("static") {
        let may = state.get("defaultCpuSet").map(cpus).unwrap_or_default();
        for (name, exclusive, _, list) in lists(pools) {
            let both = list.intersection(&may);
            if exclusive && !both.is_empty() {
                errors.push(format!(
                    "the kubelet may use CPU {both} of {name}; name it in reservedSystemCPUs, with strict-cpu-reservation"
                ));
            }
        }
    }
    errors
}

/// Whether the directory is live, since when, and whether the daemon had to leave a part of its state aside.
fn mount(conf_dir: &Path) -> (Option<Status>, Value) {
    let status = mountpoint::status(conf_dir).ok();
    let live = status == Some(Status::Live);
    let metrics = fs::read_to_string(conf_dir.join("info/metrics")).ok().filter(|_| live).unwrap_or_default();
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
        humantime::format_rfc3339_seconds(time).to_string()
    });
    let mut check = check(error.into_iter().collect());
    if let Some(fields) = check.as_object_mut() {
        fields.insert("live".into(), json!(live));
        fields.insert("since".into(), json!(since));
    }
    (status, check)
}
