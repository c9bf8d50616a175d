//! Intruders: processes that are pinned within an exclusive list that nobody holds.
//!
//! Owns which of them are known, so that each is reported once while it stays. Does not know when processes are looked
//! for.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::events::Event;
use super::ports::{Masks as _, Ports, Processes as _};
use super::{Engine, list_event_of};
use crate::metrics::Counter;
use crate::model::command::{Command, Request, Target};
use crate::model::cpuset::CpuSet;
use crate::model::pool::ListId;
use crate::model::task::{Pid, TaskId};

/// How many intruders of a list are known and reported. A user who pins thousands of processes does not push out the
/// other events.
const KNOWN: usize = 8;

/// A thread whose mask lies within a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pinned {
    pub(super) task: TaskId,
    pub(super) tid: u32,
    /// The real uid of the process.
    pub(super) uid: u32,
    pub(super) mask: CpuSet,
}

impl Pinned {
    pub(super) fn is_on(&self, cpus: &CpuSet) -> bool {
        self.mask.is_subset(cpus)
    }
}

/// The known intruders.
#[derive(Debug, Default)]
pub(super) struct Intruders {
    /// Whether there are any.
    any: AtomicBool,
    known: Mutex<HashMap<ListId, Vec<Pinned>>>,
}

impl<P: Ports> Engine<P> {
    /// Notes the processes that are pinned within a list that comes free. Adds an event for each that was not known.
    pub(super) fn note_pinned(&self, list: ListId, mut pinned: Vec<Pinned>) {
        let mut known = self.intruders.known.lock();
        let before = known.remove(&list).unwrap_or_default();
        let is_in = |all: &[Pinned], it: &Pinned| all.iter().any(|other| other.task == it.task);
        // Those that were known stay known, so that others are not reported in turns.
        pinned.sort_by_key(|it| !is_in(&before, it));
        pinned.dedup_by_key(|it| it.task);
        pinned.truncate(KNOWN);
        let new: Vec<Pinned> = pinned.iter().filter(|it| !is_in(&before, it)).cloned().collect();
        let present = !pinned.is_empty();
        if present {
            known.insert(list, pinned);
        }
        self.intruders.any.store(!known.is_empty(), Ordering::Release);
        drop(known);
        let program = |it: &Pinned| self.processes.comm(&self.reopen(it.task)?);
        let programs: Vec<Option<String>> = new.iter().map(program).collect();
        let mut claims = self.claims.lock();
        let _ = claims.apply(Command::NoteIntruders { list, present });
        for (Pinned { task, uid, .. }, program) in new.into_iter().zip(programs) {
            self.metrics.count(Counter::Intruders);
            let event = list_event_of("intruder", &claims, list);
            self.event(Event { pid: Some(task.pid.get()), uid: Some(uid), program, ..event });
        }
    }

    /// Forgets the intruders that have left the lists of a write, or are about to claim them.
    pub(super) fn check_intruders(&self, request: &Request) {
        if !self.intruders.any.load(Ordering::Acquire) {
            return;
        }
        let lists: Vec<(ListId, CpuSet)> = {
            let claims = self.claims.lock();
            let ids: Vec<ListId> = match request.target {
                Target::List(list) => vec![list],
                Target::Pool(pool) => claims.pool(pool).into_iter().flat_map(|pool| pool.lists()).collect(),
            };
            let known = ids.into_iter().filter_map(|id| Some((id, claims.list(id)?)));
            let known = known.filter(|(_, list)| list.has_intruders() && list.is_free());
            known.map(|(id, list)| (id, list.cpus().clone())).collect()
        };
        for (list, cpus) in lists {
            let mut pinned = self.intruders.known.lock().get(&list).cloned().unwrap_or_default();
            pinned.retain(|it| {
                self.is_still_there(it, &cpus) && !request.claim.iter().any(|info| info.task == it.task)
            });
            self.note_pinned(list, pinned);
        }
    }

    /// Returns how many of the known intruders are still there, and have not claimed in the meantime.
    pub(super) fn count_intruders(&self) -> usize {
        if !self.intruders.any.load(Ordering::Acquire) {
            return 0;
        }
        let known = self.intruders.known.lock().clone();
        let on_lists: Vec<(Pinned, CpuSet)> = {
            let claims = self.claims.lock();
            let of_list = |(id, pinned): (ListId, Vec<Pinned>)| {
                let cpus = claims.list(id)?.cpus().clone();
                Some(pinned.into_iter().map(move |it| (it, cpus.clone())))
            };
            let all = known.into_iter().filter_map(of_list).flatten();
            all.filter(|(it, _)| claims.claim(&it.task).is_none()).collect()
        };
        on_lists.iter().filter(|(it, cpus)| self.is_still_there(it, cpus)).count()
    }

    fn is_still_there(&self, it: &Pinned, cpus: &CpuSet) -> bool {
        // A task that has died keeps its mask until it is collected.
        let is_alive = self.reopen(it.task).is_some();
        let mask = Pid::new(it.tid).and_then(|tid| self.processes.leader_mask(tid).ok());
        is_alive && mask.is_some_and(|mask| !mask.is_empty() && mask.is_subset(cpus))
    }
}
