//! The disk of the state directory stops answering: reads, listings and stat(2) are still served, claims wait or are
//! refused after a bounded time, and nothing is lost when the disk answers again.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use crate::harness::dir::{Dir as _, pinned};
use crate::harness::{Mount, Sleeper, TIMEOUT, held, masks, until, write};
use nix::sys::signal::Signal;
use tempfile::TempDir;

/// A mount whose state is on an ext4 file system of its own.
struct World {
    mount: Mount,
    disk: Disk,
}

struct Disk(TempDir);

/// A disk that does not answer until this is dropped.
struct Frozen<'a>(&'a Disk);

impl Disk {
    fn new() -> Self {
        let disk = Self(tempfile::tempdir().unwrap());
        let image = disk.0.path().join("image");
        File::create(&image).unwrap().set_len(32 << 20).unwrap();
        run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&image));
        std::fs::create_dir(disk.path()).unwrap();
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(disk.path()));
        disk
    }

    fn path(&self) -> std::path::PathBuf {
        self.0.path().join("disk")
    }

    fn freeze(&self) -> Frozen<'_> {
        run(Command::new("fsfreeze").arg("--freeze").arg(self.path()));
        Frozen(self)
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        run(Command::new("fsfreeze").arg("--unfreeze").arg(self.0.path()));
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

impl World {
    fn new() -> Self {
        let disk = Disk::new();
        let world = Self { mount: Mount::not_mounted_in(&disk.path()), disk };
        world.mount.start();
        world.mount.make_pool("excl", true, &["0"]);
        world.mount.make_pool("shared", false, &["1"]);
        world
    }

    /// Starts a line for bash, whose client may have to wait for the disk.
    fn start(&self, line: &str) -> Client {
        let mut command = self.mount.bash(line);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Client { line: line.to_owned(), child: command.spawn().unwrap() }
    }

    /// Runs a line for bash, which must answer although the disk does not. Returns what it prints.
    fn ask(&self, line: &str) -> String {
        self.start(line).finish()
    }
}

struct Client {
    line: String,
    child: Child,
}

impl Client {
    fn is_waiting(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits for the end and returns the output.
    fn finish(mut self) -> String {
        let deadline = Instant::now() + TIMEOUT;
        while self.is_waiting() {
            assert!(Instant::now() < deadline, "no answer: {}", self.line);
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let output = self.child.wait_with_output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    }
}

/// Every way to look at the mount.
fn look(world: &World) {
    for line in [
        "cat $C/pools/excl/0/tasks $C/pools/excl/tasks $C/pools/excl/exclusive",
        "stat $C/pools/excl/0/tasks $C/info/events",
        "ls -lR $C",
        "cat $C/info/events $C/info/reclaimed $C/info/metrics $C/info/topology",
        "cat $C/self/claim $C/self/cpus $C/self/last_error",
        "$KCM describe --conf-dir=$C",
    ] {
        world.ask(line);
    }
}

const STALLED: &str =
    "EIO: the disk of the state directory does not answer; look at it and at dmesg, then try again";

fn refused_claim(world: &World, task: &Sleeper, file: &str) {
    let line = format!("echo {} > $C/{file}; cat $C/self/last_error", task.pid());
    let said = world.ask(&line);
    assert!(said.contains("Input/output error"), "{said}");
    assert!(said.contains(&format!(" {}: {STALLED}", task.pid())), "{said}");
}

#[test]
fn reads_answer_after_a_death_while_the_disk_is_frozen() {
    let world = World::new();
    let (holder, task, late) = (pinned("0-1"), pinned("1"), pinned("0-1"));
    let list = world.mount.tasks("excl", "0");
    write(&list, holder.pid().to_string()).unwrap();
    let frozen = world.disk.freeze();
    let dead = holder.pid();
    holder.end();
    assert_eq!(world.ask("cat $C/pools/excl/0/tasks"), "");
    look(&world);
    assert!(world.ask("cat $C/info/reclaimed").contains(&format!("\"pid\":{dead},")));
    // Only threads of the journal wait for the disk; claims wait for them, and not for long.
    for _ in 0..8 {
        refused_claim(&world, &task, "pools/excl/0/tasks");
        refused_claim(&world, &task, "pools/shared/tasks");
    }
    assert_eq!(masks(task.pid()), ["1"], "no half of a claim");
    look(&world);
    drop(frozen);

    until("the disk is written again", || write(&list, task.pid().to_string()).is_ok());
    write(&world.mount.tasks("shared", "1"), late.pid().to_string()).unwrap();
    check(&world, &task, &late, dead);
}

#[test]
fn claims_and_changes_wait_or_are_refused_while_the_disk_is_frozen() {
    let world = World::new();
    let (task, late) = (pinned("1"), pinned("0-1"));
    let dead = crate::harness::killed_on(&world.mount.tasks("excl", "0"));
    assert_eq!(world.mount.tasks_of("excl", "0"), "");
    let frozen = world.disk.freeze();
    let mut claim = world.start(&format!("echo {} > $C/pools/excl/0/tasks && echo done", task.pid()));
    // Let it come first.
    std::thread::sleep(std::time::Duration::from_millis(300));
    let mut change = world.start("echo 1 > $C/pools/shared/exclusive && echo done");
    look(&world);
    refused_claim(&world, &late, "pools/shared/1/tasks");
    let said = world.ask("mkdir $C/pools/other; cat $C/self/last_error");
    assert!(said.contains("Input/output error") && said.contains(STALLED), "{said}");
    for _ in 0..4 {
        // Of another file than the claim's: the kernel locks a file that is written to.
        world.ask("mkdir $C/pools/other; chmod 600 $C/pools/shared/1/tasks");
    }
    look(&world);
    assert!(change.is_waiting(), "a change is stored before it is answered");
    let was_waiting = claim.is_waiting();
    drop(frozen);

    let said = claim.finish();
    assert!(said == "done\n" || !was_waiting && said.contains("Input/output error"), "{said}");
    assert_eq!(change.finish(), "done\n");
    assert_eq!(world.mount.read("pools/shared/exclusive"), "1\n");
    write(&world.mount.tasks("excl", "0"), task.pid().to_string()).unwrap();
    write(&world.mount.tasks("shared", "1"), late.pid().to_string()).unwrap();
    check(&world, &task, &late, dead);
}

#[test]
fn no_request_waits_for_the_daemon_log() {
    let disk = Disk::new();
    let world = World { mount: Mount::not_mounted_in(&disk.path()), disk };
    world.mount.start_with("KCM_LOG_LEVEL", "DEBUG");
    world.mount.make_pool("excl", true, &["0"]);
    let frozen = world.disk.freeze();
    look(&world);
    // More messages than are kept. Without a process for each, which takes long on a slow machine.
    world.ask("for i in {1..100}; do for f in $C/pools/excl/*/tasks $C/pools/excl/*; do read -r x <$f; done; done 2>/dev/null");
    drop(frozen);
    until("the messages are written", || {
        world.mount.read("info/version");
        world.mount.log().contains("messages were dropped")
    });
}

#[test]
fn a_change_that_waits_for_the_disk_lets_nobody_in_even_if_the_worker_dies() {
    let world = World::new();
    let (holder, waiting, other) = (pinned("0-1"), pinned("0-1"), pinned("0-1"));
    let list = world.mount.tasks("excl", "0");
    write(&list, holder.pid().to_string()).unwrap();
    let frozen = world.disk.freeze();
    // One claim waits for the disk; then no other request does.
    let claim = world.start(&format!("echo {} > $C/pools/shared/1/tasks && echo done", waiting.pid()));
    let change = world.start("echo 0 > $C/pools/excl/exclusive && echo done");
    // Let them come first.
    std::thread::sleep(std::time::Duration::from_millis(300));
    let line = format!("echo {} > $C/pools/excl/0/tasks; cat $C/self/last_error", other.pid());
    let said = world.ask(&line);
    assert!(said.contains(&format!("EBUSY: excl 0 is held by {} (sleep)", holder.pid())), "{said}");
    assert_eq!(world.ask("cat $C/pools/excl/exclusive"), "1\n");
    world.mount.signal_worker(Signal::SIGKILL);
    drop(frozen);

    // The next worker carries both out.
    assert_eq!((claim.finish(), change.finish()), ("done\n".to_owned(), "done\n".to_owned()));
    assert_eq!(world.mount.read("pools/excl/exclusive"), "0\n");
    assert_eq!(held(&list), [holder.pid()], "an acknowledged claim stays");
    assert_eq!((masks(holder.pid()), masks(other.pid())), (vec!["0".to_owned()], vec!["0-1".to_owned()]));
    write(&list, other.pid().to_string()).expect("two are allowed now");
}

/// `task` has the list 0 and `late` the list 1, also for the next worker and the next daemon.
fn check(world: &World, task: &Sleeper, late: &Sleeper, dead: u32) {
    let mount = &world.mount;
    let holds = |path: &Path, pid: u32| held(path) == [pid];
    for restart in [None, Some(false), Some(true)] {
        match restart {
            None => {}
            Some(false) => mount.replace_worker(),
            Some(true) => {
                mount.kill_daemon();
                mount.start();
            }
        }
        assert!(holds(&mount.tasks("excl", "0"), task.pid()), "{restart:?}");
        assert!(holds(&mount.tasks("shared", "1"), late.pid()), "{restart:?}");
        assert_eq!((masks(task.pid()), masks(late.pid())), (vec!["0".to_owned()], vec!["1".to_owned()]));
        let reclaimed = mount.read("info/reclaimed");
        assert_eq!(reclaimed.matches(&format!("\"pid\":{dead},")).count(), 1, "{restart:?}: {reclaimed}");
    }
    for file in [mount.tasks("excl", "0"), mount.tasks("shared", "1")] {
        let pid = held(&file)[0];
        write(&file, format!("-{pid}")).unwrap();
    }
    assert_eq!((masks(task.pid()), masks(late.pid())), (vec!["1".to_owned()], vec!["0-1".to_owned()]));
}
