//! Exactly one of all tasks that write to an exclusive list at once gets it.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use crate::harness::program::{self, Program};
use crate::harness::{Mount, Sleeper, errno, free, held, masks, pin, run, write};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

const ROUNDS: usize = 200;
const WRITERS: usize = 32;
/// Starts a process in its own PID namespace.
const IN_A_NAMESPACE: &[&str] = &["unshare", "--pid", "--fork", "--kill-child"];

/// The variable with the number of the writer.
const NUMBER: &str = "KCM_TEST_WRITER";
/// The variable with the pool.
const POOL: &str = "KCM_TEST_POOL";
/// The variable with the directory of the gates.
const GATES: &str = "KCM_TEST_GATES";

#[test]
fn one_of_32_writers_gets_the_list() {
    Contention::new(|_| &[]).run();
}

#[test]
fn one_of_32_writers_in_pid_namespaces_gets_it() {
    Contention::new(|number| if number < WRITERS / 2 { &[] } else { IN_A_NAMESPACE }).run();
}

/// Processes that all write at once, for many rounds.
struct Contention {
    // Declared before the mount, so that they have ended when it is unmounted.
    writers: Vec<Program>,
    /// Their PIDs in the daemon's PID namespace.
    pids: Vec<u32>,
    gates: [File; 2],
    mount: Mount,
}

impl Contention {
    /// `by`: the command that starts a writer.
    fn new(by: impl Fn(usize) -> &'static [&'static str]) -> Self {
        let mount = Mount::new();
        mount.make_pool("dataplane", true, &["0"]);
        let paths = gates(mount.home());
        for path in &paths {
            nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        }
        let gates = paths.map(|path| open_gate(&path));
        let start = |number: usize| {
            let mut command = program::command(by(number), "writer");
            command.env(NUMBER, number.to_string()).env(POOL, mount.pool("dataplane"));
            Program::start(command.env(GATES, mount.home()))
        };
        let mut writers: Vec<Program> = (0..WRITERS).map(start).collect();
        let pids = writers.iter_mut().map(|writer| writer.hear().parse().unwrap()).collect();
        Self { writers, pids, gates, mount }
    }

    fn run(mut self) {
        let list = self.mount.tasks("dataplane", "0");
        let (free, busy) = (free(), (Errno::EBUSY as i32).to_string());
        for round in 0..ROUNDS {
            // In every second round a task that has died, but was not reaped yet, holds the list when the writers
            // come. In some of these rounds it leaves an heir.
            let heir =
                round.is_multiple_of(2).then(|| leave_behind(&list, round.is_multiple_of(8))).flatten();
            self.gates[round % 2].write_all(b"!").unwrap();
            let answers: Vec<String> = self.writers.iter_mut().map(Program::hear).collect();
            self.gates[round % 2].read_exact(&mut [0]).unwrap();
            assert!(
                answers.iter().all(|output| *output == "0" || *output == busy),
                "round {round}: {answers:?}"
            );
            let won = answers.iter().zip(&self.pids).filter(|(output, _)| *output == "0");
            let winners: Vec<u32> = won.map(|(_, pid)| *pid).chain(heir.as_ref().map(Sleeper::pid)).collect();
            let [winner] = winners[..] else {
                panic!("round {round}: {answers:?}, heir: {}", heir.is_some())
            };
            assert_eq!(held(&list), [winner], "round {round}");
            for &pid in &self.pids {
                let mask = if pid == winner { "0" } else { &free };
                assert!(masks(pid).iter().all(|found| found == mask), "round {round}: {pid}");
            }
            write(&list, format!("-{winner}")).unwrap();
        }
    }
}

/// Claims the list for a task and kills the task. If `heir` is set, it leaves an heir.
fn leave_behind(list: &Path, heir: bool) -> Option<Sleeper> {
    let holder = Sleeper::new();
    write(list, holder.pid().to_string()).unwrap();
    let heir = heir.then(Sleeper::new);
    if let Some(heir) = &heir {
        pin(heir.pid(), &[0]);
    }
    holder.end();
    heir
}

/// The two gates, used in turn, so that the gate of the next round is closed when a writer comes to it.
fn gates(directory: &Path) -> [PathBuf; 2] {
    ["even", "odd"].map(|name| directory.join(name))
}

fn open_gate(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

/// A program: waits at a gate for all others, then writes. Odd writers write `0`, even writers their PID; they write
/// to the list and to the pool in turn.
pub fn writer() {
    let variable = |name: &str| std::env::var(name).unwrap();
    let number: usize = variable(NUMBER).parse().unwrap();
    let pool = PathBuf::from(variable(POOL));
    let gates = gates(Path::new(&variable(GATES))).map(|path| open_gate(&path));
    let text = if number % 2 == 1 { "0".to_owned() } else { std::process::id().to_string() };
    program::ready();
    // /proc shows the daemon's PID namespace.
    println!("{}", fs::read_link("/proc/self").unwrap().display());
    for round in 0.. {
        let file =
            if (number / 2 + round).is_multiple_of(2) { pool.join("0/tasks") } else { pool.join("tasks") };
        poll(&mut [PollFd::new(gates[round % 2].as_fd(), PollFlags::POLLIN)], PollTimeout::NONE).unwrap();
        let result = write(&file, &text);
        println!("{}", result.map_or_else(|error| error.raw_os_error().unwrap(), |()| 0));
    }
}

fn pids(tasks: &[&Sleeper]) -> String {
    tasks.iter().map(|task| task.pid().to_string()).collect::<Vec<_>>().join(" ")
}

#[test]
fn two_tasks_in_one_write_are_too_many() {
    let mount = Mount::with_dataplane();
    let list = mount.tasks("dataplane", "0");
    let (a, b) = (Sleeper::new(), Sleeper::new());
    assert_eq!(errno(write(&list, pids(&[&a, &b]))), Errno::EBUSY);
    assert_eq!((held(&list), masks(a.pid()), masks(b.pid())), (vec![], vec![free()], vec![free()]));
    write(&list, pids(&[&a])).unwrap();
    assert_eq!(errno(write(&list, pids(&[&a, &b]))), Errno::EBUSY, "even if one is the holder");
    write(&list, pids(&[&a, &a])).expect("one process named twice is one process");
    assert_eq!(held(&list), [a.pid()]);
    assert_eq!(masks(b.pid()), [free()]);
}

#[test]
fn only_the_holder_may_claim_again() {
    let mount = Mount::with_dataplane();
    let (list, pool) = (mount.tasks("dataplane", "0"), mount.pool("dataplane").join("tasks"));
    let (a, b, c) = (Sleeper::new(), Sleeper::new(), Sleeper::new());
    write(&list, pids(&[&a])).unwrap();
    write(&list, pids(&[&a])).expect("it already holds the list");
    assert_eq!(errno(write(&list, pids(&[&b]))), Errno::EBUSY);
    write(&pool, pids(&[&b])).expect("another list is free");
    assert_eq!(errno(write(&pool, pids(&[&c]))), Errno::EBUSY);
    write(&pool, pids(&[&a, &b])).expect("both have a list");
    assert_eq!((held(&list), held(&mount.tasks("dataplane", "1"))), (vec![a.pid()], vec![b.pid()]));
    assert_eq!(masks(c.pid()), [free()]);
}

#[test]
fn a_refused_move_keeps_the_old_claim() {
    let mount = Mount::with_dataplane();
    let lists = [mount.tasks("dataplane", "0"), mount.tasks("dataplane", "1")];
    let (a, b) = (Sleeper::new(), Sleeper::new());
    write(&lists[0], pids(&[&a])).unwrap();
    write(&lists[1], pids(&[&b])).unwrap();
    assert_eq!(errno(write(&lists[0], pids(&[&b]))), Errno::EBUSY);
    assert_eq!(held(&lists[0]), [a.pid()]);
    assert_eq!(held(&lists[1]), [b.pid()]);
    assert_eq!(masks(b.pid()), ["1"]);
    write(&lists[0], format!("-{} {}", a.pid(), b.pid())).expect("one replaces the other");
    assert_eq!((held(&lists[0]), held(&lists[1])), (vec![b.pid()], vec![]));
    assert_eq!((masks(a.pid()), masks(b.pid())), (vec![free()], vec!["0".to_owned()]));
    write(&lists[1], pids(&[&b])).expect("a move");
    assert_eq!((held(&lists[0]), held(&lists[1])), (vec![], vec![b.pid()]));
    assert_eq!(masks(b.pid()), ["1"]);
}

#[test]
fn an_exclusive_pool_picks_the_first_free_list() {
    let mount = Mount::new();
    mount.make_pool("dataplane", true, &["1", "0"]);
    let pool = mount.pool("dataplane").join("tasks");
    let lists = [mount.tasks("dataplane", "0"), mount.tasks("dataplane", "1")];
    let (a, b, c) = (Sleeper::new(), Sleeper::new(), Sleeper::new());
    write(&pool, pids(&[&a])).unwrap();
    assert_eq!((held(&lists[0]), held(&lists[1])), (vec![a.pid()], vec![]));
    write(&pool, pids(&[&b])).unwrap();
    assert_eq!((held(&lists[0]), held(&lists[1])), (vec![a.pid()], vec![b.pid()]));
    let mut all = [a.pid(), b.pid()];
    all.sort_unstable();
    assert_eq!(held(&pool), all);
    a.end();
    write(&pool, pids(&[&b])).unwrap();
    assert_eq!(held(&lists[1]), [b.pid()], "a task in the pool keeps its list");
    write(&pool, pids(&[&c])).unwrap();
    assert_eq!(held(&lists[0]), [c.pid()]);
}

#[test]
fn a_shared_pool_picks_the_list_with_fewest_tasks() {
    let mount = Mount::new();
    mount.make_pool("shared", false, &["1", "0"]);
    let pool = mount.pool("shared").join("tasks");
    let lists = [mount.tasks("shared", "0"), mount.tasks("shared", "1")];
    let tasks: Vec<Sleeper> = (0..7).map(|_| Sleeper::new()).collect();
    let [a, b, c, d, e, f, g] = tasks.iter().map(|task| task.pid()).collect::<Vec<u32>>()[..] else {
        panic!("seven")
    };
    let now = || {
        let mut sorted = lists.each_ref().map(|list| held(list));
        // PIDs may wrap around while the test runs.
        sorted
            .iter_mut()
            .for_each(|pids| pids.sort_by_key(|pid| [a, b, c, d, e, f, g].iter().position(|p| p == pid)));
        sorted
    };
    write(&lists[1], format!("{a} {b}")).unwrap();
    write(&pool, c.to_string()).unwrap();
    assert_eq!(now(), [vec![c], vec![a, b]]);
    write(&pool, format!("{d} {e}")).unwrap();
    assert_eq!(
        now(),
        [vec![c, d, e], vec![a, b]],
        "of two lists with the same number of tasks, the first by its first CPU"
    );
    write(&pool, format!("{f} {g}")).unwrap();
    assert_eq!(now(), [vec![c, d, e, g], vec![a, b, f]], "earlier tasks of the same write count");
    write(&lists[1], format!("-{a} -{b}")).unwrap();
    write(&pool, format!("{c} {d} {e} {g}")).unwrap();
    assert_eq!(now(), [vec![c, d, e, g], vec![f]], "a task in the pool keeps its list");
    assert_eq!((masks(g), masks(f)), (vec!["0".to_owned()], vec!["1".to_owned()]));
}

#[test]
fn a_write_takes_effect_completely_or_not_at_all() {
    let mount = Mount::with_dataplane();
    mount.make_pool("shared", false, &[]);
    let pool = mount.pool("dataplane").join("tasks");
    let lists = [mount.tasks("dataplane", "0"), mount.tasks("dataplane", "1")];
    let mut dead = Sleeper::new();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(dead.pid() as i32), nix::sys::signal::Signal::SIGKILL)
        .unwrap();
    crate::harness::until("it has died", || crate::harness::has_died(dead.pid()));
    let tasks: Vec<Sleeper> = (0..3).map(|_| Sleeper::new()).collect();
    let [a, b, c] = [0, 1, 2].map(|n| tasks[n].pid());
    write(&lists[1], a.to_string()).unwrap();
    let daemon = mount.daemons()[0];
    for (file, text, expected) in [
        (&pool, format!("{b} {c}"), Errno::EBUSY),
        (&pool, format!("{b} nonsense"), Errno::EINVAL),
        (&pool, format!("{b} -{b}"), Errno::EINVAL),
        (&pool, format!("{b} {daemon}"), Errno::EINVAL),
        (&pool, format!("-{a} {daemon}"), Errno::EINVAL),
        (&pool, format!("-{a} nonsense"), Errno::EINVAL),
        (&lists[0], format!("{a} {b}"), Errno::EBUSY),
        (&lists[1], b.to_string(), Errno::EBUSY),
        (&lists[1], format!("-{c} {b}"), Errno::EBUSY),
        (&pool, dead.pid().to_string(), Errno::ESRCH),
        (&lists[0], format!("{0} -{0}", dead.pid()), Errno::ESRCH),
        (&mount.pool("shared").join("tasks"), a.to_string(), Errno::EBUSY),
    ] {
        assert_eq!(errno(write(file, &text)), expected, "{text}");
        assert_eq!((held(&lists[0]), held(&lists[1])), (vec![], vec![a]), "{text}");
        assert_eq!([a, b, c].map(masks), [vec!["1".to_owned()], vec![free()], vec![free()]], "{text}");
    }
    write(&pool, format!("{} {b}", dead.pid())).expect("dead tasks are skipped");
    assert_eq!((held(&lists[0]), held(&lists[1])), (vec![b], vec![a]));
    let _ = dead.child().wait();
    write(&pool, format!("-{a},-{b}\n-{c}")).expect("a task without a claim needs no release");
    assert_eq!(held(&pool), [0_u32; 0]);
    assert_eq!([a, b, c].map(masks), [vec![free()], vec![free()], vec![free()]]);
    write(&pool, " \n\t").expect("an empty command is allowed");
}

#[test]
fn no_lock_is_needed() {
    let mount = Mount::new();
    mount.make_pool("dataplane", true, &["0"]);
    let line = "exec 9<> $C/lock; flock 9; $KCM isolate --conf-dir=$C --pool=dataplane -- cat $C/self/claim";
    let (out, err, _) = run(&mut mount.bash(line));
    assert_eq!((out.as_str(), err.as_str()), ("dataplane 0\n", ""));
}

#[test]
fn dead_pids_are_skipped_and_none_alive_is_esrch() {
    let mount = Mount::with_shared();
    let (alive, dead) = (Sleeper::new(), Sleeper::new());
    let gone = dead.pid();
    dead.end();
    write(&mount.tasks("shared", "0"), format!("{gone} {}", alive.pid())).unwrap();
    assert_eq!(mount.read("pools/shared/0/tasks"), format!("{}\n", alive.pid()));
    assert_eq!(errno(write(&mount.tasks("shared", "0"), gone.to_string())), Errno::ESRCH);
    assert_eq!(errno(write(&mount.tasks("shared", "0"), format!("{gone},{gone}"))), Errno::ESRCH);
    assert_eq!(mount.read("pools/shared/0/tasks"), format!("{}\n", alive.pid()));
}
