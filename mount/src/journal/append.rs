//! Writing to the claims log and to the events file.
//!
//! Owns the lock of the two files, and the rule that no thread waits for a disk without bound: at most one thread is
//! in a system call on these files; every other one stops waiting after [`IO_TIMEOUT`]. Does not know what a record means.
//!
//! Lock order: `files`, then `memory` or `events`, which are leaves. `memory` and `events` are never held during I/O.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::StateDir;
use super::claims_log::{LogState, Record};
use super::disk::{self, AppendFile, Disk, Durability};
use super::events::EventFile;
use super::files::{ClaimsFile, Files, FilesGuard};
use super::memory::Memory;
use super::spare::Spare;
use crate::clock;

/// How long a request waits for the files before it is refused. A write to the page cache takes microseconds, a slow
/// disk may hold it up for some hundred milliseconds; longer means that the disk does not answer.
pub(super) const IO_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a request waits behind others whose writes take a part of that time each, such as on a machine with too few
/// processors. Clients and the watchdog wait as long.
const QUEUE_TIMEOUT: Duration = Duration::from_secs(5);
/// The claims log is compacted when it is larger than this, in bytes, and four times as large as after the last time.
pub(super) const COMPACTED_FROM: u64 = 64 * 1024;

/// Why a record was not written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AppendError {
    #[error("the disk of the state directory does not answer")]
    Stalled,
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Returns the length in bytes at which a file is compacted that was so long after the last time.
pub(super) fn compaction_threshold(length: u64) -> u64 {
    COMPACTED_FROM.max(length * 4)
}

/// Writes a new claims log that says what `log` returns.
///
/// # Errors
/// The old file is unchanged.
pub(super) fn rewrite(
    disk: &dyn Disk,
    directory: &Path,
    boot: &str,
    log: impl FnOnce() -> LogState,
) -> io::Result<ClaimsFile> {
    let (mut length, mut next) = (0, 0);
    let encode = || {
        let (bytes, following) = log().encode(boot)?;
        (length, next) = (bytes.len() as u64, following);
        Ok(bytes)
    };
    let file = disk::replace(disk, directory, "claims", encode, Durability::Process)?;
    Ok(ClaimsFile {
        file: Some(AppendFile::new(file, length)),
        compact_at: compaction_threshold(length),
        next,
    })
}

/// The requests to the thread of [`StateDir::flush_forever`].
#[derive(Debug, Default)]
pub(super) struct Flusher {
    requests: Mutex<Requests>,
    wake: Condvar,
    /// Notified after each attempt to flush.
    flushed: Condvar,
    /// Whether the last write failed.
    failing: AtomicBool,
}

#[derive(Debug, Default)]
struct Requests {
    flush: bool,
    /// A line for the daemon log.
    log: Option<String>,
    /// Whether an attempt to flush is running, and how many have ended.
    is_flushing: bool,
    attempts: u64,
}

impl Flusher {
    /// Waits for a request. Returns the line to log, and whether to flush.
    fn wait(&self) -> (Option<String>, bool) {
        let mut requests = self.requests.lock();
        while !requests.flush && requests.log.is_none() {
            self.wake.wait(&mut requests);
        }
        requests.is_flushing = std::mem::take(&mut requests.flush);
        (requests.log.take(), requests.is_flushing)
    }

    fn end_attempt(&self) {
        let mut requests = self.requests.lock();
        requests.is_flushing = false;
        requests.attempts += 1;
        self.flushed.notify_all();
    }

    fn log(&self, line: String) {
        self.requests.lock().log = Some(line);
        self.wake.notify_one();
    }
}

impl StateDir {
    /// Writes a record, after everything that was deferred before. When this returns the record survives the death
    /// of this process (not a loss of power, which no claim survives).
    ///
    /// # Errors
    /// Nothing of the record is in the file or in the state. [`AppendError::Stalled`] when the disk has not answered another
    /// thread for [`IO_TIMEOUT`], and after [`QUEUE_TIMEOUT`].
    pub(crate) fn append(&self, record: &Record) -> Result<(), AppendError> {
        let appended = self.files_in_time().and_then(|mut files| {
            let appended = self.append_to(&mut files.claims, record);
            self.update_spare(&mut files.spare, appended.is_ok());
            appended
        });
        self.report(appended)
    }

    /// Adds a record of something that has happened already. Does no I/O and never fails: the record is written
    /// by the next [`Self::append`] or flush, in the order in which records were deferred.
    pub(crate) fn defer(&self, record: Record) {
        self.memory.lock().defer(record);
    }

    /// Keeps an event of a user for the next daemon; it is written by the next flush.
    pub(crate) fn note_event(&self, uid: u32, line: &str) {
        self.events.lock().push(uid, line);
    }

    /// Writes what is deferred, for a request whose answer should not be lost. Waits no longer than
    /// [`Self::append`].
    ///
    /// # Errors
    /// Records are still deferred; a later flush or append writes them.
    pub(crate) fn flush(&self) -> Result<(), AppendError> {
        if !self.has_unwritten() {
            return Ok(());
        }
        let flushed = self.files_in_time().and_then(|mut files| self.write_deferred(&mut files));
        self.report(flushed)
    }

    /// Writes what is deferred if no other thread is writing, else leaves it to [`Self::flush_forever`]. Never waits
    /// for another thread.
    pub(crate) fn flush_deferred(&self) {
        if !self.has_unwritten() {
            return;
        }
        match self.files.try_lock() {
            Some(files) => {
                let mut files = FilesGuard::new(files, &self.io_since);
                let _ = self.report(self.write_deferred(&mut files));
            }
            None => self.request_flush(),
        }
    }

    /// Has the thread of [`Self::flush_forever`] write what is deferred. Does no I/O.
    pub(crate) fn request_flush(&self) {
        self.flusher.requests.lock().flush = true;
        self.flusher.wake.notify_one();
    }

    /// Has that thread write what is deferred, and waits until it has tried, but no longer than `limit`; not at all if
    /// the disk is known not to answer. Does no I/O in this thread.
    pub(crate) fn flush_within(&self, limit: Duration) {
        if !self.has_unwritten() {
            return;
        }
        let mut requests = self.flusher.requests.lock();
        requests.flush = true;
        self.flusher.wake.notify_one();
        if self.is_stalled() {
            return;
        }
        // An attempt that is running may have missed the newest records.
        let wanted = requests.attempts + 1 + u64::from(requests.is_flushing);
        let deadline = Instant::now() + limit;
        while requests.attempts < wanted {
            if self.flusher.flushed.wait_until(&mut requests, deadline).timed_out() {
                return;
            }
        }
    }

    /// Writes what is deferred whenever [`Self::request_flush`] asks for it; for a thread of its own, which sleeps
    /// otherwise. It also logs why the files cannot be written: the daemon log may be on the same disk, so no thread
    /// of a request should.
    pub(crate) fn flush_forever(&self) {
        loop {
            let (failure, flush) = self.flusher.wait();
            if let Some(failure) = failure {
                log::warn!("{}: {failure}; claims are refused until it can be written", self.path.display());
            }
            if flush {
                let mut files = FilesGuard::new(self.files.lock(), &self.io_since);
                let _ = self.report(self.write_deferred(&mut files));
                drop(files);
                self.flusher.end_attempt();
            }
        }
    }

    /// Returns whether a thread has waited for the disk for longer than [`IO_TIMEOUT`].
    pub(crate) fn is_stalled(&self) -> bool {
        let since = self.io_since.load(Ordering::Relaxed);
        since != 0 && clock::since_boot().saturating_sub(since) >= IO_TIMEOUT.as_nanos() as u64
    }

    fn has_unwritten(&self) -> bool {
        self.memory.lock().has_deferred() || self.events.lock().has_unwritten()
    }

    /// Returns the files, unless the thread that has them does not come back.
    fn files_in_time(&self) -> Result<FilesGuard<'_>, AppendError> {
        let end = Instant::now() + QUEUE_TIMEOUT;
        loop {
            let age = match self.io_since.load(Ordering::Relaxed) {
                0 => Duration::ZERO,
                since => Duration::from_nanos(clock::since_boot().saturating_sub(since)),
            };
            // With a timeout of 0 the lock is only tried: requests do not queue up behind a write that is stuck.
            if let Some(files) = self.files.try_lock_for(IO_TIMEOUT.saturating_sub(age)) {
                return Ok(FilesGuard::new(files, &self.io_since));
            }
            // Otherwise another thread has them by now, and the disk answers.
            if self.is_stalled() || Instant::now() >= end {
                return Err(AppendError::Stalled);
            }
        }
    }

    fn append_to(&self, claims: &mut ClaimsFile, record: &Record) -> Result<(), AppendError> {
        let (deferred, covered) = self.when_appendable(claims, |memory| memory.begin_append(record))?;
        let written = claims.append(&*self.disk, &self.boot, deferred.iter().chain([record]));
        self.memory.lock().end_append(covered, written.is_ok());
        written?;
        self.compact_if_large(claims);
        Ok(())
    }

    pub(super) fn write_deferred(&self, files: &mut Files) -> Result<(), AppendError> {
        let written = self.write_deferred_to(&mut files.claims);
        self.update_spare(&mut files.spare, written.is_ok());
        written?;
        self.write_events(&mut files.events);
        Ok(())
    }

    fn write_deferred_to(&self, claims: &mut ClaimsFile) -> Result<(), AppendError> {
        let (deferred, covered) = self.when_appendable(claims, |memory| memory.deferred())?;
        claims.append(&*self.disk, &self.boot, deferred.iter())?;
        self.memory.lock().flushed(covered);
        self.compact_if_large(claims);
        Ok(())
    }

    /// Keeps in memory what the disk has not taken. The caller has the files, so that no record is written meanwhile: what
    /// is in the spare log is never older than what the file says, once a request has been answered.
    fn update_spare(&self, spare: &mut Spare, is_written: bool) {
        if is_written {
            spare.clear();
        } else {
            spare.keep(&self.boot, self.memory.lock().log());
        }
    }

    fn write_events(&self, file: &mut EventFile) {
        let Some(unwritten) = self.events.lock().unwritten(file.room()) else { return };
        if file.write(&*self.disk, &unwritten) {
            self.events.lock().written(&unwritten);
        }
    }

    /// Runs `begin` on the memory once the file can be appended to, which may need a rewrite first.
    fn when_appendable<T>(
        &self,
        claims: &mut ClaimsFile,
        begin: impl Fn(&mut Memory) -> Option<T>,
    ) -> io::Result<T> {
        loop {
            if claims.file.is_some()
                && let Some(begun) = begin(&mut self.memory.lock())
            {
                return Ok(begun);
            }
            self.rewrite(claims)?;
        }
    }

    /// Compacts the file if it is large. If that fails, the file keeps growing.
    fn compact_if_large(&self, claims: &mut ClaimsFile) {
        if !claims.is_large() {
            return;
        }
        if let Err(error) = self.rewrite(claims) {
            self.flusher.log(format!("the claims log cannot be compacted: {error}"));
            claims.compact_at = claims.file.as_ref().map_or(0, AppendFile::len) * 2;
        }
    }

    /// Replaces the claims log by a short one with the same meaning, deferred records included.
    fn rewrite(&self, claims: &mut ClaimsFile) -> io::Result<()> {
        let mut covered = None;
        let snapshot = || {
            let (log, covers) = self.memory.lock().snapshot();
            covered = Some(covers);
            log
        };
        *claims = rewrite(&*self.disk, &self.path, &self.boot, snapshot)?;
        if let Some(covered) = covered {
            self.memory.lock().rewritten(covered);
        }
        Ok(())
    }

    /// Has a failure logged, the first in a row only.
    fn report<T>(&self, result: Result<T, AppendError>) -> Result<T, AppendError> {
        let failing = result.is_err();
        if self.flusher.failing.swap(failing, Ordering::Relaxed) != failing
            && let Err(error) = &result
        {
            self.flusher.log(format!("the claims log cannot be written: {error}"));
        }
        result
    }
}
