//! The events of `info/events`, and the reclaimed claims of `info/reclaimed`.
//!
//! Owns the numbers (`seq`) of events, which never repeat, not even over restarts, and the share that each user has of
//! what is kept. Does not know what an event means, or how it is stored.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::sync::Arc;

use serde::Serialize;

use crate::clock;
use crate::fair::FairRing;
use crate::journal::{EVENTS_KEPT, EventLine, RECLAIMED_KEPT, Reclaimed, owner};

/// How many numbers of events are reserved in the journal at a time.
const RESERVED_EVENTS: u64 = 1 << 16;

/// The node of `info/events`.
pub(crate) const EVENTS_NODE: u64 = 11;

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
    /// The name of the process's program.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) program: Option<String>,
    /// The user of the claim or of the intruder, or the user who was refused. The event counts as this user's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) uid: Option<u32>,
    /// The list before a move.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) from_pool: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) from_cpus: Option<String>,
    /// The dead task of an inherited claim.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) from_pid: Option<u32>,
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
    lines: FairRing<Placed, EVENTS_KEPT>,
    /// How many bytes of lines there were, with those that were dropped.
    end: u64,
    reclaimed: FairRing<Reclaimed, RECLAIMED_KEPT>,
    /// How many reclaimed claims were dropped since the last acknowledgement.
    reclaimed_dropped: u64,
}

/// The line of an event, and its place in a file in which no line was ever dropped.
#[derive(Debug)]
struct Placed {
    start: u64,
    line: Arc<str>,
}

impl Events {
    /// Continues after an earlier daemon. `next` is greater than every number that it may have used: a line with a
    /// greater number is damaged.
    pub(crate) fn new(
        next: u64,
        lines: Vec<EventLine>,
        reclaimed: VecDeque<Reclaimed>,
        reclaimed_dropped: u64,
    ) -> Self {
        let mut events = Self {
            next,
            reserved: next + RESERVED_EVENTS,
            lines: FairRing::default(),
            end: 0,
            reclaimed: FairRing::default(),
            reclaimed_dropped,
        };
        for EventLine { uid, line, .. } in lines.into_iter().filter(|event| event.seq < next) {
            events.add(uid, line);
        }
        reclaimed.into_iter().for_each(|reclaimed| events.reclaim(reclaimed));
        events
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

    /// Adds an event.
    pub(crate) fn push(&mut self, wall_ms: u64, event: &Event) -> EventLine {
        let seq = self.next;
        self.next += 1;
        let line = Line { seq, time: clock::rfc3339(wall_ms), event };
        let line: Arc<str> = serde_json::to_string(&line).unwrap_or_default().into();
        let uid = owner(event.uid);
        self.add(uid, Arc::clone(&line));
        EventLine { seq, uid, line }
    }

    fn add(&mut self, uid: u32, line: Arc<str>) {
        let start = self.end;
        self.end += line.len() as u64 + 1;
        self.lines.push(uid, Placed { start, line });
    }

    pub(crate) fn reclaim(&mut self, reclaimed: Reclaimed) {
        if self.reclaimed.push(owner(reclaimed.uid), reclaimed).is_some() {
            self.reclaimed_dropped += 1;
        }
    }

    /// Forgets the reclaimed claims up to `seq`, and the count of the dropped ones unless some of those may be
    /// newer.
    pub(crate) fn acknowledge(&mut self, seq: u64) {
        if self.reclaimed.oldest().is_none_or(|oldest| oldest.seq <= seq) {
            self.reclaimed_dropped = 0;
        }
        self.reclaimed.retain(|reclaimed| reclaimed.seq > seq);
    }

    /// Returns how many bytes of lines there were since the worker started, with those that were dropped. This only
    /// grows.
    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    /// Returns JSON lines, the oldest first. If some were dropped, the first line counts them.
    pub(crate) fn show(&self) -> String {
        let mut text =
            String::with_capacity(self.lines.iter().map(|it| it.line.len() + 1).sum::<usize>() + 32);
        if self.lines.dropped() > 0 {
            let _ = writeln!(text, "{}", serde_json::json!({ "dropped": self.lines.dropped() }));
        }
        self.append(&mut text, 0);
        text
    }

    /// Returns the lines that were added since [`Events::end`] was `end`, without those that were dropped.
    pub(crate) fn show_since(&self, end: u64) -> String {
        let mut text = String::new();
        self.append(&mut text, end);
        text
    }

    fn append(&self, text: &mut String, from: u64) {
        for Placed { line, .. } in self.lines.iter().filter(|it| it.start >= from) {
            text.push_str(line);
            text.push('\n');
        }
    }

    /// Returns how many events were dropped since the worker started.
    pub(crate) fn dropped(&self) -> u64 {
        self.lines.dropped()
    }

    /// Returns how many reclaimed claims were dropped since the worker started.
    pub(crate) fn reclaims_dropped(&self) -> u64 {
        self.reclaimed.dropped()
    }

    /// Returns JSON lines, the oldest first, and at the end a count of the dropped ones, if any.
    pub(crate) fn show_reclaimed(&self) -> String {
        let mut text = String::new();
        for Reclaimed { seq, time, pid, pool, cpus, uid } in self.reclaimed.iter() {
            let time = clock::rfc3339(*time);
            let mut line =
                serde_json::json!({ "seq": seq, "time": time, "pid": pid, "pool": pool, "cpus": cpus });
            if let (Some(uid), Some(fields)) = (uid, line.as_object_mut()) {
                fields.insert("uid".into(), (*uid).into());
            }
            let _ = writeln!(text, "{line}");
        }
        if self.reclaimed_dropped > 0 {
            let _ = writeln!(text, "{}", serde_json::json!({ "dropped": self.reclaimed_dropped }));
        }
        text
    }

    pub(crate) fn reclaimed_count(&self) -> u64 {
        self.reclaimed.len() as u64 + self.reclaimed_dropped
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOISY: u32 = 1000;

    fn event(uid: u32) -> Event {
        Event { event: "claimed", uid: Some(uid), ..Event::default() }
    }

    fn events() -> Events {
        Events::new(1, Vec::new(), VecDeque::new(), 0)
    }

    /// The values of a field, line by line.
    fn field(text: &str, name: &str) -> Vec<u64> {
        let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        lines.filter_map(|line| line[name].as_u64()).collect()
    }

    #[test]
    fn a_user_with_many_events_pushes_out_only_its_own() {
        let mut events = events();
        let others: Vec<u64> = [0, 7, 0].map(|uid| events.push(0, &event(uid)).seq).into();
        for _ in 0..3 * EVENTS_KEPT {
            events.push(0, &event(NOISY));
        }
        let text = events.show();
        let seqs = field(&text, "seq");
        assert!(seqs.len() == EVENTS_KEPT && seqs.starts_with(&others), "{seqs:?}");
        assert_eq!(seqs.last(), Some(&(3 + 3 * EVENTS_KEPT as u64)));
        let dropped = 2 * EVENTS_KEPT as u64 + 3;
        assert_eq!((field(&text, "dropped"), events.dropped()), (vec![dropped], dropped));
        assert!(text.starts_with("{\"dropped\":"), "the count is the first line");
        assert!(events.end() >= text.len() as u64);
    }

    #[test]
    fn a_follower_reads_each_kept_event_once_though_others_were_dropped_before_it() {
        let mut events = events();
        for _ in 0..EVENTS_KEPT / 2 {
            events.push(0, &event(NOISY));
            events.push(0, &event(7));
        }
        for round in 1..=3 {
            let end = events.end();
            let expected: Vec<u64> = (0..10 * round).map(|_| events.push(0, &event(NOISY)).seq).collect();
            assert_eq!(field(&events.show_since(end), "seq"), expected);
        }
        let end = events.end();
        for _ in 0..2 * EVENTS_KEPT {
            events.push(0, &event(NOISY));
        }
        let seqs = field(&events.show_since(end), "seq");
        assert!(seqs.windows(2).all(|pair| pair[0] + 1 == pair[1]), "the newest ones, in their order");
        assert_eq!(seqs.last(), field(&events.show(), "seq").last());
    }

    #[test]
    fn a_user_whose_tasks_are_killed_pushes_out_only_its_own_reclaims() {
        let mut events = events();
        let reclaimed = |seq: u64, uid| Reclaimed {
            seq,
            time: 0,
            pid: 1,
            pool: "p".into(),
            cpus: "0".into(),
            uid: Some(uid),
        };
        events.reclaim(reclaimed(1, 0));
        events.reclaim(reclaimed(2, 7));
        (3..=1_102).for_each(|seq| events.reclaim(reclaimed(seq, NOISY)));
        let text = events.show_reclaimed();
        let seqs = field(&text, "seq");
        assert!(seqs.len() == RECLAIMED_KEPT && seqs.starts_with(&[1, 2]), "{seqs:?}");
        assert_eq!((field(&text, "dropped"), events.reclaims_dropped()), (vec![78], 78));
        assert_eq!(&field(&text, "uid")[..3], [0, 7, NOISY.into()]);
        assert_eq!(events.reclaimed_count(), 1_102);
        events.acknowledge(1_102);
        assert_eq!((events.show_reclaimed().as_str(), events.reclaimed_count()), ("", 0));
    }
}
