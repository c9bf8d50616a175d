//! `kcm describe --format=table`: one line per list.
//!
//! Owns the columns, and the notes about lists. Does not know the machine, except for the CPUs that are online.

use kcm_mount::model::cpuset::CpuSet;

use super::{Members, list_cell, shown};
use crate::commands::common::columns::Cell;
use crate::confdir::{self, Pools};

/// Returns one line per list: its pool, tasks, and what is wrong with its CPUs. `wide`: the pods to name beside the tasks.
pub(super) fn rows(pools: &Pools, online: &CpuSet, wide: Option<&Members>) -> Vec<[Cell; 5]> {
    let pod = |pid| wide.map(|members| members.suffix(pid)).unwrap_or_default();
    let mut rows = vec![["POOL", "EXCLUSIVE", "CPUS", "TASKS", "NOTE"].map(Cell::from)];
    for (name, pool) in pools {
        let exclusive = if pool.exclusive { "yes" } else { "no" };
        if pool.lists.is_empty() {
            let [cpus, tasks] = ["-", "-"].map(Cell::from);
            rows.push([shown(name).into(), exclusive.into(), cpus, tasks, "no CPU lists".into()]);
        }
        for (list, tasks) in pool.lists_by_cpu() {
            let tasks: Vec<String> = tasks.iter().map(|&pid| pid.to_string() + &pod(pid)).collect();
            let tasks = if tasks.is_empty() { "-".into() } else { Cell::tasks(tasks, ",") };
            let draining = pool.draining.contains(list).then(|| "draining".to_owned());
            let notes: Vec<String> = note(list, online).into_iter().chain(draining).collect();
            let note = notes.join(", ");
            rows.push([shown(name).into(), exclusive.into(), list_cell(list), tasks, note.into()]);
        }
    }
    rows
}

/// Returns what is wrong with a list, if anything.
pub(super) fn note(list: &str, online: &CpuSet) -> Option<String> {
    match confdir::parse_cpu_list(list).map(|cpus| cpus.difference(online)) {
        None => Some("not a CPU list".to_owned()),
        Some(offline) if offline.is_empty() => None,
        Some(offline) => Some(format!("offline: {offline}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::common::columns::columns;
    use crate::confdir::Pool;

    #[test]
    fn the_table_notes_what_is_wrong_with_a_list() {
        let pool = |exclusive, lists: &[(&str, &[u32])]| Pool {
            exclusive,
            draining: ["0-1", "8"].map(String::from).into(),
            lists: lists.iter().map(|(list, tasks)| ((*list).to_owned(), tasks.to_vec())).collect(),
            ..Pool::default()
        };
        let pools: Pools = [
            ("dataplane", pool(true, &[("8", &[]), ("0-1", &[7])])),
            ("empty", pool(false, &[])),
            ("wrong", pool(false, &[("x", &[])])),
        ]
        .map(|(name, pool)| (name.to_owned(), pool))
        .into();
        let expected = "\
POOL       EXCLUSIVE  CPUS  TASKS  NOTE
dataplane  yes        0-1   7      draining
dataplane  yes        8     -      offline: 8, draining
empty      no         -     -      no CPU lists
wrong      no         x     -      not a CPU list
";
        assert_eq!(columns(&rows(&pools, &"0-3".parse().unwrap(), None), None), expected);
    }
}
