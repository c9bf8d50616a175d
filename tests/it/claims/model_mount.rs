//! Every history of operations on a real mount with real processes agrees with a naive model: after each step the
//! tree, all masks and all answers are compared.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;

use super::naive::{self, Answer, LISTS, Naive, POOLS, TASKS};
use crate::harness::{Mount, Shell, has_died, held, let_a_tick_pass, masks, pin, until, write};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};

/// The number of histories per variant; always the same ones.
const SEEDS: [u64; 4] = [1, 2, 3, 4];
const HISTORIES: u32 = 6;
const STEPS: usize = 40;

/// One step; pools, lists and tasks are numbers.
#[derive(Clone, Debug)]
enum Op {
    MakePool(usize),
    RemovePool(usize),
    SetExclusive(usize, bool),
    MakeList(usize, usize),
    RemoveList(usize, usize),
    /// `by`: the task that writes; `None` is the test itself. Without a list, the pool's file is written. Each word
    /// says which task it names and whether it is a release.
    Write {
        by: Option<usize>,
        pool: usize,
        list: Option<usize>,
        words: Vec<(bool, usize)>,
    },
    Die(usize),
    /// Another process replaces a dead one.
    Live(usize),
    KillWorker,
    /// A dead task is followed by a new one.
    KillDaemon(Option<usize>),
}

fn op() -> impl Strategy<Value = Op> {
    let pool = || 0..POOLS.len();
    let list = || 0..LISTS.len();
    let task = || 0..TASKS;
    let words = prop::collection::vec((prop::bool::weighted(0.3), task()), 1..4);
    let by = prop::option::weighted(0.4, task());
    // Most steps use the lists that exist from the start.
    let target = prop::option::weighted(0.6, prop_oneof![4 => 0..2_usize, 1 => list()]);
    prop_oneof![
        24 => (by, pool(), target, words)
            .prop_map(|(by, pool, list, words)| Op::Write { by, pool, list, words }),
        3 => task().prop_map(Op::Die),
        3 => task().prop_map(Op::Live),
        2 => (pool(), list()).prop_map(|(pool, list)| Op::MakeList(pool, list)),
        2 => (pool(), list()).prop_map(|(pool, list)| Op::RemoveList(pool, list)),
        2 => (pool(), any::<bool>()).prop_map(|(pool, exclusive)| Op::SetExclusive(pool, exclusive)),
        1 => pool().prop_map(Op::MakePool),
        1 => pool().prop_map(Op::RemovePool),
        1 => Just(Op::KillWorker),
        1 => prop::option::of(task()).prop_map(Op::KillDaemon),
    ]
}

#[test]
fn every_history_agrees_with_the_naive_model() {
    // Keeps the cgroup of this test alive.
    let _place = Mount::not_mounted();
    for seed in SEEDS {
        let config = Config {
            cases: HISTORIES,
            rng_seed: RngSeed::Fixed(seed),
            failure_persistence: None,
            max_shrink_iters: 200,
            ..Config::default()
        };
        let histories = (any::<bool>(), any::<bool>(), prop::collection::vec(op(), 1..STEPS));
        let result = TestRunner::new(config).run(&histories, |(exclusive, one_pool, ops)| {
            let mut both = Both::new(exclusive, one_pool);
            for op in ops {
                both.step(&op);
            }
            Ok(())
        });
        if let Err(error) = result {
            panic!("seed {seed}: {error}");
        }
    }
}

/// The mount and the model.
struct Both {
    // Declared before the mount, so that they have ended when it is unmounted.
    tasks: Vec<Shell>,
    naive: Naive,
    mount: Mount,
    steps: usize,
}

impl Both {
    /// Starts with two lists, so that short histories have something to claim.
    fn new(exclusive: bool, one_pool: bool) -> Self {
        let mount = Mount::new();
        let naive = Naive::new(&masks(std::process::id())[0]);
        let mut both = Self { tasks: Vec::new(), naive, mount, steps: 0 };
        for task in 0..TASKS {
            let shell = both.start(task);
            both.tasks.push(shell);
        }
        let second = if one_pool { 0 } else { 1 };
        for op in [Op::MakePool(0), Op::MakePool(1), Op::SetExclusive(0, exclusive), Op::MakeList(0, 0)] {
            both.step(&op);
        }
        both.step(&Op::MakeList(second, 1));
        both
    }

    /// A process that agrees with the model. Every later event happens after its start, by every clock.
    fn start(&self, task: usize) -> Shell {
        let mut shell = Shell::start(&mut self.mount.bash("exec bash"));
        shell.ask("");
        if let Some(cpu) = naive::pinned(task) {
            pin(shell.pid(), &[cpu]);
        }
        let_a_tick_pass(shell.pid());
        shell
    }

    fn step(&mut self, op: &Op) {
        let (found, expected) = self.both(op);
        assert_eq!(found, expected, "{op:?}");
        self.check(op);
        self.steps += 1;
    }

    /// The answers of the mount and of the model.
    fn both(&mut self, op: &Op) -> (Answer, Answer) {
        let pool = |pool: usize| self.mount.pool(POOLS[pool]);
        let list = |of: usize, list: usize| pool(of).join(LISTS[list]);
        match *op {
            Op::MakePool(n) => (answer(fs::create_dir(pool(n))), self.naive.make_pool(n)),
            Op::RemovePool(n) => (answer(fs::remove_dir(pool(n))), self.naive.remove_pool(n)),
            Op::SetExclusive(n, exclusive) => {
                let found = answer(write(&pool(n).join("exclusive"), if exclusive { "1" } else { "0" }));
                (found, self.naive.set_exclusive(n, exclusive))
            }
            Op::MakeList(of, n) => (answer(fs::create_dir(list(of, n))), self.naive.make_list(of, n)),
            Op::RemoveList(of, n) => (answer(fs::remove_dir(list(of, n))), self.naive.remove_list(of, n)),
            Op::Write { by, pool, list, ref words } => {
                if by.is_some_and(|by| !self.naive.is_alive(by)) {
                    return (Ok(()), Ok(()));
                }
                (self.write(by, pool, list, words), self.naive.write(pool, list, words))
            }
            Op::Die(task) => {
                self.kill(task);
                (Ok(()), Ok(()))
            }
            Op::Live(task) => {
                if !self.naive.is_alive(task) {
                    self.tasks[task] = self.start(task);
                    self.naive.live(task);
                }
                (Ok(()), Ok(()))
            }
            Op::KillWorker => {
                until("there is a worker", || self.mount.worker().is_some());
                kill(Pid::from_raw(self.mount.worker().unwrap() as i32), Signal::SIGKILL).unwrap();
                (Ok(()), Ok(()))
            }
            Op::KillDaemon(task) => {
                self.mount.kill_daemon();
                task.into_iter().for_each(|task| self.kill(task));
                self.mount.start();
                (Ok(()), Ok(()))
            }
        }
    }

    /// It is not reaped, so its PID is not reused.
    fn kill(&mut self, task: usize) {
        let pid = self.tasks[task].pid();
        let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
        until("it has died", || has_died(pid));
        self.naive.die(task);
    }

    fn write(
        &mut self,
        by: Option<usize>,
        pool: usize,
        list: Option<usize>,
        words: &[(bool, usize)],
    ) -> Answer {
        let file = self.file(pool, list);
        let word = |&(release, task): &(bool, usize)| {
            let sign = if release { "-" } else { "" };
            // Names itself by `0` and by its PID, in turn.
            let number = match by {
                Some(by) if by == task && self.steps.is_multiple_of(2) => 0,
                _ => self.tasks[task].pid(),
            };
            format!("{sign}{number}")
        };
        let text = words.iter().map(word).collect::<Vec<_>>().join(" ");
        match by {
            None => answer(write(&file, text)),
            Some(by) => {
                let line = format!("{{ echo {text} > {}; }} 2>&1", file.display());
                let output = self.tasks[by].ask(&line);
                let errnos = [Errno::ENOENT, Errno::ESRCH, Errno::EBUSY, Errno::EINVAL];
                match errnos.into_iter().find(|errno| output.ends_with(&format!(": {}\n", errno.desc()))) {
                    Some(errno) => Err(errno),
                    None if output.is_empty() => Ok(()),
                    None => panic!("{line}: {output}"),
                }
            }
        }
    }

    fn file(&self, pool: usize, list: Option<usize>) -> PathBuf {
        let pool = self.mount.pool(POOLS[pool]);
        list.map_or_else(|| pool.clone(), |list| pool.join(LISTS[list])).join("tasks")
    }

    /// Compares the whole tree below `pools`, all masks, and what one task reads about itself.
    fn check(&mut self, op: &Op) {
        let pids = |tasks: Vec<usize>| {
            let mut pids: Vec<u32> = tasks.into_iter().map(|task| self.tasks[task].pid()).collect();
            pids.sort_unstable();
            pids
        };
        let names = |path: PathBuf| {
            let entries = fs::read_dir(path).unwrap();
            let mut names: Vec<String> =
                entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        let sorted = |mut names: Vec<String>| {
            names.sort();
            names
        };
        assert_eq!(names(self.mount.conf().join("pools")), self.naive.pool_names(), "{op:?}");
        for pool in self.naive.pools() {
            let path = self.mount.pool(POOLS[pool]);
            let lists = self.naive.lists(pool);
            let expected = lists.iter().map(|&list| LISTS[list]).chain([
                "exclusive",
                "mode",
                "partial",
                "queue",
                "tasks",
                "transient",
            ]);
            assert_eq!(names(path.clone()), sorted(expected.map(str::to_owned).collect()), "{op:?}");
            let flag = if self.naive.is_exclusive(pool) { "1\n" } else { "0\n" };
            assert_eq!(fs::read_to_string(path.join("exclusive")).unwrap(), flag, "{op:?}");
            for list in lists.into_iter().map(Some).chain([None]) {
                let file = self.file(pool, list);
                let expected = pids(self.naive.on(pool, list));
                assert_eq!(held(&file), expected, "{op:?}: {}", file.display());
                let size = fs::metadata(&file).unwrap().len();
                assert_eq!(size == 0, expected.is_empty(), "{op:?}: the size of {}", file.display());
            }
        }
        let found: BTreeMap<usize, Vec<String>> =
            self.naive.living().map(|task| (task, masks(self.tasks[task].pid()))).collect();
        let expected: BTreeMap<usize, Vec<String>> =
            self.naive.living().map(|task| (task, vec![self.naive.mask(task)])).collect();
        assert_eq!(found, expected, "{op:?}");
        let asked = self.steps % TASKS;
        if self.naive.is_alive(asked) {
            let output = self.tasks[asked].ask("read -r line < $C/self/claim; echo $line");
            assert_eq!(output.trim(), self.naive.claim(asked), "{op:?}: task {asked}");
        }
    }
}

fn answer(result: io::Result<()>) -> Answer {
    result.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap()))
}
