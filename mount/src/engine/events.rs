//! The events of `info/events`, and the reclaimed claims of `info/reclaimed`.
//!
//! Owns the numbers (`seq`) of events, which never repeat, not even over restarts. Does not know what an event
//! means, or how it is stored.

use std::collections::VecDeque;
use std::fmt::Write as _;

use serde::Serialize;

use crate::clock;
use crate::journal::{EVENTS_KEPT, RECLAIMED_KEPT, Reclaimed};

/// How many numbers of events are reserved in the journal at a time.
const RESERVED_EVENTS: u64 = 1 << 16;

/// An event. Fields that do not apply are left out of its line.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Event {
    pub(crate) event: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) pool: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cpus: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) pid: Option<u32>,
    /// The list before a move, or the dead task of an inherited claim.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) from: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) errno: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reason: Option<String>,
}

#[derive(Serialize)]
struct Line<'a> {
    seq: u64,
    time: String,
    #[serde(flatten)]
    event: &'a Event,
}

/// The newest events, and the reclaimed claims that are not acknowledged.
#[derive(Debug)]
pub(crate) struct Events {
    next: u64,
    /// The next worker uses numbers from here on.
    reserved: u64,
    lines: VecDeque<(u64, String)>,
    /// How many bytes of lines there were, with those that were dropped.
    end: u64,
    reclaimed: VecDeque<Reclaimed>,
    dropped: u64,
}

impl Events {
    /// Continues after an earlier daemon. `next` is greater than every number that it may have used: a line with a
    /// greater number is damaged.
    pub(crate) fn new(
        next: u64,
        lines: VecDeque<(u64, String)>,
        reclaimed: VecDeque<Reclaimed>,
        dropped: u64,
    ) -> Self {
        let lines: VecDeque<(u64, String)> = lines.into_iter().filter(|(seq, _)| *seq < next).collect();
        let end = lines.iter().map(|(_, line)| line.len() as u64 + 1).sum();
        Self { next, reserved: next + RESERVED_EVENTS, lines, end, reclaimed, dropped }
    }

    /// Returns the number that the next worker starts with.
    pub(crate) fn reserved(&self) -> u64 {
        self.reserved
    }

    /// Reserves more numbers if half of them are used, and returns the new [`Events::reserved`] to record. That is
    /// early enough for a record that is written some time later.
    pub(crate) fn reserve(&mut self) -> Option<u64> {
        if self.next + RESERVED_EVENTS / 2 < self.reserved {
            return None;
        }
        self.reserved += RESERVED_EVENTS;
        Some(self.reserved)
    }

    /// Adds an event. Returns its number and its line.
    pub(crate) fn push(&mut self, wall_ms: u64, event: &Event) -> (u64, &str) {
        let seq = self.next;
        self.next += 1;
        let line = Line { seq, time: clock::rfc3339_ms(wall_ms), event };
        let text = serde_json::to_string(&line).unwrap_or_default();
        if self.lines.len() == EVENTS_KEPT {
            self.lines.pop_front();
        }
        self.end += text.len() as u64 + 1;
        self.lines.push_back((seq, text));
        (seq, self.lines.back().map_or("", |(_, line)| line))
    }

    pub(crate) fn reclaim(&mut self, reclaimed: Reclaimed) {
        self.reclaimed.push_back(reclaimed);
        if self.reclaimed.len() > RECLAIMED_KEPT {
            self.reclaimed.pop_front();
            self.dropped += 1;
        }
    }

    /// Forgets the reclaimed claims up to `seq`, and the count of the dropped ones unless some of those may be
    /// newer.
    pub(crate) fn acknowledge(&mut self, seq: u64) {
        if self.reclaimed.front().is_none_or(|oldest| oldest.seq <= seq) {
            self.dropped = 0;
        }
        self.reclaimed.retain(|reclaimed| reclaimed.seq > seq);
    }

    /// Returns how many bytes of lines there were since the worker started, with those that were dropped. This only
    /// grows.
    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    /// Returns JSON lines, the oldest first.
    pub(crate) fn show(&self) -> String {
        let mut text = String::with_capacity(self.lines.iter().map(|(_, line)| line.len() + 1).sum());
        for (_, line) in &self.lines {
            text.push_str(line);
            text.push('\n');
        }
        text
    }

    /// Returns JSON lines, the oldest first, and at the end a count of the dropped ones, if any.
    pub(crate) fn show_reclaimed(&self) -> String {
        let mut text = String::new();
        for Reclaimed { seq, time, pid, pool, cpus, .. } in &self.reclaimed {
            let time = clock::rfc3339_ms(*time);
            let line =
                serde_json::json!({ "seq": seq, "time": time, "pid": pid, "pool": pool, "cpus": cpus });
            let _ = writeln!(text, "{line}");
        }
        if self.dropped > 0 {
            let _ = writeln!(text, "{}", serde_json::json!({ "dropped": self.dropped }));
        }
        text
    }

    pub(crate) fn reclaimed_count(&self) -> u64 {
        self.reclaimed.len() as u64 + self.dropped
    }
}
