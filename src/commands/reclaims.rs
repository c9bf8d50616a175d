//! The reclaims that a published ReconcileReport keeps.
//!
//! Owns: which of them have been told already, by the `seq` that was published last: the report that the server
//! has says it, so that neither a restart of ours, nor a person's `kcm reconcile`, nor a publication that
//! failed loses one or tells it twice. Must not know: how a report is sent.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context as _, Error};
use serde_json::{Value, json};

use super::publish::Publisher;
use crate::confdir::{self, ConfDir};
use crate::kubernetes::objects::reports;

/// How many are kept.
const KEPT: usize = 50;
/// How many are remembered while they cannot be published.
const REMEMBERED: usize = 4096;

/// What the server knows.
#[derive(Clone, Debug, Default)]
struct Told {
    seq: u64,
    count: u64,
    newest: Vec<Value>,
}

/// Publishes ReconcileReports.
pub(super) struct Reclaims {
    publisher: Publisher,
    told: Option<Told>,
    /// By `seq`: on a mount, what the server does not know yet.
    new: BTreeMap<u64, Value>,
    /// The same on a plain directory, which numbers nothing.
    unnumbered: Vec<Value>,
}

impl Reclaims {
    pub(super) fn new(publisher: Publisher) -> Self {
        Self { publisher, told: None, new: BTreeMap::new(), unnumbered: Vec::new() }
    }

    /// Publishes a report, and `reclaimed`: what it tells of, with times and, on a mount, numbers.
    ///
    /// # Errors
    /// The events cannot be read, or as for [`Publisher::publish`].
    pub(super) fn publish(
        &mut self,
        dir: &ConfDir,
        report: &Value,
        reclaimed: Vec<Value>,
    ) -> Result<(), Error> {
        for one in reclaimed {
            match number(&one) {
                Some(seq) => drop(self.new.insert(seq, one)),
                None => self.unnumbered.push(one),
            }
        }
        let latest = if dir.is_mounted() { self.follow(dir)? } else { None };
        let mut told = match &self.told {
            Some(told) => told.clone(),
            None => match self.publisher.stored()? {
                Some(object) => Told::from(object.as_ref()),
                None => return Ok(()),
            },
        };
        self.told = Some(told.clone());
        // Numbers only grow, but with a new state directory they begin again.
        if latest.is_some_and(|latest| latest < told.seq) {
            told.seq = 0;
        }
        let new = self.new.range(told.seq + 1..).map(|(_, one)| one).chain(&self.unnumbered);
        let new: Vec<Value> = new.cloned().collect();
        told.seq = self.new.keys().next_back().copied().unwrap_or(0).max(told.seq);
        told.count += new.len() as u64;
        told.newest.extend(new);
        told.newest.drain(..told.newest.len().saturating_sub(KEPT));
        let fields = reports::reconcile(report, &told.newest, told.count, told.seq);
        if self.publisher.publish(&fields)? {
            self.told = Some(told);
            self.new.clear();
            self.unnumbered.clear();
        }
        Ok(())
    }

    /// Takes what `info/events` tells of; gives the number of the last event of any kind.
    fn follow(&mut self, dir: &ConfDir) -> Result<Option<u64>, Error> {
        let file = dir.path().join("info/events");
        let text = fs::read_to_string(&file).map_err(|error| confdir::file_error(&file, error))?;
        let mut latest = None;
        for line in text.lines() {
            let event: Value =
                serde_json::from_str(line).with_context(|| format!("{}: {line:?}", file.display()))?;
            latest = number(&event).or(latest);
            if event.get("event").is_some_and(|kind| kind == "reclaimed")
                && let Some(seq) = latest
            {
                self.new.insert(seq, dated(&event));
            }
        }
        while self.new.len() > REMEMBERED {
            self.new.pop_first();
        }
        Ok(latest)
    }
}

impl Told {
    fn from(object: Option<&Value>) -> Self {
        let Some(object) = object else { return Self::default() };
        Self {
            seq: number(object).unwrap_or(0),
            count: object.pointer("/summary/reclaimed").and_then(Value::as_u64).unwrap_or(0),
            newest: object.get("reclaims").and_then(Value::as_array).cloned().unwrap_or_default(),
        }
    }
}

fn number(line: &Value) -> Option<u64> {
    line.get("seq").and_then(Value::as_u64)
}

/// A reclaim as it is published, from a line of `info/events` or `info/reclaimed`.
pub(super) fn dated(line: &Value) -> Value {
    let field = |name: &str| line.get(name).cloned().unwrap_or_default();
    json!({
        "seq": field("seq"), "time": field("time"), "cpus": field("cpus"), "pid": field("pid"), "pool": field("pool"),
    })
}
