//! The process that looks: it reads pools, processes and the machine, once for each line of its standard input.
//!
//! Owns the order of the reading, and since when a task has its list. Does not know the screen. It may hang with the mount;
//! the process that shows does not.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Error;
use serde::Deserialize;

use super::meter::{Measured, Meter};
use super::sample::{Answer, Intruder, List, Sample, Stray, Task};
use crate::cli;
use crate::commands::common::output::{display_error, print};
use crate::commands::node_report::intruders;
use crate::commands::{describe, reconcile};
use crate::confdir::{self, ConfDir, Pools};
use crate::host::{self, Host};

/// Strays and intruders are looked for again after this many times the time that it took: at most a twentieth of a CPU.
const REST: u32 = 20;

/// A claim: pool, list and PID.
type Claim = (String, String, u32);

/// Since when a task has its list.
#[derive(Clone, Copy)]
enum Since {
    /// The time of the event.
    Claimed(SystemTime),
    /// When it was first seen, or earlier.
    Seen(Instant),
}

/// The process that looks, and its memory.
struct Looker {
    conf_dir: PathBuf,
    interval: Duration,
    /// Open while a daemon serves it.
    dir: Option<ConfDir>,
    host: Option<Host>,
    meter: Meter,
    since: HashMap<Claim, Since>,
    found: Found,
}

/// Strays and intruders.
#[derive(Default)]
struct Found {
    intruders: Vec<Intruder>,
    strays: Vec<Stray>,
    /// All threads outside their list, for the next comparison.
    outside: Vec<reconcile::Strays>,
    next: Option<Instant>,
}

/// A line of `info/events`.
#[derive(Deserialize)]
struct Event {
    event: String,
    time: String,
    pool: String,
    cpus: String,
    pid: u32,
}

/// Answers each line of standard input with a line of JSON.
pub(super) fn run(args: &cli::Top) -> Result<ExitCode, Error> {
    let mut looker = Looker {
        conf_dir: args.dir.conf_dir.clone(),
        interval: args.interval,
        dir: None,
        host: None,
        meter: Meter::default(),
        since: HashMap::new(),
        found: Found::default(),
    };
    for line in io::stdin().lines() {
        line?;
        let answer = match looker.look() {
            Ok(sample) => Answer::Sample(Box::new(sample)),
            Err(error) => Answer::Error(display_error(&error).unwrap_or_default()),
        };
        print(&(serde_json::to_string(&answer)? + "\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}

impl Looker {
    fn look(&mut self) -> Result<Sample, Error> {
        let host = match self.host.take() {
            Some(host) => host,
            None => Host::with_processes()?,
        };
        self.host = Some(host.clone());
        let dir = match self.dir.take() {
            Some(dir) => dir,
            None => ConfDir::open(&self.conf_dir)?,
        };
        let pools = dir.find()?.pools;
        let cpus = host::current_topology()?.all().to_vec();
        let lists = self.lists(&dir, &pools, &host);
        let Measured { busy, uses } = self.meter.measure(&host, &lists, self.interval);
        self.found.look(&dir, &pools, &host)?;
        let Found { intruders, strays, .. } = &self.found;
        let (intruders, strays) = (intruders.clone(), strays.clone());
        // A plain directory may become a mount, so it is opened each time.
        self.dir = Some(dir).filter(ConfDir::is_mounted);
        Ok(Sample { cpus, lists, busy, uses, intruders, strays })
    }

    /// Returns the lists with their tasks, and since when these have them.
    fn lists(&mut self, dir: &ConfDir, pools: &Pools, host: &Host) -> Vec<List> {
        let claims = claims(pools);
        self.since.retain(|claim, _| claims.contains(claim));
        if claims.iter().any(|claim| !self.since.contains_key(claim)) {
            let events = if dir.is_mounted() { claimed(dir.path()) } else { HashMap::new() };
            for claim in claims {
                let since =
                    events.get(&claim).map_or(Since::Seen(Instant::now()), |time| Since::Claimed(*time));
                self.since.entry(claim).or_insert(since);
            }
        }
        let task = |pool: &str, list: &str, pid: u32| {
            let (held, at_least) = match self.since.get(&(pool.to_owned(), list.to_owned(), pid)) {
                Some(Since::Claimed(time)) => (time.elapsed().unwrap_or_default(), false),
                Some(Since::Seen(time)) => (time.elapsed(), true),
                None => (Duration::ZERO, true),
            };
            Task { pid, program: host.program_name(pid), held: held.as_secs(), at_least }
        };
        let mut lists = Vec::new();
        for (name, pool) in pools {
            for (list, tasks) in pool.lists_by_cpu() {
                // A list without CPUs has no place in the machine.
                let Some(cpus) = confdir::parse_cpu_list(list) else { continue };
                let tasks = tasks.iter().map(|&pid| task(name, list, pid)).collect();
                let (pool_name, list) = (describe::shown(name), describe::shown(list));
                lists.push(List { pool: pool_name, name: list, cpus, exclusive: pool.exclusive, tasks });
            }
        }
        lists
    }
}

impl Found {
    /// Looks for strays and intruders, unless it was done too recently for what it costs.
    fn look(&mut self, dir: &ConfDir, pools: &Pools, host: &Host) -> Result<(), Error> {
        let begun = Instant::now();
        if self.next.is_some_and(|next| begun < next) {
            return Ok(());
        }
        let outside = reconcile::strays(dir, host, pools);
        // A task in the middle of a claim is outside for a moment.
        let stay = reconcile::in_both(&self.outside, outside.clone());
        self.outside = outside;
        self.strays = stay.into_iter().flat_map(strays).collect();
        let intruder = |it: intruders::Intruder| Intruder { pid: it.pid, program: it.program, cpus: it.mask };
        self.intruders = intruders::find(pools, &host.online()?, host).into_iter().map(intruder).collect();
        self.next = Some(Instant::now() + begun.elapsed() * REST);
        Ok(())
    }
}

fn strays(task: reconcile::Strays) -> impl Iterator<Item = Stray> {
    let (pool, list) = (describe::shown(&task.pool), describe::shown(&task.list));
    task.threads.into_iter().map(move |(tid, cpus)| Stray {
        pool: pool.clone(),
        list: list.clone(),
        tid,
        cpus,
    })
}

fn claims(pools: &Pools) -> HashSet<Claim> {
    let lists =
        pools.iter().flat_map(|(name, pool)| pool.lists.iter().map(move |(list, tasks)| (name, list, tasks)));
    lists.flat_map(|(name, list, tasks)| tasks.iter().map(|&pid| (name.clone(), list.clone(), pid))).collect()
}

/// Returns when each claim was made, as the newest event about it says. Empty if this user may not read the events.
fn claimed(conf_dir: &Path) -> HashMap<Claim, SystemTime> {
    let text = fs::read_to_string(conf_dir.join("info/events")).unwrap_or_default();
    text.lines().filter_map(claim_in).collect()
}

/// Returns the claim of which a line tells, with its time.
fn claim_in(line: &str) -> Option<(Claim, SystemTime)> {
    let Event { event, time, pool, cpus, pid } = serde_json::from_str(line).ok()?;
    let is_claim = matches!(event.as_str(), "claimed" | "moved" | "inherited");
    let time = humantime::parse_rfc3339(&time).ok().filter(|_| is_claim)?;
    Some(((pool, cpus, pid), time))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_event_says_since_when() {
        let line = |event: &str, second: u32| {
            format!(
                r#"{{"seq":1,"time":"1970-01-01T00:00:0{second}.5Z","event":"{event}","pool":"p","cpus":"0","pid":7,"uid":0}}"#
            )
        };
        let text =
            [line("claimed", 1), line("released", 2), line("inherited", 3), line("died", 4)].join("\n");
        let text = format!("{{\"dropped\":3}}\n{text}\n{}", r#"{"seq":2,"event":"started"}"#);
        let found: HashMap<Claim, SystemTime> = text.lines().filter_map(claim_in).collect();
        let time = SystemTime::UNIX_EPOCH + Duration::from_millis(3500);
        assert_eq!(found, [(("p".to_owned(), "0".to_owned(), 7), time)].into());
    }
}
