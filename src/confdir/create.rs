//! Creates pools and lists, and removes what was left incomplete.
//!
//! Owns the order of steps that makes an interrupted creation recognisable. Does not know which pools are wanted.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;

use anyhow::{Error, bail};

use super::read::subdirectories;
use super::{ConfDir, file_error};

impl ConfDir {
    /// Creates the directory of all pools. Returns whether it was missing.
    ///
    /// # Errors
    /// The filesystem refuses.
    pub(crate) fn create_pools_dir(&self) -> Result<bool, Error> {
        let pools = self.pools_dir();
        match create_dir(&pools) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(file_error(&pools, error)),
        }
    }

    /// Creates a pool without lists.
    ///
    /// # Errors
    /// It exists, or the daemon or the filesystem refuses.
    pub(crate) fn create_pool(&self, name: &str) -> Result<(), Error> {
        let pool = self.pool(name);
        log::debug!("{}: creating the pool", pool.display());
        self.with_reason(&pool, || create_dir(&pool))
    }

    /// Makes a pool exclusive or shared.
    ///
    /// # Errors
    /// The daemon or the filesystem refuses.
    pub(crate) fn set_exclusive(&self, pool: &str, exclusive: bool) -> Result<(), Error> {
        let flag = self.pool(pool).join("exclusive");
        let content = if exclusive { "1" } else { "0" };
        log::debug!("{}: writing {content}", flag.display());
        self.with_reason(&flag, || fs::write(&flag, content))
    }

    /// Gives the exclusive lists of a pool partitions.
    ///
    /// # Errors
    /// The daemon refuses, or there is none.
    pub(crate) fn isolate(&self, pool: &str) -> Result<(), Error> {
        if !self.mounted {
            bail!("{}: only a mount has isolated pools; run kcm mount first", self.path.display());
        }
        let mode = self.pool(pool).join("mode");
        log::debug!("{}: writing isolated", mode.display());
        self.with_reason(&mode, || fs::write(&mode, "isolated"))
    }

    /// Creates a CPU list without tasks.
    ///
    /// # Errors
    /// It exists, or the daemon or the filesystem refuses.
    pub(crate) fn create_list(&self, pool: &str, list: &str) -> Result<(), Error> {
        let list = self.pool(pool).join(list);
        log::debug!("{}: creating the list", list.display());
        self.with_reason(&list, || {
            create_dir(&list)?;
            // On a mount the daemon creates the file.
            if !self.mounted {
                fs::write(list.join("tasks"), "")?;
            }
            Ok(())
        })
    }

    /// Removes the pools and lists of a plain directory whose creation was interrupted: those without the file that
    /// is created last.
    pub(crate) fn remove_incomplete(&self) {
        if self.mounted {
            return;
        }
        for pool in subdirectories(&self.pools_dir()).unwrap_or_default() {
            let pool = self.pools_dir().join(&pool);
            for list in subdirectories(&pool).unwrap_or_default() {
                let list = pool.join(&list);
                if !list.join("tasks").exists() {
                    log::debug!("{}: removing it, because it has no tasks file", list.display());
                    let _ = fs::remove_dir(list);
                }
            }
            if !pool.join("exclusive").exists() {
                log::debug!("{}: removing it, because it has no file exclusive", pool.display());
                let _ = fs::remove_dir(&pool);
            }
        }
    }

    /// Removes the directory of a pool or of a list, with its files. Does nothing if that is impossible: the caller
    /// checks.
    pub(crate) fn remove_created(&self, directory: &Path) {
        log::debug!("{}: removing it", directory.display());
        // On a mount the files disappear with their directory.
        if !self.mounted {
            for file in ["tasks", "exclusive"] {
                let _ = fs::remove_file(directory.join(file));
            }
        }
        let _ = fs::remove_dir(directory);
    }
}

/// Creates a directory that everybody may read, whatever the umask adds: unprivileged users look up their list.
fn create_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o755).create(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn incomplete_pools_and_lists_are_removed() {
        let home = tempfile::tempdir().unwrap();
        let dir = ConfDir::open(home.path()).unwrap();
        assert!(dir.create_pools_dir().unwrap());
        assert!(!dir.create_pools_dir().unwrap());
        dir.create_pool("whole").unwrap();
        dir.set_exclusive("whole", true).unwrap();
        dir.create_list("whole", "0").unwrap();
        fs::create_dir(dir.pool("whole").join("1")).unwrap();
        dir.create_pool("begun").unwrap();
        dir.remove_incomplete();
        assert!(dir.tasks("whole", "0").exists());
        assert!(!dir.pool("whole").join("1").exists());
        assert!(!dir.pool("begun").exists());
    }

    #[test]
    fn a_created_list_is_removed_with_its_file() {
        let home = tempfile::tempdir().unwrap();
        let dir = ConfDir::open(home.path()).unwrap();
        dir.create_pools_dir().unwrap();
        dir.create_pool("p").unwrap();
        dir.create_list("p", "0").unwrap();
        dir.remove_created(&dir.pool("p").join("0"));
        assert!(!dir.pool("p").join("0").exists());
    }
}
