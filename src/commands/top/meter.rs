//! Measures what processes use of the CPUs of lists.
//!
//! Owns the difference between two readings of each clock, and the bound on the time that reading takes. Does not know how
//! the result is shown.
//!
//! A thread's time is counted on the CPU on which it ran last. That is exact for a list with one CPU.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, Instant};

use super::sample::{List, Use};
use crate::host::Host;

/// This part of the interval may be used to read the threads of processes without a claim. The rest of them is read next
/// time.
const BUDGET: u32 = 10;
/// How many ancestors of a process are looked at: more than any tree of processes that people make.
const MOST_ANCESTORS: usize = 64;

/// The clocks of CPUs and threads, as they were last time.
#[derive(Default)]
pub(super) struct Meter {
    busy: Option<(Instant, BTreeMap<u32, u64>)>,
    /// The threads of each process.
    processes: HashMap<u32, HashMap<u32, Reading>>,
    /// The process at which the time was up.
    next: u32,
    /// When the last measurement began, if all processes have been read once. A thread that is not known then is new.
    since: Option<Instant>,
}

/// The clock of a thread.
#[derive(Clone, Copy)]
struct Reading {
    used: u64,
    at: Instant,
}

/// The use of CPUs since the last measurement.
#[derive(Default)]
pub(super) struct Measured {
    pub(super) busy: BTreeMap<u32, f64>,
    pub(super) uses: Vec<Use>,
}

impl Meter {
    /// Reads all clocks, and returns the differences. They are empty at first.
    pub(super) fn measure(&mut self, host: &Host, lists: &[List], interval: Duration) -> Measured {
        let begun = Instant::now();
        let busy = self.busy(host.busy(), begun);
        let claimed: HashSet<u32> = lists.iter().flat_map(|list| &list.tasks).map(|task| task.pid).collect();
        // Others are of interest only on the CPUs of exclusive lists.
        let mut others = Vec::new();
        if lists.iter().any(|list| list.exclusive) {
            others = host.all_processes();
            others.retain(|pid| !claimed.contains(pid));
        }
        let living: HashSet<u32> = others.iter().chain(&claimed).copied().collect();
        self.processes.retain(|pid, _| living.contains(pid));

        let mut used = BTreeMap::new();
        claimed.iter().for_each(|&pid| self.read(host, pid, &mut used));
        let first = others.partition_point(|&pid| pid < self.next);
        others.rotate_left(first);
        let deadline = Instant::now() + interval / BUDGET;
        let mut stopped_at = None;
        for pid in others {
            if Instant::now() > deadline {
                stopped_at = Some(pid);
                break;
            }
            self.read(host, pid, &mut used);
        }
        self.next = stopped_at.unwrap_or(0);
        if self.since.is_some() || stopped_at.is_none() {
            self.since = Some(begun);
        }
        Measured { busy, uses: uses(host, lists, used) }
    }

    /// Returns how busy each CPU was since the last reading.
    fn busy(&mut self, now: BTreeMap<u32, u64>, at: Instant) -> BTreeMap<u32, f64> {
        let before = self.busy.replace((at, now.clone()));
        let Some((then, before)) = before else { return BTreeMap::new() };
        let share = |(cpu, now): (u32, u64)| {
            Some((cpu, share(now.saturating_sub(*before.get(&cpu)?), at.duration_since(then))))
        };
        now.into_iter().filter_map(share).collect()
    }

    /// Reads the clocks of a process, and adds what each thread used, by its last CPU.
    fn read(&mut self, host: &Host, pid: u32, used: &mut BTreeMap<(u32, u32), f64>) {
        let before = self.processes.remove(&pid).unwrap_or_default();
        let mut threads = HashMap::new();
        for tid in host.threads(pid) {
            let Some(now) = host.used(pid, tid).map(|used| Reading { used, at: Instant::now() }) else {
                continue;
            };
            threads.insert(tid, now);
            let part = now.since(before.get(&tid), self.since);
            if part > 0.0
                && let Some(cpu) = host.last_cpu(pid, tid)
            {
                *used.entry((cpu, pid)).or_default() += part;
            }
        }
        self.processes.insert(pid, threads);
    }
}

impl Reading {
    /// Returns the share of a CPU that the thread had since an earlier reading, or since `start` if it is new.
    fn since(self, before: Option<&Self>, start: Option<Instant>) -> f64 {
        match (before, start) {
            (Some(before), _) if before.used <= self.used => {
                share(self.used - before.used, self.at.duration_since(before.at))
            }
            // The number of an older thread may be used again.
            (_, Some(start)) => share(self.used, self.at.duration_since(start)),
            (_, None) => 0.0,
        }
    }
}

/// Returns the part of a time, at most 1.
#[allow(clippy::cast_precision_loss, reason = "shown with two digits")]
fn share(nanoseconds: u64, of: Duration) -> f64 {
    let whole = of.as_nanos() as f64;
    if whole > 0.0 { (nanoseconds as f64 / whole).min(1.0) } else { 0.0 }
}

/// Keeps what was used of the CPUs of lists, and says whose it is. Processes that are not named have ended since.
fn uses(host: &Host, lists: &[List], used: BTreeMap<(u32, u32), f64>) -> Vec<Use> {
    let list_of_cpu: HashMap<u32, &List> =
        lists.iter().flat_map(|list| list.cpus.iter().map(move |cpu| (cpu.get(), list))).collect();
    let list_of_task: HashMap<u32, &List> =
        lists.iter().flat_map(|list| list.tasks.iter().map(move |task| (task.pid, list))).collect();
    let one = |((cpu, pid), share): ((u32, u32), f64)| {
        let list = *list_of_cpu.get(&cpu)?;
        let is_task = |pid: u32| list_of_task.get(&pid).is_some_and(|of_task| std::ptr::eq(*of_task, list));
        let mut ancestors = std::iter::successors(Some(pid), |&pid| host.parent(pid)).take(MOST_ANCESTORS);
        // The CPUs of a shared list are for everybody, so only its tasks are of interest.
        let own = if list.exclusive { ancestors.any(is_task) } else { is_task(pid) };
        if !own && !list.exclusive {
            return None;
        }
        Some(Use { cpu, pid, program: host.program_name(pid)?, share, own })
    };
    used.into_iter().filter_map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nanoseconds(share: f64) -> u64 {
        (share * 1e9) as u64
    }

    #[test]
    fn a_share_is_of_the_time_between_two_readings() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let before = Reading { used: 5, at: start };
        let now = |used| Reading { used, at: start + second };
        let near = |is: f64, wanted: f64| assert!((is - wanted).abs() < 1e-6, "{is} {wanted}");
        near(now(5 + nanoseconds(0.25)).since(Some(&before), None), 0.25);
        near(now(5).since(Some(&before), Some(start)), 0.0);
        // Clocks are read one after the other.
        near(now(5 + nanoseconds(1.5)).since(Some(&before), None), 1.0);
        // The first reading of all, a new thread, and another thread of the same number.
        near(now(nanoseconds(0.5)).since(None, None), 0.0);
        near(now(nanoseconds(0.5)).since(None, Some(start)), 0.5);
        near(now(3).since(Some(&before), None), 0.0);
    }

    #[test]
    fn a_cpu_is_busy_as_long_as_its_clock_runs() {
        let (mut meter, start) = (Meter::default(), Instant::now());
        assert!(meter.busy([(0, 10), (1, 10)].into(), start).is_empty());
        let now = [(0, 10 + nanoseconds(0.5)), (2, 10)].into();
        let busy = meter.busy(now, start + Duration::from_secs(1));
        // CPU 1 is offline, and CPU 2 was.
        assert_eq!(busy.keys().collect::<Vec<_>>(), [&0]);
        assert!((busy[&0] - 0.5).abs() < 1e-6);
    }

    #[test]
    fn work_is_seen_and_named() {
        let host = Host::from_env();
        let pid = std::process::id();
        let task = super::super::sample::Task { pid, program: None, held: 0, at_least: false };
        let all = "0-1023".parse().unwrap();
        let list = List { pool: "p".into(), name: "0".into(), cpus: all, exclusive: true, tasks: vec![task] };
        let mut meter = Meter::default();
        assert!(meter.measure(&host, std::slice::from_ref(&list), Duration::from_secs(60)).uses.is_empty());
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(50) {}
        let measured = meter.measure(&host, &[list], Duration::from_secs(60));
        let own = measured.uses.iter().find(|used| used.pid == pid).unwrap();
        assert!(own.own && own.share > 0.0 && !own.program.is_empty(), "{own:?}");
    }
}
