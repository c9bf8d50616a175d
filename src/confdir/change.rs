//! Changes of a mounted directory: renames, draining, and the whole configuration at once.
//!
//! Owns the files and the texts that these write. Does not know what is wanted.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context as _, Error, bail};
use kcm_mount::model::document::{Document, Order};

use super::{ConfDir, file_error};

impl ConfDir {
    /// Opens a directory that a daemon serves.
    ///
    /// # Errors
    /// As [`ConfDir::open`]; also if it is a plain directory.
    pub(crate) fn open_mounted(path: &Path) -> Result<Self, Error> {
        let dir = Self::open(path)?;
        if !dir.mounted {
            bail!("{}: a plain directory; this needs kcm mount, so run that first", path.display());
        }
        Ok(dir)
    }

    /// Renames a pool or a list; both paths are below `pools`.
    ///
    /// # Errors
    /// The daemon refuses.
    pub(crate) fn rename(&self, from: &Path, to: &Path) -> Result<(), Error> {
        log::debug!("{}: renaming it to {}", from.display(), to.display());
        self.with_reason(from, || fs::rename(from, to))
    }

    /// Removes a pool or a list.
    ///
    /// # Errors
    /// The daemon refuses.
    pub(crate) fn remove(&self, directory: &Path) -> Result<(), Error> {
        log::debug!("{}: removing it", directory.display());
        self.with_reason(directory, || fs::remove_dir(directory))
    }

    /// Writes a word to a file of a pool or of a list.
    ///
    /// # Errors
    /// The daemon refuses.
    pub(crate) fn write_word(&self, file: &Path, word: &str) -> Result<(), Error> {
        log::debug!("{}: writing {word}", file.display());
        self.with_reason(file, || OpenOptions::new().write(true).open(file)?.write_all(word.as_bytes()))
    }

    /// Returns the whole configuration.
    ///
    /// # Errors
    /// It cannot be read.
    pub(crate) fn document(&self) -> Result<Document, Error> {
        let file = self.path.join("info/config");
        let text = fs::read(&file).map_err(|error| file_error(&file, error))?;
        let newer = || format!("{}: another version of kcm serves it; use the kcm that does", file.display());
        serde_json::from_slice(&text).with_context(newer)
    }

    /// Makes a document the configuration, or checks whether that is possible.
    ///
    /// # Errors
    /// The daemon refuses; then nothing has changed.
    pub(crate) fn apply(&self, order: &Order) -> Result<(), Error> {
        let file = self.path.join("info/config");
        let json = serde_json::to_string(order).context("the configuration cannot be written")?;
        self.write_word(&file, &json)
    }
}
