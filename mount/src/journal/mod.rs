//! The state directory: the configuration, which is durable, and the claims log, which outlives the daemon but not
//! the boot. Together its files are the journal.
//!
//! Owns the files and their integrity. Does not know FUSE, processes, or why anything is recorded.
//!
//! ```text
//! lock     locked by the daemon that uses the directory
//! config   replaced as a whole, fsynced
//! claims   the claims log: appended to, compacted now and then
//! events   the newest events; of no consequence if lost
//! ```
//!
//! Only root may write to the directory, else it is refused (`trust`). Each file is opened without following links.
//!
//! A damaged file is set aside as `<name>.damaged-<time>`, and what can be read of it is kept.
//!
//! The state that the claims log adds up to is also in memory, behind its own lock, so that a record can be deferred
//! without I/O: [`StateDir::defer`] only queues it. [`StateDir::append`] and the flushes write to the files.

mod append;
mod claims_log;
mod codec;
mod config;
mod disk;
mod events;
mod files;
mod format;
mod inspect;
mod lock;
mod memory;
mod pools;
mod records;
mod recovery;
mod spare;
#[cfg(test)]
mod tests;
pub(crate) mod trust;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;

use log::warn;
use parking_lot::Mutex;

#[allow(unused_imports, reason = "the engine names it once it tells a stalled disk from a full one")]
pub(crate) use append::AppendError;
use append::Flusher;
use claims_log::Requests;
pub(crate) use config::Config;
use disk::{Disk, RealDisk};
pub(crate) use events::EventLine;
use events::{EventFile, EventQueue};
use files::Files;
use format::VERSION;
pub use inspect::Problem;
pub(crate) use inspect::{Found, inspect};
pub(crate) use lock::StateLock;
use memory::Memory;
pub(crate) use pools::{LastRequest, ListConfig, NodeAttributes, PoolConfig};
pub(crate) use records::{HOLDER, Reclaimed, Record, RefusalRecord, owner};
pub(crate) use recovery::Recovered;
use spare::Spare;

/// How many reclaimed claims are kept until they are acknowledged.
pub(crate) const RECLAIMED_KEPT: usize = 1024;
/// How many events are kept.
pub(crate) const EVENTS_KEPT: usize = 1024;
/// How many refusals are kept for `self/last_error`.
pub(crate) const REFUSALS_KEPT: usize = 4096;

/// An open state directory.
#[derive(Debug)]
pub(crate) struct StateDir {
    path: PathBuf,
    boot: String,
    mount: u64,
    disk: Box<dyn Disk>,
    memory: Mutex<Memory>,
    events: Mutex<EventQueue>,
    /// Held only for I/O. Taken before `memory` and `events`.
    files: Mutex<Files>,
    /// When the current I/O on the files began, in nanoseconds since boot; 0 if there is none.
    io_since: AtomicU64,
    flusher: Flusher,
    /// Locked as long as any process of the daemon lives.
    _lock: StateLock,
}

/// Why a state directory cannot be used, and the cure.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the message says it")]
pub enum StateError {
    #[error("{0}: in use by another kcm mount; give another --state-dir, or kcm unmount that one first")]
    InUse(PathBuf),
    #[error("{file}: written by a newer kcm (format {found}, this one knows {VERSION}); run that one")]
    NewerVersion { file: PathBuf, found: u32 },
    #[error("{path}: {why}; make it root's (chown root, chmod go-w), or give another --state-dir")]
    Untrusted { path: PathBuf, why: String },
    // The cause stands before the cure. As `#[source]` it would be printed again after it.
    #[error("{file}: {what}: {cause}; look at its owner, mode and disk")]
    Io { file: PathBuf, what: &'static str, cause: io::Error },
}

impl StateDir {
    /// Opens the directory, for the daemon that has locked it. Claims of another boot are forgotten. `spare`: the memfd for
    /// what the disk does not take.
    ///
    /// # Errors
    /// A [`StateError`]; nothing is changed then.
    pub(crate) fn open(
        lock: StateLock,
        path: &Path,
        boot: &str,
        mount: u64,
        spare: Option<OwnedFd>,
    ) -> Result<(Self, Recovered), StateError> {
        Self::open_on(Box::new(RealDisk), lock, path, boot, mount, spare)
    }

    fn open_on(
        disk: Box<dyn Disk>,
        lock: StateLock,
        path: &Path,
        boot: &str,
        mount: u64,
        spare: Option<OwnedFd>,
    ) -> Result<(Self, Recovered), StateError> {
        let path = path.canonicalize().map_err(failed(path, "cannot be resolved"))?;
        if let Err(newer @ StateError::NewerVersion { .. }) = Self::check(&path) {
            return Err(newer);
        }
        let mut damage = Vec::new();
        let config = recovery::open_config(&*disk, &path, &mut damage)?;
        let (claims, log, suspect) = recovery::open_claims(&*disk, &path, boot, &mut damage)?;
        let (spare, kept) = Spare::open(spare, boot);
        // The records in memory are newer than the file, and none of them is missing.
        let suspect = suspect && kept.is_none();
        let mut memory = kept.map_or_else(|| Memory::new(log), Memory::unwritten);
        memory.defer(Record::Mounted { mount });
        if let Some(last) = config.last.filter(|last| last.mount == mount) {
            memory.carried_out(last.request);
        }
        let (event_file, mut events) = EventFile::open(&*disk, &path);
        // A line with a number that was never given out is damaged.
        events.retain(|event| event.seq < memory.log().events.max(1));
        let queue = EventQueue::new(&events);
        let recovered = Recovered::new(config, memory.log(), events, damage, suspect);
        let state = Self {
            path,
            boot: boot.to_owned(),
            mount,
            disk,
            memory: Mutex::new(memory),
            events: Mutex::new(queue),
            files: Mutex::new(Files { claims, events: event_file, spare }),
            io_since: AtomicU64::new(0),
            flusher: Flusher::default(),
            _lock: lock,
        };
        if let Err(error) = state.flush() {
            // A full or read-only disk must not prevent the mount.
            warn!("{}: {error}: claims are refused until it can be written", state.path.display());
        }
        Ok((state, recovered))
    }

    /// Returns the id of the mount that is served.
    pub(crate) fn mount(&self) -> u64 {
        self.mount
    }

    /// Runs `look` on what is remembered of requests and open files.
    pub(crate) fn with_requests<T>(&self, look: impl FnOnce(&Requests) -> T) -> T {
        look(self.memory.lock().requests())
    }

    /// Checks whether this program can read what is there. Changes nothing.
    ///
    /// # Errors
    /// [`StateError::NewerVersion`], or a file cannot be read.
    pub(crate) fn check(path: &Path) -> Result<(), StateError> {
        recovery::check(path)
    }

    /// Replaces the configuration; durable when this returns.
    ///
    /// # Errors
    /// The old one is still there.
    pub(crate) fn store_config(&self, config: &Config) -> io::Result<()> {
        config::store(&*self.disk, &self.path, config)
    }
}

fn failed(file: &Path, what: &'static str) -> impl FnOnce(io::Error) -> StateError {
    move |cause| StateError::Io { file: file.to_path_buf(), what, cause }
}
