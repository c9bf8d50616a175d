//! The log of claims: what the records mean together.
//!
//! Owns: the records and the state that they add up to. Must not know: files.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use super::RECLAIMED_KEPT;
use crate::model::command::Claim;
use crate::model::task::TaskId;

/// A claim that was taken back from a task that was killed, or of which nobody can tell how it ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Reclaimed {
    /// The number of its event.
    pub(crate) seq: u64,
    /// Wall time in milliseconds.
    pub(crate) time: u64,
    pub(crate) pid: u32,
    pub(crate) pool: String,
    pub(crate) cpus: String,
}

/// One thing that happened to a claim.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Record {
    /// Masks are about to be set for this claim.
    Intent(Claim),
    /// The claim is a fact; it replaces any other of the task.
    Claimed(Claim),
    /// The intent was undone.
    Abandoned { task: TaskId },
    /// The claim is over; the masks are about to be given back.
    Releasing { task: TaskId },
    /// They are back.
    Released { task: TaskId },
    /// The claim of a dead task has passed on.
    Inherited { from: TaskId, heir: Claim },
    /// The task died, and its claim with it.
    Ended { task: TaskId, reclaimed: Option<Reclaimed> },
    /// A reclaimed claim, told again when the log is compacted.
    Kept(Reclaimed),
    /// How many reclaimed claims have had to make room.
    Dropped { count: u64 },
    /// Somebody has read of reclaimed claims up to this event.
    Acknowledged { seq: u64 },
    /// Numbers below these may have been given out. 0: says nothing.
    Reserved { events: u64, handles: u32 },
    /// All of it or nothing.
    Batch(Vec<Record>),
}

/// What the records add up to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Live {
    /// Each with the number of its record: where two claims contradict each other, the later one is right.
    pub(crate) claims: BTreeMap<TaskId, (u64, Claim)>,
    pub(crate) intents: BTreeMap<TaskId, Claim>,
    pub(crate) releasing: BTreeMap<TaskId, Claim>,
    pub(crate) reclaimed: VecDeque<Reclaimed>,
    pub(crate) dropped: u64,
    pub(crate) events: u64,
    pub(crate) handles: u32,
}

impl Live {
    /// Adds the record of this number.
    pub(crate) fn add(&mut self, number: u64, record: Record) {
        match record {
            Record::Intent(claim) => {
                self.intents.insert(claim.task, claim);
            }
            Record::Claimed(claim) => {
                self.forget(&claim.task);
                self.claims.insert(claim.task, (number, claim));
            }
            Record::Abandoned { task } => {
                self.intents.remove(&task);
            }
            Record::Releasing { task } => {
                if let Some((_, claim)) = self.claims.remove(&task) {
                    self.releasing.insert(task, claim);
                }
            }
            Record::Released { task } => self.forget(&task),
            Record::Inherited { from, heir } => {
                self.forget(&from);
                self.forget(&heir.task);
                self.claims.insert(heir.task, (number, heir));
            }
            Record::Ended { task, reclaimed } => {
                self.forget(&task);
                self.keep(reclaimed);
            }
            Record::Kept(reclaimed) => self.keep(Some(reclaimed)),
            Record::Dropped { count } => self.dropped = count,
            Record::Acknowledged { seq } => {
                self.reclaimed.retain(|reclaimed| reclaimed.seq > seq);
                self.dropped = 0;
            }
            Record::Reserved { events, handles } => {
                self.events = self.events.max(events);
                if handles != 0 {
                    self.handles = handles;
                }
            }
            Record::Batch(records) => records.into_iter().for_each(|record| self.add(number, record)),
        }
    }

    /// The records that say the same again, as short as can be.
    pub(crate) fn records(&self) -> Vec<Record> {
        let mut records = vec![Record::Reserved { events: self.events, handles: self.handles }];
        records.extend(self.reclaimed.iter().cloned().map(Record::Kept));
        if self.dropped > 0 {
            records.push(Record::Dropped { count: self.dropped });
        }
        for (task, claim) in &self.releasing {
            let both = vec![Record::Claimed(claim.clone()), Record::Releasing { task: *task }];
            records.push(Record::Batch(both));
        }
        let mut claims: Vec<&(u64, Claim)> = self.claims.values().collect();
        claims.sort_by_key(|(number, _)| *number);
        records.extend(claims.into_iter().map(|(_, claim)| Record::Claimed(claim.clone())));
        records.extend(self.intents.values().cloned().map(Record::Intent));
        records
    }

    fn forget(&mut self, task: &TaskId) {
        self.claims.remove(task);
        self.intents.remove(task);
        self.releasing.remove(task);
    }

    fn keep(&mut self, reclaimed: Option<Reclaimed>) {
        self.reclaimed.extend(reclaimed);
        if self.reclaimed.len() > RECLAIMED_KEPT {
            self.reclaimed.pop_front();
            self.dropped += 1;
        }
    }
}
