//! The attacks. Each is a program of an unprivileged user who may write to the files of one pool.
//!
//! Owns what each attacker does. Does not know which filesystem it does that to: the empty one has the same files, each
//! of which is empty and takes every write.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::thread::{Builder, sleep};
use std::time::Duration;

use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, gettid};

use crate::crew::{self, Random, Tally, process, rest, surviving_process, threads};
use crate::place::{Place, Pool};
use crate::sys;

/// The flag that starts this program as an attacker.
pub const FLAG: &str = "--attacker";
/// kcm accepts a command up to 64 KiB.
const LONGEST: usize = 64 * 1024;

/// An attack.
pub struct Attack {
    pub name: &'static str,
    pub what: &'static str,
    /// The pool that is delegated to the attacker.
    pub pool: Pool,
    /// Why the claims of the victim cannot be held to the aim, if SECURITY.md says so.
    pub limit: Option<&'static str>,
    start: fn(&Place, &Tally) -> io::Result<()>,
}

const fn attack(
    name: &'static str,
    pool: Pool,
    start: fn(&Place, &Tally) -> io::Result<()>,
    what: &'static str,
) -> Attack {
    Attack { name, what, pool, limit: None, start }
}

pub const ATTACKS: [Attack; 11] = [
    attack("stat", Pool::Shared, stat, "2,000 threads below 260 ancestors call stat on self/claim"),
    attack(
        "slow-claims",
        Pool::Shared,
        slow_claims,
        "64 writers claim, with 500 blanks, for a process of 8,000 threads, which creates more and widens their masks",
    ),
    attack(
        "crowd",
        Pool::Unsuitable,
        crowd,
        "64 writers claim for 100 processes at once in a pool of 128 unsuitable lists",
    ),
    attack("long-commands", Pool::Shared, long_commands, "200 writers of 64 KiB: PIDs of others, thread ids"),
    attack("heirs", Pool::Exclusive, heirs, "6,000 heirs of one exclusive list die in turn"),
    attack("nonsense", Pool::Shared, nonsense, "1,500 threads write nonsense to 34 files"),
    attack("killed", Pool::Shared, killed, "64 processes create processes that claim and die"),
    attack("polls", Pool::Shared, polls, "46 processes poll 4,000 open files each of a changing list"),
    Attack {
        limit: Some("the kernel locks the file while a thread that gets no CPU seeks to its end"),
        ..attack(
            "seekers",
            Pool::Shared,
            seekers,
            "16 threads of lowest priority seek to the end of the victim's tasks file, beside 6 busy threads on their CPU",
        )
    },
    attack("storm", Pool::Shared, storm, "as many threads as the limit allows do all of it at random"),
    attack("readers", Pool::Shared, readers, "2,000 threads read info/* and self/*"),
];

/// Attacks until it is killed. Says `ready`, and counts what it has done when it is asked.
pub fn run(name: &str, root: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let attack = ATTACKS.iter().find(|attack| attack.name == name).ok_or("no such attack")?;
    // Its cgroup has been set when it is asked to begin.
    hear()?;
    // This thread starts the others, and still has to say so when thousands of them run.
    sys::run_before_others()?;
    crew::become_attacker()?;
    let tally = Tally::new()?;
    (attack.start)(&Place::new(root), &tally)?;
    // The setting up is not part of the attack.
    tally.total();
    println!("ready");
    hear()?;
    let (done, refused) = tally.total();
    println!("{done} {refused}");
    hear()?;
    Ok(())
}

fn hear() -> io::Result<()> {
    io::stdin().read_line(&mut String::new()).map(drop)
}

fn put(file: &Path, text: &[u8]) -> io::Result<()> {
    OpenOptions::new().write(true).open(file)?.write_all(text)
}

/// Opens, reads to the end, closes.
fn get(file: &Path) -> io::Result<()> {
    let (mut file, mut buffer) = (File::open(file)?, [0; 4096]);
    while file.read(&mut buffer)? > 0 {}
    Ok(())
}

fn stat(place: &Place, tally: &Tally) -> io::Result<()> {
    below(260, place, tally)?;
    tally.wait(1);
    Ok(())
}

/// Starts a process below so many ancestors, with threads that call stat.
fn below(ancestors: u32, place: &Place, tally: &Tally) -> io::Result<()> {
    let deeper = || {
        if ancestors > 0 {
            let _ = below(ancestors - 1, place, tally);
        } else {
            let (file, counted) = (place.file("self/claim"), tally.clone());
            threads(2_000, move |_| {
                loop {
                    counted.note(fs::metadata(&file));
                }
            });
            tally.started();
        }
        rest();
    };
    process(deeper).map(drop)
}

fn slow_claims(place: &Place, tally: &Tally) -> io::Result<()> {
    let task = process(|| {
        let sleepers = threads(8_000, |_| rest());
        for _ in 0..4 {
            create_another();
        }
        let _ = Builder::new().spawn(widen_all);
        assert!(sleepers > 0, "no thread");
        tally.started();
        rest();
    })?;
    tally.wait(1);
    let (files, counted) = (place.files(), tally.clone());
    let command = format!("{task}{:500}\n", "");
    threads(64, move |n| {
        loop {
            counted.note(put(&files[n % files.len()], command.as_bytes()));
        }
    });
    Ok(())
}

/// A thread that creates the next one and ends.
fn create_another() {
    let begin = || {
        sleep(Duration::from_millis(1));
        create_another();
    };
    while Builder::new().stack_size(64 * 1024).spawn(begin).is_err() {
        sleep(Duration::from_micros(100));
    }
}

/// Gives every thread of this process all CPUs, again and again.
fn widen_all() {
    let mut all = CpuSet::new();
    for cpu in 0..CpuSet::count() {
        let _ = all.set(cpu);
    }
    loop {
        for thread in fs::read_dir("/proc/self/task").into_iter().flatten().filter_map(Result::ok) {
            let tid = thread.file_name().to_str().and_then(|name| name.parse().ok());
            let _ = tid.map(|tid| sched_setaffinity(Pid::from_raw(tid), &all));
        }
    }
}

fn crowd(place: &Place, tally: &Tally) -> io::Result<()> {
    let pids = (0..100).map(|_| process(rest)).collect::<io::Result<Vec<Pid>>>()?;
    let command = list(pids.iter());
    let (file, counted) = (place.pool(), tally.clone());
    threads(64, move |_| {
        loop {
            counted.note(put(&file, command.as_bytes()));
        }
    });
    Ok(())
}

/// PIDs as one command, as many as it may have.
fn list(pids: impl Iterator<Item = impl std::fmt::Display>) -> String {
    let mut command = String::new();
    for pid in pids {
        if command.len() > LONGEST - 16 {
            break;
        }
        let _ = write!(command, "{pid} ");
    }
    command.push('\n');
    command
}

fn long_commands(place: &Place, tally: &Tally) -> io::Result<()> {
    // The id of a thread stands for its process.
    let (sender, ids) = std::sync::mpsc::channel();
    let count = threads(4_000, move |_| {
        let _ = sender.send(gettid());
        rest();
    });
    let own: Vec<Pid> = ids.iter().take(count).collect();
    let commands = [list(1..), list((1..32_000).rev()), list(own.iter().cycle())];
    let (files, counted) = (place.files(), tally.clone());
    threads(200, move |n| {
        loop {
            counted.note(put(&files[n % files.len()], commands[n % commands.len()].as_bytes()));
        }
    });
    Ok(())
}

fn heirs(place: &Place, tally: &Tally) -> io::Result<()> {
    const HEIRS: usize = 6_000;
    let file = place.list("0");
    let (mut pids, mut sender) = io::pipe()?;
    let holder = process(|| {
        let _ = put(&file, b"0\n");
        for _ in 0..HEIRS {
            // Beyond the limit there are fewer.
            let pid = surviving_process(rest).map_or(0, Pid::as_raw);
            let _ = sender.write_all(&pid.to_ne_bytes());
        }
        rest();
    })?;
    let mut left = HashSet::new();
    for _ in 0..HEIRS {
        let mut pid = [0; 4];
        pids.read_exact(&mut pid)?;
        left.insert(i32::from_ne_bytes(pid));
    }
    left.remove(&0);
    kill(holder, Signal::SIGKILL)?;
    waitpid(holder, None)?;
    let tally = tally.clone();
    let kill_in_turn = move || {
        loop {
            let text = fs::read_to_string(&file);
            let shown = text.as_deref().ok().and_then(|text| text.trim().parse().ok());
            tally.note(text);
            // An empty file shows nobody: then the next one dies.
            let Some(next) = shown.or_else(|| left.iter().next().copied()) else { return };
            if left.remove(&next) {
                let _ = kill(Pid::from_raw(next), Signal::SIGKILL);
            }
        }
    };
    Builder::new().spawn(kill_in_turn).map(drop)
}

fn nonsense(place: &Place, tally: &Tally) -> io::Result<()> {
    let (files, tally) = (place.files(), tally.clone());
    threads(1_500, move |n| {
        loop {
            let Ok(mut file) = OpenOptions::new().write(true).open(&files[n % files.len()]) else { continue };
            for _ in 0..100 {
                tally.note(file.write_all(b"x\n"));
            }
        }
    });
    Ok(())
}

fn killed(place: &Place, tally: &Tally) -> io::Result<()> {
    let files = [place.pool(), place.list("0")];
    for n in 0..64 {
        let file = &files[n % 2];
        process(|| {
            loop {
                let claim_and_die = || {
                    tally.note(put(file, b"0\n"));
                    let _ = kill(Pid::this(), Signal::SIGKILL);
                };
                let child = process(claim_and_die);
                let _ = child.map(|child| waitpid(child, None));
            }
        })?;
    }
    Ok(())
}

fn polls(place: &Place, tally: &Tally) -> io::Result<()> {
    let file = place.list("0");
    for _ in 0..46 {
        process(|| {
            let _ = poll_all(&file, tally);
        })?;
    }
    process(|| {
        loop {
            tally.note(put(&file, b"0\n"));
            tally.note(put(&file, b"-0\n"));
        }
    })?;
    Ok(())
}

/// Opens, reads and polls a file as often as the limit allows, and looks at every change.
fn poll_all(file: &Path, tally: &Tally) -> io::Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let mut open: Vec<File> = Vec::new();
    while let Ok(mut file) = File::open(file) {
        tally.note(file.read(&mut [0; 64]));
        let event = EpollEvent::new(EpollFlags::EPOLLPRI | EpollFlags::EPOLLET, open.len() as u64);
        epoll.add(&file, event)?;
        open.push(file);
    }
    let mut events = vec![EpollEvent::empty(); open.len().max(1)];
    loop {
        let count = epoll.wait(&mut events, EpollTimeout::NONE)?;
        for event in &events[..count] {
            let Some(file) = open.get_mut(event.data() as usize) else { continue };
            file.rewind()?;
            tally.note(file.read(&mut [0; 64]));
        }
    }
}

fn seekers(place: &Place, tally: &Tally) -> io::Result<()> {
    let (file, tally) = (place.victims(), tally.clone());
    threads(16 + 6, move |n| {
        let mut second = CpuSet::new();
        let _ = second.set(1).map(|()| sched_setaffinity(Pid::from_raw(0), &second));
        if n >= 16 {
            loop {
                std::hint::spin_loop();
            }
        }
        let _ = sys::run_when_idle();
        let Ok(mut file) = File::open(&file) else { return };
        loop {
            tally.note(file.seek(SeekFrom::End(0)));
        }
    });
    Ok(())
}

/// The files that everybody may read.
fn readable(place: &Place) -> Vec<PathBuf> {
    let names =
        ["info/version", "info/topology", "info/metrics", "self/claim", "self/cpus", "self/last_error"];
    names.iter().map(|name| place.file(name)).collect()
}

fn readers(place: &Place, tally: &Tally) -> io::Result<()> {
    let (files, tally) = (readable(place), tally.clone());
    threads(2_000, move |n| {
        let mut turn = n;
        loop {
            turn += 1;
            tally.note(get(&files[turn % files.len()]));
        }
    });
    Ok(())
}

fn storm(place: &Place, tally: &Tally) -> io::Result<()> {
    let (own, mut open) = (place.files(), readable(place));
    open.push(place.victims());
    let (long, tally) = (list(1..), tally.clone());
    threads(10_000, move |n| {
        let mut random = Random::new(n);
        loop {
            let file = random.of(&own);
            match random.below(7) {
                0 => tally.note(fs::metadata(random.of(&open))),
                1 => tally.note(get(random.of(&open))),
                2 => tally.note(put(file, b"x\n")),
                3 => tally.note(put(file, b"0\n")),
                4 => tally.note(put(file, b"-0\n")),
                5 => tally.note(put(file, long.as_bytes())),
                // Not of the victim's file: `seekers` does that.
                _ => tally.note(File::open(file).and_then(|mut file| file.seek(SeekFrom::End(0)))),
            }
        }
    });
    Ok(())
}
