//! The caller: its claim (`self/claim`, `self/cpus`), its last refusal (`self/last_error`), and its ancestors.
//!
//! Owns the walk from a process to its ancestors, and what a user may know about a process. Does not know what a refusal
//! means.

use std::sync::Arc;

use nix::errno::Errno;

use super::events::Event;
use super::ports::{Clock as _, Journal as _, Masks as _, Ports, Process as _, Processes as _, Watch as _};
use super::replay::session_thread;
use super::{Caller, Engine, ProcessOf, Refused};
use crate::clock;
use crate::failpoint::{Step, reached};
use crate::journal::{HOLDER, Record, RefusalRecord};
use crate::model::command::Claim;
use crate::model::pool::ListId;
use crate::model::refusal::{Holder, ListName};
use crate::model::task::{Pid, TaskId};

/// How many of its ancestors a writer's refusal concerns.
const NOTIFIED_ANCESTORS: usize = 4;
/// How many ancestors of a reader are looked at, so that a long chain of processes costs bounded time.
const MAX_ANCESTORS: usize = 256;

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
    pub(crate) fn record_refusal(&self, caller: Caller, refused: &Refused) {
        let Refused { refusal, pid } = refused;
        let process = self.process_of(caller);
        let process = process.as_deref();
        let number = pid.unwrap_or_else(|| self.own_pid_of(process, caller));
        self.metrics.refused(refusal.errno());
        let holder = refusal.holder();
        let text = refusal.sentence(HOLDER);
        self.event(Event {
            event: "refused",
            pid: Some(process.map_or(number, |process| process.id().pid.get())),
            errno: Some(format!("{:?}", refusal.errno())),
            reason: Some(with_holder(&text, &self.holder_name(holder, false))),
            ..Event::default()
        });
        let mut subjects: Vec<TaskId> = process.iter().map(|process| process.id()).collect();
        if let Some(process) = process {
            self.walk_ancestors(process, NOTIFIED_ANCESTORS, |ancestor| {
                subjects.push(ancestor.id());
                true
            });
        }
        let (time, errno) = (self.clock.wall_ms(), refusal.errno() as i32);
        let filed = Arc::new(RefusalRecord { time, pid: number, errno, text, holder, subjects });
        // Recorded before the answer: the next worker may have to repeat it.
        self.append_if_possible(&Record::Refused {
            request: caller.request,
            session_thread: session_thread(),
            refusal: Arc::clone(&filed),
        });
        self.journal.flush_deferred();
        self.refusals.lock().add(filed);
        reached(Step::RefusalRecorded);
    }

    /// Returns the list of the reader, or of its nearest ancestor whose list it runs on.
    pub(crate) fn claim_of_reader(&self, caller: Caller) -> Option<ListName> {
        self.reap();
        let reader = self.process_of(caller)?;
        if let Some((_, list)) = self.claim_and_list(&reader.id()) {
            return Some(list);
        }
        let started = self.processes.started(&reader)?;
        let mask = self.processes.leader_mask(reader.id().pid).ok()?;
        let mut found = None;
        self.walk_ancestors(&reader, MAX_ANCESTORS, |ancestor| {
            let Some((claim, list)) = self.claim_and_list(&ancestor.id()) else { return true };
            let cpus = self.configuration().list(claim.list).map(|list| list.cpus().clone());
            let started_later = started >= claim.since / self.clock.tick();
            if started_later && cpus.is_some_and(|cpus| mask.is_subset(&cpus)) {
                found = Some(list);
            }
            found.is_none()
        });
        found
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
        let mut found = self.refusals.lock().of(&reader.id());
        if found.is_none() {
            self.walk_ancestors(&reader, MAX_ANCESTORS, |ancestor| {
                found = self.refusals.lock().of(&ancestor.id());
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

    /// Calls `visit` with the parent, its parent, and so on, until it returns false or has seen the first process of
    /// the PID namespace. PID 1 of the machine is left out: it says nothing about other processes.
    fn walk_ancestors(&self, from: &ProcessOf<P>, most: usize, mut visit: impl FnMut(&ProcessOf<P>) -> bool) {
        if self.processes.is_namespace_init(from) {
            return;
        }
        let mut parent = self.processes.facts(from).ok().flatten().and_then(|facts| facts.parent);
        for _ in 0..most {
            let Some(pid) = parent.filter(|pid| pid.get() != 1) else { return };
            let Ok(Some(ancestor)) = self.processes.with_pid(pid) else { return };
            if !self.processes.share_namespace(from, &ancestor) {
                return;
            }
            let Ok(Some(facts)) = self.processes.facts(&ancestor) else { return };
            if !visit(&ancestor) || self.processes.is_namespace_init(&ancestor) {
                return;
            }
            parent = facts.parent;
        }
    }
}

/// Returns a recorded sentence with the holder's name in it.
fn with_holder(text: &str, name: &str) -> String {
    text.replace(HOLDER, name)
}
