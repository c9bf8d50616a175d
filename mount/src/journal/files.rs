//! The files that records and events are appended to, and since when a thread is busy with them.
//!
//! Owns that the records of one write are in the claims log all or none. Does not know when something is written.

use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use parking_lot::MutexGuard;

use super::claims_log::Record;
use super::codec;
use super::disk::{AppendFile, Disk};
use super::events::EventFile;
use super::format::v1;
use super::spare::Spare;
use crate::clock;

/// The files that records and events are appended to.
#[derive(Debug)]
pub(super) struct Files {
    pub(super) claims: ClaimsFile,
    pub(super) events: EventFile,
    /// Has the claims log if the disk does not take it.
    pub(super) spare: Spare,
}

/// The claims log.
#[derive(Debug)]
pub(super) struct ClaimsFile {
    /// `None` if the file could not be written when the daemon started; every append tries again.
    pub(super) file: Option<AppendFile>,
    /// The length in bytes from which the file is compacted.
    pub(super) compact_at: u64,
    /// The number of the next record.
    pub(super) next: u64,
}

impl ClaimsFile {
    /// Writes the records with one write(2): all of them or none.
    pub(super) fn append<'a>(
        &mut self,
        disk: &dyn Disk,
        boot: &str,
        records: impl Iterator<Item = &'a Record>,
    ) -> io::Result<()> {
        let file = self.file.as_mut().ok_or(Errno::ENOSPC)?;
        let (mut bytes, mut next) = (Vec::new(), self.next);
        for record in records {
            bytes.extend(codec::encode(boot, &v1::ClaimsLine { n: next, r: record.into() })?);
            next += 1;
        }
        if !bytes.is_empty() {
            file.append(disk, &bytes)?;
        }
        self.next = next;
        Ok(())
    }

    pub(super) fn is_large(&self) -> bool {
        self.file.as_ref().is_some_and(|file| file.len() > self.compact_at)
    }
}

/// The files, for the thread that does I/O on them.
pub(super) struct FilesGuard<'a> {
    files: MutexGuard<'a, Files>,
    since: &'a AtomicU64,
}

impl<'a> FilesGuard<'a> {
    pub(super) fn new(files: MutexGuard<'a, Files>, since: &'a AtomicU64) -> Self {
        since.store(clock::since_boot().max(1), Ordering::Relaxed);
        Self { files, since }
    }
}

impl Drop for FilesGuard<'_> {
    fn drop(&mut self) {
        self.since.store(0, Ordering::Relaxed);
    }
}

impl Deref for FilesGuard<'_> {
    type Target = Files;

    fn deref(&self) -> &Files {
        &self.files
    }
}

impl DerefMut for FilesGuard<'_> {
    fn deref_mut(&mut self) -> &mut Files {
        &mut self.files
    }
}
