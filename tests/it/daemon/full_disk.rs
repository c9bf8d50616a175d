//! The disk of the state directory is full: an operation that needs a record is refused with ENOSPC and changes
//! nothing; release and reap still work. With free space again, everything is as before.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::harness::dir::{Dir as _, pinned};
use crate::harness::{Mount, Sleeper, errno, has_died, masks, until, write};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// A mount whose state is on a disk of 256 KB. The disk is unmounted after the mount.
struct World {
    mount: Mount,
    disk: Disk,
}

struct Disk(TempDir);

impl Disk {
    fn new() -> Self {
        let disk = Self(tempfile::tempdir().unwrap());
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=256k", "tmpfs"]).arg(disk.path());
        assert!(mount.status().unwrap().success());
        disk
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Fills every free block.
    fn fill(&self) {
        let mut file = File::create(self.path().join("filler")).unwrap();
        while file.write_all(&[0; 1024]).is_ok() {}
    }

    fn make_room(&self) {
        fs::remove_file(self.path().join("filler")).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

impl World {
    fn new() -> Self {
        let disk = Disk::new();
        let world = Self { mount: Mount::not_mounted_in(disk.path()), disk };
        world.mount.start();
        world.mount.make_pool("excl", true, &["0"]);
        world.mount.make_pool("shared", false, &["1"]);
        world
    }

    fn claim(&self, task: &Sleeper, pool: &str, list: &str) -> std::io::Result<()> {
        write(&self.mount.tasks(pool, list), task.pid().to_string())
    }

    fn release(&self, task: &Sleeper, pool: &str, list: &str) {
        write(&self.mount.tasks(pool, list), format!("-{}", task.pid())).expect("a release never fails");
    }

    /// Fills the disk, then the last block of the claims log by claims and releases.
    fn fill(&self) {
        self.disk.fill();
        let task = pinned("0-1");
        for _ in 0..1000 {
            if let Err(error) = self.claim(&task, "shared", "1") {
                assert_eq!(error.raw_os_error(), Some(Errno::ENOSPC as i32));
                assert_eq!(masks(task.pid()), ["0-1"], "no half of a claim");
                return;
            }
            self.release(&task, "shared", "1");
        }
        panic!("the disk does not become full");
    }
}

#[test]
fn a_claim_that_cannot_be_recorded_is_refused() {
    let world = World::new();
    let mount = &world.mount;
    let (holder, task) = (pinned("0-1"), pinned("1"));
    world.claim(&holder, "excl", "0").unwrap();
    world.fill();
    assert_eq!(errno(world.claim(&task, "shared", "1")), Errno::ENOSPC);
    assert_eq!(errno(write(&mount.pool("shared").join("tasks"), task.pid().to_string())), Errno::ENOSPC);
    assert_eq!(errno(world.claim(&holder, "shared", "1")), Errno::ENOSPC, "nor a move");
    assert_eq!(masks(task.pid()), ["1"]);
    assert_eq!(masks(holder.pid()), ["0"]);
    assert_eq!(mount.tasks_of("shared", "1"), "");
    assert_eq!(mount.tasks_of("excl", "0"), holder.pid().to_string());
    // `last_error` explains it, too.
    let reason = mount.sh("echo $$ > $C/pools/shared/1/tasks 2> /dev/null; cat $C/self/last_error");
    assert!(reason.contains("ENOSPC: the claims log cannot be written; make room"), "{reason}");
    // A change within existing blocks needs no space.
    world.claim(&holder, "excl", "0").expect("a repeated claim");

    world.disk.make_room();
    world.claim(&task, "shared", "1").expect("there is space again");
    world.claim(&holder, "shared", "1").expect("there is space for a move, too");
    mount.kill_daemon();
    mount.start();
    let mut both = [task.pid(), holder.pid()];
    both.sort_unstable();
    assert_eq!(mount.tasks_of("shared", "1"), format!("{},{}", both[0], both[1]));
    assert_eq!(mount.tasks_of("excl", "0"), "");
    world.release(&task, "shared", "1");
    world.release(&holder, "shared", "1");
    assert_eq!((masks(task.pid()), masks(holder.pid())), (vec!["1".to_owned()], vec!["0-1".to_owned()]));
}

#[test]
fn releases_and_reaps_work_on_a_full_disk() {
    let world = World::new();
    let mount = &world.mount;
    let (leaving, dying, staying) = (pinned("0-1"), pinned("0-1"), pinned("0-1"));
    world.claim(&dying, "excl", "0").unwrap();
    world.claim(&leaving, "shared", "1").unwrap();
    world.claim(&staying, "shared", "1").unwrap();
    world.fill();
    let dead = dying.pid();
    dying.end();
    assert_eq!(mount.tasks_of("excl", "0"), "");
    assert!(mount.read("info/reclaimed").contains(&format!("\"pid\":{dead},")));
    world.release(&leaving, "shared", "1");
    assert_eq!(masks(leaving.pid()), ["0-1"]);
    assert_eq!(mount.tasks_of("shared", "1"), staying.pid().to_string());

    world.disk.make_room();
    let next = Sleeper::new();
    world.claim(&next, "excl", "0").expect("there is space again");
    mount.kill_daemon();
    mount.start();
    assert_eq!(mount.tasks_of("excl", "0"), next.pid().to_string());
    assert_eq!(mount.tasks_of("shared", "1"), staying.pid().to_string(), "a released task stays released");
    assert_eq!(masks(leaving.pid()), ["0-1"]);
}

#[test]
fn a_full_disk_does_not_prevent_a_restart() {
    let world = World::new();
    let mount = &world.mount;
    let (one, other) = (pinned("0-1"), pinned("1"));
    world.claim(&one, "excl", "0").unwrap();
    world.claim(&other, "shared", "1").unwrap();
    world.fill();
    for stop in [Mount::kill_daemon, Mount::stop] {
        stop(mount);
        mount.start();
        assert_eq!(mount.tasks_of("excl", "0"), one.pid().to_string());
        assert_eq!(mount.tasks_of("shared", "1"), other.pid().to_string());
        assert_eq!(errno(world.claim(&one, "shared", "1")), Errno::ENOSPC);
    }
    world.release(&other, "shared", "1");
    assert_eq!(masks(other.pid()), ["1"]);
}

#[test]
fn a_configuration_that_cannot_be_stored_is_refused() {
    let world = World::new();
    let mount = &world.mount;
    fs::create_dir(mount.pool("old")).unwrap();
    let before = fs::metadata(mount.pool("old")).unwrap().ino();
    world.disk.fill();
    let tree = || mount.walk().into_iter().map(|(path, stat)| (path, stat.mode())).collect::<Vec<_>>();
    let was = tree();
    assert_eq!(errno(fs::create_dir(mount.pool("new"))), Errno::ENOSPC);
    assert_eq!(errno(fs::create_dir(mount.pool("old").join("0"))), Errno::EBUSY, "a task of another list");
    assert_eq!(errno(fs::remove_dir(mount.pool("excl").join("0"))), Errno::ENOSPC);
    assert_eq!(errno(fs::remove_dir(mount.pool("old"))), Errno::ENOSPC);
    assert_eq!(errno(write(&mount.pool("old").join("exclusive"), "1")), Errno::ENOSPC);
    let read_only = fs::Permissions::from_mode(0o444);
    assert_eq!(errno(fs::set_permissions(mount.tasks("excl", "0"), read_only)), Errno::ENOSPC);
    assert_eq!(tree(), was);
    assert_eq!(mount.read("pools/old/exclusive"), "0\n");
    let reason = mount.sh("mkdir $C/pools/new 2> /dev/null; cat $C/self/last_error");
    assert!(reason.contains("ENOSPC: the configuration cannot be stored"), "{reason}");
    assert!(reason.contains("look at the state directory and its disk"), "{reason}");
    // The list that could not be removed takes tasks as before.
    world.disk.make_room();
    world.claim(&Sleeper::new(), "excl", "0").unwrap();
    fs::create_dir(mount.pool("new")).expect("there is space again");
    assert!(fs::metadata(mount.pool("new")).unwrap().ino() > before);
    mount.kill_daemon();
    mount.start();
    assert_eq!(tree().len(), was.len() + 7, "a pool has seven nodes");
}

#[test]
fn a_change_that_is_not_stored_lets_nobody_in_even_if_workers_are_killed() {
    let world = World::new();
    let mount = &world.mount;
    let (holder, other) = (pinned("0-1"), pinned("0-1"));
    world.claim(&holder, "excl", "0").unwrap();
    let (stop, flag) = (AtomicBool::new(false), mount.pool("excl").join("exclusive"));
    let tries = AtomicUsize::new(0);
    // A read that a death cuts in two is ESTALE; the next one sees the file as it is.
    let content = |path: &Path| (0..10).find_map(|_| fs::read_to_string(path).ok()).unwrap();
    let (errors, changes) = std::thread::scope(|scope| {
        // Tries to get in at every moment.
        let intruder = scope.spawn(|| {
            let mut errors = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let error = world.claim(&other, "excl", "0").err().and_then(|error| error.raw_os_error());
                tries.fetch_add(1, Ordering::Relaxed);
                if !errors.contains(&error) {
                    errors.push(error);
                }
            }
            errors
        });
        let mut changes = Vec::new();
        for round in 0..20 {
            world.disk.fill();
            let victim = mount.worker().filter(|_| round % 2 == 1);
            if let Some(victim) = victim {
                scope.spawn(move || kill(Pid::from_raw(victim as i32), Signal::SIGKILL));
            }
            let change = write(&flag, "0").err().and_then(|error| error.raw_os_error());
            changes.push((change, content(&flag), content(&mount.tasks("excl", "0"))));
            if let Some(victim) = victim {
                // A request that is in flight at two deaths is given up with EIO. The second try from here on began
                // after this death.
                until("the worker has died", || has_died(victim));
                let seen = tries.load(Ordering::Relaxed);
                until("the request that was in flight is answered", || {
                    tries.load(Ordering::Relaxed) > seen + 1
                });
            }
            world.disk.make_room();
        }
        stop.store(true, Ordering::Relaxed);
        (intruder.join().unwrap(), changes)
    });
    assert_eq!(errors, [Some(Errno::EBUSY as i32)]);
    for (errno, exclusive, tasks) in &changes {
        assert_eq!(*errno, Some(Errno::ENOSPC as i32), "{changes:?}");
        assert_eq!((exclusive.trim(), tasks.trim()), ("1", holder.pid().to_string().as_str()), "{changes:?}");
    }
    let given_up = mount.event_lines().into_iter().filter(|line| line["event"] == "given-up").count();
    assert_eq!(given_up, 0, "every request was carried out");
    mount.kill_daemon();
    mount.start();
    assert_eq!(mount.tasks_of("excl", "0"), holder.pid().to_string(), "an acknowledged claim stays");
    assert_eq!((masks(holder.pid()), masks(other.pid())), (vec!["0".to_owned()], vec!["0-1".to_owned()]));
}
