//! The file of events: the lines that `info/events` showed, for the next daemon.
//!
//! Owns its bounds. The file is not part of the state: if it cannot be written or read, nothing else suffers.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use super::EVENTS_KEPT;
use super::disk::{self, AppendFile, Disk, Durability};
use super::records::owner;
use super::trust;
use crate::fair::FairRing;

const NAME: &str = "events";

/// An event in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EventLine {
    /// Its number.
    pub(crate) seq: u64,
    /// The user who caused it.
    pub(crate) uid: u32,
    pub(crate) line: Arc<str>,
}

/// The newest events, and which of them the file does not have yet. Bounded, however long the disk stalls.
#[derive(Debug, Default)]
pub(super) struct EventQueue {
    newest: FairRing<Arc<str>, EVENTS_KEPT>,
    /// The number in the ring of the first event that was added since the file was last written.
    unwritten: u64,
}

impl EventQueue {
    pub(super) fn new(newest: &[EventLine]) -> Self {
        let mut queue = Self::default();
        newest.iter().for_each(|event| drop(queue.newest.push(event.uid, Arc::clone(&event.line))));
        queue.unwritten = queue.newest.next_number();
        queue
    }

    pub(super) fn push(&mut self, uid: u32, line: &str) {
        self.newest.push(uid, line.into());
    }

    pub(super) fn has_unwritten(&self) -> bool {
        self.unwritten < self.newest.next_number()
    }

    /// Returns what has to be written to a file that has room for so many lines.
    pub(super) fn unwritten(&self, room: usize) -> Option<Unwritten> {
        if !self.has_unwritten() {
            return None;
        }
        let replaces = self.newest.next_number() - self.unwritten > room as u64;
        let first = if replaces { 0 } else { self.unwritten };
        let lines = self.newest.since(first).cloned().collect();
        Some(Unwritten { lines, replaces, end: self.newest.next_number() })
    }

    /// The file has these events now.
    pub(super) fn written(&mut self, unwritten: &Unwritten) {
        self.unwritten = unwritten.end;
    }
}

/// Events that the file does not have yet.
#[derive(Debug)]
pub(super) struct Unwritten {
    lines: Vec<Arc<str>>,
    /// Whether they replace those in the file.
    replaces: bool,
    /// The number in the ring of the event after them.
    end: u64,
}

/// The open file.
#[derive(Debug)]
pub(super) struct EventFile {
    path: PathBuf,
    /// `None` if the file could not be opened or written; the next write replaces it.
    file: Option<AppendFile>,
    lines: usize,
}

/// The fields of an event that matter here.
#[derive(Deserialize)]
struct Owned {
    seq: u64,
    /// Missing in events of earlier versions, and in those that nobody has caused.
    uid: Option<u32>,
}

impl EventFile {
    /// Opens the file. Returns its newest events as well; lines that are not events are left out.
    ///
    /// The file has all events that were added since it was last replaced by those that were kept then, so the same
    /// ones are kept again.
    pub(super) fn open(disk: &dyn Disk, path: &Path) -> (Self, Vec<EventLine>) {
        let bytes = trust::read(&path.join(NAME)).unwrap_or_default();
        let (mut events, mut lines, mut is_sound) = (FairRing::<EventLine, EVENTS_KEPT>::default(), 0, true);
        for line in bytes.strip_suffix(b"\n").unwrap_or(&bytes).split(|&b| b == b'\n') {
            lines += 1;
            match event(line) {
                Some(event) => drop(events.push(event.uid, event)),
                None => is_sound = false,
            }
        }
        let events: Vec<EventLine> = events.iter().cloned().collect();
        let mut this = Self { path: path.to_path_buf(), file: None, lines };
        if is_sound && bytes.ends_with(b"\n") {
            let file = disk.open(&path.join(NAME)).ok();
            this.file = file.map(|file| AppendFile::new(file, bytes.len() as u64));
        } else {
            this.rewrite(disk, events.iter().map(|event| &*event.line));
        }
        (this, events)
    }

    /// Returns how many lines the file takes before it has to be replaced. It holds up to twice as many as are kept, so
    /// that it is not replaced all the time.
    pub(super) fn room(&self) -> usize {
        if self.file.is_some() { (2 * EVENTS_KEPT).saturating_sub(self.lines) } else { 0 }
    }

    /// Writes events. Returns whether the file has them now.
    pub(super) fn write(&mut self, disk: &dyn Disk, unwritten: &Unwritten) -> bool {
        let events = unwritten.lines.iter().map(AsRef::as_ref);
        match &mut self.file {
            Some(file) if !unwritten.replaces => {
                let written = file.append(disk, lines(events).as_bytes()).is_ok();
                self.lines += if written { unwritten.lines.len() } else { 0 };
                written
            }
            _ => self.rewrite(disk, events),
        }
    }

    fn rewrite<'a>(&mut self, disk: &dyn Disk, newest: impl Iterator<Item = &'a str> + Clone) -> bool {
        let text = lines(newest.clone());
        let length = text.len() as u64;
        let file = disk::replace(disk, &self.path, NAME, || Ok(text.into_bytes()), Durability::Process);
        self.file = file.ok().map(|file| AppendFile::new(file, length));
        self.lines = newest.count();
        self.file.is_some()
    }
}

fn event(line: &[u8]) -> Option<EventLine> {
    let line = str::from_utf8(line).ok()?;
    let Owned { seq, uid } = serde_json::from_str(line).ok()?;
    Some(EventLine { seq, uid: owner(uid), line: line.into() })
}

fn lines<'a>(events: impl Iterator<Item = &'a str>) -> String {
    events.flat_map(|event| [event, "\n"]).collect()
}

#[cfg(test)]
mod tests {
    use super::super::disk::RealDisk;
    use super::*;
    use std::fs;

    fn line(seq: u64) -> String {
        format!("{{\"seq\":{seq}}}")
    }

    fn numbers(events: &[EventLine]) -> Vec<u64> {
        events.iter().map(|event| event.seq).collect()
    }

    #[test]
    fn the_next_daemon_reads_the_newest_events() {
        let directory = tempfile::tempdir().unwrap();
        let (mut file, events) = EventFile::open(&RealDisk, directory.path());
        assert!(events.is_empty());
        let mut queue = EventQueue::default();
        let last = 10 * EVENTS_KEPT as u64;
        for seq in 1..=last {
            queue.push(0, &line(seq));
            if seq % 3 == 0 {
                continue;
            }
            let unwritten = queue.unwritten(file.room()).unwrap();
            assert!(file.write(&RealDisk, &unwritten));
            queue.written(&unwritten);
            assert!(!queue.has_unwritten());
        }
        let (_, events) = EventFile::open(&RealDisk, directory.path());
        assert_eq!(numbers(&events), (last - EVENTS_KEPT as u64 + 1..=last).collect::<Vec<u64>>());
        let length = fs::read(directory.path().join(NAME)).unwrap().len();
        assert!(length <= (2 * EVENTS_KEPT + 1) * (line(last).len() + 1), "{length} bytes");
    }

    #[test]
    fn events_that_were_not_written_for_long_are_bounded() {
        let mut queue = EventQueue::default();
        let last = 5 * EVENTS_KEPT as u64;
        (1..=last).for_each(|seq| queue.push(0, &line(seq)));
        let directory = tempfile::tempdir().unwrap();
        let (mut file, _) = EventFile::open(&RealDisk, directory.path());
        let unwritten = queue.unwritten(file.room()).unwrap();
        assert_eq!(unwritten.lines.len(), EVENTS_KEPT);
        assert!(file.write(&RealDisk, &unwritten));
        let (_, events) = EventFile::open(&RealDisk, directory.path());
        assert_eq!(events.last().map(|event| event.seq), Some(last));
        assert_eq!(events.len(), EVENTS_KEPT);
    }

    #[test]
    fn the_next_daemon_keeps_the_events_that_this_one_kept() {
        let directory = tempfile::tempdir().unwrap();
        let (mut file, _) = EventFile::open(&RealDisk, directory.path());
        let mut queue = EventQueue::default();
        for seq in 1..=5 * EVENTS_KEPT as u64 {
            // One user causes most of them, and another one a few; most are written one by one.
            let uid = if seq % 100 == 0 && seq < 2_000 { 7 } else { 1000 };
            queue.push(uid, &format!("{{\"seq\":{seq},\"uid\":{uid}}}"));
            if seq % 7 != 0 {
                let unwritten = queue.unwritten(file.room()).unwrap();
                assert!(file.write(&RealDisk, &unwritten));
                queue.written(&unwritten);
            }
        }
        let kept: Vec<Arc<str>> = queue.newest.iter().cloned().collect();
        let (_, events) = EventFile::open(&RealDisk, directory.path());
        assert_eq!(events.iter().map(|event| Arc::clone(&event.line)).collect::<Vec<_>>(), kept);
        let of_the_other: Vec<u64> = events.iter().filter(|it| it.uid == 7).map(|it| it.seq).collect();
        assert_eq!(of_the_other, (1..20).map(|n| n * 100).collect::<Vec<u64>>());
    }

    #[test]
    fn lines_that_are_not_events_are_left_out() {
        let directory = tempfile::tempdir().unwrap();
        let text = [line(1).as_bytes(), b"\n\xff\n{}\n", line(2).as_bytes(), b"\n{\"se"].concat();
        fs::write(directory.path().join(NAME), text).unwrap();
        let (mut file, events) = EventFile::open(&RealDisk, directory.path());
        assert_eq!(numbers(&events), [1, 2]);
        let mut queue = EventQueue::default();
        queue.push(0, &line(3));
        assert!(file.write(&RealDisk, &queue.unwritten(file.room()).unwrap()));
        let (_, events) = EventFile::open(&RealDisk, directory.path());
        assert_eq!(numbers(&events), [1, 2, 3]);
    }
}
