//! What is at the mount point when a daemon comes, and mounting there.
//!
//! Owns: mount(2), and the decision whether a mount is made, taken over, or refused. Must not know: who keeps it.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::mount::{MntFlags, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::error::{MountError, at};
use super::fds::{self, Held, Letter, LetterBox};
use super::mount::{mount_device, new_mount_id};
use super::paths::{Places, processes_of};
use crate::import;
use crate::journal::StateLock;
use crate::model::topology::Topology;
use crate::mountpoint::{self, Status};
use crate::process::PidFd;

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
        && is_connected(&device)
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
                let held = take_from_others(&mountpoint::resolved(conf_dir));
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

/// Whether the mount that belongs to the device still exists.
fn is_connected(device: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(device.as_fd(), PollFlags::POLLIN)];
    let _ = poll(&mut fds, PollTimeout::ZERO);
    let [fd] = fds;
    !fd.revents().unwrap_or(PollFlags::empty()).intersects(PollFlags::POLLERR | PollFlags::POLLNVAL)
}

/// The processes that hold the mount's descriptor although they do not answer, and what they hold.
fn take_from_others(conf_dir: &Path) -> Option<Held> {
    let others: Vec<PidFd> =
        processes_of(conf_dir).into_iter().filter_map(|pid| PidFd::open(pid).ok()).collect();
    let held = others.iter().find_map(|other| {
        Some(Held {
            device: other.descriptor(fds::DEVICE).ok()?,
            letters: LetterBox::from_fd(other.descriptor(fds::LETTER).ok()?),
            lock: StateLock::from_fd(other.descriptor(fds::LOCK).ok()?),
        })
    })?;
    for other in &others {
        other.kill();
    }
    others.iter().all(|other| other.wait(fds::ENDING)).then_some(held)
}
