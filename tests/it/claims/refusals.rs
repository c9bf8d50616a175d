//! Every row of the table of refusals in `docs/operations.md` is what a user reads in `self/last_error`.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::process::Command;

use nix::errno::Errno;
use nix::unistd::truncate;
use tempfile::TempDir;

use super::masks::program;
use crate::harness::dir::pinned;
use crate::harness::{
    Machine, Mount, Sleeper, as_nobody, errno, pids, set_mode, sleeper_of_nobody, until, write,
};

const ISOLATED: &str =
    "not every machine can isolate CPUs; the scenario isolated of scripts/vm reads what a user reads";
/// Rows that nobody can cause through a mount, with the reason. Unit tests cause them.
const UNREACHABLE: [(&str, &str); 14] = [
    (
        "another operation on the same task has not finished",
        "a write would have to set masks for 0.2 seconds; engine::tests::retry",
    ),
    ("the writes of uid", "it depends on the load of the machine; engine::tests::time"),
    ("it exists already", "the kernel itself refuses mkdir(2) of a name that exists; model::claims::tests"),
    ("the disk of the state directory does not answer", "daemon::frozen_disk compares what a user reads"),
    (
        "the task creates threads, and it is not certain",
        "it depends on the load of the machine; claims::storm",
    ),
    ("the kernel gives no thread with the policy SCHED_DEADLINE", "claims::masks compares what a user reads"),
    ("kcm's daemon lacks CAP_SYS_NICE", "the daemon would have to lose a capability; process::mask"),
    (
        "too many requests of uid",
        "it depends on the load of the machine; tree::fairness compares what a user reads",
    ),
    (
        "bring them online",
        "a CPU would have to go offline; the scenario hotplug of scripts/vm reads what a user reads",
    ),
    ("cannot isolate CPUs", "tree::configuring compares what a user reads on this machine"),
    ("is isolated, so it stays exclusive", ISOLATED),
    ("the kernel does not isolate", ISOLATED),
    ("no partition can be made", ISOLATED),
    ("setting or reading the mask:", "sched_setaffinity(2) has no other errors; docs::pages"),
];

/// The table's rows, and what users have read.
struct Table {
    rows: BTreeSet<String>,
    seen: BTreeSet<String>,
}

impl Table {
    fn new() -> Self {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/operations.md");
        let text = fs::read_to_string(path).unwrap().replace("&lt;", "<").replace("&gt;", ">");
        let row = |line: &str| {
            let mut cells = line.strip_prefix("| E")?.split(" | ");
            let (errno, sentence) = (cells.next()?, cells.next()?.trim_end_matches(" |"));
            Some(general(&format!("E{errno}: {sentence}")))
        };
        Self { rows: text.lines().filter_map(row).collect(), seen: BTreeSet::new() }
    }

    /// `result` is a refusal, and the line in `self/last_error` says why, as the table does.
    fn check<T: std::fmt::Debug>(&mut self, mount: &Mount, result: std::io::Result<T>) {
        let errno = errno(result);
        let line = mount.read("self/last_error");
        let said = line.splitn(3, ' ').nth(2).unwrap_or_else(|| panic!("no reason for {errno:?}")).trim_end();
        assert!(said.starts_with(&format!("{errno:?}: ")), "{errno:?} is answered, explained is {said}");
        let general = general(said);
        assert!(self.rows.contains(&general), "not in the table: {said}\n{general}\n{:#?}", self.rows);
        self.seen.insert(general);
    }
}

/// A sentence without what differs from case to case: numbers, CPU lists, names of pools and programs.
fn general(sentence: &str) -> String {
    let mut general = String::new();
    let mut last_was_number = false;
    for character in sentence.chars() {
        let is_number = character.is_ascii_digit()
            || last_was_number && general.ends_with('N') && matches!(character, '-' | ',');
        if is_number && !last_was_number {
            general.push('N');
        } else if !is_number {
            general.push(character);
        }
        last_was_number = is_number;
    }
    for pool in ["dataplane", "infra", "empty", "offline"] {
        general = general.replace(pool, "POOL");
    }
    general.replace(" (sleep)", "").replace("\"make\"", "\"WORD\"")
}

#[test]
fn every_row_of_the_table_is_what_a_user_reads() {
    let mut table = Table::new();
    claims(&mut table);
    queues(&mut table);
    configuration(&mut table);
    limits(&mut table);
    full_disk(&mut table);
    let unreachable = |row: &&String| UNREACHABLE.iter().any(|(sentence, _)| row.contains(sentence));
    let missing: Vec<&String> = table.rows.difference(&table.seen).filter(|row| !unreachable(row)).collect();
    assert!(missing.is_empty(), "not caused by this test: {missing:#?}");
    let reached: Vec<&String> = table.seen.iter().filter(unreachable).collect();
    assert!(reached.is_empty(), "not unreachable: {reached:#?}");
}

/// A machine with the CPUs 0 to 3, of which 2 and 3 do not exist in truth.
fn mount() -> Mount {
    let mount = Mount::on_machine(&Machine::new(1, 4, 1));
    mount.let_everybody_in();
    mount.make_pool("dataplane", true, &["0", "1"]);
    mount.make_pool("empty", true, &[]);
    mount
}

fn claims(table: &mut Table) {
    let mount = mount();
    let (first, second) = (mount.tasks("dataplane", "0"), mount.tasks("dataplane", "1"));
    let pool = mount.pool("dataplane").join("tasks");
    let (holder, other, task) = (Sleeper::new(), Sleeper::new(), pinned("0-1"));
    let pid = task.pid().to_string();
    write(&first, holder.pid().to_string()).unwrap();
    table.check(&mount, write(&first, &pid));
    table.check(&mount, write(&second, format!("{pid} {}", other.pid())));
    write(&second, other.pid().to_string()).unwrap();
    table.check(&mount, write(&first, &pid));
    table.check(&mount, write(&pool, &pid));
    table.check(&mount, write(&mount.pool("empty").join("tasks"), &pid));
    table.check(&mount, write(&first, "make"));
    table.check(&mount, write(&first, format!("{pid} -{pid}")));
    table.check(&mount, write(&first, "2147483647"));
    table.check(&mount, write(&first, mount.worker().unwrap().to_string()));
    let kernel_thread = pids().into_iter().find(|pid| *pid == 2).expect("the kernel's threads");
    table.check(&mount, write(&first, kernel_thread.to_string()));
    for list in ["0", "1"] {
        write(&mount.pool("dataplane").join(list).join("state"), "drain").unwrap();
    }
    table.check(&mount, write(&second, &pid));
    write(&first, format!("-{}", holder.pid())).unwrap();
    write(&second, format!("-{}", other.pid())).unwrap();
    table.check(&mount, write(&pool, &pid));
    for list in ["0", "1"] {
        write(&mount.pool("dataplane").join(list).join("state"), "undrain").unwrap();
    }
    write(&first, holder.pid().to_string()).unwrap();
    write(&second, other.pid().to_string()).unwrap();
    set_mode(&first, 0o666);
    let refused = as_nobody(|| write(&first, &pid));
    table.check(&mount, refused);
    // The kernel refuses a list of which no CPU is there, and narrows one of which some are.
    mount.make_pool("offline", false, &["2"]);
    table.check(&mount, write(&mount.tasks("offline", "2"), &pid));
    table.check(&mount, write(&mount.pool("offline").join("tasks"), &pid));
    write(&second, format!("-{}", other.pid())).unwrap();
    fs::remove_dir(second.parent().unwrap()).unwrap();
    fs::create_dir(mount.pool("offline").join("1,3")).unwrap();
    table.check(&mount, write(&mount.tasks("offline", "1,3"), &pid));
    let long = File::options().write(true).open(&first).unwrap();
    table.check(&mount, (&long).write(&vec![b' '; (64 << 10) + 1]));
    table.check(&mount, (&long).write(b"1"));
    let removed = File::options().write(true).open(mount.tasks("offline", "2")).unwrap();
    fs::remove_dir(mount.pool("offline").join("2")).unwrap();
    table.check(&mount, (&removed).write(b"0"));
    write(&first, format!("-{}", holder.pid())).unwrap();
    let mask_widener = program("mask-widener");
    until("a task that changes its masks is refused", || {
        match write(&first, mask_widener.pid().to_string()) {
            Ok(()) => {
                write(&first, format!("-{}", mask_widener.pid())).unwrap();
                false
            }
            // On a busy machine the time is over before it has changed them often enough.
            Err(_) if mount.read("self/last_error").contains("creates threads") => false,
            refused => {
                table.check(&mount, refused);
                true
            }
        }
    });
}

fn queues(table: &mut Table) {
    let mount = mount();
    let queue = mount.pool("dataplane").join("queue");
    set_mode(&queue, 0o666);
    let open = || File::options().write(true).open(&queue).unwrap();
    table.check(&mount, (&open()).write(b"1 2"));
    // The list 0 is for a task that waits, and 1 for another one.
    let waiting = [Sleeper::new(), Sleeper::new()].map(|task| (open(), task));
    for (file, task) in &waiting {
        (&*file).write_all(task.pid().to_string().as_bytes()).unwrap();
    }
    table.check(&mount, write(&mount.pool("dataplane").join("tasks"), "0"));
    let own = sleeper_of_nobody();
    let files: Vec<File> = (0..257).map(|_| as_nobody(open)).collect();
    let results = as_nobody(|| {
        let enter = |mut file: &File| file.write(own.pid().to_string().as_bytes());
        files[..256].iter().for_each(|file| assert!(enter(file).is_ok()));
        enter(&files[256])
    });
    table.check(&mount, results);
    table.check(&mount, fs::remove_file(&queue));
}

fn configuration(table: &mut Table) {
    let mount = mount();
    let task = Sleeper::new();
    let pool = mount.pool("dataplane");
    set_mode(&mount.conf().join("pools"), 0o777);
    let refused = as_nobody(|| fs::create_dir(mount.pool("other")));
    table.check(&mount, refused);
    table.check(&mount, fs::create_dir(mount.pool("Other")));
    table.check(&mount, fs::create_dir(pool.join(",")));
    table.check(&mount, fs::create_dir(pool.join("64")));
    table.check(&mount, fs::create_dir(pool.join("0-2")));
    table.check(&mount, fs::remove_dir(&pool));
    write(&mount.tasks("dataplane", "0"), task.pid().to_string()).unwrap();
    table.check(&mount, fs::remove_dir(pool.join("0")));
    table.check(&mount, write(&pool.join("exclusive"), "2"));
    table.check(&mount, write(&pool.join("mode"), "1"));
    table.check(&mount, write(&pool.join("0/state"), "free"));
    table.check(&mount, write(&mount.conf().join("info/config"), "{}"));
    table.check(&mount, fs::rename(&pool, mount.pool("dataplane").with_file_name("Other")));
    table.check(&mount, fs::rename(pool.join("0"), pool.join("0-1")));
    table.check(&mount, fs::rename(pool.join("0"), mount.conf().join("info/0")));
    table.check(&mount, write(&mount.conf().join("info/reclaimed"), "x"));
    table.check(&mount, fs::create_dir(mount.conf().join("info/other")));
    table.check(&mount, fs::remove_dir(mount.conf().join("info")));
    let version = mount.conf().join("info/version");
    table.check(&mount, write(&version, "x"));
    table.check(&mount, truncate(&version, 0).map_err(std::io::Error::from));
    fs::remove_dir(pool.join("1")).unwrap();
    mount.make_pool("infra", false, &["1"]);
    let tasks = [Sleeper::new(), Sleeper::new()].map(|task| (task.pid(), task));
    write(&mount.tasks("infra", "1"), tasks.each_ref().map(|(pid, _)| pid.to_string()).join(" ")).unwrap();
    table.check(&mount, write(&mount.pool("infra").join("exclusive"), "1"));
    table.check(&mount, write(&mount.pool("infra").join("mode"), "isolated"));
}

/// A daemon that may open only a few files.
fn limits(table: &mut Table) {
    let mount = Mount::not_mounted();
    mount.sh("ulimit -n 300; exec $KCM mount --conf-dir=$C --state-dir=$S 2>&1");
    mount.make_pool("infra", false, &["0"]);
    let tasks: Vec<Sleeper> = (0..300).map(|_| Sleeper::new()).collect();
    let words: Vec<String> = tasks.iter().map(|task| task.pid().to_string()).collect();
    table.check(&mount, write(&mount.tasks("infra", "0"), words.join(" ")));
}

/// A state directory on a disk that becomes full.
fn full_disk(table: &mut Table) {
    struct Disk(TempDir);
    impl Drop for Disk {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
        }
    }
    let disk = Disk(tempfile::tempdir().unwrap());
    let options = ["-t", "tmpfs", "-o", "size=256k", "tmpfs"];
    assert!(Command::new("mount").args(options).arg(disk.0.path()).status().unwrap().success());
    let mount = Mount::not_mounted_in(disk.0.path());
    mount.start();
    mount.make_pool("infra", false, &["0"]);
    let mut filler = OpenOptions::new().create(true).append(true).open(disk.0.path().join("filler")).unwrap();
    while filler.write_all(&[0; 1024]).is_ok() {}
    let task = Sleeper::new();
    let list = mount.tasks("infra", "0");
    until("the claims log is full", || match write(&list, task.pid().to_string()) {
        Ok(()) => {
            write(&list, format!("-{}", task.pid())).unwrap();
            false
        }
        refused => {
            table.check(&mount, refused);
            true
        }
    });
    table.check(&mount, fs::create_dir(mount.pool("other")));
    // The next worker cannot write there at all.
    let state = mount.state();
    assert!(Command::new("mount").arg("--bind").args([&state, &state]).status().unwrap().success());
    assert!(Command::new("mount").args(["-o", "remount,bind,ro"]).arg(&state).status().unwrap().success());
    mount.replace_worker();
    table.check(&mount, write(&list, task.pid().to_string()));
    assert!(Command::new("umount").arg("-l").arg(&state).status().unwrap().success());
    drop(mount);
    drop(disk);
    let _ = Errno::ENOSPC;
}
