//! What is told to the claim machine, and what it tells: requests and commands in, plans and changes out.
//!
//! Owns: the words between the machine and those who carry its decisions out. Must not know: any rule.

use std::sync::Arc;

use super::cpuset::CpuSet;
use super::pool::{Exclusivity, ListId, PoolId, PoolName};
use super::task::TaskId;

/// The affinity that a task gets back when its claim is released.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SavedMask {
    /// All CPUs: it had all that its cpuset allowed, and so follows its cpuset again.
    All,
    /// Just these.
    Cpus(CpuSet),
}

/// The fact that one task is on one CPU list. Shared by the machine and the log, both of which keep it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Who.
    pub task: TaskId,
    /// On which list.
    pub list: ListId,
    /// What its leader's mask was before its first claim.
    pub saved: SavedMask,
    /// When the claim was made, in nanoseconds since boot (`CLOCK_BOOTTIME`).
    pub since: u64,
    /// The real uid of the task when it was claimed: heirs must have it too.
    pub uid: u32,
    /// A number for its cgroup when it was claimed: heirs must have it too.
    pub cgroup: u64,
    /// Whether root asked for it (the others share half of what the daemon can watch).
    pub by_root: bool,
}

/// The user ids of a process (credentials(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uids {
    /// The real one.
    pub real: u32,
    /// The effective one.
    pub effective: u32,
    /// The saved one.
    pub saved: u32,
}

/// A living process that a write names.
#[derive(Clone, Debug)]
pub struct TaskInfo {
    /// Which.
    pub task: TaskId,
    /// Whose.
    pub uids: Uids,
    /// Whether it is a thread of the kernel.
    pub kernel_thread: bool,
    /// Whether it is the daemon.
    pub ours: bool,
}

/// A living process that may be the heir of a dead one.
#[derive(Clone, Debug)]
pub struct HeirCandidate {
    /// Who.
    pub info: TaskInfo,
    /// A number for its cgroup.
    pub cgroup: u64,
    /// When it started, in clock ticks since boot.
    pub started: u64,
    /// Its leader's mask.
    pub mask: CpuSet,
}

/// Which file was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// The `tasks` file of a list.
    List(ListId),
    /// The `tasks` file of a pool: any list of it.
    Pool(PoolId),
}

/// One write, with all that has to be known to decide it.
#[derive(Clone, Debug)]
pub struct Request {
    /// The file.
    pub target: Target,
    /// The processes to claim for, each once.
    pub claim: Vec<TaskInfo>,
    /// The processes whose claim is to end, each once.
    pub release: Vec<TaskInfo>,
    /// The users who must have the right: who opened the file, and who writes.
    pub users: [u32; 2],
    /// Lists on which the kernel has let a task not be, in an earlier try of the same write.
    pub unsuitable: Vec<(TaskId, ListId)>,
    /// Nanoseconds since boot.
    pub now: u64,
}

/// What is applied to [`Claims`](super::claims::Claims).
#[derive(Clone, Debug)]
pub enum Command {
    /// Decide a write. What has to be done for it is in [`Effects::plan`].
    Write(Request),
    /// The plan has been carried out.
    Settle(Plan),
    /// The plan has been undone.
    Abandon(Plan),
    /// The task is dead. Its claim passes to the heir, or ends.
    End {
        /// The dead one.
        task: TaskId,
        /// The process that inherits, where there is one.
        heir: Option<TaskInfo>,
    },
    /// A claim that an earlier daemon recorded is taken up again.
    Restore(Arc<Claim>),
    /// A new pool, without lists.
    AddPool {
        /// Its number.
        id: PoolId,
        /// Its name.
        name: PoolName,
        /// How many tasks a list of it takes.
        exclusivity: Exclusivity,
    },
    /// A pool without lists goes away.
    RemovePool(PoolId),
    /// A new list; nobody gets on it before [`Command::OpenList`].
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
    /// The list may be claimed.
    OpenList(ListId),
    /// The list, on which nobody is, may not be claimed any more.
    CloseList {
        /// Which.
        id: ListId,
        /// Nanoseconds since boot.
        now: u64,
    },
    /// A closed list goes away.
    RemoveList(ListId),
    /// The pool becomes exclusive or shared.
    SetExclusivity {
        /// Which.
        pool: PoolId,
        /// What it becomes.
        exclusivity: Exclusivity,
    },
}

/// How a task gets onto a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClaimKind {
    /// It had no claim.
    New,
    /// It leaves another list.
    Move {
        /// Which.
        from: ListId,
    },
    /// It is there already.
    Repeat,
}

/// One task that is to be put onto one list.
#[derive(Clone, Debug)]
pub struct Placement {
    /// The claim as it will be. What has to be asked of the task itself, `saved` and `cgroup`, is not known of a
    /// new one yet: who carries out the plan fills it in.
    pub claim: Arc<Claim>,
    /// The CPUs of the list.
    pub cpus: CpuSet,
    /// From where.
    pub kind: ClaimKind,
}

/// What has to be done before a write can be answered: masks set for each place, masks given back for each
/// release. The tasks and lists in it are reserved until the plan is settled or abandoned.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Who goes where.
    pub placements: Vec<Placement>,
    /// Claims that end.
    pub releases: Vec<Arc<Claim>>,
}

/// What has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A task without a claim got one.
    Claimed(Arc<Claim>),
    /// A claim was replaced by one on another list.
    Moved {
        /// Where it was.
        from: ListId,
        /// Where it is.
        to: Arc<Claim>,
    },
    /// A living task gave its claim up.
    Released(Arc<Claim>),
    /// A dead task's claim passed on.
    Inherited {
        /// The dead one.
        from: TaskId,
        /// The claim as it is now.
        to: Arc<Claim>,
    },
    /// A dead task's claim ended.
    Ended(Arc<Claim>),
}

/// What an applied command brings about.
#[derive(Clone, Debug, Default)]
pub struct Effects {
    /// What has to be done ([`Command::Write`] alone).
    pub plan: Plan,
    /// What has changed.
    pub changes: Vec<Change>,
    /// Tasks of a settled plan that have died meanwhile and hold nothing.
    pub lost: Vec<TaskId>,
}

impl Plan {
    /// The places that bring a task onto a list on which it is not yet.
    pub fn changing(&self) -> impl Iterator<Item = &Placement> {
        self.placements.iter().filter(|place| place.kind != ClaimKind::Repeat)
    }

    /// Everyone in it.
    pub fn tasks(&self) -> impl Iterator<Item = TaskId> + '_ {
        self.placements
            .iter()
            .map(|place| place.claim.task)
            .chain(self.releases.iter().map(|claim| claim.task))
    }
}
