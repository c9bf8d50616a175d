//! The input and output of the claim machine: requests and commands in, plans and changes out.
//!
//! Owns these types. Contains no rule.
//!
//! Longer than 400 lines because the types name each other, and half of the lines say what a field means.

use std::collections::HashSet;
use std::sync::Arc;

use smallvec::{SmallVec, smallvec};

use super::cgroup::Cgroups;
use super::cpuset::CpuSet;
use super::pool::{Exclusivity, ListId, Mode, PoolId, PoolName};
use super::refusal::Refusal;
pub use super::rights::Uids;
use super::rights::{Access, User};
use super::task::TaskId;

/// The affinity that a task gets back when its claim is released.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SavedMask {
    /// All CPUs. The task had every CPU that its cpuset allows, so it follows its cpuset again.
    All,
    /// These CPUs.
    Cpus(CpuSet),
}

/// The fact that one task is on one CPU list. The claim machine and the journal share it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The task.
    pub task: TaskId,
    /// The list.
    pub list: ListId,
    /// The mask of the task's leader before its first claim.
    pub saved: SavedMask,
    /// The time of the claim, in nanoseconds since boot (`CLOCK_BOOTTIME`).
    pub since: u64,
    /// The real uid of the task at the time of the claim.
    pub uid: u32,
    /// The cgroups of the task at the time of the claim, as a number.
    pub cgroup: u64,
    /// The users, besides `uid`, whose processes may inherit it.
    pub kin: Kin,
    /// Whether root asked for it. Other users share half of the tasks that the daemon can watch.
    pub by_root: bool,
}

/// The cgroups of a process, and the number that stands for them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CgroupId {
    /// The number, by which claims of earlier versions know them.
    pub number: u64,
    /// The cgroups.
    pub cgroups: Arc<Cgroups>,
}

/// By what a process is known as one that the holder of a claim has left behind. It is passed on with the claim, so that
/// what the first holder started is known as long as the claim exists.
///
/// A claim that an earlier version recorded has the default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kin {
    /// The cgroups of the holders at the claim, and when they inherited it.
    pub cgroups: SmallVec<[Arc<Cgroups>; 2]>,
    /// The real uids of earlier holders, at the claim and at their death.
    pub users: Vec<u32>,
    /// Whether a holder was root or changed its user, so that what it left behind may be any user's.
    pub any_user: bool,
}

/// The first claim of a task, before its saved mask and its cgroup are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PendingClaim {
    /// The task.
    pub task: TaskId,
    /// The list.
    pub list: ListId,
    /// The time of the decision, in nanoseconds since boot.
    pub since: u64,
    /// The uids of the task.
    pub uids: Uids,
    /// Whether root asked for it.
    pub by_root: bool,
}

impl PendingClaim {
    /// Returns the claim with what only the task itself can tell.
    #[must_use]
    pub fn complete(&self, saved: SavedMask, cgroup: CgroupId) -> Claim {
        let Self { task, list, since, uids, by_root } = *self;
        let kin = Kin { cgroups: smallvec![cgroup.cgroups], users: Vec::new(), any_user: uids.may_be_root() };
        Claim { task, list, saved, since, uid: uids.real, cgroup: cgroup.number, kin, by_root }
    }
}

/// A live process that a write names.
#[derive(Clone, Debug)]
pub struct TaskInfo {
    /// The task.
    pub task: TaskId,
    /// Its users.
    pub uids: Uids,
    /// The facts on which the writer's right over it depends.
    pub access: Access,
    /// Whether it is a kernel thread.
    pub kernel_thread: bool,
    /// Whether it is a process of the daemon.
    pub ours: bool,
}

/// A live process that may be the heir of a dead one: some of its threads have a mask within a list.
#[derive(Clone, Debug)]
pub struct HeirCandidate {
    /// The process.
    pub info: TaskInfo,
    /// The real uids of its first thread and of the threads with these masks.
    pub users: Vec<u32>,
    /// The cgroups of its first thread and of the threads with these masks.
    pub cgroups: Vec<CgroupId>,
    /// The time of its start, in clock ticks since boot.
    pub started: u64,
    /// The masks of its threads that lie within a list.
    pub masks: Vec<CpuSet>,
}

/// A process that inherits a claim.
#[derive(Clone, Debug)]
pub struct Heir {
    /// The process.
    pub info: TaskInfo,
    /// The kin of the claim from now on.
    pub kin: Kin,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It exited with this status.
    Exited(i32),
    /// This signal killed it.
    Killed(i32),
    /// The kernel can no longer tell.
    Unknown,
}

/// The file that was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The `tasks` file of a list.
    List(ListId),
    /// The `tasks` file of a pool: any list of it.
    Pool(PoolId),
}

/// One write, with everything that its decision depends on.
#[derive(Clone, Debug)]
pub struct Request {
    /// The file.
    pub target: Target,
    /// The processes to claim for, each once.
    pub claim: Vec<TaskInfo>,
    /// The processes whose claim ends, each once.
    pub release: Vec<TaskInfo>,
    /// The users who must have the right: the opener of the file and the writer.
    pub users: [User; 2],
    /// The lists that the kernel refused for a task in an earlier attempt at the same write.
    pub unsuitable: HashSet<(TaskId, ListId)>,
    /// The CPUs that are offline. A pool offers no list that needs one of them.
    pub offline: CpuSet,
    /// How many tasks wait before these for a list of the pool. As many free lists are not for these.
    pub before: usize,
    /// Nanoseconds since boot.
    pub now: u64,
}

/// A command for [`Claims::apply`](super::claims::Claims::apply).
#[derive(Clone, Debug)]
pub enum Command {
    /// Decide a write. [`Effects::plan`] says what has to be done for it.
    Write(Request),
    /// The plan has been carried out.
    Settle(CompletedPlan),
    /// The plan has been undone.
    Abandon(Plan),
    /// The task is dead. Its claim passes to the heir, or ends.
    End {
        /// The dead task.
        task: TaskId,
        /// How it died.
        ending: Ending,
        /// The process that inherits, if there is one.
        heir: Option<Heir>,
    },
    /// Reserve a claimed task, so that nobody else sets its mask. [`Effects::plan`] has its claim as a repeated one, or
    /// nothing if it has none.
    Reserve(TaskId),
    /// Note whether processes without a claim are pinned within the list.
    NoteIntruders {
        /// The list.
        list: ListId,
        /// Whether there are any.
        present: bool,
    },
    /// Restore a claim that an earlier daemon recorded.
    Restore(Arc<Claim>),
    /// Add a pool without lists.
    AddPool {
        /// Its number.
        id: PoolId,
        /// Its name.
        name: PoolName,
        /// How many tasks each of its lists takes.
        exclusivity: Exclusivity,
    },
    /// Remove a pool that has no lists.
    RemovePool(PoolId),
    /// Add a list. It cannot be claimed before [`Command::OpenList`].
    AddList {
        /// Its pool.
        pool: PoolId,
        /// Its number.
        id: ListId,
        /// The name of its directory.
        name: String,
        /// Its CPUs.
        cpus: CpuSet,
    },
    /// Allow claims on the list.
    OpenList(ListId),
    /// Allow no more claims on the list, which must have no tasks. If `force` is set, it may have some:
    /// [`Effects::plan`] releases them.
    CloseList {
        /// The list.
        id: ListId,
        /// Whether it may have tasks.
        force: bool,
        /// Nanoseconds since boot.
        now: u64,
    },
    /// Remove a closed list.
    RemoveList(ListId),
    /// Let no new task on the list, or let new ones on it again.
    SetDraining {
        /// The list.
        list: ListId,
        /// The new value.
        draining: bool,
    },
    /// The list is going to get another name, other CPUs or another pool, for which its tasks must be suitable: let nobody
    /// in. [`Effects::plan`] has its tasks with the new CPUs if these differ.
    PrepareList {
        /// The list.
        id: ListId,
        /// How many tasks each list of its next pool takes.
        exclusivity: Exclusivity,
        /// What keeps others off the lists of its next pool.
        mode: Mode,
        /// Its next CPUs.
        cpus: CpuSet,
        /// Nanoseconds since boot.
        now: u64,
    },
    /// The list stays as it is.
    CancelList(ListId),
    /// Set pool, name and CPUs of the list.
    ChangeList {
        /// The list.
        id: ListId,
        /// Its pool.
        pool: PoolId,
        /// The name of its directory.
        name: String,
        /// Its CPUs.
        cpus: CpuSet,
    },
    /// Set the name of the pool.
    RenamePool {
        /// The pool.
        id: PoolId,
        /// Its name.
        name: PoolName,
    },
    /// A new exclusivity of the pool is going to be stored: let a task in only if the old and the new one allow it.
    PrepareExclusivity {
        /// The pool.
        pool: PoolId,
        /// The new value.
        exclusivity: Exclusivity,
    },
    /// The new exclusivity of the pool was not stored: only the old one counts.
    CancelExclusivity(PoolId),
    /// Make the pool exclusive or shared.
    SetExclusivity {
        /// The pool.
        pool: PoolId,
        /// The new value.
        exclusivity: Exclusivity,
    },
    /// Allow claims on exclusive lists with offline CPUs, or not.
    SetPartial {
        /// The pool.
        pool: PoolId,
        /// The new value.
        partial: bool,
    },
    /// Remove the lists of the pool when their last task leaves, and the pool with its last list, or not.
    SetTransient {
        /// The pool.
        pool: PoolId,
        /// The new value.
        transient: bool,
    },
    /// A new mode of the pool, which must have no tasks, is going to be stored: let nobody in.
    PrepareMode {
        /// The pool.
        pool: PoolId,
        /// The new value.
        mode: Mode,
        /// Nanoseconds since boot.
        now: u64,
    },
    /// The new mode of the pool was not stored.
    CancelMode(PoolId),
    /// Set what keeps others off the lists of the pool.
    SetMode {
        /// The pool.
        pool: PoolId,
        /// The new value.
        mode: Mode,
    },
}

/// Why a command was not applied. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rejected {
    /// Another plan names one of the tasks. Try again when that plan has been settled or abandoned.
    Busy,
    /// The command breaks a rule.
    Refused(Refusal),
}

impl From<Refusal> for Rejected {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<Rejected> for Refusal {
    /// The refusal for a caller that does not try again.
    fn from(rejected: Rejected) -> Self {
        match rejected {
            Rejected::Busy => Self::TaskBusy,
            Rejected::Refused(refusal) => refusal,
        }
    }
}

/// How a task gets onto a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClaimKind {
    /// The task has no claim yet.
    New(PendingClaim),
    /// The task moves here from another list.
    Move {
        /// The other list.
        from: ListId,
        /// The claim that replaces the one on the other list.
        to: Arc<Claim>,
    },
    /// The task is on this list already.
    Repeat(Arc<Claim>),
}

/// One task and the list that it gets.
#[derive(Clone, Debug)]
pub struct Placement {
    /// The task.
    pub task: TaskId,
    /// The list.
    pub list: ListId,
    /// The CPUs of the list.
    pub cpus: CpuSet,
    /// The origin of the task.
    pub kind: ClaimKind,
}

impl Placement {
    /// Whether the task has no claim yet.
    #[must_use]
    pub fn is_new(&self) -> bool {
        matches!(self.kind, ClaimKind::New(_))
    }

    /// Whether the task gets onto a list that it is not on yet.
    #[must_use]
    pub fn is_change(&self) -> bool {
        !matches!(self.kind, ClaimKind::Repeat(_))
    }

    /// Returns the origin of the task.
    #[must_use]
    pub fn origin(&self) -> Origin {
        match &self.kind {
            ClaimKind::New(_) => Origin::New,
            ClaimKind::Move { from, .. } => Origin::Moved { from: *from },
            ClaimKind::Repeat(_) => Origin::Unchanged,
        }
    }

    /// Returns the placement as carried out, with the claim of its task.
    #[must_use]
    pub fn complete(&self, claim: Arc<Claim>) -> CompletedPlacement {
        CompletedPlacement { claim, origin: self.origin() }
    }
}

/// The work to do before a write can be answered: set the masks of each placement, restore the masks of
/// each release. Its tasks and lists are reserved until it is settled or abandoned.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// The tasks and their lists.
    pub placements: Vec<Placement>,
    /// The claims that end.
    pub releases: Vec<Arc<Claim>>,
}

impl Plan {
    /// The placements that bring a task onto a list that it is not on yet.
    pub fn changes(&self) -> impl Iterator<Item = &Placement> {
        self.placements.iter().filter(|placement| placement.is_change())
    }

    /// Its tasks.
    pub fn tasks(&self) -> impl Iterator<Item = TaskId> + '_ {
        self.placements.iter().map(|placement| placement.task).chain(self.releases.iter().map(|c| c.task))
    }
}

/// The origin of the task of a completed placement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// It had no claim.
    New,
    /// It was on another list.
    Moved {
        /// The other list.
        from: ListId,
    },
    /// It was on the same list.
    Unchanged,
}

/// A placement whose masks are set.
#[derive(Clone, Debug)]
pub struct CompletedPlacement {
    /// The claim.
    pub claim: Arc<Claim>,
    /// The origin of its task.
    pub origin: Origin,
}

/// A plan that has been carried out.
#[derive(Clone, Debug, Default)]
pub struct CompletedPlan {
    /// The claims of the tasks.
    pub placements: Vec<CompletedPlacement>,
    /// The claims that end.
    pub releases: Vec<Arc<Claim>>,
}

impl CompletedPlan {
    /// A plan whose claims are all repeated ones.
    #[must_use]
    pub fn unchanged(plan: &Plan) -> Self {
        let claims = plan.placements.iter().filter_map(|placement| match &placement.kind {
            ClaimKind::Repeat(claim) => Some(placement.complete(Arc::clone(claim))),
            ClaimKind::New(_) | ClaimKind::Move { .. } => None,
        });
        Self { placements: claims.collect(), releases: Vec::new() }
    }

    /// The claims of tasks that were not on their list before.
    pub fn changes(&self) -> impl Iterator<Item = &Arc<Claim>> {
        let changes = self.placements.iter().filter(|placement| placement.origin != Origin::Unchanged);
        changes.map(|placement| &placement.claim)
    }
}

/// A change of who holds what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A task without a claim got one.
    Claimed(Arc<Claim>),
    /// A claim was replaced by one on another list.
    Moved {
        /// The list before.
        from: ListId,
        /// The claim now.
        to: Arc<Claim>,
    },
    /// The claim of a live task ended.
    Released(Arc<Claim>),
    /// The claim of a dead task passed to its heir.
    Inherited {
        /// The dead task.
        from: TaskId,
        /// The claim now.
        to: Arc<Claim>,
    },
    /// The claim of a task that exited ended.
    Ended(Arc<Claim>),
    /// The claim of a task that was killed ended.
    Reclaimed(Arc<Claim>),
    /// The claim of a dead task ended, and the kernel can no longer tell whether it exited or was killed.
    Died(Arc<Claim>),
}

/// The effects of an applied command.
#[derive(Clone, Debug, Default)]
pub struct Effects {
    /// The work to do; only for [`Command::Write`], and for commands that say so.
    pub plan: Plan,
    /// The changes.
    pub changes: Vec<Change>,
    /// Tasks of a settled plan that have died meanwhile and hold nothing.
    pub lost: Vec<TaskId>,
}
