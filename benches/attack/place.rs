//! The filesystems that are attacked, and the paths of their files, which are the same in both.

use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};

use crate::common::{Machine, Mount, NOBODY, proc_number};
use crate::null_fs::NullFs;

/// The user who attacks; the pool `attacked` is delegated to it.
pub const ATTACKER: u32 = NOBODY;
/// The user who is measured; the pool `calm` is delegated to it.
pub const VICTIM: u32 = NOBODY - 1;
/// The daemon sees this many CPUs, so that a pool can have many lists. The kernel has only the first ones.
const CPUS: u32 = 192;

/// The pool of the attacker.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Pool {
    /// A shared pool with the list 0 and 32 lists that the kernel refuses: as many files to write to.
    Shared,
    /// An exclusive pool with the list 0.
    Exclusive,
    /// A shared pool with 128 lists that the kernel refuses.
    Unsuitable,
}

impl Pool {
    fn lists(self) -> Vec<String> {
        let numbers: Vec<u32> = match self {
            Self::Shared => std::iter::once(0).chain(2..34).collect(),
            Self::Exclusive => vec![0],
            Self::Unsuitable => (2..130).collect(),
        };
        numbers.iter().map(u32::to_string).collect()
    }
}

/// The paths of the files.
#[derive(Clone, Debug)]
pub struct Place(PathBuf);

impl Place {
    pub fn new(root: &Path) -> Self {
        Self(root.to_owned())
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The files of the attacker: `tasks` of [`Pool::Shared`] and of its lists.
    pub fn files(&self) -> Vec<PathBuf> {
        let lists = Pool::Shared.lists();
        std::iter::once(self.pool()).chain(lists.iter().map(|list| self.list(list))).collect()
    }

    /// `tasks` of the attacker's pool.
    pub fn pool(&self) -> PathBuf {
        self.file("pools/attacked/tasks")
    }

    /// `tasks` of a list of the attacker's pool.
    pub fn list(&self, list: &str) -> PathBuf {
        self.file("pools/attacked").join(list).join("tasks")
    }

    /// `tasks` of the victim's list.
    pub fn victims(&self) -> PathBuf {
        self.file("pools/calm/1/tasks")
    }
}

/// A filesystem for one attack.
pub enum Stage {
    Kcm(Mount),
    Empty(NullFs),
}

impl Stage {
    /// A daemon with an exclusive pool of the victim and this pool of the attacker.
    pub fn kcm(pool: Pool) -> Self {
        let mount = Mount::on_machine(&Machine::new(1, CPUS, 1));
        mount.let_everybody_in();
        let delegate = |pool: &str, exclusive, lists: &[String], uid| {
            let lists: Vec<&str> = lists.iter().map(String::as_str).collect();
            mount.make_pool(pool, exclusive, &lists);
            let files = lists.iter().map(|list| mount.tasks(pool, list));
            for file in std::iter::once(mount.pool(pool).join("tasks")).chain(files) {
                chown(file, Some(uid), Some(uid)).expect("chown");
            }
        };
        delegate("calm", true, &["1".into()], VICTIM);
        delegate("attacked", pool == Pool::Exclusive, &pool.lists(), ATTACKER);
        Self::Kcm(mount)
    }

    pub fn empty() -> Self {
        Self::Empty(NullFs::new())
    }

    pub fn root(&self) -> PathBuf {
        match self {
            Self::Kcm(mount) => mount.conf(),
            Self::Empty(null_fs) => null_fs.path().to_owned(),
        }
    }

    /// The process that serves requests.
    pub fn server(&self) -> Option<u32> {
        match self {
            Self::Kcm(mount) => mount.worker(),
            Self::Empty(null_fs) => Some(null_fs.pid()),
        }
    }

    /// Its memory in MiB.
    pub fn resident(&self) -> f64 {
        let status = self.server().map(|pid| format!("/proc/{pid}/status"));
        status.and_then(|status| proc_number(&status, "VmRSS")).map_or(f64::NAN, |kib| kib as f64 / 1024.0)
    }

    /// The warnings and errors in the daemon's log.
    pub fn complaints(&self) -> String {
        let Self::Kcm(mount) = self else { return String::new() };
        let log = fs::read_to_string(mount.state().join("log")).unwrap_or_default();
        let is_complaint = |line: &&str| line.contains("WARNING:") || line.contains("ERROR:");
        let lines: Vec<&str> = log.lines().filter(is_complaint).collect();
        lines.join(" / ")
    }
}
