//! One row per CPU: its place, its list, the holder, shares, and who else was there.
//!
//! Owns what each cell says. Pure: a function of one sample. Does not know order, filter or screen.

use std::collections::{BTreeMap, HashMap};

use kcm_mount::model::cpuset::CpuId;
use kcm_mount::model::topology::Cpu;

use super::sample::{List, Sample, Task, Use};

/// The names of the columns behind the marks.
pub(super) const COLUMNS: [&str; 9] =
    ["CPU", "CORE", "POOL", "LIST", "HOLDER", "HELD", "SHARE", "OTHERS", "WHO ELSE"];
/// Marks a CPU on which an intruder is pinned, and the intruder.
pub(super) const INTRUDER: char = '!';
/// Marks the CPUs of a list with a stray, and the stray.
pub(super) const STRAY: char = '~';
/// Stands before a time that is known to be too short.
const AT_LEAST: char = '>';
/// A process that used less of a CPU is not named.
const LEAST_SHARE: f64 = 0.001;

/// A CPU.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Row {
    pub(super) cpu: Cpu,
    /// The number of the pool, by the order of names.
    pub(super) pool: Option<usize>,
    /// Whether its list has tasks.
    pub(super) is_taken: bool,
    /// [`INTRUDER`] and [`STRAY`].
    pub(super) marks: String,
    /// The texts of [`COLUMNS`].
    pub(super) cells: [String; COLUMNS.len()],
    /// The share of the tasks of the list and of their children, from 0 to 1; `None` if it is unknown.
    pub(super) share: Option<f64>,
    /// The share of everything else.
    pub(super) others: Option<f64>,
}

/// Returns the names of the pools, each once, ascending.
pub(super) fn pools(sample: &Sample) -> Vec<&str> {
    let mut names: Vec<&str> = sample.lists.iter().map(|list| list.pool.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    names
}

/// Returns a row for each CPU, ascending.
pub(super) fn rows(sample: &Sample) -> Vec<Row> {
    let pools = pools(sample);
    let lists: HashMap<CpuId, &List> =
        sample.lists.iter().flat_map(|list| list.cpus.iter().map(move |cpu| (cpu, list))).collect();
    let mut uses: BTreeMap<u32, Vec<&Use>> = BTreeMap::new();
    sample.uses.iter().for_each(|used| uses.entry(used.cpu).or_default().push(used));
    let row = |cpu: &Cpu| {
        let list = lists.get(&cpu.id).copied();
        let pool = list.and_then(|list| pools.iter().position(|name| *name == list.pool));
        row(sample, cpu, list, pool, uses.get(&cpu.id.get()).map_or(&[][..], Vec::as_slice))
    };
    sample.cpus.iter().map(row).collect()
}

fn row(sample: &Sample, cpu: &Cpu, list: Option<&List>, pool: Option<usize>, uses: &[&Use]) -> Row {
    let (share, others) = shares(sample.busy.get(&cpu.id.get()).copied(), list.is_some(), uses);
    let mut marks = String::new();
    let mut also = Vec::new();
    let is_here =
        |pool: &str, name: &str| list.is_some_and(|list| (&*list.pool, &*list.name) == (pool, name));
    let strays: Vec<_> = sample.strays.iter().filter(|stray| is_here(&stray.pool, &stray.list)).collect();
    if let Some(first) = strays.first() {
        let more = if strays.len() > 1 { format!(" +{}", strays.len() - 1) } else { String::new() };
        also.push(format!("{STRAY}{} may run on {}{more}", first.tid, first.cpus));
        marks.push(STRAY);
    }
    let intruders: Vec<_> = sample.intruders.iter().filter(|it| it.cpus.contains(cpu.id)).collect();
    if !intruders.is_empty() {
        marks.insert(0, INTRUDER);
    }
    for intruder in intruders {
        let used = uses.iter().find(|used| used.pid == intruder.pid).map(|used| used.share);
        let used = used.map_or_else(String::new, |share| format!(" {}", percent(share)));
        also.push(format!("{INTRUDER}{} ({}){used}", intruder.pid, intruder.program));
    }
    let is_intruder = |used: &&&Use| sample.intruders.iter().any(|intruder| intruder.pid == used.pid);
    let is_named = |used: &&&Use| !used.own && used.share >= LEAST_SHARE && !is_intruder(used);
    let mut named: Vec<&&Use> = uses.iter().filter(is_named).collect();
    named.sort_by(|a, b| b.share.total_cmp(&a.share));
    also.extend(named.iter().map(|used| format!("{} ({}) {}", used.pid, used.program, percent(used.share))));
    let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let tasks = list.map_or(&[][..], |list| list.tasks.as_slice());
    let cells = [
        if cpu.online { cpu.id.to_string() } else { format!("{} off", cpu.id) },
        or_none(cpu.core.map(|core| core.to_string())),
        or_none(list.map(|list| list.pool.clone())),
        or_none(list.map(|list| list.name.clone())),
        or_none(list.and_then(holder)),
        or_none(tasks.first().map(held)),
        or_none(share.map(percent)),
        or_none(others.map(percent)),
        also.join(", "),
    ];
    Row { cpu: *cpu, pool, is_taken: !tasks.is_empty(), marks, cells, share, others }
}

/// Returns the share of the tasks of the list, and the share of everything else. `busy`: of the CPU. Clocks of CPUs are
/// less exact than clocks of threads, so that others have at least what those that are named have. But these may have run on
/// other CPUs before.
fn shares(busy: Option<f64>, has_list: bool, uses: &[&Use]) -> (Option<f64>, Option<f64>) {
    let sum = |own: bool| uses.iter().filter(|used| used.own == own).map(|used| used.share).sum::<f64>();
    let Some(busy) = busy else { return (None, None) };
    let own = sum(true).min(1.0);
    let others = (busy - own).max(sum(false)).clamp(0.0, 1.0 - own);
    (has_list.then_some(own), Some(others))
}

/// Returns the holder of a list, or its first task and how many others there are; `None` if a shared list has no tasks.
fn holder(list: &List) -> Option<String> {
    let Some((first, more)) = list.tasks.split_first() else {
        return list.exclusive.then(|| "free".to_owned());
    };
    let name = match &first.program {
        Some(program) => format!("{} ({program})", first.pid),
        None => first.pid.to_string(),
    };
    Some(if more.is_empty() { name } else { format!("{name} +{}", more.len()) })
}

/// Returns for how long a task has had its list.
fn held(task: &Task) -> String {
    let text = match task.held {
        seconds @ ..120 => format!("{seconds} s"),
        seconds @ ..7200 => format!("{} min", seconds / 60),
        seconds @ ..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} d", seconds / 86_400),
    };
    if task.at_least { format!("{AT_LEAST}{text}") } else { text }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 0 to 1")]
fn percent(share: f64) -> String {
    match (share * 100.0).round() as u32 {
        0 if share > 0.0 => "<1%".to_owned(),
        percent => format!("{percent}%"),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::sample::{Intruder, Stray};
    use super::*;

    /// A machine with 2 sockets of 2 cores of 2 threads: CPU 0 and 4 are siblings, and so on. CPU 7 is offline.
    pub(in super::super) fn sample() -> Sample {
        let cpu = |id: u32| {
            let online = id != 7;
            let (core, socket) = (Some(id % 4).filter(|_| online), Some(id % 4 / 2).filter(|_| online));
            Cpu { id: CpuId::new(id).unwrap(), core, socket, node: Some(id % 4 / 2), online, isolated: false }
        };
        let task = |pid: u32, program: &str, held: u64, at_least: bool| Task {
            pid,
            program: Some(program.to_owned()),
            held,
            at_least,
        };
        let list = |pool: &str, name: &str, exclusive: bool, tasks: Vec<Task>| {
            let cpus = name.parse().unwrap();
            List { pool: pool.to_owned(), name: name.to_owned(), cpus, exclusive, tasks }
        };
        let used = |cpu: u32, pid: u32, program: &str, share: f64, own: bool| Use {
            cpu,
            pid,
            program: program.to_owned(),
            share,
            own,
        };
        Sample {
            cpus: (0..8).map(cpu).collect(),
            lists: vec![
                list("data", "0,4", true, vec![task(4711, "forwarder", 61, false)]),
                list("data", "1", true, Vec::new()),
                list("infra", "2-3", false, vec![task(20, "sshd", 8000, true), task(21, "cron", 7, true)]),
            ],
            busy: [(0, 1.0), (1, 0.3), (2, 0.5), (3, 0.0), (4, 0.004)].into(),
            uses: vec![
                used(0, 4711, "forwarder", 0.9, true),
                used(0, 90, "kworker/0:1", 0.02, false),
                used(0, 91, "sh", 0.05, false),
                used(0, 92, "tiny", 0.0001, false),
                used(1, 4720, "stress", 0.31, false),
                used(2, 20, "sshd", 0.2, true),
                used(4, 93, "moved", 1.0, false),
                used(4, 4711, "forwarder", 0.6, true),
            ],
            intruders: vec![Intruder { pid: 4720, program: "stress".into(), cpus: "1".parse().unwrap() }],
            strays: vec![Stray {
                pool: "data".into(),
                list: "0,4".into(),
                tid: 4712,
                cpus: "0-3".parse().unwrap(),
            }],
        }
    }

    #[test]
    fn each_cpu_says_who_has_it_and_who_else_ran_there() {
        let rows = rows(&sample());
        let text = |row: &Row| format!("{}|{}", row.marks, row.cells.join("|"));
        let expected = [
            "~|0|0|data|0,4|4711 (forwarder)|61 s|90%|10%|~4712 may run on 0-3, 91 (sh) 5%, 90 (kworker/0:1) 2%",
            "!|1|1|data|1|free|-|0%|31%|!4720 (stress) 31%",
            "|2|2|infra|2-3|20 (sshd) +1|>2 h|20%|30%|",
            "|3|3|infra|2-3|20 (sshd) +1|>2 h|0%|0%|",
            "~|4|0|data|0,4|4711 (forwarder)|61 s|60%|40%|~4712 may run on 0-3, 93 (moved) 100%",
            "|5|1|-|-|-|-|-|-|",
            "|6|2|-|-|-|-|-|-|",
            "|7 off|-|-|-|-|-|-|-|",
        ];
        assert_eq!(rows.iter().map(text).collect::<Vec<_>>(), expected);
        assert_eq!(rows[2].pool, Some(1));
        assert!(rows[0].is_taken && !rows[1].is_taken);
    }

    #[test]
    fn shares_are_unknown_before_the_second_sample() {
        let sample = Sample { busy: BTreeMap::new(), uses: Vec::new(), ..sample() };
        assert!(rows(&sample).iter().all(|row| row.cells[6] == "-" && row.cells[7] == "-"));
    }

    #[test]
    fn a_small_share_is_not_zero() {
        assert_eq!([0.0, 0.004, 0.006, 1.0].map(percent), ["0%", "<1%", "1%", "100%"]);
    }

    #[test]
    fn times_have_one_unit() {
        let text = |held| super::held(&Task { pid: 1, program: None, held, at_least: false });
        let times = [0, 119, 120, 7199, 7200, 172_799, 172_800].map(text);
        assert_eq!(times, ["0 s", "119 s", "2 min", "119 min", "2 h", "47 h", "2 d"]);
    }
}
