//! No client can stop the daemon, make it grow without bound, or prevent the next claim.

use std::fs::{self, File};
use std::io::{IoSlice, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use crate::harness::{Mount, Sleeper, as_nobody, errno, run, set_mode, text, until, write};
use nix::errno::Errno;
use nix::sys::uio::writev;

/// The most memory that the daemon may ever use, in kilobytes.
const MOST: u64 = 200 << 10;
/// How much more memory it may use if the same work is done again.
const MORE: u64 = 16 << 10;

/// A mount that is checked while clients misuse it.
struct Victim {
    mount: Mount,
    daemons: Vec<u32>,
}

impl Victim {
    fn new() -> Self {
        let mount = Mount::with_dataplane();
        mount.make_pool("other", false, &[]);
        let daemons = mount.daemons();
        Self { mount, daemons }
    }

    /// A line of `/proc/PID/status` in kilobytes, summed over all processes of the daemon.
    fn memory(&self, what: &str) -> u64 {
        let of = |pid: &u32| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the daemon lives");
            let line = status.lines().find_map(|line| line.strip_prefix(what)).expect("a line");
            line.trim_matches([':', '\t', ' ', 'k', 'B']).parse::<u64>().expect("a number")
        };
        self.daemons.iter().map(of).sum()
    }

    /// Checks that the processes are the same, use no more memory than allowed, and accept claims.
    fn is_sound(&self) {
        assert_eq!(self.mount.daemons(), self.daemons, "the same processes serve");
        assert!(self.memory("VmHWM") < MOST, "at most {} kB", self.memory("VmHWM"));
        until("no task is on the lists", || self.mount.read("pools/dataplane/tasks").is_empty());
        let task = Sleeper::new();
        for list in ["0", "1"] {
            write(&self.mount.tasks("dataplane", list), task.pid().to_string()).expect("a claim");
            let shown = self.mount.read(&format!("pools/dataplane/{list}/tasks"));
            assert_eq!(shown, format!("{}\n", task.pid()));
        }
        task.end();
        assert_eq!(self.mount.read("pools/dataplane/tasks"), "");
        assert_eq!(self.mount.read("pools/dataplane/exclusive"), "1\n");
    }

    /// Does the work three times; the daemon may grow only the first time.
    fn bears(&self, mut what: impl FnMut()) {
        what();
        self.is_sound();
        let before = self.memory("VmRSS");
        what();
        what();
        self.is_sound();
        let after = self.memory("VmRSS");
        assert!(after < before + MORE, "{before} kB, then {after} kB");
    }

    fn files(&self) -> Vec<PathBuf> {
        let nodes = self.mount.walk().into_iter().filter(|(_, stat)| stat.is_file());
        nodes.map(|(path, _)| self.mount.conf().join(path)).collect()
    }
}

/// Pseudo-random bytes (xorshift64*).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        let words = (0..length.div_ceil(8)).flat_map(|_| self.next().to_le_bytes());
        words.take(length).collect()
    }
}

#[test]
fn random_bytes_to_every_file() {
    let victim = Victim::new();
    let mut random = Random(0x6b63_6d31);
    let noise = random.bytes(10 << 20);
    for path in victim.files() {
        let file = File::options().read(true).write(true).open(&path).unwrap();
        for (size, writes) in [
            (1, 500),
            (100, 500),
            (4096, 500),
            (65_536, usize::MAX),
            (65_537, usize::MAX),
            (1 << 20, usize::MAX),
            (10 << 20, 1),
        ] {
            for part in noise.chunks(size).take(writes) {
                // A single digit is a command: it would move process 1.
                if part.len() < 8 && part.iter().any(u8::is_ascii_digit) {
                    continue;
                }
                let written = (&file).write(part);
                // A write ends at its first NUL byte.
                let read = part.split(|&b| b == 0).next().unwrap();
                assert!(written.is_err() || read.iter().all(|b| b" ,\t\n\r\x0b\x0c".contains(b)), "{path:?}");
            }
        }
    }
    victim.is_sound();
}

#[test]
fn random_bytes_from_another_user() {
    let victim = Victim::new();
    victim.mount.let_everybody_in();
    for path in victim.files() {
        set_mode(&path, 0o666);
    }
    let mut random = Random(0x6b63_6d32);
    as_nobody(|| {
        for path in victim.files() {
            let Ok(file) = File::options().write(true).open(&path) else {
                assert!(
                    path.ends_with("info/events"),
                    "{path:?}: only this one needs a capability to be opened"
                );
                continue;
            };
            for _ in 0..200 {
                // Digits could also name processes of root.
                let length = random.next() as usize % 12 + 1;
                let words: Vec<u8> =
                    random.bytes(length).iter().map(|b| b"0123456789-, \n"[*b as usize % 14]).collect();
                let _ = (&file).write(&words);
            }
        }
    });
    for file in ["tasks", "0/tasks", "1/tasks", "exclusive", "partial", "mode", "transient", "queue"] {
        set_mode(&victim.mount.pool("dataplane").join(file), 0o644);
    }
    victim.is_sound();
}

#[test]
fn a_command_may_have_64_kib() {
    let victim = Victim::new();
    let tasks = victim.mount.pool("dataplane").join("tasks");
    let task = Sleeper::new();
    let padded = |length: usize| {
        let word = format!("{}\n", task.pid());
        " ".repeat(length - word.len()) + &word
    };
    for length in [4096, 8192, 65_535, 65_536] {
        write(&tasks, padded(length)).unwrap_or_else(|error| panic!("{length}: {error}"));
        write(&tasks, format!("-{}", task.pid())).unwrap();
    }
    for length in [65_537, 131_072, 1 << 20, 3 << 20] {
        assert_eq!(errno(write(&tasks, padded(length))), Errno::E2BIG, "{length}");
        assert_eq!(victim.mount.read("pools/dataplane/tasks"), "", "{length}");
    }
    victim.is_sound();
}

#[test]
fn a_cut_command_and_its_rest_are_refused() {
    let victim = Victim::new();
    let tasks = victim.mount.pool("dataplane").join("tasks");
    let task = Sleeper::new();
    for pages in [1, 2, 3, 15, 16] {
        let word = task.pid().to_string();
        let cut = " ".repeat(pages * 4096 - word.len()) + &word;
        let mut file = File::options().write(true).open(&tasks).unwrap();
        assert_eq!(errno(file.write(cut.as_bytes())), Errno::E2BIG, "{pages} pages");
        for rest in ["0", &word, "\n", ""] {
            let written = file.write(rest.as_bytes());
            if rest.is_empty() {
                assert_eq!(written.unwrap(), 0, "a write of 0 bytes is 0");
            } else {
                assert_eq!(errno(written), Errno::E2BIG, "{pages} pages, then {rest:?}");
            }
        }
        let message = victim.mount.read("self/last_error");
        assert!(message.contains("E2BIG: this follows a command that was too long or cut; "), "{message}");
        assert_eq!(victim.mount.read("pools/dataplane/tasks"), "");
    }
    // bash cuts its output every 4,096 bytes, here within a number; a living process comes later.
    let dead = "$(seq -s ' ' 2000000000 2000000400)";
    let echo = format!("echo {dead} {} > $C/pools/dataplane/0/tasks", task.pid());
    let (_, err, status) = run(&mut victim.mount.bash(&echo));
    assert!(status == Some(1) && err.contains("Argument list too long"), "{err}");
    assert_eq!(victim.mount.read("pools/dataplane/tasks"), "");
    victim.is_sound();
}

#[test]
fn one_writev_is_one_command() {
    let victim = Victim::new();
    let (task, other) = (Sleeper::new(), Sleeper::new());
    let tasks = victim.mount.pool("dataplane").join("tasks");
    let file = File::options().write(true).open(&tasks).unwrap();
    let put = |text: &str, piece: usize| {
        let pieces: Vec<IoSlice<'_>> = text.as_bytes().chunks(piece).map(IoSlice::new).collect();
        writev(&file, &pieces)
    };
    let both = format!("{} {}\n", task.pid(), other.pid());
    for piece in [1, 2, 3, 5] {
        assert_eq!(put(&both, piece), Ok(both.len()), "{piece}");
        assert_eq!(victim.mount.read("pools/dataplane/tasks").split(',').count(), 2);
        assert_eq!(put(&format!("{both} nonsense"), piece), Err(Errno::EINVAL));
        let released = format!("-{} -{}", task.pid(), other.pid());
        assert_eq!(put(&released, piece), Ok(released.len()));
        assert_eq!(victim.mount.read("pools/dataplane/tasks"), "");
    }
    // The kernel splits so many pieces into several requests; none of them names a process.
    let blanks = " ".repeat(1000);
    assert_eq!(put(&blanks, 1), Ok(1000));
    assert_eq!(errno(write(&tasks, format!("{blanks}x"))), Errno::EINVAL);
    victim.is_sound();
}

#[test]
fn millions_of_words() {
    let victim = Victim::new();
    let tasks = victim.mount.tasks("dataplane", "0");
    let own = std::process::id();
    victim.bears(|| {
        for (text, expected) in [
            (",".repeat(65_536), None),
            ("-0,".repeat(21_845), None),
            ("0,".repeat(3_000) + "-0", Some(Errno::EINVAL)),
            ("0 x\n".repeat(16_384), Some(Errno::EINVAL)),
            (format!("{own},-{own},").repeat(3_000), Some(Errno::EINVAL)),
            ((0..6_000).map(|n| format!("{} ", 2_000_000_000 + n)).collect(), Some(Errno::E2BIG)),
            ((0..5_900).map(|n| format!("{} ", 2_000_000_000 + n)).collect(), Some(Errno::ESRCH)),
        ] {
            for _ in 0..8 {
                let written = write(&tasks, &text).err();
                let written = written.map(|error| Errno::from_raw(error.raw_os_error().unwrap()));
                assert_eq!(written, expected, "{:?}", &text[..20]);
            }
        }
    });
}

#[test]
fn a_client_killed_in_the_middle_of_a_write() {
    let victim = Victim::new();
    let mut random = Random(0x6b63_6d33);
    victim.bears(|| {
        for _ in 0..30 {
            let line =
                "while :; do echo 0 > $C/pools/dataplane/tasks; echo -0 > $C/pools/dataplane/tasks; done";
            let clients: Vec<Sleeper> = (0..3)
                .map(|_| Sleeper::spawn(victim.mount.bash(line).stderr(std::process::Stdio::null())))
                .collect();
            // Long enough for the first one to have begun, then at any moment of its work.
            until("some clients write", || !victim.mount.read("pools/dataplane/tasks").is_empty());
            for _ in 0..random.next() % 50 {
                let _ = victim.mount.read("self/claim");
            }
            clients.into_iter().for_each(Sleeper::end);
        }
    });
}

#[test]
fn files_that_are_never_closed() {
    let victim = Victim::new();
    victim.bears(|| {
        let paths = victim.files();
        let open: Vec<File> = paths
            .iter()
            .cycle()
            .take(200)
            .map(|path| File::options().read(true).write(true).open(path).unwrap())
            .collect();
        for (number, file) in open.iter().enumerate() {
            let _ = file.read_at(&mut [0; 7], 0);
            let _ = file.read_at(&mut [0; 7], 1 << (number % 63));
            let _ = file.write_at(b"nonsense", 1 << (number % 60));
        }
        victim.is_sound();
        drop(open);
        // A client that dies with the files open.
        let line = "for i in $(seq 200); do exec {fd}<>$C/pools/dataplane/tasks; done; echo open; sleep 1000";
        let mut client = Sleeper::spawn(victim.mount.bash(line).stdout(std::process::Stdio::piped()));
        let mut printed = [0; 5];
        std::io::Read::read_exact(client.child().stdout.as_mut().unwrap(), &mut printed).unwrap();
        assert_eq!(text(&printed), "open\n");
        client.end();
    });
}

#[test]
fn many_readers() {
    let victim = Victim::new();
    let task = Sleeper::new();
    write(&victim.mount.tasks("dataplane", "1"), task.pid().to_string()).unwrap();
    let storm = "for i in $(seq 40); do
            (cat $C/pools/*/tasks $C/pools/*/*/tasks $C/self/* $C/info/*; ls -lR $C) > /dev/null || echo failed &
        done; wait";
    for _ in 0..2 {
        assert_eq!(victim.mount.sh(storm), "");
    }
    let before = victim.memory("VmRSS");
    for _ in 0..2 {
        assert_eq!(victim.mount.sh(storm), "");
    }
    assert!(victim.memory("VmRSS") < before + MORE);
    assert_eq!(victim.mount.read("pools/dataplane/1/tasks"), format!("{}\n", task.pid()));
    task.end();
    victim.is_sound();
}

#[test]
fn refusals_events_and_logs_do_not_pile_up() {
    let victim = Victim::new();
    let mut file = File::options().write(true).open(victim.mount.tasks("dataplane", "0")).unwrap();
    victim.bears(|| {
        for round in 0..5_000_u32 {
            assert_eq!(errno(file.write(format!("x{round} {}", "y".repeat(1000)).as_bytes())), Errno::EINVAL);
        }
    });
    let state = fs::read_dir(victim.mount.state()).unwrap().map(|entry| entry.unwrap());
    let size: u64 = state.map(|entry| entry.metadata().unwrap().len()).sum();
    assert!(size < 16 << 20, "{size} bytes in the state directory");
}
