//! A configuration directory seen from outside, mounted or plain.
//!
//! Owns: how pools, lists and tasks are read and made through files, and the lock of a plain directory. Must
//! not know: the machine, or what a command does with it. There is no other way to the daemon than these
//! files.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Error, anyhow, bail};
use kcm_mount::model::cpuset::{CpuId, CpuSet};
use kcm_mount::mountpoint;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{SigSet, SigmaskHow};

/// How long the lock of a plain directory is held at most; in seconds, a decimal number.
const LOCK_TIMEOUT: &str = "KCM_LOCK_TIMEOUT";
/// How often a lock is looked at that somebody else holds.
const LOOKING: Duration = Duration::from_millis(5);

/// A directory that is there and can be used.
#[derive(Clone, Debug)]
pub(crate) struct ConfDir {
    path: PathBuf,
    mounted: bool,
}

/// A pool and its CPU lists, by the names of their directories.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pool {
    pub(crate) exclusive: bool,
    pub(crate) lists: BTreeMap<String, Vec<u32>>,
}

impl Pool {
    /// The lists in ascending order of their first CPU; those whose names are no CPU lists at the end.
    pub(crate) fn lists_by_cpu(&self) -> Vec<(&str, &[u32])> {
        let mut lists: Vec<(&str, &[u32])> =
            self.lists.iter().map(|(list, tasks)| (list.as_str(), tasks.as_slice())).collect();
        lists.sort_by_key(|(list, _)| cpus(list).and_then(|cpus| cpus.first()).map_or(u32::MAX, CpuId::get));
        lists
    }
}

/// The pools by name.
pub(crate) type Pools = BTreeMap<String, Pool>;

impl ConfDir {
    /// The directory, mounted or plain.
    ///
    /// # Errors
    /// It does not exist, or is served by a daemon that does not run now.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let conf_dir = |mounted| Ok(Self { path: path.to_path_buf(), mounted });
        match fs::symlink_metadata(path.join("info/version")) {
            Ok(_) => conf_dir(true),
            Err(error) if is_gone(&error) => Err(not_running(path)),
            Err(error) if error.kind() == ErrorKind::NotADirectory => {
                bail!("{}: not a directory", path.display())
            }
            Err(error) if error.kind() == ErrorKind::NotFound => match fs::metadata(path) {
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    bail!("{}: no such directory; run kcm mount, or give --conf-dir", path.display())
                }
                Err(error) => Err(error).with_context(|| format!("{}: cannot be looked at", path.display())),
                Ok(_) if mountpoint::is_marked(path) => Err(not_running(path)),
                Ok(_) => conf_dir(false),
            },
            Err(error) => Err(error).with_context(|| format!("{}: cannot be looked at", path.display())),
        }
    }

    /// Whether the daemon serves it.
    pub(crate) fn is_mounted(&self) -> bool {
        self.mounted
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// A pool's directory.
    pub(crate) fn pool(&self, pool: &str) -> PathBuf {
        self.path.join("pools").join(pool)
    }

    /// The `tasks` file of a list.
    pub(crate) fn tasks(&self, pool: &str, list: &str) -> PathBuf {
        self.pool(pool).join(list).join("tasks")
    }

    /// Every pool with its lists and their tasks. On a plain directory each list is as it was when it was
    /// read.
    ///
    /// # Errors
    /// A file that has to be there is missing, cannot be read, or says nothing that can be understood.
    pub(crate) fn pools(&self) -> Result<Pools, Error> {
        let pools = self.path.join("pools");
        let names = directories(&pools).map_err(|error| match error.kind() {
            ErrorKind::NotFound => {
                anyhow!("{}: no pools; run kcm init (is kcm mount running?)", self.path.display())
            }
            _ => refused(&pools, error),
        })?;
        let mut pools = Pools::new();
        for name in names {
            if let Some(pool) = self.read_pool(&name)? {
                pools.insert(name, pool);
            }
        }
        self.still_there()?;
        Ok(pools)
    }

    /// Whether the mount is still there: what was not found may have been on it.
    ///
    /// # Errors
    /// The daemon has ended.
    pub(crate) fn still_there(&self) -> Result<(), Error> {
        match fs::symlink_metadata(self.path.join("info/version")) {
            Err(_) if self.mounted => Err(not_running(&self.path)),
            _ => Ok(()),
        }
    }

    /// None where it has been removed meanwhile.
    fn read_pool(&self, name: &str) -> Result<Option<Pool>, Error> {
        let pool = self.pool(name);
        let flag = pool.join("exclusive");
        let Some(exclusive) = self.unless_removed(&pool, &flag, fs::read(&flag))? else { return Ok(None) };
        let Some(names) = self.unless_removed(&pool, &pool, directories(&pool))? else { return Ok(None) };
        let mut lists = BTreeMap::new();
        for list in names {
            let file = self.tasks(name, &list);
            if let Some(text) = self.unless_removed(&pool.join(&list), &file, fs::read_to_string(&file))? {
                lists.insert(list, parse_tasks(&file, &text)?);
            }
        }
        Ok(Some(Pool { exclusive: exclusive.first() == Some(&b'1'), lists }))
    }

    /// None where the file cannot be read because its directory has been removed since its name was read.
    fn unless_removed<T>(
        &self,
        directory: &Path,
        file: &Path,
        read: io::Result<T>,
    ) -> Result<Option<T>, Error> {
        let is_there = || fs::symlink_metadata(directory).is_ok();
        match read {
            Ok(read) => Ok(Some(read)),
            Err(error) if error.kind() == ErrorKind::NotFound && (self.mounted || !is_there()) => Ok(None),
            // On a mount a file of a removed directory may be open still.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ESTALE)) => Ok(None),
            Err(error) => Err(refused(file, error)),
        }
    }

    /// Makes the directory of all pools; says whether it was missing.
    ///
    /// # Errors
    /// What the filesystem says.
    pub(crate) fn make_pools(&self) -> Result<bool, Error> {
        let pools = self.path.join("pools");
        match make_dir(&pools) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(refused(&pools, error)),
        }
    }

    /// Makes a pool without lists.
    ///
    /// # Errors
    /// It exists, or what the daemon or the filesystem says.
    pub(crate) fn make_pool(&self, name: &str) -> Result<(), Error> {
        let pool = self.pool(name);
        self.explained(&pool, || make_dir(&pool))
    }

    /// Says how many tasks a list of the pool takes.
    ///
    /// # Errors
    /// What the daemon or the filesystem says.
    pub(crate) fn set_exclusive(&self, pool: &str, exclusive: bool) -> Result<(), Error> {
        let flag = self.pool(pool).join("exclusive");
        self.explained(&flag, || fs::write(&flag, if exclusive { "1" } else { "0" }))
    }

    /// Makes a CPU list of a pool, on which nobody is.
    ///
    /// # Errors
    /// It exists, or what the daemon or the filesystem says.
    pub(crate) fn make_list(&self, pool: &str, list: &str) -> Result<(), Error> {
        let list = self.pool(pool).join(list);
        self.explained(&list, || {
            make_dir(&list)?;
            if !self.mounted {
                fs::write(list.join("tasks"), "")?;
            }
            Ok(())
        })
    }

    /// For a plain directory: removes the pools and lists that a program was interrupted in making, which lack
    /// the one file that makes them what they are.
    pub(crate) fn sweep(&self) {
        if self.mounted {
            return;
        }
        for pool in directories(&self.path.join("pools")).unwrap_or_default() {
            let pool = self.pool(&pool);
            for list in directories(&pool).unwrap_or_default() {
                if !pool.join(&list).join("tasks").exists() {
                    let _ = fs::remove_dir(pool.join(&list));
                }
            }
            if !pool.join("exclusive").exists() {
                let _ = fs::remove_dir(&pool);
            }
        }
    }

    /// Removes a pool or a list that was just made, as far as it is there.
    pub(crate) fn unmake(&self, directory: &Path) {
        if !self.mounted {
            for file in ["tasks", "exclusive"] {
                let _ = fs::remove_file(directory.join(file));
            }
        }
        let _ = fs::remove_dir(directory);
    }

    /// Runs `operation` on a file of the directory; where it is refused, says why as the daemon does.
    ///
    /// # Errors
    /// Those of the operation.
    pub(crate) fn explained<T>(
        &self,
        file: &Path,
        operation: impl FnOnce() -> io::Result<T>,
    ) -> Result<T, Error> {
        operation().map_err(|error| match self.last_error(&error) {
            Some(sentence) => anyhow!("{}: {sentence}", file.display()),
            None => refused(file, error),
        })
    }

    /// What the daemon has to say to the error that it just gave us.
    fn last_error(&self, error: &io::Error) -> Option<String> {
        let line = fs::read_to_string(self.path.join("self/last_error")).ok().filter(|_| self.mounted)?;
        // "<time> <pid>: <errno>: <sentence>"
        let mut parts = line.trim_end().splitn(3, ": ");
        let errno = parts.nth(1)?;
        let sentence = parts.next()?;
        (errno == format!("{:?}", Errno::from_raw(error.raw_os_error()?))).then(|| sentence.to_owned())
    }

    /// Takes the lock that the programs of 2017 take. It ends the program if it is not got and given back
    /// within `KCM_LOCK_TIMEOUT`.
    ///
    /// # Errors
    /// The file cannot be opened, or the time is no number.
    pub(crate) fn lock(&self) -> Result<Lock, Error> {
        let file = self.path.join("lock");
        let timeout = lock_timeout()?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let handle = options.open(&file).map_err(|error| refused(&file, error))?;
        let (released, watch) = mpsc::channel::<()>();
        // It lives on for a moment when the lock is given back, and must not take signals that we then wait for.
        let ours = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK).map_err(io::Error::from)?;
        std::thread::spawn(move || {
            if watch.recv_timeout(timeout) == Err(RecvTimeoutError::Timeout) {
                log::error!("Lock timed out after {:?} seconds", timeout.as_secs_f64());
                std::process::exit(1);
            }
        });
        ours.thread_set_mask().map_err(io::Error::from)?;
        match Flock::lock(handle, FlockArg::LockExclusive) {
            Ok(lock) => Ok(Lock { _watch: released, _file: lock }),
            Err((_, errno)) => Err(refused(&file, errno.into())),
        }
    }
}

/// Locks an open file against other programs of ours.
///
/// # Errors
/// Somebody else holds it for longer than `KCM_LOCK_TIMEOUT`.
pub(crate) fn lock_file(path: &Path, mut file: File) -> Result<Flock<File>, Error> {
    let timeout = lock_timeout()?;
    let begun = Instant::now();
    loop {
        file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((file, Errno::EWOULDBLOCK)) if begun.elapsed() < timeout => file,
            Err((_, Errno::EWOULDBLOCK)) => bail!(
                "{}: locked for {:?} seconds; end the other kcm that does not come to its end",
                path.display(),
                timeout.as_secs_f64()
            ),
            Err((_, errno)) => return Err(refused(path, errno.into())),
        };
        std::thread::sleep(LOOKING);
    }
}

/// The lock of a configuration directory, held.
#[derive(Debug)]
pub(crate) struct Lock {
    /// Dropped with the lock, which ends the watch over its time.
    _watch: mpsc::Sender<()>,
    _file: Flock<File>,
}

fn lock_timeout() -> Result<Duration, Error> {
    let text = std::env::var(LOCK_TIMEOUT).unwrap_or_else(|_| "30".into());
    let seconds = text.trim().parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.with_context(|| format!("{LOCK_TIMEOUT}={text}: not a number of seconds; give one like 30"))
}

/// Makes a directory that everybody may look at, whatever the umask.
fn make_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o755).create(path)
}

/// The names of all directories in this one; every one of them counts.
fn directories(path: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(names)
}

/// The PIDs in a `tasks` file.
///
/// # Errors
/// It cannot be read, or something else stands in it.
pub(crate) fn read_tasks(file: &Path) -> Result<Vec<u32>, Error> {
    let text = fs::read_to_string(file).map_err(|error| refused(file, error))?;
    parse_tasks(file, &text)
}

/// The PIDs in the text of a `tasks` file.
fn parse_tasks(file: &Path, text: &str) -> Result<Vec<u32>, Error> {
    pids(text).with_context(|| format!("{}: not a list of PIDs; repair it by hand", file.display()))
}

fn pids(text: &str) -> Option<Vec<u32>> {
    let words = text.split(',').map(str::trim).filter(|word| !word.is_empty());
    words.map(|word| word.parse().ok()).collect()
}

/// Reads, changes and writes back a `tasks` file of a plain directory, for whoever holds the lock.
///
/// # Errors
/// As for [`read_tasks`], and whatever the filesystem says.
pub(crate) fn change_tasks(file: &Path, change: impl FnOnce(&mut Vec<u32>)) -> Result<(), Error> {
    // One write, then the length: whoever dies between, or finds the disk full, has taken nobody off. To every
    // reader the commas say nothing.
    let rewrite = |file: &mut File, tasks: &[u32], length: usize| {
        let words: Vec<String> = tasks.iter().map(u32::to_string).collect();
        let words = words.join(",");
        file.rewind()?;
        file.write_all(format!("{words:,<length$}").as_bytes())?;
        file.set_len(words.len() as u64)?;
        file.sync_all()
    };
    let mut handle =
        OpenOptions::new().read(true).write(true).open(file).map_err(|error| refused(file, error))?;
    let mut text = String::new();
    handle.read_to_string(&mut text).map_err(|error| refused(file, error))?;
    let mut tasks = parse_tasks(file, &text)?;
    change(&mut tasks);
    rewrite(&mut handle, &tasks, text.len()).map_err(|error| refused(file, error))
}

/// The CPUs that a list's name says, if it is one.
pub(crate) fn cpus(list: &str) -> Option<CpuSet> {
    list.parse().ok()
}

fn not_running(path: &Path) -> Error {
    anyhow!("{}: kcm mount is not running; start it: kcm mount --conf-dir={0}", path.display())
}

/// Whether the error is that of a mount whose daemon has gone.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED))
}

/// What is said of a file that cannot be used, with a cure where there is one.
pub(crate) fn refused(file: &Path, error: io::Error) -> Error {
    let file = file.display();
    if is_gone(&error) {
        return anyhow!("{file}: kcm mount is not running; start it");
    }
    let cure = match error.kind() {
        ErrorKind::PermissionDenied => "; do it as root, or let root give you the right with chown or chmod",
        ErrorKind::StorageFull => "; make room on the disk",
        ErrorKind::ReadOnlyFilesystem => "; mount it for writing",
        _ => "",
    };
    let what =
        error.raw_os_error().map_or_else(|| error.to_string(), |raw| Errno::from_raw(raw).desc().into());
    anyhow!("{file}: {what}{cure}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_as_the_mount_and_as_2017_write_them() {
        for (text, tasks) in [
            ("", &[][..]),
            ("\n", &[]),
            ("1,22,333\n", &[1, 22, 333]),
            ("1, 22", &[1, 22]),
            (",1,,2,", &[1, 2]),
        ] {
            assert_eq!(pids(text).as_deref(), Some(tasks), "{text:?}");
        }
        for text in ["x", "1 2", "-1", "1,x"] {
            assert_eq!(pids(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_changed_file_holds_the_list_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("tasks");
        fs::write(&file, "111,222,333").unwrap();
        change_tasks(&file, |tasks| tasks.retain(|&pid| pid == 222)).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "222");
        change_tasks(&file, |tasks| tasks.clear()).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "");
    }
}
