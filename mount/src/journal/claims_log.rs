//! The state that the records of the claims log add up to.
//!
//! Owns the meaning of the records together, and the shortest list of records with the same meaning. Does not know
//! files.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

pub(super) use super::records::Record;
use super::records::{Filed, Reclaimed};
use super::{RECLAIMED_KEPT, REFUSALS_KEPT};
use crate::model::command::Claim;
use crate::model::task::TaskId;

/// What the records add up to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct LogState {
    /// How many records were added.
    added: u64,
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

impl LogState {
    /// Adds a record that comes after all others.
    pub(crate) fn add(&mut self, record: Record) {
        self.added += 1;
        self.apply(self.added, record);
    }

    fn apply(&mut self, number: u64, record: Record) {
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
            Record::Batch(records) => records.into_iter().for_each(|record| self.apply(number, record)),
        }
    }

    /// Forgets the claims, which end with the boot.
    pub(super) fn end_of_boot(&mut self) {
        self.claims.clear();
        self.intents.clear();
        self.releasing.clear();
    }

    /// The records that say the same again, as short as can be.
    pub(crate) fn into_records(mut self) -> Vec<Record> {
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
