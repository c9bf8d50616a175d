//! The worker: serves the mount on a descriptor that its keeper holds, and may die at any moment.
//!
//! Owns: the engine and the session with the kernel, and how both begin where an earlier worker was cut off.
//! Must not know: mount(2), or when it is started again.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nix::sys::signal::Signal;

use super::error::{MountError, at};
use super::fds::{self, Control, Letter, LetterBox, Message};
use super::paths::Places;
use super::setup;
use crate::clock;
use crate::engine::Engine;
use crate::fuse::{Session, request_resend};
use crate::handles::OpenFiles;
use crate::import;
use crate::journal::{StateDir, StateLock};
use crate::process::{self, PidFd};

/// How long a worker without a keeper waits before it makes itself a new one: whoever kills both means it.
const GRACE: Duration = Duration::from_millis(100);
/// Serves until the mount is gone or the keeper says so.
///
/// # Errors
/// [`MountError::Background`]: the keeper has been told what keeps it from serving.
pub(crate) fn work(places: &Places) -> Result<(), MountError> {
    process::keep_heap_small();
    let failed = |source| at(&places.conf_dir, "no keeper has left its descriptors", source);
    let device = process::inherited_fd(fds::DEVICE).map_err(failed)?;
    // Ours alone: its number is needed again for a keeper that we start.
    let control = process::inherited_fd(fds::CONTROL).and_then(process::dup_above);
    let control = Control::from_fd(control.map_err(failed)?);
    [fds::CONTROL, fds::WORKER].into_iter().try_for_each(fds::reserve).map_err(failed)?;
    let letters = LetterBox::from_fd(process::inherited_fd(fds::LETTER).map_err(failed)?);
    let lock = StateLock::from_fd(process::inherited_fd(fds::LOCK).map_err(failed)?);
    let signals = setup::catch_signals()?;
    setup::log_with_time();
    // Not simply our parent: where the keeper has died already, that is somebody else.
    let parent = nix::unistd::getppid().as_raw() as u32;
    let keeper = control.maker().filter(|maker| *maker == parent);
    let served = begin(places, &device, &letters, lock, keeper);
    let (engine, ended, resends) = match served {
        Ok(serving) => serving,
        Err(error) => {
            control.send(&Message::Failed(error.to_string()));
            return Err(MountError::Background);
        }
    };
    control.send(&Message::Ready { resends });
    let mut control = control;
    loop {
        let mut fds = [
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(control.as_fd(), PollFlags::POLLIN),
            PollFd::new(ended.as_fd(), PollFlags::POLLIN),
        ];
        let _ = poll(&mut fds, PollTimeout::NONE);
        let [signal, keeper, end] = fds.map(|fd| fd.any().unwrap_or(false));
        if end {
            return Ok(());
        }
        if signal && let Ok(Some(info)) = signals.read_signal() {
            match Signal::try_from(info.ssi_signo as i32) {
                // The mount is to end, and with it the keeper. It ends us, too.
                Ok(Signal::SIGTERM | Signal::SIGINT) if !keeper => control.send(&Message::Stop),
                Ok(Signal::SIGHUP) => {}
                _ => return Ok(()),
            }
        }
        if keeper {
            // It never says anything: it has died.
            std::thread::sleep(GRACE);
            process::collect_children();
            match start_keeper(places) {
                Ok((new, pid)) => {
                    control = new;
                    engine.set_supervisor(pid);
                }
                Err(error) => log::error!("no new keeper can be started: {error}"),
            }
        }
    }
}

/// What serves: the engine, a descriptor that tells when it no longer does, and whether the kernel gives
/// unanswered requests to the next worker.
type Serving = (Arc<Engine>, Arc<EventFd>, bool);

fn begin(
    places: &Places,
    device: &OwnedFd,
    letters: &LetterBox,
    lock: StateLock,
    keeper: Option<u32>,
) -> Result<Serving, MountError> {
    let conf_dir = &places.conf_dir;
    let letter = letters.read().map_err(|source| at(conf_dir, "the keeper's letter", source))?;
    let (state, recovered) = StateDir::open(lock, &places.state_dir, &clock::boot_id(), letter.mount)?;
    let polls = recovered.polls.clone();
    let rests = recovered.truncated.clone();
    let (engine, first_handle) = Engine::start(state, recovered, letter.topology.clone(), keeper)
        .map_err(|error| MountError::Start(error.to_string()))?;
    let engine = Arc::new(engine);
    if let Some(layout) = &letter.import {
        import::take_over(&engine, layout).map_err(|source| at(layout, "cannot be taken over", source))?;
    }
    let files = OpenFiles::new(first_handle, &polls, &rests);
    let is_first = letter.init.is_none();
    let (session, init) = Session::open(Arc::clone(&engine), files, device, letter.init.clone())
        .map_err(|source| at(conf_dir, "the kernel does not talk FUSE with us", source))?;
    let letter = Letter { init: Some(init), import: None, ..letter };
    let resends = letter.resends();
    if is_first {
        letters.write(&letter).map_err(|source| at(conf_dir, "the keeper's letter", source))?;
    }
    let ended = EventFd::new().map_err(|errno| at(conf_dir, "no eventfd", errno.into()))?;
    let ended = Arc::new(ended);
    let waker = session.poll_waker();
    if !is_first {
        // Before anything is read here: what has been read and not answered is sent again.
        request_resend(device).map_err(|source| at(conf_dir, "requests are not sent again", source))?;
    }
    start_threads(&engine, session, &ended)
        .map_err(|source| at(conf_dir, "cannot start a thread", source))?;
    if is_first {
        // By our own hand, so that "ready" is never said of a mount that does not answer.
        fs::symlink_metadata(conf_dir.join("self/claim"))
            .map_err(|source| at(conf_dir, "does not answer", source))?;
    } else {
        // Whoever waited in poll(2) through the worker that died is told to ask again. Those that have gone
        // the kernel does not know any more.
        for (_, kh) in polls {
            waker.wake(kh);
        }
    }
    log::info!("{}: served by {}", conf_dir.display(), std::process::id());
    Ok((engine, ended, resends))
}

fn start_threads(engine: &Arc<Engine>, session: Session, ended: &Arc<EventFd>) -> io::Result<()> {
    let (notifier, tell) = (Arc::clone(engine), Arc::clone(ended));
    std::thread::Builder::new().name("kcm-notify".into()).spawn(move || notifier.notify_forever())?;
    let flusher = Arc::clone(engine);
    std::thread::Builder::new().name("kcm-flush".into()).spawn(move || flusher.flush_forever())?;
    std::thread::Builder::new().name("kcm-session".into()).spawn(move || {
        if let Err(error) = session.run() {
            log::error!("the session ended: {error}");
        }
        let _ = tell.write(1);
    })?;
    Ok(())
}

/// A keeper that takes the place of the one that has died. Gives our end of its control, and its PID.
fn start_keeper(places: &Places) -> io::Result<(Control, u32)> {
    log::warn!("the keeper has died; a new one takes its place");
    let (ours, its) = Control::pair()?;
    let control = its.place()?;
    let worker = fds::place(PidFd::open(std::process::id())?.into_fd(), fds::WORKER)?;
    let started = places.command(Command::new("/proc/self/exe")).arg("--adopt").stdin(Stdio::null()).spawn();
    drop((control, worker));
    fds::reserve(fds::CONTROL)?;
    fds::reserve(fds::WORKER)?;
    Ok((ours, started?.id()))
}
