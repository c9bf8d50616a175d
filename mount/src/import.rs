//! Import of a plain configuration directory in the legacy layout.
//!
//! Owns the checks on what the directory says. Does not know how the live directory is served.
//!
//! What cannot be taken over is found before anything is changed, by the rules of the claim machine itself: the user repairs it,
//! or chooses to leave it out.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::clock;
use crate::engine::{Caller, Engine};
use crate::journal::PoolConfig;
use crate::model::claims::Claims;
use crate::model::command::{Command, Target};
use crate::model::cpuset::CpuSet;
use crate::model::pool::{Exclusivity, ListId, PoolId};
use crate::model::refusal::Refusal;
use crate::plain::{self, Access};
use crate::process;

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
    /// The PIDs in the file, in the host's PID namespace.
    tasks: Vec<u32>,
    /// Everything else in the file.
    nonsense: Vec<String>,
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
                let text = String::from_utf8_lossy(&tasks);
                let (mut tasks, mut nonsense) = (Vec::new(), Vec::new());
                for word in text.split(',').map(str::trim).filter(|word| !word.is_empty()) {
                    match word.parse() {
                        Ok(pid) if pid != 0 => tasks.push(pid),
                        _ => nonsense.push(word.escape_debug().to_string()),
                    }
                }
                lists.push(List { name: list.name, tasks, nonsense });
            }
            pools.push(Pool { name: pool.name, exclusive, lists });
        }
        Ok(Self { pools })
    }

    /// Returns what cannot be taken over, a line each with what to do. PIDs of processes that have ended are nothing to lose.
    /// `existing`: the pools of the state directory. `known`: the CPUs of the machine.
    pub(crate) fn problems(&self, existing: &[PoolConfig], known: &CpuSet) -> Vec<String> {
        let mut check = Check { claims: Claims::new(0), next: 0, known, places: HashMap::new() };
        for pool in existing {
            if let Ok(id) = check.add_pool(pool.name.as_str()) {
                pool.lists.iter().for_each(|list| drop(check.add_list(id, &list.name)));
            }
        }
        self.pools.iter().flat_map(|pool| check.pool(pool)).collect()
    }
}

/// The claim machine on trial: pools and lists are added as they will be.
struct Check<'a> {
    claims: Claims,
    next: u64,
    known: &'a CpuSet,
    /// The lists of the tasks.
    places: HashMap<u32, String>,
}

impl Check<'_> {
    fn add_pool(&mut self, name: &str) -> Result<PoolId, Refusal> {
        self.next += 1;
        let (id, name) = (PoolId(self.next), name.parse().map_err(Refusal::BadPoolName)?);
        self.claims.apply(Command::AddPool { id, name, exclusivity: Exclusivity::Shared })?;
        Ok(id)
    }

    fn add_list(&mut self, pool: PoolId, name: &str) -> Result<CpuSet, Refusal> {
        let cpus = CpuSet::from_name(name).map_err(Refusal::BadCpuList)?;
        let unknown = cpus.difference(self.known);
        if !unknown.is_empty() {
            return Err(Refusal::UnknownCpus { unknown, known: self.known.clone() });
        }
        self.next += 1;
        let id = ListId(self.next);
        self.claims.apply(Command::AddList { pool, id, name: name.to_owned(), cpus: cpus.clone() })?;
        Ok(cpus)
    }

    fn pool(&mut self, pool: &Pool) -> Vec<String> {
        let sentence = |refusal: Refusal| refusal.sentence("another task");
        let id = match self.add_pool(&pool.name) {
            Ok(id) => id,
            Err(Refusal::Exists) => {
                return vec![format!(
                    "pool {}: the state directory has one; rename one of the two",
                    pool.name
                )];
            }
            Err(refusal) => return vec![format!("pool {}: {}", shown(&pool.name), sentence(refusal))],
        };
        let mut problems = Vec::new();
        for list in &pool.lists {
            let name = format!("{} {}", pool.name, shown(&list.name));
            match self.add_list(id, &list.name) {
                Ok(cpus) => problems.extend(self.tasks(pool, list, &name, &cpus)),
                Err(refusal) => problems.push(format!("{name}: {}", sentence(refusal))),
            }
        }
        problems
    }

    fn tasks(&mut self, pool: &Pool, list: &List, name: &str, cpus: &CpuSet) -> Vec<String> {
        let no_pid = |word| format!("{name}: \"{word}\" is not a PID; remove it from the file tasks");
        let mut problems: Vec<String> = list.nonsense.iter().map(no_pid).collect();
        let mut holder = None;
        for &pid in &list.tasks {
            let Ok(Some(mask)) = process::mask_of(pid) else {
                log::info!("{name}: task {pid} has ended; left out");
                continue;
            };
            let task = format!("{name}: task {pid}");
            if !mask.is_subset(cpus) {
                problems.push(format!(
                    "{task} may run on {mask}; pin it (taskset -a -p -c {} {pid}), or remove it from the file tasks",
                    list.name
                ));
            } else if let Some(other) = self.places.get(&pid).filter(|other| *other != name) {
                problems.push(format!("{task} is on {other}, too; remove it from one of the files"));
            } else if let Some(holder) = holder.filter(|holder| pool.exclusive && *holder != pid) {
                problems.push(format!(
                    "{task}: the list is exclusive, and {holder} has it; end one of them, or write 0 to exclusive"
                ));
            } else {
                self.places.insert(pid, name.to_owned());
                holder = Some(pid);
            }
        }
        problems
    }
}

/// A name of a directory, which may have any characters.
fn shown(name: &str) -> String {
    name.escape_debug().to_string()
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
