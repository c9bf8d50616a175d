//! One write to a `tasks` file, from the bytes to the answer.
//!
//! Owns: the order of a claim, and the way back from each step of it. Must not know: who may be on which
//! list; that is the claim machine's.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use super::replay::answered;
use super::{Caller, Engine, IN_FLIGHT_TIMEOUT};
use crate::clock;
use crate::failpoint::{Step, reached};
use crate::journal::Record;
use crate::model::command::{Claim, ClaimKind, Command, Plan, Request, Target, TaskInfo};
use crate::model::pool::ListId;
use crate::model::refusal::Refusal;
use crate::model::task::{Named, NoWrite, Pid, TaskId, Token, Write};
use crate::process::{self, BlockedWriter, MaskError, Process, SavedMasks, Threads};

/// What a command for more tasks than this needs for a moment is worth giving back.
const LARGE: usize = 1000;

/// A process that a write names.
#[derive(Clone, Debug)]
struct ResolvedTask {
    info: TaskInfo,
    process: Arc<Process>,
}

/// In whose name something is undo.
#[derive(Clone, Copy, Debug)]
struct Requester {
    /// Who opened the file, and who writes.
    users: [u32; 2],
    /// The kernel's request; 0 where it is none of the kernel's.
    request: u64,
    /// The thread that writes.
    waiting: BlockedWriter,
}

/// Why a plan could not be carried out.
enum Failure {
    /// One of its tasks has died.
    Died(TaskId),
    /// The kernel lets this task not be on that list.
    Unsuitable(TaskId, ListId, Refusal),
    Refused(Refusal),
}

/// What was done for a plan so far, so that it can be undone.
#[derive(Default)]
struct UndoLog {
    intents: Vec<TaskId>,
    masks: Vec<(TaskId, SavedMasks)>,
}

impl Engine {
    /// Carries out one write(2) to a `tasks` file, wholly or not at all. `opener`: the user who opened the
    /// file; `read_write`: whether it was opened for reading too.
    ///
    /// # Errors
    /// The [`Refusal`], which has been filed for the writer's `self/last_error`.
    pub(crate) fn write_tasks(
        &self,
        target: Target,
        caller: Caller,
        opener: u32,
        bytes: &[u8],
        read_write: bool,
    ) -> Result<(), Refusal> {
        let writer = self.writer(caller);
        let mut number = None;
        let (users, waiting) = ([opener, caller.uid], caller.waiting());
        let requester = Requester { users, request: caller.request, waiting };
        let result = self.try_write(target, writer.as_ref(), requester, bytes, read_write, &mut number);
        result.inspect_err(|refusal| {
            let number = number.unwrap_or_else(|| self.own_number(writer.as_ref(), caller));
            self.file_refusal(caller, writer.as_deref(), number, refusal);
        })
    }

    fn try_write(
        &self,
        target: Target,
        writer: Option<&Arc<Process>>,
        requester: Requester,
        bytes: &[u8],
        read_write: bool,
        number: &mut Option<u32>,
    ) -> Result<(), Refusal> {
        let write = Write::parse(bytes, read_write).map_err(|no| match no {
            NoWrite::Nonsense(word) => Refusal::Nonsense { word },
            NoWrite::TooLong => Refusal::TooLong,
        })?;
        let writer = writer.ok_or(Refusal::NoSuchProcess)?;
        match write {
            Write::Command(tokens) if tokens.is_empty() => Ok(()),
            Write::Command(tokens) => {
                if let [Token::Claim(Named::Number(only)) | Token::Release(Named::Number(only))] =
                    tokens.as_slice()
                {
                    *number = Some(only.0.get());
                }
                let (claim, release) = self.resolve(writer, &tokens)?;
                let is_large = claim.len() + release.len() > LARGE;
                let placed = self.place(target, claim, release, requester);
                if is_large {
                    process::trim_heap();
                }
                placed
            }
            Write::Rewrite(pids) => self.rewrite(target, writer, &pids, requester),
        }
    }

    /// The living processes that the tokens name, each once: those to claim for, those to release.
    fn resolve(
        &self,
        writer: &Arc<Process>,
        tokens: &[Token],
    ) -> Result<(Vec<ResolvedTask>, Vec<ResolvedTask>), Refusal> {
        let (mut claim, mut release): (Vec<ResolvedTask>, Vec<ResolvedTask>) = (Vec::new(), Vec::new());
        let mut seen = HashSet::new();
        for token in tokens.iter().filter(|token| seen.insert(**token)) {
            let (named, tasks) = match token {
                Token::Claim(named) => (named, &mut claim),
                Token::Release(named) => (named, &mut release),
            };
            let Some(process) = self.named(writer, *named)? else { continue };
            // Who is watched has a descriptor already.
            let process = self.watch.get(&process.id()).unwrap_or(process);
            if tasks.iter().any(|task| task.info.task == process.id()) {
                continue;
            }
            if let Some(info) = self.task_info(&process)? {
                tasks.push(ResolvedTask { info, process });
            }
            if claim.len() + release.len() > self.watch.limit() {
                return Err(Refusal::TooMany { limit: self.watch.limit() });
            }
        }
        if claim.is_empty() && release.is_empty() {
            Err(Refusal::NoSuchProcess)
        } else {
            Ok((claim, release))
        }
    }

    fn named(&self, writer: &Arc<Process>, named: Named) -> Result<Option<Arc<Process>>, Refusal> {
        let Named::Number(number) = named else { return Ok(Some(Arc::clone(writer))) };
        let fault = self.fault("opening the process");
        if number.0.get() == writer.id().pid.get()
            && self.processes.shares_namespace(writer).map_err(&fault)?
        {
            return Ok(Some(Arc::clone(writer)));
        }
        let found = self.processes.open_in_namespace_of(writer, number, &self.watch).map_err(&fault)?;
        // The programs of 2017 know themselves by the daemon's number for them.
        let itself = || (number.0.get() == writer.id().pid.get()).then(|| Arc::clone(writer));
        Ok(found.or_else(itself))
    }

    /// Of a rewrite only the writer's own PID counts: it is there, or it is not there any more.
    fn rewrite(
        &self,
        target: Target,
        writer: &Arc<Process>,
        pids: &[Pid],
        requester: Requester,
    ) -> Result<(), Refusal> {
        let info = self.task_info(writer)?.ok_or(Refusal::NoSuchProcess)?;
        let own = vec![ResolvedTask { info, process: Arc::clone(writer) }];
        if pids.contains(&writer.id().pid) {
            self.place(target, own, Vec::new(), requester)
        } else {
            self.place(target, Vec::new(), own, requester)
        }
    }

    /// Decides and carries out, again where the kernel has a word in it: it may refuse a list that the pool
    /// offers, a task may die on the kind, or be in another operation's hands.
    fn place(
        &self,
        target: Target,
        mut claim: Vec<ResolvedTask>,
        release: Vec<ResolvedTask>,
        requester: Requester,
    ) -> Result<(), Refusal> {
        let deadline = Instant::now() + IN_FLIGHT_TIMEOUT;
        let mut unsuitable = Vec::new();
        loop {
            self.reap();
            if claim.is_empty() && release.is_empty() {
                return Err(Refusal::NoSuchProcess);
            }
            let request = Request {
                target: target.clone(),
                claim: claim.iter().map(|task| task.info.clone()).collect(),
                release: release.iter().map(|task| task.info.clone()).collect(),
                users: requester.users,
                unsuitable: unsuitable.clone(),
                now: clock::since_boot(),
            };
            let decided = {
                let mut claims = self.claims.lock();
                match claims.apply(Command::Write(request)) {
                    Err(Refusal::TaskBusy) if Instant::now() < deadline => {
                        let _ = self.plan_finished.wait_until(&mut claims, deadline);
                        continue;
                    }
                    decided => decided?,
                }
            };
            reached(Step::WriteDecided);
            match self.carry_out(decided.plan, &claim, requester) {
                Ok(()) => return Ok(()),
                Err(Failure::Died(task)) => claim.retain(|one| one.info.task != task),
                Err(Failure::Unsuitable(task, list, refusal)) => match target {
                    Target::List(_) => return Err(refusal),
                    Target::Pool(_) => unsuitable.push((task, list)),
                },
                Err(Failure::Refused(refusal)) => return Err(refusal),
            }
        }
    }

    fn carry_out(&self, mut plan: Plan, tasks: &[ResolvedTask], requester: Requester) -> Result<(), Failure> {
        let mut undo = UndoLog::default();
        match self.try_carry_out(&mut plan, tasks, requester, &mut undo) {
            Ok(()) => {}
            Err(failure) => {
                self.undo(plan, undo, requester.waiting);
                return Err(failure);
            }
        }
        reached(Step::WriteRecorded);
        // From here on the write has happened, whatever comes.
        for claim in &plan.releases {
            self.restore_mask_of(&claim.task, &claim.saved, requester.waiting);
        }
        if !plan.releases.is_empty() {
            reached(Step::MasksBack);
            let records = plan.releases.iter().map(|claim| Record::Released { task: claim.task }).collect();
            self.record_or_owe(Record::Batch(records));
            reached(Step::ReleaseRecorded);
        }
        let lost = self.settle(plan, tasks);
        reached(Step::WriteSettled);
        match lost {
            Some(task) if tasks.len() == 1 => Err(Failure::Died(task)),
            _ => Ok(()),
        }
    }

    /// Watches, records, sets masks and records again. `undo` says how far it came.
    fn try_carry_out(
        &self,
        plan: &mut Plan,
        tasks: &[ResolvedTask],
        requester: Requester,
        undo: &mut UndoLog,
    ) -> Result<(), Failure> {
        let process = |task: TaskId| tasks.iter().find(|one| one.info.task == task).map(|one| &one.process);
        for place in plan.placements.iter_mut().filter(|place| place.kind == ClaimKind::New) {
            let died = || Failure::Died(place.claim.task);
            let process = process(place.claim.task).ok_or_else(died)?;
            let cgroup = self.processes.cgroup(process).ok_or_else(died)?;
            let saved =
                self.processes.saved_mask(process).map_err(|error| self.failed(error, &place.claim))?;
            let claim = Arc::make_mut(&mut place.claim);
            (claim.cgroup, claim.saved) = (cgroup, saved);
            self.watch
                .add(Arc::clone(process))
                .map_err(|error| Failure::Refused(self.fault("watching the task")(error)))?;
        }
        if plan.changing().next().is_some() {
            let intents = plan.changing().map(|place| Record::Intent(place.claim.clone())).collect();
            self.state.append(&Record::Batch(intents)).map_err(|_| Failure::Refused(Refusal::LogFull))?;
            undo.intents.extend(plan.changing().map(|place| place.claim.task));
            reached(Step::IntentRecorded);
        }
        for place in &mut plan.placements {
            let task = place.claim.task;
            let process = process(task).ok_or(Failure::Died(task))?;
            if place.kind == ClaimKind::New {
                let refined = self
                    .processes
                    .probe_saved_mask(process, place.claim.saved.clone())
                    .map_err(|error| self.failed(error, &place.claim))?;
                if refined != place.claim.saved {
                    Arc::make_mut(&mut place.claim).saved = refined;
                }
            }
            let (cpus, waiting) = (&place.cpus, requester.waiting);
            let previous = match place.kind {
                ClaimKind::New => self.processes.set_first_mask(process, cpus, &place.claim.saved, waiting),
                ClaimKind::Move { .. } => self.processes.set_mask(process, cpus, Threads::All, waiting),
                ClaimKind::Repeat => self.processes.set_mask(process, cpus, Threads::OnlyStrays, waiting),
            };
            undo.masks.push((task, previous.map_err(|error| self.failed(error, &place.claim))?));
        }
        reached(Step::MasksSet);
        let claims = plan.changing().map(|place| Record::Claimed(place.claim.clone()));
        let releases = plan.releases.iter().map(|claim| Record::Releasing { task: claim.task });
        let mut records: Vec<Record> = claims.chain(releases).collect();
        if records.is_empty() {
            return Ok(());
        }
        // In one with what it answers to: a request that comes again finds both or neither.
        records.extend(answered(requester.request));
        if plan.changing().next().is_none() {
            self.record_or_owe(Record::Batch(records));
            return Ok(());
        }
        self.state.append(&Record::Batch(records)).map_err(|_| Failure::Refused(Refusal::LogFull))
    }

    /// Takes back what was done for a plan, the last thing first.
    fn undo(&self, plan: Plan, undo: UndoLog, waiting: BlockedWriter) {
        for (task, previous) in undo.masks.into_iter().rev() {
            if let Some(process) = self.watch.get(&task) {
                self.processes.undo(&process, previous, waiting);
            }
        }
        if !undo.intents.is_empty() {
            let records = undo.intents.iter().map(|&task| Record::Abandoned { task }).collect();
            self.record_or_owe(Record::Batch(records));
        }
        let new: Vec<TaskId> = plan
            .placements
            .iter()
            .filter(|place| place.kind == ClaimKind::New)
            .map(|place| place.claim.task)
            .collect();
        let mut claims = self.claims.lock();
        let _ = claims.apply(Command::Abandon(plan));
        for task in new {
            self.watch.remove(&task);
        }
        drop(claims);
        self.plan_finished.notify_all();
    }

    /// Makes the plan a fact. Gives a task that has died meanwhile, if there is one.
    fn settle(&self, plan: Plan, tasks: &[ResolvedTask]) -> Option<TaskId> {
        let released: Vec<TaskId> = plan.releases.iter().map(|claim| claim.task).collect();
        let mut claims = self.claims.lock();
        // Settling is never refused.
        let effects = claims.apply(Command::Settle(plan)).unwrap_or_default();
        self.note(&claims, &effects);
        for task in released.iter().chain(&effects.lost) {
            self.watch.remove(task);
        }
        drop(claims);
        self.plan_finished.notify_all();
        self.state.flush_deferred();
        effects.lost.iter().find(|lost| tasks.iter().any(|one| one.info.task == **lost)).copied()
    }

    /// What keeps the claim's task off the claim's list.
    fn failed(&self, error: MaskError, claim: &Claim) -> Failure {
        let got = match error {
            MaskError::Gone => return Failure::Died(claim.task),
            MaskError::KeepsChanging => return Failure::Refused(Refusal::KeepsChanging),
            MaskError::Refused => None,
            MaskError::Narrowed { got } => Some(got),
            error => return Failure::Refused(mask_fault(&error)),
        };
        let name = self.with_configuration(|claims| claims.list(claim.list).map(|list| list.name().clone()));
        let refusal = name.map_or(Refusal::Removed, |list| Refusal::MaskRefused { list, got });
        Failure::Unsuitable(claim.task, claim.list, refusal)
    }

    /// For what is of use to the next worker, and no more than that.
    pub(super) fn record_if_possible(&self, record: Record) {
        let _ = self.state.append(&record);
    }

    /// For what goes on when the log cannot be written.
    pub(super) fn record_or_owe(&self, record: Record) {
        self.state.defer(record);
        let _ = self.state.flush();
    }
}

fn mask_fault(error: &MaskError) -> Refusal {
    log::warn!("setting or reading a mask: {error}");
    Refusal::Fault { what: "setting or reading the mask", errno: nix::errno::Errno::EIO }
}
