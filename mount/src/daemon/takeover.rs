//! What is at the mount point when a daemon comes, and mounting there.
//!
//! Owns: mount(2), and the decision whether a mount is made, taken over, or refused. Must not know: who keeps it.

use std::fs::OpenOptions;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::{MountError, Places, at};
use crate::clock;
use crate::handover::{Letter, LetterBox};
use crate::import;
use crate::journal::StateLock;
use crate::keeper::{self, Held};
use crate::model::topology::Topology;
use crate::mountpoint::{self, Status};

/// What was there when we came.
pub(super) enum Found {
    /// A mount that somebody else has held and holds no more.
    Mount(Held),
    /// A place for one.
    Place { lock: StateLock, layout: Option<PathBuf> },
}

pub(super) fn find(places: &Places, import: bool, stored: [Option<OwnedFd>; 2]) -> Result<Found, MountError> {
    let Places { conf_dir, state_dir } = places;
    if absolute(state_dir).starts_with(absolute(conf_dir)) {
        return Err(MountError::StateInside { state: state_dir.clone(), conf: conf_dir.clone() });
    }
    if let [Some(device), Some(letters)] = stored
        && mountpoint::is_mounted(conf_dir).unwrap_or(false)
        && keeper::is_connected(&device)
    {
        log::info!("{}: going on with the mount that the service manager has held", conf_dir.display());
        let lock = StateLock::take(state_dir)?;
        return Ok(Found::Mount(Held { device, letters: LetterBox::from_fd(letters), lock }));
    }
    loop {
        let status =
            mountpoint::status(conf_dir).map_err(|source| at(conf_dir, "cannot be looked at", source))?;
        match status {
            Status::Live => return Err(MountError::AlreadyMounted(conf_dir.clone())),
            Status::NotAnswering => {
                let held = keeper::take_from_others(&mountpoint::resolved(conf_dir));
                log::warn!("{}: taking over a mount whose daemon does not answer", conf_dir.display());
                return held.map(Found::Mount).ok_or_else(|| MountError::NotAnswering(conf_dir.clone()));
            }
            Status::Stale => {
                log::warn!("{}: taking over a mount whose daemon has died", conf_dir.display());
                umount2(conf_dir, MntFlags::MNT_DETACH)
                    .map_err(|errno| at(conf_dir, "cannot be detached", errno.into()))?;
            }
            Status::Absent => {
                std::fs::create_dir_all(conf_dir).map_err(|source| at(conf_dir, "cannot be made", source))?;
            }
            Status::Marked | Status::Plain => break,
        }
    }
    let mut entries = std::fs::read_dir(conf_dir).map_err(|source| at(conf_dir, "cannot be read", source))?;
    let is_empty = entries.next().is_none();
    if !is_empty && !import {
        return Err(MountError::NotEmpty(conf_dir.clone()));
    }
    let lock = StateLock::take(state_dir)?;
    let layout = if is_empty { None } else { Some(put_aside(conf_dir)?) };
    Ok(Found::Place { lock, layout })
}

fn put_aside(conf_dir: &Path) -> Result<PathBuf, MountError> {
    import::Layout::read(conf_dir).map_err(|source| at(conf_dir, "is no layout of 2017", source))?;
    let aside =
        import::move_aside(conf_dir).map_err(|source| at(conf_dir, "cannot be moved aside", source))?;
    log::info!("{}: the layout of 2017 is kept in {}", conf_dir.display(), aside.display());
    Ok(aside)
}

pub(super) fn mount_fresh(
    places: &Places,
    topology: Topology,
    lock: StateLock,
    import: Option<PathBuf>,
) -> Result<Held, MountError> {
    let conf_dir = &places.conf_dir;
    if let Err(error) = mountpoint::mark(conf_dir) {
        log::warn!(
            "{}: cannot be marked as a mount point: {error}; without a daemon, tools will take it for empty",
            conf_dir.display()
        );
    }
    let letter = Letter { mount: new_mount_id(), topology, import, init: None };
    let letters =
        LetterBox::new(&letter).map_err(|source| at(conf_dir, "no letter to the worker", source))?;
    Ok(Held { device: mount_device(conf_dir)?, letters, lock })
}

/// Tells a mount from every other one of this boot.
pub(crate) fn new_mount_id() -> u64 {
    clock::since_boot()
}

pub(crate) fn mount_device(conf_dir: &Path) -> Result<OwnedFd, MountError> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse").map_err(MountError::NoFuse)?;
    let data = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions",
        device.as_raw_fd()
    );
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_NOATIME;
    match mount(Some("kcm"), conf_dir, Some("fuse.kcm"), flags, Some(data.as_str())) {
        Ok(()) => Ok(device.into()),
        Err(Errno::EPERM) => Err(MountError::NotRoot(conf_dir.to_path_buf())),
        // What we opened is something else, or the kernel has no such filesystem.
        Err(errno @ (Errno::EINVAL | Errno::ENODEV)) => Err(MountError::NoFuse(errno.into())),
        Err(errno) => Err(at(conf_dir, "cannot be mounted", errno.into())),
    }
}

/// An absolute path without `.` and `..`, links resolved as far as it exists.
fn absolute(path: &Path) -> PathBuf {
    let mut known = PathBuf::from("/");
    for part in std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf()).components() {
        match part {
            Component::Normal(name) => {
                known.push(name);
                known = known.canonicalize().unwrap_or(known);
            }
            Component::ParentDir => {
                known.pop();
            }
            _ => {}
        }
    }
    known
}
