//! `kcm reconcile`: claims taken back from the dead, and threads that have left their list.
//!
//! Owns: the report of 2017. On the mount the daemon has done the taking back, and the report passes on what
//! it tells; on a plain directory it is done here, under the lock. Must not know: how the dead are noticed by
//! the daemon.

use std::fs::{self, OpenOptions};
use std::io::{Read as _, Write as _};
use std::process::ExitCode;

use anyhow::{Context as _, Error, anyhow};
use kcm_mount::affinity;
use kcm_mount::model::cpuset::{CpuId, CpuSet};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::{beat, describe};
use crate::cli;
use crate::confdir::{self, ConfDir, Pools};
use crate::host::Host;

/// What is printed. Fields are in the order of their names.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Report {
    mismatched_cpu_masks: Vec<Mismatch>,
    reclaimed_cpu_lists: Vec<Reclaimed>,
}

/// A thread whose mask is not within the list of its task.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Mismatch {
    actual_cpus: Vec<u32>,
    cpus: String,
    /// Of the thread.
    pid: u32,
    pool: String,
}

/// A claim taken back.
#[derive(Debug, Deserialize, Serialize)]
struct Reclaimed {
    cpus: String,
    pid: u32,
    pool: String,
}

/// A line of `info/reclaimed`.
#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Reclaimed {
        seq: u64,
        #[serde(flatten)]
        reclaimed: Reclaimed,
    },
    Dropped {
        dropped: u64,
    },
}

/// Prints the report, once or on a beat.
pub(super) fn run(args: &cli::Reconcile) -> Result<ExitCode, Error> {
    let host = Host::from_env();
    beat::run(args.interval, || {
        let dir = ConfDir::open(&args.dir.conf_dir)?;
        if dir.is_mounted() {
            reconcile_mount(&dir, &host, args.repair)
        } else {
            reconcile_plain(&dir, &host, args.repair)
        }
    })
}

fn reconcile_mount(dir: &ConfDir, host: &Host, repair: bool) -> Result<(), Error> {
    let mismatched = mismatches(dir, host, &dir.pools()?, repair)?;
    let file = dir.path().join("info/reclaimed");
    let opened = OpenOptions::new().read(true).write(true).open(&file);
    let opened = opened.map_err(|error| confdir::refused(&file, error))?;
    // Between reading and acknowledging nobody else may tell of the same claims.
    let mut reclaimed = Flock::lock(opened, FlockArg::LockExclusive)
        .map_err(|(_, errno)| confdir::refused(&file, errno.into()))?;
    let mut text = String::new();
    reclaimed.read_to_string(&mut text).map_err(|error| confdir::refused(&file, error))?;
    let (mut lists, mut last) = (Vec::new(), None);
    for line in text.lines() {
        match serde_json::from_str(line).with_context(|| format!("{}: {line:?}", file.display()))? {
            Line::Reclaimed { seq, reclaimed } => {
                last = last.max(Some(seq));
                lists.push(reclaimed);
            }
            Line::Dropped { dropped } => {
                log::warn!(
                    "{dropped} reclaimed claims were forgotten before anybody asked; reconcile more often"
                );
            }
        }
    }
    print(&Report { mismatched_cpu_masks: mismatched, reclaimed_cpu_lists: lists })?;
    match last {
        None => Ok(()),
        Some(seq) => {
            reclaimed.write_all(seq.to_string().as_bytes()).map_err(|error| confdir::refused(&file, error))
        }
    }
}

fn reconcile_plain(dir: &ConfDir, host: &Host, repair: bool) -> Result<(), Error> {
    let reclaimed = reclaim(dir, host)?;
    let mismatched = mismatches(dir, host, &dir.pools()?, repair)?;
    print(&Report { mismatched_cpu_masks: mismatched, reclaimed_cpu_lists: reclaimed })
}

/// Takes the PIDs off of which procfs knows nothing.
fn reclaim(dir: &ConfDir, host: &Host) -> Result<Vec<Reclaimed>, Error> {
    host.own_pid()?;
    let _lock = dir.lock()?;
    let mut reclaimed = Vec::new();
    for (pool, lists) in dir.pools()? {
        for (list, tasks) in lists.lists {
            let dead: Vec<u32> = tasks.into_iter().filter(|&pid| !host.is_alive(pid)).collect();
            if dead.is_empty() {
                continue;
            }
            confdir::change_tasks(&dir.tasks(&pool, &list), |tasks| tasks.retain(|pid| !dead.contains(pid)))?;
            reclaimed.extend(dead.into_iter().map(|pid| Reclaimed {
                cpus: list.clone(),
                pid,
                pool: pool.clone(),
            }));
        }
    }
    Ok(reclaimed)
}

/// Every thread outside the list of its task. `repair`: those are brought back.
fn mismatches(dir: &ConfDir, host: &Host, pools: &Pools, repair: bool) -> Result<Vec<Mismatch>, Error> {
    let mut found = Vec::new();
    for (pool, lists) in pools {
        for (list, tasks) in &lists.lists {
            let Some(cpus) = confdir::cpus(list) else { continue };
            for &pid in tasks {
                let outside = threads_outside(host, pid, &cpus);
                // It may have moved or died since the list was read: then that was no mismatch.
                if outside.is_empty() || !confdir::read_tasks(&dir.tasks(pool, list))?.contains(&pid) {
                    continue;
                }
                if repair {
                    bring_back(dir, host, pool, list, pid, &outside)?;
                }
                found.extend(outside.into_iter().map(|(tid, mask)| Mismatch {
                    actual_cpus: mask.iter().map(CpuId::get).collect(),
                    cpus: list.clone(),
                    pid: tid,
                    pool: pool.clone(),
                }));
            }
        }
    }
    Ok(found)
}

fn threads_outside(host: &Host, pid: u32, cpus: &CpuSet) -> Vec<(u32, CpuSet)> {
    let masks = host.thread_masks(pid).into_iter();
    masks.filter(|(_, mask)| !mask.is_subset(cpus)).collect()
}

/// On the mount the daemon does it: a repeated claim changes only the threads that have left the list.
fn bring_back(
    dir: &ConfDir,
    host: &Host,
    pool: &str,
    list: &str,
    pid: u32,
    outside: &[(u32, CpuSet)],
) -> Result<(), Error> {
    if host.own_pid()? != std::process::id() {
        return Err(anyhow!(
            "cannot repair {pid}: it has another number in our PID namespace; run in the host's"
        ));
    }
    let file = dir.tasks(pool, list);
    if dir.is_mounted() {
        return dir.explained(&file, || fs::write(&file, pid.to_string()));
    }
    let cpus = list.parse().with_context(|| format!("{list}: not a CPU list"))?;
    for (tid, _) in outside {
        match affinity::set(*tid, &cpus) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            result => {
                result.with_context(|| format!("thread {tid} cannot be brought back to {pool} {list}"))?
            }
        }
    }
    Ok(())
}

fn print(report: &Report) -> Result<(), Error> {
    super::print(&describe::to_text(&serde_json::to_value(report)?))
}
