//! The claim machine against its rules, one by one; and against a naive machine, in `model`.
//!
//! Longer than 400 lines because it is a list of independent tests, one per rule.

mod configuring;
mod heirs;
mod model;

use std::collections::HashSet;

use nix::errno::Errno;

use super::*;
use crate::model::cgroup::Cgroups;
use crate::model::command::{CgroupId, Kin, Placement, SavedMask, Target, TaskInfo, Uids};
use crate::model::pool::PoolName;
use crate::model::rights::{Access, User};

const NOW: u64 = 50_000_000_000;
/// Owns every task here.
const USER: u32 = 1000;

/// An exclusive pool, whose lists were not made in the order of their CPUs.
const DATA: PoolId = PoolId(1);
const DATA_45: ListId = ListId(10);
const DATA_01: ListId = ListId(11);
const DATA_23: ListId = ListId(12);
/// A shared pool.
const INFRA: PoolId = PoolId(2);
const INFRA_8: ListId = ListId(20);
const INFRA_67: ListId = ListId(21);

#[test]
fn root_or_the_owner_has_the_right_and_the_opener_needs_it_too() {
    let uids = |real, effective, saved| Uids { real, effective, saved };
    let own = uids(USER, USER, USER);
    for (opener, writer, of, refused) in [
        (0, 0, own, None),
        (USER, USER, own, None),
        (0, USER, own, None),
        (USER, 0, own, None),
        (USER, USER, uids(USER, 0, 0), None),
        (USER, USER, uids(0, 0, USER), Some(USER)),
        (USER, USER, uids(0, USER, 0), None),
        (7, 7, own, Some(7)),
        (0, 7, own, Some(7)),
        (7, 0, own, Some(7)),
        (USER, 7, own, Some(7)),
        (7, USER, own, Some(7)),
        (USER, USER, uids(0, 0, 0), Some(USER)),
    ] {
        let ask = |target, releases: bool| {
            let mut claims = machine();
            let info = TaskInfo { uids: of, ..info(1) };
            let mut request =
                Request { users: [opener, writer].map(User::from), ..request(target, &[], &[]) };
            if releases { &mut request.release } else { &mut request.claim }.push(info);
            claims.apply(Command::Write(request)).map(|_| ()).map_err(Refusal::from)
        };
        let expected = refused.map_or(Ok(()), |uid| Err(Refusal::NotPermitted { uid }));
        for target in [list(DATA_01), pool(DATA)] {
            let case = format!("opener {opener}, writer {writer}, task of {of:?}");
            assert_eq!(ask(target, false), expected, "claim, {case}");
            assert_eq!(ask(target, true), expected, "release, {case}");
        }
    }
}

#[test]
fn one_task_without_the_right_refuses_the_whole_write() {
    let mut claims = machine();
    let mut request =
        Request { users: [USER, USER].map(User::from), ..request(pool(INFRA), &[1, 2, 3], &[]) };
    request.claim[2].uids = Uids { real: 0, effective: 0, saved: 0 };
    assert_eq!(refusal(claims.apply(Command::Write(request))), Refusal::NotPermitted { uid: USER });
    assert!((1..=3).all(|n| !claims.is_in_flight(&task(n))));
}

#[test]
fn kernel_threads_and_the_daemon_are_never_claimed_nor_released() {
    for (kernel_thread, ours, users, expected) in [
        (true, false, [0, 0], Refusal::KernelThread),
        (false, true, [0, 0], Refusal::OwnProcess),
        (true, false, [7, 7], Refusal::NotPermitted { uid: 7 }),
    ] {
        for releases in [false, true] {
            let info = TaskInfo { kernel_thread, ours, ..info(1) };
            let mut request = Request { users: users.map(User::from), ..request(list(INFRA_8), &[], &[]) };
            if releases { &mut request.release } else { &mut request.claim }.push(info);
            assert_eq!(refusal(machine().apply(Command::Write(request))), expected);
        }
    }
}

#[test]
fn an_exclusive_list_takes_one_task() {
    let mut claims = machine();
    take(&mut claims, list(DATA_01), &[1]);
    let refused = refusal(write(&mut claims, Request { now: NOW + 7, ..request(list(DATA_01), &[2], &[]) }));
    let Refusal::Held { list: name, holder, free } = refused else { panic!("{refused:?}") };
    assert_eq!(name.to_string(), "dataplane 0-1");
    assert_eq!(holder, Holder { task: task(1), list: DATA_01, held: 7 });
    assert_eq!(free.as_deref(), Some("2-3"), "the lowest one that is free is named");
    take(&mut claims, pool(DATA), &[2, 3]);
    let Refusal::Held { free: None, .. } = refusal(write(&mut claims, request(list(DATA_01), &[4], &[])))
    else {
        panic!("no list is free")
    };
}

#[test]
fn a_task_on_its_way_to_an_exclusive_list_keeps_others_off() {
    let mut claims = machine();
    let plan = write(&mut claims, request(list(DATA_01), &[1], &[])).unwrap().plan;
    assert_eq!(refusal(write(&mut claims, request(list(DATA_01), &[2], &[]))).errno(), Errno::EBUSY);
    assert_eq!(places(&mut claims, request(pool(DATA), &[3], &[])), [(3, DATA_23, Origin::New)]);
    claims.apply(Command::Abandon(plan)).unwrap();
    take(&mut claims, list(DATA_01), &[2]);
}

#[test]
fn a_task_that_is_leaving_still_holds_its_list() {
    let mut claims = machine();
    take(&mut claims, list(DATA_01), &[1]);
    for leave in [request(list(DATA_01), &[], &[1]), request(list(DATA_23), &[1], &[])] {
        let plan = write(&mut claims, leave).unwrap().plan;
        assert_eq!(refusal(write(&mut claims, request(list(DATA_01), &[2], &[]))).errno(), Errno::EBUSY);
        claims.apply(Command::Abandon(plan)).unwrap();
        assert_eq!(on(&claims, DATA_01), [1]);
    }
}

#[test]
fn while_an_exclusivity_is_stored_a_task_needs_room_by_both_rules() {
    for (pool, list, coming) in
        [(DATA, DATA_01, Exclusivity::Shared), (INFRA, INFRA_8, Exclusivity::Exclusive)]
    {
        let mut claims = machine();
        let was = claims.pool(pool).unwrap().exclusivity();
        take(&mut claims, Target::List(list), &[1]);
        let prepare = Command::PrepareExclusivity { pool, exclusivity: coming };
        claims.apply(prepare.clone()).unwrap();
        assert_eq!(claims.pool(pool).unwrap().exclusivity(), was, "not in effect yet");
        assert_eq!(refusal(write(&mut claims, request(Target::List(list), &[2], &[]))).errno(), Errno::EBUSY);
        assert_eq!(
            refusal(write(&mut claims, request(Target::List(list), &[2, 3], &[]))).errno(),
            Errno::EBUSY
        );
        take(&mut claims, Target::Pool(pool), &[4]);
        assert_eq!(on(&claims, list), [1], "the pool offers a free list");
        claims.apply(Command::CancelExclusivity(pool)).unwrap();
        let second = write(&mut claims, request(Target::List(list), &[2], &[]));
        assert_eq!(second.is_ok(), was == Exclusivity::Shared, "the old rule counts again");
        if let Ok(effects) = second {
            claims.apply(Command::Abandon(effects.plan)).unwrap();
        }
        claims.apply(prepare).unwrap();
        set(&mut claims, pool, coming).unwrap();
        let second = write(&mut claims, request(Target::List(list), &[2], &[]));
        assert_eq!(second.is_ok(), coming == Exclusivity::Shared, "the new rule counts");
    }
}

#[test]
fn a_task_that_is_leaving_does_not_keep_a_stored_exclusivity_from_its_effect() {
    let mut claims = machine();
    take(&mut claims, list(INFRA_8), &[1]);
    let prepare = Command::PrepareExclusivity { pool: INFRA, exclusivity: Exclusivity::Exclusive };
    claims.apply(prepare.clone()).unwrap();
    let swap = write(&mut claims, request(list(INFRA_8), &[2], &[1])).unwrap().plan;
    set(&mut claims, INFRA, Exclusivity::Exclusive).unwrap();
    claims.apply(Command::Settle(completed(&swap))).unwrap();
    assert_eq!(on(&claims, INFRA_8), [2]);
    // Without that, two are too many.
    set(&mut claims, INFRA, Exclusivity::Shared).unwrap();
    take(&mut claims, list(INFRA_8), &[3]);
    assert_eq!(set(&mut claims, INFRA, Exclusivity::Exclusive).unwrap_err().errno(), Errno::EBUSY);
    assert_eq!(refusal(claims.apply(prepare)).errno(), Errno::EBUSY);
}

#[test]
fn two_named_for_one_exclusive_list_are_refused() {
    let mut claims = machine();
    take(&mut claims, list(DATA_01), &[1]);
    for named in [[1, 2], [2, 3]] {
        let refused = refusal(write(&mut claims, request(list(DATA_01), &named, &[])));
        assert!(matches!(refused, Refusal::TwoNamed { .. }), "{refused:?}");
        assert_eq!(refused.errno(), Errno::EBUSY);
    }
    take(&mut claims, list(INFRA_8), &[2, 3]);
    take(&mut claims, pool(DATA), &[4, 5]);
    assert_eq!(on(&claims, INFRA_8), [2, 3]);
}

#[test]
fn one_write_can_put_one_task_in_the_place_of_another() {
    let mut claims = machine();
    take(&mut claims, list(DATA_01), &[1]);
    let changes = settle(&mut claims, request(list(DATA_01), &[2], &[1])).changes;
    assert!(matches!(changes.as_slice(), [Change::Released(_), Change::Claimed(_)]), "{changes:?}");
    assert_eq!(on(&claims, DATA_01), [2]);
    settle(&mut claims, request(pool(DATA), &[3, 4], &[]));
    settle(&mut claims, request(pool(DATA), &[5], &[4]));
    assert_eq!((claims.claim(&task(4)), on(&claims, DATA_45)), (None, vec![5]));
}

#[test]
fn a_full_pool_names_who_has_held_a_list_for_the_longest_time() {
    let mut claims = machine();
    for (since, (pid, target)) in [(30, (3, DATA_01)), (10, (1, DATA_23)), (20, (2, DATA_45))] {
        settle(&mut claims, Request { now: since, ..request(list(target), &[pid], &[]) });
    }
    let refused = refusal(write(&mut claims, Request { now: 100, ..request(pool(DATA), &[4], &[]) }));
    let Refusal::NoneFree { longest: Some((longest, holder)), .. } = &refused else { panic!("{refused:?}") };
    assert_eq!((longest.cpus.as_str(), holder.task.pid.get(), holder.held), ("2-3", 1, 90));
    let expected = "no list of dataplane is free (3 taken); dataplane 2-3 is held by 1 (x) for 0 s, the longest time; \
                    wait for one with poll(2), kcm isolate --wait or kcm claim --wait";
    assert_eq!(refused.sentence("1 (x)"), expected);
}

#[test]
fn an_exclusive_pool_gives_the_free_list_with_the_lowest_first_cpu() {
    let mut claims = machine();
    for expected in [DATA_01, DATA_23, DATA_45] {
        let n = expected.0 as u32;
        take(&mut claims, pool(DATA), &[n]);
        assert_eq!(on(&claims, expected), [n]);
    }
    let full = refusal(write(&mut claims, request(pool(DATA), &[1], &[])));
    assert!(matches!(&full, Refusal::NoneFree { taken: 3, longest: Some(_), .. }), "{full:?}");
    assert_eq!(full.errno(), Errno::EBUSY);
    settle(&mut claims, request(list(DATA_23), &[], &[DATA_23.0 as u32]));
    take(&mut claims, pool(DATA), &[1]);
    assert_eq!(on(&claims, DATA_23), [1]);
}

#[test]
fn a_list_on_which_somebody_else_is_pinned_is_the_last_choice() {
    let mut claims = machine();
    let note = |claims: &mut Claims, list, present| {
        claims.apply(Command::NoteIntruders { list, present }).unwrap();
    };
    note(&mut claims, DATA_01, true);
    assert_eq!(places(&mut claims.clone(), request(pool(DATA), &[1], &[])), [(1, DATA_23, Origin::New)]);
    take(&mut claims.clone(), list(DATA_01), &[1]);
    // One that the kernel refuses is no choice at all.
    let unsuitable = HashSet::from([(task(1), DATA_23), (task(1), DATA_45)]);
    let request_1 = Request { unsuitable, ..request(pool(DATA), &[1], &[]) };
    assert_eq!(places(&mut claims.clone(), request_1), [(1, DATA_01, Origin::New)]);
    note(&mut claims, DATA_23, true);
    let found = places(&mut claims.clone(), request(pool(DATA), &[1, 2, 3], &[]));
    assert_eq!(found, [(1, DATA_45, Origin::New), (2, DATA_01, Origin::New), (3, DATA_23, Origin::New)]);
    take(&mut claims, list(DATA_45), &[1]);
    let Refusal::Held { free, .. } = refusal(write(&mut claims, request(list(DATA_45), &[2], &[]))) else {
        panic!("it is held")
    };
    assert_eq!(free.as_deref(), Some("0-1"));
    note(&mut claims, DATA_23, false);
    assert_eq!(places(&mut claims, request(pool(DATA), &[2], &[])), [(2, DATA_23, Origin::New)]);
}

#[test]
fn several_tasks_get_as_many_lists_of_an_exclusive_pool_or_none() {
    let mut claims = machine();
    let found = places(&mut claims, request(pool(DATA), &[1, 2, 3], &[]));
    assert_eq!(found, [(1, DATA_01, Origin::New), (2, DATA_23, Origin::New), (3, DATA_45, Origin::New)]);
    let mut claims = machine();
    let refused = refusal(write(&mut claims, request(pool(DATA), &[1, 2, 3, 4], &[])));
    assert_eq!(refused.errno(), Errno::EBUSY);
    assert!((1..=4).all(|n| !claims.is_in_flight(&task(n))));
    assert!(places(&mut claims, request(pool(DATA), &[5], &[])) == [(5, DATA_01, Origin::New)]);
}

#[test]
fn a_shared_pool_gives_the_list_with_the_fewest_tasks() {
    let mut claims = machine();
    take(&mut claims, list(INFRA_67), &[1]);
    take(&mut claims, pool(INFRA), &[2]);
    assert_eq!(on(&claims, INFRA_8), [2]);
    // One each: the lower CPUs. One of three leaves: one again.
    let found = places(&mut claims, request(pool(INFRA), &[3, 4, 5], &[1]));
    assert_eq!(found, [(3, INFRA_67, Origin::New), (4, INFRA_67, Origin::New), (5, INFRA_8, Origin::New)]);
    // Those on their way count.
    assert_eq!(places(&mut claims, request(pool(INFRA), &[6], &[])), [(6, INFRA_8, Origin::New)]);
}

#[test]
fn lists_that_the_kernel_refuses_are_passed_over() {
    let mut claims = machine();
    let without = |target, lists: &[ListId]| {
        let unsuitable = lists.iter().map(|&list| (task(1), list)).collect();
        Request { unsuitable, ..request(target, &[1], &[]) }
    };
    let unsuitable = [DATA_01];
    assert_eq!(places(&mut claims.clone(), without(pool(DATA), &unsuitable)), [(1, DATA_23, Origin::New)]);
    assert_eq!(places(&mut claims.clone(), without(pool(INFRA), &[INFRA_67])), [(1, INFRA_8, Origin::New)]);
    let all = without(pool(DATA), &[DATA_01, DATA_23, DATA_45]);
    let none = refusal(write(&mut claims, all.clone()));
    assert_eq!(none, Refusal::NoneSuits { pool: name("dataplane") });
    assert_eq!(none.errno(), Errno::EINVAL);
    let none = refusal(write(&mut claims, without(pool(INFRA), &[INFRA_67, INFRA_8])));
    assert_eq!(none, Refusal::NoneSuits { pool: name("infra") });
    // A list that the kernel refused to another task may suit this one.
    let other = Request { claim: vec![info(2)], ..without(pool(DATA), &unsuitable) };
    assert_eq!(places(&mut claims.clone(), other), [(2, DATA_01, Origin::New)]);
    // Where none is free, it does not matter which ones would suit.
    take(&mut claims, pool(DATA), &[5, 6, 7]);
    assert!(matches!(refusal(write(&mut claims, all)), Refusal::NoneFree { taken: 3, .. }));
}

#[test]
fn a_pool_offers_no_list_with_offline_cpus() {
    let mut claims = machine();
    let without = |offline: &str| Request { offline: cpus(offline), ..request(pool(DATA), &[1], &[]) };
    assert_eq!(places(&mut claims.clone(), without("1-2")), [(1, DATA_45, Origin::New)]);
    assert_eq!(refusal(write(&mut claims, without("0,3,5"))), Refusal::NoneSuits { pool: name("dataplane") });
    // A shared list serves with the others.
    let shared = Request { offline: cpus("6"), ..request(pool(INFRA), &[1], &[]) };
    assert_eq!(places(&mut claims, shared), [(1, INFRA_67, Origin::New)]);
}

#[test]
fn tasks_that_wait_come_first() {
    let mut claims = machine();
    let behind = |before, target| Request { before, ..request(target, &[1], &[]) };
    let refused = |before| Refusal::OthersWait { pool: name("dataplane"), before };
    assert_eq!(claims.room(DATA, &CpuSet::new()), 3);
    assert_eq!(claims.room(DATA, &cpus("1")), 2);
    for before in [3, 7] {
        for target in [pool(DATA), list(DATA_45)] {
            assert_eq!(refusal(write(&mut claims.clone(), behind(before, target))), refused(before));
        }
    }
    assert_eq!(places(&mut claims.clone(), behind(2, pool(DATA))), [(1, DATA_01, Origin::New)]);
    // Each of several tasks needs a list of its own.
    let two = Request { claim: vec![info(1), info(2)], ..behind(2, pool(DATA)) };
    assert_eq!(refusal(write(&mut claims.clone(), two)), refused(2));
    // A task of the pool keeps its list or moves, and a shared pool has room for all.
    take(&mut claims, pool(DATA), &[1]);
    assert_eq!(on(&claims, DATA_01), [1]);
    assert!(write(&mut claims.clone(), behind(9, pool(DATA))).is_ok());
    assert!(write(&mut claims.clone(), behind(9, list(DATA_45))).is_ok());
    assert!(write(&mut claims.clone(), Request { claim: vec![info(2)], ..behind(9, pool(INFRA)) }).is_ok());
    // If no list is free, the refusal names a holder.
    take(&mut claims, pool(DATA), &[5, 6]);
    let last = Request { claim: vec![info(2)], ..behind(9, pool(DATA)) };
    assert!(matches!(refusal(write(&mut claims, last)), Refusal::NoneFree { taken: 3, .. }));
}

#[test]
fn a_list_that_the_kernel_refuses_is_not_tried_again_for_the_task_that_is_on_it() {
    let mut claims = machine();
    take(&mut claims, pool(DATA), &[1]);
    let unsuitable = HashSet::from([(task(1), DATA_01)]);
    let again = Request { unsuitable, ..request(pool(DATA), &[1], &[]) };
    assert_eq!(refusal(write(&mut claims, again)), Refusal::NoneSuits { pool: name("dataplane") });
    assert_eq!(on(&claims, DATA_01), [1]);
}

#[test]
fn a_pool_without_lists_has_none_free() {
    let mut claims = machine();
    add_pool(&mut claims, PoolId(3), "empty", Exclusivity::Shared).unwrap();
    let refused = refusal(write(&mut claims, request(pool(PoolId(3)), &[1], &[])));
    assert_eq!(refused, Refusal::NoneFree { pool: name("empty"), taken: 0, draining: 0, longest: None });
}

#[test]
fn a_claim_that_is_repeated_stays_as_it_is() {
    let mut claims = machine();
    take(&mut claims, list(DATA_01), &[1]);
    let before = claims.claim(&task(1)).cloned();
    for target in [list(DATA_01), pool(DATA)] {
        let later = Request { now: NOW + 1, ..request(target, &[1], &[]) };
        let plan = write(&mut claims, later).unwrap().plan;
        assert_eq!(plan.changes().count(), 0);
        assert_eq!(plan.placements[0].origin(), Origin::Unchanged);
        assert!(claims.apply(Command::Settle(completed(&plan))).unwrap().changes.is_empty());
        assert_eq!(claims.claim(&task(1)).cloned(), before);
    }
}

#[test]
fn a_move_drops_the_old_claim_in_the_same_step_and_keeps_the_first_saved_mask() {
    let mut claims = machine();
    take_with_mask(&mut claims, list(DATA_01), 1, "3");
    let second = Request { now: NOW + 1, ..request(pool(INFRA), &[1], &[]) };
    let plan = write(&mut claims, second).unwrap().plan;
    assert_eq!(plan.placements[0].origin(), Origin::Moved { from: DATA_01 });
    assert_eq!((on(&claims, DATA_01), on(&claims, INFRA_67)), (vec![1], vec![]));
    let changes = claims.apply(Command::Settle(completed(&plan))).unwrap().changes;
    let [Change::Moved { from: DATA_01, to }] = changes.as_slice() else { panic!("{changes:?}") };
    assert_eq!((to.list, &to.saved, to.since), (INFRA_67, &SavedMask::Cpus(cpus("3")), NOW + 1));
    assert_eq!((on(&claims, DATA_01), on(&claims, INFRA_67)), (vec![], vec![1]));
}

#[test]
fn a_move_that_is_abandoned_leaves_the_old_claim() {
    let mut claims = machine();
    take(&mut claims, list(DATA_01), &[1]);
    let plan = write(&mut claims, request(list(DATA_23), &[1], &[])).unwrap().plan;
    let effects = claims.apply(Command::Abandon(plan)).unwrap();
    assert!(effects.changes.is_empty() && effects.lost.is_empty());
    assert_eq!((on(&claims, DATA_01), on(&claims, DATA_23)), (vec![1], vec![]));
    take(&mut claims, list(DATA_23), &[2]);
}

#[test]
fn a_release_is_for_claims_on_the_target_alone() {
    let mut claims = machine();
    take(&mut claims, list(DATA_01), &[1]);
    for (target, ends) in [
        (list(DATA_23), false),
        (pool(INFRA), false),
        (list(INFRA_8), false),
        (pool(DATA), true),
        (list(DATA_01), true),
    ] {
        let mut claims = claims.clone();
        let changes = settle(&mut claims, request(target, &[], &[1, 2])).changes;
        assert_eq!(claims.claim(&task(1)).is_none(), ends, "{target:?}");
        assert_eq!(changes.len(), usize::from(ends), "{changes:?}");
    }
}

#[test]
fn to_claim_and_to_release_the_same_process_is_a_contradiction() {
    let mut claims = machine();
    let refused = refusal(write(&mut claims, request(pool(INFRA), &[1, 2], &[3, 2])));
    assert_eq!((refused.errno(), refused), (Errno::EINVAL, Refusal::Contradiction));
}

#[test]
fn a_task_in_flight_waits_for_its_plan_to_end() {
    let mut claims = machine();
    let plan = write(&mut claims, request(list(INFRA_8), &[1], &[])).unwrap().plan;
    for again in [request(list(INFRA_8), &[1], &[]), request(pool(DATA), &[2], &[1])] {
        assert_eq!(write(&mut claims, again).map(|_| ()), Err(Rejected::Busy));
    }
    assert!(claims.is_in_flight(&task(1)) && !claims.is_in_flight(&task(2)));
    take(&mut claims, list(INFRA_8), &[2]);
    claims.apply(Command::Settle(completed(&plan))).unwrap();
    assert!(!claims.is_in_flight(&task(1)));
    take(&mut claims, list(DATA_01), &[1]);
}

#[test]
fn there_is_room_for_so_many_tasks_and_half_of_them_for_others_than_root() {
    let mut claims = machine_with_room_for(4);
    let by_user = |target, claim: &[u32]| Request {
        users: [USER, USER].map(User::from),
        ..request(target, claim, &[])
    };
    settle(&mut claims, by_user(list(INFRA_8), &[1, 2]));
    for users in [[USER, USER], [0, USER], [USER, 0]] {
        let more = Request { users: users.map(User::from), ..request(list(INFRA_8), &[3], &[]) };
        assert_eq!(refusal(write(&mut claims, more)), Refusal::TooMany { limit: 2 }, "{users:?}");
    }
    // What is there already needs no room.
    settle(&mut claims, by_user(pool(INFRA), &[1, 2]));
    settle(&mut claims, by_user(list(INFRA_67), &[1]));
    take(&mut claims, list(INFRA_8), &[3, 4]);
    let full = refusal(write(&mut claims, request(list(INFRA_8), &[5], &[])));
    assert_eq!((full.errno(), full), (Errno::ENOSPC, Refusal::TooMany { limit: 4 }));
    settle(&mut claims, by_user(list(INFRA_67), &[1]));
    // A user who moves a claim of root does not become its requester.
    settle(&mut claims, request(pool(DATA), &[1], &[]));
    settle(&mut claims, by_user(list(INFRA_8), &[3]));
    assert_eq!(
        claims.claims().filter(|claim| !claim.by_root).count(),
        2,
        "root moved one of theirs, and they asked for one of root's"
    );
    settle(&mut claims, by_user(list(INFRA_67), &[1]));
    // A release by root makes room for the users.
    settle(&mut claims, request(list(INFRA_67), &[], &[1]));
    settle(&mut claims, by_user(list(INFRA_8), &[5]));
    let refused = refusal(write(&mut claims, by_user(list(INFRA_8), &[6])));
    assert_eq!(refused.errno(), Errno::ENOSPC);
}

#[test]
fn claims_on_their_way_need_room_too() {
    let mut claims = machine_with_room_for(4);
    let by_user =
        |claim: &[u32]| Request { users: [USER, USER].map(User::from), ..request(list(INFRA_8), claim, &[]) };
    let plan = write(&mut claims, by_user(&[1, 2])).unwrap().plan;
    assert_eq!(refusal(write(&mut claims, by_user(&[3]))), Refusal::TooMany { limit: 2 });
    claims.apply(Command::Abandon(plan)).unwrap();
    let plan = write(&mut claims, by_user(&[3])).unwrap().plan;
    claims.apply(Command::End { task: task(3), ending: Ending::Exited(0), heir: None }).unwrap();
    claims.apply(Command::Settle(completed(&plan))).unwrap();
    let _in_flight = write(&mut claims, by_user(&[4, 5])).unwrap();
    let _in_flight = write(&mut claims, request(list(INFRA_8), &[6, 7], &[])).unwrap();
    assert_eq!(refusal(write(&mut claims, request(list(INFRA_8), &[8], &[]))), Refusal::TooMany { limit: 4 });
}

#[test]
fn a_recorded_claim_is_taken_up_again_once_and_breaks_no_rule() {
    let mut claims = machine();
    claims.apply(Command::Restore(claim(1, DATA_01.0))).unwrap();
    assert_eq!(claims.claim(&task(1)), Some(&claim(1, DATA_01.0)));
    for (again, expected) in [
        (claim(1, INFRA_8.0), Errno::EEXIST),
        (claim(2, DATA_01.0), Errno::EBUSY),
        (claim(2, 4711), Errno::ENODEV),
    ] {
        assert_eq!(refusal(claims.apply(Command::Restore(again))).errno(), expected);
    }
    claims.apply(Command::Restore(claim(2, INFRA_8.0))).unwrap();
    claims.apply(Command::Restore(claim(3, INFRA_8.0))).unwrap();
    assert_eq!(on(&claims, INFRA_8), [2, 3]);
}

#[test]
fn a_task_that_dies_in_flight_gets_nothing() {
    // Its first claim, a move, a repeat and a release.
    for (first, then) in [
        (None, request(list(DATA_01), &[1], &[])),
        (Some(DATA_23), request(list(DATA_01), &[1], &[])),
        (Some(DATA_01), request(list(DATA_01), &[1], &[])),
        (Some(DATA_01), request(list(DATA_01), &[], &[1])),
    ] {
        for abandoned in [false, true] {
            let mut claims = machine();
            if let Some(first) = first {
                take(&mut claims, list(first), &[1]);
            }
            let plan = write(&mut claims, then.clone()).unwrap().plan;
            let changes = claims
                .apply(Command::End { task: task(1), ending: Ending::Exited(0), heir: None })
                .unwrap()
                .changes;
            assert_eq!(changes.len(), usize::from(first.is_some()), "{changes:?}");
            assert_eq!(claims.claim(&task(1)), None);
            assert!(claims.is_in_flight(&task(1)), "until its plan has ended");
            let is_release = plan.placements.is_empty();
            let end = if abandoned { Command::Abandon(plan) } else { Command::Settle(completed(&plan)) };
            let effects = claims.apply(end).unwrap();
            assert!(effects.changes.is_empty(), "{effects:?}");
            if !is_release {
                assert_eq!(effects.lost, [task(1)]);
            }
            assert!(!claims.is_in_flight(&task(1)));
            take(&mut claims, list(DATA_01), &[2]);
            take(&mut claims, list(DATA_23), &[3]);
        }
    }
}

#[test]
fn the_others_of_a_plan_get_what_they_were_promised_when_one_has_died() {
    let mut claims = machine();
    let plan = write(&mut claims, request(list(INFRA_8), &[1, 2], &[])).unwrap().plan;
    claims.apply(Command::End { task: task(1), ending: Ending::Exited(0), heir: None }).unwrap();
    let effects = claims.apply(Command::Settle(completed(&plan))).unwrap();
    assert_eq!((effects.lost, on(&claims, INFRA_8)), (vec![task(1)], vec![2]));
}

#[test]
fn the_claim_of_a_dead_task_ends_or_passes_to_its_heir() {
    let mut claims = machine();
    take_with_mask(&mut claims, list(DATA_01), 1, "3");
    let old = claims.claim(&task(1)).cloned().unwrap();
    let kin = kin("/b");
    let heir = Heir { info: TaskInfo { uids: root(), ..info(2) }, kin: kin.clone() };
    let changes = claims
        .apply(Command::End { task: task(1), ending: Ending::Exited(0), heir: Some(heir) })
        .unwrap()
        .changes;
    let expected = Arc::new(Claim { task: task(2), uid: 0, kin, ..Claim::clone(&old) });
    assert_eq!(changes, [Change::Inherited { from: task(1), to: expected.clone() }]);
    assert_eq!((claims.claim(&task(1)), claims.claim(&task(2))), (None, Some(&expected)));
    let changes =
        claims.apply(Command::End { task: task(2), ending: Ending::Exited(0), heir: None }).unwrap().changes;
    assert_eq!(changes, [Change::Ended(expected)]);
    assert!(on(&claims, DATA_01).is_empty());
    let again = claims
        .apply(Command::End { task: task(2), ending: Ending::Exited(0), heir: Some(heir_of(3)) })
        .unwrap();
    assert!(again.changes.is_empty(), "who has no claim leaves none");
}

#[test]
fn nobody_inherits_a_shared_list() {
    let mut claims = machine();
    take(&mut claims, list(INFRA_8), &[1]);
    assert!(!claims.is_inheritable(claims.claim(&task(1)).unwrap()));
    let effects = claims
        .apply(Command::End { task: task(1), ending: Ending::Exited(0), heir: Some(heir_of(2)) })
        .unwrap();
    assert!(matches!(effects.changes.as_slice(), [Change::Ended(_)]));
    assert!(on(&claims, INFRA_8).is_empty());
}

#[test]
fn who_has_a_claim_or_is_getting_one_inherits_nothing() {
    for in_flight in [false, true] {
        let mut claims = machine();
        take(&mut claims, list(DATA_01), &[1]);
        let plan = write(&mut claims, request(list(DATA_23), &[2], &[])).unwrap().plan;
        if !in_flight {
            claims.apply(Command::Settle(completed(&plan))).unwrap();
        }
        let effects = claims
            .apply(Command::End { task: task(1), ending: Ending::Exited(0), heir: Some(heir_of(2)) })
            .unwrap();
        assert!(matches!(effects.changes.as_slice(), [Change::Ended(_)]));
        assert!(on(&claims, DATA_01).is_empty());
    }
}

#[test]
fn nobody_inherits_a_list_that_a_write_in_flight_gives_to_another() {
    let mut claims = machine();
    take(&mut claims, list(DATA_01), &[1]);
    let plan = write(&mut claims, request(list(DATA_01), &[2], &[1])).unwrap().plan;
    let effects = claims
        .apply(Command::End { task: task(1), ending: Ending::Exited(0), heir: Some(heir_of(3)) })
        .unwrap();
    assert!(matches!(effects.changes.as_slice(), [Change::Ended(_)]));
    claims.apply(Command::Settle(completed(&plan))).unwrap();
    assert_eq!(on(&claims, DATA_01), [2]);
}

#[test]
fn a_list_takes_nobody_before_it_is_open_nor_after_it_was_closed() {
    let mut claims = machine();
    let id = ListId(30);
    add_list(&mut claims, DATA, id, "9").unwrap();
    let nobody_gets_on = |claims: &mut Claims| {
        let refused = refusal(write(claims, request(list(id), &[1], &[])));
        assert_eq!((refused.errno(), refused), (Errno::ENODEV, Refusal::Removed));
        let all = places(&mut claims.clone(), request(pool(DATA), &[1, 2, 3], &[]));
        assert!(all.iter().all(|(_, list, _)| *list != id));
        let four = refusal(write(claims, request(pool(DATA), &[1, 2, 3, 4], &[])));
        assert!(matches!(four, Refusal::NoneFree { taken: 4, .. }), "{four:?}");
    };
    nobody_gets_on(&mut claims);
    claims.apply(Command::OpenList(id)).unwrap();
    take(&mut claims.clone(), list(id), &[1]);
    claims.apply(Command::CloseList { id, force: false, now: NOW }).unwrap();
    assert!(claims.list(id).unwrap().is_being_removed());
    nobody_gets_on(&mut claims);
    // Its removal could not be stored: it is there again.
    claims.apply(Command::OpenList(id)).unwrap();
    take(&mut claims.clone(), list(id), &[1]);
    claims.apply(Command::CloseList { id, force: false, now: NOW }).unwrap();
    claims.apply(Command::RemoveList(id)).unwrap();
    assert!(claims.list(id).is_none());
    assert!(claims.pool(DATA).unwrap().lists().all(|list| list != id));
    for command in [Command::OpenList(id), Command::CloseList { id, force: false, now: NOW }] {
        assert_eq!(refusal(claims.apply(command)), Refusal::Removed);
    }
}

#[test]
fn a_list_with_a_task_on_it_or_on_its_way_is_not_removed() {
    let mut claims = machine();
    let plan = write(&mut claims, request(list(INFRA_8), &[1], &[])).unwrap().plan;
    let close = || Command::CloseList { id: INFRA_8, force: false, now: NOW + 3 };
    assert_eq!(refusal(claims.apply(close())).holder().map(|holder| holder.task), Some(task(1)));
    claims.apply(Command::Settle(completed(&plan))).unwrap();
    let refused = refusal(claims.apply(close()));
    assert_eq!(refused.holder(), Some(Holder { task: task(1), list: INFRA_8, held: 3 }));
    assert_eq!(refused.errno(), Errno::EBUSY);
    claims.apply(Command::End { task: task(1), ending: Ending::Exited(0), heir: None }).unwrap();
    claims.apply(close()).unwrap();
}

#[test]
fn lists_are_disjoint_over_all_pools() {
    for (pool, text, expected) in [
        (DATA, "9", Ok(())),
        (INFRA, "9-11", Ok(())),
        (DATA, "0-1", Err(Errno::EEXIST)),
        (DATA, "0,1", Err(Errno::EBUSY)),
        (DATA, "5-9", Err(Errno::EBUSY)),
        (INFRA, "0-1", Err(Errno::EBUSY)),
        (INFRA, "3", Err(Errno::EBUSY)),
        (PoolId(3), "9", Err(Errno::ENODEV)),
    ] {
        let mut claims = machine();
        let found = add_list(&mut claims, pool, ListId(30), text).map_err(|refusal| refusal.errno());
        assert_eq!(found, expected, "{pool:?} {text}");
        assert_eq!(claims.list(ListId(30)).is_some(), expected.is_ok());
    }
    let Err(Refusal::Overlap { other, both }) = add_list(&mut machine(), INFRA, ListId(30), "5-9") else {
        panic!("it overlaps")
    };
    assert_eq!((other.to_string().as_str(), both), ("dataplane 4-5", cpus("5")));
    let none = Command::AddList { pool: DATA, id: ListId(30), name: String::new(), cpus: CpuSet::new() };
    assert_eq!(refusal(machine().apply(none)).errno(), Errno::EINVAL);
}

#[test]
fn a_list_that_is_leaving_keeps_its_cpus_until_it_is_gone() {
    let mut claims = machine();
    claims.apply(Command::CloseList { id: DATA_01, force: false, now: NOW }).unwrap();
    assert_eq!(add_list(&mut claims, INFRA, ListId(30), "1").unwrap_err().errno(), Errno::EBUSY);
    claims.apply(Command::RemoveList(DATA_01)).unwrap();
    add_list(&mut claims, INFRA, ListId(30), "1").unwrap();
}

#[test]
fn pools_have_names_of_their_own_and_go_when_they_have_no_lists() {
    let mut claims = machine();
    let refused = add_pool(&mut claims, PoolId(3), "infra", Exclusivity::Shared).unwrap_err();
    assert_eq!((refused.errno(), refused), (Errno::EEXIST, Refusal::Exists));
    let refused = refusal(claims.apply(Command::RemovePool(INFRA)));
    assert_eq!((refused.errno(), refused), (Errno::ENOTEMPTY, Refusal::PoolHasLists { pool: name("infra") }));
    for id in [INFRA_8, INFRA_67] {
        claims.apply(Command::CloseList { id, force: false, now: NOW }).unwrap();
        claims.apply(Command::RemoveList(id)).unwrap();
    }
    claims.apply(Command::RemovePool(INFRA)).unwrap();
    assert!(claims.pool(INFRA).is_none());
    let gone: [Result<(), Refusal>; 3] = [
        claims.apply(Command::RemovePool(INFRA)).map(|_| ()).map_err(Refusal::from),
        write(&mut claims, request(pool(INFRA), &[1], &[])).map(|_| ()).map_err(Refusal::from),
        set(&mut claims, INFRA, Exclusivity::Shared),
    ];
    assert!(gone.iter().all(|refused| *refused == Err(Refusal::Removed)), "{gone:?}");
    add_pool(&mut claims, PoolId(3), "infra", Exclusivity::Shared).unwrap();
}

#[test]
fn a_pool_becomes_exclusive_only_where_no_list_has_two_tasks_on_it_or_on_their_way() {
    let mut claims = machine();
    take(&mut claims, list(INFRA_8), &[1]);
    let plan = write(&mut claims, request(list(INFRA_8), &[2], &[])).unwrap().plan;
    let refused = set(&mut claims, INFRA, Exclusivity::Exclusive).unwrap_err();
    let Refusal::SharedByMany { list: two, tasks: 2 } = &refused else { panic!("{refused:?}") };
    assert_eq!((two.to_string().as_str(), refused.errno()), ("infra 8", Errno::EBUSY));
    claims.apply(Command::Settle(completed(&plan))).unwrap();
    assert_eq!(set(&mut claims, INFRA, Exclusivity::Exclusive).unwrap_err(), refused);
    assert_eq!(claims.pool(INFRA).unwrap().exclusivity(), Exclusivity::Shared);
    settle(&mut claims, request(list(INFRA_67), &[2], &[]));
    set(&mut claims, INFRA, Exclusivity::Exclusive).unwrap();
    assert_eq!(claims.exclusive_cpus(), cpus("0-8"));
    assert_eq!(refusal(write(&mut claims, request(pool(INFRA), &[3], &[]))).errno(), Errno::EBUSY);
    set(&mut claims, INFRA, Exclusivity::Shared).unwrap();
    assert_eq!(claims.exclusive_cpus(), cpus("0-5"));
    take(&mut claims, pool(INFRA), &[3]);
}

/// Both pools and all lists, without claims.
fn machine() -> Claims {
    machine_with_room_for(100)
}

fn machine_with_room_for(tasks: usize) -> Claims {
    let mut claims = Claims::new(tasks);
    add_pool(&mut claims, DATA, "dataplane", Exclusivity::Exclusive).unwrap();
    add_pool(&mut claims, INFRA, "infra", Exclusivity::Shared).unwrap();
    for (pool, id, cpus) in [
        (DATA, DATA_45, "4-5"),
        (DATA, DATA_01, "0-1"),
        (DATA, DATA_23, "2-3"),
        (INFRA, INFRA_8, "8"),
        (INFRA, INFRA_67, "6-7"),
    ] {
        add_list(&mut claims, pool, id, cpus).unwrap();
        claims.apply(Command::OpenList(id)).unwrap();
    }
    claims
}

fn add_pool(claims: &mut Claims, id: PoolId, text: &str, exclusivity: Exclusivity) -> Result<(), Refusal> {
    claims.apply(Command::AddPool { id, name: name(text), exclusivity }).map(|_| ()).map_err(Refusal::from)
}

fn add_list(claims: &mut Claims, pool: PoolId, id: ListId, text: &str) -> Result<(), Refusal> {
    claims
        .apply(Command::AddList { pool, id, name: text.into(), cpus: cpus(text) })
        .map(|_| ())
        .map_err(Refusal::from)
}

fn set(claims: &mut Claims, pool: PoolId, exclusivity: Exclusivity) -> Result<(), Refusal> {
    claims.apply(Command::SetExclusivity { pool, exclusivity }).map(|_| ()).map_err(Refusal::from)
}

fn write(claims: &mut Claims, request: Request) -> Result<Effects, Rejected> {
    claims.apply(Command::Write(request))
}

/// The placements that a write would make; their tasks stay in flight.
fn places(claims: &mut Claims, request: Request) -> Vec<(u32, ListId, Origin)> {
    let plan = write(claims, request).unwrap().plan;
    plan.placements.iter().map(|p| (p.task.pid.get(), p.list, p.origin())).collect()
}

/// Returns a plan as carried out for tasks that had all CPUs.
fn completed(plan: &Plan) -> CompletedPlan {
    completed_with(plan, &SavedMask::All)
}

fn completed_with(plan: &Plan, saved: &SavedMask) -> CompletedPlan {
    let complete = |placement: &Placement| {
        let claim = match &placement.kind {
            ClaimKind::New(pending) => Arc::new(pending.complete(saved.clone(), cgroup(7, "/a"))),
            ClaimKind::Move { to, .. } => to.clone(),
            ClaimKind::Repeat(claim) => claim.clone(),
        };
        placement.complete(claim)
    };
    CompletedPlan {
        placements: plan.placements.iter().map(complete).collect(),
        releases: plan.releases.clone(),
    }
}

/// Decides a write and carries it out.
fn settle(claims: &mut Claims, request: Request) -> Effects {
    let plan = write(claims, request).unwrap().plan;
    claims.apply(Command::Settle(completed(&plan))).unwrap()
}

fn take(claims: &mut Claims, target: Target, tasks: &[u32]) {
    settle(claims, request(target, tasks, &[]));
}

/// The leader had this mask before.
fn take_with_mask(claims: &mut Claims, target: Target, task: u32, mask: &str) {
    let plan = write(claims, request(target, &[task], &[])).unwrap().plan;
    claims.apply(Command::Settle(completed_with(&plan, &SavedMask::Cpus(cpus(mask))))).unwrap();
}

/// By root.
fn request(target: Target, claim: &[u32], release: &[u32]) -> Request {
    let subjects = |numbers: &[u32]| numbers.iter().map(|&n| info(n)).collect();
    Request {
        target,
        claim: subjects(claim),
        release: subjects(release),
        users: [0, 0].map(User::from),
        unsuitable: HashSet::new(),
        offline: CpuSet::new(),
        before: 0,
        now: NOW,
    }
}

fn refusal(result: Result<Effects, Rejected>) -> Refusal {
    match result {
        Err(Rejected::Refused(refusal)) => refusal,
        other => panic!("not refused: {other:?}"),
    }
}

fn on(claims: &Claims, list: ListId) -> Vec<u32> {
    claims.list(list).unwrap().tasks().iter().map(|task| task.pid.get()).collect()
}

fn list(id: ListId) -> Target {
    Target::List(id)
}

fn pool(id: PoolId) -> Target {
    Target::Pool(id)
}

fn name(text: &str) -> PoolName {
    text.parse().unwrap()
}

fn cpus(text: &str) -> CpuSet {
    text.parse().unwrap()
}

fn task(n: u32) -> TaskId {
    TaskId { pid: super::super::task::Pid::new(n).unwrap(), ino: 1000 + u64::from(n) }
}

fn root() -> Uids {
    Uids { real: 0, effective: 0, saved: 0 }
}

fn info(n: u32) -> TaskInfo {
    info_of(n, USER)
}

fn info_of(n: u32, uid: u32) -> TaskInfo {
    TaskInfo {
        task: task(n),
        uids: Uids { real: uid, effective: uid, saved: uid },
        access: Access::default(),
        kernel_thread: false,
        ours: false,
    }
}

fn heir_of(n: u32) -> Heir {
    Heir { info: info(n), kin: kin("/a") }
}

/// The facts about a holder in this cgroup.
fn kin(path: &str) -> Kin {
    Kin { cgroups: smallvec::smallvec![cgroup(7, path).cgroups], ..Kin::default() }
}

fn cgroup(number: u64, path: &str) -> CgroupId {
    CgroupId { number, cgroups: Arc::new(Cgroups::parse(format!("0::{path}").as_bytes())) }
}

/// As root would have made it.
fn claim(n: u32, list: u64) -> Arc<Claim> {
    Arc::new(Claim {
        task: task(n),
        list: ListId(list),
        saved: SavedMask::All,
        since: NOW,
        uid: USER,
        cgroup: 7,
        kin: kin("/a"),
        by_root: true,
    })
}
