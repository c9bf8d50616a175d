//! Partitions of cgroup v2: finds the tree, makes partitions, looks at them and takes them back.
//!
//! Owns every access to files of the tree, and the order in which they are written. Does not know claims, or when a partition
//! has to be made. Keeps nothing in memory: [`Partition`] has everything that has to be taken back, and the caller records it first.
//!
//! A partition is a threaded cgroup below the cgroup of the task (a *remote* partition in the words of the kernel's
//! `cgroup-v2.rst`), so that the task stays in its container or service: limits, freezing and killing reach it as before.
//! Or it is the cgroup of the task, with everything that enters it: then it is not made, emptied or removed here.
//! Kernels differ in what they accept, so nothing is decided by version: what was written is read back.

mod members;
mod plan;
mod workqueues;

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use members::{are_at, are_in};

use crate::failpoint::{Step, reached};
use crate::model::cpuset::CpuSet;
use crate::model::partition::{Level, Missing, Partition};
use crate::text::escaped;

/// Where the tree is looked for. In a container that shares the PID namespace of the node, the first ones are the node's.
/// Beside cgroup v1, systemd mounts cgroup v2 in `unified`.
const ROOTS: [&str; 4] = [
    "/proc/1/root/sys/fs/cgroup",
    "/proc/1/root/sys/fs/cgroup/unified",
    "/sys/fs/cgroup",
    "/sys/fs/cgroup/unified",
];
/// The kind of partition, for `cpuset.cpus.partition`. Not `isolated`: with that, Linux 6.12 creates a worker thread while it holds a
/// lock that a process which moves a task to another cgroup waits for, and that one keeps new threads from being created.
/// The whole machine hung when both happened at the same time.
const KIND: &str = "root";
/// How long it may take until a partition has no process. A process that is being created may appear late.
const EMPTYING: Duration = Duration::from_secs(2);

/// Why a partition was not made. Nothing is left of it, apart from what [`Tree::take_back`] removes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum PartitionError {
    /// This machine can make none.
    Missing(Missing),
    /// The task has died.
    Gone,
    /// The cgroup of the task, with its path, can have no partition below it.
    Unsuitable { path: String, why: String },
    /// The kernel refuses to isolate the CPUs, for this reason.
    Refused(String),
}

impl From<Missing> for PartitionError {
    fn from(missing: Missing) -> Self {
        Self::Missing(missing)
    }
}

/// The result of a look at a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// The kernel has isolated its CPUs, and the task is in it.
    Isolated,
    /// It is not in force, for this reason.
    Broken(String),
}

/// The tree of cgroups of this machine.
#[derive(Debug)]
pub(crate) struct Tree {
    root: PathBuf,
}

impl Tree {
    /// Finds the tree, and checks that partitions can be made in it. Writes nothing.
    ///
    /// # Errors
    /// The lack that prevents them.
    pub(crate) fn find() -> Result<Self, Missing> {
        let is_v2 = |root: &&str| statfs(*root).is_ok_and(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC);
        let root = ROOTS.into_iter().find(is_v2).ok_or(Missing::Mount)?;
        let tree = Self { root: PathBuf::from(root) };
        tree.check().map(|()| tree)
    }

    fn check(&self) -> Result<(), Missing> {
        // Only the root of the whole tree has no type.
        if self.root.join("cgroup.type").exists() {
            return Err(Missing::Root);
        }
        if !self.has_word("", "cgroup.controllers", "cpuset") {
            return Err(Missing::Controller);
        }
        if !self.root.join("cpuset.cpus.isolated").exists() {
            return Err(Missing::Kernel);
        }
        let writable = OpenOptions::new().write(true).open(self.root.join("cgroup.subtree_control"));
        writable.map(drop).map_err(|_| Missing::Writable)
    }

    /// Makes the partition, moves the process into it, and reads back that it is in force. It is in the list's cgroup then
    /// with all its threads.
    ///
    /// # Errors
    /// The reason. The caller has to take the partition back.
    pub(crate) fn make(&self, partition: &Partition, pid: u32) -> Result<(), PartitionError> {
        let path = partition.path();
        let parent = &partition.parent;
        let unsuitable = |what: &str, error: &io::Error| {
            let why = format!("{what}: {error}");
            PartitionError::Unsuitable { path: shown(parent), why }
        };
        if !partition.is_whole_cgroup {
            match fs::create_dir(self.at(&path)) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                    return Err(unsuitable("a cgroup below it cannot be made", &error));
                }
                _ => {}
            }
            if self.read(&path, "cgroup.type").is_ok_and(|kind| kind != "threaded") {
                self.write(&path, "cgroup.type", "threaded").map_err(|error| {
                    unsuitable("it has controllers or cgroups that allow no threaded cgroup", &error)
                })?;
            }
        }
        for (above, level) in partition.ancestors().zip(&partition.levels) {
            if level.enabled {
                self.write(above, "cgroup.subtree_control", "+cpuset").map_err(|error| {
                    unsuitable(&format!("cpuset cannot be switched on in {}", shown(above)), &error)
                })?;
            }
        }
        reached(Step::PartitionEnabled);
        let exclusive = |above: &str| {
            let all = self.cpus(above, "cpuset.cpus.exclusive").union(&partition.cpus);
            self.write(above, "cpuset.cpus.exclusive", &all.to_string())
                .map_err(|error| refused(above, "cpuset.cpus.exclusive", &error))
        };
        for (above, _) in partition.ancestors().zip(&partition.levels).filter(|(_, level)| level.exclusive) {
            exclusive(above)?;
        }
        exclusive(&path)?;
        reached(Step::PartitionExclusive);
        if self.is_in_force(partition).is_err() {
            // The kernel looks at an invalid partition again only after it was an ordinary cgroup.
            let _ = self.write(&path, "cpuset.cpus.partition", "member");
            self.write(&path, "cpuset.cpus.partition", KIND)
                .map_err(|error| refused(&path, "cpuset.cpus.partition", &error))?;
            self.is_in_force(partition).map_err(PartitionError::Refused)?;
        }
        reached(Step::PartitionIsolated);
        workqueues::keep_off(&partition.workqueues);
        if !partition.is_whole_cgroup {
            match self.enter(partition, pid) {
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Err(PartitionError::Gone),
                Err(error) => return Err(unsuitable("the task cannot be moved", &error)),
                Ok(()) => {}
            }
        }
        match self.look(partition, pid) {
            Found::Isolated => Ok(()),
            Found::Broken(why) => Err(PartitionError::Refused(why)),
        }
    }

    /// Looks whether the partition is in force and has the process, with all its threads.
    pub(crate) fn look(&self, partition: &Partition, pid: u32) -> Found {
        let path = partition.path();
        if !self.at(&path).is_dir() {
            return Found::Broken("its cgroup was removed".to_owned());
        }
        if let Err(why) = self.is_in_force(partition) {
            return Found::Broken(why);
        }
        let has_task = if partition.is_whole_cgroup { are_in(pid, &path) } else { are_at(pid, &path) };
        if has_task {
            // Somebody may have allowed it.
            workqueues::keep_off(&partition.workqueues);
            Found::Isolated
        } else {
            Found::Broken("its task was moved to another cgroup".to_owned())
        }
    }

    fn is_in_force(&self, partition: &Partition) -> Result<(), String> {
        let path = &partition.path();
        match self.read(path, "cpuset.cpus.partition") {
            // If its last CPU goes offline, the kernel lets its tasks run elsewhere, and may call it valid still.
            Ok(state) if state == KIND => match self.cpus(path, "cpuset.cpus.effective") {
                cpus if !cpus.is_empty() && cpus.is_subset(&partition.cpus) => Ok(()),
                cpus => Err(format!("its tasks run on CPU {cpus}")),
            },
            Ok(state) => {
                let why = state.split_once('(').map_or(state.as_str(), |(_, why)| why.trim_end_matches(')'));
                Err(escaped(why.as_bytes()))
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let off =
                    partition.ancestors().find(|it| !self.has_word(it, "cgroup.subtree_control", "cpuset"));
                Err(off.map_or_else(
                    || "its cpuset files are missing".to_owned(),
                    |off| format!("cpuset was switched off in {}", shown(off)),
                ))
            }
            Err(error) => Err(format!("its state cannot be read: {error}")),
        }
    }

    /// Opens the files that poll(2) reports (`POLLPRI`) when the partition changes after this, or when it has no process any
    /// more.
    pub(crate) fn watch(&self, partition: &Partition) -> Vec<File> {
        let path = self.at(&partition.path());
        let open = |name: &str| {
            let mut file = File::open(path.join(name)).ok()?;
            // The kernel reports changes since the last read.
            file.read_to_end(&mut Vec::new()).ok()?;
            Some(file)
        };
        ["cgroup.events", "cpuset.cpus.partition"].into_iter().filter_map(open).collect()
    }

    /// Takes everything back: the processes return to the cgroup of the task, the cgroup is removed, and the cgroups above
    /// are as before. A controller that one of the `others` needs stays on, and that one has to take it back later. Returns
    /// the others that changed.
    ///
    /// May be called again if it fails, and for a partition of which only a part was made.
    ///
    /// # Errors
    /// The cgroup cannot be emptied or removed.
    pub(crate) fn take_back(
        &self,
        partition: &Partition,
        others: &[Partition],
    ) -> io::Result<Vec<Partition>> {
        self.remove(partition)?;
        workqueues::allow(&partition.workqueues);
        reached(Step::PartitionRemoved);
        let mut heirs: Vec<Partition> = Vec::new();
        let levels: Vec<(&str, Level)> =
            partition.ancestors().zip(partition.levels.iter().copied()).collect();
        for (at, (above, level)) in levels.into_iter().enumerate().rev() {
            if level.exclusive {
                let left = self.cpus(above, "cpuset.cpus.exclusive").difference(&partition.cpus);
                // An empty write is none.
                self.write_if_there(above, "cpuset.cpus.exclusive", &format!("{left}\n"));
            }
            if !level.enabled {
                continue;
            }
            let is_below = |other: &&Partition| other.ancestors().nth(at) == Some(above);
            if let Some(other) = others.iter().find(is_below) {
                let known = heirs.iter().position(|heir| heir.list == other.list);
                let at_heir = known.unwrap_or_else(|| {
                    heirs.push(other.clone());
                    heirs.len() - 1
                });
                if let Some(level) = heirs.get_mut(at_heir).and_then(|heir| heir.levels.get_mut(at)) {
                    level.enabled = true;
                }
            } else if !self.is_used(above) {
                self.write_if_there(above, "cgroup.subtree_control", "-cpuset");
            }
        }
        Ok(heirs)
    }

    fn remove(&self, partition: &Partition) -> io::Result<()> {
        let path = partition.path();
        let directory = self.at(&path);
        if !directory.exists() {
            return Ok(());
        }
        self.write_if_there(&path, "cpuset.cpus.partition", "member");
        if partition.is_whole_cgroup {
            return Ok(());
        }
        let deadline = Instant::now() + EMPTYING;
        loop {
            for tid in self.members(partition) {
                // Moves the whole process. One that has died meanwhile needs no move.
                let _ = self.write(&partition.parent, "cgroup.procs", &tid.to_string());
            }
            reached(Step::PartitionEmpty);
            match fs::remove_dir(&directory) {
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
                Ok(()) => return Ok(()),
            }
        }
    }

    /// Whether somebody has set CPUs of cgroups below, which would be lost without the controller.
    fn is_used(&self, path: &str) -> bool {
        let is_set = |name: &str, file: &str| {
            self.read(&format!("{path}/{name}"), file).is_ok_and(|it| !it.is_empty())
        };
        self.children(path).iter().any(|child| {
            ["cpuset.cpus", "cpuset.cpus.exclusive", "cpuset.mems"].iter().any(|file| is_set(child, file))
        })
    }

    /// Returns the names of the cgroups below.
    fn children(&self, path: &str) -> Vec<String> {
        let entries = fs::read_dir(self.at(path)).into_iter().flatten().filter_map(Result::ok);
        let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        directories.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }

    fn at(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    fn read(&self, path: &str, name: &str) -> io::Result<String> {
        let bytes = fs::read(self.at(path).join(name))?;
        Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
    }

    fn write(&self, path: &str, name: &str, text: &str) -> io::Result<()> {
        OpenOptions::new().write(true).open(self.at(path).join(name))?.write_all(text.as_bytes())
    }

    fn write_if_there(&self, path: &str, name: &str, text: &str) {
        match self.write(path, name, text) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                log::warn!("{}: {error}", self.at(path).join(name).display());
            }
            _ => {}
        }
    }

    fn has_word(&self, path: &str, name: &str, word: &str) -> bool {
        self.read(path, name).is_ok_and(|text| text.split_whitespace().any(|it| it == word))
    }

    fn cpus(&self, path: &str, name: &str) -> CpuSet {
        self.read(path, name).ok().and_then(|text| text.parse().ok()).unwrap_or_default()
    }
}

fn refused(path: &str, name: &str, error: &io::Error) -> PartitionError {
    let why = match error.raw_os_error() {
        Some(libc::EINVAL | libc::EBUSY) => {
            "another cgroup has these CPUs for itself, or needs them".to_owned()
        }
        _ => error.to_string(),
    };
    PartitionError::Refused(format!("{}/{name}: {why}", shown(path)))
}

/// Returns the path of a cgroup for people.
fn shown(path: &str) -> String {
    if path.is_empty() { "/".to_owned() } else { escaped(path.as_bytes()) }
}
