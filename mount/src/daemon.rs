//! The daemon: puts the parts together, mounts, serves, and ends cleanly.
//!
//! Owns: mount(2) and umount(2), signals, readiness, and the order of starting and stopping. Must not know:
//! what is served.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fuser::{Config, Session, SessionACL};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::engine::Engine;
use crate::fs::Fs;
use crate::import;
use crate::journal::{StateDir, StateError};
use crate::model::topology::Topology;
use crate::mountpoint::{self, Status};

/// How many requests are worked on at a time: a slow one must not stall the others.
const THREADS: usize = 4;
/// Tells a daemon that was started in the background to say on its standard output that it serves.
const BACKGROUND: &str = "KCM_MOUNT_BACKGROUND";
/// How long unmounting waits for the daemon to end.
const STOPPING: Duration = Duration::from_secs(10);
/// A log that is larger than this is moved aside at the next start.
const MAX_LOG: u64 = 1 << 20;

static WRITES_TO_LOG: AtomicBool = AtomicBool::new(false);

/// What to mount where.
#[derive(Clone, Debug)]
pub struct Options {
    /// The mount point.
    pub conf_dir: PathBuf,
    /// Where configuration and claims are kept.
    pub state_dir: PathBuf,
    /// The machine.
    pub topology: Topology,
    /// Whether a layout of 2017 that lies in the mount point is taken over.
    pub import: bool,
}

/// Why the directory cannot be mounted or unmounted; each with its cure.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the message says it")]
pub enum MountError {
    #[error("only root can mount {0}; run kcm mount as root")]
    NotRoot(PathBuf),
    #[error("/dev/fuse: {0}; load the module (modprobe fuse), or give the container the device")]
    NoFuse(#[source] io::Error),
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
    #[error("{path}: {what}: {source}; {cure}")]
    Io { path: PathBuf, what: &'static str, source: io::Error, cure: &'static str },
    #[error("{0}: detached here, but its daemon goes on, perhaps in another mount namespace; stop it there")]
    StillServed(PathBuf),
    #[error("cannot start: {0}")]
    Start(String),
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
    crate::clock::rfc3339_ms(crate::clock::wall_ms())
}

/// Starts the daemon in the background with the arguments `args`, and returns once the mount answers.
///
/// # Errors
/// [`MountError::Background`] where the daemon has ended with an error, which it has written to our standard
/// error itself.
pub fn start_in_background(args: &[std::ffi::OsString]) -> Result<(), MountError> {
    let executable = PathBuf::from("/proc/self/exe");
    let failed = |source| MountError::Io {
        path: executable.clone(),
        what: "cannot start the daemon",
        source,
        cure: "look at the limits of processes and memory",
    };
    let mut command = Command::new(&executable);
    command.arg0("kcm").args(args).env(BACKGROUND, "1").stdin(Stdio::null()).stdout(Stdio::piped());
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

/// Mounts and serves until it is unmounted or told to end.
///
/// # Errors
/// Whatever keeps it from serving; nothing is mounted then.
pub fn serve(options: &Options) -> Result<(), MountError> {
    let Options { conf_dir, state_dir, .. } = options;
    if !nix::unistd::geteuid().is_root() {
        return Err(MountError::NotRoot(conf_dir.clone()));
    }
    crate::process::close_inherited();
    let background = std::env::var_os(BACKGROUND).is_some();
    // The kernel keeps requests for us from mount(2) on, so signals must be ours before it.
    let signals = catch_signals()?;
    let import = prepare(options)?;
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let (state, recovered) = StateDir::open(state_dir, boot_id.trim())?;
    let conf_dir = conf_dir.canonicalize().map_err(|source| at(conf_dir, "cannot be resolved", source))?;
    let (engine, first_handle) = Engine::start(state, recovered, options.topology.clone())
        .map_err(|error| MountError::Start(error.to_string()))?;
    let engine = Arc::new(engine);
    if let Some(layout) = import {
        import::take_over(&engine, &layout, &conf_dir)
            .map_err(|source| at(&conf_dir, "cannot be moved aside", source))?;
    }
    if let Err(error) = mountpoint::mark(&conf_dir) {
        log::warn!(
            "{}: cannot be marked as a mount point: {error}; without a daemon, tools will take it for empty",
            conf_dir.display()
        );
    }
    settle_in();
    let device = mount_device(&conf_dir)?;
    let served =
        run(&engine, first_handle, device, &conf_dir, &signals, background.then_some(state_dir.as_path()));
    // Detached, not waited for: whoever still has files open gets ENOTCONN from now on.
    let _ = umount2(&conf_dir, MntFlags::MNT_DETACH);
    log::info!("{}: no longer served", conf_dir.display());
    served
}

/// Ends the mount cleanly and waits until its daemon has gone.
///
/// # Errors
/// Not mounted, not root, or served by a daemon that cannot be reached from here.
pub fn unmount(conf_dir: &Path) -> Result<(), MountError> {
    if !mountpoint::is_mounted(conf_dir).map_err(|source| at(conf_dir, "cannot be looked at", source))? {
        return Err(MountError::NotMounted(conf_dir.to_path_buf()));
    }
    // Opened before: after the detaching it is our only way to see whether somebody still serves.
    let witness = File::open(conf_dir.join("lock")).ok();
    while mountpoint::is_mounted(conf_dir).unwrap_or(false) {
        match umount2(conf_dir, MntFlags::MNT_DETACH) {
            Ok(()) => {}
            Err(Errno::EPERM) => return Err(MountError::NotRoot(conf_dir.to_path_buf())),
            Err(errno) => return Err(at(conf_dir, "cannot be unmounted", errno.into())),
        }
    }
    let deadline = Instant::now() + STOPPING;
    while witness.as_ref().is_some_and(|lock| io::Read::read(&mut &*lock, &mut [0]).is_ok()) {
        if Instant::now() > deadline {
            return Err(MountError::StillServed(conf_dir.to_path_buf()));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Makes the mount point ready, or says why not. Gives the layout that is to be imported.
fn prepare(options: &Options) -> Result<Option<import::Layout>, MountError> {
    let Options { conf_dir, state_dir, .. } = options;
    if absolute(state_dir).starts_with(absolute(conf_dir)) {
        return Err(MountError::StateInside { state: state_dir.clone(), conf: conf_dir.clone() });
    }
    loop {
        let status =
            mountpoint::status(conf_dir).map_err(|source| at(conf_dir, "cannot be looked at", source))?;
        match status {
            Status::Live => return Err(MountError::AlreadyMounted(conf_dir.clone())),
            Status::NotAnswering => return Err(MountError::NotAnswering(conf_dir.clone())),
            Status::Stale => {
                log::warn!("{}: taking over a mount whose daemon has died", conf_dir.display());
                umount2(conf_dir, MntFlags::MNT_DETACH)
                    .map_err(|errno| at(conf_dir, "cannot be detached", errno.into()))?;
            }
            Status::Absent => {
                std::fs::create_dir_all(conf_dir).map_err(|source| at(conf_dir, "cannot be made", source))?;
                return Ok(None);
            }
            Status::Marked | Status::Plain => break,
        }
    }
    let mut entries = std::fs::read_dir(conf_dir).map_err(|source| at(conf_dir, "cannot be read", source))?;
    match (entries.next().is_some(), options.import) {
        (false, _) => Ok(None),
        (true, false) => Err(MountError::NotEmpty(conf_dir.clone())),
        (true, true) => import::Layout::read(conf_dir)
            .map(Some)
            .map_err(|source| at(conf_dir, "is no layout of 2017", source)),
    }
}

fn mount_device(conf_dir: &Path) -> Result<OwnedFd, MountError> {
    use std::os::fd::AsRawFd as _;
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse").map_err(MountError::NoFuse)?;
    let data = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions",
        device.as_raw_fd()
    );
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_NOATIME;
    match mount(Some("kcm"), conf_dir, Some("fuse.kcm"), flags, Some(data.as_str())) {
        Ok(()) => Ok(device.into()),
        Err(Errno::EPERM) => Err(MountError::NotRoot(conf_dir.to_path_buf())),
        Err(errno) => Err(at(conf_dir, "cannot be mounted", errno.into())),
    }
}

/// Serves until a signal, an unmount, or an error of the session ends it. `log_to`: the state directory,
/// where this daemon was started in the background.
fn run(
    engine: &Arc<Engine>,
    first_handle: u32,
    device: OwnedFd,
    conf_dir: &Path,
    signals: &SignalFd,
    log_to: Option<&Path>,
) -> Result<(), MountError> {
    let mut config = Config::default();
    config.n_threads = Some(THREADS);
    let filesystem = Fs::new(Arc::clone(engine), first_handle);
    let session = Session::from_fd(filesystem, device, SessionACL::All, config)
        .map_err(|source| at(conf_dir, "the kernel does not talk FUSE with us", source))?;
    let ended =
        nix::sys::eventfd::EventFd::new().map_err(|errno| at(conf_dir, "no eventfd", errno.into()))?;
    let ended = Arc::new(ended);
    let notifier = Arc::clone(engine);
    let tell = Arc::clone(&ended);
    let threads = [
        std::thread::Builder::new().name("kcm-notify".into()).spawn(move || notifier.notify_forever()),
        std::thread::Builder::new().name("kcm-session".into()).spawn(move || {
            if let Err(error) = session.run() {
                log::error!("the session ended: {error}");
            }
            let _ = tell.write(1);
        }),
    ];
    for thread in threads {
        thread.map_err(|source| at(conf_dir, "cannot start a thread", source))?;
    }
    // By our own hand, so that "ready" is never said of a mount that does not answer.
    std::fs::symlink_metadata(conf_dir.join("info/version"))
        .map_err(|source| at(conf_dir, "does not answer", source))?;
    log::info!("{}: served by {}", conf_dir.display(), std::process::id());
    say_ready(log_to);
    wait_for_the_end(conf_dir, signals, &ended)
}

fn wait_for_the_end(
    conf_dir: &Path,
    signals: &SignalFd,
    ended: &nix::sys::eventfd::EventFd,
) -> Result<(), MountError> {
    let mounts = File::open("/proc/self/mountinfo")
        .map_err(|source| at(conf_dir, "no /proc/self/mountinfo", source))?;
    loop {
        let mut fds = [
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(ended.as_fd(), PollFlags::POLLIN),
            // Reports each change of the mount table: that is how umount(8) by hand is noticed while
            // somebody still has files open.
            PollFd::new(mounts.as_fd(), PollFlags::POLLPRI),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(at(conf_dir, "cannot wait", errno.into())),
            Ok(_) => {}
        }
        let [signal, end, table] = fds.map(|fd| fd.any().unwrap_or(false));
        if signal || end || (table && !mountpoint::is_mounted(conf_dir).unwrap_or(true)) {
            return Ok(());
        }
    }
}

fn catch_signals() -> Result<SignalFd, MountError> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGTERM);
    mask.add(Signal::SIGINT);
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

/// Tells whoever waits for the mount. In the background, our output goes to a log from here on.
fn say_ready(log_to: Option<&Path>) {
    if let Err(error) = sd_notify::notify(false, &[sd_notify::NotifyState::Ready]) {
        log::warn!("the service manager cannot be told: {error}");
    }
    let Some(state_dir) = log_to else { return };
    let _ = nix::unistd::setsid();
    let log = open_log(&state_dir.join("log"));
    let null = OpenOptions::new().read(true).write(true).open("/dev/null");
    let _ = io::stdout().write_all(b"ready\n").and_then(|()| io::stdout().flush());
    if let Ok(null) = null {
        let _ = nix::unistd::dup2_stdout(&null);
        let _ = nix::unistd::dup2_stderr(log.as_ref().unwrap_or(&null));
        WRITES_TO_LOG.store(true, Ordering::Relaxed);
    }
}

fn open_log(path: &Path) -> io::Result<File> {
    if path.metadata().is_ok_and(|log| log.len() > MAX_LOG) {
        let _ = std::fs::rename(path, path.with_extension("old"));
    }
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

/// An absolute path without `.` and `..`, links resolved as far as it exists.
fn absolute(path: &Path) -> PathBuf {
    let whole = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    let mut rest = Vec::new();
    let mut known = whole.as_path();
    loop {
        if let Ok(resolved) = known.canonicalize() {
            return rest.iter().rev().fold(resolved, |path, name| path.join(name));
        }
        match (known.parent(), known.file_name()) {
            (Some(parent), Some(name)) => {
                rest.push(name.to_owned());
                known = parent;
            }
            _ => return whole,
        }
    }
}

fn at(path: &Path, what: &'static str, source: io::Error) -> MountError {
    let cure = match source.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EPERM | Errno::EACCES) => "do it as root, and look at the directory's owner and mode",
        Some(Errno::ENOSPC) => "make room on the disk",
        Some(Errno::EBUSY) => "something is mounted there or uses it; end that first",
        Some(Errno::ENOTDIR | Errno::EEXIST) => "give a directory",
        Some(Errno::ENOENT) => "look at the path",
        _ => "the kernel's log may say more",
    };
    MountError::Io { path: path.to_path_buf(), what, source, cure }
}
