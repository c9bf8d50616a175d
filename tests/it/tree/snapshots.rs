//! One open file reads one consistent snapshot, or returns an error if the snapshot is lost; never a mixture.

use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::harness::{Mount, Sleeper, errno, text, until, write};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The text of `tasks` for these PIDs.
fn shown(tasks: &[&Sleeper]) -> String {
    let mut pids: Vec<u32> = tasks.iter().map(|task| task.pid()).collect();
    pids.sort_unstable();
    pids.iter().map(u32::to_string).collect::<Vec<_>>().join(",") + "\n"
}

fn claim(mount: &Mount, list: &str, task: &Sleeper) {
    write(&mount.tasks("shared", list), task.pid().to_string()).expect("a claim");
}

#[test]
fn one_open_file_reads_one_snapshot() {
    let mount = Mount::with_shared();
    let tasks: Vec<Sleeper> = (0..5).map(|_| Sleeper::new()).collect();
    let (first, rest) = tasks.split_at(3);
    for task in first {
        claim(&mount, "0", task);
    }
    let before = mount.read("pools/shared/0/tasks");
    let mut file = File::open(mount.tasks("shared", "0")).unwrap();
    let mut seen = Vec::new();
    let mut byte = [0];
    let mut turn = 0;
    while file.read(&mut byte).unwrap() == 1 {
        seen.push(byte[0]);
        let changing = &rest[turn % 2];
        let sign = if turn % 4 < 2 { "" } else { "-" };
        write(&mount.tasks("shared", "0"), format!("{sign}{}", changing.pid())).unwrap();
        turn += 1;
    }
    assert_eq!(text(&seen), before);
    claim(&mount, "0", &rest[0]);
    let now = mount.read("pools/shared/0/tasks");
    assert_ne!(now, before);
    file.rewind().unwrap();
    let mut again = String::new();
    file.read_to_string(&mut again).unwrap();
    assert_eq!(again, now, "from the start it is read again");
}

#[test]
fn a_reader_sees_one_state_or_the_other() {
    let mount = Mount::with_shared();
    let (stays, comes) = (Sleeper::new(), Sleeper::new());
    claim(&mount, "0", &stays);
    let states = [shown(&[&stays]), shown(&[&stays, &comes])];
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                claim(&mount, "0", &comes);
                write(&mount.tasks("shared", "0"), format!("-{}", comes.pid())).unwrap();
            }
        });
        let mut counts = [0, 0];
        until("both states were seen", || {
            let mut file = File::open(mount.tasks("shared", "0")).unwrap();
            let (mut seen, mut part) = (Vec::new(), [0; 3]);
            loop {
                match file.read(&mut part).unwrap() {
                    0 => break,
                    n => seen.extend(&part[..n]),
                }
            }
            let state = states.iter().position(|state| *state == text(&seen));
            counts[state.unwrap_or_else(|| panic!("a mixture: {:?} of {states:?}", text(&seen)))] += 1;
            counts.iter().all(|&count| count >= 100)
        });
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_read_across_a_worker_death_is_estale() {
    let mount = Mount::with_shared();
    let (first, second) = (Sleeper::new(), Sleeper::new());
    claim(&mount, "0", &first);
    let mut file = File::open(mount.tasks("shared", "0")).unwrap();
    let mut part = [0; 2];
    assert_eq!(file.read(&mut part).unwrap(), 2);
    let worker = mount.worker().expect("a worker");
    kill(Pid::from_raw(worker as i32), Signal::SIGKILL).unwrap();
    claim(&mount, "0", &second);
    assert_eq!(errno(file.read(&mut part)), Errno::ESTALE);
    assert_eq!(errno(file.read_at(&mut part, 1)), Errno::ESTALE);
    file.rewind().unwrap();
    let mut content = String::new();
    file.read_to_string(&mut content).unwrap();
    assert_eq!(content, shown(&[&first, &second]), "from the start it is read again");
    assert_eq!(file.read_at(&mut part, 1).unwrap(), 2);
}

#[test]
fn two_open_files_have_two_snapshots() {
    let mount = Mount::with_shared();
    let (first, second) = (Sleeper::new(), Sleeper::new());
    let tasks = mount.tasks("shared", "0");
    claim(&mount, "0", &first);
    let (old, mut byte) = (File::open(&tasks).unwrap(), [0]);
    old.read_exact_at(&mut byte, 0).unwrap();
    claim(&mount, "0", &second);
    let new = File::open(&tasks).unwrap();
    new.read_exact_at(&mut byte, 0).unwrap();
    let rest = |file: &File| {
        let mut rest = [0; 100];
        let length = file.read_at(&mut rest, 1).unwrap();
        text(&rest[..length])
    };
    assert_eq!(rest(&old), shown(&[&first])[1..]);
    assert_eq!(rest(&new), shown(&[&first, &second])[1..]);
    assert_eq!(rest(&old), shown(&[&first])[1..]);
}
