//! The state that the records of the claims log add up to.
//!
//! Owns the meaning of the records together, and the shortest list of records with the same meaning. Does not know
//! files.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::sync::Arc;

use super::codec;
use super::format::{VERSION, v1};
pub(super) use super::records::Record;
use super::records::{Reclaimed, RefusalRecord, owner};
use super::{RECLAIMED_KEPT, REFUSALS_KEPT};
use crate::fair::FairRing;
use crate::model::command::Claim;
use crate::model::partition::Partition;
use crate::model::pool::ListId;
use crate::model::queue::Waiter;
use crate::model::task::TaskId;

/// The state of claims, requests and open files after all records.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct LogState {
    /// How many records were added.
    added: u64,
    /// Each with the number of its record: if two claims contradict each other, the later one is right.
    pub(crate) claims: BTreeMap<TaskId, (u64, Arc<Claim>)>,
    pub(crate) intents: BTreeMap<TaskId, Arc<Claim>>,
    pub(crate) releasing: BTreeMap<TaskId, Arc<Claim>>,
    pub(crate) partitions: BTreeMap<ListId, Partition>,
    pub(crate) reclaimed: FairRing<Reclaimed, RECLAIMED_KEPT>,
    pub(crate) dropped: u64,
    pub(crate) events: u64,
    pub(crate) handles: u32,
    pub(crate) requests: Requests,
    pub(crate) refusals: FairRing<Arc<RefusalRecord>, REFUSALS_KEPT>,
}

/// Requests and open files, remembered until the mount ends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Requests {
    mount: u64,
    /// The last request that each session thread of this worker decided, with its errno. Only the answers to these may
    /// not have reached the kernel.
    answered: BTreeMap<u32, (u64, i32)>,
    /// The same of earlier workers, the newest [`REQUESTS_KEPT`]. A request whose answer did not reach the kernel is
    /// resent before any new one.
    answered_before: VecDeque<(u64, i32)>,
    /// Requests that were in flight when a worker died and were carried out again, the newest [`REQUESTS_KEPT`].
    retried: VecDeque<u64>,
    /// The kernel's poll handle of each open file.
    pub(crate) polls: BTreeMap<u64, u64>,
    pub(crate) truncated: BTreeSet<u64>,
    /// The tasks that wait in turn, in their order.
    pub(crate) queued: Vec<Waiter>,
}

/// How many requests of earlier workers are remembered. A worker dies with a few in flight, and the next one gets those
/// before all others.
const REQUESTS_KEPT: usize = 64;

fn shorten<T>(newest: &mut VecDeque<T>) {
    newest.drain(..newest.len().saturating_sub(REQUESTS_KEPT));
}

impl Requests {
    /// Returns the errno with which a request was answered that is resent.
    pub(crate) fn answer(&self, request: u64) -> Option<i32> {
        let mut all = self.answered.values().chain(self.answered_before.iter().rev());
        all.find(|(answered, _)| *answered == request).map(|(_, errno)| *errno)
    }

    /// Returns how often the request was carried out again after a worker died.
    pub(crate) fn retries(&self, request: u64) -> usize {
        self.retried.iter().filter(|retried| **retried == request).count()
    }

    /// Returns the id of the mount.
    pub(crate) fn mount(&self) -> u64 {
        self.mount
    }

    /// Returns how many requests were carried out again.
    pub(crate) fn retried(&self) -> usize {
        self.retried.len()
    }

    /// Another worker begins on the same mount.
    fn pass_on(&mut self) {
        self.answered_before.extend(std::mem::take(&mut self.answered).into_values());
        shorten(&mut self.answered_before);
    }

    /// Marks the request that the configuration names as carried out, in case its record was lost.
    pub(crate) fn carried_out(&mut self, request: u64) {
        if self.answer(request).is_none() {
            self.answered_before.push_back((request, 0));
            shorten(&mut self.answered_before);
        }
    }

    fn records(&self) -> impl Iterator<Item = Record> + '_ {
        let answer =
            |session_thread: u32, (request, errno)| Record::Answered { request, errno, session_thread };
        let mounted = || std::iter::once(Record::Mounted { mount: self.mount });
        // As if each had been answered by a different session thread.
        let before = (0..)
            .zip(&self.answered_before)
            .map(move |(session_thread, answered)| answer(session_thread, *answered));
        let answers =
            self.answered.iter().map(move |(session_thread, answered)| answer(*session_thread, *answered));
        mounted()
            .chain(before)
            .chain(mounted())
            .chain(answers)
            .chain(self.retried.iter().map(|&request| Record::Retried { request }))
            .chain(self.polls.iter().map(|(&fh, &kh)| Record::Polled { fh, kh }))
            .chain(self.queued.iter().map(|&waiter| Record::Queued(waiter)))
            .chain(self.truncated.iter().map(|&fh| Record::Truncated { fh }))
    }
}

impl LogState {
    /// Returns how many records were added.
    pub(super) fn added(&self) -> u64 {
        self.added
    }

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
            Record::RetainedReclaim(reclaimed) => self.keep(Some(reclaimed)),
            Record::Dropped { count } => self.dropped = count,
            Record::Acknowledged { seq } => {
                if self.reclaimed.oldest().is_none_or(|oldest| oldest.seq <= seq) {
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
            Record::Answered { request, errno, session_thread } => {
                self.requests.answered.insert(session_thread, (request, errno));
            }
            Record::Refused { request, session_thread, refusal } => {
                if request != 0 {
                    self.requests.answered.insert(session_thread, (request, refusal.errno));
                }
                self.refusals.push(owner(refusal.uid), refusal);
            }
            Record::Succeeded { tasks } => self.forget_refusals(&tasks),
            Record::Retried { request } => {
                self.requests.retried.push_back(request);
                shorten(&mut self.requests.retried);
            }
            Record::Polled { fh, kh } => {
                self.requests.polls.insert(fh, kh);
            }
            Record::Queued(waiter) => {
                self.requests.queued.retain(|it| it.fh != waiter.fh);
                self.requests.queued.push(waiter);
            }
            Record::Truncated { fh } => {
                self.requests.truncated.insert(fh);
            }
            Record::Closed { fh } => {
                self.requests.polls.remove(&fh);
                self.requests.queued.retain(|it| it.fh != fh);
                self.requests.truncated.remove(&fh);
            }
            Record::Reserved { events, handles } => {
                self.events = self.events.max(events);
                if handles != 0 {
                    self.handles = handles;
                }
            }
            Record::Partition(partition) => {
                self.partitions.insert(partition.list, partition);
            }
            Record::Unpartitioned { list } => {
                self.partitions.remove(&list);
            }
            Record::Batch(records) => records.into_iter().for_each(|record| self.apply(number, record)),
        }
    }

    /// Forgets the claims and partitions, which end with the boot.
    pub(super) fn end_of_boot(&mut self) {
        self.claims.clear();
        self.intents.clear();
        self.releasing.clear();
        self.partitions.clear();
    }

    /// Returns the log as a file has it, and the number of the record that would follow. `boot` is the id of this boot.
    ///
    /// # Errors
    /// A record is no JSON.
    pub(super) fn encode(self, boot: &str) -> io::Result<(Vec<u8>, u64)> {
        let header = v1::ClaimsHeader { kcm: "claims".into(), version: VERSION, boot: boot.to_owned() };
        let mut bytes = codec::encode("", &header)?;
        let records = self.into_records();
        for (n, r) in (0..).zip(&records) {
            bytes.extend(codec::encode(boot, &v1::ClaimsLine { n, r: r.into() })?);
        }
        Ok((bytes, records.len() as u64))
    }

    /// Returns the shortest list of records with the same meaning.
    pub(crate) fn into_records(mut self) -> Vec<Record> {
        self.forget_repeated_refusals();
        let mut records = vec![Record::Reserved { events: self.events, handles: self.handles }];
        records.extend(self.requests.records());
        let retained = |refusal: &Arc<RefusalRecord>| Record::Refused {
            request: 0,
            session_thread: 0,
            refusal: Arc::clone(refusal),
        };
        records.extend(self.refusals.iter().map(retained));
        records.extend(self.reclaimed.iter().cloned().map(Record::RetainedReclaim));
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
        records.extend(self.partitions.into_values().map(Record::Partition));
        records
    }

    /// Drops each refusal that was followed by another one with the same subjects: only the last one is shown.
    fn forget_repeated_refusals(&mut self) {
        let (mut seen, mut latest) = (BTreeSet::new(), Vec::new());
        for refusal in self.refusals.iter().rev().filter(|refusal| seen.insert(&refusal.subjects)) {
            latest.push(Arc::clone(refusal));
        }
        self.refusals = FairRing::default();
        for refusal in latest.into_iter().rev() {
            self.refusals.push(owner(refusal.uid), refusal);
        }
    }

    /// The tasks are no subjects of the refusals before this.
    fn forget_refusals(&mut self, tasks: &[TaskId]) {
        let is_forgotten = |task: &TaskId| tasks.contains(task);
        for refusal in self.refusals.iter_mut().filter(|it| it.subjects.iter().any(is_forgotten)) {
            Arc::make_mut(refusal).subjects.retain(|task| !tasks.contains(task));
        }
        self.refusals.retain(|refusal| !refusal.subjects.is_empty());
    }

    fn forget(&mut self, task: &TaskId) {
        self.claims.remove(task);
        self.intents.remove(task);
        self.releasing.remove(task);
    }

    fn keep(&mut self, reclaimed: Option<Reclaimed>) {
        let Some(reclaimed) = reclaimed else { return };
        if self.reclaimed.push(owner(reclaimed.uid), reclaimed).is_some() {
            self.dropped += 1;
        }
    }
}
