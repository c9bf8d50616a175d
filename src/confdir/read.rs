//! Reads pools, lists and tasks.
//!
//! Owns the format of `exclusive` and `tasks`, and which files may disappear while they are read. Does not know
//! what the pools are for.
//!
//! `kcm mount --import` (kcm_mount::import) reads the same layout with other rules: it ignores damaged words, whereas a
//! command must not report or rewrite a file that it cannot parse.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::Path;

use anyhow::{Error, anyhow, bail};
use kcm_mount::model::cpuset::{CpuId, CpuSet};
use kcm_mount::plain::{self, Access};
use kcm_mount::text;
use nix::errno::Errno;

use super::{ConfDir, file_error, is_daemon_gone};

/// A pool and its CPU lists, by the names of their directories.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pool {
    pub(crate) exclusive: bool,
    /// Whether exclusive lists with offline CPUs can be claimed.
    pub(crate) partial: bool,
    /// Whether claims on its lists get partitions.
    pub(crate) isolated: bool,
    /// Whether the pool ends with its last task: a command has made it for itself.
    pub(crate) transient: bool,
    /// The lists that take no new tasks.
    pub(crate) draining: BTreeSet<String>,
    pub(crate) lists: BTreeMap<String, Vec<u32>>,
}

impl Pool {
    /// Returns the lists in ascending order of their first CPU. Directories whose names are not CPU lists are last.
    pub(crate) fn lists_by_cpu(&self) -> Vec<(&str, &[u32])> {
        let mut lists: Vec<(&str, &[u32])> =
            self.lists.iter().map(|(list, tasks)| (list.as_str(), tasks.as_slice())).collect();
        let first_cpu = |list: &str| parse_cpu_list(list).and_then(|cpus| cpus.first());
        lists.sort_by_key(|(list, _)| first_cpu(list).map_or(u32::MAX, CpuId::get));
        lists
    }

    /// Whether pods may have lists of this pool. A transient one belongs to the command that has made it.
    pub(crate) fn is_for_pods(&self) -> bool {
        self.exclusive && !self.transient
    }

    /// Whether a free list of the pool can be claimed: it is not draining, and unless the pool is partial, it has no offline CPU.
    pub(crate) fn can_serve(&self, list: &str, offline: &CpuSet) -> bool {
        let has_cpus = parse_cpu_list(list).is_none_or(|cpus| {
            if self.partial { !cpus.is_subset(offline) } else { cpus.is_disjoint(offline) }
        });
        has_cpus && !self.draining.contains(list)
    }
}

/// The pools by name.
pub(crate) type Pools = BTreeMap<String, Pool>;

/// The pools and lists that can be read, and what is wrong with the others.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) pools: Pools,
    /// One message for each pool or list that was passed over. Never on a mount.
    pub(crate) damaged: Vec<String>,
}

impl Found {
    /// Logs what was passed over, and returns the rest.
    pub(crate) fn warned(self) -> Pools {
        self.damaged.iter().for_each(|damage| log::warn!("{damage}; passed over"));
        self.pools
    }
}

impl ConfDir {
    /// Returns every pool with its lists and their tasks.
    ///
    /// # Errors
    /// As [`ConfDir::find`]; also if a pool or a list is damaged.
    pub(crate) fn pools(&self) -> Result<Pools, Error> {
        let Found { pools, damaged } = self.find()?;
        match damaged.into_iter().next() {
            Some(damage) => bail!("{damage}"),
            None => Ok(pools),
        }
    }

    /// Returns every pool with its lists and their tasks. A damaged list of a plain directory, which anybody may own,
    /// does not stop the use of the others. Files are read one after the other, so that on a plain directory, without
    /// the lock, lists may be from different moments.
    ///
    /// # Errors
    /// The directory has no pools, the daemon has ended, or access is denied.
    pub(crate) fn find(&self) -> Result<Found, Error> {
        let directory = self.pools_dir();
        let names = subdirectories(&directory).map_err(|error| match error.kind() {
            ErrorKind::NotFound => {
                match self.path.parent().filter(|parent| parent.join("pools") == self.path) {
                    Some(parent) => {
                        let (path, parent) = (self.path.display(), parent.display());
                        anyhow!("{path}: no pools; the directory is the one above: --conf-dir={parent}")
                    }
                    None => {
                        anyhow!("{}: no pools; run kcm init (is kcm mount running?)", self.path.display())
                    }
                }
            }
            _ => file_error(&directory, error),
        })?;
        let mut found = Found::default();
        for name in names {
            let pool = match name.to_str() {
                Some(name) => self.read_pool(name, &mut found.damaged),
                None => Err(not_utf8(&directory.join(&name))),
            };
            if let Some(pool) = self.or_passed_over(pool, &mut found.damaged)?.flatten() {
                found.pools.insert(name.to_string_lossy().into_owned(), pool);
            }
        }
        self.check_mounted()?;
        Ok(found)
    }

    /// Adds the error about a pool or a list to `damaged`, unless it concerns the whole directory.
    fn or_passed_over<T>(
        &self,
        read: Result<T, Error>,
        damaged: &mut Vec<String>,
    ) -> Result<Option<T>, Error> {
        match read {
            Ok(read) => Ok(Some(read)),
            Err(error) if self.mounted || error.downcast_ref::<Damaged>().is_none() => Err(error),
            Err(error) => {
                damaged.push(format!("{error:#}"));
                Ok(None)
            }
        }
    }

    /// Returns `None` if the pool has been removed since its name was read.
    fn read_pool(&self, name: &str, damaged: &mut Vec<String>) -> Result<Option<Pool>, Error> {
        let pool = self.pool(name);
        let flag = pool.join("exclusive");
        let read = self.read(&[name, "exclusive"]);
        let Some(exclusive) = self.unless_removed(&pool, &flag, read)? else { return Ok(None) };
        let Some(names) = self.unless_removed(&pool, &pool, subdirectories(&pool))? else { return Ok(None) };
        let mut lists = BTreeMap::new();
        for list in names {
            let tasks = match list.to_str() {
                Some(list) => self.read_list(name, list),
                None => Err(not_utf8(&pool.join(&list))),
            };
            if let Some(tasks) = self.or_passed_over(tasks, damaged)?.flatten() {
                lists.insert(list.to_string_lossy().into_owned(), tasks);
            }
        }
        // A plain directory has no such files.
        let is = |file: &str, text: &[u8]| {
            self.mounted && self.read(&[name, file]).is_ok_and(|found| found.trim_ascii() == text)
        };
        let (partial, isolated, transient) =
            (is("partial", b"1"), is("mode", b"isolated"), is("transient", b"1"));
        let drains =
            |list: &&String| self.state(name, list).is_some_and(|state| state.ends_with(" draining"));
        let draining = lists.keys().filter(drains).cloned().collect();
        let exclusive = exclusive.first() == Some(&b'1');
        Ok(Some(Pool { exclusive, partial, isolated, transient, draining, lists }))
    }

    /// Returns what the file `state` of a list says; `None` if there is none.
    pub(crate) fn state(&self, pool: &str, list: &str) -> Option<String> {
        let state = self.mounted.then(|| self.read(&[pool, list, "state"]).ok()).flatten()?;
        Some(String::from_utf8_lossy(&state).trim().to_owned())
    }

    /// Returns the lists of these pools that should be isolated and are not, each with the reason.
    pub(crate) fn not_isolated<'a>(
        &'a self,
        pools: &'a Pools,
    ) -> impl Iterator<Item = (&'a str, &'a str, String)> {
        let isolated = pools.iter().filter(|(_, pool)| pool.isolated);
        let lists = isolated.flat_map(|(name, pool)| pool.lists.keys().map(move |list| (name, list)));
        lists.filter_map(|(pool, list)| {
            let reason = self.state(pool, list)?.strip_prefix("invalid: ")?.to_owned();
            Some((pool.as_str(), list.as_str(), reason))
        })
    }

    /// Returns `None` if the list has been removed since its name was read.
    fn read_list(&self, pool: &str, list: &str) -> Result<Option<Vec<u32>>, Error> {
        let file = self.tasks(pool, list);
        let read = self.read(&[pool, list, "tasks"]);
        let bytes = self.unless_removed(&self.pool(pool).join(list), &file, read)?;
        bytes.map(|bytes| parse_tasks(&file, &bytes)).transpose()
    }

    /// Reads a file below `pools`.
    fn read(&self, below_pools: &[&str]) -> io::Result<Vec<u8>> {
        if self.mounted {
            let path = below_pools.iter().fold(self.pools_dir(), |path, name| path.join(name));
            return fs::read(path);
        }
        plain::read(&mut self.open_plain(below_pools, Access::Read)?)
    }

    /// Opens a file below `pools` of a plain directory.
    pub(super) fn open_plain(&self, below_pools: &[&str], access: Access) -> io::Result<File> {
        let parts: Vec<&OsStr> = std::iter::once(&"pools").chain(below_pools).map(OsStr::new).collect();
        plain::open(&self.path, &parts, access)
    }

    /// Returns what was read, or `None` if the file's directory has been removed since its name was read.
    fn unless_removed<T>(
        &self,
        directory: &Path,
        file: &Path,
        read: io::Result<T>,
    ) -> Result<Option<T>, Error> {
        let exists = || fs::symlink_metadata(directory).is_ok();
        match read {
            Ok(read) => Ok(Some(read)),
            // On a plain directory a missing file in an existing directory is damage.
            Err(error) if error.kind() == ErrorKind::NotFound && (self.mounted || !exists()) => Ok(None),
            // The mount answers this for an open file of a removed directory.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ESTALE)) => Ok(None),
            // Not a property of the file, but of the caller and the machine.
            Err(error) if is_about_caller(&error) => Err(file_error(file, error)),
            Err(error) => Err(Damaged(format!("{:#}", file_error(file, error))).into()),
        }
    }

    /// Returns the PIDs of a list at this moment.
    ///
    /// # Errors
    /// It cannot be read or parsed.
    pub(crate) fn read_tasks(&self, pool: &str, list: &str) -> Result<Vec<u32>, Error> {
        let file = self.tasks(pool, list);
        let bytes = self.read(&[pool, list, "tasks"]).map_err(|error| file_error(&file, error))?;
        parse_tasks(&file, &bytes)
    }
}

/// A pool or a list that cannot be read, while others may be.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Damaged(String);

fn not_utf8(path: &Path) -> Error {
    Damaged(format!("{}: its name is not UTF-8; rename it", text::name(path.as_os_str().as_encoded_bytes())))
        .into()
}

/// Whether a file cannot be read because of who reads it, or where: then others cannot be read either.
fn is_about_caller(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EACCES | Errno::EPERM | Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM))
        || is_daemon_gone(error)
}

/// Returns the names of all directories in `path`. Legacy clients take every directory for a pool or a list.
pub(super) fn subdirectories(path: &Path) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            names.push(entry.file_name());
        }
    }
    Ok(names)
}

/// Returns the PIDs in `bytes`, the content of the `tasks` file `file`.
///
/// # Errors
/// It is not a list of PIDs.
pub(super) fn parse_tasks(file: &Path, bytes: &[u8]) -> Result<Vec<u32>, Error> {
    let pids = str::from_utf8(bytes).ok().and_then(parse_pids);
    pids.ok_or_else(|| Damaged(format!("{}: not a list of PIDs; repair it by hand", file.display())).into())
}

fn parse_pids(text: &str) -> Option<Vec<u32>> {
    let words = text.split(',').map(str::trim).filter(|word| !word.is_empty());
    words.map(|word| word.parse().ok()).collect()
}

/// Returns the CPUs of a list, or `None` if its directory is not named like a CPU list.
pub(crate) fn parse_cpu_list(list: &str) -> Option<CpuSet> {
    list.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_of_the_mount_and_of_legacy_clients() {
        for (text, tasks) in [
            ("", &[][..]),
            ("\n", &[]),
            ("1,22,333\n", &[1, 22, 333]),
            ("1, 22", &[1, 22]),
            (",1,,2,", &[1, 2]),
        ] {
            assert_eq!(parse_pids(text).as_deref(), Some(tasks), "{text:?}");
        }
        for text in ["x", "1 2", "-1", "1,x"] {
            assert_eq!(parse_pids(text), None, "{text:?}");
        }
    }

    #[test]
    fn lists_are_ordered_by_their_first_cpu() {
        let lists = ["10", "2,0", "x", "1"].map(|list| (list.to_owned(), Vec::new()));
        let pool = Pool { exclusive: true, lists: lists.into(), ..Pool::default() };
        let names: Vec<&str> = pool.lists_by_cpu().into_iter().map(|(list, _)| list).collect();
        assert_eq!(names, ["2,0", "1", "10", "x"]);
    }

    /// A plain directory with pool `p`, list `0`.
    fn plain() -> (tempfile::TempDir, ConfDir) {
        let home = tempfile::tempdir().unwrap();
        fs::create_dir_all(home.path().join("pools/p/0")).unwrap();
        fs::write(home.path().join("pools/p/exclusive"), "1").unwrap();
        fs::write(home.path().join("pools/p/0/tasks"), "7").unwrap();
        let dir = ConfDir::open(home.path()).unwrap();
        (home, dir)
    }

    #[test]
    fn a_plain_directory_is_read_as_it_is() {
        let (_home, dir) = plain();
        let pool = Pool { exclusive: true, lists: [("0".to_owned(), vec![7])].into(), ..Pool::default() };
        assert_eq!(dir.pools().unwrap(), Pools::from([("p".to_owned(), pool)]));
    }

    #[test]
    fn a_missing_or_damaged_file_is_named_and_the_others_are_read() {
        let (home, dir) = plain();
        fs::create_dir(home.path().join("pools/p/1")).unwrap();
        fs::write(dir.tasks("p", "1"), "seven").unwrap();
        fs::create_dir(home.path().join("pools/p/2")).unwrap();
        fs::create_dir(home.path().join("pools/q")).unwrap();
        let Found { pools, mut damaged } = dir.find().unwrap();
        assert_eq!(pools["p"].lists, BTreeMap::from([("0".to_owned(), vec![7])]));
        assert_eq!(pools.len(), 1);
        damaged.sort();
        let expected = [
            "p/1/tasks: not a list of PIDs; repair it by hand",
            "p/2/tasks: No such file or directory",
            "q/exclusive: No such file or directory",
        ];
        let pools = home.path().join("pools");
        assert_eq!(damaged, expected.map(|damage| format!("{}/{damage}", pools.display())));
        assert!(expected.iter().any(|damage| dir.pools().unwrap_err().to_string().ends_with(damage)));
    }
}
