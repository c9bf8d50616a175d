//! A configuration directory that no daemon serves.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use tempfile::TempDir;

use super::KCM;
use super::own_cgroup::OwnCgroup;
use super::processes::reset_signals;

/// A configuration directory in the legacy layout, which no daemon serves.
pub struct Plain {
    home: TempDir,
    _cgroup: Arc<OwnCgroup>,
}

impl Plain {
    /// Without pools.
    pub fn new() -> Self {
        reset_signals();
        let home = tempfile::tempdir().expect("a temporary directory");
        fs::create_dir_all(home.path().join("conf/pools")).expect("mkdir");
        fs::write(home.path().join("conf/lock"), "").expect("a lock");
        Self { home, _cgroup: OwnCgroup::of_this_thread() }
    }

    /// `lists`: their names and the content of `tasks`.
    pub fn make_pool(&self, pool: &str, exclusive: bool, lists: &[(&str, &str)]) {
        let pool = self.conf().join("pools").join(pool);
        fs::create_dir(&pool).expect("mkdir of a pool");
        fs::write(pool.join("exclusive"), if exclusive { "1" } else { "0" }).expect("exclusive");
        for (list, tasks) in lists {
            fs::create_dir(pool.join(list)).expect("mkdir of a list");
            fs::write(pool.join(list).join("tasks"), tasks).expect("tasks");
        }
    }

    pub fn home(&self) -> &Path {
        self.home.path()
    }

    pub fn conf(&self) -> PathBuf {
        self.home.path().join("conf")
    }

    pub fn tasks(&self, pool: &str, list: &str) -> PathBuf {
        self.conf().join("pools").join(pool).join(list).join("tasks")
    }

    /// `kcm <words> --conf-dir=<conf>`.
    pub fn kcm(&self, words: &[&str]) -> Command {
        kcm_for(&self.conf(), words)
    }
}

/// `kcm <words> --conf-dir=<conf>`.
pub fn kcm_for(conf: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(KCM);
    let (name, rest) = words.split_first().expect("a command");
    command.arg(name).arg("--conf-dir").arg(conf).args(rest);
    command
}
