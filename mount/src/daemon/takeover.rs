//! The start at a mount point: whether a daemon mounts there, continues an existing mount, or refuses.
//!
//! Owns the checks of the mount point, and taking a mount from a daemon that does not answer. Does not know who
//! supervises the mount afterwards.

use std::ffi::OsString;
use std::fs::Permissions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use nix::mount::{MntFlags, umount2};

use super::Import;
use super::error::{MountError, io_error};
use super::fds::{self, HandoffMemfd, HandoffState, InheritedFds};
use super::identity::{self, Server};
use super::mount::{self, MountPoint, mount_device, new_mount_id};
use super::paths::MountPaths;
use super::systemd::Stored;
use crate::import;
use crate::journal::{self, StateLock};
use crate::model::topology::Topology;
use crate::mountpoint::{self, Connection, Status};
use crate::process::KeptPidfds;

/// How long killed daemon processes may take to exit: the kernel first ends their system calls.
const KILL_TIMEOUT: Duration = Duration::from_secs(2);

/// The result of the checks: a mount to continue, or a directory to mount.
#[derive(Debug)]
pub(super) enum Found {
    /// A mount that another daemon has held and no longer holds.
    Mount(InheritedFds),
    /// A directory for a new mount. `layout`: a legacy layout that was moved aside.
    Directory { lock: StateLock, layout: Option<PathBuf> },
}

/// Prepares the mount point. `stored`: the descriptors from the service manager.
///
/// # Errors
/// The directory is in use, or cannot be used.
pub(super) fn find(
    paths: &MountPaths,
    import: Option<Import>,
    topology: &Topology,
    stored: Option<Stored>,
) -> Result<Found, MountError> {
    let MountPaths { conf_dir, state_dir } = paths;
    if canonical(state_dir).starts_with(canonical(conf_dir)) {
        return Err(MountError::StateInside { state: state_dir.clone(), conf: conf_dir.clone() });
    }
    if let Some(Stored { device, handoff, kept }) = stored
        && let Ok(Some(mounted)) = mountpoint::topmost(conf_dir)
        && identity::connection_of(&device).is_none_or(|connection| connection == mounted.connection)
        && mount::is_connected(&device)
    {
        if !handoff.read().is_ok_and(|state| state.resends()) {
            // An earlier program has stored them in spite of that. Whoever waits for an answer would wait without end.
            log::warn!("{}: this kernel (before 6.9) cannot continue the mount", conf_dir.display());
            umount2(conf_dir, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH)
                .map_err(|errno| io_error(conf_dir, "cannot be detached", errno.into()))?;
            return find(paths, import, topology, None);
        }
        log::info!("{}: continuing the mount that the service manager has held", conf_dir.display());
        let lock = StateLock::take(state_dir)?;
        let spare = new_spare(conf_dir)?;
        let kept = kept.map_or_else(|| new_kept(conf_dir), Ok)?;
        return Ok(Found::Mount(InheritedFds { device, handoff, lock, spare, kept }));
    }
    let is_marked = loop {
        let status = mountpoint::status(conf_dir)
            .map_err(|source| io_error(conf_dir, "cannot be examined", source))?;
        match status {
            Status::Live => return Err(MountError::AlreadyMounted(conf_dir.clone())),
            Status::NotAnswering => {
                let mounted = mountpoint::topmost(conf_dir)
                    .map_err(|source| io_error(conf_dir, "cannot be examined", source))?;
                let Some(mounted) = mounted else { continue };
                log::warn!("{}: taking over a mount whose daemon does not answer", conf_dir.display());
                return steal_from_unresponsive(mounted.connection, paths).map(Found::Mount);
            }
            Status::Stale => {
                log::warn!("{}: replacing a mount whose daemon has died", conf_dir.display());
                umount2(conf_dir, MntFlags::MNT_DETACH)
                    .map_err(|errno| io_error(conf_dir, "cannot be detached", errno.into()))?;
            }
            Status::Absent => {
                // Whatever the umask is: without a daemon, everybody is to see why the directory is empty.
                std::fs::create_dir_all(conf_dir)
                    .and_then(|()| std::fs::set_permissions(conf_dir, Permissions::from_mode(0o755)))
                    .map_err(|source| io_error(conf_dir, "cannot be created", source))?;
            }
            Status::Marked => break true,
            Status::Plain => break false,
        }
    };
    let names = names(&MountPoint::open(conf_dir)?, conf_dir)?;
    if names.is_empty() {
        return Ok(Found::Directory { lock: StateLock::take(state_dir)?, layout: None });
    }
    let Some(import) = import else {
        // In a directory that has been a mount point already, a layout is not an old one.
        let may_be_layout = !is_marked && conf_dir.join("pools").is_dir();
        return Err(match may_be_layout {
            true => MountError::NotEmpty(conf_dir.clone()),
            false => MountError::foreign(conf_dir, &names),
        });
    };
    check_layout(paths, import, topology)?;
    let lock = StateLock::take(state_dir)?;
    let layout = Some(move_layout_aside(conf_dir)?);
    Ok(Found::Directory { lock, layout })
}

fn names(point: &MountPoint, conf_dir: &Path) -> Result<Vec<OsString>, MountError> {
    point.names().map_err(|source| io_error(conf_dir, "cannot be read", source))
}

/// Checks that a legacy layout can be taken over, and names on the terminal what cannot. Changes nothing.
fn check_layout(paths: &MountPaths, import: Import, topology: &Topology) -> Result<(), MountError> {
    let MountPaths { conf_dir, state_dir } = paths;
    let layout = import::Layout::read(conf_dir);
    let layout = layout.map_err(|source| io_error(conf_dir, "is not a legacy layout", source))?;
    // Without a state directory there are no pools yet.
    let existing = journal::inspect(state_dir).map(|found| found.config.pools).unwrap_or_default();
    let problems = layout.problems(&existing, &topology.cpus());
    for problem in &problems {
        match import {
            Import::Whole => log::error!("{problem}"),
            Import::Partial => log::warn!("not taken over: {problem}"),
        }
    }
    match import {
        Import::Whole if !problems.is_empty() => {
            Err(MountError::NotImported { conf: conf_dir.clone(), count: problems.len() })
        }
        Import::Whole | Import::Partial => Ok(()),
    }
}

fn move_layout_aside(conf_dir: &Path) -> Result<PathBuf, MountError> {
    let aside =
        import::move_aside(conf_dir).map_err(|source| io_error(conf_dir, "cannot be moved aside", source))?;
    log::info!("{}: the legacy layout is kept in {}", conf_dir.display(), aside.display());
    Ok(aside)
}

/// Mounts a directory that nobody has mounted.
///
/// # Errors
/// It cannot be mounted.
pub(super) fn mount_new(
    paths: &MountPaths,
    topology: Topology,
    lock: StateLock,
    layout: Option<PathBuf>,
    until_unused: bool,
) -> Result<InheritedFds, MountError> {
    let conf_dir = &paths.conf_dir;
    let point = MountPoint::open(conf_dir)?;
    // Again, of the directory that is mounted on.
    let names = names(&point, conf_dir)?;
    if !names.is_empty() {
        return Err(MountError::foreign(conf_dir, &names));
    }
    if let Err(error) = mountpoint::mark(&point.path()) {
        log::warn!(
            "{}: cannot be marked as a mount point: {error}; without a daemon, tools take it for an empty directory",
            conf_dir.display()
        );
    }
    let state = HandoffState {
        mount_id: new_mount_id(),
        topology,
        import: layout,
        init: None,
        cpus: None,
        until_unused,
    };
    let handoff =
        HandoffMemfd::new(&state).map_err(|source| io_error(conf_dir, "no handoff memfd", source))?;
    let (spare, kept) = (new_spare(conf_dir)?, new_kept(conf_dir)?);
    Ok(InheritedFds { device: mount_device(&point)?, handoff, lock, spare, kept })
}

/// Copies the descriptors of a daemon that does not answer (pidfd_getfd(2)), and kills its processes.
///
/// # Errors
/// No process serves the mount as far as the kernel says, or it uses another state directory. Then nothing was killed.
fn steal_from_unresponsive(connection: Connection, paths: &MountPaths) -> Result<InheritedFds, MountError> {
    let MountPaths { conf_dir, state_dir } = paths;
    let not_answering = || MountError::NotAnswering(conf_dir.clone());
    let servers = identity::servers(connection, &mountpoint::resolved(conf_dir));
    let mut stolen = servers.iter().filter_map(|server| copy_descriptors(server, connection));
    let fds = stolen.next().ok_or_else(not_answering)?;
    if !fds.lock.is_of(state_dir) {
        let used = fds.lock.directory().unwrap_or_default();
        return Err(MountError::OtherState { conf: conf_dir.clone(), used });
    }
    drop(stolen);
    servers.iter().for_each(|server| server.pidfd.kill());
    let have_died = servers.iter().all(|server| server.pidfd.wait(KILL_TIMEOUT));
    if have_died { Ok(fds) } else { Err(not_answering()) }
}

/// Copies the descriptors of a process, and checks of the copies that they are what they should be: the process could have
/// changed its own since it was examined.
fn copy_descriptors(server: &Server, connection: Connection) -> Option<InheritedFds> {
    let copy = |number| server.pidfd.descriptor(number).ok();
    let device = copy(fds::DEVICE)?;
    let is_ours = identity::connection_of(&device).is_none_or(|other| other == connection);
    let handoff = HandoffMemfd::from_fd(copy(fds::HANDOFF)?);
    let lock = StateLock::from_fd(copy(fds::LOCK)?);
    let spare = copy(fds::SPARE).filter(fds::is_spare).or_else(|| fds::new_spare().ok())?;
    let kept = fds::kept(copy(fds::KEPT)).ok()?;
    (is_ours && handoff.read().is_ok()).then_some(InheritedFds { device, handoff, lock, spare, kept })
}

fn new_kept(conf_dir: &Path) -> Result<KeptPidfds, MountError> {
    KeptPidfds::new().map_err(|source| io_error(conf_dir, "no socket for pidfds", source))
}

fn new_spare(conf_dir: &Path) -> Result<OwnedFd, MountError> {
    fds::new_spare().map_err(|source| io_error(conf_dir, "no memfd for the journal", source))
}

/// The absolute path without `.` and `..`, with symbolic links resolved as far as the path exists.
fn canonical(path: &Path) -> PathBuf {
    let mut known = PathBuf::from("/");
    for component in std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf()).components() {
        match component {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn no_cpus() -> Topology {
        Topology::new(Vec::new())
    }

    #[test]
    fn a_state_directory_inside_the_mount_point_is_refused_through_links_too() {
        let directory = tempfile::tempdir().unwrap();
        let conf_dir = directory.path().join("conf");
        std::fs::create_dir(&conf_dir).unwrap();
        std::os::unix::fs::symlink(&conf_dir, directory.path().join("link")).unwrap();
        for state_dir in ["conf", "conf/state", "link/state", "other/../conf/state"] {
            let state_dir = directory.path().join(state_dir);
            let paths = MountPaths { conf_dir: conf_dir.clone(), state_dir };
            let found = find(&paths, None, &no_cpus(), None);
            assert!(matches!(found, Err(MountError::StateInside { .. })), "{paths:?}: {found:?}");
        }
    }

    #[test]
    fn a_directory_with_files_is_refused_unless_it_is_imported() {
        let directory = tempfile::tempdir().unwrap();
        let paths =
            MountPaths { conf_dir: directory.path().join("conf"), state_dir: directory.path().join("state") };
        std::fs::create_dir(&paths.conf_dir).unwrap();
        std::fs::write(paths.conf_dir.join("file"), "").unwrap();
        assert!(matches!(find(&paths, None, &no_cpus(), None), Err(MountError::Foreign { .. })));
        let error = find(&paths, Some(Import::Whole), &no_cpus(), None).unwrap_err().to_string();
        assert!(error.contains("is not a legacy layout"), "{error}");
        assert!(paths.conf_dir.join("file").exists(), "nothing was moved");
    }

    #[test]
    fn an_absent_mount_point_is_created() {
        let directory = tempfile::tempdir().unwrap();
        let paths = MountPaths {
            conf_dir: directory.path().join("a/conf"),
            state_dir: directory.path().join("state"),
        };
        let found = find(&paths, None, &no_cpus(), None).unwrap();
        assert!(matches!(found, Found::Directory { layout: None, .. }), "{found:?}");
        assert!(paths.conf_dir.is_dir());
    }
}
