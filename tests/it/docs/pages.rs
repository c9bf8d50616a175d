//! The documents are true: their examples are run, and their lists are complete.
//!
//! A fenced block with the info string `console` is part of one session: a line that begins with `# ` is typed, and
//! the lines after it are the expected output. PIDs, times and durations differ each time and are not compared.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::harness::dir::Dir as _;
use crate::harness::{KCM, Machine, Plain, Shell, kcm_for, run};
use kcm_mount::model::cpuset::ParseCpuSetError;
use kcm_mount::model::partition::Missing;
use kcm_mount::model::pool::{InvalidPoolName, ListId};
use kcm_mount::model::refusal::{Holder, ListName, Refusal};
use kcm_mount::model::task::{Pid, TaskId};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// A document of the repository, by its path.
fn document(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Each typed line with its expected output.
fn examples(document: &str) -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> = Vec::new();
    let mut inside = false;
    for line in document.lines() {
        match line.strip_prefix("# ") {
            _ if line.starts_with("```") => inside = line == "```console",
            _ if !inside => {}
            Some(typed) => found.push((typed.to_owned(), String::new())),
            None => {
                let (_, printed) = found.last_mut().expect("a typed line before");
                printed.push_str(line);
                printed.push('\n');
            }
        }
    }
    found
}

/// Replaces what differs each time: times, and numbers of four digits or more, which are the PIDs of the session.
fn plain(text: &str) -> String {
    let in_time = |c: char| c.is_ascii_digit() || "-T:.Z".contains(c);
    let (mut plain, mut rest) = (String::new(), text);
    while let Some(first) = rest.chars().next() {
        let word = &rest[..rest.find(|c| !in_time(c)).unwrap_or(rest.len())];
        let digits = word.find(|c: char| !c.is_ascii_digit()).unwrap_or(word.len());
        let (shown, length) = match (word.len(), digits) {
            (20.., 4) => ("TIME", word.len()),
            (_, 4..) => ("PID", digits),
            (_, 0) => (&rest[..first.len_utf8()], first.len_utf8()),
            _ => (&rest[..digits], digits),
        };
        plain.push_str(shown);
        rest = &rest[length..];
    }
    plain
}

/// A shell as root on its own machine: with its own /etc, /opt, /var/lib, /usr/local/share, processes and four cores.
fn session(home: &Path) -> Shell {
    let root = home.join("machine");
    Machine::new(1, 4, 1).write(&root);
    // PIDs have four digits; for the first process of a namespace, self/ says nothing about others.
    let script = "for place in /etc /opt /var/lib /usr/local/share; do mount -t tmpfs none $place; done
        mkdir -p /etc/systemd/system
        # The service manager of this machine has nothing to do with it.
        [ ! -d /run/systemd ] || mount -t tmpfs none /run/systemd
        echo 4700 > /proc/sys/kernel/ns_last_pid
        exec 2>&1
        bash
        true";
    let path = format!("{}:{}", Path::new(KCM).parent().unwrap().display(), std::env::var("PATH").unwrap());
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", script]);
    Shell::start(command.env("PATH", path).env("LC_ALL", "C").env("KCM_DEV_LSCPU_SYSFS", root))
}

/// A shell that reads its commands from a pipe puts line numbers into its messages; a shell at a terminal does not.
fn without_line(message: &str) -> String {
    match message.strip_prefix("bash: line ").and_then(|rest| rest.split_once(": ")) {
        Some((_, rest)) => format!("bash: {rest}"),
        None => message.to_owned(),
    }
}

fn examples_are_true(name: &str) {
    let home = tempfile::tempdir().unwrap();
    let mut shell = session(home.path());
    let examples = examples(&document(name));
    assert!(!examples.is_empty());
    for (typed, expected) in examples {
        // Every mount prints this on a machine on which root may not change the OOM score.
        let is_meant = |line: &&str| !line.contains("/proc/self/oom_score_adj");
        let printed: String =
            shell.ask(&typed).split_inclusive('\n').filter(is_meant).map(without_line).collect();
        assert_eq!(plain(&printed), plain(&expected), "{name}: # {typed}\n{printed}");
    }
}

#[test]
fn the_session_of_the_readme_prints_what_it_says() {
    examples_are_true("README.md");
}

#[test]
fn the_examples_of_the_commands_print_what_they_say() {
    examples_are_true("docs/commands.md");
}

#[test]
fn the_examples_of_operations_print_what_they_say() {
    examples_are_true("docs/operations.md");
}

#[test]
fn every_command_has_a_section_with_an_example() {
    let text = document("docs/commands.md");
    let typed: Vec<String> = examples(&text).into_iter().map(|(typed, _)| typed).collect();
    let (help, _, _) = run(Command::new(KCM).arg("--help"));
    let commands = help.split_once("Commands:\n").unwrap().1.split_once("\n\n").unwrap().0;
    let names = commands.lines().filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    let names: Vec<&str> = names.filter(|name| !name.is_empty() && *name != "help").collect();
    assert!(names.len() > 10, "{names:?}");
    for name in names {
        let call = format!("kcm {name}");
        let sections = text.lines().filter_map(|line| line.strip_prefix("## "));
        assert!(
            sections.flat_map(|line| line.split(", ")).any(|section| section == call),
            "{call}: no section"
        );
        assert!(typed.iter().any(|typed| typed.contains(&call)), "{call}: no example");
    }
}

/// One of each kind, with the names of the document.
fn refusals() -> Vec<Refusal> {
    let list = |cpus: &str| ListName { pool: "dataplane".parse().unwrap(), cpus: cpus.to_owned() };
    let pool = || "dataplane".parse().unwrap();
    let task = TaskId { pid: Pid::new(4711).unwrap(), ino: 1 };
    let holder = Holder { task, list: ListId(64), held: 12_000_000_000 };
    let cpus = |text: &str| text.parse().unwrap();
    vec![
        Refusal::Nonsense { word: "make".into() },
        Refusal::Contradiction,
        Refusal::TooLong,
        Refusal::AfterTooLong,
        Refusal::NoSuchProcess,
        Refusal::NotPermitted { uid: 1000 },
        Refusal::KernelThread,
        Refusal::OwnProcess,
        Refusal::Held { list: list("0"), holder, free: Some("1".into()) },
        Refusal::Held { list: list("0"), holder, free: None },
        Refusal::TwoNamed { list: list("0") },
        Refusal::NoneFree { pool: pool(), taken: 4, draining: 0, longest: Some((list("0"), holder)) },
        Refusal::NoneFree { pool: pool(), taken: 0, draining: 2, longest: None },
        Refusal::NoneFree { pool: pool(), taken: 0, draining: 0, longest: None },
        Refusal::NoneSuits { pool: pool() },
        Refusal::MaskRefused { list: list("0"), got: None },
        Refusal::MaskRefused { list: list("0-1"), got: Some(cpus("0")) },
        Refusal::KeepsChanging,
        Refusal::TooMany { limit: 10_000 },
        Refusal::JournalFull,
        Refusal::CannotRecord { errno: Errno::EROFS },
        Refusal::DiskStalled,
        Refusal::TaskBusy,
        Refusal::Removed,
        Refusal::NotAdmin,
        Refusal::BadPoolName(InvalidPoolName),
        Refusal::BadCpuList(ParseCpuSetError::Empty),
        Refusal::UnknownCpus { unknown: cpus("64"), known: cpus("0-3") },
        Refusal::Overlap { other: list("0"), both: cpus("0") },
        Refusal::Exists,
        Refusal::ListInUse { list: list("0"), holder },
        Refusal::PoolHasLists { pool: pool() },
        Refusal::SharedByMany {
            list: ListName { pool: "infra".parse().unwrap(), cpus: "2-3".into() },
            tasks: 5,
        },
        Refusal::NotAFlag,
        Refusal::NotASeq,
        Refusal::NotWritable,
        Refusal::FixedDirectory,
        Refusal::CannotStore { errno: Errno::ENOSPC },
        Refusal::Fault { what: "setting or reading the mask", errno: Errno::EIO },
        Refusal::Unsettled,
        Refusal::Deadline,
        Refusal::DaemonLacks { capability: "CAP_SYS_NICE" },
        Refusal::OutOfTime { uid: 1000 },
        Refusal::TooManyRequests { uid: 1000 },
        Refusal::Offline { list: list("0-1"), offline: cpus("1") },
        Refusal::CannotIsolate { missing: Missing::Controller },
        Refusal::CannotIsolate { missing: Missing::Mount },
        Refusal::CannotIsolate { missing: Missing::Root },
        Refusal::CannotIsolate { missing: Missing::Kernel },
        Refusal::CannotIsolate { missing: Missing::Writable },
        Refusal::NotExclusive { pool: "infra".parse().unwrap() },
        Refusal::IsolatedPool { pool: pool() },
        Refusal::UnsuitableCgroup {
            path: "/pod".into(),
            why: "it has controllers or cgroups that allow no threaded cgroup: EOPNOTSUPP".into(),
        },
        Refusal::PartitionRefused { list: list("0"), why: "Cpu list in cpuset.cpus not exclusive".into() },
        Refusal::NotAMode,
        Refusal::OthersWait { pool: pool(), before: 2 },
        Refusal::QueueFull,
        Refusal::NotOnePid,
        Refusal::FixedFiles { operation: "removed", errno: Errno::EPERM },
        Refusal::Draining { list: list("0") },
        Refusal::NotAStateChange,
        Refusal::BadConfig { why: "missing field `pools` at line 1 column 2".into() },
    ]
}

/// The kinds, in the order of [`refusals`]. A new kind does not compile here until it has a number.
fn kind(refusal: &Refusal) -> usize {
    match refusal {
        Refusal::Nonsense { .. } => 0,
        Refusal::Contradiction => 1,
        Refusal::TooLong => 2,
        Refusal::AfterTooLong => 3,
        Refusal::NoSuchProcess => 4,
        Refusal::NotPermitted { .. } => 5,
        Refusal::KernelThread => 6,
        Refusal::OwnProcess => 7,
        Refusal::Held { .. } => 8,
        Refusal::TwoNamed { .. } => 9,
        Refusal::NoneFree { .. } => 10,
        Refusal::NoneSuits { .. } => 11,
        Refusal::MaskRefused { .. } => 12,
        Refusal::KeepsChanging => 13,
        Refusal::TooMany { .. } => 14,
        Refusal::JournalFull | Refusal::CannotRecord { .. } => 15,
        Refusal::DiskStalled => 16,
        Refusal::TaskBusy => 17,
        Refusal::Removed => 18,
        Refusal::NotAdmin => 19,
        Refusal::BadPoolName(_) => 20,
        Refusal::BadCpuList(_) => 21,
        Refusal::UnknownCpus { .. } => 22,
        Refusal::Overlap { .. } => 23,
        Refusal::Exists => 24,
        Refusal::ListInUse { .. } => 25,
        Refusal::PoolHasLists { .. } => 26,
        Refusal::SharedByMany { .. } => 27,
        Refusal::NotAFlag => 28,
        Refusal::NotASeq => 29,
        Refusal::NotWritable => 30,
        Refusal::FixedDirectory => 31,
        Refusal::CannotStore { .. } => 32,
        Refusal::Fault { .. } => 33,
        Refusal::Unsettled => 34,
        Refusal::Deadline => 35,
        Refusal::DaemonLacks { .. } => 36,
        Refusal::OutOfTime { .. } => 37,
        Refusal::TooManyRequests { .. } => 38,
        Refusal::Offline { .. } => 39,
        Refusal::CannotIsolate { .. } => 40,
        Refusal::NotExclusive { .. } => 41,
        Refusal::IsolatedPool { .. } => 42,
        Refusal::UnsuitableCgroup { .. } => 43,
        Refusal::PartitionRefused { .. } => 44,
        Refusal::NotAMode => 45,
        Refusal::OthersWait { .. } => 46,
        Refusal::QueueFull => 47,
        Refusal::NotOnePid => 48,
        Refusal::FixedFiles { .. } => 49,
        Refusal::Draining { .. } => 50,
        Refusal::NotAStateChange => 51,
        Refusal::BadConfig { .. } => 52,
    }
}

#[test]
fn every_refusal_is_in_the_table() {
    let text = document("docs/operations.md");
    let rows: Vec<&str> = text.lines().filter(|line| line.starts_with("| E")).collect();
    let refusals = refusals();
    for refusal in &refusals {
        let sentence = refusal.sentence("4711 (sleep)").replace('<', "&lt;").replace('>', "&gt;");
        let row = format!("| {:?} | {sentence} |", refusal.errno());
        assert!(rows.contains(&&*row), "missing: {row}");
    }
    assert_eq!(rows.len(), refusals.len(), "a row that is no refusal any more");
    let mut kinds: Vec<usize> = refusals.iter().map(kind).collect();
    kinds.dedup();
    assert_eq!(kinds, (0..=52).collect::<Vec<_>>());
}

#[test]
fn refusals_of_commands_are_in_the_table() {
    let plain = Plain::new();
    plain.make_pool("free", false, &[("0", "")]);
    plain.make_pool("broken", true, &[("0", "x")]);
    let (pools, empty) = (Plain::new(), Plain::new());
    pools.make_pool("absent", true, &[("4000", "")]);
    pools.make_pool("nonsense", true, &[("x", "")]);
    fs::remove_dir(empty.conf().join("pools")).unwrap();
    let lock = fs::File::open(empty.conf().join("lock")).unwrap();
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).unwrap();
    let absent = kcm_for(&plain.home().join("absent"), &["describe"]);
    let with = |mut command: Command, variable: &str, value: &str| {
        command.env(variable, value);
        command
    };
    let document = document("docs/operations.md");
    for (mut command, answer) in [
        (absent, "no such directory"),
        (empty.kcm(&["describe"]), "no pools"),
        (plain.kcm_as_nobody(&["isolate", "--pool=free", "true"]), "Permission denied"),
        (plain.kcm(&["isolate", "--pool=broken", "true"]), "not a list of PIDs; repair it by hand"),
        (with(empty.kcm(&["reconcile"]), "KCM_LOCK_TIMEOUT", "0.1"), "Lock timed out after"),
        (
            with(pools.kcm(&["reconcile"]), "KCM_PROC_FS", "/nowhere"),
            "cannot be read; set KCM_PROC_FS to a procfs",
        ),
        (pools.kcm(&["isolate", "--pool=zz", "true"]), "does not exist"),
        (pools.kcm(&["isolate", "--pool=absent", "true"]), "the kernel refuses these CPUs"),
        (pools.kcm(&["isolate", "--pool=nonsense", "true"]), "not a CPU list; rename its directory"),
        (pools.kcm(&["init", "--num-dp-cores=1"]), "pool does not exist"),
    ] {
        let (_, err, status) = run(&mut command);
        assert_eq!(status, Some(1), "{command:?}: {err}");
        let last = err.lines().last().unwrap();
        assert!(last.contains(answer), "{command:?}: {err}");
        assert!(document.contains(answer), "{answer}");
    }
}

#[test]
fn the_example_of_the_tests_is_a_test() {
    let example = document("tests/it/example.rs");
    let (_, code) = example.split_once("\n\n").unwrap();
    assert!(document("tests/README.md").contains(code), "tests/README.md does not show tests/it/example.rs");
}
