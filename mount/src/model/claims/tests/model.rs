//! The claim machine against a naive one, over random histories.
//!
//! Owns: the naive machine, which keeps plain lists, counts everything each time, and is slow and short;
//! and the invariants, looked for from outside.
//!
//! Longer than 400 lines because the naive machine and the histories that compare it are read together.

use std::collections::BTreeSet;

use nix::errno::Errno;
use proptest::prelude::*;

use super::super::{Claims, Stage};
use super::{NOW, completed, cpus, info_of, kin, task};
use crate::model::command::{
    Change, Command, CompletedPlan, Effects, Ending, Heir, Origin, Plan, Rejected, Request, Target,
};
use crate::model::cpuset::CpuSet;
use crate::model::pool::{Exclusivity, ListId, Mode, PoolId};
use crate::model::refusal::Refusal;
use crate::model::rights::User;
use crate::model::task::TaskId;

/// Tasks 1 to 4 belong to this user, the others to root.
const USER: u32 = 1000;
const TASKS: [u32; 7] = [1, 2, 3, 4, 5, 6, 7];
/// At most this many tasks at a time, and half of them not for root.
const LIMIT: usize = 6;
const CPU_LISTS: [&str; 9] = ["0", "1", "2-3", "4", "5-7", "0-1", "6", "3-4", "7"];
const POOLS: [&str; 3] = ["a", "b", "c"];

/// The effects of an operation, or the errno of its refusal.
type Answer = Result<Vec<String>, Errno>;

#[derive(Clone, Debug)]
enum Op {
    Write {
        target: At,
        claim: Vec<u32>,
        release: Vec<u32>,
        users: [u32; 2],
        unsuitable: Vec<usize>,
    },
    Finish {
        plan: usize,
        settle: bool,
    },
    End {
        task: u32,
        heir: Option<u32>,
    },
    Restore {
        task: u32,
        list: usize,
    },
    AddPool {
        name: usize,
        exclusive: bool,
    },
    RemovePool(usize),
    AddList {
        pool: usize,
        cpus: usize,
    },
    OpenList(usize),
    CloseList(usize),
    RemoveList(usize),
    SetExclusive {
        pool: usize,
        exclusive: bool,
    },
    PrepareExclusive {
        pool: usize,
        exclusive: bool,
    },
    CancelExclusive(usize),
    Drain {
        list: usize,
        draining: bool,
    },
    /// Gives a list another pool and other CPUs; or only prepares that, and cancels it.
    Change {
        list: usize,
        pool: usize,
        cpus: usize,
        cancel: bool,
    },
}

/// Lists and pools by their place among all that there ever were.
#[derive(Clone, Copy, Debug)]
enum At {
    List(usize),
    Pool(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let some_task = || prop::sample::select(&TASKS[..]);
    let index = || 0..16_usize;
    let few = |most| prop::sample::subsequence(&TASKS[..], 0..=most);
    let write = (
        prop_oneof![index().prop_map(At::List), index().prop_map(At::Pool)],
        prop_oneof![4 => some_task().prop_map(|task| vec![task]), 2 => few(3)],
        prop_oneof![4 => Just(Vec::new()), 2 => few(2)],
        prop_oneof![5 => Just([0, 0]), 4 => Just([USER, USER]), 1 => Just([0, USER]), 1 => Just([USER, 0])],
        prop_oneof![3 => Just(Vec::new()), 1 => prop::collection::vec(index(), 0..4)],
    );
    let write = write.prop_map(|(target, claim, release, users, unsuitable)| Op::Write {
        target,
        claim,
        release,
        users,
        unsuitable,
    });
    prop_oneof![
        14 => write,
        12 => (index(), prop::bool::weighted(0.8)).prop_map(|(plan, settle)| Op::Finish { plan, settle }),
        4 => (some_task(), prop::option::of(some_task())).prop_map(|(task, heir)| Op::End { task, heir }),
        1 => (some_task(), index()).prop_map(|(task, list)| Op::Restore { task, list }),
        1 => (0..POOLS.len(), any::<bool>()).prop_map(|(name, exclusive)| Op::AddPool { name, exclusive }),
        1 => index().prop_map(Op::RemovePool),
        2 => (index(), 0..CPU_LISTS.len()).prop_map(|(pool, cpus)| Op::AddList { pool, cpus }),
        2 => index().prop_map(Op::OpenList),
        1 => index().prop_map(Op::CloseList),
        1 => index().prop_map(Op::RemoveList),
        2 => (index(), any::<bool>()).prop_map(|(pool, exclusive)| Op::SetExclusive { pool, exclusive }),
        2 => (index(), any::<bool>()).prop_map(|(pool, exclusive)| Op::PrepareExclusive { pool, exclusive }),
        1 => index().prop_map(Op::CancelExclusive),
        1 => (index(), any::<bool>()).prop_map(|(list, draining)| Op::Drain { list, draining }),
        2 => (index(), index(), 0..CPU_LISTS.len(), prop::bool::weighted(0.2))
            .prop_map(|(list, pool, cpus, cancel)| Op::Change { list, pool, cpus, cancel }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn any_history_has_the_answers_of_the_naive_machine(
        exclusive: bool,
        ops in prop::collection::vec(op(), 1..60),
    ) {
        let mut both = Both::new(exclusive);
        for op in ops {
            let (found, expected) = both.step(&op);
            prop_assert_eq!(found, expected, "{:?}", op);
            both.check()?;
        }
        while !both.plans.is_empty() {
            let (found, expected) = both.step(&Op::Finish { plan: 0, settle: true });
            prop_assert_eq!(found, expected);
            both.check()?;
        }
        prop_assert!(both.claims.lists.values().all(|list| list.reserved.is_empty()));
        prop_assert!(both.claims.in_flight.is_empty());
    }
}

/// The machine and the naive one, and the plans of the former in the order of the latter's.
struct Both {
    claims: Claims,
    naive: Naive,
    plans: Vec<Plan>,
    /// Every pool and list that there ever was.
    pools: Vec<u64>,
    lists: Vec<u64>,
}

impl Both {
    /// Two pools with two lists each, so that short histories have something to claim.
    fn new(exclusive: bool) -> Self {
        let mut both = Self {
            claims: Claims::new(LIMIT),
            naive: Naive::default(),
            plans: Vec::new(),
            pools: Vec::new(),
            lists: Vec::new(),
        };
        let pools = [(0, true), (1, exclusive)].map(|(name, exclusive)| Op::AddPool { name, exclusive });
        // The higher CPUs first: age must not decide.
        let lists = [(0, 2), (0, 0), (1, 4), (1, 3)].map(|(pool, cpus)| Op::AddList { pool, cpus });
        for op in pools.into_iter().chain(lists).chain((0..4).map(Op::OpenList)) {
            assert_eq!(both.step(&op), (nothing(), nothing()), "{op:?}");
        }
        both
    }

    /// Returns the answers of the machine and of the naive one.
    fn step(&mut self, op: &Op) -> (Answer, Answer) {
        let at = |all: &[u64], index: usize| all[index % all.len()];
        let exclusivity = |on: bool| if on { Exclusivity::Exclusive } else { Exclusivity::Shared };
        match *op {
            Op::Write { target, ref claim, ref release, users, ref unsuitable } => {
                let target = match target {
                    At::List(index) => Target::List(ListId(at(&self.lists, index))),
                    At::Pool(index) => Target::Pool(PoolId(at(&self.pools, index))),
                };
                let unsuitable: Vec<u64> = unsuitable.iter().map(|&index| at(&self.lists, index)).collect();
                let expected = self.naive.write(&target, claim, release, users, &unsuitable);
                let owned = |n: &u32| info_of(*n, owner(*n));
                let request = Request {
                    target,
                    claim: claim.iter().map(owned).collect(),
                    release: release.iter().map(owned).collect(),
                    users: users.map(User::from),
                    unsuitable: unsuitable
                        .iter()
                        .flat_map(|&list| claim.iter().map(move |&n| (task(n), ListId(list))))
                        .collect(),
                    offline: CpuSet::new(),
                    before: 0,
                    now: NOW,
                };
                let effects = self.claims.apply(Command::Write(request));
                let found = answer(&effects);
                if let Ok(effects) = effects {
                    self.plans.push(effects.plan);
                }
                (found, expected)
            }
            Op::Finish { .. } if self.plans.is_empty() => (nothing(), nothing()),
            Op::Finish { plan, settle } => {
                let plan = plan % self.plans.len();
                let ours = self.plans.remove(plan);
                let theirs = self.naive.plans.remove(plan);
                let command = if settle { Command::Settle(completed(&ours)) } else { Command::Abandon(ours) };
                (answer(&self.claims.apply(command)), self.naive.finish(theirs, settle))
            }
            Op::End { task: dead, heir } => {
                // The dead inherit nothing.
                let heir = heir.filter(|heir| *heir != dead);
                let info = heir.map(|heir| Heir { info: info_of(heir, owner(heir)), kin: kin("/a") });
                let command = Command::End { task: task(dead), ending: Ending::Killed(9), heir: info };
                (answer(&self.claims.apply(command)), self.naive.end(dead, heir))
            }
            Op::Restore { task, list } => {
                let list = at(&self.lists, list);
                // An earlier daemon had no claim on a list that was going.
                if self.naive.list(list).is_some_and(|list| list.stage != Stage::Open) {
                    return (nothing(), nothing());
                }
                let claim = super::claim(task, list);
                (answer(&self.claims.apply(Command::Restore(claim))), self.naive.restore(task, list))
            }
            Op::AddPool { name, exclusive } => {
                let id = self.naive.new_id();
                let command = Command::AddPool {
                    id: PoolId(id),
                    name: POOLS[name].parse().unwrap(),
                    exclusivity: exclusivity(exclusive),
                };
                let found = answer(&self.claims.apply(command));
                let expected = self.naive.add_pool(id, POOLS[name], exclusive);
                self.pools.extend(expected.is_ok().then_some(id));
                (found, expected)
            }
            Op::RemovePool(pool) => {
                let pool = at(&self.pools, pool);
                let found = answer(&self.claims.apply(Command::RemovePool(PoolId(pool))));
                (found, self.naive.remove_pool(pool))
            }
            Op::AddList { pool, cpus: index } => {
                let (id, pool, name) = (self.naive.new_id(), at(&self.pools, pool), CPU_LISTS[index]);
                let command = Command::AddList {
                    pool: PoolId(pool),
                    id: ListId(id),
                    name: name.into(),
                    cpus: cpus(name),
                };
                let found = answer(&self.claims.apply(command));
                let expected = self.naive.add_list(id, pool, name);
                self.lists.extend(expected.is_ok().then_some(id));
                (found, expected)
            }
            Op::OpenList(list) => {
                let list = at(&self.lists, list);
                let found = answer(&self.claims.apply(Command::OpenList(ListId(list))));
                (found, self.naive.open_list(list))
            }
            Op::CloseList(list) => {
                let list = at(&self.lists, list);
                let close = Command::CloseList { id: ListId(list), force: false, now: NOW };
                (answer(&self.claims.apply(close)), self.naive.close_list(list))
            }
            Op::RemoveList(list) => {
                let list = at(&self.lists, list);
                // Only a list that was closed, or never opened, is taken away.
                if self.naive.list(list).is_some_and(|list| list.stage == Stage::Open) {
                    return (nothing(), nothing());
                }
                let found = answer(&self.claims.apply(Command::RemoveList(ListId(list))));
                self.naive.lists.retain(|other| other.id != list);
                (found, nothing())
            }
            Op::SetExclusive { pool, exclusive } => {
                let pool = at(&self.pools, pool);
                let command =
                    Command::SetExclusivity { pool: PoolId(pool), exclusivity: exclusivity(exclusive) };
                (answer(&self.claims.apply(command)), self.naive.set_exclusive(pool, exclusive))
            }
            Op::PrepareExclusive { pool, exclusive } => {
                let pool = at(&self.pools, pool);
                let command =
                    Command::PrepareExclusivity { pool: PoolId(pool), exclusivity: exclusivity(exclusive) };
                (answer(&self.claims.apply(command)), self.naive.prepare_exclusive(pool, exclusive))
            }
            Op::CancelExclusive(pool) => {
                let pool = at(&self.pools, pool);
                let found = answer(&self.claims.apply(Command::CancelExclusivity(PoolId(pool))));
                (found, self.naive.cancel_exclusive(pool))
            }
            Op::Drain { list, draining } => {
                let list = at(&self.lists, list);
                let command = Command::SetDraining { list: ListId(list), draining };
                (answer(&self.claims.apply(command)), self.naive.drain(list, draining))
            }
            Op::Change { list, pool, cpus, cancel } => {
                let (list, pool, name) = (at(&self.lists, list), at(&self.pools, pool), CPU_LISTS[cpus]);
                // Only a list that is in use by nobody else's change.
                if self.naive.list(list).is_some_and(|list| list.stage != Stage::Open) {
                    return (nothing(), nothing());
                }
                let found =
                    self.change(list, pool, name, cancel).map_err(|rejected| Refusal::from(rejected).errno());
                (found.map(|()| Vec::new()), self.naive.change(list, pool, name, cancel))
            }
        }
    }

    /// Changes a list as the engine does, or cancels that.
    fn change(&mut self, list: u64, pool: u64, name: &str, cancel: bool) -> Result<(), Rejected> {
        let (id, pool) = (ListId(list), PoolId(pool));
        let change = Command::ChangeList { id, pool, name: name.to_owned(), cpus: cpus(name) };
        self.claims.preview(std::slice::from_ref(&change))?;
        let admits_one = self.naive.admits_one(pool.0);
        let exclusivity = if admits_one { Exclusivity::Exclusive } else { Exclusivity::Shared };
        let (mode, cpus) = (Mode::Affinity, cpus(name));
        let prepare = Command::PrepareList { id, exclusivity, mode, cpus, now: NOW };
        let plan = self.claims.apply(prepare)?.plan;
        if cancel {
            self.claims.apply(Command::CancelList(id))?;
            self.claims.apply(Command::Abandon(plan))?;
        } else {
            self.claims.apply(change)?;
            self.claims.apply(Command::Settle(CompletedPlan::unchanged(&plan)))?;
        }
        Ok(())
    }

    /// Both say the same of who is where, and the invariants hold.
    fn check(&self) -> Result<(), TestCaseError> {
        let mut found: Vec<(u32, u64)> =
            self.claims.claims().map(|claim| (claim.task.pid.get(), claim.list.0)).collect();
        found.sort_unstable();
        let mut expected: Vec<(u32, u64)> =
            self.naive.claims.iter().map(|claim| (claim.task, claim.list)).collect();
        expected.sort_unstable();
        prop_assert_eq!(&found, &expected);
        for n in TASKS {
            prop_assert_eq!(self.claims.is_in_flight(&task(n)), self.naive.is_in_flight(n), "task {}", n);
        }
        let by_list = self.claims.lists.iter().flat_map(|(id, list)| {
            list.tasks.iter().map(|task| (task.pid.get(), id.0)).collect::<Vec<(u32, u64)>>()
        });
        let mut by_list: Vec<(u32, u64)> = by_list.collect();
        by_list.sort_unstable();
        prop_assert_eq!(by_list, found, "a task has one claim and is on that list alone");
        for (id, pool) in self.claims.pools() {
            let has_tasks = |list: &ListId| !self.claims.lists[list].tasks.is_empty();
            let taken: BTreeSet<ListId> = pool.lists().filter(has_tasks).collect();
            prop_assert_eq!(&pool.taken, &taken, "pool {:?}", id);
        }
        let mut taken = CpuSet::new();
        for (id, list) in &self.claims.lists {
            prop_assert!(taken.is_disjoint(&list.cpus), "{:?} overlaps", list.name);
            taken = taken.union(&list.cpus);
            // One that leaves in the write that brings another is there until that is settled.
            let is_leaving = |task: &TaskId| {
                self.plans.iter().flat_map(|plan| &plan.releases).any(|claim| claim.task == *task)
            };
            let mut all: BTreeSet<TaskId> = list.tasks.iter().chain(&list.reserved).copied().collect();
            if list.reserved.len() == 1 {
                all.retain(|task| !is_leaving(task));
            }
            let exclusive = self.claims.admits_one(list);
            prop_assert!(!exclusive || all.len() <= 1, "{:?} is exclusive and has {:?}", id, all);
            prop_assert!(list.stage == Stage::Open || all.is_empty(), "{:?} is not open, has {:?}", id, all);
        }
        let others = self.naive.claims.iter().filter(|claim| !claim.by_root).count();
        prop_assert!(others <= LIMIT / 2, "users have {} claims", others);
        Ok(())
    }
}

fn owner(task: u32) -> u32 {
    if task <= 4 { USER } else { 0 }
}

fn answer(result: &Result<Effects, Rejected>) -> Answer {
    let effects = result.as_ref().map_err(|rejected| Refusal::from(rejected.clone()).errno())?;
    let mut all: Vec<String> = effects.plan.releases.iter().map(|c| is_to_leave(c.task.pid.get())).collect();
    all.extend(effects.plan.placements.iter().map(|placement| {
        let from = match placement.origin() {
            Origin::New => None,
            Origin::Moved { from } => Some(from.0),
            Origin::Unchanged => Some(placement.list.0),
        };
        goes(placement.task.pid.get(), from, placement.list.0)
    }));
    all.extend(effects.changes.iter().map(|change| match change {
        Change::Claimed(claim) => claimed(claim.task.pid.get(), None, claim.list.0),
        Change::Moved { from, to } => claimed(to.task.pid.get(), Some(from.0), to.list.0),
        Change::Released(claim) => released(claim.task.pid.get(), claim.list.0),
        Change::Inherited { from, to } => inherited(from.pid.get(), to.task.pid.get(), to.list.0),
        Change::Ended(claim) | Change::Reclaimed(claim) | Change::Died(claim) => {
            ended(claim.task.pid.get(), claim.list.0)
        }
    }));
    all.extend(effects.lost.iter().map(|task| lost(task.pid.get())));
    all.sort();
    Ok(all)
}

fn is_to_leave(task: u32) -> String {
    format!("{task} is to leave")
}

fn goes(task: u32, from: Option<u64>, to: u64) -> String {
    format!("{task} is to go from {from:?} to {to}")
}

fn claimed(task: u32, from: Option<u64>, to: u64) -> String {
    format!("{task} came from {from:?} to {to}")
}

fn released(task: u32, list: u64) -> String {
    format!("{task} left {list}")
}

fn inherited(dead: u32, heir: u32, list: u64) -> String {
    format!("{heir} inherits {list} from {dead}")
}

fn ended(task: u32, list: u64) -> String {
    format!("{task} died on {list}")
}

fn lost(task: u32) -> String {
    format!("{task} is lost")
}

fn nothing() -> Answer {
    Ok(Vec::new())
}

#[derive(Clone, Copy)]
struct NaiveClaim {
    task: u32,
    list: u64,
    by_root: bool,
}

struct NaiveList {
    id: u64,
    pool: u64,
    cpus: &'static str,
    stage: Stage,
    draining: bool,
}

/// The old and the new list of a task, and whether root asks.
#[derive(Clone, Copy)]
struct NaivePlace {
    task: u32,
    from: Option<u64>,
    to: u64,
    by_root: bool,
}

#[derive(Default)]
struct NaivePlan {
    placements: Vec<NaivePlace>,
    releases: Vec<u32>,
}

impl NaivePlan {
    fn names(&self, task: u32) -> bool {
        self.releases.contains(&task) || self.placements.iter().any(|place| place.task == task)
    }
}

#[derive(Default)]
struct Naive {
    last_id: u64,
    /// Each with its name, whether it is exclusive, and whether that is being stored.
    pools: Vec<(u64, &'static str, bool, bool)>,
    lists: Vec<NaiveList>,
    claims: Vec<NaiveClaim>,
    plans: Vec<NaivePlan>,
    /// Those that died while a plan named them, until it ends.
    dead: Vec<u32>,
}

impl Naive {
    fn new_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    fn list(&self, id: u64) -> Option<&NaiveList> {
        self.lists.iter().find(|list| list.id == id)
    }

    fn is_exclusive(&self, pool: u64) -> Option<bool> {
        self.pools.iter().find(|(id, ..)| *id == pool).map(|(_, _, exclusive, _)| *exclusive)
    }

    /// Whether lists take one task each, now or after a change that is being stored.
    fn admits_one(&self, pool: u64) -> bool {
        self.pools.iter().any(|(id, _, now, coming)| *id == pool && (*now || *coming))
    }

    fn list_admits_one(&self, list: u64) -> bool {
        self.list(list).is_some_and(|list| self.admits_one(list.pool))
    }

    fn is_on_exclusive(&self, list: u64) -> bool {
        self.list(list).and_then(|list| self.is_exclusive(list.pool)) == Some(true)
    }

    fn claim(&self, task: u32) -> Option<NaiveClaim> {
        self.claims.iter().find(|claim| claim.task == task).copied()
    }

    fn is_in_flight(&self, task: u32) -> bool {
        self.plans.iter().any(|plan| plan.names(task))
    }

    /// Those on a list and those on the way to it.
    fn around(&self, list: u64) -> Vec<u32> {
        let on = self.claims.iter().filter(|claim| claim.list == list).map(|claim| claim.task);
        let coming = self.plans.iter().flat_map(|plan| &plan.placements);
        let coming = coming.filter(|place| place.to == list && place.from != Some(list));
        on.chain(coming.map(|place| place.task)).collect()
    }

    fn write(
        &mut self,
        target: &Target,
        claim: &[u32],
        release: &[u32],
        users: [u32; 2],
        unsuitable: &[u64],
    ) -> Answer {
        let named: Vec<u32> = claim.iter().chain(release).copied().collect();
        if users.iter().any(|&user| user != 0 && named.iter().any(|&task| owner(task) != user)) {
            return Err(Errno::EPERM);
        }
        if claim.iter().any(|task| release.contains(task)) {
            return Err(Errno::EINVAL);
        }
        if named.iter().any(|&task| self.is_in_flight(task)) {
            return Err(Errno::EAGAIN);
        }
        let is_target = |list: u64| match *target {
            Target::List(id) => list == id.0,
            Target::Pool(pool) => self.list(list).is_some_and(|list| list.pool == pool.0),
        };
        match *target {
            Target::List(id) => {
                let list = self.list(id.0).filter(|list| list.stage == Stage::Open).ok_or(Errno::ENODEV)?;
                let is_new = |task: &u32| self.claim(*task).is_none_or(|claim| claim.list != id.0);
                if list.draining && claim.iter().any(is_new) {
                    return Err(Errno::EBUSY);
                }
                if claim.len() > 1 && self.list_admits_one(id.0) {
                    return Err(Errno::EBUSY);
                }
            }
            Target::Pool(pool) => {
                self.is_exclusive(pool.0).ok_or(Errno::ENODEV)?;
            }
        }
        let leaves = |task: &u32| self.claim(*task).is_some_and(|claim| is_target(claim.list));
        let mut plan =
            NaivePlan { releases: release.iter().copied().filter(leaves).collect(), placements: Vec::new() };
        for &task in claim {
            let from = self.claim(task).map(|claim| claim.list);
            let to = match *target {
                Target::List(id) => {
                    let others = self.around(id.0);
                    let mut others = others.iter().filter(|&&o| o != task && !plan.releases.contains(&o));
                    if self.list_admits_one(id.0) && others.next().is_some() {
                        return Err(Errno::EBUSY);
                    }
                    id.0
                }
                Target::Pool(pool) => match from.filter(|&list| is_target(list)) {
                    Some(list) if unsuitable.contains(&list) => return Err(Errno::EINVAL),
                    Some(list) => list,
                    None => self.choose(pool.0, &plan, unsuitable)?,
                },
            };
            let by_root = users == [0, 0];
            plan.placements.push(NaivePlace { task, from, to, by_root });
        }
        self.check_room(&plan)?;
        let mut all: Vec<String> = plan.releases.iter().map(|&task| is_to_leave(task)).collect();
        all.extend(plan.placements.iter().map(|place| goes(place.task, place.from, place.to)));
        all.sort();
        self.plans.push(plan);
        Ok(all)
    }

    /// Returns the list of the pool for one more task after the plan's tasks.
    fn choose(&self, pool: u64, plan: &NaivePlan, unsuitable: &[u64]) -> Result<u64, Errno> {
        let load = |list: &NaiveList| {
            let staying =
                self.around(list.id).into_iter().filter(|task| !plan.releases.contains(task)).count();
            let coming =
                plan.placements.iter().filter(|p| p.to == list.id && p.from != Some(list.id)).count();
            staying + coming
        };
        let is_open = |list: &&NaiveList| list.stage == Stage::Open && !list.draining;
        let open = self.lists.iter().filter(|list| list.pool == pool).filter(is_open);
        let exclusive = self.admits_one(pool);
        let free: Vec<&NaiveList> = open.filter(|list| !exclusive || load(list) == 0).collect();
        if free.is_empty() {
            return Err(Errno::EBUSY);
        }
        let suitable = free.into_iter().filter(|list| !unsuitable.contains(&list.id));
        let best = suitable.min_by_key(|list| (load(list), cpus(list.cpus).first()));
        best.map(|list| list.id).ok_or(Errno::EINVAL)
    }

    fn check_room(&self, plan: &NaivePlan) -> Result<(), Errno> {
        let new = |plan: &NaivePlan| plan.placements.iter().filter(|place| place.from.is_none()).count();
        let new_by_users =
            |plan: &NaivePlan| plan.placements.iter().filter(|p| p.from.is_none() && !p.by_root).count();
        let known =
            TASKS.iter().filter(|&&task| self.claim(task).is_some() || self.is_in_flight(task)).count();
        let users = self.claims.iter().filter(|claim| !claim.by_root).count()
            + self.plans.iter().map(new_by_users).sum::<usize>();
        let full = new(plan) > 0 && known + new(plan) > LIMIT;
        let half = new_by_users(plan) > 0 && users + new_by_users(plan) > LIMIT / 2;
        if full || half { Err(Errno::ENOSPC) } else { Ok(()) }
    }

    /// The caller has removed the plan from the open ones.
    fn finish(&mut self, plan: NaivePlan, settle: bool) -> Answer {
        let mut all = Vec::new();
        let (dead, living): (Vec<u32>, Vec<u32>) =
            TASKS.into_iter().filter(|&task| plan.names(task)).partition(|task| self.dead.contains(task));
        self.dead.retain(|task| !dead.contains(task));
        if !settle {
            return Ok(dead.into_iter().map(lost).collect());
        }
        for task in plan.releases.into_iter().filter(|task| living.contains(task)) {
            let list = self.claim(task).unwrap().list;
            self.claims.retain(|claim| claim.task != task);
            all.push(released(task, list));
        }
        for NaivePlace { task, from, to, by_root } in plan.placements {
            if dead.contains(&task) {
                all.push(lost(task));
            } else if from != Some(to) {
                let by_root = self.claim(task).map_or(by_root, |old| old.by_root);
                self.claims.retain(|claim| claim.task != task);
                self.claims.push(NaiveClaim { task, list: to, by_root });
                all.push(claimed(task, from, to));
            }
        }
        all.sort();
        Ok(all)
    }

    fn end(&mut self, dead: u32, heir: Option<u32>) -> Answer {
        if self.is_in_flight(dead) && !self.dead.contains(&dead) {
            self.dead.push(dead);
        }
        let Some(old) = self.claim(dead) else { return nothing() };
        self.claims.retain(|claim| claim.task != dead);
        let free = |heir: &u32| self.claim(*heir).is_none() && !self.is_in_flight(*heir);
        let inherits = self.is_on_exclusive(old.list) && self.around(old.list).is_empty();
        match heir.filter(free).filter(|_| inherits) {
            Some(heir) => {
                self.claims.push(NaiveClaim { task: heir, ..old });
                Ok(vec![inherited(dead, heir, old.list)])
            }
            None => Ok(vec![ended(dead, old.list)]),
        }
    }

    fn restore(&mut self, task: u32, list: u64) -> Answer {
        if self.claim(task).is_some() || self.is_in_flight(task) {
            return Err(Errno::EEXIST);
        }
        self.list(list).ok_or(Errno::ENODEV)?;
        if self.list_admits_one(list) && !self.around(list).is_empty() {
            return Err(Errno::EBUSY);
        }
        self.claims.push(NaiveClaim { task, list, by_root: true });
        nothing()
    }

    fn add_pool(&mut self, id: u64, name: &'static str, exclusive: bool) -> Answer {
        if self.pools.iter().any(|(_, other, ..)| *other == name) {
            return Err(Errno::EEXIST);
        }
        self.pools.push((id, name, exclusive, false));
        nothing()
    }

    fn remove_pool(&mut self, pool: u64) -> Answer {
        self.is_exclusive(pool).ok_or(Errno::ENODEV)?;
        if self.lists.iter().any(|list| list.pool == pool) {
            return Err(Errno::ENOTEMPTY);
        }
        self.pools.retain(|(id, ..)| *id != pool);
        nothing()
    }

    fn add_list(&mut self, id: u64, pool: u64, name: &'static str) -> Answer {
        self.is_exclusive(pool).ok_or(Errno::ENODEV)?;
        if self.lists.iter().any(|list| list.pool == pool && list.cpus == name) {
            return Err(Errno::EEXIST);
        }
        if self.lists.iter().any(|list| !cpus(list.cpus).is_disjoint(&cpus(name))) {
            return Err(Errno::EBUSY);
        }
        self.lists.push(NaiveList { id, pool, cpus: name, stage: Stage::Creating, draining: false });
        nothing()
    }

    fn open_list(&mut self, id: u64) -> Answer {
        self.lists.iter_mut().find(|list| list.id == id).ok_or(Errno::ENODEV)?.stage = Stage::Open;
        nothing()
    }

    fn close_list(&mut self, id: u64) -> Answer {
        self.list(id).ok_or(Errno::ENODEV)?;
        if !self.around(id).is_empty() {
            return Err(Errno::EBUSY);
        }
        self.lists.iter_mut().find(|list| list.id == id).unwrap().stage = Stage::Removing;
        nothing()
    }

    fn drain(&mut self, id: u64, draining: bool) -> Answer {
        self.lists.iter_mut().find(|list| list.id == id).ok_or(Errno::ENODEV)?.draining = draining;
        nothing()
    }

    fn change(&mut self, id: u64, pool: u64, name: &'static str, cancel: bool) -> Answer {
        self.is_exclusive(pool).ok_or(Errno::ENODEV)?;
        let mut others = self.lists.iter().filter(|list| list.id != id);
        if others.clone().any(|list| list.pool == pool && list.cpus == name) {
            return Err(Errno::EEXIST);
        }
        if others.any(|list| !cpus(list.cpus).is_disjoint(&cpus(name))) {
            return Err(Errno::EBUSY);
        }
        let old = self.list(id).ok_or(Errno::ENODEV)?.cpus;
        let tasks = self.around(id);
        if self.admits_one(pool) && tasks.len() > 1 {
            return Err(Errno::EBUSY);
        }
        if old != name && tasks.iter().any(|&task| self.is_in_flight(task)) {
            return Err(Errno::EAGAIN);
        }
        if !cancel {
            let list = self.lists.iter_mut().find(|list| list.id == id).unwrap();
            (list.pool, list.cpus) = (pool, name);
        }
        nothing()
    }

    fn check_exclusive(&self, pool: u64, exclusive: bool) -> Answer {
        self.is_exclusive(pool).ok_or(Errno::ENODEV)?;
        let mut lists = self.lists.iter().filter(|list| list.pool == pool);
        if exclusive && lists.any(|list| self.around(list.id).len() > 1) {
            return Err(Errno::EBUSY);
        }
        nothing()
    }

    fn set_exclusive(&mut self, pool: u64, exclusive: bool) -> Answer {
        let is_prepared = exclusive && self.pools.iter().any(|(id, _, _, coming)| *id == pool && *coming);
        if !is_prepared {
            self.check_exclusive(pool, exclusive)?;
        }
        let found = self.pools.iter_mut().find(|(id, ..)| *id == pool).unwrap();
        (found.2, found.3) = (exclusive, false);
        nothing()
    }

    fn prepare_exclusive(&mut self, pool: u64, exclusive: bool) -> Answer {
        self.check_exclusive(pool, exclusive)?;
        self.pools.iter_mut().find(|(id, ..)| *id == pool).unwrap().3 = exclusive;
        nothing()
    }

    fn cancel_exclusive(&mut self, pool: u64) -> Answer {
        self.pools.iter_mut().find(|(id, ..)| *id == pool).ok_or(Errno::ENODEV)?.3 = false;
        nothing()
    }
}
