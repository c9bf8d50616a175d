//! Import of a plain configuration directory in the legacy layout.
//!
//! Owns the checks on what the directory says. Does not know how the live directory is served.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::clock;
use crate::engine::{Caller, Engine};
use crate::model::command::Target;
use crate::model::pool::ListId;
use crate::model::refusal::Refusal;
use crate::plain::{self, Access};

/// The content of a legacy configuration directory.
#[derive(Debug)]
pub(crate) struct Layout {
    pools: Vec<Pool>,
}

#[derive(Debug)]
struct Pool {
    name: String,
    exclusive: bool,
    lists: Vec<List>,
}

#[derive(Debug)]
struct List {
    name: String,
    /// The PIDs in the file, in the host's PID namespace. Anything else in it is left out.
    tasks: Vec<u32>,
}

impl Layout {
    /// Reads `pools/<pool>/exclusive` and `pools/<pool>/<cpulist>/tasks`.
    ///
    /// # Errors
    /// A file is missing, is not a regular file, or cannot be read.
    pub(crate) fn read(conf_dir: &Path) -> io::Result<Self> {
        let mut pools = Vec::new();
        for pool in directories(&conf_dir.join("pools"))? {
            let exclusive = read_file(conf_dir, &["pools", &pool.name, "exclusive"])?.first() == Some(&b'1');
            let mut lists = Vec::new();
            for list in directories(&pool.path)? {
                let tasks = read_file(conf_dir, &["pools", &pool.name, &list.name, "tasks"])?;
                let tasks = String::from_utf8_lossy(&tasks);
                let tasks = tasks.split(',').filter_map(|word| word.trim().parse().ok()).collect();
                lists.push(List { name: list.name, tasks });
            }
            pools.push(Pool { name: pool.name, exclusive, lists });
        }
        Ok(Self { pools })
    }
}

/// Reads a file of the directory. The error names it.
fn read_file(conf_dir: &Path, parts: &[&str]) -> io::Result<Vec<u8>> {
    let os_parts: Vec<&OsStr> = parts.iter().map(OsStr::new).collect();
    let bytes = plain::open(conf_dir, &os_parts, Access::Read).and_then(|mut file| plain::read(&mut file));
    bytes.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", parts.join("/"))))
}

struct Directory {
    path: PathBuf,
    name: String,
}

fn directories(path: &Path) -> io::Result<Vec<Directory>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.push(Directory {
                path: entry.path(),
                name: entry.file_name().to_string_lossy().into_owned(),
            });
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// Adds the pools and lists, and claims for the tasks that really run on their list. Existing ones are kept. What
/// cannot be imported is logged and left out.
///
/// # Errors
/// The layout cannot be read.
pub(crate) fn take_over(engine: &Engine, layout: &Path) -> io::Result<()> {
    let root = Caller { tid: std::process::id(), uid: 0, request: 0 };
    for pool in &Layout::read(layout)?.pools {
        if let Err(refusal) = take_over_pool(engine, root, pool) {
            log::warn!("pool {}: not taken over: {}", pool.name, refusal.sentence("another task"));
        }
    }
    Ok(())
}

fn take_over_pool(engine: &Engine, root: Caller, pool: &Pool) -> Result<(), Refusal> {
    let id = engine.add_pool(root, &pool.name)?;
    engine.set_exclusive(root, engine.user(root), id, if pool.exclusive { b"1" } else { b"0" })?;
    for list in &pool.lists {
        match engine.add_list(root, id, &list.name) {
            Ok(made) => {
                list.tasks.iter().for_each(|&pid| take_over_task(engine, root, pool, list, made, pid))
            }
            Err(refusal) => {
                log::warn!(
                    "{} {}: not taken over: {}",
                    pool.name,
                    list.name,
                    refusal.sentence("another task")
                );
            }
        }
    }
    Ok(())
}

/// Claims for a task of a list. In the legacy layout a PID stays in the file when its process dies, and may belong to
/// another process by now. So the PID counts only if its mask lies within the list.
fn take_over_task(engine: &Engine, root: Caller, pool: &Pool, list: &List, id: ListId, pid: u32) {
    let what = format!("{} {}: task {pid}", pool.name, list.name);
    if !engine.is_within(id, pid) {
        log::warn!("{what}: not taken over: it has died, or its mask is not within the list");
        return;
    }
    if let Err(refused) =
        engine.write_tasks(Target::List(id), root, engine.user(root), pid.to_string().as_bytes(), false)
    {
        log::warn!("{what}: not taken over: {}", refused.refusal.sentence("another task"));
    }
}

/// Renames the directory and returns its new path. An empty one takes its place.
///
/// # Errors
/// The directory is unchanged.
pub(crate) fn move_aside(conf_dir: &Path) -> io::Result<PathBuf> {
    let mut name = conf_dir.as_os_str().to_owned();
    name.push(format!(".2017-{}", clock::wall_ms() / 1000));
    let aside = PathBuf::from(name);
    let mode = fs::metadata(conf_dir)?.permissions();
    fs::rename(conf_dir, &aside)?;
    fs::create_dir(conf_dir)?;
    fs::set_permissions(conf_dir, mode)?;
    Ok(aside)
}
