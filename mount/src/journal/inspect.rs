//! Reading a state directory for people: what it says, and every problem with file and line.
//!
//! Owns the checks. Only reads, takes no lock, and tolerates a daemon that writes meanwhile. Does not know how findings
//! are shown.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use super::claims_log::LogState;
use super::codec;
use super::config::Config;
use super::format::{VERSION, v1};
use super::pools::{ListConfig, PoolConfig};
use super::records::Record;
use super::trust;
use crate::model::pool::{Exclusivity, ListId};
use crate::model::task::TaskId;

/// How often the files are read again if there are problems: a daemon may have changed one file between two reads.
const READS: usize = 3;
/// The pause before a repeated read; a daemon writes a deferred record within milliseconds.
const READ_INTERVAL: Duration = Duration::from_millis(100);

/// Something that is wrong with a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The name of the file in the state directory.
    pub file: &'static str,
    /// The number of the line, from 1; `None` if the problem is one of the whole file.
    pub line: Option<usize>,
    /// A description.
    pub what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}: {}", self.file, self.what),
            None => write!(f, "{}: {}", self.file, self.what),
        }
    }
}

/// The content of a state directory.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) config: Config,
    pub(crate) log: LogState,
    /// The boot of the claims log.
    pub(crate) boot: Option<String>,
    /// The number of records in the claims log.
    pub(crate) records: usize,
    /// The number of events.
    pub(crate) events: usize,
    /// The names of damaged files that a daemon set aside.
    pub(crate) set_aside: Vec<String>,
    pub(crate) problems: Vec<Problem>,
    /// The line of each list in `config`.
    list_lines: BTreeMap<ListId, usize>,
    /// The line of the record that names a task last.
    task_lines: BTreeMap<TaskId, usize>,
}

/// Reads a state directory.
///
/// # Errors
/// The directory cannot be read. Files that cannot be read are problems.
pub(crate) fn inspect(path: &Path) -> io::Result<Found> {
    let mut found = Found::read(path)?;
    for _ in 1..READS {
        if found.problems.is_empty() {
            break;
        }
        std::thread::sleep(READ_INTERVAL);
        found = Found::read(path)?;
    }
    Ok(found)
}

impl Found {
    fn read(path: &Path) -> io::Result<Self> {
        let mut found = Self::default();
        for entry in fs::read_dir(path)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name.contains(trust::DAMAGED) {
                found.set_aside.push(name);
            }
        }
        found.set_aside.sort();
        if let Some(bytes) = found.bytes(path, "config") {
            found.read_config(&bytes);
            found.check_config();
        }
        if let Some(bytes) = found.bytes(path, "claims") {
            found.read_claims(&bytes);
            found.check_claims();
        }
        let events = trust::read(&path.join("events")).unwrap_or_default();
        found.events = events.iter().filter(|&&b| b == b'\n').count();
        Ok(found)
    }

    fn bytes(&mut self, path: &Path, name: &'static str) -> Option<Vec<u8>> {
        let file = path.join(name);
        match trust::read(&file) {
            Ok(bytes) => Some(bytes),
            Err(error) => {
                let what = if error.kind() == io::ErrorKind::NotFound {
                    "there is no such file".to_owned()
                } else {
                    format!("cannot be read: {error}")
                };
                self.problem(name, None, what);
                None
            }
        }
    }

    fn problem(&mut self, file: &'static str, line: Option<usize>, what: impl Into<String>) {
        self.problems.push(Problem { file, line, what: what.into() });
    }

    fn read_config(&mut self, bytes: &[u8]) {
        const FILE: &str = "config";
        let (mut has_header, mut next, mut end, mut last_line) = (false, None, None, 0);
        for (number, line) in (1..).zip(bytes.split_inclusive(|&b| b == b'\n')) {
            last_line = number;
            let line = match codec::record::<v1::ConfigLine>("", line) {
                Ok(line) => line,
                Err(error) => {
                    self.problem(FILE, Some(number), error.to_string());
                    continue;
                }
            };
            match line {
                v1::ConfigLine::Header { version, .. } if version > VERSION => {
                    self.problem(FILE, Some(number), newer(version));
                }
                v1::ConfigLine::Header { kcm, .. } => has_header |= number == 1 && kcm == FILE,
                v1::ConfigLine::Next { node } => next = next.max(Some(node)),
                v1::ConfigLine::Last(last) => (self.config.last, self.config.stale) = last.decoded(),
                v1::ConfigLine::Pool(pool) => match PoolConfig::try_from(pool) {
                    Ok(pool) => self.add_pool(number, pool, None),
                    Err(error) => self.problem(FILE, Some(number), error.to_string()),
                },
                v1::ConfigLine::List { pool, list } => {
                    match PoolConfig::try_from(pool).and_then(|pool| Ok((pool, ListConfig::try_from(list)?)))
                    {
                        Ok((pool, list)) => self.add_pool(number, pool, Some(list)),
                        Err(error) => self.problem(FILE, Some(number), error.to_string()),
                    }
                }
                v1::ConfigLine::Attributes(attributes) => self.config.attributes.push(attributes.into()),
                v1::ConfigLine::End { lines } => end = Some((number, lines)),
            }
        }
        if !has_header {
            self.problem(FILE, Some(1), "the header is missing");
        }
        match next {
            Some(next) => self.config.next_node = next,
            None => self.problem(FILE, None, "the next node id is missing"),
        }
        match end {
            None => self.problem(FILE, None, "the last line is missing"),
            Some((number, lines)) if number != lines || last_line != lines => {
                self.problem(FILE, Some(number), format!("{last_line} lines, where {lines} were written"));
            }
            Some(_) => {}
        }
    }

    fn add_pool(&mut self, line: usize, pool: PoolConfig, list: Option<ListConfig>) {
        let known = self.config.pools.iter_mut().find(|known| known.node == pool.node);
        let what = match (known, &list) {
            (Some(known), _) if *known != (PoolConfig { lists: known.lists.clone(), ..pool.clone() }) => {
                Some(format!("pool {} differs from an earlier line", pool.name))
            }
            (Some(_), None) => Some(format!("pool {} is there twice", pool.name)),
            (Some(known), Some(list)) => {
                known.lists.push(list.clone());
                None
            }
            (None, None) => {
                self.config.pools.push(pool);
                None
            }
            (None, Some(list)) => {
                let what = format!("the line of pool {} is missing", pool.name);
                self.config.pools.push(PoolConfig { lists: vec![list.clone()], ..pool });
                Some(what)
            }
        };
        if let Some(what) = what {
            self.problem("config", Some(line), what);
        }
        if let Some(list) = list {
            self.list_lines.insert(list.id, line);
        }
    }

    /// Checks the pools and lists against each other.
    fn check_config(&mut self) {
        let (mut names, mut nodes, mut problems) = (BTreeSet::new(), BTreeSet::new(), Vec::new());
        let lists: Vec<(&PoolConfig, &ListConfig)> = self
            .config
            .pools
            .iter()
            .flat_map(|pool| pool.lists.iter().map(move |list| (pool, list)))
            .collect();
        for pool in &self.config.pools {
            if !names.insert(&pool.name) {
                problems.push((None, format!("two pools are named {}", pool.name)));
            }
        }
        let pools = self.config.pools.iter().map(|pool| (pool.node, pool.name.to_string(), None));
        let all = pools.chain(lists.iter().map(|(pool, list)| {
            (list.id.0, format!("{} {}", pool.name, list.name), self.list_lines.get(&list.id).copied())
        }));
        for (node, name, line) in all {
            if !nodes.insert(node) {
                problems.push((line, format!("node id {node} of {name} is given twice")));
            }
            if node >= self.config.next_node {
                problems.push((line, format!("node id {node} of {name} is not below the next one")));
            }
        }
        for (n, (pool, list)) in lists.iter().enumerate() {
            let line = self.list_lines.get(&list.id).copied();
            if list.name.parse().as_ref() != Ok(&list.cpus) {
                problems.push((line, format!("list {:?} has the CPUs {}", list.name, list.cpus)));
            }
            for (other_pool, other) in lists.iter().take(n) {
                let common = list.cpus.intersection(&other.cpus);
                if !common.is_empty() {
                    problems.push((
                        line,
                        format!(
                            "{} {} and {} {} overlap in {common}",
                            pool.name, list.name, other_pool.name, other.name
                        ),
                    ));
                }
            }
        }
        for (line, what) in problems {
            self.problem("config", line, what);
        }
    }

    fn read_claims(&mut self, bytes: &[u8]) {
        const FILE: &str = "claims";
        let whole = bytes.iter().rposition(|&b| b == b'\n').map_or(0, |end| end + 1);
        let (lines, tail) = bytes.split_at_checked(whole).unwrap_or((bytes, &[]));
        let mut lines = (1..).zip(lines.split_inclusive(|&b| b == b'\n'));
        let header = lines.next().map(|(_, line)| codec::record::<v1::ClaimsHeader>("", line));
        match header {
            Some(Ok(header)) if header.version > VERSION => {
                return self.problem(FILE, Some(1), newer(header.version));
            }
            Some(Ok(header)) if header.kcm == FILE => self.boot = Some(header.boot),
            Some(Err(error)) => {
                return self.problem(
                    FILE,
                    Some(1),
                    format!("{error}; without the header no record can be checked"),
                );
            }
            _ => return self.problem(FILE, Some(1), "the header is missing"),
        }
        let seed = self.boot.clone().unwrap_or_default();
        let (mut next, mut cgroups) = (0, v1::SharedCgroups::default());
        for (number, line) in lines {
            let line = codec::record::<v1::ClaimsLine>(&seed, line).map_err(|error| error.to_string());
            let record = line.and_then(|v1::ClaimsLine { n, r }| {
                Ok((n, r.decoded(&mut cgroups).map_err(|error| error.to_string())?))
            });
            match record {
                Ok((n, record)) => {
                    if n != next {
                        self.problem(
                            FILE,
                            Some(number),
                            format!("record {n} follows, where {next} was expected"),
                        );
                    }
                    next = n.wrapping_add(1);
                    self.note_tasks(number, &record);
                    self.log.add(record);
                    self.records += 1;
                }
                Err(what) => {
                    self.problem(FILE, Some(number), what);
                    // The numbers tell whether only this record is damaged.
                    next += 1;
                }
            }
        }
        // A line without its newline is being written, or the daemon was killed while it wrote: nothing is lost.
        if codec::has_lost_its_end::<v1::ClaimsLine>(&seed, tail) {
            self.problem(
                FILE,
                Some(bytes.iter().filter(|&&b| b == b'\n').count() + 1),
                "the newline is damaged",
            );
        }
    }

    fn note_tasks(&mut self, line: usize, record: &Record) {
        match record {
            Record::Intent(claim) | Record::Claimed(claim) | Record::Inherited { heir: claim, .. } => {
                self.task_lines.insert(claim.task, line);
            }
            Record::Batch(records) => records.iter().for_each(|record| self.note_tasks(line, record)),
            _ => {}
        }
    }

    /// Checks the claims against the configuration.
    fn check_claims(&mut self) {
        let (mut holders, mut problems) = (BTreeMap::new(), Vec::new());
        let claims = self.log.claims.values().map(|(_, claim)| (claim, "claim"));
        let intents = self.log.intents.values().map(|claim| (claim, "intent"));
        let releasing = self.log.releasing.values().map(|claim| (claim, "release"));
        for (claim, kind) in claims.chain(intents).chain(releasing) {
            let line = self.task_lines.get(&claim.task).copied();
            let pid = claim.task.pid;
            let Some(pool) = self.pool_of(claim.list) else {
                problems.push((
                    line,
                    format!("the {kind} of task {pid} is on an unknown list ({})", claim.list.0),
                ));
                continue;
            };
            if kind == "claim"
                && pool.exclusivity == Exclusivity::Exclusive
                && let Some(other) = holders.insert(claim.list, pid)
            {
                let list = self.list_name(claim.list);
                problems
                    .push((line, format!("tasks {other} and {pid} are both on the exclusive list {list}")));
            }
        }
        for reclaimed in self.log.reclaimed.iter() {
            if reclaimed.seq >= self.log.events {
                problems
                    .push((None, format!("event {} was given out before it was reserved", reclaimed.seq)));
            }
        }
        for (line, what) in problems {
            self.problem("claims", line, what);
        }
    }

    fn pool_of(&self, list: ListId) -> Option<&PoolConfig> {
        self.config.pools.iter().find(|pool| pool.lists.iter().any(|known| known.id == list))
    }

    /// Returns `<pool> <list>`, or the node id of a list that does not exist.
    pub(crate) fn list_name(&self, list: ListId) -> String {
        let name = |pool: &PoolConfig| {
            let found = pool.lists.iter().find(|known| known.id == list)?;
            Some(format!("{} {}", pool.name, found.name))
        };
        self.config.pools.iter().find_map(name).unwrap_or_else(|| format!("unknown list {}", list.0))
    }
}

fn newer(version: u32) -> String {
    format!("written by a newer kcm (format {version}, this one knows {VERSION}); run that one")
}
