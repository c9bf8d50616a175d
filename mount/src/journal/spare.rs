//! The claims log in memory, for as long as the disk does not take it.
//!
//! Owns a memfd that one worker leaves to the next: if the state directory is full or read-only, a release or a death that
//! could not be written is not forgotten when the worker dies. It is empty while the disk works. Does not know when the
//! disk fails.
//!
//! Its first eight bytes are the length of the rest, and 0 while that is being written: a worker that is killed meanwhile
//! leaves nothing. The rest is a claims log as in the file.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use super::claims_log::LogState;
use super::codec;
use super::format::{VERSION, v1};

const LENGTH: usize = size_of::<u64>();
/// A log that takes longer to keep than this (thousands of claims do) is kept again only after so many times as long, so that
/// requests do not wait for it.
const CHEAP: Duration = Duration::from_millis(1);
const PAUSE: u32 = 20;

/// The memfd, if there is one.
#[derive(Debug)]
pub(super) struct Spare {
    memfd: Option<File>,
    /// How many records the log had that is kept; `None` if the memfd is empty.
    kept: Option<u64>,
    /// When it may be kept again.
    next: Option<Instant>,
}

impl Spare {
    /// Returns the memfd, and the log that an earlier worker has left in it.
    pub(super) fn open(memfd: Option<OwnedFd>, boot: &str) -> (Self, Option<LogState>) {
        let memfd = memfd.map(File::from);
        let log = memfd.as_ref().and_then(|memfd| read(memfd, boot));
        // Until the disk has it, or more is kept.
        (Self { memfd, kept: log.is_some().then_some(0), next: None }, log)
    }

    /// Keeps the log for the next worker.
    pub(super) fn keep(&mut self, boot: &str, log: &LogState) {
        let Some(memfd) = &self.memfd else { return };
        let begun = Instant::now();
        if self.kept == Some(log.added()) || self.next.is_some_and(|next| begun < next) {
            return;
        }
        match write(memfd, boot, log) {
            Ok(()) => self.kept = Some(log.added()),
            Err(error) => log::debug!("the claims log is not kept in memory: {error}"),
        }
        let took = begun.elapsed();
        self.next = (took > CHEAP).then(|| begun + took * PAUSE);
    }

    /// Empties it: the disk has everything.
    pub(super) fn clear(&mut self) {
        if self.kept.take().is_some()
            && let Some(memfd) = &self.memfd
        {
            let _ = memfd.write_all_at(&[0; LENGTH], 0).and_then(|()| memfd.set_len(LENGTH as u64));
        }
    }
}

fn write(memfd: &File, boot: &str, log: &LogState) -> io::Result<()> {
    let (bytes, _) = log.clone().encode(boot)?;
    memfd.write_all_at(&[0; LENGTH], 0)?;
    memfd.write_all_at(&bytes, LENGTH as u64)?;
    memfd.set_len((LENGTH + bytes.len()) as u64)?;
    memfd.write_all_at(&(bytes.len() as u64).to_ne_bytes(), 0)
}

/// Reads a whole log of this boot; anything else is none.
fn read(memfd: &File, boot: &str) -> Option<LogState> {
    let mut bytes = vec![0; usize::try_from(memfd.metadata().ok()?.len()).ok()?];
    memfd.read_exact_at(&mut bytes, 0).ok()?;
    let (length, bytes) = bytes.split_first_chunk::<LENGTH>()?;
    if bytes.is_empty() || u64::from_ne_bytes(*length) != bytes.len() as u64 {
        return None;
    }
    let header: v1::ClaimsHeader = codec::decode_first("", bytes)?;
    if header.version > VERSION || header.boot != boot {
        return None;
    }
    let headed = bytes.iter().position(|&b| b == b'\n')? + 1;
    let mut log = LogState::default();
    let mut cgroups = v1::SharedCgroups::default();
    let decoded = codec::decode(boot, bytes.get(headed..)?, |v1::ClaimsLine { r, .. }| {
        let Ok(record) = r.decoded(&mut cgroups) else { return false };
        log.add(record);
        true
    });
    (decoded.bad == 0 && headed + decoded.whole == bytes.len()).then_some(log)
}
