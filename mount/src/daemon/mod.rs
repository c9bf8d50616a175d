//! The daemon: puts the parts together, mounts, serves, and ends cleanly.
//!
//! Owns: umount(2), signals, readiness, and the order of starting and stopping. Must not know: what is served.

mod error;
mod fds;
mod mount;
mod paths;
mod setup;
mod supervisor;
mod systemd;
mod takeover;
mod upgrade;
mod watchdog;
mod worker;

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

use crate::journal::StateLock;
use crate::model::topology::Topology;
use crate::mountpoint;
use crate::process::{self, PidFd};
use error::at;
use fds::{Control, Held, LetterBox};
use setup::BACKGROUND;
use supervisor::{End, Keeper};
use takeover::Found;

pub use error::MountError;
pub use paths::Places;
pub use setup::{timestamp, writes_to_log};
pub use upgrade::upgrade;

/// How long unmounting waits for the daemon to end.
const STOPPING: Duration = Duration::from_secs(10);
/// What a process of the daemon is for.
#[derive(Clone, Debug)]
pub enum Part {
    /// Mounts and keeps the mount.
    Keep {
        /// The machine.
        topology: Topology,
        /// Whether a layout of 2017 that lies in the mount point is taken over.
        import: bool,
    },
    /// Takes the place of another keeper.
    Adopt {
        /// Whether the worker is replaced, too.
        replace: bool,
    },
    /// Serves, for a keeper.
    Work,
    /// Says whether the state can be read.
    Prove,
    /// Asks the mount something that only its daemon can answer.
    Probe,
}

/// Starts the daemon in the background, and returns once the mount answers.
///
/// # Errors
/// [`MountError::Background`] where the daemon has ended with an error, which it has written to our standard
/// error itself.
pub fn start_in_background(places: &Places, import: bool) -> Result<(), MountError> {
    let executable = PathBuf::from("/proc/self/exe");
    let failed = |cause| MountError::Io {
        path: executable.clone(),
        what: "cannot start the daemon",
        cause,
        cure: "look at the limits of processes and memory",
    };
    let mut command = places.absolute().map_err(failed)?.command(Command::new(&executable));
    command.args(import.then_some("--import"));
    command.env(BACKGROUND, "1").stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().map_err(failed)?;
    let mut answer = String::new();
    if let Some(mut stdout) = child.stdout.take() {
        io::Read::read_to_string(&mut stdout, &mut answer).map_err(failed)?;
    }
    if answer == "ready\n" {
        return Ok(());
    }
    let _ = child.wait();
    Err(MountError::Background)
}

/// Does the part of a process of the daemon; returns when it is done.
///
/// # Errors
/// Whatever keeps it from it; nothing is mounted then that was not before.
pub fn run(places: &Places, part: Part) -> Result<(), MountError> {
    let conf_dir = &places.conf_dir;
    if !nix::unistd::geteuid().is_root() {
        return Err(MountError::NotRoot(conf_dir.clone()));
    }
    // Not what it is called by the way in which it was started.
    let _ = nix::sys::prctl::set_name(c"kcm");
    match part {
        Part::Keep { topology, import } => {
            let places = &places.absolute().map_err(|source| at(conf_dir, "cannot be resolved", source))?;
            if !std::env::args_os().any(|arg| arg == places.flag()) {
                // Whatever was typed: the command line is to say what is served.
                let error =
                    places.command(Command::new("/proc/self/exe")).args(import.then_some("--import")).exec();
                return Err(at(conf_dir, "cannot be served", error));
            }
            let stored = systemd::take_stored();
            process::close_inherited(&stored.each_ref().map(Option::as_ref));
            fds::reserve_all().map_err(|source| at(conf_dir, "no descriptors", source))?;
            keep(places, topology, import, stored)
        }
        Part::Adopt { replace } => adopt(places, replace),
        Part::Work => worker::work(places),
        Part::Prove => upgrade::give_proof(&places.state_dir),
        Part::Probe => {
            std::fs::symlink_metadata(conf_dir.join("self/claim"))
                .map_err(|source| at(conf_dir, "does not answer", source))?;
            Ok(())
        }
    }
}

/// Mounts, or goes on with a mount that somebody else has held; then keeps it.
fn keep(
    places: &Places,
    topology: Topology,
    import: bool,
    stored: [Option<OwnedFd>; 2],
) -> Result<(), MountError> {
    // The kernel keeps requests for us from mount(2) on, so signals must be ours before it.
    let signals = setup::catch_signals()?;
    let found = takeover::find(places, import, stored)?;
    let conf_dir = &places.conf_dir;
    let conf_dir = conf_dir.canonicalize().map_err(|source| at(conf_dir, "cannot be resolved", source))?;
    let state_dir = &places.state_dir;
    let state_dir = state_dir.canonicalize().map_err(|source| at(state_dir, "cannot be resolved", source))?;
    let places = Places { conf_dir, state_dir };
    let (held, is_ours) = match found {
        Found::Mount(held) => (held, false),
        Found::Place { lock, layout } => (takeover::mount_fresh(&places, topology, lock, layout)?, true),
    };
    let in_background = std::env::var_os(BACKGROUND).is_some();
    if in_background {
        // Before there is a worker, which stays in our session.
        let _ = nix::unistd::setsid();
    }
    setup::settle_in();
    let log = in_background.then(|| setup::open_log(&places.state_dir.join("log")));
    let mut keeper = Keeper::new(places.clone(), held, signals)?;
    if let Some(log) = &log {
        keeper.log_workers_to(log.as_ref().ok());
    }
    let kept = keeper.keep(|keeper| say_ready(keeper, log));
    finish(&places.conf_dir, &mut keeper, kept, is_ours)
}

/// Takes the place of a keeper that has died or has become this program.
fn adopt(places: &Places, replace: bool) -> Result<(), MountError> {
    let failed = |source| at(&places.conf_dir, "no keeper has left its descriptors", source);
    let signals = setup::catch_signals()?;
    let take = |number| process::inherited_fd(number).map_err(failed);
    let held = Held {
        device: take(fds::DEVICE)?,
        letters: LetterBox::from_fd(take(fds::LETTER)?),
        lock: StateLock::from_fd(take(fds::LOCK)?),
    };
    // What workers are to inherit lies under its number already; these two are ours alone.
    let mine = |number| take(number).and_then(|fd| process::dup_above(fd).map_err(failed));
    let control = Control::from_fd(mine(fds::CONTROL)?);
    let worker = PidFd::from_fd(mine(fds::WORKER)?);
    fds::reserve(fds::CONTROL).map_err(failed)?;
    fds::reserve(fds::WORKER).map_err(failed)?;
    if std::env::var_os(BACKGROUND).is_some() {
        setup::log_with_time();
    }
    let mut keeper = Keeper::new(places.clone(), held, signals)?;
    keeper.adopt(worker, control).map_err(failed)?;
    if replace {
        keeper.finish_upgrade();
    }
    let kept = keeper.keep(|keeper| systemd::say_ready(keeper.held()));
    finish(&places.conf_dir, &mut keeper, kept, true)
}

fn finish(
    conf_dir: &Path,
    keeper: &mut Keeper,
    kept: Result<End, MountError>,
    is_ours: bool,
) -> Result<(), MountError> {
    if matches!(kept, Ok(End::Stop)) || (kept.is_err() && is_ours) {
        // Detached, not waited for: whoever still has files open gets ENOTCONN from now on. Where somebody else
        // has unmounted it, what is there now is none of ours.
        if mountpoint::is_mounted(conf_dir).unwrap_or(true) {
            let _ = umount2(conf_dir, MntFlags::MNT_DETACH);
        }
        systemd::forget_stored();
    }
    keeper.end_worker();
    if kept.is_ok() {
        log::info!("{}: no longer served", conf_dir.display());
    }
    kept.map(|_| ())
}

/// Ends the mount cleanly and waits until its daemon has gone.
///
/// # Errors
/// Not mounted, not root, or served by a daemon that does not end.
pub fn unmount(conf_dir: &Path) -> Result<(), MountError> {
    if !mountpoint::is_mounted(conf_dir).map_err(|source| at(conf_dir, "cannot be looked at", source))? {
        return Err(MountError::NotMounted(conf_dir.to_path_buf()));
    }
    let daemons: Vec<PidFd> = paths::processes_of(&mountpoint::resolved(conf_dir))
        .into_iter()
        .filter_map(|pid| PidFd::open(pid).ok())
        .collect();
    while mountpoint::is_mounted(conf_dir).unwrap_or(false) {
        match umount2(conf_dir, MntFlags::MNT_DETACH) {
            Ok(()) => {}
            Err(Errno::EPERM) => return Err(MountError::NotRoot(conf_dir.to_path_buf())),
            Err(errno) => return Err(at(conf_dir, "cannot be unmounted", errno.into())),
        }
    }
    // They notice it by themselves.
    if daemons.iter().all(|daemon| daemon.wait(STOPPING)) {
        Ok(())
    } else {
        Err(MountError::StillServed(conf_dir.to_path_buf()))
    }
}

/// Tells whoever waits for the mount. In the background, our output goes to the log from here on.
fn say_ready(keeper: &Keeper, log: Option<io::Result<File>>) {
    systemd::say_ready(keeper.held());
    let Some(log) = log else { return };
    let _ = io::stdout().write_all(b"ready\n").and_then(|()| io::stdout().flush());
    if let Ok(null) = OpenOptions::new().read(true).write(true).open("/dev/null") {
        let _ = nix::unistd::dup2_stdout(&null);
        let _ = nix::unistd::dup2_stderr(log.as_ref().unwrap_or(&null));
        setup::log_with_time();
    }
}
