//! The decision on a write, without carrying it out.
//!
//! Owns the rules of claiming, moving and releasing: who may, which list, and whether there is room. Does not
//! know how a plan is carried out.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use super::{Claims, List, Pool, Stage, new_not_by_root};
use crate::model::command::{
    Claim, ClaimKind, PendingClaim, Placement, Plan, Rejected, Request, Target, TaskInfo,
};
use crate::model::cpuset::CpuSet;
use crate::model::pool::{Exclusivity, ListId, PoolId};
use crate::model::refusal::Refusal;
use crate::model::rights::{self, Uids, User};
use crate::model::task::TaskId;

/// The tasks that a write brings to the lists of its pool, so far. A command may name thousands of tasks, so nothing is
/// counted again for each.
#[derive(Debug, Default)]
struct Loads {
    pending: HashMap<ListId, usize>,
    /// For a shared pool: its open lists, each with all its tasks.
    shared: Option<Vec<(ListId, usize)>>,
}

impl Loads {
    fn add(&mut self, list: ListId) {
        *self.pending.entry(list).or_default() += 1;
        let mut lists = self.shared.iter_mut().flatten();
        lists.find(|(id, _)| *id == list).into_iter().for_each(|(_, tasks)| *tasks += 1);
    }
}

impl Claims {
    pub(super) fn decide(&self, request: &Request) -> Result<Plan, Rejected> {
        for info in request.claim.iter().chain(&request.release) {
            check_permission(info, request.users)?;
        }
        let leaving: BTreeSet<TaskId> = request.release.iter().map(|info| info.task).collect();
        if request.claim.iter().any(|info| leaving.contains(&info.task)) {
            return Err(Refusal::Contradiction.into());
        }
        if request.claim.iter().chain(&request.release).any(|info| self.is_in_flight(&info.task)) {
            return Err(Rejected::Busy);
        }
        self.check_target(request)?;
        let claims = leaving.iter().filter_map(|task| self.claim(task));
        let releases = claims.filter(|claim| self.is_on(claim, request.target)).cloned().collect();
        let mut plan = Plan { releases, ..Plan::default() };
        let leaving: BTreeSet<TaskId> = plan.releases.iter().map(|claim| claim.task).collect();
        let mut loads = Loads::default();
        for info in &request.claim {
            let list = match request.target {
                Target::List(id) => {
                    let id = self.check_list(id, info.task, &leaving, request.now)?;
                    self.check_turn(id, info.task, &loads, request)?;
                    id
                }
                Target::Pool(pool) => self.choose(pool, info.task, &leaving, &mut loads, request)?,
            };
            let placement = self.placement(info, list, request)?;
            if placement.is_change() {
                loads.add(list);
            }
            plan.placements.push(placement);
        }
        self.check_room(&plan)?;
        Ok(plan)
    }

    fn check_target(&self, request: &Request) -> Result<(), Rejected> {
        let pool = self.pool_of(request.target);
        if !request.claim.is_empty() && pool.is_some_and(|pool| pool.coming_mode.is_some()) {
            return Err(Rejected::Busy);
        }
        match request.target {
            Target::List(id) => {
                let list =
                    self.lists.get(&id).filter(|list| list.stage == Stage::Open).ok_or(Refusal::Removed)?;
                if !request.claim.is_empty() && list.changing {
                    return Err(Rejected::Busy);
                }
                if list.draining && request.claim.iter().any(|info| !list.tasks.contains(&info.task)) {
                    return Err(Refusal::Draining { list: list.name.clone() }.into());
                }
                if request.claim.len() > 1 && self.admits_one(list) {
                    return Err(Refusal::TwoNamed { list: list.name.clone() }.into());
                }
                Ok(())
            }
            Target::Pool(pool) => self.pools.get(&pool).map(|_| ()).ok_or(Refusal::Removed.into()),
        }
    }

    fn pool_of(&self, target: Target) -> Option<&Pool> {
        self.pools.get(&match target {
            Target::List(id) => self.lists.get(&id)?.pool,
            Target::Pool(pool) => pool,
        })
    }

    fn is_on(&self, claim: &Claim, target: Target) -> bool {
        match target {
            Target::List(id) => claim.list == id,
            Target::Pool(pool) => self.lists.get(&claim.list).is_some_and(|list| list.pool == pool),
        }
    }

    /// Returns the list if it has room for the task.
    pub(super) fn check_list(
        &self,
        id: ListId,
        task: TaskId,
        leaving: &BTreeSet<TaskId>,
        now: u64,
    ) -> Result<ListId, Refusal> {
        let list = self.lists.get(&id).ok_or(Refusal::Removed)?;
        if self.admits_one(list) {
            let mut excluding = leaving.clone();
            excluding.insert(task);
            if let Some(holder) = list.other_task(&excluding) {
                let free = self.pools.get(&list.pool).and_then(|pool| self.free_list(pool));
                return Err(Refusal::Held {
                    list: list.name.clone(),
                    holder: self.holder(holder, id, now),
                    free,
                });
            }
        }
        Ok(id)
    }

    /// Returns the list of the pool that the task is on, or else the best one for it.
    fn choose(
        &self,
        id: PoolId,
        task: TaskId,
        leaving: &BTreeSet<TaskId>,
        loads: &mut Loads,
        request: &Request,
    ) -> Result<ListId, Rejected> {
        let pool = self.pools.get(&id).ok_or(Refusal::Removed)?;
        let suits = |id: &ListId| !request.unsuitable.contains(&(task, *id));
        if let Some(claim) = self.claim(&task).filter(|claim| self.is_on(claim, request.target)) {
            // The task keeps its list. If the kernel has refused that list, no other one is tried.
            let refused = || Refusal::NoneSuits { pool: pool.name.clone() };
            return Some(claim.list).filter(suits).ok_or_else(|| refused().into());
        }
        if pool.strictest() == Exclusivity::Exclusive {
            self.check_before(id, loads, request)?;
        }
        let Loads { pending, shared } = loads;
        let pending = |id: ListId| pending.get(&id).copied().unwrap_or(0);
        let lists = || pool.lists().filter_map(|id| Some((id, self.lists.get(&id)?)));
        let open = lists().filter(|(_, list)| list.is_open());
        let (found, any) = match pool.strictest() {
            Exclusivity::Exclusive => {
                let mut free = open
                    .filter(|(id, list)| list.other_task(leaving).is_none() && pending(*id) == 0)
                    .peekable();
                let any = free.peek().is_some();
                // A list on which somebody else is pinned is the last choice.
                let mut last = None;
                let serves = |list: &List| pool.can_serve(&list.cpus, &request.offline);
                let found = free.filter(|(id, list)| suits(id) && serves(list)).find(|(id, list)| {
                    if list.has_intruders {
                        last.get_or_insert(*id);
                    }
                    !list.has_intruders
                });
                (found.map(|(id, _)| id).or(last), any)
            }
            Exclusivity::Shared => {
                let counted = |(id, list): (ListId, &List)| (id, list.task_count(leaving) + pending(id));
                let loads = shared.get_or_insert_with(|| open.map(counted).collect());
                let least = loads.iter().filter(|(id, _)| suits(id)).min_by_key(|(_, tasks)| *tasks);
                (least.map(|(id, _)| *id), !loads.is_empty())
            }
        };
        found.ok_or_else(|| {
            let pool_name = pool.name.clone();
            if lists().any(|(_, list)| list.changing) {
                Rejected::Busy
            } else if any {
                Refusal::NoneSuits { pool: pool_name }.into()
            } else {
                let draining = lists().filter(|(_, list)| list.draining && list.is_free()).count();
                let longest = self.longest_holder(pool, request.now);
                let taken = pool.lists.len() - draining;
                Refusal::NoneFree { pool: pool_name, taken, draining, longest }.into()
            }
        })
    }

    /// Checks that the task may have the list although others wait for one of its pool.
    fn check_turn(&self, id: ListId, task: TaskId, loads: &Loads, request: &Request) -> Result<(), Refusal> {
        let Some(pool) = self.lists.get(&id).map(|list| list.pool) else { return Ok(()) };
        let stays = self.claim(&task).is_some_and(|claim| self.is_on(claim, Target::Pool(pool)));
        if stays { Ok(()) } else { self.check_before(pool, loads, request) }
    }

    /// Checks that there are more free lists than tasks that wait before those of the request.
    fn check_before(&self, id: PoolId, loads: &Loads, request: &Request) -> Result<(), Refusal> {
        let Some(pool) = self.pools.get(&id).filter(|_| request.before > 0) else { return Ok(()) };
        let room = self.room(id, &request.offline).saturating_sub(loads.pending.len());
        if room == 0 || room > request.before {
            return Ok(());
        }
        Err(Refusal::OthersWait { pool: pool.name.clone(), before: request.before })
    }

    /// Returns how many tasks the pool has room for: its free lists that can serve. A shared pool has room for any number.
    pub(crate) fn room(&self, id: PoolId, offline: &CpuSet) -> usize {
        let Some(pool) = self.pools.get(&id) else { return 0 };
        if pool.strictest() == Exclusivity::Shared {
            return usize::MAX;
        }
        let free =
            pool.lists().filter_map(|id| self.lists.get(&id)).filter(|it| it.is_free() && it.is_open());
        free.filter(|list| pool.can_serve(&list.cpus, offline)).count()
    }

    fn placement(&self, info: &TaskInfo, id: ListId, request: &Request) -> Result<Placement, Refusal> {
        let list = self.lists.get(&id).ok_or(Refusal::Removed)?;
        let (task, since, uids) = (info.task, request.now, info.uids);
        let kind = match self.claim(&task) {
            None => {
                let [opener, writer] = request.users;
                // The uid 0 of a container has a share of the limit like all other users.
                let by_root = opener.uid == 0 && opener.admin && writer.uid == 0;
                ClaimKind::New(PendingClaim { task, list: id, since, uids, by_root })
            }
            Some(old) if old.list == id => ClaimKind::Repeat(old.clone()),
            Some(old) => {
                let to = Arc::new(moved(old, id, since, uids));
                ClaimKind::Move { from: old.list, to }
            }
        };
        Ok(Placement { task, list: id, cpus: list.cpus.clone(), kind })
    }

    fn check_room(&self, plan: &Plan) -> Result<(), Refusal> {
        let new = plan.placements.iter().filter(|placement| placement.is_new()).count();
        let not_by_root = new_not_by_root(plan);
        if new > 0 && self.count_known() + new > self.limit {
            return Err(Refusal::TooMany { limit: self.limit });
        }
        if not_by_root > 0 && self.not_by_root + not_by_root > self.limit / 2 {
            return Err(Refusal::TooMany { limit: self.limit / 2 });
        }
        Ok(())
    }
}

/// Returns the claim of a task that moves. Its kin are known by what it is now, and by what it was before.
fn moved(old: &Claim, list: ListId, since: u64, uids: Uids) -> Claim {
    let mut kin = old.kin.clone();
    kin.add_user(old.uid);
    kin.any_user |= old.uid == 0 || uids.real != old.uid || uids.may_be_root();
    Claim { list, since, uid: uids.real, kin, ..Claim::clone(old) }
}

/// Checks that the opener and the writer may claim for the process and release it, and that it can be claimed.
pub(crate) fn check_permission(info: &TaskInfo, users: [User; 2]) -> Result<(), Refusal> {
    rights::check(users, info.uids, info.access)?;
    if info.kernel_thread {
        return Err(Refusal::KernelThread);
    }
    if info.ours {
        return Err(Refusal::OwnProcess);
    }
    Ok(())
}
