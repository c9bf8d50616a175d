//! One write to a `tasks` file, from the bytes to the answer.
//!
//! Owns the order of a claim, and how each step of it is undone. Does not know who may be on which list: the
//! claim machine does.
//!
//! ```text
//! decide -> watch -> record the intent -> set and read back the masks -> record the claim -> settle
//! ```
//!
//! In an isolated pool the partition is made after the masks are set, and taken back before they are restored: the kernel
//! lets a task in a partition run nowhere else. So a task in the partition of another one moves out before its masks are set.
//!
//! Until the claim is recorded, every step can be undone; from then on the write has happened.
//!
//! Longer than 400 lines because the steps of a claim and their undoing are read together.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::isolate::NotIsolated;
use super::ports::{Clock as _, Journal as _, Masks, Ports, Process as _, Processes as _, Watch as _};
use super::replay::answered;
use super::requester::{Allowance, Requester};
use super::resolve::{ResolvedTask, single_pid};
use super::{Caller, Engine, ProcessOf, Refused};
use crate::failpoint::{Step, reached};
use crate::journal::{AppendError, Record};
use crate::model::command::{
    Claim, ClaimKind, Command, CompletedPlan, Placement, Plan, Rejected, Request, SavedMask, Target,
};
use crate::model::cpuset::CpuSet;
use crate::model::partition::{Extent, Partition};
use crate::model::pool::ListId;
use crate::model::queue::{Entry, Place};
use crate::model::refusal::{ListName, Refusal};
use crate::model::rights::User;
use crate::model::task::{NoWrite, Pid, TaskId, Token, Write};
use crate::partitions::PartitionError;
use crate::process::{self, BlockedWriter, MaskError, Threads};

/// A command for more tasks than this uses so much memory that it is worth returning to the system.
const LARGE: usize = 1000;
/// How often a write that waits for another one checks whether that one waits for the disk.
const STALL_CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// Why a plan could not be carried out.
pub(super) enum Failure {
    /// Some of its tasks cannot be placed as planned. Another plan may have success.
    Setbacks(Vec<Setback>),
    /// The whole write is refused.
    Refused(Refusal),
}

/// Why a task cannot be placed as planned.
pub(super) enum Setback {
    /// It has died.
    Died(TaskId),
    /// The kernel does not let this task run on this list.
    Unsuitable(TaskId, ListId, Refusal),
}

impl Failure {
    /// Returns why the first task is refused that has not died, if there is one.
    pub(super) fn into_refusal(self) -> Option<Refusal> {
        match self {
            Self::Refused(refusal) => Some(refusal),
            Self::Setbacks(setbacks) => setbacks.into_iter().find_map(|setback| match setback {
                Setback::Died(_) => None,
                Setback::Unsuitable(_, _, refusal) => Some(refusal),
            }),
        }
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<Setback> for Failure {
    fn from(setback: Setback) -> Self {
        Self::Setbacks(vec![setback])
    }
}

/// The steps of a plan that have been carried out, so that they can be undone.
pub(super) struct UndoLog<P: Ports> {
    /// The tasks whose intent is recorded.
    pub(super) intents: Vec<TaskId>,
    pub(super) masks: Vec<(TaskId, <P::Processes as Masks>::SavedMasks)>,
    /// The lists that have a partition now.
    isolated: Vec<ListId>,
    /// The lists whose partition was taken back, with its extent. Their tasks may stay there.
    left: Vec<(ListId, Extent)>,
    /// The tasks that were in the partition of another list without a claim.
    moved_out: Vec<(TaskId, Partition)>,
}

impl<P: Ports> Default for UndoLog<P> {
    fn default() -> Self {
        Self {
            intents: Vec::new(),
            masks: Vec::new(),
            isolated: Vec::new(),
            left: Vec::new(),
            moved_out: Vec::new(),
        }
    }
}

impl<P: Ports> Engine<P> {
    /// Carries out one write(2) to a `tasks` file, as a whole or not at all. `opener` is the user who opened the file;
    /// `read_write` says whether it was opened for reading too.
    ///
    /// # Errors
    /// The refusal, with the PID that it concerns if the command names a single process.
    pub(crate) fn write_tasks(
        &self,
        target: Target,
        caller: Caller,
        opener: User,
        data: &[u8],
        read_write: bool,
    ) -> Result<(), Refused> {
        let time = self.allowance(caller, opener);
        let result = self.counted(time, || self.try_write(target, caller, opener, time, data, read_write));
        // Writes the records that were deferred meanwhile, also by reaping.
        self.journal.flush_deferred();
        result
    }

    fn try_write(
        &self,
        target: Target,
        caller: Caller,
        opener: User,
        time: Allowance,
        data: &[u8],
        read_write: bool,
    ) -> Result<(), Refused> {
        let write = Write::parse(data, read_write).map_err(|no| match no {
            NoWrite::Nonsense(word) => Refusal::Nonsense { word },
            NoWrite::TooLong => Refusal::TooLong,
        })?;
        let writer = self.process_of(caller).ok_or(Refusal::NoSuchProcess)?;
        let requester = self.requester(caller, opener, writer.id(), time);
        match write {
            Write::Command(tokens) if tokens.is_empty() => Ok(()),
            Write::Command(tokens) => self
                .run_command(target, &writer, &tokens, &requester)
                .map_err(|refusal| Refused { refusal, pid: single_pid(&tokens) }),
            Write::Rewrite(pids) => Ok(self.rewrite(target, &writer, &pids, &requester)?),
        }
    }

    fn run_command(
        &self,
        target: Target,
        writer: &Arc<ProcessOf<P>>,
        tokens: &[Token],
        requester: &Requester,
    ) -> Result<(), Refusal> {
        let (claim, release) = self.resolve(writer, tokens, requester)?;
        let is_large = claim.len() + release.len() > LARGE;
        let done = self.decide_and_carry_out(target, &claim, &release, requester);
        if is_large {
            process::trim_heap();
        }
        done
    }

    /// Carries out a rewrite, in which only the writer's own PID matters: present means claim, absent means release.
    fn rewrite(
        &self,
        target: Target,
        writer: &Arc<ProcessOf<P>>,
        pids: &[Pid],
        requester: &Requester,
    ) -> Result<(), Refusal> {
        let own = self.look_at(Arc::clone(writer), requester)?.ok_or(Refusal::NoSuchProcess)?;
        let own = vec![own];
        let is_present = pids.contains(&writer.id().pid);
        let (claim, release) = if is_present { (own, Vec::new()) } else { (Vec::new(), own) };
        self.decide_and_carry_out(target, &claim, &release, requester)
    }

    /// Decides a write and carries it out. Decides again if the kernel refuses lists that the pool offered, or if tasks die
    /// meanwhile. Each attempt finds out about all tasks of its plan, so there are not more attempts than lists, apart from
    /// deaths; and the time of the request limits them.
    fn decide_and_carry_out(
        &self,
        target: Target,
        tasks: &[ResolvedTask<P>],
        release: &[ResolvedTask<P>],
        requester: &Requester,
    ) -> Result<(), Refusal> {
        let deadline = Instant::now() + requester.time.waiting;
        let infos = |tasks: &[ResolvedTask<P>]| tasks.iter().map(|task| task.info.clone()).collect();
        let mut request = Request {
            target,
            claim: infos(tasks),
            release: infos(release),
            users: requester.users(),
            unsuitable: HashSet::new(),
            offline: CpuSet::new(),
            before: 0,
            now: 0,
        };
        loop {
            if request.claim.is_empty() && request.release.is_empty() {
                return Err(Refusal::NoSuchProcess);
            }
            request.now = self.clock.since_boot();
            request.offline = self.processes.offline();
            let (plan, waited) = self.decide(&mut request, requester, deadline)?;
            reached(Step::WriteDecided);
            log::trace!("{target:?}: {plan:?}");
            match self.carry_out(plan, tasks, &request.offline, requester) {
                Ok(()) => return Ok(()),
                Err(failure) => {
                    self.put_back_in_queue(waited);
                    match failure {
                        Failure::Setbacks(setbacks) => learn(&mut request, setbacks)?,
                        Failure::Refused(refusal) => return Err(refusal),
                    }
                }
            }
            requester.check_time()?;
        }
    }

    /// Decides a write. Waits while another write has one of the tasks in flight. Also returns the entries that the tasks had
    /// in the queue of the pool.
    fn decide(
        &self,
        request: &mut Request,
        requester: &Requester,
        deadline: Instant,
    ) -> Result<(Plan, Vec<(Place, Entry)>), Refusal> {
        loop {
            let mut claims = self.claims_for(request);
            let pool = request.target.pool(&claims);
            request.before = pool.map_or(0, |pool| self.waiting_before(pool, request));
            match claims.apply(Command::Write(request.clone())) {
                Ok(effects) => {
                    let waited = pool.map(|pool| self.take_from_queue(pool, request));
                    return Ok((effects.plan, waited.unwrap_or_default()));
                }
                Err(Rejected::Refused(refusal)) => return Err(refusal),
                Err(Rejected::Busy) => {
                    // The other write may wait for the disk; then this one must not wait as long.
                    let started = Instant::now();
                    let next_check = deadline.min(started + STALL_CHECK_INTERVAL);
                    let timed_out = self.plan_finished.wait_until(&mut claims, next_check).timed_out();
                    drop(claims);
                    if let Some(uid) = requester.time.uid {
                        self.spend_write_time(uid, started.elapsed().as_nanos() as u64);
                    }
                    if timed_out && self.journal.is_stalled() {
                        return Err(Refusal::DiskStalled);
                    }
                    if timed_out && Instant::now() >= deadline {
                        return Err(Refusal::TaskBusy);
                    }
                    log::debug!("a task is in flight; deciding again");
                }
            }
        }
    }

    fn carry_out(
        &self,
        plan: Plan,
        tasks: &[ResolvedTask<P>],
        offline: &CpuSet,
        requester: &Requester,
    ) -> Result<(), Failure> {
        let waiting = requester.waiting;
        let is_single = plan.placements.len() == 1;
        let mut undo = UndoLog::default();
        let completed = match self.try_carry_out(&plan, tasks, offline, requester, &mut undo) {
            Ok(completed) => completed,
            Err(failure) => {
                self.undo(plan, undo, waiting);
                return Err(failure);
            }
        };
        reached(Step::WriteRecorded);
        self.give_back_masks(&completed.releases, waiting);
        let lost = self.settle(completed);
        reached(Step::WriteSettled);
        match lost.first() {
            // The single task that was claimed for. If there are others, they have their claims.
            Some(&dead) if is_single => Err(Setback::Died(dead).into()),
            _ => Ok(()),
        }
    }

    /// Releases the tasks of claims that are reserved for that. Never fails.
    pub(super) fn release(&self, releases: Vec<Arc<Claim>>, waiting: BlockedWriter) {
        let records = releases.iter().map(|claim| Record::Releasing { task: claim.task });
        self.journal.defer(Record::Batch(records.collect()));
        let _ = self.journal.flush();
        self.give_back_masks(&releases, waiting);
        self.settle(CompletedPlan { placements: Vec::new(), releases });
    }

    /// Gives the tasks of recorded releases their masks back.
    fn give_back_masks(&self, releases: &[Arc<Claim>], waiting: BlockedWriter) {
        if releases.is_empty() {
            return;
        }
        for claim in releases {
            // A release never fails.
            let _ = self.end_partition(claim.list);
            if let Some(process) = self.processes.watched(&claim.task) {
                self.processes.restore_mask(&process, &claim.saved, waiting);
            }
        }
        reached(Step::MasksBack);
        let released = releases.iter().map(|claim| Record::Released { task: claim.task });
        self.journal.defer(Record::Batch(released.collect()));
        self.journal.flush_deferred();
        reached(Step::ReleaseRecorded);
    }

    /// Watches the tasks, records the intents, sets the masks and records the claims. `undo` says how far that went.
    fn try_carry_out(
        &self,
        plan: &Plan,
        tasks: &[ResolvedTask<P>],
        offline: &CpuSet,
        requester: &Requester,
        undo: &mut UndoLog<P>,
    ) -> Result<CompletedPlan, Failure> {
        let mut parts = Vec::with_capacity(plan.placements.len());
        let mut setbacks = Vec::new();
        let mut tasks = tasks.iter();
        for placement in &plan.placements {
            requester.check_time()?;
            // The placements have the order of the tasks.
            let found = tasks.find(|one| one.info.task == placement.task);
            let ResolvedTask { process, extent, .. } = found.ok_or(Setback::Died(placement.task))?;
            let draft = self
                .check_online(placement, offline)
                .and_then(|()| self.draft_claim(placement, process, requester));
            match draft {
                Ok(draft) => parts.push((placement, process, extent.clone(), draft)),
                Err(failure) => add_setbacks(&mut setbacks, failure)?,
            }
        }
        if !setbacks.is_empty() {
            return Err(Failure::Setbacks(setbacks));
        }
        let changes = || parts.iter().filter(|(placement, ..)| placement.is_change());
        if changes().next().is_some() {
            let intents = changes().map(|(.., claim)| Record::Intent(claim.clone())).collect();
            self.journal.append(&Record::Batch(intents)).map_err(not_recorded)?;
            undo.intents.extend(changes().map(|(placement, ..)| placement.task));
            reached(Step::IntentRecorded);
        }
        let mut completed = CompletedPlan { placements: Vec::new(), releases: plan.releases.clone() };
        for (placement, process, mut extent, draft) in parts {
            if undo.masks.len() + setbacks.len() > 0 {
                requester.check_time()?;
            }
            if let ClaimKind::Move { from, .. } = placement.kind
                && self.isolation.has(from)
            {
                // A whole cgroup moves with the task.
                let before = self.isolation.extent(from);
                if before != Extent::Task {
                    extent = before.clone();
                }
                undo.left.push((from, before));
                self.end_partition(from).map_err(self.fault("removing the partition of the task"))?;
            }
            let usable = self.usable(placement, offline);
            let set = || self.set_masks(placement, process, draft.clone(), &usable, requester.waiting);
            let mut set_masks = set();
            if matches!(set_masks, Err(MaskError::Refused | MaskError::Narrowed { .. }))
                && placement.is_change()
                && let Some(partition) = self.leave_partition(process)?
            {
                undo.moved_out.push((placement.task, partition));
                set_masks = set();
            }
            match set_masks {
                Ok((claim, previous)) => {
                    undo.masks.push((placement.task, previous));
                    if placement.is_change() {
                        self.note_program(process);
                    }
                    completed.placements.push(placement.complete(claim));
                    match self.isolate_placement(placement, process, &extent) {
                        Ok(false) => {}
                        Ok(true) => undo.isolated.push(placement.list),
                        Err(failure) => add_setbacks(&mut setbacks, failure)?,
                    }
                }
                Err(error) => {
                    let failure = self.mask_failure(error, placement, requester.caller, requester.time);
                    add_setbacks(&mut setbacks, failure)?;
                }
            }
        }
        if !setbacks.is_empty() {
            return Err(Failure::Setbacks(setbacks));
        }
        reached(Step::MasksSet);
        self.record(plan, &completed, requester.caller.request)?;
        Ok(completed)
    }

    /// Returns the claim of a placement as far as it is known before the task is touched. Watches a new task.
    fn draft_claim(
        &self,
        placement: &Placement,
        process: &Arc<ProcessOf<P>>,
        requester: &Requester,
    ) -> Result<Arc<Claim>, Failure> {
        let pending = match &placement.kind {
            ClaimKind::New(pending) => pending,
            ClaimKind::Move { to: claim, .. } | ClaimKind::Repeat(claim) => return Ok(claim.clone()),
        };
        let cgroup = self.processes.cgroup(process).ok_or(Setback::Died(placement.task))?;
        let saved = self
            .processes
            .saved_mask(process)
            .map_err(|error| self.mask_failure(error, placement, requester.caller, requester.time))?;
        self.processes.watch(Arc::clone(process)).map_err(self.fault("watching the task"))?;
        Ok(Arc::new(pending.complete(saved, cgroup)))
    }

    /// Sets the masks of one task. Returns its final claim and the masks that it had.
    fn set_masks(
        &self,
        placement: &Placement,
        process: &ProcessOf<P>,
        draft: Arc<Claim>,
        cpus: &CpuSet,
        waiting: BlockedWriter,
    ) -> Result<(Arc<Claim>, <P::Processes as Masks>::SavedMasks), MaskError> {
        let (claim, previous) = match placement.kind {
            ClaimKind::New(_) => {
                let (saved, previous) =
                    self.processes.set_first_mask(process, cpus, draft.saved.clone(), waiting)?;
                (with_saved(draft, saved), previous)
            }
            ClaimKind::Move { from, .. } => {
                let own = self.configuration().list(from).map(|list| list.cpus().clone());
                let own = own.as_ref().unwrap_or(cpus);
                (draft, self.processes.set_mask(process, cpus, own, Threads::All, waiting)?)
            }
            ClaimKind::Repeat(_) => {
                (draft, self.processes.set_mask(process, cpus, cpus, Threads::OnlyStrays, waiting)?)
            }
        };
        Ok((claim, previous))
    }

    /// Isolates the list of a task that was not on it before, if its pool is isolated. Returns whether it is.
    fn isolate_placement(
        &self,
        placement: &Placement,
        process: &Arc<ProcessOf<P>>,
        extent: &Extent,
    ) -> Result<bool, Failure> {
        if !placement.is_change() || !self.configuration().is_isolated(placement.list) {
            return Ok(false);
        }
        match self.isolate(placement.list, &placement.cpus, process, extent) {
            Ok(()) => Ok(true),
            Err(NotIsolated::Journal(error)) => Err(not_recorded(error).into()),
            Err(NotIsolated::Partition(error)) => Err(match error {
                PartitionError::Gone => Setback::Died(placement.task).into(),
                PartitionError::Missing(missing) => Refusal::CannotIsolate { missing }.into(),
                PartitionError::Unsuitable { path, why } => Refusal::UnsuitableCgroup { path, why }.into(),
                PartitionError::Refused(why) => {
                    self.unsuitable(placement, |list| Refusal::PartitionRefused { list, why })
                }
            }),
        }
    }

    /// Returns the CPUs of a list for a mask: those that are online, if there are any and if its pool allows a part.
    pub(super) fn usable(&self, placement: &Placement, offline: &CpuSet) -> CpuSet {
        let cpus = &placement.cpus;
        let online = cpus.difference(offline);
        let whole = online.is_empty() || online == *cpus || !self.serves_partly(placement.list);
        if whole { cpus.clone() } else { online }
    }

    fn serves_partly(&self, list: ListId) -> bool {
        let claims = self.configuration();
        let pool = claims.list(list).and_then(|list| claims.pool(list.pool()));
        pool.is_some_and(|pool| pool.serves_partly())
    }

    /// Checks that a list has the CPUs for a new task. The kernel would tell, too, but only after the task was touched, and
    /// before Linux 6.2 the mask that it had could not be restored.
    fn check_online(&self, placement: &Placement, offline: &CpuSet) -> Result<(), Failure> {
        let offline = placement.cpus.intersection(offline);
        if offline.is_empty() || !placement.is_change() || self.serves_partly(placement.list) {
            return Ok(());
        }
        Err(self.unsuitable(placement, |list| Refusal::Offline { list, offline }))
    }

    /// Returns that the list of a placement does not suit its task.
    fn unsuitable(&self, placement: &Placement, why: impl FnOnce(ListName) -> Refusal) -> Failure {
        let name = self.configuration().list(placement.list).map(|list| list.name().clone());
        Setback::Unsuitable(placement.task, placement.list, name.map_or(Refusal::Removed, why)).into()
    }

    /// Records the claims and the releases of a plan, together with the fact that the request is carried out: if the
    /// request comes again, it finds both or neither.
    fn record(&self, plan: &Plan, completed: &CompletedPlan, request: u64) -> Result<(), Refusal> {
        let claims = completed.changes().map(|claim| Record::Claimed(claim.clone()));
        let releases = completed.releases.iter().map(|claim| Record::Releasing { task: claim.task });
        let mut records: Vec<Record> = claims.chain(releases).collect();
        if records.is_empty() {
            return Ok(());
        }
        records.extend(answered(request));
        let records = Record::Batch(records);
        if plan.changes().next().is_some() {
            return self.journal.append(&records).map_err(not_recorded);
        }
        // A release never fails. If its record cannot be written now, it is written later.
        self.journal.defer(records);
        let _ = self.journal.flush();
        Ok(())
    }

    /// Undoes what was done for a plan, the last step first.
    pub(super) fn undo(&self, plan: Plan, undo: UndoLog<P>, waiting: BlockedWriter) {
        for list in undo.isolated {
            let _ = self.end_partition(list);
        }
        for (task, previous) in undo.masks.into_iter().rev() {
            if let Some(process) = self.processes.watched(&task) {
                self.processes.undo(&process, previous, waiting);
            }
        }
        for (task, partition) in undo.moved_out {
            if let Some(process) = self.processes.watched(&task) {
                self.return_to_partition(&process, &partition);
            }
        }
        if !undo.intents.is_empty() {
            let records = undo.intents.iter().map(|&task| Record::Abandoned { task }).collect();
            self.journal.defer(Record::Batch(records));
        }
        let new: Vec<TaskId> = plan.placements.iter().filter(|p| p.is_new()).map(|p| p.task).collect();
        let mut claims = self.claims.lock();
        let _ = claims.apply(Command::Abandon(plan));
        for task in new {
            self.processes.unwatch(&task);
            self.programs.forget(&task);
        }
        drop(claims);
        self.plan_finished.notify_all();
        if !undo.left.is_empty() {
            // The tasks stay on their lists, which have to be isolated again.
            self.isolation.expect(undo.left);
            self.check_partitions();
        }
    }

    /// Puts a plan into effect. Returns the tasks that have died meanwhile.
    pub(super) fn settle(&self, plan: CompletedPlan) -> Vec<TaskId> {
        let released: Vec<TaskId> = plan.releases.iter().map(|claim| claim.task).collect();
        let recorded: HashSet<TaskId> = plan.changes().map(|claim| claim.task).collect();
        let mut claims = self.claims.lock();
        // Settling is never rejected.
        let effects = claims.apply(Command::Settle(plan)).unwrap_or_default();
        self.publish(&claims, &effects);
        for task in released.iter().chain(&effects.lost) {
            self.processes.unwatch(task);
            self.programs.forget(task);
        }
        // Their claims were recorded after their deaths.
        for &task in effects.lost.iter().filter(|task| recorded.contains(task)) {
            self.journal.defer(Record::Ended { task, reclaimed: None });
        }
        drop(claims);
        self.plan_finished.notify_all();
        effects.lost
    }

    /// Maps an error of a mask to what it means for the placement.
    pub(super) fn mask_failure(
        &self,
        error: MaskError,
        placement: &Placement,
        caller: Caller,
        time: Allowance,
    ) -> Failure {
        let uid = caller.uid;
        let got = match error {
            MaskError::Gone => return Setback::Died(placement.task).into(),
            MaskError::KeepsChanging => return Refusal::KeepsChanging.into(),
            MaskError::Unsettled => return time.unsettled(caller).into(),
            MaskError::OutOfTime => return Refusal::OutOfTime { uid }.into(),
            MaskError::Refused => None,
            MaskError::Narrowed { got } => Some(got),
            MaskError::Other(error) => {
                log::warn!("setting or reading a mask: {error}");
                return Failure::Refused(match error.raw_os_error() {
                    // kernel/sched/deadline.c, `dl_task_check_affinity`.
                    Some(libc::EBUSY) => Refusal::Deadline,
                    Some(libc::EPERM) => Refusal::DaemonLacks { capability: "CAP_SYS_NICE" },
                    _ => {
                        let errno = Errno::EIO;
                        Refusal::Fault { what: "setting or reading the mask", errno }
                    }
                });
            }
        };
        self.unsuitable(placement, |list| Refusal::MaskRefused { list, got })
    }
}

/// Adds the setbacks of one task to the setbacks of the others.
fn add_setbacks(setbacks: &mut Vec<Setback>, failure: Failure) -> Result<(), Refusal> {
    match failure {
        Failure::Setbacks(more) => {
            setbacks.extend(more);
            Ok(())
        }
        Failure::Refused(refusal) => Err(refusal),
    }
}

/// Changes a request so that its next plan does not have these setbacks.
///
/// # Errors
/// There is no other plan: the request names the list.
fn learn(request: &mut Request, setbacks: Vec<Setback>) -> Result<(), Refusal> {
    let mut dead = HashSet::new();
    for setback in setbacks {
        match (setback, request.target) {
            (Setback::Died(task), _) => {
                log::debug!("task {} has died in the middle of its claim", task.pid);
                dead.insert(task);
            }
            (Setback::Unsuitable(_, _, refusal), Target::List(_)) => return Err(refusal),
            (Setback::Unsuitable(task, list, refusal), Target::Pool(_)) => {
                log::debug!("task {}: {}; trying another list", task.pid, refusal.sentence(""));
                request.unsuitable.insert((task, list));
            }
        }
    }
    request.claim.retain(|info| !dead.contains(&info.task));
    Ok(())
}

/// Returns the claim with this saved mask.
fn with_saved(claim: Arc<Claim>, saved: SavedMask) -> Arc<Claim> {
    if claim.saved == saved { claim } else { Arc::new(Claim { saved, ..Claim::clone(&claim) }) }
}

/// Maps a failed append to a refusal.
pub(super) fn not_recorded(error: AppendError) -> Refusal {
    match error {
        AppendError::Stalled => Refusal::DiskStalled,
        AppendError::Io(error) => match Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)) {
            Errno::ENOSPC | Errno::EDQUOT => Refusal::JournalFull,
            errno => Refusal::CannotRecord { errno },
        },
    }
}
