//! The daemon: puts the parts together, mounts, serves, and ends cleanly.
//!
//! Owns: umount(2), signals, readiness, and the order of starting and stopping. Must not know: what is served.

mod place;
mod service;

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::clock;
use crate::handover::{self, Control, LetterBox};
use crate::journal::{StateError, StateLock};
use crate::keeper::{End, Held, Keeper};
use crate::model::topology::Topology;
use crate::mountpoint;
use crate::process::{self, Handle};
use crate::upgrade;
pub use crate::upgrade::upgrade;
use place::Found;
pub(crate) use place::{mount_device, new_mount_id};

/// Tells a daemon that it runs in the background: it says on its standard output when it serves, and from then
/// on writes to a log.
const BACKGROUND: &str = "KCM_MOUNT_BACKGROUND";
/// Tells the daemon from the command that starts it.
const FOREGROUND: &str = "--foreground";
/// How long unmounting waits for the daemon to end.
const STOPPING: Duration = Duration::from_secs(10);
/// A log that is larger than this is moved aside at the next start.
const MAX_LOG: u64 = 1 << 20;

static WRITES_TO_LOG: AtomicBool = AtomicBool::new(false);

/// What is mounted where, and where it is remembered.
#[derive(Clone, Debug)]
pub struct Places {
    /// The mount point.
    pub conf_dir: PathBuf,
    /// Where configuration and claims are kept.
    pub state_dir: PathBuf,
}

impl Places {
    /// A command that starts a process of the daemon: `ps` is to say what it serves.
    pub(crate) fn command(&self, mut command: Command) -> Command {
        command.arg0("kcm").args(["mount", FOREGROUND]);
        command.arg(self.flag()).arg(flag("--state-dir=", &self.state_dir));
        command
    }

    /// As other processes may know them, too.
    fn absolute(&self) -> io::Result<Self> {
        let conf_dir = mountpoint::resolved(&self.conf_dir);
        Ok(Self { conf_dir, state_dir: std::path::absolute(&self.state_dir)? })
    }

    /// The flag by which the processes of a daemon are found.
    fn flag(&self) -> OsString {
        flag("--conf-dir=", &self.conf_dir)
    }
}

fn flag(name: &str, path: &Path) -> OsString {
    let mut flag = OsString::from(name);
    flag.push(path);
    flag
}

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

/// Why the directory cannot be mounted or unmounted; each with its cure.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the message says it")]
pub enum MountError {
    #[error("only root can mount {0}; run kcm mount as root")]
    NotRoot(PathBuf),
    #[error("/dev/fuse: {0}; load the module (modprobe fuse), or give the container the device")]
    NoFuse(io::Error),
    #[error("{0}: not an empty directory; kcm mount --import takes a layout of 2017 over, else empty it")]
    NotEmpty(PathBuf),
    #[error("{0}: already mounted; kcm unmount ends that first")]
    AlreadyMounted(PathBuf),
    #[error(
        "{0}: mounted, but its daemon does not answer; kill the daemon, then kcm mount takes the mount over"
    )]
    NotAnswering(PathBuf),
    #[error("{0}: not mounted; nothing to do")]
    NotMounted(PathBuf),
    #[error("{state}: lies inside {conf}, which it would be hidden by; give another --state-dir")]
    StateInside { state: PathBuf, conf: PathBuf },
    #[error(transparent)]
    State(#[from] StateError),
    // The cause stands before the cure; as the source it would be told once more behind it.
    #[error("{path}: {what}: {cause}; {cure}")]
    Io { path: PathBuf, what: &'static str, cause: io::Error, cure: &'static str },
    #[error("{0}: detached here, but its daemon goes on, perhaps in another mount namespace; stop it there")]
    StillServed(PathBuf),
    #[error("cannot start: {0}")]
    Start(String),
    #[error("not upgraded, the old daemon goes on: {0}")]
    NotUpgraded(String),
    /// The daemon in the background has said why.
    #[error("the daemon did not start; its message stands above")]
    Background,
}

/// Whether standard error is the daemon's log: there is no person at the other end any more.
#[must_use]
pub fn writes_to_log() -> bool {
    WRITES_TO_LOG.load(Ordering::Relaxed)
}

/// The time as a log shows it: RFC 3339 in UTC, to the millisecond.
#[must_use]
pub fn timestamp() -> String {
    clock::rfc3339_ms(clock::wall_ms())
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
            let stored = service::take_stored();
            process::close_inherited(&stored.each_ref().map(Option::as_ref));
            handover::reserve_all().map_err(|source| at(conf_dir, "no descriptors", source))?;
            keep(places, topology, import, stored)
        }
        Part::Adopt { replace } => adopt(places, replace),
        Part::Work => crate::worker::work(places),
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
    let signals = catch_signals()?;
    let found = place::find(places, import, stored)?;
    let conf_dir = &places.conf_dir;
    let conf_dir = conf_dir.canonicalize().map_err(|source| at(conf_dir, "cannot be resolved", source))?;
    let state_dir = &places.state_dir;
    let state_dir = state_dir.canonicalize().map_err(|source| at(state_dir, "cannot be resolved", source))?;
    let places = Places { conf_dir, state_dir };
    let (held, is_ours) = match found {
        Found::Mount(held) => (held, false),
        Found::Place { lock, layout } => (place::mount_fresh(&places, topology, lock, layout)?, true),
    };
    let in_background = std::env::var_os(BACKGROUND).is_some();
    if in_background {
        // Before there is a worker, which stays in our session.
        let _ = nix::unistd::setsid();
    }
    settle_in();
    let log = in_background.then(|| open_log(&places.state_dir.join("log")));
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
    let signals = catch_signals()?;
    let take = |number| process::inherited(number).map_err(failed);
    let held = Held {
        device: take(handover::DEVICE)?,
        letters: LetterBox::from_fd(take(handover::LETTER)?),
        lock: StateLock::from_fd(take(handover::LOCK)?),
    };
    // What workers are to inherit lies under its number already; these two are ours alone.
    let mine = |number| take(number).and_then(|fd| process::move_away(fd).map_err(failed));
    let control = Control::from_fd(mine(handover::CONTROL)?);
    let worker = Handle::from_fd(mine(handover::WORKER)?);
    handover::reserve(handover::CONTROL).map_err(failed)?;
    handover::reserve(handover::WORKER).map_err(failed)?;
    if std::env::var_os(BACKGROUND).is_some() {
        log_with_time();
    }
    let mut keeper = Keeper::new(places.clone(), held, signals)?;
    keeper.adopt(worker, control).map_err(failed)?;
    if replace {
        keeper.finish_upgrade();
    }
    let kept = keeper.keep(service::say_ready);
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
        service::forget_stored();
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
    let daemons: Vec<Handle> = processes_of(&mountpoint::resolved(conf_dir))
        .into_iter()
        .filter_map(|pid| Handle::open(pid).ok())
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

/// The processes of the daemon that serves this directory, as far as they can be seen from here.
pub(crate) fn processes_of(conf_dir: &Path) -> Vec<u32> {
    let flag = flag("--conf-dir=", conf_dir);
    let entries = std::fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let serves = |pid: &u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = line.split(|&b| b == 0).skip(1).collect();
        let has = |wanted: &[u8]| words.contains(&wanted);
        has(b"mount") && has(FOREGROUND.as_bytes()) && has(flag.as_bytes())
    };
    pids.filter(|pid| *pid != std::process::id()).filter(serves).collect()
}

pub(crate) fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// From here on nobody else gets the signals that mean something to us.
pub(crate) fn catch_signals() -> Result<SignalFd, MountError> {
    let mut mask = SigSet::empty();
    mask.extend([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGUSR1]);
    let caught = mask.thread_block().and_then(|()| SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC));
    caught.map_err(|errno| MountError::Start(format!("cannot catch signals: {errno}")))
}

/// What a daemon does once: nobody's directory is kept busy, and memory is found elsewhere first.
fn settle_in() {
    let _ = nix::unistd::chdir("/");
    nix::sys::stat::umask(nix::sys::stat::Mode::empty());
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-900") {
        log::warn!("/proc/self/oom_score_adj: {error}; the daemon may be killed for memory before others");
    }
}

/// From here on messages have the time before them.
pub(crate) fn log_with_time() {
    WRITES_TO_LOG.store(std::env::var_os(BACKGROUND).is_some(), Ordering::Relaxed);
}

/// Tells whoever waits for the mount. In the background, our output goes to the log from here on.
fn say_ready(keeper: &Keeper, log: Option<io::Result<File>>) {
    service::say_ready(keeper);
    let Some(log) = log else { return };
    let _ = io::stdout().write_all(b"ready\n").and_then(|()| io::stdout().flush());
    if let Ok(null) = OpenOptions::new().read(true).write(true).open("/dev/null") {
        let _ = nix::unistd::dup2_stdout(&null);
        let _ = nix::unistd::dup2_stderr(log.as_ref().unwrap_or(&null));
        log_with_time();
    }
}

fn open_log(path: &Path) -> io::Result<File> {
    if path.metadata().is_ok_and(|log| log.len() > MAX_LOG) {
        let _ = std::fs::rename(path, path.with_extension("old"));
    }
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

pub(crate) fn at(path: &Path, what: &'static str, cause: io::Error) -> MountError {
    let cure = match cause.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EPERM | Errno::EACCES) => "do it as root, and look at the directory's owner and mode",
        Some(Errno::ENOSPC) => "make room on the disk",
        Some(Errno::EBUSY) => "something is mounted there or uses it; end that first",
        Some(Errno::ENOTDIR | Errno::EEXIST) => "give a directory",
        Some(Errno::ENOENT) => "look at the path",
        _ => "the kernel's log may say more",
    };
    MountError::Io { path: path.to_path_buf(), what, cause, cure }
}
