//! The log of claims: what the records mean together.
//!
//! Owns: the records and the state that they add up to. Must not know: files.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{RECLAIMED_KEPT, REFUSALS_KEPT};
use crate::model::command::Claim;
use crate::model::refusal::Holder;
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

/// A refusal, for those whom it concerns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Filed {
    /// Wall time in milliseconds.
    pub(crate) time: u64,
    /// The PID that was refused, as it was written.
    pub(crate) number: u32,
    pub(crate) errno: i32,
    /// What happened and what to do, with [`HOLDER`] where the holder is named.
    pub(crate) text: String,
    pub(crate) holder: Option<Holder>,
    /// The writer and some of its ancestors.
    pub(crate) concerned: Vec<TaskId>,
}

/// Stands for a holder whose name depends on the reader.
pub(crate) const HOLDER: &str = "\u{0}";

/// One thing that happened to a claim, or to a request of the kernel's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Record {
    /// Masks are about to be set for this claim.
    Intent(Arc<Claim>),
    /// The claim is a fact; it replaces any other of the task.
    Claimed(Arc<Claim>),
    /// The intent was undone.
    Abandoned { task: TaskId },
    /// The claim is over; the masks are about to be given back.
    Releasing { task: TaskId },
    /// They are back.
    Released { task: TaskId },
    /// The claim of a dead task has passed on.
    Inherited { from: TaskId, heir: Arc<Claim> },
    /// The task died, and its claim with it.
    Ended { task: TaskId, reclaimed: Option<Reclaimed> },
    /// A reclaimed claim, told again when the log is compacted.
    Kept(Reclaimed),
    /// How many reclaimed claims have had to make room.
    Dropped { count: u64 },
    /// Somebody has read of reclaimed claims up to this event.
    Acknowledged { seq: u64 },
    /// What follows belongs to this mount: requests and open files of another one mean nothing any more.
    Mounted { mount: u64 },
    /// The request has been decided by this hand: 0, or the error number. A hand answers the kernel before it
    /// takes the next request.
    Answered { request: u64, errno: i32, hand: u32 },
    /// A request has been refused; 0 where it was none of the kernel's.
    Refused { request: u64, hand: u32, filed: Arc<Filed> },
    /// A request that was in hand when a worker died is taken in hand again.
    Tried { request: u64 },
    /// The open file is polled under this handle of the kernel's.
    Polled { fh: u64, kh: u64 },
    /// No command is taken through the open file any more.
    Rest { fh: u64 },
    /// The open file, of which something was noted, is closed.
    Closed { fh: u64 },
    /// Numbers below these may have been given out. 0: says nothing.
    Reserved { events: u64, handles: u32 },
    /// All of it or nothing.
    Batch(Vec<Record>),
}

/// What the records add up to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Live {
    /// Each with the number of its record: where two claims contradict each other, the later one is right.
    pub(crate) claims: BTreeMap<TaskId, (u64, Arc<Claim>)>,
    pub(crate) intents: BTreeMap<TaskId, Arc<Claim>>,
    pub(crate) releasing: BTreeMap<TaskId, Arc<Claim>>,
    pub(crate) reclaimed: VecDeque<Reclaimed>,
    pub(crate) dropped: u64,
    pub(crate) events: u64,
    pub(crate) handles: u32,
    pub(crate) requests: Requests,
    /// The newest ones.
    pub(crate) refusals: VecDeque<Arc<Filed>>,
}

/// What is remembered of requests and open files, for as long as the mount lives.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Requests {
    mount: u64,
    /// The last one that each hand of this worker has decided: only of those the answer may not have reached
    /// the kernel.
    answered: BTreeMap<u32, (u64, i32)>,
    /// The same of earlier workers, the newest [`KEPT`]: what did not reach the kernel comes again before
    /// anything new does.
    answered_before: VecDeque<(u64, i32)>,
    /// In hand when a worker died, and taken in hand again since; the newest [`KEPT`].
    tried: VecDeque<u64>,
    /// By open file.
    pub(crate) polls: BTreeMap<u64, u64>,
    pub(crate) rests: BTreeSet<u64>,
}

/// How many requests of earlier workers are remembered: one dies with a few in its hands, and the next one
/// gets those before all others.
const KEPT: usize = 64;

fn shorten<T>(newest: &mut VecDeque<T>) {
    newest.drain(..newest.len().saturating_sub(KEPT));
}

impl Requests {
    /// The answer to a request that comes again.
    pub(crate) fn answer(&self, request: u64) -> Option<i32> {
        let mut all = self.answered.values().chain(self.answered_before.iter().rev());
        all.find(|(answered, _)| *answered == request).map(|(_, errno)| *errno)
    }

    /// Whether the request was in hand at two deaths.
    pub(crate) fn is_deadly(&self, request: u64) -> bool {
        self.tried.contains(&request)
    }

    /// Another worker begins, on the same mount.
    fn pass_on(&mut self) {
        self.answered_before.extend(std::mem::take(&mut self.answered).into_values());
        shorten(&mut self.answered_before);
    }

    /// The request that the configuration names was carried out, in case that was not recorded here.
    pub(crate) fn carried_out(&mut self, request: u64) {
        if self.answer(request).is_none() {
            self.answered_before.push_back((request, 0));
            shorten(&mut self.answered_before);
        }
    }

    fn records(&self) -> impl Iterator<Item = Record> + '_ {
        let answer = |hand: u32, (request, errno)| Record::Answered { request, errno, hand };
        let mounted = || std::iter::once(Record::Mounted { mount: self.mount });
        // As if each had been answered by a hand of its own.
        let before = (0..).zip(&self.answered_before).map(move |(hand, answered)| answer(hand, *answered));
        let answers = self.answered.iter().map(move |(hand, answered)| answer(*hand, *answered));
        mounted()
            .chain(before)
            .chain(mounted())
            .chain(answers)
            .chain(self.tried.iter().map(|&request| Record::Tried { request }))
            .chain(self.polls.iter().map(|(&fh, &kh)| Record::Polled { fh, kh }))
            .chain(self.rests.iter().map(|&fh| Record::Rest { fh }))
    }
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
                // Those dropped are older than all that are kept.
                if self.reclaimed.front().is_none_or(|oldest| oldest.seq <= seq) {
                    self.dropped = 0;
                }
                self.reclaimed.retain(|reclaimed| reclaimed.seq > seq);
            }
            Record::Mounted { mount } => {
                if mount == self.requests.mount {
                    self.requests.pass_on();
                } else {
                    self.requests = Requests { mount, ..Requests::default() };
                }
            }
            Record::Answered { request, errno, hand } => {
                self.requests.answered.insert(hand, (request, errno));
            }
            Record::Refused { request, hand, filed } => {
                if request != 0 {
                    self.requests.answered.insert(hand, (request, filed.errno));
                }
                self.refusals.push_back(filed);
                if self.refusals.len() > REFUSALS_KEPT {
                    self.refusals.pop_front();
                }
            }
            Record::Tried { request } => {
                self.requests.tried.push_back(request);
                shorten(&mut self.requests.tried);
            }
            Record::Polled { fh, kh } => {
                self.requests.polls.insert(fh, kh);
            }
            Record::Rest { fh } => {
                self.requests.rests.insert(fh);
            }
            Record::Closed { fh } => {
                self.requests.polls.remove(&fh);
                self.requests.rests.remove(&fh);
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
    pub(crate) fn records(&mut self) -> Vec<Record> {
        self.forget_repeated_refusals();
        let mut records = vec![Record::Reserved { events: self.events, handles: self.handles }];
        records.extend(self.requests.records());
        let told = |filed: &Arc<Filed>| Record::Refused { request: 0, hand: 0, filed: Arc::clone(filed) };
        records.extend(self.refusals.iter().map(told));
        records.extend(self.reclaimed.iter().cloned().map(Record::Kept));
        if self.dropped > 0 {
            records.push(Record::Dropped { count: self.dropped });
        }
        for (task, claim) in &self.releasing {
            let both = vec![Record::Claimed(claim.clone()), Record::Releasing { task: *task }];
            records.push(Record::Batch(both));
        }
        let mut claims: Vec<&(u64, Arc<Claim>)> = self.claims.values().collect();
        claims.sort_by_key(|(number, _)| *number);
        records.extend(claims.into_iter().map(|(_, claim)| Record::Claimed(claim.clone())));
        records.extend(self.intents.values().cloned().map(Record::Intent));
        records
    }

    /// Those that have been followed by one that concerns the same tasks say nothing any more.
    fn forget_repeated_refusals(&mut self) {
        let (mut seen, mut counting) = (BTreeSet::new(), VecDeque::new());
        for filed in self.refusals.iter().rev().filter(|filed| seen.insert(&filed.concerned)) {
            counting.push_front(Arc::clone(filed));
        }
        self.refusals = counting;
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
