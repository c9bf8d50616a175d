//! `kcm events`: prints the events of the mount, and follows them.
//!
//! Owns the form of a line for people, and that no event is printed twice. Does not know what an event means.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::AsFd as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Error, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::{Map, Value};

use super::common::output::print;
use crate::cli;
use crate::confdir::{self, ConfDir};

/// How often a directory whose daemon is away is tried again.
const AWAY_INTERVAL: Duration = Duration::from_millis(200);

/// Prints events until there are no more or, with `--follow`, until it is killed.
pub(super) fn run(args: &cli::Events) -> Result<ExitCode, Error> {
    let mut printer = Printer { since: args.since.unwrap_or(0), json: args.json };
    let mut dir = ConfDir::open(&args.dir.conf_dir)?;
    loop {
        if !dir.is_mounted() {
            bail!(
                "{}: a plain directory, which has no events; start a daemon: kcm mount",
                dir.path().display()
            );
        }
        let path = dir.path().join("info/events");
        let ended = File::open(&path).and_then(|file| printer.print_all(file, args.follow));
        match ended {
            Ok(Ended::Done) => return Ok(ExitCode::SUCCESS),
            Ok(Ended::Failed(error)) => return Err(error),
            // The file belongs to a daemon that has ended.
            Err(error) if args.follow && confdir::is_of_another_daemon(&error) => {}
            Err(error) => return Err(confdir::file_error(&path, error)),
        }
        log::info!("{}: the daemon has ended; waiting for the next one", dir.path().display());
        dir = loop {
            std::thread::sleep(AWAY_INTERVAL);
            match ConfDir::open(&args.dir.conf_dir) {
                Ok(dir) if dir.is_mounted() => break dir,
                _ => {}
            }
        };
    }
}

/// Why nothing more is printed.
enum Ended {
    Done,
    /// stdout cannot be written.
    Failed(Error),
}

/// Prints each event once.
struct Printer {
    /// The number of the last event that was printed.
    since: u64,
    json: bool,
}

impl Printer {
    fn print_all(&mut self, mut file: File, follow: bool) -> io::Result<Ended> {
        let mut unread = Vec::new();
        loop {
            file.read_to_end(&mut unread)?;
            let end = unread.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            let whole: Vec<u8> = unread.drain(..end).collect();
            if let Err(error) = print(&self.lines(&String::from_utf8_lossy(&whole))) {
                return Ok(Ended::Failed(error));
            }
            if !follow {
                return Ok(Ended::Done);
            }
            match poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLPRI)], PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Returns the new lines of the file, as they are printed.
    fn lines(&mut self, text: &str) -> String {
        let events: Vec<(&str, Map<String, Value>)> =
            text.lines().filter_map(|line| Some((line, serde_json::from_str(line).ok()?))).collect();
        let number = |event: &Map<String, Value>| event.get("seq").and_then(Value::as_u64);
        // A new state directory begins with small numbers.
        if events.iter().filter_map(|(_, event)| number(event)).max().is_some_and(|last| last < self.since) {
            self.since = 0;
        }
        let mut out = String::new();
        for (line, event) in events {
            match number(&event) {
                Some(seq) if seq <= self.since => continue,
                Some(seq) => self.since = seq,
                None if self.since > 0 => continue,
                None => {}
            }
            out += &if self.json { line.to_owned() } else { text_of(&event) };
            out.push('\n');
        }
        out
    }
}

/// Returns a text that is safe to print on a terminal.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// Returns an event as a line for people.
fn text_of(event: &Map<String, Value>) -> String {
    let text = |name: &str| match event.get(name) {
        Some(Value::String(text)) => Some(printable(text)),
        Some(Value::Null) | None => None,
        Some(other) => Some(other.to_string()),
    };
    if let Some(count) = text("dropped") {
        return format!("{count} older events had to make room");
    }
    let word = |name: &str| text(name).unwrap_or_default();
    let mut line = format!("{} {} {:<9}", word("time"), word("seq"), word("event"));
    let list = |pool: &str, cpus: &str| {
        text(pool).map(|pool| text(cpus).map_or(pool.clone(), |cpus| format!("{pool} {cpus}")))
    };
    line += &list("pool", "cpus").map_or_else(String::new, |list| format!(" {list}"));
    if let Some(pid) = text("pid") {
        line += &text("program").map_or(format!(" {pid}"), |program| format!(" {pid} ({program})"));
    }
    line += &text("uid").map_or_else(String::new, |uid| format!(" uid {uid}"));
    let from = list("from_pool", "from_cpus").or_else(|| text("from_pid"));
    line += &from.map_or_else(String::new, |from| format!(" from {from}"));
    match (text("errno"), text("reason")) {
        (Some(errno), Some(reason)) => line += &format!(": {errno}: {reason}"),
        (None, Some(reason)) => line += &format!(": {reason}"),
        (Some(errno), None) => line += &format!(": {errno}"),
        (None, None) => {}
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLAIMED: &str = r#"{"seq":7,"time":"2026-11-26T10:00:00.250Z","event":"claimed","pool":"dp","cpus":"2-3","pid":42,"program":"fw","uid":0}"#;
    const REFUSED: &str = r#"{"seq":8,"time":"2026-11-26T10:00:01.250Z","event":"refused","pool":"dp","pid":43,"program":"sh","uid":1000,"errno":"EBUSY","reason":"dp 0 is held (1), wait;\u001b[1m"}"#;

    #[test]
    fn an_event_is_one_line() {
        let mut printer = Printer { since: 0, json: false };
        let text = format!("{{\"dropped\":3}}\n{CLAIMED}\n{REFUSED}\n");
        let expected = "\
3 older events had to make room
2026-11-26T10:00:00.250Z 7 claimed   dp 2-3 42 (fw) uid 0
2026-11-26T10:00:01.250Z 8 refused   dp 43 (sh) uid 1000: EBUSY: dp 0 is held (1), wait;?[1m
";
        assert_eq!(printer.lines(&text), expected);
        assert_eq!(printer.lines(&text), "", "each once");
        let moved = r#"{"seq":9,"time":"t","event":"moved","pool":"dp","cpus":"4","pid":42,"uid":0,"from_pool":"dp","from_cpus":"2-3"}"#;
        assert_eq!(printer.lines(moved), "t 9 moved     dp 4 42 uid 0 from dp 2-3\n");
    }

    #[test]
    fn events_after_a_number_are_printed_as_they_are() {
        let mut printer = Printer { since: 7, json: true };
        let text = format!("{{\"dropped\":3}}\n{CLAIMED}\n{REFUSED}\n");
        assert_eq!(printer.lines(&text), format!("{REFUSED}\n"));
        assert_eq!(printer.lines(CLAIMED), format!("{CLAIMED}\n"), "the numbers begin again");
    }
}
