//! mount(2) of the FUSE filesystem.
//!
//! Owns the mount's flags and its identity. Does not know who serves it.

use std::fs::OpenOptions;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::fs::CWD;
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

/// Mounts the filesystem at `conf_dir` and returns the open device that connects the mount to its server.
///
/// # Errors
/// No permission, no FUSE in this kernel or container, or mount(2) failed.
pub(super) fn mount_device(conf_dir: &Path) -> Result<OwnedFd, MountError> {
    let device = open_device()?;
    let options = abi::mount_options(device.as_raw_fd());
    let options =
        options.map(|(name, value)| value.map_or(name.to_owned(), |value| format!("{name}={value}")));
    let data = options.join(",");
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_NOATIME;
    match mount(Some(SOURCE), conf_dir, Some(abi::FSTYPE), flags, Some(data.as_str())) {
        Ok(()) => Ok(device),
        Err(Errno::EPERM) => Err(MountError::NotRoot(conf_dir.to_path_buf())),
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
        return mount_device(conf_dir);
    };
    let attach = |flags| {
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | flags;
        move_mount(&mounted, "", CWD, conf_dir, flags)
    };
    let is_beneath = attach(MoveMountFlags::MOVE_MOUNT_BENEATH).is_ok();
    detach();
    if !is_beneath {
        attach(MoveMountFlags::empty())
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
