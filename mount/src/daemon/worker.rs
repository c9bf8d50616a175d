//! The worker: serves requests on a device that its supervisor holds, and may be killed at any moment.
//!
//! Owns the engine and the session, and how both continue after an earlier worker. Does not know mount(2), or when
//! it is started again.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nix::sys::signal::Signal;

use super::error::{MountError, io_error};
use super::fds::{self, ControlSocket, HandoffMemfd, HandoffState, InheritedFds, Message};
use super::messages;
use super::paths::{MountPaths, THIS_PROGRAM};
use super::role::Role;
use super::setup;
use crate::clock;
use crate::engine::{Engine, OwnProcesses, ReadTopology, Unused};
use crate::fuse::{Session, request_resend};
use crate::handles::OpenFiles;
use crate::import;
use crate::journal::{StateDir, StateLock};
use crate::process::{self, KeptPidfds, PidFd};
use crate::uevents::Uevents;

/// How long a worker without a supervisor waits before it starts a new one, so that a user can kill the whole
/// daemon: kill(1) with both PIDs takes less.
const ORPHAN_GRACE: Duration = Duration::from_millis(100);
/// How long the answer to a removal, or to a look, may take. The longest bounded wait in a request takes as long.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves until the mount ends or the supervisor kills this process.
///
/// # Errors
/// [`MountError::Background`]: the supervisor has been sent the reason.
pub(super) fn serve(
    paths: &MountPaths,
    read_topology: ReadTopology,
    version: &'static str,
) -> Result<(), MountError> {
    process::keep_heap_small();
    let failed = |source| io_error(&paths.conf_dir, "no supervisor has left its descriptors", source);
    let InheritedFds { device, handoff, lock, spare, kept } = InheritedFds::take().map_err(failed)?;
    // Moved, because a supervisor that this worker starts needs the number.
    let control = process::inherited_fd(fds::CONTROL).and_then(process::dup_above);
    let mut control = ControlSocket::from_fd(control.map_err(failed)?);
    [fds::CONTROL, fds::WORKER].into_iter().try_for_each(fds::reserve_fd).map_err(failed)?;
    let signals = setup::catch_signals()?;
    setup::log_with_time();
    messages::start_thread().map_err(failed)?;
    // If the supervisor has died already, the parent is another process.
    let parent = nix::unistd::getppid().as_raw() as u32;
    let supervisor = control.creator().filter(|creator| *creator == parent);
    let own = OwnProcesses { supervisor, cpus: None, read_topology: Some(read_topology), version };
    let Serving { engine, ended, unused, resends } =
        match start(paths, &device, &handoff, (lock, spare, kept), own) {
            Ok(serving) => serving,
            Err(error) => {
                control.send(&Message::Failed(error.to_string()));
                return Err(MountError::Background);
            }
        };
    control.send(&Message::Ready { resends });
    loop {
        let mut fds = [
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(control.as_fd(), PollFlags::POLLIN),
            PollFd::new(ended.as_fd(), PollFlags::POLLIN),
            PollFd::new(unused.as_fd(), PollFlags::POLLIN),
        ];
        let _ = poll(&mut fds, PollTimeout::NONE);
        let [signal, is_orphan, has_ended, is_unused] = fds.map(|fd| fd.any().unwrap_or(false));
        if has_ended {
            return Ok(());
        }
        if is_unused {
            let _ = unused.read();
            control.send(&Message::Unused);
        }
        if signal && let Ok(Some(info)) = signals.read_signal() {
            match Signal::try_from(info.ssi_signo as i32) {
                // The supervisor unmounts, and then kills this process.
                Ok(Signal::SIGTERM | Signal::SIGINT) if !is_orphan => control.send(&Message::Stop),
                Ok(Signal::SIGHUP) => {}
                _ => return Ok(()),
            }
        }
        // A supervisor sends no messages: it has died.
        if is_orphan {
            std::thread::sleep(ORPHAN_GRACE);
            process::collect_children();
            match start_supervisor(paths) {
                Ok((socket, pid)) => {
                    control = socket;
                    engine.set_supervisor(pid);
                }
                Err(error) => log::error!("no supervisor can be started: {error}"),
            }
        }
    }
}

/// A worker that serves.
struct Serving {
    engine: Arc<Engine>,
    /// Readable after the session has ended.
    ended: Arc<EventFd>,
    /// Readable when the mount is of no more use.
    unused: Arc<EventFd>,
    /// Whether the kernel sends unanswered requests to the next worker.
    resends: bool,
}

fn start(
    paths: &MountPaths,
    device: &OwnedFd,
    handoff: &HandoffMemfd,
    (lock, spare, kept): (StateLock, OwnedFd, KeptPidfds),
    own: OwnProcesses,
) -> Result<Serving, MountError> {
    let conf_dir = &paths.conf_dir;
    let handoff_failed = |source| io_error(conf_dir, "the supervisor's handoff state", source);
    let state = handoff.read().map_err(handoff_failed)?;
    let (journal, recovered) =
        StateDir::open(lock, &paths.state_dir, &clock::boot_id(), state.mount_id, Some(spare))?;
    let polls = recovered.polls.clone();
    let truncated = recovered.truncated.clone();
    let own = OwnProcesses { cpus: state.cpus.as_ref().and_then(|cpus| cpus.parse().ok()), ..own };
    let (engine, first_handle) = Engine::start(journal, recovered, state.topology.clone(), own, kept)
        .map_err(|error| MountError::Start(error.to_string()))?;
    let engine = Arc::new(engine);
    if let Some(layout) = &state.import {
        import::take_over(&engine, layout)
            .map_err(|source| io_error(layout, "cannot be imported", source))?;
    }
    let files = OpenFiles::new(first_handle, &polls, &truncated);
    let is_first = state.init.is_none();
    let (session, init) = Session::open(Arc::clone(&engine), files, device, state.init.clone())
        .map_err(|source| io_error(conf_dir, "the FUSE handshake failed", source))?;
    let state = HandoffState { init: Some(init), import: None, ..state };
    let resends = state.resends();
    if is_first {
        handoff.write(&state).map_err(handoff_failed)?;
    }
    let ended = EventFd::new().map_err(|errno| io_error(conf_dir, "no eventfd", errno.into()))?;
    let ended = Arc::new(ended);
    let unused = EventFd::new().map_err(|errno| io_error(conf_dir, "no eventfd", errno.into()))?;
    let unused = Arc::new(unused);
    let waker = session.poll_waker();
    if !is_first {
        log::debug!("the kernel sends unanswered requests again");
        request_resend(device)
            .map_err(|source| io_error(conf_dir, "the kernel does not send requests again", source))?;
    }
    // The refresher first: an answer that is repeated waits for it.
    start_refresher(&engine, conf_dir)
        .and_then(|()| start_threads(&engine, session, &ended))
        .and_then(|()| start_remover(&engine, conf_dir, state.until_unused, &unused))
        .map_err(|source| io_error(conf_dir, "cannot start a thread", source))?;
    if is_first {
        // Never report a mount as ready that does not answer.
        fs::symlink_metadata(conf_dir.join("self/claim"))
            .map_err(|source| io_error(conf_dir, "does not answer", source))?;
    } else {
        // Clients that waited in poll(2) when the last worker died must poll again.
        for (_, poll_handle) in polls {
            waker.wake(poll_handle);
        }
    }
    log::info!("{}: served by {}", conf_dir.display(), std::process::id());
    Ok(Serving { engine, ended, unused, resends })
}

fn start_threads(engine: &Arc<Engine>, session: Session, ended: &Arc<EventFd>) -> io::Result<()> {
    let notifier = Arc::clone(engine);
    std::thread::Builder::new().name("kcm-notify".into()).spawn(move || notifier.notify_forever())?;
    let searcher = Arc::clone(engine);
    std::thread::Builder::new().name("kcm-search".into()).spawn(move || searcher.search_forever())?;
    let looker = Arc::clone(engine);
    std::thread::Builder::new().name("kcm-masks".into()).spawn(move || {
        let uevents = Uevents::new();
        if let Err(error) = &uevents {
            log::warn!("CPUs that come and go are noticed late: {error}");
        }
        let uevents = uevents.ok();
        let have_changed = || uevents.as_ref().is_some_and(Uevents::have_cpus_changed);
        looker.watch_masks_forever(uevents.as_ref().map(|uevents| (uevents.as_fd(), &have_changed as _)));
    })?;
    let keeper = Arc::clone(engine);
    std::thread::Builder::new()
        .name("kcm-partitions".into())
        .spawn(move || keeper.keep_partitions_forever())?;
    let flusher = Arc::clone(engine);
    std::thread::Builder::new().name("kcm-flush".into()).spawn(move || flusher.flush_forever())?;
    let ended = Arc::clone(ended);
    std::thread::Builder::new().name("kcm-session".into()).spawn(move || {
        if let Err(error) = session.run() {
            log::error!("the session ended: {error}");
        }
        let _ = ended.write(1);
    })?;
    Ok(())
}

/// Starts the thread that removes what is unused in transient pools. `ends`: whether the mount ends without pools;
/// `unused` is written then.
fn start_remover(engine: &Arc<Engine>, conf_dir: &Path, ends: bool, unused: &Arc<EventFd>) -> io::Result<()> {
    let (engine, unused, pools) = (Arc::clone(engine), Arc::clone(unused), conf_dir.join("pools"));
    let remove = move |what: &Unused| match what {
        Unused::Mount => drop(unused.write(1)),
        Unused::Directory(directory) => {
            let answer = process::rmdir_in_child(&pools.join(directory), REMOVAL_TIMEOUT);
            log::debug!("{directory} is unused; removing it: {answer:?}");
        }
    };
    let forever = move || engine.remove_unused_forever(ends, remove);
    std::thread::Builder::new().name("kcm-transient".into()).spawn(forever)?;
    Ok(())
}

/// Starts the thread that lets the kernel look at names that have changed without it. The question of a child process is
/// enough: the kernel asks the daemon again, and forgets what is not there any more.
fn start_refresher(engine: &Arc<Engine>, conf_dir: &Path) -> io::Result<()> {
    let (engine, pools) = (Arc::clone(engine), conf_dir.join("pools"));
    let look = move |path: &str| {
        let answer = process::stat_in_child(&pools.join(path), REMOVAL_TIMEOUT);
        log::debug!("{path:?} has changed; the kernel has looked again: {answer:?}");
    };
    let forever = move || engine.refresh_forever(look);
    std::thread::Builder::new().name("kcm-refresh".into()).spawn(forever)?;
    Ok(())
}

/// Starts a supervisor that continues for the one that has died. Returns this worker's end of the control socket, and
/// the supervisor's PID.
fn start_supervisor(paths: &MountPaths) -> io::Result<(ControlSocket, u32)> {
    log::warn!("the supervisor has died; starting a new one");
    let (ours, theirs) = ControlSocket::pair()?;
    let control = theirs.install()?;
    let worker = fds::install_fd_at(PidFd::open(std::process::id())?.into_fd(), fds::WORKER)?;
    let mut command = paths.role_command(Path::new(THIS_PROGRAM), Role::Supervisor { replace_worker: false });
    let started = command.stdin(Stdio::null()).spawn();
    drop((control, worker));
    fds::reserve_fd(fds::CONTROL)?;
    fds::reserve_fd(fds::WORKER)?;
    Ok((ours, started?.id()))
}
