//! mount(2) of the FUSE filesystem.
//!
//! Owns the mount's flags and its identity. Does not know who serves it.

use std::fs::OpenOptions;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::error::{MountError, io_error};
use crate::clock;
use crate::fuse::abi;

/// Identifies a mount uniquely for this boot: the time since boot, in nanoseconds.
pub(super) fn new_mount_id() -> u64 {
    clock::since_boot()
}

/// Mounts the filesystem at `conf_dir` and returns the open device that connects the mount to its server.
///
/// # Errors
/// No permission, no FUSE in this kernel or container, or mount(2) failed.
pub(super) fn mount_device(conf_dir: &Path) -> Result<OwnedFd, MountError> {
    let device = OpenOptions::new().read(true).write(true).open(abi::DEVICE).map_err(MountError::NoFuse)?;
    let data = abi::mount_options(device.as_raw_fd());
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_NOATIME;
    match mount(Some("kcm"), conf_dir, Some(abi::FSTYPE), flags, Some(data.as_str())) {
        Ok(()) => Ok(device.into()),
        Err(Errno::EPERM) => Err(MountError::NotRoot(conf_dir.to_path_buf())),
        // The opened file is not the FUSE device, or the kernel has no FUSE.
        Err(errno @ (Errno::EINVAL | Errno::ENODEV)) => Err(MountError::NoFuse(errno.into())),
        Err(errno) => Err(io_error(conf_dir, "cannot be mounted", errno.into())),
    }
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
