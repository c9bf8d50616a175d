//! Follows the pools of a mount, also when another daemon takes over.
//!
//! Owns the waiting: for a change of `info/config`, which poll(2) reports exactly when pools and lists change, and for the next
//! daemon. Does not know what is done with the pools.

use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Error};
use kcm_mount::model::document::Document;
use kcm_mount::mountpoint::{self, Status};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::confdir::{self, ConfDir};

/// How often a directory whose daemon is away is tried again.
const AWAY_INTERVAL: Duration = Duration::from_millis(200);

/// The caller's part of [`follow`].
pub(crate) trait Follower {
    /// Called at first, after each change, and when the time that it returned last has passed.
    ///
    /// # Errors
    /// One of the mount, which passes if another daemon takes over.
    fn changed(&mut self, dir: &ConfDir, pools: Document) -> Result<PollTimeout, Error>;

    /// Called again and again while no daemon answers.
    ///
    /// # Errors
    /// The caller wants to end.
    fn away(&mut self) -> Result<(), Error> {
        Ok(())
    }
}

/// Follows the pools. Returns only if that is impossible.
///
/// # Errors
/// No daemon can serve the directory, or the follower has failed.
pub(crate) fn follow(conf_dir: &Path, follower: &mut dyn Follower) -> Result<Infallible, Error> {
    let (mut is_waiting, mut was_final) = (false, false);
    loop {
        let followed = ConfDir::open_mounted(conf_dir).and_then(|dir| follow_mount(&dir, follower));
        let error = match followed {
            Ok(never) => match never {},
            Err(error) => error,
        };
        let mut causes = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>());
        let is_of_another = causes.any(confdir::is_of_another_daemon);
        let is_away = !matches!(mountpoint::status(conf_dir), Ok(Status::Live | Status::Plain) | Err(_));
        let is_final = !is_of_another && !is_away;
        // The next daemon may have come after the attempt.
        if is_final && was_final {
            return Err(error);
        }
        if is_away {
            if !is_waiting {
                log::info!("{}: no daemon answers; waiting for the next one", conf_dir.display());
            }
            follower.away()?;
        }
        (is_waiting, was_final) = (is_away, is_final);
        std::thread::sleep(AWAY_INTERVAL);
    }
}

/// Follows the pools of one daemon.
fn follow_mount(dir: &ConfDir, follower: &mut dyn Follower) -> Result<Infallible, Error> {
    let path = dir.path().join("info/config");
    let mut config = File::open(&path).map_err(|error| match error.kind() {
        // A daemon without this file is of an older version.
        io::ErrorKind::NotFound => confdir::file_error(&path, error),
        _ => failed(&path, error),
    })?;
    loop {
        let mut text = Vec::new();
        let read = config.rewind().and_then(|()| config.read_to_end(&mut text));
        read.map_err(|error| failed(&path, error))?;
        let pools: Document = serde_json::from_slice(&text).with_context(|| {
            format!("{}: another version of kcm serves it; use the kcm that does", path.display())
        })?;
        let timeout = follower.changed(dir, pools)?;
        match poll(&mut [PollFd::new(config.as_fd(), PollFlags::POLLPRI)], timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(failed(&path, errno.into())),
        }
    }
}

/// An error of the mount, with its cause for [`confdir::is_of_another_daemon`].
fn failed(path: &Path, error: io::Error) -> Error {
    if confdir::is_of_another_daemon(&error) {
        return Error::new(error).context(format!("{}: cannot be read", path.display()));
    }
    confdir::file_error(path, error)
}
