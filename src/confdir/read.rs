//! Reads pools, lists and tasks.
//!
//! Owns the format of `exclusive` and `tasks`, and which files may disappear while they are read. Does not know
//! what the pools are for.
//!
//! `kcm mount --import` (kcm_mount::import) reads the same layout with other rules: it takes over as much as it can
//! and ignores damaged words, whereas a command must not report or rewrite a file that it cannot parse.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;

use anyhow::{Context as _, Error, anyhow};
use kcm_mount::model::cpuset::{CpuId, CpuSet};

use super::{ConfDir, file_error};

/// A pool and its CPU lists, by the names of their directories.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pool {
    pub(crate) exclusive: bool,
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
}

/// The pools by name.
pub(crate) type Pools = BTreeMap<String, Pool>;

impl ConfDir {
    /// Returns every pool with its lists and their tasks. Files are read one after the other, so that on a plain
    /// directory, without the lock, lists may be from different moments.
    ///
    /// # Errors
    /// A required file is missing, cannot be read, or cannot be parsed.
    pub(crate) fn pools(&self) -> Result<Pools, Error> {
        let directory = self.pools_dir();
        let names = subdirectories(&directory).map_err(|error| match error.kind() {
            ErrorKind::NotFound => {
                anyhow!("{}: no pools; run kcm init (is kcm mount running?)", self.path.display())
            }
            _ => file_error(&directory, error),
        })?;
        let mut pools = Pools::new();
        for name in names {
            if let Some(pool) = self.read_pool(&name)? {
                pools.insert(name, pool);
            }
        }
        self.check_mounted()?;
        Ok(pools)
    }

    /// Returns `None` if the pool has been removed since its name was read.
    fn read_pool(&self, name: &str) -> Result<Option<Pool>, Error> {
        let pool = self.pool(name);
        let flag = pool.join("exclusive");
        let Some(exclusive) = self.unless_removed(&pool, &flag, fs::read(&flag))? else { return Ok(None) };
        let Some(names) = self.unless_removed(&pool, &pool, subdirectories(&pool))? else { return Ok(None) };
        let mut lists = BTreeMap::new();
        for list in names {
            let file = self.tasks(name, &list);
            if let Some(text) = self.unless_removed(&pool.join(&list), &file, fs::read_to_string(&file))? {
                lists.insert(list, parse_tasks(&file, &text)?);
            }
        }
        Ok(Some(Pool { exclusive: exclusive.first() == Some(&b'1'), lists }))
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
            // On a plain directory a missing file in an existing directory is damage, and an error.
            Err(error) if error.kind() == ErrorKind::NotFound && (self.mounted || !exists()) => Ok(None),
            // The mount answers this for an open file of a removed directory.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ESTALE)) => Ok(None),
            Err(error) => Err(file_error(file, error)),
        }
    }
}

/// Returns the names of all directories in `path`. Legacy clients take every directory for a pool or a list.
pub(super) fn subdirectories(path: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(names)
}

/// Returns the PIDs in a `tasks` file.
///
/// # Errors
/// It cannot be read or parsed.
pub(crate) fn read_tasks(file: &Path) -> Result<Vec<u32>, Error> {
    let text = fs::read_to_string(file).map_err(|error| file_error(file, error))?;
    parse_tasks(file, &text)
}

/// Returns the PIDs in `text`, the content of the `tasks` file `file`.
///
/// # Errors
/// It is not a list of PIDs.
pub(super) fn parse_tasks(file: &Path, text: &str) -> Result<Vec<u32>, Error> {
    parse_pids(text).with_context(|| format!("{}: not a list of PIDs; repair it by hand", file.display()))
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
        let pool = Pool { exclusive: true, lists: lists.into() };
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
        let pool = Pool { exclusive: true, lists: [("0".to_owned(), vec![7])].into() };
        assert_eq!(dir.pools().unwrap(), Pools::from([("p".to_owned(), pool)]));
    }

    #[test]
    fn a_missing_or_damaged_file_is_an_error_that_names_it() {
        let (_home, dir) = plain();
        fs::write(dir.tasks("p", "0"), "seven").unwrap();
        let damaged = dir.pools().unwrap_err().to_string();
        assert!(damaged.contains("pools/p/0/tasks: not a list of PIDs"), "{damaged}");
        fs::remove_file(dir.tasks("p", "0")).unwrap();
        let missing = dir.pools().unwrap_err().to_string();
        assert!(missing.contains("pools/p/0/tasks: No such file"), "{missing}");
    }
}
