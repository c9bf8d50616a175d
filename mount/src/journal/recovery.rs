//! Reading what an earlier daemon left in a state directory.
//!
//! Owns what becomes of files that are damaged, unreadable, or of another boot. Does not know what happens to the
//! claims that it finds.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use log::warn;

use super::append::{self, compaction_threshold};
use super::claims_log::LogState;
use super::codec;
use super::config::{self, Config};
use super::disk::{AppendFile, Disk};
use super::events::EventLine;
use super::files::ClaimsFile;
use super::format::{VERSION, v1};
use super::records::{Reclaimed, RefusalRecord};
use super::{StateError, failed, trust};
use crate::clock;
use crate::model::command::Claim;
use crate::model::partition::Partition;
use crate::model::queue::Waiter;

/// How to handle a file that cannot be written.
const CURE: &str = "look at the state directory and its disk";

/// The state that an earlier daemon left.
#[derive(Debug)]
pub(crate) struct Recovered {
    pub(crate) config: Config,
    /// The newest first.
    pub(crate) claims: Vec<Arc<Claim>>,
    /// Claims for which masks may have been set, and nothing else was done. If one was meant to replace a claim, that
    /// one is in `claims`.
    pub(crate) intents: Vec<Arc<Claim>>,
    /// Claims that are over, and whose masks may not have been restored.
    pub(crate) releasing: Vec<Arc<Claim>>,
    /// What was written to cgroups, or was going to be.
    pub(crate) partitions: Vec<Partition>,
    pub(crate) reclaimed: VecDeque<Reclaimed>,
    pub(crate) reclaimed_dropped: u64,
    /// The newest events.
    pub(crate) events: Vec<EventLine>,
    pub(crate) next_event: u64,
    pub(crate) next_handle: u32,
    /// Open files that are polled, with the kernel's handles for that.
    pub(crate) polls: Vec<(u64, u64)>,
    /// Open files through which no command is accepted.
    pub(crate) truncated: Vec<u64>,
    /// The tasks that wait in turn, in their order.
    pub(crate) queued: Vec<Waiter>,
    pub(crate) refusals: Vec<Arc<RefusalRecord>>,
    pub(crate) damage: Vec<Damage>,
    /// Records are missing: what is recorded as a claim may have been released.
    pub(crate) suspect: bool,
}

#[cfg(test)]
impl Recovered {
    /// Returns what a worker finds after these records, without events.
    pub(crate) fn from_records(config: Config, records: &[crate::journal::Record]) -> Self {
        let mut log = LogState::default();
        records.iter().cloned().for_each(|record| log.add(record));
        Self::new(config, &log, Vec::new(), Vec::new(), false)
    }
}

impl Recovered {
    pub(super) fn new(
        config: Config,
        log: &LogState,
        events: Vec<EventLine>,
        damage: Vec<Damage>,
        suspect: bool,
    ) -> Self {
        let mut claims: Vec<&(u64, Arc<Claim>)> = log.claims.values().collect();
        claims.sort_by_key(|(number, _)| std::cmp::Reverse(*number));
        Self {
            config,
            claims: claims.into_iter().map(|(_, claim)| claim.clone()).collect(),
            intents: log.intents.values().cloned().collect(),
            releasing: log.releasing.values().cloned().collect(),
            partitions: log.partitions.values().cloned().collect(),
            reclaimed: log.reclaimed.iter().cloned().collect(),
            reclaimed_dropped: log.dropped,
            events,
            next_event: log.events.max(1),
            next_handle: log.handles.max(1),
            polls: log.requests.polls.iter().map(|(&fh, &kh)| (fh, kh)).collect(),
            truncated: log.requests.truncated.iter().copied().collect(),
            queued: log.requests.queued.clone(),
            refusals: log.refusals.iter().cloned().collect(),
            damage,
            suspect,
        }
    }
}

/// A damaged file: its name, the loss, and its new name, if it could be set aside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Damage {
    pub(super) file: PathBuf,
    what: String,
    pub(super) kept_as: Option<PathBuf>,
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}; ", self.file.display(), self.what)?;
        match &self.kept_as {
            Some(kept_as) => write!(f, "it is kept as {}", kept_as.display()),
            None => f.write_str("no copy of it can be kept"),
        }
    }
}

/// Returns the bytes of a file; `None` if it does not exist, or if it cannot be read and was set aside.
fn read(file: &Path, damage: &mut Vec<Damage>) -> Result<Option<Vec<u8>>, StateError> {
    match trust::read(file) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        // A lack of resources says nothing about the file.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)) => {
            Err(failed(file, "cannot be read")(error))
        }
        Err(error) => {
            set_aside(file, format!("cannot be read: {error}"), damage);
            Ok(None)
        }
    }
}

/// Gives a damaged file another name. A disk that is full, read-only or failing must not prevent the mount: then the file
/// stays until a sound one can replace it.
fn set_aside(file: &Path, what: String, damage: &mut Vec<Damage>) {
    let name = |suffix: String| {
        let mut name = file.as_os_str().to_owned();
        name.push(format!("{}{}{suffix}", trust::DAMAGED, clock::wall_ms() / 1000));
        PathBuf::from(name)
    };
    let free =
        (0..).map(|n| name(if n == 0 { String::new() } else { format!("-{n}") })).find(|path| !path.exists());
    let kept_as = free.unwrap_or_else(|| name(String::new()));
    // The file keeps its name as well until a sound one replaces it, because that may fail. A directory cannot have
    // two names.
    let kept = fs::hard_link(file, &kept_as).or_else(|_| fs::rename(file, &kept_as));
    if let Err(error) = &kept {
        warn!("{}: is damaged and cannot be set aside: {error}", file.display());
    }
    damage.push(Damage { file: file.to_path_buf(), what, kept_as: kept.is_ok().then_some(kept_as) });
}

/// Checks whether this program can read the files. Changes nothing.
pub(super) fn check(path: &Path) -> Result<(), StateError> {
    for (name, newer) in
        [("config", config::newer as fn(&[u8]) -> Option<u32>), ("claims", newer_claims as fn(&[u8]) -> _)]
    {
        let file = path.join(name);
        match trust::read(&file) {
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

/// Reads the configuration, and repairs its file if it is damaged.
pub(super) fn open_config(
    disk: &dyn Disk,
    path: &Path,
    damage: &mut Vec<Damage>,
) -> Result<Config, StateError> {
    let file = path.join("config");
    let config = match read(&file, damage)?.as_deref().map(config::read) {
        None if was_set_aside(&file, damage) => Config::after_loss(),
        None => Config::default(),
        Some(config::Read::Newer(found)) => return Err(StateError::NewerVersion { file, found }),
        Some(config::Read::Config { config, damage: None }) => return Ok(config),
        Some(config::Read::Config { config, damage: Some(what) }) => {
            set_aside(&file, what, damage);
            config
        }
    };
    if let Err(error) = config::store(disk, path, &config) {
        // A full or read-only disk must not prevent the mount. The next change is refused, or stores everything.
        warn!("{}: cannot be written: {error}; {CURE}", file.display());
    }
    Ok(config)
}

/// Returns the version of a claims log if a newer kcm wrote it.
fn newer_claims(bytes: &[u8]) -> Option<u32> {
    codec::decode_first::<v1::ClaimsHeader>("", bytes)
        .map(|header| header.version)
        .filter(|version| *version > VERSION)
}

/// Opens the claims log. Returns it, what it says, and whether records are missing in it.
pub(super) fn open_claims(
    disk: &dyn Disk,
    path: &Path,
    boot: &str,
    damage: &mut Vec<Damage>,
) -> Result<(ClaimsFile, LogState, bool), StateError> {
    let file = path.join("claims");
    let found = read(&file, damage)?;
    let unreadable = found.is_none() && was_set_aside(&file, damage);
    let existed = found.is_some();
    let bytes = found.unwrap_or_default();
    if let Some(found) = newer_claims(&bytes) {
        return Err(StateError::NewerVersion { file, found });
    }
    let header = codec::decode_first::<v1::ClaimsHeader>("", &bytes);
    // If the header is lost, only records with the checksum of this boot are believed.
    let seed = header.as_ref().map_or(boot, |header| header.boot.as_str());
    let headed =
        if header.is_some() { bytes.iter().position(|&b| b == b'\n').map_or(0, |end| end + 1) } else { 0 };
    // A log that has lost its beginning has a gap before its first record.
    let (mut log, mut next, mut gaps) = (LogState::default(), 0, false);
    let mut cgroups = v1::SharedCgroups::default();
    let decoded = codec::decode(seed, bytes.get(headed..).unwrap_or_default(), |v1::ClaimsLine { n, r }| {
        let Ok(record) = r.decoded(&mut cgroups) else { return false };
        gaps |= n != next;
        next = n.wrapping_add(1);
        log.add(record);
        true
    });
    let damaged = decoded.bad > 0 || gaps || existed && header.is_none();
    if seed != boot {
        log.end_of_boot();
    }
    if damaged {
        let what = format!("{} of its records cannot be read, others may be missing", decoded.bad);
        set_aside(&file, what, damage);
    }
    let sound = !damaged && header.is_some() && seed == boot;
    let whole = headed + decoded.whole;
    let claims = if sound {
        resume(disk, &file, whole, whole < bytes.len(), next)
    } else {
        begin(disk, path, boot, &log)
    };
    Ok((claims, log, damaged || unreadable))
}

fn was_set_aside(file: &Path, damage: &[Damage]) -> bool {
    damage.iter().any(|damage| damage.file == *file)
}

/// Continues a sound claims log; a torn line at its end is cut off. If it cannot be written, every append tries to write
/// a new one: a full or read-only disk must not prevent the mount.
fn resume(disk: &dyn Disk, file: &Path, length: usize, torn: bool, next: u64) -> ClaimsFile {
    let opened = disk.open(file).and_then(|handle| {
        let mut append = AppendFile::new(handle, length as u64);
        if torn {
            append.cut(disk)?;
        }
        Ok(append)
    });
    let file = opened.inspect_err(|error| not_written(file, error)).ok();
    ClaimsFile { file, compact_at: compaction_threshold(0), next }
}

/// Begins a new claims log. If it cannot be written, its content stays in memory.
fn begin(disk: &dyn Disk, path: &Path, boot: &str, log: &LogState) -> ClaimsFile {
    append::rewrite(disk, path, boot, || log.clone()).unwrap_or_else(|error| {
        not_written(path, &error);
        ClaimsFile { file: None, compact_at: compaction_threshold(0), next: 0 }
    })
}

fn not_written(path: &Path, error: &io::Error) {
    warn!("{}: the claims log cannot be written: {error}; {CURE}", path.display());
}
