//! `kcm reconcile`: reports reclaimed claims, and threads that have left their list.
//!
//! Owns the legacy report. On a mount the daemon has reclaimed, and this command prints and acknowledges
//! `info/reclaimed`; on a plain directory it reclaims itself, under the lock. Does not know how the daemon notices that
//! a task has died.
//!
//! A published report has more sources than the printed one (`reclaims`): `info/reclaimed` has each reclaim for one
//! reader only, so another person's `kcm reconcile` would be missing in what is published; `info/events` has the reclaims
//! for every reader, but only the newest events.

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

use super::common::interval;
use super::common::periodic::Printer;
use super::publish::Publisher;
use super::reclaims::Reclaims;
use crate::cli;
use crate::confdir::{self, ConfDir, Pools};
use crate::host::Host;
use crate::kubernetes::objects::reports::{NotIsolated, Reclaim};

/// How often, and after which delay, strays are checked again. A claim changes the mask and the list one after the
/// other, so that a task in the middle of it looks like a stray for a moment.
const RECHECKS: usize = 2;
const RECHECK_DELAY: Duration = Duration::from_millis(25);

/// The field of the report that has news only: each reclaim is in one report.
const RECLAIMED: &str = "reclaimedCpuLists";

/// The printed report. Fields are in the order of their names.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Report {
    mismatched_cpu_masks: Vec<Mismatch>,
    /// Not known to the legacy report, and left out if it is empty.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_isolated: Vec<NotIsolated>,
    reclaimed_cpu_lists: Vec<Reclaimed>,
}

/// A thread whose mask is not within the list of its task.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Mismatch {
    actual_cpus: Vec<u32>,
    cpus: String,
    /// The thread's ID.
    pid: u32,
    pool: String,
}

/// A reclaimed claim, as it is printed.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Reclaimed {
    cpus: String,
    pid: i64,
    pool: String,
}

impl From<&Reclaim> for Reclaimed {
    fn from(reclaim: &Reclaim) -> Self {
        Self { cpus: reclaim.cpus.clone(), pid: reclaim.pid, pool: reclaim.pool.clone() }
    }
}

/// A line of `info/reclaimed`.
#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Dropped { dropped: u64 },
    Reclaim(Reclaim),
}

/// The threads of one task that are outside its list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Strays {
    pub(super) pool: String,
    pub(super) list: String,
    cpus: CpuSet,
    /// The task's PID.
    pub(super) pid: u32,
    /// Thread IDs and affinities.
    pub(super) threads: Vec<(u32, CpuSet)>,
}

/// The content of `info/reclaimed`.
#[derive(Debug, Default)]
struct ReclaimedFile {
    /// All reclaims, for publication.
    all: Vec<Reclaim>,
    /// The reclaims that were not printed before.
    new: Vec<Reclaimed>,
    /// The number to acknowledge.
    last: Option<i64>,
    /// How many reclaims the daemon has dropped.
    dropped: u64,
}

/// The result of one run.
struct Outcome {
    /// As it was printed.
    report: Value,
    /// The reclaims for publication, with their times.
    reclaimed: Vec<Reclaim>,
    /// An error if a stray could not be moved back.
    repaired: Result<(), Error>,
}

/// Prints the report, once or periodically.
pub(super) fn run(args: &cli::Reconcile) -> Result<ExitCode, Error> {
    let host = Host::with_processes()?;
    let mut unacknowledged = Vec::new();
    let publisher = Publisher::new(&args.publish, args.interval)?;
    let mut reclaims = publisher.map(Reclaims::new);
    let mut printer = Printer::new(args.interval);
    interval::run(args.interval, || {
        let dir = ConfDir::open(&args.dir.conf_dir)?;
        if args.repair && host.own_pid()? != std::process::id() {
            bail!("cannot repair: KCM_PROC_FS shows another PID namespace than ours; run in the host's");
        }
        let outcome = if dir.is_mounted() {
            reconcile_mount(&dir, &host, args.repair, &mut printer, &mut unacknowledged)?
        } else {
            reconcile_plain(&dir, &host, args.repair, &mut printer)?
        };
        if let Some(reclaims) = &mut reclaims {
            reclaims.publish(&dir, &outcome.report, outcome.reclaimed)?;
        }
        outcome.repaired
    })
}

/// `unacknowledged`: the lines that an earlier run has printed but could not acknowledge, because the mount went away.
/// They are still in the file when the mount is back.
fn reconcile_mount(
    dir: &ConfDir,
    host: &Host,
    repair: bool,
    printer: &mut Printer,
    unacknowledged: &mut Vec<String>,
) -> Result<Outcome, Error> {
    let pools = dir.find()?.pools;
    let (mismatched, repaired) = mismatches(dir, host, &pools, repair)?;
    let path = dir.path().join("info/reclaimed");
    let opened = OpenOptions::new().read(true).write(true).open(&path);
    dir.check_mounted()?;
    let mut file = opened.map_err(|error| confdir::file_error(&path, error))?;
    // Another reconcile must not print the same reclaims between our read and our acknowledgement.
    confdir::lock_file(&path, &file)?;
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(|error| confdir::file_error(&path, error))?;
    let ReclaimedFile { all, new, last, dropped } =
        parse_reclaimed(&text, unacknowledged).with_context(|| path.display().to_string())?;
    if dropped > 0 {
        log::warn!("{dropped} reclaims were dropped before they were reported; run reconcile more often");
    }
    let (mismatched_cpu_masks, not_isolated) = (mismatched, not_isolated(dir, &pools));
    let report = print(printer, Report { mismatched_cpu_masks, not_isolated, reclaimed_cpu_lists: new })?;
    if let Some(seq) = last {
        *unacknowledged = text.lines().map(str::to_owned).collect();
        log::debug!("{}: acknowledging up to {seq}", path.display());
        file.write_all(seq.to_string().as_bytes()).map_err(|error| confdir::file_error(&path, error))?;
    }
    unacknowledged.clear();
    Ok(Outcome { report, reclaimed: all, repaired })
}

/// Parses `info/reclaimed`. `printed`: the lines whose reclaims are not new.
fn parse_reclaimed(text: &str, printed: &[String]) -> Result<ReclaimedFile, Error> {
    let mut file = ReclaimedFile::default();
    for line in text.lines() {
        match serde_json::from_str(line).with_context(|| format!("{line:?}"))? {
            Line::Dropped { dropped } => file.dropped += dropped,
            Line::Reclaim(reclaim) => {
                file.last = file.last.max(reclaim.seq);
                if !printed.iter().any(|printed| printed == line) {
                    file.new.push(Reclaimed::from(&reclaim));
                }
                file.all.push(reclaim);
            }
        }
    }
    Ok(file)
}

fn reconcile_plain(
    dir: &ConfDir,
    host: &Host,
    repair: bool,
    printer: &mut Printer,
) -> Result<Outcome, Error> {
    let reclaimed = reclaim(dir, host)?;
    let (mismatched, repaired) = mismatches(dir, host, &dir.find()?.pools, repair)?;
    let reclaimed_cpu_lists = reclaimed.iter().map(Reclaimed::from).collect();
    let report = Report { mismatched_cpu_masks: mismatched, reclaimed_cpu_lists, ..Report::default() };
    let report = print(printer, report)?;
    Ok(Outcome { report, reclaimed, repaired })
}

/// Removes the PIDs of dead tasks from the lists of a plain directory.
fn reclaim(dir: &ConfDir, host: &Host) -> Result<Vec<Reclaim>, Error> {
    // Without procfs every task would seem dead.
    host.check_namespace()?;
    let _lock = dir.lock()?;
    let time = daemon::timestamp();
    let mut reclaimed = Vec::new();
    for (pool, content) in dir.find()?.warned() {
        for (list, tasks) in content.lists {
            let dead: Vec<u32> = tasks.into_iter().filter(|&pid| !host.is_alive(pid)).collect();
            if dead.is_empty() {
                continue;
            }
            if let Err(error) =
                dir.change_tasks(&pool, &list, |tasks| tasks.retain(|pid| !dead.contains(pid)))
            {
                // The other lists are not to blame.
                log::error!("{error:#}");
                continue;
            }
            reclaimed.extend(dead.into_iter().map(|pid| Reclaim {
                seq: None,
                time: time.clone(),
                cpus: list.clone(),
                pid: pid.into(),
                pool: pool.clone(),
            }));
        }
    }
    // As in the legacy report.
    reclaimed.sort_by_key(|reclaim| reclaim.pid);
    Ok(reclaimed)
}

/// Returns every thread outside the list of its task. With `repair`, moves them back; the second value is an error if
/// that failed for any of them.
fn mismatches(
    dir: &ConfDir,
    host: &Host,
    pools: &Pools,
    repair: bool,
) -> Result<(Vec<Mismatch>, Result<(), Error>), Error> {
    let mut all = strays(dir, host, pools);
    for _ in 0..RECHECKS {
        if all.is_empty() {
            break;
        }
        thread::sleep(RECHECK_DELAY);
        all = in_both(&all, strays(dir, host, &dir.find()?.pools));
    }
    let mut repaired = Ok(());
    for strays in all.iter().filter(|_| repair) {
        if let Err(error) = move_back(dir, host, strays) {
            // Every error is logged, and the last one is returned.
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

fn not_isolated(dir: &ConfDir, pools: &Pools) -> Vec<NotIsolated> {
    let lists = dir.not_isolated(pools);
    lists
        .map(|(pool, cpus, reason)| NotIsolated { cpus: cpus.to_owned(), pool: pool.to_owned(), reason })
        .collect()
}

/// Returns those threads of `now` that are also in `earlier`, outside the same list.
pub(super) fn in_both(earlier: &[Strays], mut now: Vec<Strays>) -> Vec<Strays> {
    now.retain_mut(|now| {
        let is_same = |was: &&Strays| (was.pid, &was.pool, &was.list) == (now.pid, &now.pool, &now.list);
        let was = earlier.iter().find(is_same).map_or(&[][..], |was| &was.threads);
        now.threads.retain(|(tid, _)| was.iter().any(|(was, _)| was == tid));
        !now.threads.is_empty()
    });
    now
}

/// Returns the strays of these pools at this moment.
pub(super) fn strays(dir: &ConfDir, host: &Host, pools: &Pools) -> Vec<Strays> {
    let mut all = Vec::new();
    // Damaged lists were named when the reclaims were looked for.
    for (pool, content) in pools {
        for (list, tasks) in &content.lists {
            let Some(cpus) = confdir::parse_cpu_list(list) else { continue };
            for &pid in tasks {
                let masks = host.thread_masks(pid).into_iter();
                let threads: Vec<_> = masks.filter(|(_, mask)| !mask.is_subset(&cpus)).collect();
                // The task may have moved since the list was read.
                let is_still_listed = || dir.read_tasks(pool, list).is_ok_and(|now| now.contains(&pid));
                if !threads.is_empty() && is_still_listed() {
                    let (pool, list, cpus) = (pool.clone(), list.clone(), cpus.clone());
                    all.push(Strays { pool, list, cpus, pid, threads });
                }
            }
        }
    }
    // As in the legacy report.
    all.sort_by_key(|strays| strays.pid);
    all
}

/// Moves strays back to their list. On a mount, the daemon does it: a repeated claim changes only the threads that have
/// left the list. It is written to the pool's file, so that a task that has moved in the meantime keeps its new list.
fn move_back(dir: &ConfDir, host: &Host, strays: &Strays) -> Result<(), Error> {
    let Strays { pool, list, cpus, pid, threads } = strays;
    let context = || format!("{pid} cannot be moved back to {pool} {list}");
    log::debug!("moving {} threads of {pid} back to {pool} {list}", threads.len());
    if dir.is_mounted() {
        let file = dir.pool(pool).join("tasks");
        let written = dir.with_reason(&file, || fs::write(&file, pid.to_string()));
        // A task that has exited needs no repair.
        return written
            .or_else(|error| if host.is_alive(*pid) { Err(error) } else { Ok(()) })
            .with_context(context);
    }
    for (tid, _) in threads {
        match affinity::set(*tid, cpus) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            result => result.with_context(context)?,
        }
    }
    Ok(())
}

/// Prints the report, and returns it as it was printed.
fn print(printer: &mut Printer, report: Report) -> Result<Value, Error> {
    let report = serde_json::to_value(report)?;
    printer.print(&report, &[RECLAIMED])?;
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strays(pid: u32, list: &str, threads: &[u32]) -> Strays {
        let threads = threads.iter().map(|&tid| (tid, "7".parse().unwrap())).collect();
        Strays { pool: "p".into(), list: list.into(), cpus: list.parse().unwrap(), pid, threads }
    }

    #[test]
    fn only_threads_that_stay_outside_are_strays() {
        let earlier = [strays(1, "0", &[1, 2]), strays(5, "1", &[5])];
        let now = vec![strays(1, "0", &[2, 3]), strays(5, "2", &[5]), strays(9, "3", &[9])];
        // Thread 1 is back, thread 3 and task 9 are new, task 5 has moved to another list.
        assert_eq!(in_both(&earlier, now), [strays(1, "0", &[2])]);
    }

    const LINES: &str = r#"{"dropped":3}
{"seq":5,"time":"t5","pool":"p","cpus":"0","pid":11}
{"seq":8,"time":"t8","pool":"p","cpus":"1","pid":12}
"#;

    #[test]
    fn each_line_of_the_file_is_reported_and_published() {
        let file = parse_reclaimed(LINES, &[]).unwrap();
        assert_eq!((file.last, file.dropped, file.all.len()), (Some(8), 3, 2));
        let pids: Vec<i64> = file.new.iter().map(|reclaimed| reclaimed.pid).collect();
        assert_eq!(pids, [11, 12]);
    }

    #[test]
    fn a_line_that_was_printed_is_acknowledged_but_not_printed_again() {
        let printed: Vec<String> = LINES.lines().take(2).map(String::from).collect();
        let file = parse_reclaimed(LINES, &printed).unwrap();
        let pids: Vec<i64> = file.new.iter().map(|reclaimed| reclaimed.pid).collect();
        assert_eq!((pids, file.last, file.all.len()), (vec![12], Some(8), 2));
    }

    #[test]
    fn a_line_that_cannot_be_parsed_is_in_the_error() {
        let error = format!("{:#}", parse_reclaimed("{\"seq\":1}\n", &[]).unwrap_err());
        assert!(error.contains(r#"{\"seq\":1}"#), "{error}");
        assert_eq!(parse_reclaimed("", &[]).unwrap().last, None);
    }
}
