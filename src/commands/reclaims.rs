//! The reclaims in a published ReconcileReport.
//!
//! Owns which reclaims are published already. The published report itself says so, by the number (`seq`) of the last
//! event that it contains. So no reclaim is lost or published twice, whether kcm restarts, a person runs `kcm
//! reconcile`, or a publication fails. Does not know how a report is sent.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context as _, Error};
use serde_json::Value;

use super::publish::Publisher;
use crate::confdir::{self, ConfDir};
use crate::kubernetes::objects::reports::{PublishedState, Reclaim, ReconcileReport};

/// How many reclaims a report has.
const IN_REPORT: usize = 50;
/// How many reclaims are remembered while they cannot be published.
const REMEMBERED: usize = 4096;

/// Publishes ReconcileReports.
pub(super) struct Reclaims {
    publisher: Publisher<ReconcileReport>,
    /// The state on the server; `None` before it was read.
    published: Option<PublishedState>,
    pending: Pending,
}

impl Reclaims {
    pub(super) fn new(publisher: Publisher<ReconcileReport>) -> Self {
        Self { publisher, published: None, pending: Pending::default() }
    }

    /// Publishes a report. `report`: as it was printed; `reclaimed`: the reclaims in it.
    ///
    /// # Errors
    /// The events cannot be read, or as for [`Publisher::publish`].
    pub(super) fn publish(
        &mut self,
        dir: &ConfDir,
        report: &Value,
        reclaimed: Vec<Reclaim>,
    ) -> Result<(), Error> {
        reclaimed.into_iter().for_each(|reclaim| self.pending.add(reclaim));
        let last_event = if dir.is_mounted() { self.read_events(dir)? } else { None };
        let published = match self.published.take() {
            Some(published) => published,
            None => match self.publisher.fetch()? {
                Some(published) => published,
                None => return Ok(()),
            },
        };
        let state = self.pending.added_to(&published, last_event);
        self.published = Some(published);
        if self.publisher.publish(&ReconcileReport::new(report, state.clone())?)? {
            self.published = Some(state);
            self.pending = Pending::default();
        }
        Ok(())
    }

    /// Reads `info/events`; see [`Pending::add_event`].
    fn read_events(&mut self, dir: &ConfDir) -> Result<Option<i64>, Error> {
        let file = dir.path().join("info/events");
        let text = fs::read_to_string(&file).map_err(|error| confdir::file_error(&file, error))?;
        let mut last = None;
        for line in text.lines() {
            let seq = self.pending.add_event(line);
            last = seq.with_context(|| format!("{}: {line:?}", file.display()))?.or(last);
        }
        Ok(last)
    }
}

/// Reclaims that the server may not have yet.
#[derive(Default)]
struct Pending {
    by_seq: BTreeMap<i64, Reclaim>,
    /// Reclaims of a plain directory, which has no events.
    without_seq: Vec<Reclaim>,
}

impl Pending {
    fn add(&mut self, reclaim: Reclaim) {
        match reclaim.seq {
            Some(seq) => drop(self.by_seq.insert(seq, reclaim)),
            None => self.without_seq.push(reclaim),
        }
        while self.by_seq.len() > REMEMBERED {
            self.by_seq.pop_first();
        }
    }

    /// Adds the reclaim in a line of `info/events`, if it is one. Returns the number of the event.
    fn add_event(&mut self, line: &str) -> Result<Option<i64>, serde_json::Error> {
        let event: Value = serde_json::from_str(line)?;
        let seq = event.get("seq").and_then(Value::as_i64);
        if seq.is_some() && event.get("event").is_some_and(|kind| kind == "reclaimed") {
            self.add(serde_json::from_value(event)?);
        }
        Ok(seq)
    }

    /// Returns the published state with the reclaims that it does not have yet. `last_event`: the number of the last
    /// event of any kind.
    fn added_to(&self, published: &PublishedState, last_event: Option<i64>) -> PublishedState {
        let mut state = published.clone();
        // Numbers only grow, but a new state directory begins with small ones.
        if last_event.is_some_and(|last| last < state.seq) {
            state.seq = 0;
        }
        let new = self.by_seq.range(state.seq.saturating_add(1)..).map(|(_, reclaim)| reclaim);
        let new: Vec<Reclaim> = new.chain(&self.without_seq).cloned().collect();
        state.seq = self.by_seq.keys().next_back().copied().unwrap_or(0).max(state.seq);
        let count = i64::try_from(new.len()).unwrap_or(i64::MAX);
        state.summary.reclaimed = state.summary.reclaimed.saturating_add(count);
        state.reclaims.extend(new);
        state.reclaims.drain(..state.reclaims.len().saturating_sub(IN_REPORT));
        state
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(seq: i64, event: &str) -> String {
        json!({ "seq": seq, "time": "t", "event": event, "cpus": "0", "pid": seq, "pool": "p" }).to_string()
    }

    fn reclaim(seq: Option<i64>) -> Reclaim {
        Reclaim { seq, time: "t".into(), cpus: "0".into(), pid: 1, pool: "p".into() }
    }

    fn numbers(state: &PublishedState) -> Vec<i64> {
        state.reclaims.iter().filter_map(|reclaim| reclaim.seq).collect()
    }

    #[test]
    fn only_reclaims_are_taken_from_the_events() {
        let mut pending = Pending::default();
        assert_eq!(pending.add_event(&event(3, "claimed")).unwrap(), Some(3));
        assert_eq!(pending.add_event(&event(4, "reclaimed")).unwrap(), Some(4));
        assert_eq!(pending.add_event(r#"{"dropped":7}"#).unwrap(), None);
        assert!(pending.add_event("{").is_err());
        let state = pending.added_to(&PublishedState::default(), Some(4));
        assert_eq!((numbers(&state), state.seq, state.summary.reclaimed), (vec![4], 4, 1));
    }

    #[test]
    fn no_reclaim_is_published_twice() {
        let mut pending = Pending::default();
        (1..=5).for_each(|seq| pending.add(reclaim(Some(seq))));
        // Events are read again at each run, and `info/reclaimed` has the same reclaims.
        pending.add(reclaim(Some(5)));
        let published = PublishedState { seq: 3, reclaims: vec![reclaim(Some(3))], ..Default::default() };
        let state = pending.added_to(&published, Some(5));
        assert_eq!((numbers(&state), state.summary.reclaimed), (vec![3, 4, 5], 2));
        assert_eq!(pending.added_to(&state, Some(5)), state);
    }

    #[test]
    fn a_new_state_directory_starts_to_count_again() {
        let mut pending = Pending::default();
        pending.add(reclaim(Some(2)));
        let published = PublishedState { seq: 900, ..Default::default() };
        let state = pending.added_to(&published, Some(2));
        assert_eq!((numbers(&state), state.seq), (vec![2], 2));
    }

    #[test]
    fn a_report_has_the_newest_reclaims() {
        let mut pending = Pending::default();
        (1..=60).for_each(|seq| pending.add(reclaim(Some(seq))));
        pending.add(reclaim(None));
        let state = pending.added_to(&PublishedState::default(), None);
        assert_eq!((state.reclaims.len(), state.summary.reclaimed, state.seq), (IN_REPORT, 61, 60));
        assert_eq!(state.reclaims.last(), Some(&reclaim(None)));
        assert_eq!(numbers(&state).first(), Some(&12));
    }

    #[test]
    fn the_oldest_are_forgotten_while_nothing_can_be_published() {
        let mut pending = Pending::default();
        let all = i64::try_from(REMEMBERED).unwrap() + 10;
        (1..=all).for_each(|seq| pending.add(reclaim(Some(seq))));
        assert_eq!((pending.by_seq.len(), pending.by_seq.keys().next()), (REMEMBERED, Some(&11)));
    }
}
