//! Why a claim on a mount has failed: whether the daemon has gone away, so that another one may come.
//!
//! Owns which errors mean that. Does not know who waits.

use std::io;
use std::path::Path;

use anyhow::{Error, anyhow};

use crate::confdir::{self, ConfDir};

/// Why a claim has failed.
pub(super) enum Failure {
    /// The daemon went away meanwhile.
    Away(Error),
    Final(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

impl Failure {
    /// An error of an operation on a file of the mount, with the reason that the daemon recorded.
    pub(super) fn of_file(dir: &ConfDir, file: &Path, error: io::Error) -> Self {
        if confdir::is_daemon_gone(&error) {
            return Self::Away(confdir::file_error(file, error));
        }
        Self::Final(match dir.last_error(&error) {
            Some(sentence) => anyhow!("{}: {sentence}", file.display()),
            None => confdir::file_error(file, error),
        })
    }
}
