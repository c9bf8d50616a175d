//! The pools of a directory, mounted or plain: whether they are in use, and their removal.
//!
//! Owns the release of tasks before it. Does not know what else is uninstalled.

use std::fs;
use std::path::Path;

use anyhow::{Error, bail};

use crate::confdir::{self, ConfDir};
use crate::host::Host;

/// The number of PIDs in one write: with 12 bytes each they are far below the limit of a command, 64 KiB.
const RELEASES_PER_WRITE: usize = 1000;

/// Checks that no list has tasks.
pub(super) fn check_unused(dir: &ConfDir) -> Result<(), Error> {
    let host = Host::with_processes()?;
    // A plain directory also has the PIDs of dead tasks.
    let is_live = |pid: &u32| dir.is_mounted() || host.is_alive(*pid);
    for (pool, content) in &dir.pools()? {
        for (list, tasks) in &content.lists {
            if let Some(pid) = tasks.iter().find(|pid| is_live(pid)) {
                bail!("{pool} {list} is held by {pid}; end that first, or release it with --force");
            }
        }
    }
    Ok(())
}

/// Removes all pools. `force`: on a mount, releases the tasks of each list first. The caller holds the lock.
pub(super) fn remove_all(dir: &ConfDir, force: bool) -> Result<(), Error> {
    for (pool, content) in dir.pools()? {
        for (list, tasks) in content.lists {
            for pids in tasks.chunks(RELEASES_PER_WRITE).filter(|_| force && dir.is_mounted()) {
                let words: Vec<String> = pids.iter().map(|pid| format!("-{pid}")).collect();
                // An error needs no handling: the removal fails if a task is left, for this reason or a later claim.
                let _ = fs::write(dir.tasks(&pool, &list), words.join(" ") + "\n");
            }
            remove(dir, &dir.pool(&pool).join(&list))?;
        }
        remove(dir, &dir.pool(&pool))?;
    }
    if !dir.is_mounted() {
        let pools = dir.pools_dir();
        fs::remove_dir(&pools).map_err(|error| confdir::file_error(&pools, error))?;
        let lock = dir.path().join("lock");
        fs::remove_file(&lock).map_err(|error| confdir::file_error(&lock, error))?;
    }
    Ok(())
}

/// Removes a pool or a list.
fn remove(dir: &ConfDir, directory: &Path) -> Result<(), Error> {
    dir.remove_created(directory);
    if directory.exists() {
        // Removing it again returns the reason of the failure.
        dir.with_reason(directory, || fs::remove_dir(directory))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A plain directory with pool `p`, list `0`.
    fn plain() -> (tempfile::TempDir, ConfDir) {
        let home = tempfile::tempdir().unwrap();
        let dir = ConfDir::open(home.path()).unwrap();
        dir.create_pools_dir().unwrap();
        dir.create_pool("p").unwrap();
        dir.set_exclusive("p", true).unwrap();
        dir.create_list("p", "0").unwrap();
        (home, dir)
    }

    #[test]
    fn a_plain_directory_is_removed_with_its_pools_and_lock() {
        let (home, dir) = plain();
        let _lock = dir.lock().unwrap();
        check_unused(&dir).unwrap();
        remove_all(&dir, false).unwrap();
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_list_with_a_live_task_is_in_use() {
        let (_home, dir) = plain();
        fs::write(dir.tasks("p", "0"), std::process::id().to_string()).unwrap();
        let error = check_unused(&dir).unwrap_err().to_string();
        assert!(error.starts_with(&format!("p 0 is held by {}", std::process::id())), "{error}");
    }
}
