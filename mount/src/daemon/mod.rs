//! The daemon: mounts the directory, serves it, and stops cleanly.
//!
//! Owns the order of starting and stopping. Does not know what is served.
//!
//! A daemon is two processes. The supervisor (`kcm mount --foreground`) holds the FUSE device, so that the mount
//! outlives the worker; the worker (`kcm __daemon worker`) serves the requests. If one of them dies, the other one
//! starts it again.

mod args;
mod backoff;
mod error;
mod fds;
mod identity;
mod limits;
mod messages;
mod mount;
mod paths;
mod removal;
mod requirements;
mod role;
mod setup;
mod supervisor;
mod systemd;
mod takeover;
mod upgrade;
mod watchdog;
mod worker;
mod worker_process;

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

pub use crate::engine::ReadTopology;
use crate::journal::{StateLock, trust};
use crate::model::topology::Topology;
use crate::mountpoint;
use crate::process::{self, PidFd};
use error::io_error;
use fds::{ControlSocket, HandoffState, InheritedFds};
use paths::THIS_PROGRAM;
use supervisor::{Exit, Supervisor};
use takeover::Found;

pub use args::Invocation;
pub use error::MountError;
pub use messages::write as write_message;
pub use paths::MountPaths;
pub use removal::{Served, remove_state, served};
pub use role::Role;
pub use setup::{timestamp, writes_to_log};
pub use upgrade::upgrade;

/// How long `kcm unmount` waits for the daemon to exit. It exits within milliseconds unless the disk does not answer.
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);
/// The output of a daemon in the background when the mount answers.
const READY: &str = "ready\n";
/// The name of the daemon's processes in `ps`, whatever file they were started from.
const PROCESS_NAME: &std::ffi::CStr = c"kcm";

/// How much of a legacy layout is imported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Import {
    /// Everything, or nothing.
    Whole,
    /// What can be taken over.
    Partial,
}

/// How a daemon treats its directory.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Import the legacy layout that is in the mount point.
    pub import: Option<Import>,
    /// End when there are no pools, and remove the state directory. Without any pool from the start, that is after 10 s.
    pub until_unused: bool,
}

impl Options {
    /// The words for them on the command line.
    fn words(self) -> impl Iterator<Item = &'static str> {
        let import = self.import.map(|import| match import {
            Import::Whole => "--import",
            Import::Partial => "--import=partial",
        });
        let words = [import, self.until_unused.then_some("--until-unused")];
        words.into_iter().flatten()
    }
}

/// Starts the daemon in the background, and returns when the mount answers.
///
/// # Errors
/// [`MountError::Background`]: the daemon has ended, and has written the reason to this process's standard error.
pub fn start_in_background(paths: &MountPaths, options: Options) -> Result<(), MountError> {
    if nix::unistd::geteuid().is_root() {
        // Without /proc, the daemon itself cannot be started.
        requirements::check()?;
    }
    mount::refuse_link(&paths.conf_dir)?;
    let program = Path::new(THIS_PROGRAM);
    let failed = |cause| MountError::Io {
        path: program.to_path_buf(),
        what: "cannot start the daemon",
        cause,
        cure: "check the limits on processes and memory",
    };
    let mut command = paths.absolute().map_err(failed)?.mount_command(program);
    command.args(options.words());
    command.env(setup::BACKGROUND, "1").stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().map_err(failed)?;
    let mut output = String::new();
    if let Some(mut stdout) = child.stdout.take() {
        io::Read::read_to_string(&mut stdout, &mut output).map_err(failed)?;
    }
    if output == READY {
        return Ok(());
    }
    let _ = child.wait();
    Err(MountError::Background)
}

/// Mounts the directory, or continues a mount that another daemon has held, and supervises it until it ends.
///
/// # Errors
/// The directory cannot be mounted or served. Then nothing is mounted that was not mounted before.
pub fn serve(paths: &MountPaths, topology: Topology, options: Options) -> Result<(), MountError> {
    let conf_dir = &paths.conf_dir;
    init_daemon(conf_dir)?;
    requirements::check()?;
    // Before the path is resolved.
    mount::refuse_link(conf_dir)?;
    setup::reset_inherited();
    let paths = paths.absolute().map_err(|source| io_error(conf_dir, "cannot be resolved", source))?;
    let has = |wanted: &std::ffi::OsStr| std::env::args_os().any(|arg| arg == wanted);
    if !has(&paths.conf_dir_arg()) || !has(paths::FOREGROUND.as_ref()) {
        // The user may have typed another spelling. The command line must show that a daemon serves, and what.
        let mut command = paths.mount_command(Path::new(THIS_PROGRAM));
        let error = command.args(options.words()).exec();
        return Err(io_error(conf_dir, "cannot be served", error));
    }
    let stored = systemd::take_stored();
    process::close_inherited(&stored.each_ref().map(Option::as_ref));
    fds::reserve_all().map_err(|source| io_error(conf_dir, "no descriptors", source))?;
    supervise(&paths, topology, options, systemd::Stored::from_taken(stored))
}

impl Invocation {
    /// Does what the role of this process is, and returns when that is done. `read_topology` reads the CPUs of the machine
    /// whenever they are needed. `version`: of this program.
    ///
    /// # Errors
    /// The role cannot be fulfilled.
    pub fn run(self, read_topology: ReadTopology, version: &'static str) -> Result<(), MountError> {
        let Self { role, paths } = self;
        if matches!(role, Role::Preflight | Role::Probe) {
            // A process that only asks must not hold the device: when all others have died, it would keep the connection
            // that it waits for, and every client with it.
            process::close_inherited(&[]);
        }
        init_daemon(&paths.conf_dir)?;
        match role {
            Role::Worker => worker::serve(&paths, read_topology, version),
            Role::Supervisor { replace_worker } => resume(&paths, replace_worker),
            Role::Preflight => upgrade::check_state(&paths.state_dir),
            // Waits behind no other request (`fuse::adapter`), and the kernel caches no answer.
            Role::Probe => match nix::sys::statfs::statfs(&paths.conf_dir) {
                Ok(_) => Ok(()),
                Err(errno) => Err(io_error(&paths.conf_dir, "does not answer", errno.into())),
            },
        }
    }
}

fn init_daemon(conf_dir: &Path) -> Result<(), MountError> {
    if !nix::unistd::geteuid().is_root() {
        return Err(MountError::NotRoot(conf_dir.to_path_buf()));
    }
    let _ = nix::sys::prctl::set_name(PROCESS_NAME);
    Ok(())
}

fn supervise(
    paths: &MountPaths,
    topology: Topology,
    options: Options,
    stored: Option<systemd::Stored>,
) -> Result<(), MountError> {
    // From mount(2) on the mount must be ended by this process, so the signals are caught before it.
    let signals = setup::catch_signals()?;
    limits::raise()?;
    let found = takeover::find(paths, options.import, &topology, stored)?;
    let canonical =
        |path: &PathBuf| path.canonicalize().map_err(|source| io_error(path, "cannot be resolved", source));
    // The directories above the mount point exist now.
    let MountPaths { conf_dir, .. } =
        paths.absolute().map_err(|source| io_error(&paths.conf_dir, "cannot be resolved", source))?;
    let paths = MountPaths { conf_dir, state_dir: canonical(&paths.state_dir)? };
    let (fds, is_new) = match found {
        Found::Mount(fds) => (fds, false),
        Found::Directory { lock, layout } => {
            (takeover::mount_new(&paths, topology, lock, layout, options.until_unused)?, true)
        }
    };
    // This process has not changed its own affinity yet.
    let cpus = process::mask_of(std::process::id()).ok().flatten().map(|cpus| cpus.to_string());
    let noted = fds.handoff.read().and_then(|state| fds.handoff.write(&HandoffState { cpus, ..state }));
    noted.map_err(|source| io_error(&paths.conf_dir, "no handoff state", source))?;
    let in_background = setup::is_in_background();
    if in_background {
        // Before a worker is started, which stays in this session.
        let _ = nix::unistd::setsid();
    }
    setup::init_process();
    let log = in_background.then(|| setup::open_log(&paths.state_dir.join("log")));
    if let Some(Err(error)) = &log {
        // Still on the terminal of the command.
        let cannot = "; claims and changes of the configuration are refused until it can be written";
        let consequence = if error.kind() == io::ErrorKind::ReadOnlyFilesystem { cannot } else { "" };
        log::warn!(
            "{}: {error}; the daemon logs nothing{consequence}",
            paths.state_dir.join("log").display()
        );
    }
    let mut supervisor = Supervisor::new(paths.clone(), fds, signals)?;
    if let Some(log) = &log {
        supervisor.log_workers_to(log.as_ref().ok());
    }
    let result = supervisor.run(|supervisor| {
        supervisor.notify_ready();
        if let Some(log) = log {
            detach_output(&log);
        }
    });
    finish(&paths, &mut supervisor, result, is_new)
}

/// Continues for a supervisor that has died, or that has executed this program in an upgrade.
fn resume(paths: &MountPaths, replace_worker: bool) -> Result<(), MountError> {
    let failed = |source| io_error(&paths.conf_dir, "no supervisor has left its descriptors", source);
    // Before anything else is opened: the supervisor of an earlier program has not left this one.
    [fds::SPARE, fds::KEPT].into_iter().try_for_each(fds::reserve_if_free).map_err(failed)?;
    let signals = setup::catch_signals()?;
    let fds = InheritedFds::take().map_err(failed)?;
    // Workers inherit the descriptors above under their numbers, but not these two.
    let take = |number| process::inherited_fd(number).and_then(process::dup_above).map_err(failed);
    let control = ControlSocket::from_fd(take(fds::CONTROL)?);
    let worker = PidFd::from_fd(take(fds::WORKER)?);
    fds::reserve_fd(fds::CONTROL).map_err(failed)?;
    fds::reserve_fd(fds::WORKER).map_err(failed)?;
    setup::log_with_time();
    let mut supervisor = Supervisor::new(paths.clone(), fds, signals)?;
    supervisor.resume(worker, control).map_err(failed)?;
    if replace_worker {
        supervisor.finish_upgrade();
    }
    let result = supervisor.run(|supervisor| supervisor.notify_ready());
    finish(paths, &mut supervisor, result, true)
}

/// Ends the mount, if it is to end. `owns_mount`: an error ends it too.
fn finish(
    paths: &MountPaths,
    supervisor: &mut Supervisor,
    result: Result<Exit, MountError>,
    owns_mount: bool,
) -> Result<(), MountError> {
    let MountPaths { conf_dir, state_dir } = paths;
    if matches!(result, Ok(Exit::Stop | Exit::Unused)) || (result.is_err() && owns_mount) {
        supervisor.detach();
        systemd::remove_stored();
    }
    supervisor.stop_worker();
    match result? {
        Exit::Stop => log::info!("{}: no longer served", conf_dir.display()),
        Exit::Unused => {
            log::info!("{}: has no pools, and is no longer served", conf_dir.display());
            if let Err(error) = trust::remove(state_dir) {
                log::warn!("{}: cannot be removed: {error}", state_dir.display());
            }
            let _ = std::fs::remove_dir(conf_dir);
        }
        Exit::Detach => log::info!("{}: left to the process that has its descriptors", conf_dir.display()),
    }
    Ok(())
}

/// Tells the command that waits that the mount answers; from then on this process writes to the daemon log.
fn detach_output(log: &io::Result<File>) {
    let _ = io::stdout().write_all(READY.as_bytes()).and_then(|()| io::stdout().flush());
    if let Ok(null) = OpenOptions::new().read(true).write(true).open("/dev/null") {
        let _ = nix::unistd::dup2_stdout(&null);
        let _ = nix::unistd::dup2_stderr(log.as_ref().unwrap_or(&null));
        setup::log_with_time();
    }
}

/// Whether a daemon serves the directory with this state directory.
#[must_use]
pub fn is_served(paths: &MountPaths) -> bool {
    let MountPaths { conf_dir, state_dir } = paths;
    matches!(mountpoint::status(conf_dir), Ok(mountpoint::Status::Live))
        && StateLock::supervisor(state_dir).is_some()
}

/// Unmounts the directory and waits until its daemon has exited.
///
/// # Errors
/// The directory is not mounted, the caller is not root, or the daemon does not exit.
pub fn unmount(conf_dir: &Path) -> Result<(), MountError> {
    let mounted =
        mountpoint::topmost(conf_dir).map_err(|source| io_error(conf_dir, "cannot be examined", source))?;
    let mounted = mounted.ok_or_else(|| MountError::NotMounted(conf_dir.to_path_buf()))?;
    let servers = identity::servers(mounted.connection, &mountpoint::resolved(conf_dir));
    while mountpoint::is_mounted(conf_dir).unwrap_or(false) {
        match umount2(conf_dir, MntFlags::MNT_DETACH) {
            Ok(()) => {}
            Err(Errno::EPERM) => return Err(MountError::NotRoot(conf_dir.to_path_buf())),
            Err(errno) => return Err(io_error(conf_dir, "cannot be unmounted", errno.into())),
        }
    }
    // The supervisor notices the unmount, unless the mount of its own mount namespace is still there.
    for identity::Server { pid, pidfd, .. } in servers {
        let conf = conf_dir.to_path_buf();
        if mountpoint::is_elsewhere(pid, mounted.connection) && !pidfd.wait(Duration::ZERO) {
            return Err(MountError::ServedElsewhere { conf, pid });
        }
        if !pidfd.wait(EXIT_TIMEOUT) {
            return Err(MountError::StillServed { conf, pid });
        }
    }
    Ok(())
}
