//! The worker is killed at every step of every operation that changes something: the client sees no error, and
//! nothing is done twice. The program itself lists the steps.
//!
//! Longer than 400 lines because the operations are one table.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;

use crate::harness::{Cgroup, Mount, Sleeper, errno, if_collected, masks, signal, until, write};
use kcm_mount::failpoint::Step;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::sys::signal::Signal;

/// One mount with two pools and a few processes.
struct Scene {
    mount: Mount,
    /// `a`, `b`, `c`, and a shell `s` that has no child yet.
    tasks: Vec<Sleeper>,
    /// Only for these tasks: a process on the same CPU in the same cgroup could inherit from them.
    _cgroup: Cgroup,
}

impl Scene {
    fn new() -> Self {
        let mount = Mount::new();
        mount.make_pool("dataplane", true, &["0"]);
        mount.make_pool("shared", false, &["1"]);
        fs::create_dir(mount.pool("bare")).unwrap();
        let mut tasks: Vec<Sleeper> = (0..3).map(|_| Sleeper::new()).collect();
        let mut shell = Command::new("bash");
        shell
            .args(["-c", "read go; sleep 1000 & echo $!; wait"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        tasks.push(Sleeper::spawn(&mut shell));
        let cgroup = Cgroup::new();
        tasks.iter().for_each(|task| cgroup.add(task.pid()));
        Self { mount, tasks, _cgroup: cgroup }
    }

    fn pid(&self, name: char) -> u32 {
        self.tasks["abcs".find(name).unwrap()].pid()
    }

    /// Writes a command in which letters stand for processes.
    fn write(&self, pool: &str, list: &str, command: &str) -> io::Result<()> {
        let file =
            if list.is_empty() { self.mount.pool(pool).join("tasks") } else { self.mount.tasks(pool, list) };
        write(&file, self.with_pids(command))
    }

    fn with_pids(&self, command: &str) -> String {
        command
            .chars()
            .map(|c| if c.is_alphabetic() { self.pid(c).to_string() } else { c.to_string() })
            .collect()
    }

    /// Replaces PIDs by letters; `x` is any PID without one.
    fn without_pids(&self, text: &str) -> String {
        let mut shown = text.to_owned();
        for name in "abcs".chars() {
            shown = shown.replace(&self.pid(name).to_string(), &name.to_string());
        }
        let mut result = String::new();
        let mut digits = 0;
        for c in shown.chars() {
            digits = if c.is_ascii_digit() { digits + 1 } else { 0 };
            match digits {
                // Shorter numbers are CPUs.
                0..3 => result.push(c),
                3 => result.replace_range(result.len() - 2.., "x"),
                _ => {}
            }
        }
        result
    }

    /// Everything that can be observed of the mount and the processes, with letters for PIDs.
    fn picture(&self) -> BTreeMap<String, String> {
        let mut picture = BTreeMap::new();
        self.look(Path::new("pools"), &mut picture);
        for name in "abcs".chars() {
            picture.insert(format!("masks of {name}"), format!("{:?}", masks(self.pid(name))));
        }
        let last_error = self.mount.read("self/last_error");
        let reason = last_error.split_once(' ').map_or("", |(_time, reason)| reason);
        // The time that it was held depends on the load of the machine.
        let reason = reason.split(" for ").map(|part| part.trim_start_matches(|c: char| c.is_ascii_digit()));
        picture.insert("last_error".into(), self.without_pids(&reason.collect::<Vec<_>>().join(" for ")));
        let reclaimed = |line: &str| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            self.without_pids(&format!("{} {} {}", line["pid"], line["pool"], line["cpus"]))
        };
        let all: Vec<String> = self.mount.read("info/reclaimed").lines().map(reclaimed).collect();
        // Before Linux 6.15 it is open whether the daemon or the first process of the machine sees first that an orphan died.
        if if_collected("reclaimed") == "reclaimed" {
            picture.insert("reclaimed".into(), all.join(", "));
        }
        picture
    }

    fn look(&self, path: &Path, picture: &mut BTreeMap<String, String>) {
        let whole = self.mount.conf().join(path);
        let metadata = fs::metadata(&whole).unwrap();
        let mut seen = format!("{:o} {} {}", metadata.mode(), metadata.uid(), metadata.ino());
        if metadata.is_dir() {
            let mut names: Vec<_> =
                fs::read_dir(&whole).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names.iter().for_each(|name| self.look(&path.join(name), picture));
        } else {
            let text = fs::read_to_string(&whole).unwrap();
            let mut pids: Vec<String> = text.trim().split(',').map(|pid| self.without_pids(pid)).collect();
            pids.sort();
            seen += &format!(" {}", pids.join(","));
        }
        picture.insert(path.display().to_string(), seen);
    }

    /// How often each kind of event was recorded.
    fn recorded(&self) -> BTreeMap<String, usize> {
        // The record of a refusal is appended, which writes all earlier records first.
        write(&self.mount.conf().join("info/version"), "x").unwrap_err();
        let mut counts = BTreeMap::new();
        let log = fs::read_to_string(self.mount.state().join("claims")).unwrap();
        for line in log.lines() {
            let record: serde_json::Value = serde_json::from_str(&line[9..]).unwrap();
            let Some(record) = record.get("r") else { continue };
            let alone = std::slice::from_ref(record);
            for record in record.get("batch").and_then(|batch| batch.as_array()).map_or(alone, Vec::as_slice)
            {
                let kind = record.as_object().and_then(|record| record.keys().next()).unwrap();
                if ["claimed", "releasing", "inherited", "ended", "acknowledged"].contains(&kind.as_str()) {
                    *counts.entry(kind.clone()).or_default() += 1;
                }
            }
        }
        counts
    }
}

/// An operation: its name, its preparation, and the operation itself.
struct Operation {
    name: &'static str,
    before: fn(&Scene),
    act: fn(&mut Scene) -> io::Result<()>,
}

fn nothing(_: &Scene) {}

fn mv_without_replacing(from: &Path, to: &Path) -> io::Result<()> {
    Ok(renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE)?)
}

/// Only these pools exist, also for the kernel, which has looked up the names of the others before.
fn check_names(scene: &Scene, pools: &[&str]) -> io::Result<()> {
    for pool in ["dataplane", "shared", "bare", "new"] {
        assert_eq!(fs::metadata(scene.mount.pool(pool)).is_ok(), pools.contains(&pool), "{pool}");
    }
    Ok(())
}

fn a_on_the_exclusive_list(scene: &Scene) {
    scene.write("dataplane", "0", "a").unwrap();
}

fn a_and_b_on_the_shared_list(scene: &Scene) {
    scene.write("shared", "1", "a,b").unwrap();
}

/// A child that starts after the claim, on request.
fn shell_on_the_exclusive_list(scene: &Scene) {
    scene.write("dataplane", "0", "s").unwrap();
}

fn two_deaths(scene: &Scene) {
    for _ in 0..2 {
        let task = Sleeper::new();
        write(&scene.mount.tasks("shared", "1"), task.pid().to_string()).unwrap();
        task.end();
        scene.mount.read("info/reclaimed");
    }
}

#[rustfmt::skip]
const OPERATIONS: &[Operation] = &[
    Operation { name: "a claim of a list", before: nothing, act: |scene| scene.write("dataplane", "0", "a") },
    Operation { name: "a claim of a pool", before: nothing, act: |scene| scene.write("dataplane", "", "a") },
    Operation { name: "a claim by number 0", before: nothing, act: |scene| {
        let line = "echo 0 > $C/pools/dataplane/tasks && read x < $C/self/claim && [ \"$x\" = 'dataplane 0' ]";
        let status = scene.mount.bash(line).status()?;
        if status.success() { Ok(()) } else { Err(io::Error::other(status.to_string())) }
    } },
    Operation { name: "a claim once more", before: a_on_the_exclusive_list,
        act: |scene| scene.write("dataplane", "0", "a") },
    Operation { name: "a move", before: a_on_the_exclusive_list, act: |scene| scene.write("shared", "1", "a") },
    Operation { name: "a release", before: a_on_the_exclusive_list, act: |scene| scene.write("dataplane", "0", "-a") },
    Operation { name: "a release in the pool", before: a_and_b_on_the_shared_list,
        act: |scene| scene.write("shared", "", "-b") },
    Operation { name: "several in one write", before: a_on_the_exclusive_list,
        act: |scene| scene.write("shared", "1", "a b c") },
    Operation { name: "one comes and one goes", before: a_on_the_exclusive_list,
        act: |scene| scene.write("dataplane", "0", "-a b") },
    Operation { name: "a refusal", before: a_on_the_exclusive_list, act: |scene| scene.write("dataplane", "0", "b") },
    Operation { name: "a refusal of a pool", before: a_on_the_exclusive_list,
        act: |scene| scene.write("dataplane", "", "b,c") },
    Operation { name: "a command that is too long, and its rest", before: nothing, act: |scene| {
        let file = OpenOptions::new().write(true).open(scene.mount.tasks("shared", "1"))?;
        let first = (&file).write(&[b' '; 70_000]);
        assert_eq!(errno(first), Errno::E2BIG);
        (&file).write_all(scene.with_pids("a").as_bytes())
    } },
    Operation { name: "mkdir of a pool", before: nothing, act: |scene| fs::create_dir(scene.mount.pool("new")) },
    Operation { name: "mkdir of a pool that exists", before: nothing,
        act: |scene| fs::create_dir(scene.mount.pool("bare")) },
    Operation { name: "mkdir of a list", before: |scene| fs::remove_dir(scene.mount.pool("dataplane").join("0")).unwrap(),
        act: |scene| fs::create_dir(scene.mount.pool("bare").join("0")) },
    Operation { name: "rmdir of a pool", before: nothing, act: |scene| fs::remove_dir(scene.mount.pool("bare")) },
    Operation { name: "rmdir of a list", before: nothing,
        act: |scene| fs::remove_dir(scene.mount.pool("shared").join("1")) },
    Operation { name: "rmdir of a list in use", before: a_on_the_exclusive_list,
        act: |scene| fs::remove_dir(scene.mount.pool("dataplane").join("0")) },
    Operation { name: "mv of a pool", before: a_on_the_exclusive_list,
        act: |scene| fs::rename(scene.mount.pool("dataplane"), scene.mount.pool("renamed")) },
    Operation { name: "mv of a pool to one that exists", before: nothing,
        act: |scene| mv_without_replacing(&scene.mount.pool("bare"), &scene.mount.pool("shared")) },
    Operation { name: "mv of a list to another pool", before: a_on_the_exclusive_list,
        act: |scene| fs::rename(scene.mount.pool("dataplane").join("0"), scene.mount.pool("bare").join("0")) },
    Operation { name: "mv of a list to other CPUs", before: |scene| {
        fs::remove_dir(scene.mount.pool("dataplane").join("0")).unwrap();
        a_and_b_on_the_shared_list(scene);
    }, act: |scene| fs::rename(scene.mount.pool("shared").join("1"), scene.mount.pool("shared").join("0-1")) },
    Operation { name: "mv of a list that is refused", before: a_and_b_on_the_shared_list,
        act: |scene| fs::rename(scene.mount.pool("shared").join("1"), scene.mount.pool("dataplane").join("1")) },
    Operation { name: "drain", before: a_on_the_exclusive_list,
        act: |scene| write(&scene.mount.pool("dataplane").join("0/state"), "drain") },
    Operation { name: "a whole configuration", before: a_on_the_exclusive_list, act: |scene| {
        write(&scene.mount.conf().join("info/config"), r#"{"pools":{"bare":{"exclusive":true,"lists":["0"]},"new":{"tasks":{"mode":"0600"}}}}"#)?;
        check_names(scene, &["bare", "new"])
    } },
    Operation { name: "a whole configuration by force", before: a_on_the_exclusive_list, act: |scene| {
        write(&scene.mount.conf().join("info/config"), r#"{"pools":{"shared":{"lists":["1"]}},"force":true}"#)?;
        check_names(scene, &["shared"])
    } },
    Operation { name: "a whole configuration that is refused", before: a_on_the_exclusive_list,
        act: |scene| write(&scene.mount.conf().join("info/config"), r#"{"pools":{}}"#) },
    Operation { name: "exclusive", before: nothing,
        act: |scene| write(&scene.mount.pool("shared").join("exclusive"), "1") },
    Operation { name: "exclusive refused", before: a_and_b_on_the_shared_list,
        act: |scene| write(&scene.mount.pool("shared").join("exclusive"), "1") },
    Operation { name: "chmod", before: nothing,
        act: |scene| fs::set_permissions(scene.mount.tasks("shared", "1"), Permissions::from_mode(0o664)) },
    Operation { name: "chown", before: nothing,
        act: |scene| std::os::unix::fs::chown(scene.mount.tasks("shared", "1"), Some(65534), None) },
    Operation { name: "an acknowledgement", before: two_deaths, act: |scene| {
        let first = scene.mount.read("info/reclaimed");
        let first: serde_json::Value = serde_json::from_str(first.lines().next().unwrap()).unwrap();
        write(&scene.mount.conf().join("info/reclaimed"), first["seq"].to_string())
    } },
    Operation { name: "a death without an heir", before: a_on_the_exclusive_list, act: |scene| {
        scene.tasks[0].child().kill()?;
        scene.tasks[0].child().wait()?;
        assert_eq!(fs::read_to_string(scene.mount.tasks("dataplane", "0"))?, "");
        Ok(())
    } },
    Operation { name: "a death with an heir", before: shell_on_the_exclusive_list, act: |scene| {
        let shell = scene.tasks[3].child();
        shell.stdin.as_mut().unwrap().write_all(b"go\n")?;
        let mut heir = String::new();
        io::BufRead::read_line(&mut io::BufReader::new(shell.stdout.as_mut().unwrap()), &mut heir)?;
        shell.kill()?;
        shell.wait()?;
        assert_eq!(fs::read_to_string(scene.mount.tasks("dataplane", "0"))?, heir);
        // Ended here, so that no process of the test is left; nothing inherits the claim.
        let result = scene.write("shared", "1", "a");
        signal(heir.trim().parse().unwrap(), Signal::SIGKILL);
        until("the heir has ended", || fs::read_to_string(scene.mount.tasks("dataplane", "0")).unwrap().is_empty());
        result
    } },
];

/// The result of an operation, the observed state after it, and the recorded events.
type Outcome = (Result<(), Option<i32>>, BTreeMap<String, String>, BTreeMap<String, usize>);

/// Runs the operation with this value of `KCM_FAULT`. Returns the steps that the log names, and whether the worker
/// was killed.
fn play(operation: &Operation, fault: &str) -> (Outcome, Vec<Step>, bool) {
    let mut scene = Scene::new();
    (operation.before)(&scene);
    scene.mount.stop();
    scene.mount.start_with("KCM_FAULT", fault);
    let worker = scene.mount.worker();
    let result = (operation.act)(&mut scene).map_err(|error| error.raw_os_error());
    let killed = scene.mount.worker() != worker;
    let log = scene.mount.log();
    let is_named = |step: &&Step| log.contains(&format!("step {}\n", step.name()));
    let steps = Step::ALL.iter().filter(is_named).copied().collect();
    ((result, scene.picture(), scene.recorded()), steps, killed)
}

#[test]
fn a_kill_at_any_step_is_invisible_to_the_client() {
    let next = Mutex::new(OPERATIONS.iter());
    let reached: Mutex<BTreeSet<&str>> = Mutex::default();
    let wrong: Mutex<Vec<String>> = Mutex::default();
    let work = || {
        loop {
            let Some(operation) = next.lock().unwrap().next() else { return };
            let (twin, steps, killed) = play(operation, "?");
            assert!(!killed);
            for step in &steps {
                let (outcome, _, killed) = play(operation, step.name());
                if !killed || outcome != twin {
                    let how = format!("{} killed at {} ({killed})", operation.name, step.name());
                    wrong.lock().unwrap().push(format!("{how}: {outcome:#?}\nwithout: {twin:#?}"));
                }
            }
            println!("{}: killed at {} steps", operation.name, steps.len());
            reached.lock().unwrap().extend(steps.iter().map(|step| step.name()));
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(work);
        }
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    // `daemon::faults` has those of partitions.
    let steps = Step::ALL.iter().filter(|step| !step.is_of_partitions());
    let all: BTreeSet<&str> = steps.map(|step| step.name()).collect();
    assert_eq!(reached.into_inner().unwrap(), all, "an operation here reaches every step of the program");
}

/// The first worker dies after it has carried out the write of the first client and before it answers. The second
/// worker serves a client that undoes the write before it gets the repeated request.
fn undone_before_the_repeat_is_answered(before: fn(&Scene), first: &str, then: &str, expected: &str) {
    let scene = Scene::new();
    before(&scene);
    scene.mount.stop();
    let mut start = scene.mount.mount_command();
    start.env("KCM_FAULT", "write-settled").env("KCM_SLOW_REPEATS", "3000");
    assert!(start.status().unwrap().success());
    let worker = scene.mount.worker();
    // Through two files: the kernel lets only one client at a time write to a file that grows.
    let files = [scene.mount.pool("shared").join("tasks"), scene.mount.tasks("shared", "1")];
    let files = files.map(|file| OpenOptions::new().write(true).open(file).unwrap());
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| (&files[0]).write_all(scene.with_pids(first).as_bytes()));
        until("the first worker is dead", || scene.mount.worker().is_some_and(|now| Some(now) != worker));
        (&files[1]).write_all(scene.with_pids(then).as_bytes()).expect("the second client");
        let between = fs::read_to_string(scene.mount.tasks("shared", "1")).unwrap();
        assert!(!writing.is_finished(), "the repeat is still blocked");
        assert_eq!(between.contains(&scene.pid('a').to_string()), expected.contains('a'));
        writing.join().unwrap().expect("the first client");
    });
    let picture = scene.picture();
    assert_eq!(picture["pools/shared/1/tasks"].rsplit_once(' ').unwrap().1, expected, "it is not done again");
    let mask = if expected.contains('a') { "[\"1\"]" } else { "[\"0-1\"]" };
    assert_eq!(picture["masks of a"], mask);
}

#[test]
fn a_claim_released_by_another_client_is_not_repeated() {
    undone_before_the_repeat_is_answered(nothing, "a", "-a", "");
}

#[test]
fn a_release_before_another_claim_is_not_repeated() {
    undone_before_the_repeat_is_answered(a_and_b_on_the_shared_list, "-a", "a", "a,b");
}

#[test]
fn an_undone_configuration_is_not_repeated() {
    let mount = Mount::with_shared();
    mount.stop();
    let mut start = mount.mount_command();
    start.env("KCM_FAULT", "config-stored").env("KCM_SLOW_REPEATS", "3000");
    assert!(start.status().unwrap().success());
    let worker = mount.worker();
    let open = || OpenOptions::new().write(true).open(mount.pool("shared").join("exclusive")).unwrap();
    let files = [open(), open()];
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| (&files[0]).write_all(b"1"));
        until("the first worker is dead", || mount.worker().is_some_and(|now| Some(now) != worker));
        assert_eq!(mount.read("pools/shared/exclusive"), "1\n");
        (&files[1]).write_all(b"0").expect("the second client");
        assert!(!writing.is_finished(), "the repeat is still blocked");
        writing.join().unwrap().expect("the first client");
    });
    assert_eq!(mount.read("pools/shared/exclusive"), "0\n");
}

#[test]
fn a_new_mount_knows_what_was_done() {
    for step in [Step::WriteDecided, Step::MasksSet, Step::WriteRecorded, Step::WriteSettled] {
        let scene = Scene::new();
        a_on_the_exclusive_list(&scene);
        scene.mount.stop();
        scene.mount.start_with("KCM_FAULT", &format!("{}!", step.name()));
        let result = scene.write("shared", "1", "a").map_err(|error| error.raw_os_error());
        let gone = [Errno::ECONNABORTED, Errno::ENOTCONN].map(|errno| Err(Some(errno as i32)));
        assert!(gone.contains(&result), "{result:?}");
        until("all have ended", || scene.mount.daemons().is_empty());
        scene.mount.start();
        let tasks = |pool, list| fs::read_to_string(scene.mount.tasks(pool, list)).unwrap();
        let on = if tasks("dataplane", "0").is_empty() { ("shared", "1") } else { ("dataplane", "0") };
        let recorded = matches!(step, Step::WriteRecorded | Step::WriteSettled);
        assert_eq!(on.0 == "shared", recorded, "killed at {}", step.name());
        assert_eq!(tasks(on.0, on.1), format!("{}\n", scene.pid('a')));
        assert_eq!(masks(scene.pid('a')), [on.1]);
        // Requests are remembered only for the mount that they came from.
        scene.write("dataplane", "0", "-a").unwrap();
        scene.write("shared", "1", "-a").unwrap();
        scene.write("dataplane", "0", "a").unwrap();
        assert_eq!(masks(scene.pid('a')), ["0"]);
    }
}
