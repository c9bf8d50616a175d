//! Taking over a plain directory in the layout of 2017.
//!
//! Owns: what of it is believed. Must not know: how the live directory is served.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::clock;
use crate::engine::{Caller, Engine};
use crate::model::command::Target;
use crate::model::pool::ListId;
use crate::model::refusal::Refusal;

/// A configuration directory of 2017, as it was found.
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
    /// As they were written: numbers of the host's PID namespace, if they are numbers.
    tasks: Vec<u32>,
}

impl Layout {
    /// Reads `pools/<pool>/exclusive` and `pools/<pool>/<cpulist>/tasks`.
    ///
    /// # Errors
    /// Whatever is not there or cannot be read.
    pub(crate) fn read(conf_dir: &Path) -> io::Result<Self> {
        let mut pools = Vec::new();
        for pool in directories(&conf_dir.join("pools"))? {
            let exclusive = fs::read(pool.path.join("exclusive"))?.first() == Some(&b'1');
            let mut lists = Vec::new();
            for list in directories(&pool.path)? {
                let tasks = fs::read_to_string(list.path.join("tasks"))?;
                let tasks = tasks.split(',').filter_map(|word| word.trim().parse().ok()).collect();
                lists.push(List { name: list.name, tasks });
            }
            pools.push(Pool { name: pool.name, exclusive, lists });
        }
        Ok(Self { pools })
    }
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

/// Makes the pools and lists, and claims for those of the tasks that are really on their list. What is there
/// already is left; what cannot be taken over is named in the log and left out.
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
    engine.set_exclusive(root, 0, id, if pool.exclusive { b"1" } else { b"0" })?;
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

/// In 2017 a number stayed in the file when its process died, and may be somebody else's by now: it is
/// believed where its mask says the same.
fn take_over_task(engine: &Engine, root: Caller, pool: &Pool, list: &List, id: ListId, pid: u32) {
    let what = format!("{} {}: task {pid}", pool.name, list.name);
    if !engine.is_within(id, pid) {
        log::warn!("{what}: not taken over: it has died, or its mask is not within the list");
        return;
    }
    if let Err(refused) = engine.write_tasks(Target::List(id), root, 0, pid.to_string().as_bytes(), false) {
        log::warn!("{what}: not taken over: {}", refused.refusal.sentence("another task"));
    }
}

/// Moves the directory aside, and gives its new name; an empty one stands in its place.
///
/// # Errors
/// It is as it was.
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
