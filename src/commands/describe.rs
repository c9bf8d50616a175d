//! `kcm describe`: the configuration directory as JSON, as a table, or as a map or a picture of the CPUs.
//!
//! Owns the JSON, which is the legacy one, byte for byte. Its parts own the other formats (`table`, `map`, `svg`), which
//! part of the directory is shown (`selection`), and the order of the CPUs (`shape`). Does not know how files are read.

mod map;
mod members;
mod selection;
mod shape;
mod svg;
mod table;

use std::process::ExitCode;

use anyhow::Error;
use kcm_mount::text;
use serde_json::{Value, json};

pub(super) use self::members::Members;
use self::selection::Selected;
use super::common::columns::{self, Cell};
use super::common::output::{json_text, print};
use crate::cli::{self, Format, Output};
use crate::confdir::{self, ConfDir, Pools};
use crate::host::Host;

/// Prints the directory in the requested format.
pub(super) fn run(args: &cli::Describe) -> Result<ExitCode, Error> {
    let format = args.format().unwrap_or_else(|error| error.exit());
    let dir = ConfDir::open(&args.dir.conf_dir)?;
    let pools = dir.find()?.warned();
    let host = Host::with_processes()?;
    let selected = Selected::new(pools, args, &host)?;
    let is_wide = args.output == Some(Output::Wide);
    let width = columns::terminal_width().filter(|_| !is_wide);
    let members = || Members::find(&selected.pools, &host, &args.pods.container_logs);
    let wide = is_wide.then(members);
    let output = match format {
        Format::Json => json_text(&description(&dir, &selected.pools, &members())),
        Format::Table => {
            columns::columns(&table::rows(&selected.pools, &host.online()?, wide.as_ref()), width)
        }
        Format::Map => columns::columns(&map::rows(&selected, &host, wide.as_ref())?, width),
        Format::Svg => svg::picture(dir.path(), &selected, &host)?,
    };
    print(&output)?;
    Ok(ExitCode::SUCCESS)
}

/// Prints the pools as a table that fits the terminal.
///
/// # Errors
/// It cannot be printed, or the CPUs of the machine cannot be read.
pub(super) fn print_table(pools: &Pools) -> Result<(), Error> {
    print(&columns::columns(
        &table::rows(pools, &Host::with_processes()?.online()?, None),
        columns::terminal_width(),
    ))
}

/// Returns `{"path": …, "pools": {<name>: {"cpuLists": {<list>: {"cpus", "tasks"}}, "exclusive", "name"}}}`. A list with tasks in
/// pods also has `pods`.
pub(super) fn description(dir: &ConfDir, pools: &Pools, members: &Members) -> Value {
    let pools = pools.iter().map(|(name, pool)| {
        let lists = pool.lists.iter().map(|(cpus, tasks)| {
            let mut list = json!({ "cpus": cpus, "tasks": tasks });
            if let (Some(fields), Some(pods)) = (list.as_object_mut(), members.json(tasks)) {
                fields.insert("pods".into(), pods);
            }
            (cpus.clone(), list)
        });
        let lists: serde_json::Map<String, Value> = lists.collect();
        (name.clone(), json!({ "cpuLists": lists, "exclusive": pool.exclusive, "name": name }))
    });
    let pools: serde_json::Map<String, Value> = pools.collect();
    json!({ "path": dir.path().to_string_lossy(), "pools": pools })
}

/// Returns the name of a pool or of a list as a cell: one word, whoever has chosen the name.
pub(super) fn shown(name: &str) -> String {
    match confdir::parse_cpu_list(name) {
        Some(_) => name.to_owned(),
        None => text::name(name.as_bytes()).into_owned(),
    }
}

/// Returns the name of a list as a cell.
fn list_cell(list: &str) -> Cell {
    match confdir::parse_cpu_list(list) {
        Some(_) => Cell::cpus(list),
        None => shown(list).into(),
    }
}

/// Returns a task with the name of its program, if the process exists.
fn task(pid: u32, host: &Host) -> String {
    host.program_name(pid).map_or_else(|| pid.to_string(), |program| format!("{pid} ({program})"))
}

/// Returns the rows as left-aligned columns with two spaces between them.
pub(super) fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let rows: Vec<[Cell; N]> = rows.iter().map(|row| row.clone().map(Cell::from)).collect();
    columns::columns(&rows, None)
}
