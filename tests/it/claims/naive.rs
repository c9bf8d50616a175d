//! The rules of the mount, as simple as possible: a task has a claim or it has none.
//!
//! Every CPU list can serve every task, and every writer has the right to claim.

use std::collections::{BTreeMap, BTreeSet};

use nix::errno::Errno;

pub(crate) type Answer = Result<(), Errno>;

pub(crate) const POOLS: [&str; 2] = ["a", "b"];
/// The last two have the same CPUs.
pub(crate) const LISTS: [&str; 4] = ["0", "1", "0-1", "0,1"];
pub(crate) const TASKS: usize = 5;

/// The CPU that a task starts on; `None` means all CPUs.
pub(crate) fn pinned(task: usize) -> Option<usize> {
    Some(task).filter(|&task| task < 2)
}

fn cpus(list: usize) -> BTreeSet<usize> {
    if list < 2 { BTreeSet::from([list]) } else { BTreeSet::from([0, 1]) }
}

/// A list as the kernel prints it in a mask.
fn shown(list: usize) -> &'static str {
    if list < 2 { LISTS[list] } else { "0-1" }
}

#[derive(Clone, Debug)]
struct Claim {
    pool: usize,
    list: usize,
    /// The step of the claim.
    since: u64,
    /// The mask that the task gets back.
    saved: String,
}

#[derive(Clone, Debug)]
struct Task {
    alive: bool,
    /// The step of its start.
    born: u64,
    mask: String,
    claim: Option<Claim>,
}

#[derive(Debug)]
struct Pool {
    exclusive: bool,
    lists: BTreeSet<usize>,
}

#[derive(Debug)]
pub(crate) struct Naive {
    /// All CPUs.
    free: String,
    now: u64,
    pools: BTreeMap<usize, Pool>,
    tasks: Vec<Task>,
}

impl Naive {
    /// Without pools, with all tasks alive. `free` is the mask of a task that is not pinned.
    pub(crate) fn new(free: &str) -> Self {
        let mut naive = Self { free: free.to_owned(), now: 0, pools: BTreeMap::new(), tasks: Vec::new() };
        for task in 0..TASKS {
            let born = naive.new_task(task);
            naive.tasks.push(born);
        }
        naive
    }

    fn new_task(&mut self, task: usize) -> Task {
        let mask = pinned(task).map_or_else(|| self.free.clone(), |cpu| cpu.to_string());
        Task { alive: true, born: self.tick(), mask, claim: None }
    }

    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    pub(crate) fn make_pool(&mut self, pool: usize) -> Answer {
        if self.pools.contains_key(&pool) {
            return Err(Errno::EEXIST);
        }
        self.pools.insert(pool, Pool { exclusive: false, lists: BTreeSet::new() });
        Ok(())
    }

    pub(crate) fn remove_pool(&mut self, pool: usize) -> Answer {
        if !self.pool(pool)?.lists.is_empty() {
            return Err(Errno::ENOTEMPTY);
        }
        self.pools.remove(&pool);
        Ok(())
    }

    pub(crate) fn set_exclusive(&mut self, pool: usize, exclusive: bool) -> Answer {
        let lists = self.pool(pool)?.lists.clone();
        if exclusive && lists.into_iter().any(|list| self.on(pool, Some(list)).len() > 1) {
            return Err(Errno::EBUSY);
        }
        self.pools.get_mut(&pool).ok_or(Errno::ENOENT)?.exclusive = exclusive;
        Ok(())
    }

    pub(crate) fn make_list(&mut self, pool: usize, list: usize) -> Answer {
        if self.pool(pool)?.lists.contains(&list) {
            return Err(Errno::EEXIST);
        }
        let mut all = self.pools.values().flat_map(|pool| &pool.lists);
        if all.any(|&other| !cpus(other).is_disjoint(&cpus(list))) {
            return Err(Errno::EBUSY);
        }
        self.pools.get_mut(&pool).ok_or(Errno::ENOENT)?.lists.insert(list);
        Ok(())
    }

    pub(crate) fn remove_list(&mut self, pool: usize, list: usize) -> Answer {
        if !self.pool(pool)?.lists.contains(&list) {
            return Err(Errno::ENOENT);
        }
        if !self.on(pool, Some(list)).is_empty() {
            return Err(Errno::EBUSY);
        }
        self.pools.get_mut(&pool).ok_or(Errno::ENOENT)?.lists.remove(&list);
        Ok(())
    }

    /// Each word says which task it names and whether it is a release.
    pub(crate) fn write(&mut self, pool: usize, list: Option<usize>, words: &[(bool, usize)]) -> Answer {
        if list.is_some_and(|list| !self.lists(pool).contains(&list)) || !self.pools.contains_key(&pool) {
            return Err(Errno::ENOENT);
        }
        let named = |wanted: bool| {
            let mut found: Vec<usize> = Vec::new();
            for &(release, task) in words {
                if release == wanted && self.is_alive(task) && !found.contains(&task) {
                    found.push(task);
                }
            }
            found
        };
        let (claiming, mut leaving) = (named(false), named(true));
        if claiming.is_empty() && leaving.is_empty() {
            return Err(Errno::ESRCH);
        }
        if claiming.iter().any(|task| leaving.contains(task)) {
            return Err(Errno::EINVAL);
        }
        let exclusive = self.is_exclusive(pool);
        if list.is_some() && exclusive && claiming.len() > 1 {
            return Err(Errno::EBUSY);
        }
        leaving.retain(|&task| self.on(pool, list).contains(&task));
        // Places one task after the other, as if those that leave had already left.
        let mut lists: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
        for list in self.lists(pool) {
            lists.insert(
                list,
                self.on(pool, Some(list)).into_iter().filter(|task| !leaving.contains(task)).collect(),
            );
        }
        let mut places: Vec<(usize, usize)> = Vec::new();
        for &task in &claiming {
            let here = lists.iter().find(|(_, tasks)| tasks.contains(&task)).map(|(list, _)| *list);
            let place = match (list, here) {
                (Some(list), _) => {
                    Some(list).filter(|list| !exclusive || lists[list].iter().all(|&other| other == task))
                }
                (None, Some(here)) => Some(here),
                (None, None) if exclusive => lists
                    .iter()
                    .filter(|(_, tasks)| tasks.is_empty())
                    .map(|(list, _)| *list)
                    .min_by_key(first_cpu),
                (None, None) => lists.keys().copied().min_by_key(|list| (lists[list].len(), first_cpu(list))),
            };
            let place = place.ok_or(Errno::EBUSY)?;
            if list.is_none() {
                lists.entry(place).or_default().insert(task);
            }
            places.push((task, place));
        }
        for task in leaving {
            self.release(task);
        }
        for (task, list) in places {
            self.put(task, pool, list);
        }
        Ok(())
    }

    fn release(&mut self, task: usize) {
        let task = &mut self.tasks[task];
        if let Some(claim) = task.claim.take() {
            task.mask = claim.saved;
        }
    }

    fn put(&mut self, task: usize, pool: usize, list: usize) {
        let since = self.tick();
        let task = &mut self.tasks[task];
        let saved = match &task.claim {
            // Its mask is within the list already.
            Some(claim) if (claim.pool, claim.list) == (pool, list) => return,
            Some(claim) => claim.saved.clone(),
            None => task.mask.clone(),
        };
        task.mask = shown(list).to_owned();
        task.claim = Some(Claim { pool, list, since, saved });
    }

    pub(crate) fn die(&mut self, task: usize) {
        let dead = &mut self.tasks[task];
        dead.alive = false;
        let Some(claim) = dead.claim.take().filter(|claim| self.pools[&claim.pool].exclusive) else { return };
        let may_inherit = |task: &&mut Task| {
            let mask: BTreeSet<usize> = match task.mask.as_str() {
                "0-1" => BTreeSet::from([0, 1]),
                one => one.parse().into_iter().collect(),
            };
            let within = !mask.is_empty() && mask.is_subset(&cpus(claim.list));
            task.alive && task.claim.is_none() && task.born > claim.since && within
        };
        if let Some(heir) = self.tasks.iter_mut().filter(may_inherit).min_by_key(|task| task.born) {
            heir.claim = Some(claim);
        }
    }

    /// A new task replaces a dead one.
    pub(crate) fn live(&mut self, task: usize) {
        self.tasks[task] = self.new_task(task);
    }

    fn pool(&self, pool: usize) -> Result<&Pool, Errno> {
        self.pools.get(&pool).ok_or(Errno::ENOENT)
    }

    pub(crate) fn is_alive(&self, task: usize) -> bool {
        self.tasks[task].alive
    }

    pub(crate) fn living(&self) -> impl Iterator<Item = usize> {
        (0..TASKS).filter(|&task| self.is_alive(task))
    }

    pub(crate) fn mask(&self, task: usize) -> String {
        self.tasks[task].mask.clone()
    }

    /// The text of `self/claim` for the task.
    pub(crate) fn claim(&self, task: usize) -> String {
        let claim = self.tasks[task].claim.as_ref();
        claim.map_or(String::new(), |claim| format!("{} {}", POOLS[claim.pool], LISTS[claim.list]))
    }

    pub(crate) fn pools(&self) -> impl Iterator<Item = usize> {
        self.pools.keys().copied()
    }

    pub(crate) fn pool_names(&self) -> Vec<String> {
        self.pools.keys().map(|&pool| POOLS[pool].to_owned()).collect()
    }

    pub(crate) fn is_exclusive(&self, pool: usize) -> bool {
        self.pools.get(&pool).is_some_and(|pool| pool.exclusive)
    }

    pub(crate) fn lists(&self, pool: usize) -> Vec<usize> {
        self.pools.get(&pool).map_or(Vec::new(), |pool| pool.lists.iter().copied().collect())
    }

    /// The tasks on the list or, without a list, in the pool.
    pub(crate) fn on(&self, pool: usize, list: Option<usize>) -> Vec<usize> {
        let is_on = |claim: &Claim| claim.pool == pool && list.is_none_or(|list| claim.list == list);
        (0..TASKS).filter(|&task| self.tasks[task].claim.as_ref().is_some_and(is_on)).collect()
    }
}

fn first_cpu(list: &usize) -> Option<usize> {
    cpus(*list).first().copied()
}
