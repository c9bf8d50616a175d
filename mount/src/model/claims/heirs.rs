//! Who inherits the claim of a dead task, and who is only in the way.
//!
//! Owns these rules. Does not know how processes are found.

use std::sync::Arc;

use crate::model::cgroup::Cgroups;
use crate::model::command::{CgroupId, Claim, Heir, HeirCandidate, Kin};
use crate::model::cpuset::CpuSet;

/// How many users and how many cgroups a claim remembers of its earlier holders. A claim that passes through more of
/// them forgets the last one each time, not the first.
const REMEMBERED: usize = 8;

/// A claim whose holder is dead, with what the decision depends on.
#[derive(Clone, Copy, Debug)]
pub struct ListToPassOn<'a> {
    /// The claim.
    pub claim: &'a Claim,
    /// The real uid of the holder at its death, if the kernel can still tell.
    pub user_at_death: Option<u32>,
    /// The CPUs of the list.
    pub cpus: &'a CpuSet,
    /// The CPUs that are online.
    pub online: &'a CpuSet,
    /// The length of a clock tick in nanoseconds: start times have that resolution.
    pub tick: u64,
}

/// Returns whether the process is pinned within the list. The caller checks that it has no claim on it.
#[must_use]
pub fn is_intruder(candidate: &HeirCandidate, cpus: &CpuSet, online: &CpuSet) -> bool {
    let is_pinned = |mask: &CpuSet| is_within(mask, cpus) && !online.is_subset(mask);
    !candidate.info.kernel_thread && !candidate.info.ours && candidate.masks.iter().any(is_pinned)
}

fn is_within(mask: &CpuSet, cpus: &CpuSet) -> bool {
    !mask.is_empty() && mask.is_subset(cpus)
}

impl ListToPassOn<'_> {
    /// Returns the process as the heir if the holder has left it behind on the list. The oldest such process inherits. It
    /// started after the claim, a thread of it has a mask within the list, and
    /// - it is in a cgroup of the holder or below one, whoever its user is; or
    /// - it is of a user of the holder or of root, in whatever cgroup.
    ///
    /// Every process is below the root cgroup. There another user counts only if the holder was root or changed its user.
    /// And if the list has all CPUs that are online, a mask within it says nothing: then a process needs both.
    #[must_use]
    pub fn heir(&self, candidate: &HeirCandidate) -> Option<Heir> {
        self.may_pass_to(candidate)
            .then(|| Heir { info: candidate.info.clone(), kin: self.kin_with(candidate) })
    }

    /// Returns the process as the heir if it is in the partition of the list: nobody else can be there.
    #[must_use]
    pub fn heir_in_partition(&self, member: &HeirCandidate) -> Heir {
        Heir { info: member.info.clone(), kin: self.kin_with(member) }
    }

    fn may_pass_to(&self, candidate: &HeirCandidate) -> bool {
        let HeirCandidate { info, started, masks, .. } = candidate;
        let (of_user, in_cgroup) = (self.is_of_user(candidate), self.is_in_cgroup(candidate));
        let is_kin =
            if self.online.is_subset(self.cpus) { of_user && in_cgroup } else { of_user || in_cgroup };
        info.task != self.claim.task
            && !info.kernel_thread
            && !info.ours
            && *started >= self.claim.since / self.tick
            && masks.iter().any(|mask| is_within(mask, self.cpus))
            && is_kin
    }

    fn is_of_user(&self, candidate: &HeirCandidate) -> bool {
        let Claim { uid, kin, .. } = self.claim;
        let is_users = |user: &u32| {
            *user == 0 || user == uid || kin.users.contains(user) || Some(*user) == self.user_at_death
        };
        candidate.users.iter().any(is_users)
    }

    fn is_in_cgroup(&self, candidate: &HeirCandidate) -> bool {
        let Claim { cgroup, kin, .. } = self.claim;
        let counts = |cgroups: &Cgroups| self.any_user() || !cgroups.are_root();
        if kin.cgroups.is_empty() {
            // An earlier version has recorded only the number.
            return candidate.cgroups.iter().any(|it| it.number == *cgroup && counts(&it.cgroups));
        }
        let is_within = |above: &Cgroups| candidate.cgroups.iter().any(|it| it.cgroups.are_within(above));
        kin.cgroups.iter().any(|above| counts(above) && is_within(above))
    }

    /// Whether the holder was root or changed its user.
    fn any_user(&self) -> bool {
        let Claim { uid, kin, .. } = self.claim;
        kin.any_user || *uid == 0 || self.user_at_death.is_some_and(|user| user != *uid)
    }

    /// Returns the kin of the claim once it has passed to this process.
    fn kin_with(&self, heir: &HeirCandidate) -> Kin {
        let mut kin = self.claim.kin.clone();
        kin.any_user = self.any_user() || heir.info.uids.may_be_root();
        [self.claim.uid].into_iter().chain(self.user_at_death).for_each(|user| kin.add_user(user));
        for it in &heir.cgroups {
            kin.add_cgroups(it);
        }
        kin
    }
}

impl Kin {
    pub(super) fn add_user(&mut self, user: u32) {
        if !self.users.contains(&user) {
            self.users.truncate(REMEMBERED - 1);
            self.users.push(user);
        }
    }

    fn add_cgroups(&mut self, it: &CgroupId) {
        let is_known =
            |above: &Arc<Cgroups>| *above == it.cgroups || !above.are_root() && it.cgroups.are_within(above);
        if !self.cgroups.iter().any(is_known) {
            self.cgroups.truncate(REMEMBERED - 1);
            self.cgroups.push(it.cgroups.clone());
        }
    }
}
