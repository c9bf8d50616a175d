//! The file of events: the lines that `info/events` showed, for the next daemon.
//!
//! Owns its bounds. The file is not part of the state: if it cannot be written or read, nothing else suffers.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use super::EVENTS_KEPT;
use super::disk::{self, AppendFile, Disk, Durability};
use super::trust;

const NAME: &str = "events";

/// The newest events, and which of them the file does not have yet. Bounded, however long the disk stalls.
#[derive(Debug, Default)]
pub(super) struct EventQueue {
    newest: VecDeque<Arc<str>>,
    /// How many events were added since the file was last written; may be more than there are in `newest`.
    unwritten: usize,
}

impl EventQueue {
    pub(super) fn new(newest: impl Iterator<Item = Arc<str>>) -> Self {
        Self { newest: newest.collect(), unwritten: 0 }
    }

    pub(super) fn push(&mut self, line: &str) {
        self.newest.push_back(line.into());
        if self.newest.len() > EVENTS_KEPT {
            self.newest.pop_front();
        }
        self.unwritten += 1;
    }

    pub(super) fn has_unwritten(&self) -> bool {
        self.unwritten > 0
    }

    /// Returns what has to be written to a file that has room for so many lines.
    pub(super) fn unwritten(&self, room: usize) -> Option<Unwritten> {
        let replaces = self.unwritten > room;
        let skipped = if replaces { 0 } else { self.newest.len().saturating_sub(self.unwritten) };
        let lines = || self.newest.iter().skip(skipped).cloned().collect();
        (self.unwritten > 0).then(|| Unwritten { lines: lines(), replaces, count: self.unwritten })
    }

    /// The file has these events now.
    pub(super) fn written(&mut self, unwritten: &Unwritten) {
        self.unwritten = self.unwritten.saturating_sub(unwritten.count);
    }
}

/// Events that the file does not have yet.
#[derive(Debug)]
pub(super) struct Unwritten {
    lines: Vec<Arc<str>>,
    /// Whether they replace those in the file.
    replaces: bool,
    count: usize,
}

/// The open file.
#[derive(Debug)]
pub(super) struct EventFile {
    path: PathBuf,
    /// `None` if the file could not be opened or written; the next write replaces it.
    file: Option<AppendFile>,
    lines: usize,
}

/// The field that every event has.
#[derive(Deserialize)]
struct Numbered {
    seq: u64,
}

impl EventFile {
    /// Opens the file. Returns its newest events with their numbers as well; lines that are not events are left
    /// out.
    pub(super) fn open(disk: &dyn Disk, path: &Path) -> (Self, VecDeque<(u64, String)>) {
        let bytes = trust::read(&path.join(NAME)).unwrap_or_default();
        let (mut events, mut lines, mut is_sound) = (VecDeque::new(), 0, true);
        // From the end: the less a new worker reads, the sooner it serves.
        for line in bytes.strip_suffix(b"\n").unwrap_or(&bytes).rsplit(|&b| b == b'\n') {
            lines += 1;
            if events.len() == EVENTS_KEPT {
                continue;
            }
            let event = str::from_utf8(line)
                .ok()
                .and_then(|line| Some((serde_json::from_str::<Numbered>(line).ok()?.seq, line.to_owned())));
            is_sound &= event.is_some();
            event.into_iter().for_each(|event| events.push_front(event));
        }
        let mut this = Self { path: path.to_path_buf(), file: None, lines };
        if is_sound && bytes.ends_with(b"\n") {
            let file = disk.open(&path.join(NAME)).ok();
            this.file = file.map(|file| AppendFile::new(file, bytes.len() as u64));
        } else {
            this.rewrite(disk, events.iter().map(|(_, line)| line.as_str()));
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
        let file = disk::replace(disk, &self.path, NAME, text.as_bytes(), Durability::Process);
        self.file = file.ok().map(|file| AppendFile::new(file, text.len() as u64));
        self.lines = newest.count();
        self.file.is_some()
    }
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

    fn numbers(events: &VecDeque<(u64, String)>) -> Vec<u64> {
        events.iter().map(|(seq, _)| *seq).collect()
    }

    #[test]
    fn the_next_daemon_reads_the_newest_events() {
        let directory = tempfile::tempdir().unwrap();
        let (mut file, events) = EventFile::open(&RealDisk, directory.path());
        assert!(events.is_empty());
        let mut queue = EventQueue::default();
        let last = 10 * EVENTS_KEPT as u64;
        for seq in 1..=last {
            queue.push(&line(seq));
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
        (1..=last).for_each(|seq| queue.push(&line(seq)));
        let directory = tempfile::tempdir().unwrap();
        let (mut file, _) = EventFile::open(&RealDisk, directory.path());
        let unwritten = queue.unwritten(file.room()).unwrap();
        assert_eq!(unwritten.lines.len(), EVENTS_KEPT);
        assert!(file.write(&RealDisk, &unwritten));
        let (_, events) = EventFile::open(&RealDisk, directory.path());
        assert_eq!(events.back().map(|(seq, _)| *seq), Some(last));
        assert_eq!(events.len(), EVENTS_KEPT);
    }

    #[test]
    fn lines_that_are_not_events_are_left_out() {
        let directory = tempfile::tempdir().unwrap();
        let text = [line(1).as_bytes(), b"\n\xff\n{}\n", line(2).as_bytes(), b"\n{\"se"].concat();
        fs::write(directory.path().join(NAME), text).unwrap();
        let (mut file, events) = EventFile::open(&RealDisk, directory.path());
        assert_eq!(numbers(&events), [1, 2]);
        let mut queue = EventQueue::default();
        queue.push(&line(3));
        assert!(file.write(&RealDisk, &queue.unwritten(file.room()).unwrap()));
        let (_, events) = EventFile::open(&RealDisk, directory.path());
        assert_eq!(numbers(&events), [1, 2, 3]);
    }
}
