//! The caller: its claim (`self/claim`, `self/cpus`), its last refusal (`self/last_error`), and its ancestors.
//!
//! Owns how far ancestors count, and what a user may know about a process. Does not know what a refusal means.

use std::sync::Arc;

use nix::errno::Errno;

use super::events::Event;
use super::last_error::Origin;
use super::ports::{Clock as _, Journal as _, Masks as _, Ports, Process as _, Processes as _, Watch as _};
use super::replay::session_thread;
use super::search::{Concern, LIMIT};
use super::{Caller, Engine, ProcessOf, Refused};
use crate::clock;
use crate::failpoint::{Step, reached};
use crate::journal::{HOLDER, Record, RefusalRecord};
use crate::metrics::Counter;
use crate::model::command::Claim;
use crate::model::cpuset::CpuSet;
use crate::model::pool::ListId;
use crate::model::refusal::{Holder, ListName};
use crate::model::task::{Pid, TaskId};

/// A pool, or a list of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) pool: String,
    pub(crate) cpus: Option<String>,
}

/// How many of its ancestors a writer's refusal concerns.
const NOTIFIED_ANCESTORS: usize = 4;
/// How many ancestors of a reader are looked at, so that a long chain of processes costs bounded time: 0.15 ms. Between
/// the entry point of a container and a compiler of a recursive make there are 10 to 30.
const MAX_ANCESTORS: usize = 64;

impl<P: Ports> Engine<P> {
    /// Returns the process of the caller; `None` if the daemon cannot see it or it has died.
    pub(super) fn process_of(&self, caller: Caller) -> Option<Arc<ProcessOf<P>>> {
        self.processes.of_thread(Pid::new(caller.tid)?).ok().flatten()
    }

    /// Returns the caller's PID in its own PID namespace.
    fn own_pid_of(&self, process: Option<&ProcessOf<P>>, caller: Caller) -> u32 {
        let own = process.and_then(|process| self.processes.pid_in_namespace_of(process, process.id().pid));
        own.or_else(|| Some(process?.id().pid.get())).unwrap_or(caller.tid)
    }

    /// Records a refusal for the caller and up to four of its ancestors in the same PID namespace, counts it, and adds
    /// an event. The code that answers the request calls this, once, before the answer.
    ///
    /// A user who causes too many gets no event and no record in the journal: then the next worker does not know this
    /// refusal, and a request that comes again is decided again.
    ///
    /// `place` is the pool, and the list, of the file or directory.
    pub(crate) fn record_refusal(&self, caller: Caller, refused: &Refused, place: Option<Place>) {
        let Refused { refusal, pid } = refused;
        let process = self.process_of(caller);
        let process = process.as_deref();
        let number = pid.unwrap_or_else(|| self.own_pid_of(process, caller));
        self.metrics.refused(refusal.errno());
        let is_recorded = self.may_record_refusal(caller);
        let holder = refusal.holder();
        let text = refusal.sentence(HOLDER);
        let subjects =
            process.map_or_else(Vec::new, |process| self.with_ancestors(process, NOTIFIED_ANCESTORS));
        let session = self.processes.session(caller.tid);
        let (time, errno, uid) = (self.clock.wall_ms(), refusal.errno() as i32, Some(caller.uid));
        let filed =
            Arc::new(RefusalRecord { time, pid: number, errno, text, holder, subjects, uid, session });
        if is_recorded {
            let (pool, cpus) = place.map_or((None, None), |Place { pool, cpus }| (Some(pool), cpus));
            self.event(Event {
                event: "refused",
                pool,
                cpus,
                pid: Some(process.map_or(number, |process| process.id().pid.get())),
                program: process.and_then(|process| self.processes.comm(process)),
                uid,
                errno: Some(format!("{:?}", refusal.errno())),
                reason: Some(with_holder(&filed.text, &self.holder_name(holder, false))),
                ..Event::default()
            });
            // Recorded before the answer: the next worker may have to repeat it. If it cannot be, it is left out: on a
            // disk that takes nothing, refusals are what there is most of.
            let _ = self.journal.append(&Record::Refused {
                request: caller.request,
                session_thread: session_thread(),
                refusal: Arc::clone(&filed),
            });
            self.journal.flush_deferred();
        }
        let is_on_terminal = |task: &TaskId| self.processes.has_terminal_of_another(*task, caller.uid);
        let on_terminal: Vec<TaskId> =
            filed.subjects.iter().copied().filter(|it| is_on_terminal(it)).collect();
        self.refusals.lock().add(filed, |task| on_terminal.contains(task));
        reached(Step::RefusalRecorded);
    }

    /// Returns the process and its next ancestors.
    fn with_ancestors(&self, process: &ProcessOf<P>, most: usize) -> Vec<TaskId> {
        let mut tasks = vec![process.id()];
        self.processes.walk_ancestors(process, most, &mut |ancestor| {
            tasks.push(ancestor);
            true
        });
        tasks
    }

    /// An operation was carried out, so its process and its ancestors are not shown the refusals before it. These are all
    /// ancestors at which a reader looks: a refusal may concern one that is further from this process.
    pub(crate) fn record_success(&self, caller: Caller) {
        let session = self.processes.session(caller.tid);
        let origin = Origin::new(caller.uid, session);
        if !self.refusals.lock().has(origin) {
            return;
        }
        let Some(process) = self.process_of(caller) else { return };
        let tasks = self.with_ancestors(&process, MAX_ANCESTORS);
        let tasks = self.refusals.lock().forget(origin, &tasks);
        if !tasks.is_empty() {
            self.append_if_possible(&Record::Succeeded { tasks });
        }
    }

    /// Returns whether a refusal gets an event and a record, and counts it for its user.
    fn may_record_refusal(&self, caller: Caller) -> bool {
        let now = self.clock.since_boot();
        {
            let mut budget = self.recorded_refusals.lock();
            if budget.left(caller.uid, now) > 0 {
                budget.spend(caller.uid, 1, now);
                return true;
            }
        }
        // Root of the node could do worse.
        let may = self.user(caller).nice;
        if !may {
            self.metrics.count(Counter::Unrecorded);
        }
        may
    }

    /// Returns the list of the reader, or of its nearest ancestor whose list it runs on.
    pub(crate) fn claim_of_reader(&self, caller: Caller) -> Option<ListName> {
        let reader = self.process_of(caller)?;
        if let Some((_, list)) = self.claim_and_list(&reader.id()) {
            return Some(list);
        }
        // Ancestors are looked at only if one of them can count.
        let mask = self.processes.leader_mask(reader.id().pid).ok()?;
        self.reap_for(Concern::Around(&mask), LIMIT);
        // It may be the heir of a task that has died.
        if let Some((_, list)) = self.claim_and_list(&reader.id()) {
            return Some(list);
        }
        let within = self.taken_list_around(&mask)?;
        let started = self.processes.started(&reader)?;
        let mut found = None;
        self.processes.walk_ancestors(&reader, MAX_ANCESTORS, &mut |ancestor| {
            let is_counted = |(claim, _): &(Arc<Claim>, _)| {
                claim.list == within && started >= claim.since / self.clock.tick()
            };
            found = self.claim_and_list(&ancestor).filter(is_counted).map(|(_, list)| list);
            found.is_none()
        });
        found
    }

    /// Returns the list with tasks that contains this mask. Lists are disjoint, so there is no other one.
    fn taken_list_around(&self, mask: &CpuSet) -> Option<ListId> {
        let claims = self.claims.lock();
        let mut taken = claims.pools().flat_map(|(_, pool)| pool.taken());
        taken.find(|&id| claims.list(id).is_some_and(|list| mask.is_subset(list.cpus())))
    }

    fn claim_and_list(&self, task: &TaskId) -> Option<(Arc<Claim>, ListName)> {
        let claims = self.claims.lock();
        let claim = claims.claim(task)?.clone();
        let list = claims.list(claim.list)?.name().clone();
        Some((claim, list))
    }

    /// Returns `self/last_error`: one line, or nothing. `shows_pids` says whether the reader may read a list's
    /// `tasks` file.
    pub(crate) fn last_error_of_reader(&self, caller: Caller, shows_pids: impl Fn(ListId) -> bool) -> String {
        let Some(reader) = self.process_of(caller) else { return String::new() };
        let origin = Origin::new(caller.uid, self.processes.session(caller.tid));
        let mut found = self.refusals.lock().of(&reader.id(), origin);
        if found.is_none() {
            self.processes.walk_ancestors(&reader, MAX_ANCESTORS, &mut |ancestor| {
                found = self.refusals.lock().of(&ancestor, origin);
                found.is_none()
            });
        }
        let Some(filed) = found else { return String::new() };
        let name = match filed.holder {
            Some(holder) if !shows_pids(holder.list) => "a task".to_owned(),
            holder => self.holder_name(holder, self.may_know_program(caller, holder)),
        };
        let errno = Errno::from_raw(filed.errno);
        let (time, number) = (clock::rfc3339(filed.time), filed.pid);
        format!("{time} {number}: {errno:?}: {}\n", with_holder(&filed.text, &name))
    }

    /// Returns whether the caller is in this group.
    pub(crate) fn is_in_group(&self, caller: Caller, gid: u32) -> bool {
        self.processes.groups(caller.tid).is_ok_and(|groups| groups.contains(&gid))
    }

    /// Returns whether the caller may know more about a holder than its PID: only its owner and root may.
    fn may_know_program(&self, caller: Caller, holder: Option<Holder>) -> bool {
        let owner = holder.and_then(|holder| self.claims.lock().claim(&holder.task).map(|claim| claim.uid));
        owner == Some(caller.uid) || self.is_admin(caller)
    }

    fn holder_name(&self, holder: Option<Holder>, with_program: bool) -> String {
        let Some(Holder { task, .. }) = holder else { return String::new() };
        let process = self.processes.watched(&task).filter(|_| with_program);
        match process.and_then(|process| self.processes.comm(&process)) {
            Some(comm) => format!("{} ({comm})", task.pid),
            None => task.pid.to_string(),
        }
    }
}

/// Returns a recorded sentence with the holder's name in it.
fn with_holder(text: &str, name: &str) -> String {
    text.replace(HOLDER, name)
}
