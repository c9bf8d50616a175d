//! Draining, renames, other CPUs for a list, and removal by force.

use super::*;
use crate::model::pool::Mode;

fn drain(claims: &mut Claims, list: ListId, draining: bool) {
    claims.apply(Command::SetDraining { list, draining }).unwrap();
}

fn prepare(id: ListId, exclusivity: Exclusivity, mode: Mode, text: &str) -> Command {
    Command::PrepareList { id, exclusivity, mode, cpus: cpus(text), now: NOW }
}

fn change(id: ListId, pool: PoolId, text: &str) -> Command {
    Command::ChangeList { id, pool, name: text.to_owned(), cpus: cpus(text) }
}

#[test]
fn a_draining_list_keeps_its_tasks_and_gets_no_new_one() {
    let mut claims = machine();
    take(&mut claims, list(DATA_01), &[1]);
    drain(&mut claims, DATA_01, true);
    drain(&mut claims, DATA_23, true);
    take(&mut claims, list(DATA_01), &[1]);
    take(&mut claims, pool(DATA), &[1]);
    assert_eq!(on(&claims, DATA_01), [1], "who is there stays there");
    let refused = refusal(write(&mut claims, request(list(DATA_23), &[2], &[])));
    assert!(matches!(&refused, Refusal::Draining { list } if list.cpus == "2-3"), "{refused:?}");
    assert_eq!(places(&mut claims, request(pool(DATA), &[2], &[])), [(2, DATA_45, Origin::New)]);
    let full = refusal(write(&mut claims, request(pool(DATA), &[3], &[])));
    assert!(matches!(full, Refusal::NoneFree { taken: 2, draining: 1, .. }), "{full:?}");
    assert!(full.sentence("1").starts_with("no list of dataplane is free (2 taken, 1 draining)"));
    drain(&mut claims, DATA_23, false);
    take(&mut claims, list(DATA_23), &[3]);
}

#[test]
fn no_draining_list_is_named_as_free() {
    let mut claims = machine();
    take(&mut claims, list(DATA_01), &[1]);
    drain(&mut claims, DATA_23, true);
    let Refusal::Held { free, .. } = refusal(write(&mut claims, request(list(DATA_01), &[2], &[]))) else {
        panic!("it is held")
    };
    assert_eq!(free.as_deref(), Some("4-5"));
}

#[test]
fn a_shared_pool_passes_over_a_draining_list() {
    let mut claims = machine();
    drain(&mut claims, INFRA_67, true);
    take(&mut claims, pool(INFRA), &[1, 2]);
    assert_eq!((on(&claims, INFRA_67), on(&claims, INFRA_8)), (vec![], vec![1, 2]));
}

#[test]
fn an_heir_a_move_and_a_recorded_claim_are_as_before_on_a_draining_list() {
    let mut claims = machine();
    take(&mut claims, list(DATA_01), &[1]);
    drain(&mut claims, DATA_01, true);
    let end = Command::End { task: task(1), ending: Ending::Killed(9), heir: Some(heir_of(2)) };
    claims.apply(end).unwrap();
    assert_eq!(on(&claims, DATA_01), [2]);
    take(&mut claims, list(DATA_23), &[2]);
    assert_eq!((on(&claims, DATA_01), on(&claims, DATA_23)), (vec![], vec![2]));
    claims.apply(Command::Restore(claim(3, DATA_01.0))).unwrap();
    assert_eq!(on(&claims, DATA_01), [3]);
}

#[test]
fn a_renamed_pool_has_its_lists_and_claims() {
    let mut claims = machine();
    take(&mut claims, list(DATA_01), &[1]);
    let rename = |text: &str| Command::RenamePool { id: DATA, name: name(text) };
    assert_eq!(refusal(claims.apply(rename("infra"))), Refusal::Exists);
    claims.apply(rename("fast")).unwrap();
    assert_eq!(claims.pool(DATA).unwrap().name().as_str(), "fast");
    assert_eq!(claims.list(DATA_01).unwrap().name().to_string(), "fast 0-1");
    assert_eq!(on(&claims, DATA_01), [1]);
    claims.apply(rename("fast")).expect("its own name");
}

#[test]
fn a_list_moves_to_another_pool_with_its_task() {
    let mut claims = machine();
    take(&mut claims, list(DATA_01), &[1]);
    let plan = claims.apply(prepare(DATA_01, Exclusivity::Shared, Mode::Affinity, "0-1")).unwrap().plan;
    assert!(plan.placements.is_empty(), "no mask changes");
    assert_eq!(write(&mut claims, request(list(DATA_01), &[2], &[])).unwrap_err(), Rejected::Busy);
    claims.apply(change(DATA_01, INFRA, "0-1")).unwrap();
    take(&mut claims, list(DATA_01), &[2]);
    assert_eq!(on(&claims, DATA_01), [1, 2]);
    assert_eq!(claims.pool(DATA).unwrap().taken().count(), 0);
    assert_eq!(claims.pool(INFRA).unwrap().taken().collect::<Vec<_>>(), [DATA_01]);
    assert_eq!(claims.list(DATA_01).unwrap().name().to_string(), "infra 0-1");
    let back = claims.apply(prepare(DATA_01, Exclusivity::Exclusive, Mode::Affinity, "0-1"));
    assert!(matches!(refusal(back), Refusal::SharedByMany { tasks: 2, .. }));
}

#[test]
fn a_list_gets_other_cpus_and_its_tasks_are_reserved_until_then() {
    let mut claims = machine();
    take(&mut claims, list(INFRA_67), &[1, 2]);
    let plan = claims.apply(prepare(INFRA_67, Exclusivity::Shared, Mode::Affinity, "6-7,9")).unwrap().plan;
    let moved: Vec<_> = plan.placements.iter().map(|it| (it.task.pid.get(), it.cpus.to_string())).collect();
    assert_eq!(moved, [(1, "6-7,9".to_owned()), (2, "6-7,9".to_owned())]);
    assert_eq!(write(&mut claims, request(list(INFRA_67), &[], &[1])).unwrap_err(), Rejected::Busy);
    assert_eq!(write(&mut claims, request(list(INFRA_67), &[3], &[])).unwrap_err(), Rejected::Busy);
    take(&mut claims, pool(INFRA), &[4]);
    assert_eq!(on(&claims, INFRA_8), [4], "the pool has another list");
    claims.apply(change(INFRA_67, INFRA, "6-7,9")).unwrap();
    claims.apply(Command::Settle(CompletedPlan::unchanged(&plan))).unwrap();
    assert_eq!((on(&claims, INFRA_67), claims.list(INFRA_67).unwrap().cpus()), (vec![1, 2], &cpus("6-7,9")));
    settle(&mut claims, request(list(INFRA_67), &[3], &[1]));
    assert_eq!(on(&claims, INFRA_67), [2, 3]);
}

#[test]
fn a_change_that_is_cancelled_leaves_everything_as_before() {
    let mut claims = machine();
    take(&mut claims, list(DATA_01), &[1]);
    let plan = claims.apply(prepare(DATA_01, Exclusivity::Exclusive, Mode::Affinity, "0")).unwrap().plan;
    claims.apply(Command::CancelList(DATA_01)).unwrap();
    claims.apply(Command::Abandon(plan)).unwrap();
    take(&mut claims, list(DATA_01), &[1]);
    assert_eq!((on(&claims, DATA_01), claims.list(DATA_01).unwrap().cpus()), (vec![1], &cpus("0-1")));
}

#[test]
fn a_pool_whose_only_other_list_changes_is_waited_for() {
    let mut claims = machine();
    take(&mut claims, pool(DATA), &[1, 2]);
    claims.apply(prepare(DATA_45, Exclusivity::Exclusive, Mode::Affinity, "4")).unwrap();
    assert_eq!(write(&mut claims, request(pool(DATA), &[3], &[])).unwrap_err(), Rejected::Busy);
    claims.apply(change(DATA_45, DATA, "4")).unwrap();
    take(&mut claims, pool(DATA), &[3]);
    assert_eq!(on(&claims, DATA_45), [3]);
}

#[test]
fn a_list_waits_for_the_tasks_that_are_in_flight_on_it() {
    let mut claims = machine();
    take(&mut claims, list(DATA_01), &[1]);
    let plan = write(&mut claims, request(list(DATA_01), &[], &[1])).unwrap().plan;
    let resize = || prepare(DATA_01, Exclusivity::Exclusive, Mode::Affinity, "0");
    assert_eq!(claims.apply(resize()).unwrap_err(), Rejected::Busy);
    let close = || Command::CloseList { id: DATA_01, force: true, now: NOW };
    assert_eq!(claims.apply(close()).unwrap_err(), Rejected::Busy);
    claims.apply(Command::Settle(completed(&plan))).unwrap();
    claims.apply(resize()).unwrap();
}

#[test]
fn no_list_overlaps_another_after_a_change() {
    let mut claims = machine();
    assert!(matches!(
        refusal(claims.apply(change(DATA_01, DATA, "0-2"))),
        Refusal::Overlap { both, .. } if both == cpus("2")
    ));
    assert_eq!(refusal(claims.apply(change(DATA_01, PoolId(99), "0-1"))), Refusal::Removed);
    claims.apply(change(DATA_01, DATA, "1")).expect("its own CPUs are no overlap");
    let found: Vec<_> = claims.pool(DATA).unwrap().lists().collect();
    assert_eq!(found, [DATA_01, DATA_23, DATA_45]);
    claims.apply(change(DATA_01, DATA, "9")).unwrap();
    let found: Vec<_> = claims.pool(DATA).unwrap().lists().collect();
    assert_eq!(found, [DATA_23, DATA_45, DATA_01], "lists are ordered by their CPUs");
}

#[test]
fn a_task_in_a_partition_keeps_its_list_as_it_is() {
    let mut claims = machine();
    claims.apply(Command::SetMode { pool: DATA, mode: Mode::Isolated }).unwrap();
    take(&mut claims, list(DATA_01), &[1]);
    for (mode, text, fits) in
        [(Mode::Isolated, "0-1", true), (Mode::Isolated, "0", false), (Mode::Affinity, "0-1", false)]
    {
        let answer = claims.apply(prepare(DATA_01, Exclusivity::Exclusive, mode, text));
        assert_eq!(answer.is_ok(), fits, "{mode:?} {text}: {answer:?}");
        claims.apply(Command::CancelList(DATA_01)).unwrap();
    }
    claims.apply(prepare(DATA_23, Exclusivity::Exclusive, Mode::Affinity, "2")).expect("nobody is there");
}

#[test]
fn a_list_that_is_removed_by_force_releases_its_tasks_and_nobody_inherits_it() {
    let mut claims = machine();
    take(&mut claims, list(DATA_01), &[1]);
    let plan = claims.apply(Command::CloseList { id: DATA_01, force: true, now: NOW }).unwrap().plan;
    assert_eq!(plan.releases.iter().map(|claim| claim.task).collect::<Vec<_>>(), [task(1)]);
    let end = Command::End { task: task(1), ending: Ending::Killed(9), heir: Some(heir_of(2)) };
    assert!(matches!(claims.apply(end).unwrap().changes[..], [Change::Reclaimed(_)]));
    let releases = plan.releases;
    claims.apply(Command::Settle(CompletedPlan { placements: Vec::new(), releases })).unwrap();
    claims.apply(Command::RemoveList(DATA_01)).unwrap();
    assert_eq!(claims.claims().count(), 0);
}

#[test]
fn a_pool_becomes_exclusive_and_isolated_in_one_step_and_back() {
    let mut claims = machine();
    let exclusivity = |exclusivity| Command::PrepareExclusivity { pool: INFRA, exclusivity };
    let mode = |mode| Command::PrepareMode { pool: INFRA, mode, now: NOW };
    claims.apply(exclusivity(Exclusivity::Exclusive)).unwrap();
    claims.apply(mode(Mode::Isolated)).unwrap();
    set(&mut claims, INFRA, Exclusivity::Exclusive).unwrap();
    claims.apply(Command::SetMode { pool: INFRA, mode: Mode::Isolated }).unwrap();
    assert!(matches!(refusal(claims.apply(exclusivity(Exclusivity::Shared))), Refusal::IsolatedPool { .. }));
    claims.apply(mode(Mode::Affinity)).unwrap();
    claims.apply(exclusivity(Exclusivity::Shared)).unwrap();
    claims.apply(Command::SetMode { pool: INFRA, mode: Mode::Affinity }).unwrap();
    set(&mut claims, INFRA, Exclusivity::Shared).unwrap();
}
