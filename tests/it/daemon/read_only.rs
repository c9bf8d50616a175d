//! The state directory becomes read-only: the next worker, and the next daemon, serve what they can read. Claims are
//! refused as on a full disk, releases and reaps still work. When it can be written again, everything is as before.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::harness::dir::{Dir as _, pinned};
use crate::harness::{KCM, Mount, Sleeper, errno, masks, run, write};
use nix::errno::Errno;
use tempfile::TempDir;

/// A directory that cannot be written to, through a mount over it, until this is dropped. Files that were opened before
/// can be written to.
struct ReadOnly(PathBuf);

impl ReadOnly {
    fn new(directory: &Path) -> Self {
        let covered = Self(directory.to_path_buf());
        succeed(Command::new("mount").arg("--bind").args([directory, directory]));
        succeed(Command::new("mount").args(["-o", "remount,bind,ro"]).arg(directory));
        covered
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn succeed(command: &mut Command) {
    let (_, err, status) = run(command);
    assert_eq!(status, Some(0), "{command:?}: {err}");
}

/// A mount with three tasks: one on the exclusive list 0, two on the shared list 1.
struct World {
    mount: Mount,
    holder: Sleeper,
    leaving: Sleeper,
    dying: Option<Sleeper>,
    newcomer: Sleeper,
    /// What the disk says to a write.
    refusal: Errno,
}

impl World {
    fn new(directory: &Path) -> Self {
        let mount = Mount::not_mounted_in(directory);
        mount.start();
        mount.make_pool("excl", true, &["0"]);
        mount.make_pool("shared", false, &["1"]);
        let [holder, leaving, dying, newcomer] = [(); 4].map(|()| pinned("0-1"));
        write(&mount.tasks("excl", "0"), holder.pid().to_string()).unwrap();
        for task in [&leaving, &dying] {
            write(&mount.tasks("shared", "1"), task.pid().to_string()).unwrap();
        }
        Self { mount, holder, leaving, dying: Some(dying), newcomer, refusal: Errno::EROFS }
    }

    fn claim(&self) -> std::io::Result<()> {
        write(&self.mount.tasks("shared", "1"), self.newcomer.pid().to_string())
    }

    /// Nothing can be recorded: what is there is served, what would have to be recorded is refused.
    fn check_read_only(&self) {
        let Self { mount, holder, newcomer, refusal, .. } = self;
        assert_eq!(mount.tasks_of("excl", "0"), holder.pid().to_string());
        assert_eq!(mount.read("pools/excl/exclusive"), "1\n");
        assert_eq!(errno(self.claim()), Errno::ENOSPC);
        assert_eq!(masks(newcomer.pid()), ["0-1"], "no half of a claim");
        let reason = mount.sh("echo $$ > $C/pools/shared/1/tasks 2> /dev/null; cat $C/self/last_error");
        let expected = format!(
            "ENOSPC: the claims log cannot be written ({refusal:?}: {}); look at the state directory and its disk",
            refusal.desc()
        );
        assert!(reason.contains(&expected), "{reason}");
        assert_eq!(errno(fs::create_dir(mount.pool("new"))), *refusal);
        assert_eq!(errno(write(&mount.pool("excl").join("exclusive"), "0")), *refusal);
        assert_eq!(errno(write(&mount.tasks("excl", "0"), newcomer.pid().to_string())), Errno::EBUSY);
    }

    /// Releases one task, and lets the other one die.
    fn release_and_reap(&mut self) {
        let Self { mount, leaving, dying, .. } = self;
        write(&mount.tasks("shared", "1"), format!("-{}", leaving.pid())).expect("a release never fails");
        assert_eq!(masks(leaving.pid()), ["0-1"]);
        let dying = dying.take().unwrap();
        let dead = dying.pid();
        dying.end();
        assert_eq!(mount.tasks_of("shared", "1"), "");
        assert!(mount.read("info/reclaimed").contains(&format!("\"pid\":{dead},")));
    }

    /// Everything is recorded again, and the next daemon finds it.
    fn check_writable(&self) {
        let Self { mount, holder, newcomer, leaving, .. } = self;
        self.claim().expect("it can be written again");
        fs::create_dir(mount.pool("new")).expect("so can the configuration");
        mount.kill_daemon();
        mount.start();
        assert_eq!(mount.tasks_of("excl", "0"), holder.pid().to_string());
        assert_eq!(
            mount.tasks_of("shared", "1"),
            newcomer.pid().to_string(),
            "a released task stays released"
        );
        assert_eq!(masks(leaving.pid()), ["0-1"]);
        assert!(mount.pool("new").exists());
    }
}

#[test]
fn the_next_worker_serves_from_a_read_only_directory() {
    let mut world = World::new(&std::env::temp_dir());
    let read_only = ReadOnly::new(&world.mount.state());
    world.mount.replace_worker();
    world.check_read_only();
    world.release_and_reap();
    // Another one, which finds what the one before it could not record.
    world.mount.replace_worker();
    world.check_read_only();
    assert_eq!(world.mount.tasks_of("shared", "1"), "", "a released task stays released");
    drop(read_only);
    world.check_writable();
}

#[test]
fn the_next_daemon_serves_from_a_read_only_directory() {
    let mut world = World::new(&std::env::temp_dir());
    world.mount.kill_daemon();
    let read_only = ReadOnly::new(&world.mount.state());
    let (_, err, status) = run(&mut world.mount.mount_command());
    assert_eq!(status, Some(0), "{err}");
    assert!(err.contains("Read-only file system"), "the user is told: {err}");
    world.check_read_only();
    world.release_and_reap();
    world.mount.replace_worker();
    world.check_read_only();
    assert_eq!(world.mount.tasks_of("shared", "1"), "", "a released task stays released");
    // Nobody else may use the directory meanwhile.
    let other = world.mount.home().join("other");
    let mut second = Command::new(KCM);
    second.args(["mount", "--state-dir"]).arg(world.mount.state()).arg("--conf-dir").arg(&other);
    let (_, err, status) = run(&mut second);
    assert!(status != Some(0) && err.contains("in use by another kcm mount"), "{err}");
    drop(read_only);
    world.check_writable();
}

#[test]
fn damage_does_not_keep_the_next_worker_from_a_read_only_directory() {
    for name in ["config", "claims"] {
        let world = World::new(&std::env::temp_dir());
        let path = world.mount.state().join(name);
        let mut bytes = fs::read(&path).unwrap();
        bytes.extend(b"damaged\n");
        fs::write(&path, &bytes).unwrap();
        let read_only = ReadOnly::new(&world.mount.state());
        world.mount.replace_worker();
        world.check_read_only();
        drop(read_only);
        assert_eq!(fs::read(&path).unwrap(), bytes, "{name}");
        world.claim().expect("it can be written again");
    }
}

#[test]
fn a_read_only_directory_without_a_state_is_refused() {
    let mount = Mount::not_mounted();
    fs::create_dir(mount.state()).unwrap();
    let _read_only = ReadOnly::new(&mount.state());
    let line = mount.mount_failure();
    let state = mount.state();
    assert!(line.starts_with(&format!("{}/lock: cannot be opened: Read-only", state.display())), "{line}");
    assert!(line.ends_with("look at its owner, mode and disk"), "{line}");
    assert_eq!(mount.mounted(), 0);
}

/// An ext4 file system with `errors=remount-ro`; its disk has no errors until [`Self::fail`].
struct Ext4(TempDir);

impl Ext4 {
    fn new() -> Self {
        let disk = Self(tempfile::tempdir().unwrap());
        let image = disk.0.path().join("image");
        File::create(&image).unwrap().set_len(16 << 20).unwrap();
        succeed(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&image));
        fs::create_dir(disk.path()).unwrap();
        let mut mount = Command::new("mount");
        succeed(mount.args(["-o", "loop,errors=remount-ro"]).arg(&image).arg(disk.path()));
        disk
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("disk")
    }

    /// Makes the kernel find an error. Returns what it says to a write afterwards: EROFS, or EIO from Linux 6.6 to 6.14, which
    /// then refuse reads, too.
    fn fail(&self) -> Errno {
        use std::os::unix::fs::MetadataExt as _;
        let device = fs::metadata(self.path()).unwrap().dev();
        let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
        let block = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).unwrap();
        let name = block.file_name().unwrap().to_str().unwrap();
        fs::write(format!("/sys/fs/ext4/{name}/trigger_fs_error"), "1").unwrap();
        let refusal = errno(fs::write(self.path().join("file"), ""));
        assert!([Errno::EROFS, Errno::EIO].contains(&refusal), "{refusal}");
        refusal
    }
}

impl Drop for Ext4 {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

#[test]
fn a_disk_with_errors_takes_no_claims_but_serves() {
    let disk = Ext4::new();
    let mut world = World::new(&disk.path());
    world.refusal = disk.fail();
    world.check_read_only();
    if world.refusal == Errno::EIO {
        // Another worker could read nothing.
        return;
    }
    for restart in [Mount::replace_worker, |mount: &Mount| {
        mount.kill_daemon();
        mount.start();
    }] {
        restart(&world.mount);
        world.check_read_only();
    }
    world.release_and_reap();
    world.check_read_only();
    drop(world);
}
