//! Who asks, and what there is to say to them: `self/`, and the filing of refusals.
//!
//! Owns: the walk from a process to its ancestors, and who may know what of whom. Must not know: what a
//! refusal means.

use std::sync::Arc;

use nix::errno::Errno;

use super::{Caller, Engine};
use crate::clock;
use crate::engine::events::Event;
use crate::engine::replay::session_thread;
use crate::failpoint::{Step, reached};
use crate::journal::{HOLDER, Record, RefusalRecord};
use crate::model::command::Claim;
use crate::model::pool::ListId;
use crate::model::refusal::{Holder, ListName, Refusal};
use crate::model::task::{Pid, TaskId};
use crate::process::Process;

/// To how many of its ancestors a writer's refusal is told.
const NOTIFIED_ANCESTORS: usize = 4;
/// How far up a reader's ancestors are looked at: a chain that is longer is somebody's joke.
const MAX_ANCESTORS: usize = 256;

impl Engine {
    /// The process of the caller; None where the daemon cannot see it, or it has died.
    pub(super) fn writer(&self, caller: Caller) -> Option<Arc<Process>> {
        self.processes.of_thread(Pid::new(caller.tid)?, &self.watch).ok().flatten()
    }

    /// The caller's PID as it knows itself.
    pub(super) fn own_number(&self, writer: Option<&Arc<Process>>, caller: Caller) -> u32 {
        let own = writer.and_then(|writer| self.processes.number_in_namespace_of(writer, writer.id().pid));
        own.or_else(|| Some(writer?.id().pid.get())).unwrap_or(caller.tid)
    }

    /// Files a refusal that concerns no other process than the caller.
    pub(crate) fn refused(&self, caller: Caller, refusal: &Refusal) {
        let writer = self.writer(caller);
        let number = self.own_number(writer.as_ref(), caller);
        self.file_refusal(caller, writer.as_deref(), number, refusal);
    }

    /// Files a refusal under the writer and up to four of its ancestors in the same PID namespace.
    pub(super) fn file_refusal(
        &self,
        caller: Caller,
        writer: Option<&Process>,
        number: u32,
        refusal: &Refusal,
    ) {
        self.metrics.refused(refusal.errno());
        let holder = refusal.holder();
        let text = refusal.sentence(HOLDER);
        self.event(Event {
            event: "refused",
            pid: Some(writer.map_or(number, |writer| writer.id().pid.get())),
            errno: Some(format!("{:?}", refusal.errno())),
            reason: Some(named(&text, &self.name_of_holder(holder, false))),
            ..Event::default()
        });
        let mut subjects: Vec<TaskId> = writer.iter().map(|writer| writer.id()).collect();
        if let Some(writer) = writer {
            self.walk_ancestors(writer, NOTIFIED_ANCESTORS, |ancestor| {
                subjects.push(ancestor.id());
                true
            });
        }
        let (time, errno) = (clock::wall_ms(), refusal.errno() as i32);
        let filed = Arc::new(RefusalRecord { time, pid: number, errno, text, holder, subjects });
        // Before the answer, which may come again from the next worker.
        self.record_if_possible(Record::Refused {
            request: caller.request,
            session_thread: session_thread(),
            refusal: Arc::clone(&filed),
        });
        self.state.flush_deferred();
        self.refusals.lock().file(filed);
        reached(Step::RefusalRecorded);
    }

    /// `self/claim`: the list of the reader, or of its nearest ancestor whose list it inherited.
    pub(crate) fn claim_of_reader(&self, caller: Caller) -> Option<ListName> {
        self.reap();
        let reader = self.writer(caller)?;
        if let Some((_, list)) = self.claim_and_list(&reader.id()) {
            return Some(list);
        }
        let started = self.processes.started(&reader)?;
        let mask = self.processes.leader_mask(reader.id().pid).ok()?;
        let mut found = None;
        self.walk_ancestors(&reader, MAX_ANCESTORS, |ancestor| {
            let Some((claim, list)) = self.claim_and_list(&ancestor.id()) else { return true };
            let cpus = self.claims.lock().list(claim.list).map(|list| list.cpus().clone());
            if started >= claim.since / self.tick && cpus.is_some_and(|cpus| mask.is_subset(&cpus)) {
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

    /// `self/last_error`: one line, or nothing. `shows_pids`: whether the reader may read the `tasks` files.
    pub(crate) fn last_error_of_reader(&self, caller: Caller, shows_pids: impl Fn(ListId) -> bool) -> String {
        let Some(reader) = self.writer(caller) else { return String::new() };
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
            holder => self.name_of_holder(holder, self.may_know_name(caller, holder)),
        };
        let errno = Errno::from_raw(filed.errno);
        let (time, number) = (clock::rfc3339(filed.time), filed.pid);
        format!("{time} {number}: {errno:?}: {}\n", named(&filed.text, &name))
    }

    /// Whether the caller has the rights of this group.
    pub(crate) fn is_in_group(&self, caller: Caller, gid: u32) -> bool {
        self.processes.groups(caller.tid).is_ok_and(|groups| groups.contains(&gid))
    }

    /// More than a process's number is shown to root and to its owner alone.
    fn may_know_name(&self, caller: Caller, holder: Option<Holder>) -> bool {
        let owner = holder.and_then(|holder| self.claims.lock().claim(&holder.task).map(|claim| claim.uid));
        caller.uid == 0 || owner == Some(caller.uid)
    }

    fn name_of_holder(&self, holder: Option<Holder>, with_name: bool) -> String {
        let Some(Holder { task, .. }) = holder else { return String::new() };
        let process = self.watch.get(&task).filter(|_| with_name);
        match process.and_then(|process| self.processes.comm(&process)) {
            Some(comm) => format!("{} ({comm})", task.pid),
            None => task.pid.to_string(),
        }
    }

    /// Shows the parent, its parent, and so on to `visit`, until that says false, or the first process of the
    /// PID namespace has been shown. PID 1 of the machine says nothing about anybody else and is not shown.
    fn walk_ancestors(&self, from: &Process, most: usize, mut visit: impl FnMut(&Process) -> bool) {
        if self.processes.is_namespace_init(from) {
            return;
        }
        let mut parent = self.processes.facts(from).ok().flatten().and_then(|facts| facts.parent);
        for _ in 0..most {
            let Some(pid) = parent.filter(|pid| pid.get() != 1) else { return };
            let Ok(Some(ancestor)) = self.processes.with_pid(pid, &self.watch) else { return };
            if !self.processes.same_namespace(from, &ancestor) {
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

/// A filed sentence with the holder's name in it.
fn named(text: &str, name: &str) -> String {
    text.replace(HOLDER, name)
}
