//! What one write would do, without doing it.
//!
//! Owns: the rules of claiming, moving and releasing: who may, which list, and whether there is room.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{Claims, Stage, new_not_by_root};
use crate::model::command::{Claim, ClaimKind, Placement, Plan, Request, SavedMask, Target, TaskInfo};
use crate::model::pool::{Exclusivity, ListId, PoolId};
use crate::model::refusal::Refusal;
use crate::model::task::TaskId;

impl Claims {
    pub(super) fn decide(&self, request: &Request) -> Result<Plan, Refusal> {
        for info in request.claim.iter().chain(&request.release) {
            may(info, &request.users)?;
        }
        let leaving: BTreeSet<TaskId> = request.release.iter().map(|info| info.task).collect();
        if request.claim.iter().any(|info| leaving.contains(&info.task)) {
            return Err(Refusal::Contradiction);
        }
        if request.claim.iter().chain(&request.release).any(|info| self.is_in_flight(&info.task)) {
            return Err(Refusal::TaskBusy);
        }
        self.check_target(request)?;
        let mut plan = Plan::default();
        plan.releases.extend(
            leaving
                .iter()
                .filter_map(|task| self.claim(task))
                .filter(|claim| self.is_on(claim, &request.target))
                .cloned(),
        );
        let leaving: BTreeSet<TaskId> = plan.releases.iter().map(|claim| claim.task).collect();
        for info in &request.claim {
            let list = match &request.target {
                Target::List(id) => self.check_list(*id, info.task, &leaving, request.now)?,
                Target::Pool(pool) => self.choose(*pool, info.task, &leaving, &plan, request)?,
            };
            plan.placements.push(self.place(info, list, request)?);
        }
        self.check_room(&plan)?;
        Ok(plan)
    }

    fn check_target(&self, request: &Request) -> Result<(), Refusal> {
        match &request.target {
            Target::List(id) => {
                let list =
                    self.lists.get(id).filter(|list| list.stage == Stage::Open).ok_or(Refusal::Removed)?;
                if request.claim.len() > 1 && self.exclusivity(*id) == Some(Exclusivity::Exclusive) {
                    return Err(Refusal::TwoNamed { list: list.name.clone() });
                }
                Ok(())
            }
            Target::Pool(pool) => self.pools.get(pool).map(|_| ()).ok_or(Refusal::Removed),
        }
    }

    fn is_on(&self, claim: &Claim, target: &Target) -> bool {
        match target {
            Target::List(id) => claim.list == *id,
            Target::Pool(pool) => self.lists.get(&claim.list).is_some_and(|list| list.pool == *pool),
        }
    }

    /// The list, if the task may be on it.
    pub(super) fn check_list(
        &self,
        id: ListId,
        task: TaskId,
        leaving: &BTreeSet<TaskId>,
        now: u64,
    ) -> Result<ListId, Refusal> {
        let list = self.lists.get(&id).ok_or(Refusal::Removed)?;
        if self.exclusivity(id) == Some(Exclusivity::Exclusive) {
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

    /// The list of the pool on which the task is, or the best one for it.
    fn choose(
        &self,
        id: PoolId,
        task: TaskId,
        leaving: &BTreeSet<TaskId>,
        plan: &Plan,
        request: &Request,
    ) -> Result<ListId, Refusal> {
        let pool = self.pools.get(&id).ok_or(Refusal::Removed)?;
        let suits = |id: &ListId| !request.unsuitable.contains(&(task, *id));
        if let Some(claim) = self.claim(&task).filter(|claim| self.is_on(claim, &request.target)) {
            // It keeps its list; no other is tried, and this one not twice.
            let refused = || Refusal::NoneSuits { pool: pool.name.clone() };
            return Some(claim.list).filter(suits).ok_or_else(refused);
        }
        let pending = |id: ListId| {
            plan.placements
                .iter()
                .filter(|place| place.claim.list == id && place.kind != ClaimKind::Repeat)
                .count()
        };
        let open = pool
            .lists()
            .filter_map(|id| Some((id, self.lists.get(&id).filter(|list| list.stage == Stage::Open)?)));
        let (found, any) = match pool.exclusivity {
            Exclusivity::Exclusive => {
                let mut free = open
                    .filter(|(id, list)| list.other_task(leaving).is_none() && pending(*id) == 0)
                    .peekable();
                let any = free.peek().is_some();
                (free.map(|(id, _)| id).find(suits), any)
            }
            Exclusivity::Shared => {
                let mut all = open.peekable();
                let any = all.peek().is_some();
                let least = all
                    .filter(|(id, _)| suits(id))
                    .min_by_key(|(id, list)| list.task_count(leaving) + pending(*id));
                (least.map(|(id, _)| id), any)
            }
        };
        found.ok_or_else(|| {
            let pool_name = pool.name.clone();
            if any {
                Refusal::NoneSuits { pool: pool_name }
            } else {
                Refusal::NoneFree { pool: pool_name, lists: pool.lists.len() }
            }
        })
    }

    fn place(&self, info: &TaskInfo, id: ListId, request: &Request) -> Result<Placement, Refusal> {
        let list = self.lists.get(&id).ok_or(Refusal::Removed)?;
        let old = self.claim(&info.task);
        let kind = match old {
            None => ClaimKind::New,
            Some(old) if old.list == id => ClaimKind::Repeat,
            Some(old) => ClaimKind::Move { from: old.list },
        };
        let claim = match (old, kind) {
            (Some(old), ClaimKind::Repeat) => old.clone(),
            _ => Arc::new(Claim {
                task: info.task,
                list: id,
                saved: old.map_or(SavedMask::All, |old| old.saved.clone()),
                since: request.now,
                uid: info.uids.real,
                cgroup: old.map_or(0, |old| old.cgroup),
                by_root: old.map_or(request.users == [0, 0], |old| old.by_root),
            }),
        };
        Ok(Placement { claim, cpus: list.cpus.clone(), kind })
    }

    fn check_room(&self, plan: &Plan) -> Result<(), Refusal> {
        let new = plan.placements.iter().filter(|place| place.kind == ClaimKind::New).count();
        let not_by_root = new_not_by_root(plan);
        if new > 0 && self.tasks.len() + new > self.limit {
            return Err(Refusal::TooMany { limit: self.limit });
        }
        if not_by_root > 0 && self.not_by_root + not_by_root > self.limit / 2 {
            return Err(Refusal::TooMany { limit: self.limit / 2 });
        }
        Ok(())
    }
}

/// The rule of cgroup v1: root, or a user whose effective uid is the task's real or saved one. The file's
/// opener has to pass as well as the writer: else a program with more rights could be made to write for
/// somebody with fewer (CVE-2021-4197).
fn may(info: &TaskInfo, users: &[u32]) -> Result<(), Refusal> {
    let owns = |uid: u32| uid == 0 || uid == info.uids.real || uid == info.uids.saved;
    if let Some(&uid) = users.iter().find(|&&uid| !owns(uid)) {
        return Err(Refusal::NotPermitted { uid });
    }
    if info.kernel_thread {
        return Err(Refusal::KernelThread);
    }
    if info.ours {
        return Err(Refusal::OwnProcess);
    }
    Ok(())
}
