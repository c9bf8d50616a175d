//! `kcm describe`: the configuration directory as JSON, as a table, or as a map of the CPUs.
//!
//! Owns the formats; the JSON is the legacy one, byte for byte. Does not know how files are read.

use std::process::ExitCode;

use anyhow::Error;
use kcm_mount::model::cpuset::{CpuId, CpuSet};
use kcm_mount::text;
use serde_json::{Value, json};

use super::common::output::{json_text, print};
use crate::cli::{self, Format};
use crate::confdir::{self, ConfDir, Pool, Pools};
use crate::host::Host;

/// Prints the directory in the requested format.
pub(super) fn run(args: &cli::Describe) -> Result<ExitCode, Error> {
    let dir = ConfDir::open(&args.dir.conf_dir)?;
    let pools = dir.find()?.warned();
    let host = Host::with_processes()?;
    let output = match args.format {
        Format::Json => json_text(&description(&dir, &pools)),
        Format::Table => table(&pools, &host.online()?),
        Format::Map => map(&pools, &host)?,
    };
    print(&output)?;
    Ok(ExitCode::SUCCESS)
}

/// Returns `{"path": …, "pools": {<name>: {"cpuLists": {<list>: {"cpus", "tasks"}}, "exclusive", "name"}}}`.
pub(super) fn description(dir: &ConfDir, pools: &Pools) -> Value {
    let pools = pools.iter().map(|(name, pool)| {
        let lists =
            pool.lists.iter().map(|(cpus, tasks)| (cpus.clone(), json!({ "cpus": cpus, "tasks": tasks })));
        let lists: serde_json::Map<String, Value> = lists.collect();
        (name.clone(), json!({ "cpuLists": lists, "exclusive": pool.exclusive, "name": name }))
    });
    let pools: serde_json::Map<String, Value> = pools.collect();
    json!({ "path": dir.path().to_string_lossy(), "pools": pools })
}

/// Returns one line per list: its pool, tasks, and what is wrong with its CPUs.
fn table(pools: &Pools, online: &CpuSet) -> String {
    let mut rows = vec![["POOL".into(), "EXCLUSIVE".into(), "CPUS".into(), "TASKS".into(), "NOTE".into()]];
    for (name, pool) in pools {
        let exclusive = if pool.exclusive { "yes" } else { "no" };
        if pool.lists.is_empty() {
            rows.push([shown(name), exclusive.into(), "-".into(), "-".into(), "no CPU lists".into()]);
        }
        for (list, tasks) in pool.lists_by_cpu() {
            let tasks: Vec<String> = tasks.iter().map(u32::to_string).collect();
            let tasks = if tasks.is_empty() { "-".into() } else { tasks.join(",") };
            let note = match confdir::parse_cpu_list(list).map(|cpus| cpus.difference(online)) {
                None => "not a CPU list".into(),
                Some(offline) if offline.is_empty() => String::new(),
                Some(offline) => format!("offline: {offline}"),
            };
            rows.push([shown(name), exclusive.into(), shown(list), tasks, note]);
        }
    }
    columns(&rows)
}

/// Returns one line per CPU: its place in the topology, its pool and list, and their tasks.
fn map(pools: &Pools, host: &Host) -> Result<String, Error> {
    let topology = host.topology()?;
    let header = ["CPU", "CORE", "SOCKET", "NODE", "POOL", "LIST", "TASKS"].map(String::from);
    let mut rows = vec![header];
    for cpu in topology.all() {
        let number = |number: Option<u32>| number.map_or_else(|| "-".into(), |number| number.to_string());
        let state = match (cpu.online, cpu.isolated) {
            (false, _) => " offline",
            (true, true) => " isolated",
            (true, false) => "",
        };
        let [pool, list, tasks] = match list_with(pools, cpu.id) {
            None => ["-"; 3].map(String::from),
            Some((name, pool, list, tasks)) => {
                let names = |pid: &u32| match host.program_name(*pid) {
                    Some(program) => format!("{pid} ({program})"),
                    None => pid.to_string(),
                };
                let tasks: Vec<String> = tasks.iter().map(names).collect();
                let free = if pool.exclusive { "free" } else { "-" };
                let tasks = if tasks.is_empty() { free.into() } else { tasks.join(", ") };
                [shown(name), shown(list), tasks]
            }
        };
        let id = format!("{}{state}", cpu.id);
        rows.push([id, number(cpu.core), number(cpu.socket), number(cpu.node), pool, list, tasks]);
    }
    Ok(columns(&rows))
}

/// Returns the list that has `cpu`, with its pool and tasks.
fn list_with(pools: &Pools, cpu: CpuId) -> Option<(&str, &Pool, &str, &[u32])> {
    pools.iter().find_map(|(name, pool)| {
        let has_cpu = |list: &str| confdir::parse_cpu_list(list).is_some_and(|cpus| cpus.contains(cpu));
        let (list, tasks) = pool.lists.iter().find(|(list, _)| has_cpu(list))?;
        Some((name.as_str(), pool, list.as_str(), tasks.as_slice()))
    })
}

/// Returns the name of a pool or of a list as a cell: one word, whoever has chosen the name.
pub(super) fn shown(name: &str) -> String {
    match confdir::parse_cpu_list(name) {
        Some(_) => name.to_owned(),
        None => text::name(name.as_bytes()).into_owned(),
    }
}

/// Returns the rows as left-aligned columns with two spaces between them.
pub(super) fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> =
            row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_column_is_as_wide_as_its_widest_cell() {
        let rows = [["A", "B"], ["long", "b"]].map(|row| row.map(String::from));
        assert_eq!(columns(&rows), "A     B\nlong  b\n");
    }

    fn pools() -> Pools {
        let lists = |lists: &[(&str, &[u32])]| {
            lists.iter().map(|(list, tasks)| ((*list).to_owned(), tasks.to_vec())).collect()
        };
        let dataplane = Pool {
            exclusive: true,
            partial: false,
            isolated: false,
            lists: lists(&[("8", &[]), ("0-1", &[7])]),
        };
        let empty = Pool { exclusive: false, partial: false, isolated: false, lists: lists(&[]) };
        let wrong = Pool { exclusive: false, partial: false, isolated: false, lists: lists(&[("x", &[])]) };
        [("dataplane", dataplane), ("empty", empty), ("wrong", wrong)].map(|(n, p)| (n.to_owned(), p)).into()
    }

    #[test]
    fn the_table_notes_what_is_wrong_with_a_list() {
        let expected = "\
POOL       EXCLUSIVE  CPUS  TASKS  NOTE
dataplane  yes        0-1   7
dataplane  yes        8     -      offline: 8
empty      no         -     -      no CPU lists
wrong      no         x     -      not a CPU list
";
        assert_eq!(table(&pools(), &"0-3".parse().unwrap()), expected);
    }

    #[test]
    fn a_cpu_is_found_in_its_list() {
        let pools = pools();
        let list =
            |cpu: u32| list_with(&pools, CpuId::new(cpu).unwrap()).map(|(pool, _, list, _)| (pool, list));
        assert_eq!(list(1), Some(("dataplane", "0-1")));
        assert_eq!(list(2), None);
    }
}
