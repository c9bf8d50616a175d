//! `kcm describe --format=map`: one line per CPU.
//!
//! Owns the columns. Does not know the order of the CPUs.

use std::collections::HashMap;

use anyhow::Error;
use kcm_mount::model::cpuset::CpuId;
use kcm_mount::model::topology::Cpu;

use super::selection::Selected;
use super::shape::{self, List};
use super::{Members, list_cell, shown, task};
use crate::commands::common::columns::Cell;
use crate::host::Host;

/// Returns one line per CPU: its place in the topology, its pool and list, and their tasks. The tasks of a shared list are
/// only on the line of its first CPU. In the `wide` form, they are on all lines, with the pods that they are in.
pub(super) fn rows(
    selected: &Selected,
    host: &Host,
    wide: Option<&Members>,
) -> Result<Vec<[Cell; 7]>, Error> {
    let machine = host.topology()?;
    let sockets = shape::sockets(&machine, |cpu| selected.has(cpu));
    let cores = sockets.into_iter().flat_map(|socket| socket.nodes).flat_map(|node| node.cores);
    let mut rows = vec![["CPU", "CORE", "SOCKET", "NODE", "POOL", "LIST", "TASKS"].map(Cell::from)];
    // Lists by their names: a CPU is in one list at most, unless a plain directory is damaged.
    let mut shared: HashMap<(&str, &str), CpuId> = HashMap::new();
    for cpu in cores.flatten() {
        let number = |number: Option<u32>| Cell::from(number.map_or_else(|| "-".into(), |it| it.to_string()));
        let list = shape::list_with(&selected.pools, cpu.id);
        let first = list.and_then(|list| {
            let is_first_only = wide.is_none() && !list.pool.exclusive && !list.tasks.is_empty();
            let first = *shared.entry((list.pool_name, list.name)).or_insert(cpu.id);
            Some(first).filter(|first| is_first_only && *first != cpu.id)
        });
        let [pool, name] = match list {
            None => ["-"; 2].map(Cell::from),
            Some(list) => [shown(list.pool_name).into(), list_cell(list.name)],
        };
        let tasks = match (list, first) {
            (None, _) => "-".into(),
            (Some(_), Some(first)) => format!("see CPU {first}").into(),
            (Some(list), None) => tasks(&list, host, wide),
        };
        let id = format!("{}{}", cpu.id, state(cpu).map(|state| format!(" {state}")).unwrap_or_default());
        rows.push([id.into(), number(cpu.core), number(cpu.socket), number(cpu.node), pool, name, tasks]);
    }
    Ok(rows)
}

/// Returns the state of a CPU that is not an ordinary one.
pub(super) fn state(cpu: &Cpu) -> Option<&'static str> {
    match (cpu.online, cpu.isolated) {
        (false, _) => Some("offline"),
        (true, true) => Some("isolated"),
        (true, false) => None,
    }
}

/// Returns the tasks of a list, with the names of their programs, and with the pods that they are in if those are given.
pub(super) fn tasks(list: &List<'_>, host: &Host, members: Option<&Members>) -> Cell {
    let pod = |pid| members.map(|members| members.suffix(pid)).unwrap_or_default();
    match (list.tasks, list.pool.exclusive) {
        ([], true) => "free".into(),
        ([], false) => "-".into(),
        (tasks, _) => Cell::tasks(tasks.iter().map(|&pid| task(pid, host) + &pod(pid)).collect(), ", "),
    }
}
