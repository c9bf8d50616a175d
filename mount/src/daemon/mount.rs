//! mount(2) of the FUSE filesystem.
//!
//! Owns the mount's flags and its identity. Does not know who serves it.

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount,
};

use super::error::{MountError, io_error};
use crate::clock;
use crate::fuse::abi;

/// The source of the mount in the mount table.
const SOURCE: &str = "kcm";

/// Identifies a mount uniquely for this boot: the time since boot, in nanoseconds.
pub(super) fn new_mount_id() -> u64 {
    clock::since_boot()
}

/// A directory to mount on. It is open, so nobody can put another one, or a link, in its place before mount(2).
pub(super) struct MountPoint {
    conf_dir: PathBuf,
    directory: OwnedFd,
}

impl MountPoint {
    /// Opens the directory. Links above it are followed, but it must not be one itself.
    ///
    /// # Errors
    /// It is a symbolic link, another kind of file, or missing.
    pub(super) fn open(conf_dir: &Path) -> Result<Self, MountError> {
        refuse_link(conf_dir)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = rustix::fs::open(conf_dir, flags, Mode::empty())
            .map_err(|errno| io_error(conf_dir, "cannot be opened", errno.into()))?;
        Ok(Self { conf_dir: conf_dir.to_path_buf(), directory })
    }

    /// A path to the directory, whatever has its name meanwhile.
    pub(super) fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.directory.as_raw_fd()).into()
    }

    /// Returns the names in it, sorted.
    ///
    /// # Errors
    /// It cannot be read.
    pub(super) fn names(&self) -> io::Result<Vec<OsString>> {
        let entries = fs::read_dir(self.path())?;
        let mut names: Vec<OsString> =
            entries.map(|entry| entry.map(|entry| entry.file_name())).collect::<io::Result<_>>()?;
        names.sort();
        Ok(names)
    }
}

/// Refuses a mount point that is a symbolic link: who can write to the directory above it, such as a container that has it as a
/// volume, may have put the link there.
///
/// # Errors
/// It is one.
pub(super) fn refuse_link(conf_dir: &Path) -> Result<(), MountError> {
    // Without a slash at the end, with which the link would be followed.
    let own = match (conf_dir.parent(), conf_dir.file_name()) {
        (Some(parent), Some(name)) => parent.join(name),
        _ => conf_dir.to_path_buf(),
    };
    match fs::read_link(&own) {
        Ok(target) => Err(MountError::Link { conf: own, target }),
        Err(_) => Ok(()),
    }
}

/// Mounts the filesystem and returns the open device that connects the mount to its server.
///
/// # Errors
/// No permission, no FUSE in this kernel or container, or mount(2) failed.
pub(super) fn mount_device(point: &MountPoint) -> Result<OwnedFd, MountError> {
    let conf_dir = &point.conf_dir;
    let device = open_device()?;
    let options = abi::mount_options(device.as_raw_fd());
    let options =
        options.map(|(name, value)| value.map_or(name.to_owned(), |value| format!("{name}={value}")));
    let data = options.join(",");
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_NOATIME;
    match mount(Some(SOURCE), &point.path(), Some(abi::FSTYPE), flags, Some(data.as_str())) {
        Ok(()) => Ok(device),
        Err(Errno::EPERM) => Err(MountError::NotRoot(conf_dir.clone())),
        // The opened file is not the FUSE device, or the kernel has no FUSE.
        Err(errno @ (Errno::EINVAL | Errno::ENODEV)) => Err(MountError::NoFuse(errno.into())),
        Err(errno) => Err(io_error(conf_dir, "cannot be mounted", errno.into())),
    }
}

fn open_device() -> Result<OwnedFd, MountError> {
    let device = OpenOptions::new().read(true).write(true).open(abi::DEVICE).map_err(MountError::NoFuse)?;
    Ok(device.into())
}

/// Mounts the filesystem in the place of the mount at `conf_dir`, which `detach` takes away. Returns the open device.
///
/// From Linux 6.5 on, the new mount is put beneath the old one before that, so nobody sees the directory below them. On
/// older kernels it is visible between two system calls.
///
/// # Errors
/// As for [`mount_device`].
pub(super) fn replace_mount(conf_dir: &Path, detach: impl FnOnce()) -> Result<OwnedFd, MountError> {
    let device = open_device()?;
    let Ok(mounted) = mount_nowhere(&device) else {
        detach();
        return mount_device(&MountPoint::open(conf_dir)?);
    };
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    let beneath = flags | MoveMountFlags::MOVE_MOUNT_BENEATH;
    let is_beneath = move_mount(&mounted, "", CWD, conf_dir, beneath).is_ok();
    detach();
    if !is_beneath {
        let point = MountPoint::open(conf_dir)?;
        move_mount(&mounted, "", CWD, point.path(), flags | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS)
            .map_err(|errno| io_error(conf_dir, "cannot be mounted", errno.into()))?;
    }
    Ok(device)
}

/// Makes a mount that is not in the tree yet.
fn mount_nowhere(device: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    let filesystem = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&filesystem, "source", SOURCE)?;
    fsconfig_set_string(&filesystem, "subtype", "kcm")?;
    for (name, value) in abi::mount_options(device.as_raw_fd()) {
        match value {
            Some(value) => fsconfig_set_string(&filesystem, name, &*value)?,
            None => fsconfig_set_flag(&filesystem, name)?,
        }
    }
    fsconfig_create(&filesystem)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC
        | MountAttrFlags::MOUNT_ATTR_NOATIME;
    fsmount(&filesystem, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// Whether the connection of this device still exists. The kernel ends it with the mount, and when it is aborted: by an
/// administrator (`/sys/fs/fuse/connections/N/abort`), or because a request took longer than
/// `fs.fuse.max_request_timeout`.
pub(super) fn is_connected(device: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(device.as_fd(), PollFlags::POLLIN)];
    let _ = poll(&mut fds, PollTimeout::ZERO);
    let [fd] = fds;
    !fd.revents().unwrap_or(PollFlags::empty()).intersects(PollFlags::POLLERR | PollFlags::POLLNVAL)
}
