//! Operations that a control filesystem does not support are refused as cgroupfs refuses them: each call is made on
//! both.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};

use crate::harness::{Cgroup, Mount, NOBODY, Sleeper, as_nobody, errno, write};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, FallocateFlags, RenameFlags, fallocate, renameat2};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, mknod, utimensat};
use nix::sys::termios::tcgetattr;
use nix::sys::time::TimeSpec;
use nix::unistd::{AccessFlags, access, truncate, unlink};
use rustix::fs::{IFlags, XattrFlags, getxattr, ioctl_ficlone, ioctl_getflags, ioctl_setflags, setxattr};

/// The paths for the calls: a directory, a file in it that takes commands, a file that takes none, and a directory in
/// it.
struct Place {
    dir: PathBuf,
    control: PathBuf,
    other: PathBuf,
    sub: PathBuf,
}

/// A cgroup with one below it.
fn with_sub() -> Cgroup {
    let cgroup = Cgroup::of_v2();
    fs::create_dir(cgroup.path.join("sub")).unwrap();
    cgroup
}

fn place_in(cgroup: &Cgroup) -> Place {
    Place {
        dir: cgroup.path.clone(),
        control: cgroup.path.join("cgroup.procs"),
        other: cgroup.read_only_file(),
        sub: cgroup.path.join("sub"),
    }
}

fn place(mount: &Mount) -> Place {
    Place {
        dir: mount.pool("dataplane"),
        control: mount.pool("dataplane").join("tasks"),
        other: mount.conf().join("info/version"),
        sub: mount.pool("dataplane").join("0"),
    }
}

fn read_write(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).open(path)
}

/// open(2) for writing with these flags.
fn open_with(path: &Path, flags: i32) -> io::Result<()> {
    File::options().write(true).custom_flags(flags).open(path).map(|_| ())
}

fn rename_with(from: &Path, to: &Path, flags: RenameFlags) -> io::Result<()> {
    Ok(renameat2(AT_FDCWD, from, AT_FDCWD, to, flags)?)
}

fn make_node(path: &Path, kind: SFlag) -> io::Result<()> {
    Ok(mknod(path, kind, Mode::from_bits_truncate(0o644), 0)?)
}

fn set_times(path: &Path, time: TimeSpec) -> io::Result<()> {
    Ok(utimensat(AT_FDCWD, path, &time, &time, UtimensatFlags::FollowSymlink)?)
}

fn ask_terminal(file: io::Result<File>) -> io::Result<()> {
    Ok(tcgetattr(file?).map(|_| ())?)
}

#[allow(unsafe_code, reason = "no safe wrapper")]
fn map_shared(file: &File, protection: i32) -> io::Result<()> {
    // SAFETY: a new mapping; nothing accesses it or unmaps it.
    let mapped =
        unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, libc::MAP_SHARED, file.as_raw_fd(), 0) };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

type Call = fn(&Place) -> io::Result<()>;

#[rustfmt::skip]
const CALLS: &[(&str, Call)] = &[
    ("open a new file for writing", |p| open_with(&p.dir.join("new"), libc::O_CREAT)),
    ("create a file that exists", |p| open_with(&p.control, libc::O_CREAT | libc::O_EXCL)),
    ("O_CREAT on a file that exists", |p| open_with(&p.control, libc::O_CREAT)),
    ("O_CREAT and O_TRUNC on a file that exists", |p| open_with(&p.control, libc::O_CREAT | libc::O_TRUNC)),
    ("O_CREAT on a directory", |p| open_with(&p.sub, libc::O_CREAT)),
    ("O_TRUNC on a file that takes no commands", |p| open_with(&p.other, libc::O_TRUNC)),
    ("O_TMPFILE", |p| open_with(&p.dir, libc::O_TMPFILE)),
    ("open a directory for writing", |p| open_with(&p.sub, 0)),
    ("open a file as a directory", |p| open_with(&p.control, libc::O_DIRECTORY)),
    ("write to a file that takes no commands", |p| write(&p.other, "1")),
    ("unlink", |p| fs::remove_file(&p.control)),
    ("unlink a file that takes no commands", |p| fs::remove_file(&p.other)),
    ("unlink a directory", |p| Ok(unlink(&p.sub)?)),
    ("unlink nothing", |p| fs::remove_file(p.dir.join("none"))),
    ("rmdir of a file", |p| fs::remove_dir(&p.control)),
    ("rename a file", |p| fs::rename(&p.control, p.dir.join("new"))),
    ("rename a file to itself", |p| fs::rename(&p.control, &p.control)),
    ("rename a file over another", |p| fs::rename(&p.control, &p.other)),
    ("rename a file into a directory", |p| fs::rename(&p.control, p.sub.join("new"))),
    ("rename nothing", |p| fs::rename(p.dir.join("none"), p.dir.join("new"))),
    ("rename out of here", |p| fs::rename(&p.control, "/tmp/kcm-refused")),
    ("rename into here", |p| fs::rename("/proc/self/cmdline", p.dir.join("new"))),
    ("exchange", |p| rename_with(&p.control, &p.other, RenameFlags::RENAME_EXCHANGE)),
    ("rename leaving a whiteout", |p| {
        rename_with(&p.control, &p.dir.join("new"), RenameFlags::RENAME_WHITEOUT)
    }),
    ("link", |p| fs::hard_link(&p.control, p.dir.join("new"))),
    ("link to a name that exists", |p| fs::hard_link(&p.control, &p.other)),
    ("link a directory", |p| fs::hard_link(&p.sub, p.dir.join("new"))),
    ("symlink", |p| symlink("tasks", p.dir.join("new"))),
    ("symlink to a name that exists", |p| symlink("tasks", &p.control)),
    ("readlink", |p| fs::read_link(&p.control).map(|_| ())),
    ("mknod of a file", |p| make_node(&p.dir.join("new"), SFlag::S_IFREG)),
    ("mknod of a FIFO", |p| make_node(&p.dir.join("new"), SFlag::S_IFIFO)),
    ("mknod of a device", |p| make_node(&p.dir.join("new"), SFlag::S_IFCHR)),
    ("mknod of a socket", |p| make_node(&p.dir.join("new"), SFlag::S_IFSOCK)),
    ("mknod of a name that exists", |p| make_node(&p.control, SFlag::S_IFREG)),
    ("mkdir of a name that exists", |p| fs::create_dir(&p.control)),
    ("truncate", |p| Ok(truncate(&p.control, 0)?)),
    ("extend", |p| Ok(truncate(&p.control, 100)?)),
    ("truncate to less than nothing", |p| Ok(truncate(&p.control, -1)?)),
    ("truncate a directory", |p| Ok(truncate(&p.sub, 0)?)),
    ("ftruncate", |p| read_write(&p.control)?.set_len(0)),
    ("set a nameless xattr", |p| Ok(setxattr(&p.control, "other", b"1", XattrFlags::empty())?)),
    ("set an xattr of the system", |p| Ok(setxattr(&p.control, "system.kcm", b"1", XattrFlags::empty())?)),
    ("get an xattr of the system", |p| {
        Ok(getxattr(&p.control, "system.kcm", &mut [0_u8; 9]).map(|_| ())?)
    }),
    ("map shared", |p| map_shared(&read_write(&p.control)?, libc::PROT_READ | libc::PROT_WRITE)),
    ("map shared for reading", |p| map_shared(&File::open(&p.other)?, libc::PROT_READ)),
    ("fallocate", |p| Ok(fallocate(read_write(&p.control)?, FallocateFlags::empty(), 0, 10)?)),
    ("punch a hole", |p| {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        Ok(fallocate(read_write(&p.control)?, flags, 0, 10)?)
    }),
    ("fallocate of a file opened for reading", |p| {
        Ok(fallocate(File::open(&p.other)?, FallocateFlags::empty(), 0, 10)?)
    }),
    ("an ioctl of terminals", |p| ask_terminal(read_write(&p.control))),
    ("an ioctl of terminals on a directory", |p| ask_terminal(File::open(&p.sub))),
    ("get the flags of an inode", |p| Ok(ioctl_getflags(File::open(&p.other)?).map(|_| ())?)),
    ("set the flags of an inode", |p| Ok(ioctl_setflags(read_write(&p.control)?, IFlags::IMMUTABLE)?)),
    ("clone a file", |p| Ok(ioctl_ficlone(read_write(&p.control)?, File::open(&p.control)?)?)),
    ("chmod to what it is", |p| fs::set_permissions(&p.control, fs::metadata(&p.control)?.permissions())),
    ("chown to what it is", |p| chown(&p.control, Some(0), Some(0))),
    ("touch", |p| set_times(&p.control, TimeSpec::UTIME_NOW)),
    ("set times", |p| set_times(&p.control, TimeSpec::new(1, 0))),
    ("set times of a directory", |p| set_times(&p.sub, TimeSpec::new(1, 0))),
    ("read a directory", |p| File::open(&p.sub)?.read(&mut [0; 9]).map(|_| ())),
    ("seek before the beginning", |p| File::open(&p.other)?.seek(SeekFrom::Current(-1)).map(|_| ())),
    ("write to a file opened for reading", |p| File::open(&p.other)?.write(b"0").map(|_| ())),
    ("read from a file opened for writing", |p| {
        File::options().write(true).open(&p.control)?.read(&mut [0; 9]).map(|_| ())
    }),
    ("execute", |p| Ok(access(&p.control, AccessFlags::X_OK)?)),
    ("sync", |p| read_write(&p.control)?.sync_all()),
    ("sync data", |p| read_write(&p.control)?.sync_data()),
];

/// The errno, or `None` if the call succeeds.
fn outcome(call: Call, place: &Place) -> Option<Errno> {
    call(place).err().map(|error| Errno::from_raw(error.raw_os_error().expect("an errno")))
}

/// Everything except times.
fn tree(mount: &Mount) -> Vec<(String, u64, u32, u32)> {
    mount.walk().into_iter().map(|(path, stat)| (path, stat.ino(), stat.mode(), stat.uid())).collect()
}

#[test]
fn every_call_is_answered_as_by_cgroupfs() {
    let (mount, cgroup) = (Mount::with_dataplane(), with_sub());
    let (ours, theirs) = (place(&mount), place_in(&cgroup));
    let (daemons, before) = (mount.daemons(), tree(&mount));
    for (name, call) in CALLS {
        assert_eq!(outcome(*call, &ours), outcome(*call, &theirs), "{name}");
    }
    assert_eq!(tree(&mount), before);
    assert_eq!(mount.daemons(), daemons);
    mount.sh("echo $$ > $C/pools/dataplane/0/tasks");
}

#[test]
fn every_call_of_a_user_is_answered_as_by_cgroupfs() {
    let (mount, cgroup) = (Mount::with_dataplane(), with_sub());
    mount.let_everybody_in();
    let (ours, theirs) = (place(&mount), place_in(&cgroup));
    let before = tree(&mount);
    as_nobody(|| {
        for (name, call) in CALLS {
            assert_eq!(outcome(*call, &ours), outcome(*call, &theirs), "{name}");
        }
    });
    // The owner of everything can do no more than root.
    for Place { dir, control, other, sub } in [&ours, &theirs] {
        for path in [dir, control, other, sub, other.parent().unwrap()] {
            chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
        }
    }
    let given = tree(&mount);
    as_nobody(|| {
        for (name, call) in CALLS {
            // Modes and owners decide who may claim, so changing them is left to root, unlike on cgroupfs.
            let expected =
                if *name == "chmod to what it is" { Some(Errno::EPERM) } else { outcome(*call, &theirs) };
            assert_eq!(outcome(*call, &ours), expected, "the owner: {name}");
        }
    });
    assert_eq!(tree(&mount), given);
    assert_eq!(before.len(), given.len());
}

#[test]
fn there_are_no_extended_attributes() {
    let mount = Mount::with_dataplane();
    let files = ["pools/dataplane/tasks", "pools/dataplane/0", "info/version", "lock", ""];
    for path in files.map(|path| mount.conf().join(path)) {
        for name in ["user.kcm", "trusted.kcm", "security.kcm", "system.kcm"] {
            let refused = Err(rustix::io::Errno::OPNOTSUPP);
            assert_eq!(setxattr(&path, name, b"1", XattrFlags::empty()), refused, "{path:?} {name}");
            assert_eq!(getxattr(&path, name, &mut [0_u8; 9]).map(|_| ()), refused, "{path:?} {name}");
            assert_eq!(rustix::fs::removexattr(&path, name), refused, "{path:?} {name}");
        }
    }
    // Calls that do not need extended attributes work.
    mount.sh("ls -lZ $C/pools/dataplane >/dev/null && cp -a $C/info/version $C/../copy");
}

#[test]
fn only_files_that_take_commands_can_be_truncated() {
    let mount = Mount::with_dataplane();
    for (path, stat) in mount.walk().iter().filter(|(_, stat)| stat.is_file()) {
        let takes_commands =
            ["tasks", "queue", "exclusive", "partial", "mode", "transient", "state", "config", "reclaimed"]
                .iter()
                .any(|name| path.ends_with(name));
        let file = mount.conf().join(path);
        let size = stat.len().cast_signed();
        for size in [0, 1, size, 1 << 40] {
            let truncated = truncate(&file, size);
            let expected = if takes_commands { Ok(()) } else { Err(Errno::EINVAL) };
            assert_eq!(truncated, expected, "{path} to {size}");
        }
        // These show the refusals.
        let changes = ["info/metrics", "info/events", "self/last_error"].contains(&path.as_str());
        if !changes {
            assert_eq!(fs::metadata(&file).unwrap().len(), stat.len(), "{path}");
        }
    }
}

#[test]
fn truncation_of_control_files_has_no_effect() {
    let mount = Mount::with_dataplane();
    let task = Sleeper::new();
    let tasks = mount.tasks("dataplane", "1");
    write(&tasks, task.pid().to_string()).unwrap();
    mount
        .sh(": > $C/pools/dataplane/1/tasks; : > $C/pools/dataplane/tasks; : > $C/pools/dataplane/exclusive");
    let shown = format!("{}\n", task.pid());
    let opened = File::options().read(true).write(true).create(true).truncate(true).open(&tasks).unwrap();
    assert_eq!(opened.metadata().unwrap().len(), shown.len() as u64);
    opened.set_len(0).unwrap();
    assert_eq!(opened.metadata().unwrap().len(), shown.len() as u64);
    assert_eq!(mount.read("pools/dataplane/1/tasks"), shown);
    assert_eq!(mount.read("pools/dataplane/exclusive"), "1\n");
    assert_eq!(fs::metadata(mount.pool("dataplane").join("exclusive")).unwrap().len(), 2);
}

#[test]
fn offsets_have_no_effect_on_a_write() {
    let mount = Mount::with_dataplane();
    let task = Sleeper::new();
    let (tasks, pid) = (mount.tasks("dataplane", "1"), task.pid());
    let (shown, claim, release) = (format!("{pid}\n"), format!("{pid}\n"), format!("-{pid}\n"));
    let file = read_write(&tasks).unwrap();
    for offset in [0, 1, 4096, 1 << 20, 1 << 40] {
        assert_eq!(file.write_at(claim.as_bytes(), offset).unwrap(), claim.len());
        assert_eq!(fs::read_to_string(&tasks).unwrap(), shown, "at {offset}");
        assert_eq!(fs::metadata(&tasks).unwrap().len(), shown.len() as u64, "at {offset}");
        assert_eq!(file.write_at(release.as_bytes(), offset).unwrap(), release.len());
        assert_eq!(fs::read_to_string(&tasks).unwrap(), "", "at {offset}");
    }
    let mut file = File::options().append(true).open(&tasks).unwrap();
    file.write_all(claim.as_bytes()).unwrap();
    mount.sh("echo $$ >> $C/pools/dataplane/0/tasks; echo 0 >> $C/pools/dataplane/exclusive");
    assert_eq!(fs::read_to_string(&tasks).unwrap(), shown);
    assert_eq!(mount.read("pools/dataplane/exclusive"), "0\n");
}

#[test]
fn o_creat_on_an_existing_name_opens_it() {
    let mount = Mount::with_dataplane();
    let task = Sleeper::new();
    let tasks = mount.tasks("dataplane", "1");
    let mut file = File::options().write(true).create(true).truncate(false).mode(0o777).open(&tasks).unwrap();
    file.write_all(task.pid().to_string().as_bytes()).unwrap();
    assert_eq!(mount.read("pools/dataplane/1/tasks"), format!("{}\n", task.pid()));
    assert_eq!(fs::metadata(&tasks).unwrap().mode() & 0o7777, 0o644);
    let new = File::options().write(true).create(true).truncate(false).open(tasks.with_file_name("new"));
    assert_eq!(errno(new), Errno::EACCES);
}
