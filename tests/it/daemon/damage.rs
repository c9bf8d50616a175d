//! A state file that was cut or has a flipped bit: the daemon mounts with what it can read, reports what was lost,
//! and sets the file aside. This is a sample; the unit tests of the journal go through every byte.

use std::fs;
use std::path::{Path, PathBuf};

use crate::harness::dir::{Dir as _, pinned};
use crate::harness::{Mount, Sleeper, masks, pin, write};

/// A stopped daemon with two claims, and its valid files.
struct Stopped {
    mount: Mount,
    /// The tasks on `excl 0` and on `shared 1`.
    tasks: [Sleeper; 2],
    config: Vec<u8>,
    claims: Vec<u8>,
}

impl Stopped {
    fn new() -> Self {
        let mount = Mount::new();
        mount.make_pool("excl", true, &["0"]);
        mount.make_pool("shared", false, &["1"]);
        let tasks = [pinned("0-1"), pinned("0-1")];
        write(&mount.tasks("excl", "0"), tasks[0].pid().to_string()).unwrap();
        write(&mount.tasks("shared", "1"), tasks[1].pid().to_string()).unwrap();
        mount.stop();
        let read = |name| fs::read(mount.state().join(name)).unwrap();
        let (config, claims) = (read("config"), read("claims"));
        Self { mount, tasks, config, claims }
    }

    /// Starts the daemon on this file instead of the valid one and checks the result. Returns how many of the two
    /// claims were kept.
    fn with(&self, name: &str, bytes: &[u8], is_noticed: bool) -> usize {
        let (mount, state) = (&self.mount, self.mount.state());
        for (cpu, task) in self.tasks.iter().enumerate() {
            pin(task.pid(), &[cpu]);
        }
        fs::write(state.join("config"), &self.config).unwrap();
        fs::write(state.join("claims"), &self.claims).unwrap();
        set_aside(&state).iter().for_each(|file| fs::remove_file(file).unwrap());
        let _ = fs::remove_file(state.join("log"));
        let _ = fs::remove_file(state.join("events"));
        fs::write(state.join(name), bytes).unwrap();
        mount.start();
        let aside = set_aside(&state);
        let damaged: Vec<String> = mount
            .read("info/events")
            .lines()
            .filter(|l| l.contains("\"damaged\""))
            .map(String::from)
            .collect();
        if is_noticed {
            assert_eq!((aside.len(), damaged.len()), (1, 1), "{aside:?} {damaged:?}");
            assert_eq!(fs::read(&aside[0]).unwrap(), bytes, "the file is kept unchanged");
            let prefix = format!("{name}.damaged-");
            assert!(aside[0].file_name().unwrap().to_str().unwrap().starts_with(&prefix), "{aside:?}");
            let log = fs::read_to_string(state.join("log")).unwrap();
            for text in [&log, &damaged[0]] {
                assert!(text.contains(aside[0].to_str().unwrap()), "{text}");
                assert!(text.contains(&format!("{}: ", state.join(name).display())), "{text}");
            }
        } else {
            assert_eq!((aside.len(), damaged.len()), (0, 0), "{aside:?} {damaged:?}");
        }
        let kept = self.nobody_is_where_nobody_was();
        self.goes_on();
        mount.kill_daemon();
        kept
    }

    /// Every pool, list and claim that exists was there before.
    fn nobody_is_where_nobody_was(&self) -> usize {
        let mut kept = 0;
        for (index, (pool, list)) in [("excl", "0"), ("shared", "1")].into_iter().enumerate() {
            let pid = self.tasks[index].pid();
            // If only the intent was left, it has been rolled back.
            let mask = masks(pid);
            assert!(mask == [list] || mask == ["0-1"], "{mask:?}");
            if self.mount.tasks(pool, list).exists() {
                let tasks = self.mount.tasks_of(pool, list);
                let is_there = tasks == pid.to_string() && mask == [list];
                assert!(tasks.is_empty() || is_there, "{pool} {list}: {tasks} {mask:?}");
                kept += usize::from(is_there);
                let exclusive = self.mount.read(&format!("pools/{pool}/exclusive"));
                assert_eq!(exclusive, if pool == "excl" { "1\n" } else { "0\n" });
            }
        }
        kept
    }

    /// The next claim works if there is a free list.
    fn goes_on(&self) {
        let mount = &self.mount;
        fs::create_dir(mount.pool("new")).unwrap();
        if !mount.tasks("shared", "1").exists() {
            fs::create_dir(mount.pool("new").join("1")).unwrap();
        }
        let pool = if mount.tasks("shared", "1").exists() { "shared" } else { "new" };
        let task = Sleeper::new();
        write(&mount.tasks(pool, "1"), task.pid().to_string()).unwrap();
        assert_eq!(masks(task.pid()), ["1"]);
        write(&mount.tasks(pool, "1"), format!("-{}", task.pid())).unwrap();
    }
}

fn set_aside(state: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(state).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|file| file.to_str().unwrap().contains(".damaged-")).collect()
}

/// Some lengths to which a file may be cut, including both ends.
fn cuts(bytes: &[u8]) -> impl Iterator<Item = usize> + use<> {
    let length = bytes.len();
    [0, 1, length / 3, length / 2, length - 2, length - 1].into_iter()
}

/// Some copies with one flipped bit.
fn flipped(bytes: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    // Except the last newline: a last line without it was interrupted.
    let bits = (bytes.len() - 1) * 8;
    [0, bits / 5, bits / 3, bits / 2, bits - 10].into_iter().map(|bit| {
        let mut copy = bytes.to_vec();
        copy[bit / 8] ^= 1 << (bit % 8);
        copy
    })
}

#[test]
fn a_cut_configuration_does_not_stop_the_mount() {
    let stopped = Stopped::new();
    let cuts = cuts(&stopped.config);
    let kept: Vec<usize> =
        cuts.map(|length| stopped.with("config", &stopped.config[..length], true)).collect();
    assert!(kept.first() == Some(&0) && kept.last() == Some(&2), "readable parts are kept: {kept:?}");
    assert_eq!(stopped.with("config", &stopped.config, false), 2);
}

#[test]
fn a_flipped_bit_in_the_configuration_does_not_stop_the_mount() {
    let stopped = Stopped::new();
    let kept: Vec<usize> =
        flipped(&stopped.config).map(|bytes| stopped.with("config", &bytes, true)).collect();
    assert!(kept.iter().all(|&kept| kept >= 1) && kept.contains(&2), "readable parts are kept: {kept:?}");
}

#[test]
fn a_cut_claims_log_does_not_stop_the_mount() {
    let stopped = Stopped::new();
    let header = stopped.claims.iter().position(|&b| b == b'\n').unwrap();
    for length in cuts(&stopped.claims) {
        // A line without a newline was interrupted while it was written, so nothing was acknowledged.
        stopped.with("claims", &stopped.claims[..length], length <= header);
    }
    assert_eq!(stopped.with("claims", &stopped.claims, false), 2);
}

#[test]
fn a_flipped_bit_in_the_claims_log_does_not_stop_the_mount() {
    let stopped = Stopped::new();
    let kept: Vec<usize> =
        flipped(&stopped.claims).map(|bytes| stopped.with("claims", &bytes, true)).collect();
    assert!(kept.iter().all(|&kept| kept >= 1) && kept.contains(&2), "readable parts are kept: {kept:?}");
}

#[test]
fn state_files_of_random_bytes_do_not_stop_the_mount() {
    let stopped = Stopped::new();
    let noise: Vec<u8> = (0_u32..20_000).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    for name in ["config", "claims"] {
        assert_eq!(stopped.with(name, &noise, true), 0);
    }
}
