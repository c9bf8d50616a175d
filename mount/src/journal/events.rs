//! The file of events: what `info/events` showed, for the next daemon to go on showing.
//!
//! Owns: its bounds. It is no part of the state: where it cannot be written or read, nothing else suffers.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::config;

const NAME: &str = "events";

/// The open file.
#[derive(Debug)]
pub(super) struct EventFile {
    path: PathBuf,
    file: Option<File>,
    /// How many lines it has.
    lines: usize,
}

/// What every event has.
#[derive(Deserialize)]
struct Numbered {
    seq: u64,
}

impl EventFile {
    /// Opens it, and gives its newest `kept` lines with their numbers. What is no event is left out.
    pub(super) fn open(path: &Path, kept: usize) -> (Self, VecDeque<(u64, String)>) {
        let bytes = fs::read(path.join(NAME)).unwrap_or_default();
        let (mut events, mut lines, mut is_sound) = (VecDeque::new(), 0, true);
        // From the end: a worker that dies is followed the sooner the less the next one reads.
        for line in bytes.strip_suffix(b"\n").unwrap_or(&bytes).rsplit(|&b| b == b'\n') {
            lines += 1;
            if events.len() == kept {
                continue;
            }
            let event = str::from_utf8(line)
                .ok()
                .and_then(|line| Some((serde_json::from_str::<Numbered>(line).ok()?.seq, line.to_owned())));
            is_sound &= event.is_some();
            event.into_iter().for_each(|event| events.push_front(event));
        }
        let mut this = Self { path: path.to_path_buf(), file: None, lines };
        if !is_sound || !bytes.ends_with(b"\n") {
            this.rewrite(events.iter().map(|(_, line)| line.as_str()));
        } else {
            let options = OpenOptions::new().create(true).append(true).mode(0o600).open(path.join(NAME));
            this.file = options.ok();
        }
        (this, events)
    }

    /// Adds a line; `kept` gives those that are still wanted, when it is time to leave out the others.
    pub(super) fn add<'a, I: ExactSizeIterator<Item = &'a str>>(&mut self, line: &str, kept: impl Fn() -> I) {
        self.lines += 1;
        if self.lines > 2 * kept().len().max(1) {
            self.rewrite(kept());
            return;
        }
        if let Some(file) = &mut self.file {
            let _ = file.write_all(format!("{line}\n").as_bytes());
        }
    }

    fn rewrite<'a>(&mut self, lines: impl Iterator<Item = &'a str>) {
        let mut text = String::new();
        self.lines = 0;
        for line in lines {
            text.push_str(line);
            text.push('\n');
            self.lines += 1;
        }
        self.file = config::replace(&self.path, NAME, text.as_bytes(), false).ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(seq: u64) -> String {
        format!("{{\"seq\":{seq}}}")
    }

    fn numbers(events: &VecDeque<(u64, String)>) -> Vec<u64> {
        events.iter().map(|(seq, _)| *seq).collect()
    }

    #[test]
    fn the_newest_events_are_there_for_the_next_daemon() {
        let directory = tempfile::tempdir().unwrap();
        let mut kept: VecDeque<String> = VecDeque::new();
        let (mut file, events) = EventFile::open(directory.path(), 3);
        assert!(events.is_empty());
        for seq in 1..=100 {
            kept.push_back(line(seq));
            kept.drain(..kept.len().saturating_sub(3));
            file.add(&line(seq), || kept.iter().map(String::as_str));
        }
        let (_, events) = EventFile::open(directory.path(), 3);
        assert_eq!(numbers(&events), [98, 99, 100]);
        assert!(fs::read(directory.path().join(NAME)).unwrap().len() < 13 * line(100).len());
    }

    #[test]
    fn what_is_no_event_is_left_out() {
        let directory = tempfile::tempdir().unwrap();
        let text = [line(1).as_bytes(), b"\n\xff\n{}\n", line(2).as_bytes(), b"\n{\"se"].concat();
        fs::write(directory.path().join(NAME), text).unwrap();
        let (mut file, events) = EventFile::open(directory.path(), 3);
        assert_eq!(numbers(&events), [1, 2]);
        file.add(&line(3), || [""; 3].into_iter());
        let (_, events) = EventFile::open(directory.path(), 3);
        assert_eq!(numbers(&events), [1, 2, 3]);
    }
}
