//! `kcm reconcile`: claims taken back from the dead, and threads that have left their list.
//!
//! Owns: the report of 2017. On the mount the daemon has done the taking back, and the report passes on what
//! it tells; on a plain directory it is done here, under the lock. Must not know: how the dead are noticed by
//! the daemon.

use std::fs::{self, OpenOptions};
use std::io::{Read as _, Write as _};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Error, bail};
use kcm_mount::affinity;
use kcm_mount::daemon;
use kcm_mount::model::cpuset::{CpuId, CpuSet};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::common::{interval, output};
use super::publish::Publisher;
use super::reclaims::Reclaims;
use crate::cli;
use crate::confdir::{self, ConfDir};
use crate::host::Host;
use crate::kubernetes::objects::reports::Reclaim;

/// A task may be on its way: from its mask to its claim, or from its claim to its mask. So often, and after so
/// long, a stray is looked at again.
const LOOKS: usize = 2;
const ON_ITS_WAY: Duration = Duration::from_millis(25);

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

/// Threads outside the list of their task, and where they belong.
struct Strays {
    pool: String,
    list: String,
    cpus: CpuSet,
    /// The task.
    pid: u32,
    threads: Vec<(u32, CpuSet)>,
}

/// What one run has come to.
struct Done {
    /// As it was printed.
    report: Value,
    /// The reclaims that it tells of, with their times.
    reclaimed: Vec<Reclaim>,
    repaired: Result<(), Error>,
}

/// Prints the report, once or on a beat.
pub(super) fn run(args: &cli::Reconcile) -> Result<ExitCode, Error> {
    let host = Host::from_env();
    let mut told = Vec::new();
    let publisher = Publisher::new(&args.publish, args.interval)?;
    let mut reclaims = publisher.map(Reclaims::new);
    interval::run(args.interval, || {
        let dir = ConfDir::open(&args.dir.conf_dir)?;
        if args.repair && host.own_pid()? != std::process::id() {
            bail!("cannot repair: KCM_PROC_FS shows another PID namespace than ours; run in the host's");
        }
        let done = if dir.is_mounted() {
            reconcile_mount(&dir, &host, args.repair, &mut told)?
        } else {
            reconcile_plain(&dir, &host, args.repair)?
        };
        if let Some(reclaims) = &mut reclaims {
            reclaims.publish(&dir, &done.report, done.reclaimed)?;
        }
        done.repaired
    })
}

/// `told`: the lines that were printed and could not be acknowledged, because the mount went away. They are
/// there again when it is back.
fn reconcile_mount(dir: &ConfDir, host: &Host, repair: bool, told: &mut Vec<String>) -> Result<Done, Error> {
    let (mismatched, repaired) = mismatches(dir, host, repair)?;
    let file = dir.path().join("info/reclaimed");
    let opened = OpenOptions::new().read(true).write(true).open(&file);
    dir.check_mounted()?;
    let opened = opened.map_err(|error| confdir::file_error(&file, error))?;
    // Between reading and acknowledging nobody else may tell of the same claims.
    confdir::lock_file(&file, &opened)?;
    let mut reclaimed = opened;
    let mut text = String::new();
    reclaimed.read_to_string(&mut text).map_err(|error| confdir::file_error(&file, error))?;
    let (mut lists, mut dated, mut last) = (Vec::new(), Vec::new(), None);
    for line in text.lines() {
        match serde_json::from_str(line).with_context(|| format!("{}: {line:?}", file.display()))? {
            Line::Reclaimed { seq, reclaimed } => {
                last = last.max(Some(seq));
                if !told.iter().any(|told| told == line) {
                    lists.push(reclaimed);
                }
                dated.push(serde_json::from_str(line)?);
            }
            Line::Dropped { dropped } => {
                log::warn!(
                    "{dropped} reclaimed claims were forgotten before anybody asked; reconcile more often"
                );
            }
        }
    }
    let report = print(mismatched, lists)?;
    if let Some(seq) = last {
        *told = text.lines().map(str::to_owned).collect();
        reclaimed.write_all(seq.to_string().as_bytes()).map_err(|error| confdir::file_error(&file, error))?;
    }
    told.clear();
    Ok(Done { report, reclaimed: dated, repaired })
}

fn reconcile_plain(dir: &ConfDir, host: &Host, repair: bool) -> Result<Done, Error> {
    let reclaimed = reclaim(dir, host)?;
    let (mismatched, repaired) = mismatches(dir, host, repair)?;
    let time = daemon::timestamp();
    let date = |Reclaimed { cpus, pid, pool }: &Reclaimed| Reclaim {
        seq: None,
        time: time.clone(),
        cpus: cpus.clone(),
        pid: (*pid).into(),
        pool: pool.clone(),
    };
    let dated = reclaimed.iter().map(date).collect();
    Ok(Done { report: print(mismatched, reclaimed)?, reclaimed: dated, repaired })
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

/// Every thread outside the list of its task, and, with `repair`, whether all of them could be brought back.
fn mismatches(dir: &ConfDir, host: &Host, repair: bool) -> Result<(Vec<Mismatch>, Result<(), Error>), Error> {
    let mut all = strays(dir, host)?;
    for _ in 0..LOOKS {
        if all.is_empty() {
            break;
        }
        thread::sleep(ON_ITS_WAY);
        let earlier = std::mem::replace(&mut all, strays(dir, host)?);
        all.retain_mut(|now| {
            let is_same = |was: &&Strays| (was.pid, &was.pool, &was.list) == (now.pid, &now.pool, &now.list);
            let was = earlier.iter().find(is_same).map_or(&[][..], |was| &was.threads);
            now.threads.retain(|(tid, _)| was.iter().any(|(was, _)| was == tid));
            !now.threads.is_empty()
        });
    }
    let mut repaired = Ok(());
    for strays in all.iter().filter(|_| repair) {
        if let Err(error) = bring_back(dir, host, strays) {
            // All of them are told of; the last one gives the status.
            if let Err(earlier) = std::mem::replace(&mut repaired, Err(error)) {
                log::error!("{earlier:#}");
            }
        }
    }
    let mismatches = all.into_iter().flat_map(|Strays { pool, list, threads, .. }| {
        threads.into_iter().map(move |(tid, mask)| Mismatch {
            actual_cpus: mask.iter().map(CpuId::get).collect(),
            cpus: list.clone(),
            pid: tid,
            pool: pool.clone(),
        })
    });
    Ok((mismatches.collect(), repaired))
}

fn strays(dir: &ConfDir, host: &Host) -> Result<Vec<Strays>, Error> {
    let mut all = Vec::new();
    for (pool, content) in dir.pools()? {
        for (list, tasks) in content.lists {
            let Some(cpus) = confdir::parse_cpu_list(&list) else { continue };
            for pid in tasks {
                let masks = host.thread_masks(pid).into_iter();
                let threads: Vec<_> = masks.filter(|(_, mask)| !mask.is_subset(&cpus)).collect();
                // It may have moved since the list was read.
                let is_here =
                    || confdir::read_tasks(&dir.tasks(&pool, &list)).is_ok_and(|now| now.contains(&pid));
                if !threads.is_empty() && is_here() {
                    let (pool, list, cpus) = (pool.clone(), list.clone(), cpus.clone());
                    all.push(Strays { pool, list, cpus, pid, threads });
                }
            }
        }
    }
    Ok(all)
}

/// On the mount the daemon does it: a repeated claim changes only the threads that have left the list. It is
/// made in the pool, where a task that has moved meanwhile keeps its new list.
fn bring_back(dir: &ConfDir, host: &Host, strays: &Strays) -> Result<(), Error> {
    let Strays { pool, list, cpus, pid, threads } = strays;
    let what = || format!("{pid} cannot be brought back to {pool} {list}");
    if dir.is_mounted() {
        let file = dir.pool(pool).join("tasks");
        let written = dir.with_reason(&file, || fs::write(&file, pid.to_string()));
        return written
            .or_else(|error| if host.is_alive(*pid) { Err(error) } else { Ok(()) })
            .with_context(what);
    }
    for (tid, _) in threads {
        match affinity::set(*tid, cpus) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            result => result.with_context(what)?,
        }
    }
    Ok(())
}

fn print(mismatched: Vec<Mismatch>, reclaimed: Vec<Reclaimed>) -> Result<Value, Error> {
    let report = Report { mismatched_cpu_masks: mismatched, reclaimed_cpu_lists: reclaimed };
    let report = serde_json::to_value(report)?;
    output::print(&output::json_text(&report))?;
    Ok(report)
}
