//! Who inherits: by the list, by the time, and by user or cgroup.

use super::*;
use crate::model::command::{HeirCandidate, PendingClaim};

const TICK: u64 = 10_000_000;
const OTHER: u32 = 7;
const THIRD: u32 = 8;

/// A claim of `USER` in the cgroup `/a`, by its first holder.
fn held() -> Claim {
    Claim { cgroup: 7, kin: kin("/a"), ..Claim::clone(&claim(1, DATA_01.0)) }
}

/// A child of the holder.
fn child() -> HeirCandidate {
    HeirCandidate {
        info: info(2),
        users: vec![USER],
        cgroups: vec![cgroup(7, "/a")],
        started: NOW / TICK,
        masks: vec![cpus("0-1")],
    }
}

fn of(user: u32, child: HeirCandidate) -> HeirCandidate {
    HeirCandidate { info: info_of(2, user), users: vec![user], ..child }
}

fn inside(path: &str, child: HeirCandidate) -> HeirCandidate {
    HeirCandidate { cgroups: vec![cgroup(99, path)], ..child }
}

fn find(claim: &Claim, user_at_death: Option<u32>, candidate: &HeirCandidate) -> Option<Heir> {
    let (cpus, online) = (&cpus("0-1"), &cpus("0-9"));
    ListToPassOn { claim, user_at_death, cpus, online, tick: TICK }.heir(candidate)
}

fn may(claim: &Claim, candidate: &HeirCandidate) -> bool {
    find(claim, Some(claim.uid), candidate).is_some()
}

#[test]
fn an_heir_started_later_and_has_a_thread_on_the_list() {
    let born = child().started;
    assert!(may(&held(), &child()), "in the same tick as the claim");
    let with = |info: TaskInfo| HeirCandidate { info, ..child() };
    let masks =
        |masks: &[&str]| HeirCandidate { masks: masks.iter().map(|it| cpus(it)).collect(), ..child() };
    for (candidate, expected, why) in [
        (masks(&["1"]), true, "a part of the list"),
        (masks(&["5", "0"]), true, "one of its threads"),
        (HeirCandidate { started: born + 1000, ..child() }, true, "much later"),
        (HeirCandidate { started: born - 1, ..child() }, false, "before the claim"),
        (masks(&["0-2"]), false, "also elsewhere"),
        (masks(&["2"]), false, "elsewhere"),
        (HeirCandidate { masks: vec![CpuSet::new()], ..child() }, false, "nowhere"),
        (masks(&[]), false, "no thread"),
        (with(TaskInfo { kernel_thread: true, ..info(2) }), false, "a kernel thread"),
        (with(TaskInfo { ours: true, ..info(2) }), false, "the daemon"),
        (with(info(1)), false, "the dead one itself"),
    ] {
        assert_eq!(may(&held(), &candidate), expected, "{why}");
    }
}

#[test]
fn an_heir_is_in_the_cgroup_or_below_or_of_the_user_or_of_root() {
    for (candidate, expected, why) in [
        (of(OTHER, child()), true, "another user in the same cgroup"),
        (of(OTHER, inside("/a/b", child())), true, "another user below it"),
        (of(OTHER, inside("/b", child())), false, "another user beside it"),
        (of(OTHER, inside("/", child())), false, "another user above it"),
        (inside("/b", child()), true, "the same user beside it"),
        (inside("/", child()), true, "the same user above it"),
        (of(0, inside("/b", child())), true, "root beside it"),
        // Its threads may differ.
        (HeirCandidate { users: vec![OTHER, USER], ..inside("/b", child()) }, true, "one thread of the user"),
        (
            HeirCandidate { cgroups: vec![cgroup(9, "/b"), cgroup(0, "/a")], ..of(OTHER, child()) },
            true,
            "one thread in the cgroup",
        ),
    ] {
        assert_eq!(may(&held(), &candidate), expected, "{why}");
    }
}

#[test]
fn in_the_root_cgroup_another_user_counts_only_after_a_change_of_user() {
    let in_root = |uid, any_user| Claim { uid, kin: Kin { any_user, ..kin("/") }, ..held() };
    let other = of(OTHER, inside("/system.slice/x", child()));
    for (claim, at_death, expected, why) in [
        (in_root(USER, false), Some(USER), false, "a user all the time"),
        (in_root(USER, false), None, false, "it is not known that the user changed"),
        (in_root(USER, false), Some(THIRD), true, "it changed its user"),
        (in_root(USER, false), Some(0), true, "it became root"),
        (in_root(0, false), Some(0), true, "root at the claim"),
        (in_root(0, false), None, true, "root at the claim, and whatever at the death"),
        (in_root(USER, true), Some(USER), true, "it could become root"),
    ] {
        assert_eq!(find(&claim, at_death, &other).is_some(), expected, "{why}");
        assert!(find(&claim, at_death, &child()).is_some(), "{why}");
    }
    // A user of the death is a user of the holder in every cgroup.
    let beside = of(THIRD, inside("/b", child()));
    assert!(find(&held(), Some(THIRD), &beside).is_some() && find(&held(), None, &beside).is_none());
}

#[test]
fn a_set_user_id_holder_counts_as_root() {
    let uids = |effective, saved| Uids { real: USER, effective, saved };
    for (uids, any_user) in [(uids(USER, USER), false), (uids(0, USER), true), (uids(USER, 0), true)] {
        let pending = PendingClaim { task: task(1), list: DATA_01, since: NOW, uids, by_root: true };
        let claim = pending.complete(SavedMask::All, cgroup(7, "/"));
        assert_eq!((claim.uid, claim.kin.any_user), (USER, any_user));
    }
}

#[test]
fn on_a_list_of_all_cpus_an_heir_needs_user_and_cgroup() {
    let claim = held();
    let online = cpus("0-1");
    let list =
        ListToPassOn { claim: &claim, user_at_death: None, cpus: &online, online: &online, tick: TICK };
    assert!(list.heir(&child()).is_some());
    assert!(list.heir(&inside("/b", child())).is_none() && list.heir(&of(OTHER, child())).is_none());
    assert!(!is_intruder(&child(), &online, &online));
}

#[test]
fn what_earlier_holders_left_behind_is_known_by_them() {
    // Root starts one child that becomes `OTHER` in a cgroup beside, and one that becomes `THIRD`.
    let claim = Claim { uid: 0, kin: kin("/"), ..held() };
    let first = of(OTHER, inside("/b", child()));
    let heir = find(&claim, Some(0), &first).unwrap();
    let claim = Claim { task: task(2), uid: OTHER, kin: heir.kin, ..claim };
    assert!(claim.kin.any_user);
    let second = HeirCandidate { info: info_of(3, THIRD), ..of(THIRD, inside("/c", child())) };
    let heir = find(&claim, Some(OTHER), &second).unwrap();
    assert_eq!(heir.kin.users, [0, OTHER]);
    let paths: Vec<String> = heir.kin.cgroups.iter().map(ToString::to_string).collect();
    assert_eq!(paths, [":/", ":/b", ":/c"]);
    // However many there are, the first ones stay known.
    let mut claim = claim;
    for user in 100..150 {
        let next =
            HeirCandidate { info: info_of(user, user), ..of(user, inside(&format!("/{user}"), child())) };
        claim =
            Claim { task: task(user), uid: user, kin: find(&claim, Some(user), &next).unwrap().kin, ..claim };
    }
    assert!(claim.kin.users.len() <= 8 && claim.kin.users.starts_with(&[0, OTHER]), "{:?}", claim.kin);
    assert!(claim.kin.cgroups.len() <= 8);
}

#[test]
fn a_moved_claim_is_known_by_its_users_before_and_after() {
    let mut claims = machine();
    take(&mut claims, list(DATA_01), &[1]);
    let as_root = Request { claim: vec![info_of(1, 0)], ..request(list(DATA_23), &[], &[]) };
    settle(&mut claims, as_root);
    let claim = claims.claim(&task(1)).unwrap();
    assert_eq!((claim.uid, claim.kin.users.as_slice(), claim.kin.any_user), (0, &[USER][..], true));
}

#[test]
fn a_claim_of_an_earlier_version_knows_its_cgroup_by_number() {
    let old = |uid| Claim { uid, kin: Kin::default(), ..held() };
    assert!(may(&old(USER), &of(OTHER, child())));
    assert!(!may(&old(USER), &of(OTHER, inside("/a/b", child()))), "what is below is not known");
    assert!(may(&old(USER), &inside("/b", child())), "the same user");
    let in_root = HeirCandidate { cgroups: vec![cgroup(7, "/")], ..of(OTHER, child()) };
    assert!(!may(&old(USER), &in_root) && may(&old(0), &in_root));
}

#[test]
fn an_intruder_is_pinned_within_the_list() {
    let online = cpus("0-9");
    let is = |candidate: &HeirCandidate| is_intruder(candidate, &cpus("0-1"), &online);
    let masks =
        |masks: &[&str]| HeirCandidate { masks: masks.iter().map(|it| cpus(it)).collect(), ..child() };
    assert!(is(&child()) && is(&of(OTHER, inside("/b", child()))) && is(&masks(&["5", "1"])));
    assert!(is(&HeirCandidate { started: 0, ..child() }), "older than the claim");
    assert!(!is(&masks(&["1-2"])) && !is(&masks(&[])));
    for info in [TaskInfo { kernel_thread: true, ..info(2) }, TaskInfo { ours: true, ..info(2) }] {
        assert!(!is(&HeirCandidate { info, ..child() }));
    }
}
