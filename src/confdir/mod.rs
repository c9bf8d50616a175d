//! A configuration directory as a client sees it, mounted or plain.
//!
//! Owns the paths of its files, and the messages for files that cannot be used. Its parts read pools (`read`),
//! create (`create`) and change them (`change`), take its lock (`lock`) and rewrite files of a plain directory (`plain`). Does not know
//! the machine, or what a command does with the directory. These files are the only way to the daemon.

mod change;
mod create;
mod lock;
mod plain;
mod read;

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Error, anyhow, bail};
use kcm_mount::mountpoint::{self, Status};
use nix::errno::Errno;

use crate::service;

pub(crate) use lock::{lock_file, lock_timeout};
pub(crate) use read::{Found, Pool, Pools, parse_cpu_list};

/// A directory that exists and can be used.
#[derive(Clone, Debug)]
pub(crate) struct ConfDir {
    path: PathBuf,
    mounted: bool,
}

impl ConfDir {
    /// Opens the directory, mounted or plain.
    ///
    /// # Errors
    /// It does not exist, or it is a mount point whose daemon does not run or does not answer.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        check_answers(path)?;
        let conf_dir = |mounted| {
            log::debug!("{}: {}", path.display(), if mounted { "served by a daemon" } else { "plain" });
            Ok(Self { path: path.to_path_buf(), mounted })
        };
        let unreadable = |error| Err(error).with_context(|| format!("{}: cannot be read", path.display()));
        match fs::symlink_metadata(path.join("info/version")) {
            Ok(_) => conf_dir(true),
            Err(error) if is_daemon_gone(&error) => Err(not_running(path)),
            Err(error) if error.kind() == ErrorKind::NotADirectory => {
                bail!("{}: not a directory", path.display())
            }
            Err(error) if error.kind() == ErrorKind::NotFound => match fs::metadata(path) {
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    bail!("{}: no such directory; run kcm mount, or give --conf-dir", path.display())
                }
                Err(error) => unreadable(error),
                Ok(_) if mountpoint::is_marked(path) => Err(not_running(path)),
                Ok(_) => conf_dir(false),
            },
            Err(error) => unreadable(error),
        }
    }

    /// Whether a daemon serves it.
    pub(crate) fn is_mounted(&self) -> bool {
        self.mounted
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the directory of all pools.
    pub(crate) fn pools_dir(&self) -> PathBuf {
        self.path.join("pools")
    }

    /// Returns a pool's directory.
    pub(crate) fn pool(&self, pool: &str) -> PathBuf {
        self.pools_dir().join(pool)
    }

    /// Returns the `tasks` file of a list.
    pub(crate) fn tasks(&self, pool: &str, list: &str) -> PathBuf {
        self.pool(pool).join(list).join("tasks")
    }

    /// Checks that a mounted directory still is: a file that was not found may have been on the mount.
    ///
    /// # Errors
    /// The daemon has ended.
    pub(crate) fn check_mounted(&self) -> Result<(), Error> {
        match fs::symlink_metadata(self.path.join("info/version")) {
            Err(_) if self.mounted => Err(not_running(&self.path)),
            _ => Ok(()),
        }
    }

    /// Runs `operation` on `file`; if it fails, the error has the reason that the daemon recorded.
    ///
    /// # Errors
    /// The error of the operation.
    pub(crate) fn with_reason<T>(
        &self,
        file: &Path,
        operation: impl FnOnce() -> io::Result<T>,
    ) -> Result<T, Error> {
        operation().map_err(|error| match self.last_error(&error) {
            Some(sentence) => anyhow!("{}: {sentence}", file.display()),
            None => file_error(file, error),
        })
    }

    /// Returns the sentence in `self/last_error`, if it is about `error`.
    pub(crate) fn last_error(&self, error: &io::Error) -> Option<String> {
        let line = fs::read_to_string(self.path.join("self/last_error")).ok().filter(|_| self.mounted)?;
        log::debug!("self/last_error: {}", line.trim_end());
        sentence_about(&line, error).map(String::from)
    }
}

/// Returns the sentence of a line `<time> <pid>: <errno>: <sentence>`, if it has the errno of `error`. Another errno
/// means that the line is about an earlier operation.
fn sentence_about<'a>(line: &'a str, error: &io::Error) -> Option<&'a str> {
    let mut parts = line.trim_end().splitn(3, ": ");
    let errno = parts.nth(1)?;
    let sentence = parts.next()?;
    (errno == format!("{:?}", Errno::from_raw(error.raw_os_error()?))).then_some(sentence)
}

/// Checks that the path is not a mount that does not answer. Everything else that a command does with it would wait for
/// an answer, in a way that not even SIGKILL ends.
///
/// # Errors
/// The daemon does not answer.
pub(crate) fn check_answers(path: &Path) -> Result<(), Error> {
    match mountpoint::status(path) {
        Ok(Status::NotAnswering) => Err(anyhow!(
            "{}: kcm mount does not answer; look at its log, and for stopped processes of it (ps -o pid,stat,args)",
            path.display()
        )),
        _ => Ok(()),
    }
}

fn not_running(path: &Path) -> Error {
    anyhow!("{}: kcm mount is not running; start it: {}", path.display(), service::start_command(path))
}

/// Whether the error comes from a mount whose daemon has ended.
pub(crate) fn is_daemon_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED))
}

/// Whether the error is about an open file, or a path, of a daemon that has ended: the same path may work when the next one
/// serves.
pub(crate) fn is_of_another_daemon(error: &io::Error) -> bool {
    let stale = error.raw_os_error().map(Errno::from_raw) == Some(Errno::ESTALE);
    stale || is_daemon_gone(error) || error.kind() == ErrorKind::NotFound
}

/// Returns the message for a file that cannot be used: the file, the cause, and what to do if that is known.
pub(crate) fn file_error(file: &Path, error: io::Error) -> Error {
    let file = file.display();
    if is_daemon_gone(&error) {
        return anyhow!("{file}: kcm mount is not running; start it");
    }
    let cure = match error.kind() {
        ErrorKind::PermissionDenied => "; run it as root, or let root grant access with chown or chmod",
        ErrorKind::StorageFull => "; free some disk space",
        ErrorKind::ReadOnlyFilesystem => "; mount it for writing",
        _ => "",
    };
    let cause =
        error.raw_os_error().map_or_else(|| error.to_string(), |raw| Errno::from_raw(raw).desc().into());
    anyhow!("{file}: {cause}{cure}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_belongs_to_an_error_of_the_same_errno() {
        let line = "2026-11-24T23:59:26Z 4726: EBUSY: CPU 2 is in infra 2: remove that list first\n";
        let error = |errno: Errno| io::Error::from(errno);
        assert_eq!(
            sentence_about(line, &error(Errno::EBUSY)),
            Some("CPU 2 is in infra 2: remove that list first")
        );
        assert_eq!(sentence_about(line, &error(Errno::EINVAL)), None);
        assert_eq!(sentence_about("", &error(Errno::EBUSY)), None);
        assert_eq!(sentence_about(line, &io::Error::other("no errno")), None);
    }

    #[test]
    fn a_message_says_what_to_do() {
        let message = |errno: Errno| file_error(Path::new("/f"), errno.into()).to_string();
        assert_eq!(message(Errno::ENOTCONN), "/f: kcm mount is not running; start it");
        assert_eq!(message(Errno::ENOSPC), "/f: No space left on device; free some disk space");
        assert_eq!(message(Errno::EISDIR), "/f: Is a directory");
    }
}
