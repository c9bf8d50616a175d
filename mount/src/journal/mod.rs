//! The state directory: the configuration, which is durable, and the log of claims, which outlives the daemon
//! but not the boot.
//!
//! Owns: files and their soundness. Must not know: FUSE, processes, or why anything is recorded.
//!
//! ```text
//! lock     held by the daemon that uses the directory
//! config   replaced as a whole, fsynced
//! claims   appended to; compacted now and then
//! events   what was last shown of events; of no consequence
//! ```
//!
//! A file that is damaged is set aside as `<name>.damaged-<time>`; what can be read of it is kept.

mod claims_log;
mod codec;
mod config;
mod events;
mod lock;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use log::warn;
use nix::errno::Errno;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

pub(crate) use claims_log::{Filed, HOLDER, Reclaimed, Record};
use claims_log::{Live, Requests};
use codec::VERSION;
pub(crate) use config::{Config, LastRequest, ListConfig, NodeAttributes, PoolConfig};
use events::EventFile;
pub(crate) use lock::StateLock;

use crate::clock;
use crate::model::command::Claim;

/// How many reclaimed claims are kept for those who have not read of them.
pub(crate) const RECLAIMED_KEPT: usize = 1024;
/// How many events are kept.
pub(crate) const EVENTS_KEPT: usize = 1024;
/// How many refusals are kept for those whom they concern.
pub(crate) const REFUSALS_KEPT: usize = 4096;
/// A log is compacted when it is larger than this, and four times larger than after the last time.
const COMPACTED_FROM: u64 = 64 * 1024;

/// An open state directory.
#[derive(Debug)]
pub(crate) struct StateDir {
    path: PathBuf,
    boot: String,
    mount: u64,
    log: Mutex<Log>,
    events: Mutex<EventFile>,
    /// Held as long as a process of the daemon lives.
    _lock: StateLock,
}

#[derive(Debug)]
struct Log {
    /// None: it could not be written when the daemon started; it is tried again with every record.
    file: Option<File>,
    /// The length up to which the file is sound.
    length: u64,
    compact_at: u64,
    next: u64,
    live: Live,
    /// In `live`, and not yet in the file.
    owed: Vec<Record>,
}

/// What an earlier daemon has left.
#[derive(Debug)]
pub(crate) struct Recovered {
    pub(crate) config: Config,
    /// The latest first.
    pub(crate) claims: Vec<Arc<Claim>>,
    /// Claims for which masks may have been set, and nothing else. A claim that it was to replace is among
    /// the claims.
    pub(crate) intents: Vec<Arc<Claim>>,
    /// Claims that are over, whose masks may not be back.
    pub(crate) releasing: Vec<Arc<Claim>>,
    pub(crate) reclaimed: VecDeque<Reclaimed>,
    pub(crate) reclaimed_dropped: u64,
    /// The newest events, with their numbers.
    pub(crate) events: VecDeque<(u64, String)>,
    pub(crate) next_event: u64,
    pub(crate) next_handle: u32,
    /// Open files that are polled, with the kernel's handles for that.
    pub(crate) polls: Vec<(u64, u64)>,
    /// Open files through which no command is taken any more.
    pub(crate) rests: Vec<u64>,
    pub(crate) refusals: Vec<Arc<Filed>>,
    pub(crate) damage: Vec<Damage>,
    /// Records are missing: what is recorded as a claim may have been released.
    pub(crate) suspect: bool,
}

/// What was lost, and where the rest lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Damage {
    file: PathBuf,
    what: String,
    kept_as: PathBuf,
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}; it is kept as {}", self.file.display(), self.what, self.kept_as.display())
    }
}

/// Why a state directory cannot be used; with the cure.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the message says it")]
pub enum StateError {
    #[error("{0}: in use by another kcm mount; give another --state-dir, or kcm unmount that one first")]
    InUse(PathBuf),
    #[error("{file}: written by a newer kcm (format {found}, this one knows {VERSION}); run that one")]
    NewerVersion { file: PathBuf, found: u32 },
    // The cause stands before the cure; as the source it would be told once more behind it.
    #[error("{file}: {what}: {cause}; look at its owner, mode and disk")]
    Io { file: PathBuf, what: &'static str, cause: io::Error },
}

#[derive(Serialize, Deserialize)]
struct Header {
    kcm: String,
    version: u32,
    boot: String,
}

/// A record in the log. Numbers follow each other, so that a missing one is noticed.
#[derive(Serialize, Deserialize)]
struct Numbered<R> {
    n: u64,
    r: R,
}

impl StateDir {
    /// Opens the directory, for the daemon that has locked it. The claims of another boot are forgotten.
    ///
    /// # Errors
    /// A [`StateError`]; nothing is changed then.
    pub(crate) fn open(
        lock: StateLock,
        path: &Path,
        boot: &str,
        mount: u64,
    ) -> Result<(Self, Recovered), StateError> {
        let path = path.canonicalize().map_err(failed(path, "cannot be resolved"))?;
        if let Err(newer @ StateError::NewerVersion { .. }) = Self::check(&path) {
            return Err(newer);
        }
        let mut damage = Vec::new();
        let config = open_config(&path, &mut damage)?;
        let (mut log, suspect) = open_log(&path, boot, &mut damage)?;
        log.begin(boot, mount);
        if let Some(last) = config.last.filter(|last| last.mount == mount) {
            log.live.requests.carried_out(last.request);
        }
        let live = &log.live;
        let mut claims: Vec<&(u64, Arc<Claim>)> = live.claims.values().collect();
        claims.sort_by_key(|(number, _)| std::cmp::Reverse(*number));
        let (event_file, events) = EventFile::open(&path, EVENTS_KEPT);
        let recovered = Recovered {
            events,
            config,
            claims: claims.into_iter().map(|(_, claim)| claim.clone()).collect(),
            intents: live.intents.values().cloned().collect(),
            releasing: live.releasing.values().cloned().collect(),
            reclaimed: live.reclaimed.clone(),
            reclaimed_dropped: live.dropped,
            next_event: live.events.max(1),
            next_handle: live.handles.max(1),
            polls: live.requests.polls.iter().map(|(&fh, &kh)| (fh, kh)).collect(),
            rests: live.requests.rests.iter().copied().collect(),
            refusals: live.refusals.iter().cloned().collect(),
            damage,
            suspect,
        };
        let state = Self {
            path,
            boot: boot.to_owned(),
            mount,
            log: Mutex::new(log),
            events: Mutex::new(event_file),
            _lock: lock,
        };
        Ok((state, recovered))
    }

    /// The mount that is served.
    pub(crate) fn mount(&self) -> u64 {
        self.mount
    }

    /// Looks at what is remembered of requests and open files.
    pub(crate) fn with_requests<T>(&self, look: impl FnOnce(&Requests) -> T) -> T {
        look(&self.log.lock().live.requests)
    }

    /// Whether this program can read what is there. Changes nothing.
    ///
    /// # Errors
    /// [`StateError::NewerVersion`], or a file cannot be read.
    pub(crate) fn check(path: &Path) -> Result<(), StateError> {
        for (name, newer) in
            [("config", config::newer as fn(&[u8]) -> Option<u32>), ("claims", newer_log as fn(&[u8]) -> _)]
        {
            let file = path.join(name);
            match bytes_of(&file) {
                Ok(bytes) => {
                    if let Some(found) = newer(&bytes) {
                        return Err(StateError::NewerVersion { file, found });
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed(&file, "cannot be read")(error)),
            }
        }
        Ok(())
    }

    /// Records what happened; it outlives this process when this returns.
    ///
    /// # Errors
    /// It is not recorded, and the log is as it was.
    pub(crate) fn append(&self, record: &Record) -> io::Result<()> {
        self.try_append(&mut self.log.lock(), record)
    }

    /// Records what has happened, whether that can be recorded or not. Where it cannot, it is owed: it is recorded
    /// before anything else is, by this process.
    ///
    /// # Errors
    /// It is owed.
    pub(crate) fn append_or_owe(&self, record: Record) -> io::Result<()> {
        let mut log = self.log.lock();
        self.try_append(&mut log, &record).inspect_err(|_| {
            let number = log.next;
            log.live.add(number, record.clone());
            log.owed.push(record);
        })
    }

    fn try_append(&self, log: &mut Log, record: &Record) -> io::Result<()> {
        if log.file.is_none() {
            self.renew(log)?;
        }
        let with_owed =
            (!log.owed.is_empty()).then(|| Record::Batch(log.owed.iter().chain([record]).cloned().collect()));
        let written = with_owed.as_ref().unwrap_or(record);
        let line = codec::encode(&self.boot, &Numbered { n: log.next, r: written })?;
        log.write(&line)?;
        log.owed.clear();
        let number = log.next;
        log.next += 1;
        log.live.add(number, record.clone());
        if log.length > log.compact_at {
            self.compact(log);
        }
        Ok(())
    }

    /// Keeps an event for the next daemon; `kept` gives all that are still wanted, this one included.
    pub(crate) fn note_event<'a, I: ExactSizeIterator<Item = &'a str>>(
        &self,
        line: &str,
        kept: impl Fn() -> I,
    ) {
        self.events.lock().add(line, kept);
    }

    /// Replaces the configuration; durable when this returns.
    ///
    /// # Errors
    /// The old one is still there.
    pub(crate) fn store_config(&self, config: &Config) -> io::Result<()> {
        config::store(&self.path, config)
    }

    /// Writes the log anew, as short as it can be. Where that fails, the old one goes on growing.
    fn compact(&self, log: &mut Log) {
        if let Err(error) = self.renew(log) {
            warn!("{}: the log of claims cannot be compacted: {error}", self.path.display());
            log.compact_at = log.length * 2;
        }
    }

    /// Replaces the log by one that says the same.
    fn renew(&self, log: &mut Log) -> io::Result<()> {
        let (file, length, next) = rewrite(&self.path, &self.boot, &mut log.live)?;
        (log.file, log.length, log.next, log.compact_at) = (Some(file), length, next, threshold(length));
        log.owed.clear();
        Ok(())
    }
}

impl Log {
    /// A worker begins on this mount.
    fn begin(&mut self, boot: &str, mount: u64) {
        let record = Record::Mounted { mount };
        let line = codec::encode(boot, &Numbered { n: self.next, r: &record });
        self.live.add(self.next, record);
        match line.and_then(|line| self.write(&line)) {
            Ok(()) => self.next += 1,
            Err(error) => warn!("the log of claims cannot be written: {error}"),
        }
    }

    /// All of the line, or nothing of it.
    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        let Some(file) = &mut self.file else { return Err(Errno::ENOSPC.into()) };
        match file.write(line) {
            Ok(written) if written == line.len() => {
                self.length += line.len() as u64;
                Ok(())
            }
            short => {
                // What came through is no record; the next one must not stand behind it.
                file.set_len(self.length)?;
                Err(short.err().unwrap_or_else(|| Errno::ENOSPC.into()))
            }
        }
    }
}

fn threshold(length: u64) -> u64 {
    COMPACTED_FROM.max(length * 4)
}

fn bytes_of(file: &Path) -> io::Result<Vec<u8>> {
    if fs::metadata(file)?.is_file() {
        fs::read(file)
    } else {
        // A pipe would be waited for.
        Err(io::Error::other("not a regular file"))
    }
}

/// The bytes of a file. None: there is no such file, or what is there cannot be read and was set aside.
fn read(file: &Path, damage: &mut Vec<Damage>) -> Result<Option<Vec<u8>>, StateError> {
    match bytes_of(file) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        // That says nothing about the file.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)) => {
            Err(failed(file, "cannot be read")(error))
        }
        Err(error) => {
            set_aside(file, format!("cannot be read: {error}"), damage)?;
            Ok(None)
        }
    }
}

fn set_aside(file: &Path, what: String, damage: &mut Vec<Damage>) -> Result<(), StateError> {
    let name = |suffix: String| {
        let mut name = file.as_os_str().to_owned();
        name.push(format!(".damaged-{}{suffix}", clock::wall_ms() / 1000));
        PathBuf::from(name)
    };
    let free =
        (0..).map(|n| name(if n == 0 { String::new() } else { format!("-{n}") })).find(|path| !path.exists());
    let kept_as = free.unwrap_or_else(|| name(String::new()));
    // Under both names until a sound one takes its place: that may fail, and then it is all that there is.
    // What is no file cannot have two names.
    fs::hard_link(file, &kept_as)
        .or_else(|_| fs::rename(file, &kept_as))
        .map_err(failed(file, "is damaged and cannot be set aside"))?;
    damage.push(Damage { file: file.to_path_buf(), what, kept_as });
    Ok(())
}

fn open_config(path: &Path, damage: &mut Vec<Damage>) -> Result<Config, StateError> {
    let file = path.join("config");
    let config = match read(&file, damage)?.as_deref().map(config::read) {
        None if file_was_set_aside(&file, damage) => Config::after_loss(),
        None => Config::default(),
        Some(config::Read::Newer(found)) => return Err(StateError::NewerVersion { file, found }),
        Some(config::Read::Config { config, damage: None }) => return Ok(config),
        Some(config::Read::Config { config, damage: Some(what) }) => {
            set_aside(&file, what, damage)?;
            config
        }
    };
    if let Err(error) = config::store(path, &config) {
        // A full disk must not keep the mount down; the next change is refused, or stores it all.
        warn!("{}: cannot be written: {error}; make room for the state directory", file.display());
    }
    Ok(config)
}

/// The version of a log that a newer kcm has written.
fn newer_log(bytes: &[u8]) -> Option<u32> {
    codec::decode_first::<Header>("", bytes).map(|header| header.version).filter(|version| *version > VERSION)
}

/// The log with what it says, and whether records are missing in it.
fn open_log(path: &Path, boot: &str, damage: &mut Vec<Damage>) -> Result<(Log, bool), StateError> {
    let file = path.join("claims");
    let found = read(&file, damage)?;
    let unreadable = found.is_none() && file_was_set_aside(&file, damage);
    let existed = found.is_some();
    let bytes = found.unwrap_or_default();
    if let Some(found) = newer_log(&bytes) {
        return Err(StateError::NewerVersion { file, found });
    }
    let header = codec::decode_first::<Header>("", &bytes);
    // Where the header is lost, only records that this boot has signed are believed.
    let seed = header.as_ref().map_or(boot, |header| header.boot.as_str());
    let rest =
        if header.is_some() { bytes.iter().position(|&b| b == b'\n').map_or(0, |end| end + 1) } else { 0 };
    // A log that has lost its beginning has a gap before its first record.
    let (mut live, mut next, mut gaps) = (Live::default(), 0, false);
    let decoded = codec::decode(seed, bytes.get(rest..).unwrap_or_default(), |Numbered { n, r }| {
        gaps |= n != next;
        next = n.wrapping_add(1);
        live.add(n, r);
    });
    let damaged = decoded.bad > 0 || gaps || existed && header.is_none();
    if seed != boot {
        live.claims.clear();
        live.intents.clear();
        live.releasing.clear();
    }
    if damaged {
        let what = format!("{} of its records cannot be read, others may be missing", decoded.bad);
        set_aside(&file, what, damage)?;
    }
    let sound = !damaged && header.is_some() && seed == boot;
    let whole = rest + decoded.whole;
    let log = if sound {
        resume(&file, whole, whole < bytes.len(), next, live)
    } else {
        Ok(anew(path, boot, live))
    };
    Ok((log?, damaged || unreadable))
}

fn file_was_set_aside(file: &Path, damage: &[Damage]) -> bool {
    damage.iter().any(|damage| damage.file == *file)
}

/// Goes on with a sound log, without the tail that was interrupted, if there is one.
fn resume(file: &Path, length: usize, torn: bool, next: u64, live: Live) -> Result<Log, StateError> {
    let handle = OpenOptions::new().append(true).open(file).map_err(failed(file, "cannot be opened"))?;
    let length = length as u64;
    if torn {
        handle.set_len(length).map_err(failed(file, "cannot be cut"))?;
    }
    let file = Some(handle);
    Ok(Log { file, length, compact_at: threshold(0), next, live, owed: Vec::new() })
}

/// A new log. Where it cannot be written, what it would say is kept in memory: a full disk must not keep the
/// mount down.
fn anew(path: &Path, boot: &str, mut live: Live) -> Log {
    let written = rewrite(path, boot, &mut live).inspect_err(|error| {
        warn!("{}: the log of claims cannot be written: {error}; make room for it", path.display());
    });
    let (file, length, next) =
        written.map_or((None, 0, 0), |(file, length, next)| (Some(file), length, next));
    Log { file, length, compact_at: threshold(length), next, live, owed: Vec::new() }
}

/// A new log that says the same. Its length, and the number of its next record.
fn rewrite(path: &Path, boot: &str, live: &mut Live) -> io::Result<(File, u64, u64)> {
    let header = Header { kcm: "claims".into(), version: VERSION, boot: boot.to_owned() };
    let mut bytes = codec::encode("", &header)?;
    let records = live.records();
    for (n, r) in records.iter().enumerate() {
        bytes.extend(codec::encode(boot, &Numbered { n: n as u64, r })?);
    }
    let file = config::replace(path, "claims", &bytes, false)?;
    Ok((file, bytes.len() as u64, records.len() as u64))
}

fn failed(file: &Path, what: &'static str) -> impl FnOnce(io::Error) -> StateError {
    move |cause| StateError::Io { file: file.to_path_buf(), what, cause }
}
