//! mount(2) of the FUSE filesystem.
//!
//! Owns: the mount's options and its identity. Must not know: who keeps it.

use std::fs::OpenOptions;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};

use super::error::{MountError, at};
use crate::clock;
use crate::fuse::abi;

/// Tells a mount from every other one of this boot.
pub(crate) fn new_mount_id() -> u64 {
    clock::since_boot()
}

pub(crate) fn mount_device(conf_dir: &Path) -> Result<OwnedFd, MountError> {
    let device = OpenOptions::new().read(true).write(true).open(abi::DEVICE).map_err(MountError::NoFuse)?;
    let data = abi::mount_options(device.as_raw_fd());
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_NOATIME;
    match mount(Some("kcm"), conf_dir, Some("fuse.kcm"), flags, Some(data.as_str())) {
        Ok(()) => Ok(device.into()),
        Err(Errno::EPERM) => Err(MountError::NotRoot(conf_dir.to_path_buf())),
        // What we opened is something else, or the kernel has no such filesystem.
        Err(errno @ (Errno::EINVAL | Errno::ENODEV)) => Err(MountError::NoFuse(errno.into())),
        Err(errno) => Err(at(conf_dir, "cannot be mounted", errno.into())),
    }
}
