//! One exclusive list, many that want it: exactly one gets it, and all or nothing of a write takes effect.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test fails by panicking"
)]

mod common;

use std::fs;
use std::process::{Command, Stdio};

use common::{Mount, Shell, Sleeper, errno, masks, run, write};
use nix::errno::Errno;

const ROUNDS: usize = 200;
const CONTESTANTS: usize = 32;

/// `dataplane` with the one list 0.
fn one_list() -> Mount {
    let mount = Mount::new();
    mount.make_pool("dataplane", true, &["0"]);
    mount
}

/// Each round, all of them write themselves into the list at once: odd ones `0`, even ones their PID; to the list
/// and to the pool. Gives how the refused ones were refused, each message once.
fn storm(mount: &Mount, mut contestants: Vec<Shell>) {
    let go = mount.home().join("go");
    nix::unistd::mkfifo(&go, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
    let (list, pool) = (mount.tasks("dataplane", "0"), mount.pool("dataplane").join("tasks"));
    for round in 0..ROUNDS {
        for (n, contestant) in contestants.iter_mut().enumerate() {
            let who = if n % 2 == 1 { "0" } else { "$$" };
            let file = if n / 2 % 2 == 1 { &list } else { &pool };
            // Opening the pipe waits until somebody opens its other end.
            let wait = format!(": < {}", go.display());
            contestant.tell(&format!("{wait}; {{ echo {who} > {}; }} 2>&1 && echo won", file.display()));
        }
        // Open until all have passed: whoever comes late does not wait.
        let _open = fs::File::options().write(true).open(&go).expect("the pipe");
        let said: Vec<String> = contestants.iter_mut().map(Shell::hear).collect();
        let winners: Vec<usize> = (0..said.len()).filter(|&n| said[n].starts_with("won")).collect();
        assert_eq!(winners.len(), 1, "round {round}: {said:?}");
        let refused = "echo: write error: Device or resource busy";
        assert!(
            (0..said.len()).all(|n| n == winners[0] || said[n].trim_end().ends_with(refused)),
            "{said:?}"
        );
        let held = mount.read("pools/dataplane/tasks");
        assert_eq!(held.matches(',').count(), 0, "{held}");
        let winner = &mut contestants[winners[0]];
        assert_eq!(
            winner.ask("grep Cpus_allowed_list /proc/self/status").trim_end(),
            "Cpus_allowed_list:\t0"
        );
        assert_eq!(winner.ask(&format!("echo -0 > {}", list.display())).trim_end(), "");
    }
}

#[test]
fn exactly_one_of_many_gets_an_exclusive_list() {
    let mount = one_list();
    let shell = |_| Shell::start(mount.bash("exec bash").env("LC_ALL", "C"));
    storm(&mount, (0..CONTESTANTS).map(shell).collect());
}

#[test]
fn exactly_one_gets_it_though_half_of_them_are_in_pid_namespaces_of_their_own() {
    let mount = one_list();
    let shell = |n: usize| {
        if n.is_multiple_of(4) || n % 4 == 3 {
            return Shell::start(mount.bash("exec bash").env("LC_ALL", "C"));
        }
        let mut command = Command::new("unshare");
        command.args(["-p", "-f", "--mount-proc", "--kill-child", "bash"]).env("LC_ALL", "C");
        Shell::start(&mut command)
    };
    storm(&mount, (0..CONTESTANTS).map(shell).collect());
}

#[test]
fn a_write_that_names_two_takes_effect_for_none() {
    let mount = Mount::with_dataplane();
    let (a, b) = (Sleeper::new(), Sleeper::new());
    let all = masks(a.pid());
    let two = format!("{} {}", a.pid(), b.pid());
    assert_eq!(errno(write(&mount.tasks("dataplane", "0"), &two)), Errno::EBUSY);
    assert_eq!(mount.read("pools/dataplane/tasks"), "");
    assert_eq!((masks(a.pid()), masks(b.pid())), (all.clone(), all));
    // To the pool: one list each.
    write(&mount.pool("dataplane").join("tasks"), &two).unwrap();
    assert_eq!((masks(a.pid()), masks(b.pid())), (vec!["0".to_owned()], vec!["1".to_owned()]));
}

#[test]
fn of_a_write_to_the_pool_all_or_none_are_claimed() {
    let mount = Mount::with_dataplane();
    let tasks: Vec<Sleeper> = (0..3).map(|_| Sleeper::new()).collect();
    let all = masks(tasks[0].pid());
    let pids: Vec<String> = tasks.iter().map(|task| task.pid().to_string()).collect();
    assert_eq!(errno(write(&mount.pool("dataplane").join("tasks"), pids.join(","))), Errno::EBUSY);
    assert_eq!(mount.read("pools/dataplane/tasks"), "");
    assert!(tasks.iter().all(|task| masks(task.pid()) == all));
}

#[test]
fn a_move_onto_a_taken_list_leaves_everything_as_it_was() {
    let mount = Mount::with_dataplane();
    let (a, b) = (Sleeper::new(), Sleeper::new());
    write(&mount.tasks("dataplane", "0"), a.pid().to_string()).unwrap();
    write(&mount.tasks("dataplane", "1"), b.pid().to_string()).unwrap();
    assert_eq!(errno(write(&mount.tasks("dataplane", "1"), a.pid().to_string())), Errno::EBUSY);
    assert_eq!(mount.read("pools/dataplane/0/tasks"), format!("{}\n", a.pid()));
    assert_eq!(mount.read("pools/dataplane/1/tasks"), format!("{}\n", b.pid()));
    assert_eq!(masks(a.pid()), ["0"]);
    // In one write one leaves and the other comes.
    write(&mount.tasks("dataplane", "1"), format!("-{} {}", b.pid(), a.pid())).unwrap();
    assert_eq!(mount.read("pools/dataplane/0/tasks"), "");
    assert_eq!(mount.read("pools/dataplane/1/tasks"), format!("{}\n", a.pid()));
    assert_eq!(masks(a.pid()), ["1"]);
}

#[test]
fn a_pool_gives_the_first_free_list_or_the_emptiest() {
    let mount = Mount::new();
    mount.make_pool("dataplane", true, &["1", "0"]);
    let pool = mount.pool("dataplane").join("tasks");
    let (a, b, c) = (Sleeper::new(), Sleeper::new(), Sleeper::new());
    write(&pool, a.pid().to_string()).unwrap();
    assert_eq!(masks(a.pid()), ["0"], "in ascending order of first CPU");
    write(&pool, b.pid().to_string()).unwrap();
    assert_eq!(masks(b.pid()), ["1"]);
    assert_eq!(errno(write(&pool, c.pid().to_string())), Errno::EBUSY);
    write(&pool, b.pid().to_string()).unwrap();
    assert_eq!(masks(b.pid()), ["1"], "who is there stays there");

    let mount = Mount::with_shared();
    let pool = mount.pool("shared").join("tasks");
    write(&mount.tasks("shared", "0"), a.pid().to_string()).unwrap();
    write(&pool, b.pid().to_string()).unwrap();
    write(&pool, c.pid().to_string()).unwrap();
    assert_eq!((masks(b.pid()), masks(c.pid())), (vec!["1".to_owned()], vec!["0".to_owned()]));
}

#[test]
fn no_lock_is_needed_and_none_is_in_the_way() {
    let mount = one_list();
    let line = "exec 9<> $C/lock; flock 9; $KCM isolate --conf-dir=$C --pool=dataplane -- cat $C/self/claim";
    let (out, err, _) = run(mount.bash(line).stdin(Stdio::null()));
    assert_eq!((out.as_str(), err.as_str()), ("dataplane 0\n", ""));
}

#[test]
fn a_name_that_is_dead_is_passed_over_and_none_alive_is_esrch() {
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
