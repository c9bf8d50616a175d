//! `kcm status`: whether all is well, on one screen, in time.
//!
//! Owns the summary and what to do about each problem. Does not know the checks: those are of `kcm node-report`. Another
//! process reads the mount, and this one waits for a bounded time (`common/other_process`).

mod prometheus;
mod text;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Error};
use kcm_mount::model::cpuset::CpuSet;
use kcm_mount::mountpoint::{self, Status};
use serde::{Deserialize, Serialize};

use super::common::other_process::output_within;
use super::common::output::{json_text, print};
use super::install;
use super::node_report::{self, Examined};
use crate::cli;
use crate::confdir::{self, Pool};
use crate::host::Host;
use crate::service;
use crate::version::VERSION;

/// The exit status if no daemon serves the directory.
const NOT_RUNNING: u8 = 3;
/// This part of the time is kept for a last question to the mount.
const LAST_QUESTION: u32 = 4;
/// What stands for waiting without limit.
const LONG: Duration = Duration::from_secs(3600);

/// The status as `--json` prints it.
#[derive(Debug, Serialize, Deserialize)]
struct Report {
    /// The checks that were done.
    #[serde(skip)]
    checks: BTreeSet<String>,
    /// The metrics of the daemon.
    #[serde(skip)]
    metrics: String,
    /// Warnings of checks, which are no problems.
    notes: Vec<Problem>,
    path: PathBuf,
    pools: BTreeMap<String, PoolReport>,
    problems: Vec<Problem>,
    /// How many claims of killed programs nobody has acknowledged; none if this user may not know.
    reclaimed: Option<usize>,
    /// Since when the daemon serves.
    since: Option<String>,
    state: State,
    /// The version of the daemon.
    version: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum State {
    Healthy,
    Problems,
    NotRunning,
    NotAnswering,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Problem {
    /// The check of node-report, or `checks`, `unit` or `version`.
    check: String,
    cure: String,
    problem: String,
}

/// A pool at a glance.
#[derive(Debug, Serialize, Deserialize)]
struct PoolReport {
    cpus: String,
    exclusive: bool,
    free: usize,
    isolated: bool,
    lists: usize,
    tasks: usize,
}

/// The part of a node report that is used here.
#[derive(Debug, Deserialize)]
struct Checks {
    checks: BTreeMap<String, Check>,
}

#[derive(Debug, Deserialize)]
struct Check {
    errors: Vec<String>,
    #[serde(default)]
    warnings: Vec<String>,
    since: Option<String>,
}

/// What the other process has found out.
enum Seen {
    Report(Report),
    /// The text for Prometheus.
    Metrics(String),
}

/// Prints the status.
pub(super) fn run(args: &cli::Status) -> Result<ExitCode, Error> {
    if args.look {
        let report = look(args)?;
        let text = if args.prometheus {
            prometheus::text(&report)?
        } else {
            json_text(&serde_json::to_value(report)?)
        };
        print(&text)?;
        return Ok(ExitCode::SUCCESS);
    }
    if args.alive {
        return Ok(alive(&args.dir.conf_dir, args.timeout.unwrap_or(LONG).min(LONG)));
    }
    // Without an answer, the other process has printed why.
    let Some(seen) = look_in_time(args)? else { return Ok(ExitCode::FAILURE) };
    if args.prometheus {
        print(&match seen {
            Seen::Report(report) => prometheus::text(&report)?,
            Seen::Metrics(text) => text,
        })?;
        return Ok(ExitCode::SUCCESS);
    }
    let Seen::Report(report) = seen else { return Ok(ExitCode::FAILURE) };
    let code = match report.state {
        State::Healthy => ExitCode::SUCCESS,
        State::Problems => ExitCode::FAILURE,
        State::NotRunning | State::NotAnswering => ExitCode::from(NOT_RUNNING),
    };
    print(&if args.json { json_text(&serde_json::to_value(report)?) } else { text::text(&report) })?;
    Ok(code)
}

/// Says whether a daemon serves the directory and answers. This looks at nothing else, so that it is cheap.
fn alive(conf_dir: &Path, most: Duration) -> ExitCode {
    match mountpoint::status_within(conf_dir, most) {
        Ok(Status::Live) => ExitCode::SUCCESS,
        Ok(Status::NotAnswering) => {
            log::error!("{}: kcm mount does not answer", conf_dir.display());
            ExitCode::from(NOT_RUNNING)
        }
        Ok(Status::Stale | Status::Marked | Status::Plain | Status::Absent) => {
            log::error!("{}: kcm mount is not running", conf_dir.display());
            ExitCode::from(NOT_RUNNING)
        }
        Err(error) => {
            log::error!("{}: {error}", conf_dir.display());
            ExitCode::from(NOT_RUNNING)
        }
    }
}

/// Looks in another process, and waits for it no longer than the user wants.
fn look_in_time(args: &cli::Status) -> Result<Option<Seen>, Error> {
    let (conf_dir, begun) = (&args.dir.conf_dir, Instant::now());
    let most = args.timeout.unwrap_or(LONG).min(LONG);
    let first = most - most / LAST_QUESTION;
    if let Some(report) = unserved(conf_dir, first) {
        return Ok(Some(Seen::Report(report)));
    }
    let mut command = Command::new("/proc/self/exe");
    command.args(std::env::args_os().skip(1)).arg("--look");
    let answer = output_within(command, first.saturating_sub(begun.elapsed()));
    match answer.context("no process can be started; look at the limits of this user")? {
        Some(text) if text.is_empty() => Ok(None),
        Some(text) if args.prometheus => Ok(Some(Seen::Metrics(text))),
        Some(text) => Ok(Some(Seen::Report(serde_json::from_str(&text)?))),
        None => {
            let late = "the checks take longer than --timeout; kcm node-report waits for them";
            let late = || Report::new(State::Problems, conf_dir, vec![Problem::new("checks", late)]);
            let report = unserved(conf_dir, most.saturating_sub(begun.elapsed())).unwrap_or_else(late);
            Ok(Some(Seen::Report(report)))
        }
    }
}

/// Returns the status if no daemon serves the directory, or none answers; `None` if one does, or if it is a plain directory
/// with pools.
fn unserved(conf_dir: &Path, most: Duration) -> Option<Report> {
    let path = conf_dir.display();
    let report = |state, message: &str| Report::new(state, conf_dir, vec![Problem::new("mount", message)]);
    let not_running = |why: &str| {
        let start = service::start_command(conf_dir);
        Some(report(State::NotRunning, &format!("{path}: {why}; start it: {start}")))
    };
    let has_pools = || fs::read_dir(conf_dir.join("pools")).is_ok_and(|mut pools| pools.next().is_some());
    match mountpoint::status_within(conf_dir, most) {
        Ok(Status::NotAnswering) => {
            let cure = "look at its log, and for stopped processes of it (ps -o pid,stat,args)";
            Some(report(State::NotAnswering, &format!("{path}: kcm mount does not answer; {cure}")))
        }
        Ok(Status::Stale | Status::Marked) => not_running("kcm mount is not running"),
        Ok(Status::Absent) => not_running("no such directory, so kcm mount is not running"),
        Ok(Status::Plain) if !has_pools() => not_running("no pools, and kcm mount is not running"),
        _ => None,
    }
}

/// Looks at a directory, which may take any time.
fn look(args: &cli::Status) -> Result<Report, Error> {
    let conf_dir = &args.dir.conf_dir;
    let host = Host::with_processes()?;
    let Examined { report, found } = node_report::examine(conf_dir, &args.kubelet, &args.pods, &host)?;
    let Checks { checks } = serde_json::from_value(report)?;
    let done = checks.keys().map(String::as_str).chain(["checks", "unit", "version"]);
    let done = done.map(str::to_owned).collect();
    let since = checks.get("mount").and_then(|mount| mount.since.clone());
    let of_checks = |messages: fn(&Check) -> &[String]| -> Vec<Problem> {
        let all =
            checks.iter().flat_map(|(check, result)| messages(result).iter().map(move |it| (check, it)));
        all.map(|(check, message)| Problem::new(check, message)).collect()
    };
    let mut problems = of_checks(|check| &check.errors);
    let notes = of_checks(|check| &check.warnings);
    let (dir, pools) = found?;
    let file = |name: &str| fs::read_to_string(conf_dir.join(name)).ok().filter(|_| dir.is_mounted());
    let version = file("info/version").map(|version| version.trim().to_owned());
    problems.extend(out_of_step(conf_dir, version.as_deref()));
    let state = if problems.is_empty() { State::Healthy } else { State::Problems };
    let reclaimed = file("info/reclaimed").map(|text| text.lines().count());
    let metrics = file("info/metrics").unwrap_or_default();
    let pools = pools.iter().map(|(name, pool)| (name.clone(), PoolReport::new(pool))).collect();
    let report = Report::new(state, conf_dir, problems);
    Ok(Report { checks: done, metrics, notes, pools, reclaimed, since, version, ..report })
}

/// Returns a problem if the daemon or its unit is of another version than this program.
fn out_of_step(conf_dir: &Path, version: Option<&str>) -> Vec<Problem> {
    let mut problems = Vec::new();
    let unit = service::unit_of(conf_dir);
    if let Some(version) = version.filter(|version| *version != VERSION) {
        let upgrade = if unit.is_some() { "systemctl reload kcm" } else { "kcm mount --upgrade" };
        let message =
            format!("the daemon is kcm {version}, and this program {VERSION}; upgrade it: {upgrade}");
        problems.push(Problem::new("version", &message));
    }
    let Some(unit) = unit else { return problems };
    let text = fs::read_to_string(&unit).unwrap_or_default();
    let program = text.lines().find_map(|line| line.strip_prefix("ExecStart=\"")?.split('"').next());
    let program = program.map(|program| program.replace("%%", "%"));
    let expected = program.and_then(|program| install::unit_text(Path::new(&program)).ok());
    if expected.is_none_or(|expected| expected != text) {
        let message = format!(
            "{} is not the unit of this version; replace it: kcm install --systemd (changes of your own belong into a \
             drop-in: systemctl edit kcm)",
            unit.display()
        );
        problems.push(Problem::new("unit", &message));
    }
    problems
}

/// What to do about the errors of a check that do not say it.
fn cure(check: &str) -> &'static str {
    match check {
        "configDirectory" => "remove one of the lists with rmdir, or repair the file by hand",
        "cpus" => "bring them online: echo 1 > /sys/devices/system/cpu/cpu<n>/online",
        "intruders" => "end that process, let it claim, or pin it elsewhere: taskset -a -p -c <cpus> <pid>",
        "isolation" => "look at the cgroup that insists on the CPUs; the daemon tries again by itself",
        "kubelet" => "give these CPUs to the kubelet or to kcm, not to both",
        "masks" => "let the cpuset of its cgroup have the CPUs of the list",
        "siblings" => "make lists of whole cores",
        _ => "look at the log of kcm mount",
    }
}

impl Report {
    fn new(state: State, conf_dir: &Path, problems: Vec<Problem>) -> Self {
        let (path, pools, metrics) = (conf_dir.to_owned(), BTreeMap::new(), String::new());
        let checks = problems.iter().map(|problem| problem.check.clone()).collect();
        let notes = Vec::new();
        Self {
            checks,
            metrics,
            notes,
            path,
            pools,
            problems,
            reclaimed: None,
            since: None,
            state,
            version: None,
        }
    }
}

impl Problem {
    /// From a message `<what>; <cure>`, or from one without a cure.
    fn new(check: &str, message: &str) -> Self {
        let (problem, cure) = message.split_once("; ").unwrap_or_else(|| (message, cure(check)));
        Self { check: check.to_owned(), cure: cure.to_owned(), problem: problem.to_owned() }
    }
}

impl PoolReport {
    fn new(pool: &Pool) -> Self {
        let cpus = |list: &String| confdir::parse_cpu_list(list).unwrap_or_default();
        let all = pool.lists.keys().map(cpus).fold(CpuSet::new(), |all, cpus| all.union(&cpus));
        Self {
            cpus: all.to_string(),
            exclusive: pool.exclusive,
            free: pool
                .lists
                .iter()
                .filter(|(list, tasks)| tasks.is_empty() && !pool.draining.contains(*list))
                .count(),
            isolated: pool.isolated,
            lists: pool.lists.len(),
            tasks: pool.lists.values().map(Vec::len).sum(),
        }
    }

    /// The cells of its row, without the name.
    fn cells(&self) -> [String; 5] {
        let kind = match (self.exclusive, self.isolated) {
            (_, true) => "isolated",
            (true, false) => "exclusive",
            (false, false) => "shared",
        };
        let free = if self.exclusive { self.free.to_string() } else { "-".to_owned() };
        let cpus = if self.cpus.is_empty() { "-".to_owned() } else { self.cpus.clone() };
        [kind.to_owned(), self.lists.to_string(), free, self.tasks.to_string(), cpus]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_problem_says_what_to_do() {
        let with = Problem::new("masks", "1 (x) may run on 3; kcm reconcile --repair moves it back");
        assert_eq!(with.problem, "1 (x) may run on 3");
        assert_eq!(with.cure, "kcm reconcile --repair moves it back");
        let without = Problem::new("siblings", "CPU list a:0 shares a core with CPU 4, which is in no pool");
        assert_eq!(without.cure, "make lists of whole cores");
    }

    #[test]
    fn a_screen_has_pools_and_problems() {
        let pool = |exclusive, isolated, lists, cpus: &str| PoolReport {
            cpus: cpus.into(),
            exclusive,
            free: 1,
            isolated,
            lists,
            tasks: 1,
        };
        let pools = [("dp", pool(true, true, 2, "0-1")), ("infra", pool(false, false, 0, ""))];
        let report = Report {
            pools: pools.into_iter().map(|(name, pool)| (name.to_owned(), pool)).collect(),
            reclaimed: Some(2),
            version: Some("1.0".to_owned()),
            notes: vec![Problem::new("isolation", "y; do z")],
            ..Report::new(State::Problems, Path::new("/etc/kcm"), vec![Problem::new("siblings", "x")])
        };
        let expected = "\
/etc/kcm: served by kcm 1.0
POOL   KIND      LISTS  FREE  TASKS  CPUS
dp     isolated  2      1     1      0-1
infra  shared    0      -     1      -
1 problem:
siblings: x; make lists of whole cores
note: isolation: y; do z
2 claims were taken back from killed programs; kcm reconcile lists them.
";
        assert_eq!(text::text(&report), expected);
    }
}
