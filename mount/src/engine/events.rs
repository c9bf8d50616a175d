//! What happened: the events for `info/events`, and the claims taken back for `info/reclaimed`.
//!
//! Owns: the numbers (`seq`) of events, which never repeat, also over restarts. Must not know: what an
//! event means to anybody.

use std::collections::VecDeque;
use std::fmt::Write as _;

use serde::Serialize;

use crate::clock;
use crate::journal::{EVENTS_KEPT, RECLAIMED_KEPT, Reclaimed, StateDir};

/// One thing that happened. Fields that do not apply are left out of its line.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Event {
    pub(crate) event: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) pool: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cpus: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) pid: Option<u32>,
    /// The list that was left, or the dead task that was inherited from.
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

/// The newest events, and the reclaimed claims that nobody has acknowledged.
#[derive(Debug)]
pub(crate) struct Events {
    next: u64,
    lines: VecDeque<(u64, String)>,
    reclaimed: VecDeque<Reclaimed>,
    dropped: u64,
}

impl Events {
    /// Goes on with what an earlier daemon has shown. `next` is beyond all numbers that it may have given: a line
    /// that has another one is damaged.
    pub(crate) fn new(
        next: u64,
        lines: VecDeque<(u64, String)>,
        reclaimed: VecDeque<Reclaimed>,
        dropped: u64,
    ) -> Self {
        let lines = lines.into_iter().filter(|(seq, _)| *seq < next).collect();
        Self { next, lines, reclaimed, dropped }
    }

    /// The number that the next event gets.
    pub(crate) fn next(&self) -> u64 {
        self.next
    }

    /// Notes an event; gives its number. It is also given to `state` for the next daemon.
    pub(crate) fn push(&mut self, state: &StateDir, event: &Event) -> u64 {
        let seq = self.next;
        self.next += 1;
        let line = Line { seq, time: clock::rfc3339_ms(clock::wall_ms()), event };
        let text = serde_json::to_string(&line).unwrap_or_default();
        self.lines.push_back((seq, text.clone()));
        if self.lines.len() > EVENTS_KEPT {
            self.lines.pop_front();
        }
        state.note_event(&text);
        seq
    }

    pub(crate) fn reclaim(&mut self, reclaimed: Reclaimed) {
        self.reclaimed.push_back(reclaimed);
        if self.reclaimed.len() > RECLAIMED_KEPT {
            self.reclaimed.pop_front();
            self.dropped += 1;
        }
    }

    /// Forgets the reclaimed claims up to and with `seq`; the count of those dropped too, unless some of them
    /// may be newer.
    pub(crate) fn acknowledge(&mut self, seq: u64) {
        if self.reclaimed.front().is_none_or(|oldest| oldest.seq <= seq) {
            self.dropped = 0;
        }
        self.reclaimed.retain(|reclaimed| reclaimed.seq > seq);
    }

    /// JSON lines, the oldest first.
    pub(crate) fn show(&self) -> String {
        let mut text = String::with_capacity(self.lines.iter().map(|(_, line)| line.len() + 1).sum());
        for (_, line) in &self.lines {
            text.push_str(line);
            text.push('\n');
        }
        text
    }

    /// JSON lines, the oldest first; at the end a count of those that had to make room, if any.
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
