//! Reaping: removing the claims of dead tasks, whenever somebody could see them.
//!
//! Owns how a death is noticed and carried out. Does not decide who inherits or how an ending is called: the
//! model does. Does not know how heirs are found: `search` does.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::MutexGuard;

use super::ports::{Clock as _, Journal as _, Ports, Process as _, Processes as _, Watch as _};
use super::search::{BRIEF, Concern, DeadClaim, LIMIT};
use super::{Engine, ProcessOf};
use crate::journal::{Reclaimed, Record};
use crate::model::claims::Claims;
use crate::model::command::{Change, Claim, Command, Ending, Heir, Request, Target};
use crate::model::pool::PoolId;
use crate::model::task::TaskId;

impl<P: Ports> Engine<P> {
    /// Notices deaths, and ends or passes on the claims of dead tasks as far as that is quick. Costs one system call if
    /// there are none.
    pub(crate) fn reap(&self) {
        self.reap_for(Concern::Everything, Duration::ZERO);
    }

    /// Notices deaths. Ends or passes on the claims of the dead tasks that this caller could see, but waits for that no
    /// longer than `limit`; until then they hold their lists.
    pub(super) fn reap_for(&self, concern: Concern<'_>, limit: Duration) {
        self.notice_deaths();
        self.await_search(concern, limit);
    }

    /// Reaps for a reader who could see all dead tasks, but depends on none of them.
    pub(super) fn reap_briefly(&self) {
        self.reap_for(Concern::Everything, BRIEF);
    }

    /// The same for everything that there is, for callers who need to know what is free.
    pub(super) fn reap_all(&self) {
        self.reap_for(Concern::Everything, LIMIT);
    }

    /// Locks the claims for the decision on a write: no dead task holds a list that the write concerns, and what is known
    /// of intruders is still so.
    pub(super) fn claims_for(&self, request: &Request) -> MutexGuard<'_, Claims> {
        match request.target {
            Target::List(list) => self.reap_for(Concern::List(list), LIMIT),
            Target::Pool(pool) => {
                self.notice_deaths();
                // A list that may come free is not waited for if there are others.
                let waits = !self.search.is_idle() && self.free_lists(pool, request) < request.claim.len();
                self.await_search(Concern::Pool(pool), if waits { LIMIT } else { Duration::ZERO });
            }
        }
        self.check_intruders(request);
        self.claims.lock()
    }

    /// Returns how many lists of the pool are free, can serve, and were not refused by the kernel.
    fn free_lists(&self, pool: PoolId, request: &Request) -> usize {
        let claims = self.claims.lock();
        let Some(pool) = claims.pool(pool) else { return 0 };
        let suitable = pool.lists().filter(|list| !request.unsuitable.iter().any(|(_, other)| other == list));
        let lists = suitable.filter_map(|id| claims.list(id));
        let free = lists.filter(|list| list.is_free() && list.is_open());
        free.filter(|list| pool.can_serve(list.cpus(), &request.offline)).count()
    }

    /// Ends the claims of dead tasks that nobody can inherit, and has the heirs of the others looked for.
    pub(super) fn notice_deaths(&self) {
        if !self.processes.any_dead() {
            return;
        }
        // Another thread that comes here waits until the first one has noticed them.
        let one = self.reaping.lock();
        for task in self.processes.dead() {
            let Some(dead) = self.dead_claim(task) else { continue };
            if dead.is_inheritable {
                self.search.add(dead);
                self.processes.unwatch(&task);
            } else {
                self.end_claim(&dead, None);
            }
        }
        drop(one);
        self.plan_finished.notify_all();
        // The caller may be a read, which must not wait for a disk.
        self.journal.request_flush();
    }

    /// Returns the claim of a dead task. A task whose first claim is still in flight has none: its plan ends by itself.
    pub(super) fn dead_claim(&self, task: TaskId) -> Option<DeadClaim> {
        let process = self.processes.watched(&task);
        let ending = process.as_ref().map_or(Ending::Unknown, |process| self.processes.ending(process));
        let program = process.as_ref().and_then(|process| self.processes.comm_at_death(process));
        let user = process.and_then(|process| self.processes.user_at_death(&process));
        let claims = self.claims.lock();
        let claim = Arc::clone(claims.claim(&task)?);
        let list = claims.list(claim.list)?;
        if let Some(name) = program {
            self.programs.note(task, name);
        }
        Some(DeadClaim {
            ending,
            user,
            pool: list.pool(),
            cpus: list.cpus().clone(),
            is_inheritable: claims.is_inheritable(&claim),
            is_in_flight: claims.is_in_flight(&task),
            claim,
        })
    }

    /// Passes a claim to the heir or ends it. Its record is deferred under the lock of the claims, so that it
    /// precedes the record of any later claim on the list.
    pub(super) fn end_claim(&self, dead: &DeadClaim, heir: Option<Heir>) {
        let task = dead.claim.task;
        let heir = heir.and_then(|heir| Some((Arc::new(self.reopen(heir.info.task)?), heir)));
        if let Some((process, _)) = &heir {
            self.note_program(process);
        }
        let mut claims = self.claims.lock();
        let Some(claim) = claims.claim(&task).cloned() else { return };
        // Since the heir was found, it may have got a claim itself, or a move of the dead task may have been
        // settled; then the heir is not on the list that the dead task leaves.
        let heir = heir
            .filter(|(_, heir)| claim == dead.claim && claims.can_inherit(&claim, &heir.info.task))
            .filter(|(process, _)| self.processes.watch(Arc::clone(process)).is_ok())
            .map(|(_, heir)| heir);
        let end = Command::End { task, ending: dead.ending, heir };
        let Ok(mut effects) = claims.apply(end) else { return };
        self.processes.unwatch(&task);
        self.publish(&claims, &effects);
        let record = match effects.changes.first() {
            Some(Change::Inherited { from, to }) => Record::Inherited { from: *from, heir: to.clone() },
            Some(Change::Ended(_) | Change::Died(_)) => Record::Ended { task, reclaimed: None },
            Some(Change::Reclaimed(claim)) => {
                Record::Ended { task, reclaimed: Some(self.reclaim(&claims, claim)) }
            }
            _ => return,
        };
        self.journal.defer(record);
        drop(claims);
        if self.isolation.has(claim.list) {
            self.isolation.wake();
        }
        log::debug!("reaped: {:?}", effects.changes.pop());
    }

    /// Adds a claim to `info/reclaimed`.
    pub(super) fn reclaim(&self, claims: &Claims, claim: &Claim) -> Reclaimed {
        let event = self.claim_event("reclaimed", claims, claim);
        self.programs.forget(&claim.task);
        let reclaimed = Reclaimed {
            seq: 0,
            time: self.clock.wall_ms(),
            pid: claim.task.pid.get(),
            pool: event.pool.clone().unwrap_or_default(),
            cpus: event.cpus.clone().unwrap_or_default(),
            uid: event.uid,
        };
        let seq = self.event(event);
        let reclaimed = Reclaimed { seq, ..reclaimed };
        self.events.lock().reclaim(reclaimed.clone());
        reclaimed
    }

    /// Returns the process of a task, if it is alive.
    pub(super) fn reopen(&self, task: TaskId) -> Option<ProcessOf<P>> {
        let process = self.processes.open(task.pid).ok().flatten()?;
        (process.id() == task && process.is_alive()).then_some(process)
    }
}
