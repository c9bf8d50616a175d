//! Claiming a CPU list on a mount, and waiting for one.
//!
//! Owns when a claim is tried again: when a list may be free, and when a daemon that was away serves again. Does not know
//! what the list is for, or the order of those who wait: the daemon does.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Error, anyhow};
use kcm_mount::affinity;
use kcm_mount::model::cpuset::CpuSet;
use kcm_mount::mountpoint::{self, Mounted, Status};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};

use super::failure::Failure;
use super::turn::Turn;
use crate::cli::Wait;
use crate::commands::common::deadline::Deadline;
use crate::confdir::{self, ConfDir};

/// How long a daemon that answers EAGAIN is tried again, and how often.
const PATIENCE: Duration = Duration::from_secs(5);
const BUSY_INTERVAL: Duration = Duration::from_millis(100);
/// How often a directory whose daemon is away is tried again.
const AWAY_INTERVAL: Duration = Duration::from_millis(100);

/// A claim: its pool or list, and its task.
pub(in crate::commands) struct Wanted<'a> {
    pub(in crate::commands) pool: &'a str,
    /// Any list of the pool, if there is none.
    pub(in crate::commands) list: Option<&'a str>,
    /// This process, if there is none.
    pub(in crate::commands) pid: Option<u32>,
}

impl Wanted<'_> {
    /// The file to write to.
    fn tasks(&self, dir: &ConfDir) -> PathBuf {
        match self.list {
            Some(list) => dir.tasks(self.pool, list),
            None => dir.pool(self.pool).join("tasks"),
        }
    }

    /// The line to write.
    fn line(&self) -> String {
        // The newline makes this a command. Through a file that is open for reading and writing, a list without
        // white space is a rewrite, as legacy clients make it; there "0" would not stand for the writer.
        format!("{}\n", self.pid.unwrap_or(0))
    }
}

/// Returns until when to wait for a free list; without `--wait`, that is over at once.
pub(in crate::commands) fn deadline(wait: Option<Wait>) -> Deadline {
    match wait {
        None => Deadline::after(Duration::ZERO),
        Some(None) => Deadline::NEVER,
        Some(Some(wait)) => Deadline::after(wait),
    }
}

/// Opens the directory and looks at it. Until the deadline, waits for the daemon of a mount point, or of a directory that is
/// missing or empty: a container may not see that it is a mount point.
///
/// # Errors
/// As for [`ConfDir::open`] and `look`.
pub(in crate::commands) fn opened<T>(
    conf_dir: &Path,
    deadline: Deadline,
    look: impl Fn(&ConfDir) -> Result<T, Error>,
) -> Result<(ConfDir, T), Error> {
    let mut away = Away::new(conf_dir);
    loop {
        let before = mounted_before(deadline, conf_dir);
        let error = match ConfDir::open(conf_dir).and_then(|dir| Ok((look(&dir)?, dir))) {
            Ok((found, dir)) => return Ok((dir, found)),
            Err(error) => error,
        };
        let may_come = match mountpoint::status(conf_dir) {
            Ok(Status::Plain) => fs::read_dir(conf_dir).is_ok_and(|mut entries| entries.next().is_none()),
            Ok(Status::Stale | Status::Marked | Status::Absent) => true,
            Ok(Status::Live | Status::NotAnswering) => before != mounted(conf_dir),
            Err(_) => false,
        };
        if deadline.has_passed() || !may_come {
            return Err(error);
        }
        away.wait(&error);
    }
}

/// Claims a list of the pool, and returns the list's name. Until the deadline, waits for a daemon that is away, too: a pod
/// that is replaced takes the mount along, and the next one mounts again.
///
/// # Errors
/// The daemon refuses, or does not run.
pub(in crate::commands) fn claim(
    dir: &ConfDir,
    wanted: &Wanted<'_>,
    deadline: Deadline,
) -> Result<String, Error> {
    let mut away = Away::new(dir.path());
    // Without a mount table, or at a path through another mount namespace, it is not known.
    let is_known = mounted_before(deadline, dir.path()).is_some();
    let is_final =
        |before: Option<Mounted>| before.map_or(!is_known, |mount| is_still_served(dir.path(), mount));
    loop {
        let before = mounted_before(deadline, dir.path());
        let error = match try_claim(dir, wanted, deadline) {
            Ok(list) => return Ok(list),
            Err(Failure::Final(error)) if is_final(before) => return Err(error),
            Err(Failure::Final(error) | Failure::Away(error)) => error,
        };
        if deadline.has_passed() {
            return Err(error);
        }
        away.wait(&error);
    }
}

/// The wait for a daemon that is away, which is said once.
struct Away<'a> {
    conf_dir: &'a Path,
    is_told: bool,
}

impl<'a> Away<'a> {
    fn new(conf_dir: &'a Path) -> Self {
        Self { conf_dir, is_told: false }
    }

    fn wait(&mut self, error: &Error) {
        if !self.is_told {
            log::info!("waiting for {}: kcm mount is not running", self.conf_dir.display());
            self.is_told = true;
        }
        log::debug!("{error:#}; waiting for the next daemon");
        std::thread::sleep(AWAY_INTERVAL);
    }
}

/// Whether this mount is still there and served. What is there instead may be anything: the mount point may not be recognisable
/// in a container, and somebody may have put a file there.
fn is_still_served(path: &Path, mount: Mounted) -> bool {
    mounted(path) == Some(mount) && !matches!(mountpoint::status(path), Ok(Status::Stale))
}

/// Returns the mount at a path, if somebody waits for another one until a deadline: a mount table can be long.
fn mounted_before(deadline: Deadline, path: &Path) -> Option<Mounted> {
    if deadline.has_passed() { None } else { mounted(path) }
}

/// Returns the mount at a path. Does not access it, because it may hang.
fn mounted(path: &Path) -> Option<Mounted> {
    mountpoint::topmost(path).ok().flatten()
}

fn try_claim(dir: &ConfDir, wanted: &Wanted<'_>, deadline: Deadline) -> Result<String, Failure> {
    let (pool, file) = (wanted.pool, wanted.tasks(dir));
    let failed = |error| Failure::of_file(dir, &file, error);
    // For reading too, because poll(2) reports changes since the last read of this open file.
    let mut tasks = OpenOptions::new().read(true).write(true).open(&file).map_err(failed)?;
    let begun = Instant::now();
    let mut turn: Option<Turn> = None;
    loop {
        match tasks.write(wanted.line().as_bytes()) {
            Ok(_) => break,
            Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32) => {
                if deadline.has_passed() {
                    // Scripts know the beginning from the legacy kcm.
                    return Err(Failure::Final(match dir.last_error(&error) {
                        Some(reason) if wanted.list.is_some() => anyhow!("{reason}"),
                        Some(reason) => anyhow!("No free cpu lists in pool {pool}: {reason}"),
                        None => anyhow!("No free cpu lists in pool {pool}"),
                    }));
                }
                // A turn is for any list of the pool.
                if turn.is_none() && wanted.list.is_none() {
                    let reason = dir.last_error(&error).unwrap_or_default();
                    turn = Turn::enter(dir, pool, &wanted.line(), &reason)?;
                }
                match &turn {
                    Some(turn) => turn.wait(dir, deadline)?,
                    None => wait_for_change(&mut tasks, deadline).map_err(failed)?,
                }
            }
            // The daemon is busy with other requests of this user.
            Err(error)
                if error.raw_os_error() == Some(Errno::EAGAIN as i32) && begun.elapsed() < PATIENCE =>
            {
                log::debug!("{}: EAGAIN; trying again", file.display());
                std::thread::sleep(BUSY_INTERVAL);
            }
            // No free list suits this process. Another one may, once it is free.
            Err(error)
                if error.raw_os_error() == Some(Errno::EINVAL as i32)
                    && !deadline.has_passed()
                    && wanted.list.is_none()
                    && wanted.pid.is_none()
                    && a_taken_list_suits(dir, pool)? =>
            {
                log::debug!("{}: EINVAL; waiting for a list that suits", file.display());
                wait_for_change(&mut tasks, deadline).map_err(failed)?;
            }
            Err(error) => return Err(failed(error)),
        }
    }
    if let Some(pid) = wanted.pid {
        return Ok(list_of(dir, pool, pid)?);
    }
    let file = dir.path().join("self/cpus");
    let cpus = fs::read_to_string(&file).map_err(|error| Failure::of_file(dir, &file, error))?;
    Ok(cpus.trim_end().to_owned())
}

/// Returns the name of the list of the pool that has this task. The task may have died since.
fn list_of(dir: &ConfDir, pool: &str, pid: u32) -> Result<String, Error> {
    let pools = dir.find()?.pools;
    let lists = pools.get(pool).into_iter().flat_map(|pool| &pool.lists);
    let mut lists = lists.filter(|(_, tasks)| tasks.contains(&pid));
    Ok(lists.next().map(|(list, _)| list.clone()).unwrap_or_default())
}

/// Whether the kernel would let this process run on a list of the pool that is taken now.
fn a_taken_list_suits(dir: &ConfDir, pool: &str) -> Result<bool, Error> {
    let found = dir.find()?.pools;
    let Some(pool) = found.get(pool).filter(|pool| pool.exclusive) else { return Ok(false) };
    let taken = pool.lists.iter().filter(|(_, tasks)| !tasks.is_empty());
    let taken: Vec<CpuSet> = taken.filter_map(|(list, _)| confdir::parse_cpu_list(list)).collect();
    // Only the kernel knows, so it is asked. A mask belongs to a thread, and this thread ends.
    let suits = |cpus: &CpuSet| {
        affinity::set(0, cpus).is_ok() && affinity::get(0).is_ok_and(|got| got.as_ref() == Some(cpus))
    };
    let asked = std::thread::Builder::new().spawn(move || taken.iter().any(suits));
    Ok(asked.context("cannot start a thread")?.join().unwrap_or(false))
}

/// Waits until the file has changed since it was last read, and reads it.
fn wait_for_change(tasks: &mut fs::File, deadline: Deadline) -> io::Result<()> {
    match poll(&mut [PollFd::new(tasks.as_fd(), PollFlags::POLLPRI)], deadline.poll_timeout()) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    io::Seek::rewind(tasks)?;
    io::Read::read_to_end(tasks, &mut Vec::new()).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_wait_there_is_one_attempt() {
        assert!(deadline(None).has_passed());
        assert_eq!(deadline(Some(None)), Deadline::NEVER);
        assert!(!deadline(Some(Some(Duration::from_secs(60)))).has_passed());
    }

    #[test]
    fn a_directory_that_is_not_mounted_is_waited_for_only_until_the_deadline() {
        let home = tempfile::tempdir().unwrap();
        let is_pool = |dir: &ConfDir| dir.find().map(drop);
        for conf_dir in [home.path().join("absent"), home.path().to_owned()] {
            assert!(opened(&conf_dir, deadline(None), is_pool).is_err());
        }
        // A directory with something else in it is not what the user means.
        fs::write(home.path().join("file"), "").unwrap();
        assert!(opened(home.path(), Deadline::NEVER, is_pool).is_err());
    }
}
