//! Replaces the program of a daemon while the mount stays.
//!
//! Owns the upgrade request (a file in the state directory that names the new program, and in which the supervisor
//! reports the result), the preflight, and the stages of an upgrade. Does not know how the supervisor executes
//! another program.

use std::ffi::OsString;
use std::fs;
use std::io::{self, ErrorKind, Read, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::Signal;

use super::error::MountError;
use super::identity;
use super::paths::{MountPaths, THIS_PROGRAM};
use super::role::Role;
use crate::journal::trust::{self, Untrusted};
use crate::journal::{StateDir, StateLock};
use crate::mountpoint;
use crate::process::PidFd;

/// The upgrade request, a file in the state directory. It contains the path of the new program, or
/// `failed: <reason>` as the answer. After a successful upgrade it does not exist.
const REQUEST: &str = "upgrade";
const FAILED: &str = "failed: ";
/// The output of a successful preflight. An old supervisor compares it, so it stays as it is.
const PREFLIGHT_OK: &str = "proved\n";
/// How long a preflight may take. It reads the state directory, which takes milliseconds on a disk that works.
const PREFLIGHT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the command waits for the result: the preflight, and the start of a worker.
const UPGRADE_TIMEOUT: Duration = Duration::from_secs(30);
/// How often the command looks for the result.
const RESULT_INTERVAL: Duration = Duration::from_millis(2);

/// Makes this program the one that serves, and waits until it does.
///
/// # Errors
/// Nothing is mounted, this program cannot read the state, or the supervisor refuses; the old program then
/// continues.
pub fn upgrade(paths: &MountPaths) -> Result<(), MountError> {
    let failed = |reason: String| MountError::NotUpgraded(reason);
    let supervisor = StateLock::supervisor(&paths.state_dir)
        .ok_or_else(|| MountError::NotMounted(paths.conf_dir.clone()))?;
    let mounted = mountpoint::at(&paths.conf_dir, None).ok().flatten();
    let mounted = mounted.ok_or_else(|| MountError::NotMounted(paths.conf_dir.clone()))?;
    let servers = identity::servers(mounted.connection, &mountpoint::resolved(&paths.conf_dir));
    let Some(server) = servers.into_iter().find(|server| server.pid == supervisor) else {
        let conf_dir = paths.conf_dir.display();
        return Err(failed(format!("PID {supervisor} is not the supervisor of {conf_dir}; try again")));
    };
    trust::check_directory(&paths.state_dir)?;
    StateDir::check(&paths.state_dir)?;
    let program = fs::read_link(THIS_PROGRAM).map_err(|error| failed(error.to_string()))?;
    let request = paths.state_dir.join(REQUEST);
    trust::write(&request, program.as_os_str().as_encoded_bytes())
        .map_err(|error| failed(format!("{}: {error}", request.display())))?;
    let sent = server.pidfd.send(Signal::SIGHUP);
    sent.map_err(|errno| failed(format!("cannot signal the supervisor, PID {supervisor}: {errno}")))?;
    let deadline = Instant::now() + UPGRADE_TIMEOUT;
    while Instant::now() < deadline {
        match fs::read_to_string(&request) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Ok(text) if text.starts_with(FAILED) => {
                let _ = fs::remove_file(&request);
                return Err(failed(text.trim_start_matches(FAILED).to_owned()));
            }
            _ => std::thread::sleep(RESULT_INTERVAL),
        }
    }
    Err(failed("the supervisor does not report a result; see its log".into()))
}

/// Reports the result of an upgrade to the command that requested it, if there is one. `None`: success.
pub(super) fn report(state_dir: &Path, failure: Option<&str>) {
    let request = state_dir.join(REQUEST);
    let reported = match failure {
        None => fs::remove_file(&request),
        Some(_) if !request.exists() => return,
        Some(reason) => trust::write(&request, format!("{FAILED}{reason}").as_bytes()),
    };
    match reported {
        Err(error) if error.kind() != ErrorKind::NotFound => log::warn!("{}: {error}", request.display()),
        _ => {}
    }
}

/// The requested program; without a request, the program that now has the name of the running one.
///
/// # Errors
/// Somebody other than root can write to the program or to the request.
fn requested_program(state_dir: &Path) -> io::Result<PathBuf> {
    let program = named_program(state_dir)?;
    match trust::find(&program)? {
        None => Ok(program),
        Some(Untrusted { path, why }) => {
            let why = format!("{} {why}; only root may be able to change the program", path.display());
            Err(with_program(&program, &why))
        }
    }
}

fn named_program(state_dir: &Path) -> io::Result<PathBuf> {
    let request = state_dir.join(REQUEST);
    let text = match trust::read_private(&request) {
        Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
        read => read.map_err(|error| with_program(&request, &error))?,
    };
    match OsString::from_vec(text) {
        path if !path.is_empty() && !path.as_encoded_bytes().starts_with(FAILED.as_bytes()) => {
            Ok(path.into())
        }
        _ => {
            let own = fs::read_link(THIS_PROGRAM)?;
            // The kernel marks the name of a file that has been replaced.
            let name = own.to_string_lossy();
            Ok(name.strip_suffix(" (deleted)").unwrap_or(&name).into())
        }
    }
}

/// Checks that this program can read the state directory, and says so on standard output.
///
/// # Errors
/// It cannot.
pub(super) fn check_state(state_dir: &Path) -> Result<(), MountError> {
    trust::check_directory(state_dir)?;
    StateDir::check(state_dir)?;
    let said = io::stdout().write_all(PREFLIGHT_OK.as_bytes());
    said.map_err(|error| MountError::NotUpgraded(error.to_string()))
}

/// How far an upgrade is. Decides the next step; has no effects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// No upgrade was requested.
    Idle,
    /// An upgrade was requested.
    Requested,
    /// The new program checks the state directory, until this time at most.
    Preflight(Instant),
    /// This is the new program, and its worker does not serve yet.
    AwaitingWorker,
}

/// The supervisor's next step in an upgrade.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// There is nothing to do.
    Wait,
    /// Start the preflight.
    StartPreflight,
    /// End the preflight, and execute the program if the preflight was successful.
    Execute,
}

impl Stage {
    /// The next step. `has_exited`: the preflight has exited.
    pub(super) fn advance(&mut self, now: Instant, has_exited: bool) -> Step {
        match *self {
            Self::Requested => {
                *self = Self::Preflight(now + PREFLIGHT_TIMEOUT);
                Step::StartPreflight
            }
            Self::Preflight(deadline) if has_exited || deadline <= now => {
                // Execution does not return unless it fails.
                *self = Self::Idle;
                Step::Execute
            }
            Self::Idle | Self::Preflight(_) | Self::AwaitingWorker => Step::Wait,
        }
    }

    /// The time at which [`Stage::advance`] has something to do in any case.
    pub(super) fn deadline(self) -> Option<Instant> {
        match self {
            Self::Preflight(deadline) => Some(deadline),
            _ => None,
        }
    }

    /// A worker of this program serves. Returns whether that completes the upgrade.
    pub(super) fn complete(&mut self) -> bool {
        let completes = *self == Self::AwaitingWorker;
        if completes {
            *self = Self::Idle;
        }
        completes
    }
}

/// The new program while it checks the state directory. The supervisor does not wait for it. It is killed when
/// dropped.
#[derive(Debug)]
pub(super) struct Preflight {
    program: PathBuf,
    child: Child,
    pidfd: PidFd,
}

impl Preflight {
    /// Starts the requested program.
    ///
    /// # Errors
    /// It cannot be started.
    pub(super) fn start(paths: &MountPaths) -> io::Result<Self> {
        let program = requested_program(&paths.state_dir)?;
        let mut command = paths.role_command(&program, Role::Preflight);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().map_err(|error| with_program(&program, &error))?;
        let pidfd = PidFd::open(child.id())?;
        log::debug!("upgrade: preflight of {} started as PID {}", program.display(), child.id());
        Ok(Self { program, child, pidfd })
    }

    /// Ends the check, and returns the program if the check was successful.
    ///
    /// # Errors
    /// The reason of the program, or that it did not exit in time.
    pub(super) fn finish(mut self) -> io::Result<PathBuf> {
        let has_exited = self.pidfd.wait(Duration::ZERO);
        self.child.kill()?;
        let status = self.child.wait()?;
        let output = read_available(self.child.stdout.take());
        if status.success() && output == PREFLIGHT_OK {
            return Ok(std::mem::take(&mut self.program));
        }
        let errors = read_available(self.child.stderr.take());
        let default = if has_exited { "it exits without a reason" } else { "it does not answer in time" };
        let reason = errors.lines().last().unwrap_or(default).trim_start_matches("ERROR:root:");
        Err(with_program(&self.program, &reason))
    }
}

impl Drop for Preflight {
    fn drop(&mut self) {
        let _ = self.child.kill().and_then(|()| self.child.wait());
    }
}

impl AsFd for Preflight {
    /// Readable after the program has exited.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

fn with_program(program: &Path, error: &dyn std::fmt::Display) -> io::Error {
    io::Error::other(format!("{}: {error}", program.display()))
}

/// Reads the bytes that a pipe contains now. Reading to its end could wait, because another process may hold it open.
fn read_available(pipe: Option<impl AsFd + Read>) -> String {
    let Some(mut pipe) = pipe else { return String::new() };
    let mut bytes = Vec::new();
    if fcntl(&pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).is_ok() {
        // EAGAIN ends the reading; the bytes before it have been read.
        let _ = pipe.read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_upgrade_goes_from_the_request_over_the_preflight_to_the_execution() {
        let now = Instant::now();
        let mut stage = Stage::Idle;
        assert_eq!(stage.advance(now, false), Step::Wait);
        stage = Stage::Requested;
        assert_eq!(stage.advance(now, false), Step::StartPreflight);
        assert_eq!(stage.deadline(), Some(now + PREFLIGHT_TIMEOUT));
        assert_eq!(stage.advance(now, false), Step::Wait, "the preflight runs");
        assert_eq!(stage.advance(now, true), Step::Execute);
        assert_eq!(stage, Stage::Idle, "if the execution fails there is no upgrade");
    }

    #[test]
    fn a_preflight_that_does_not_exit_ends_at_its_deadline() {
        let now = Instant::now();
        let mut stage = Stage::Requested;
        stage.advance(now, false);
        assert_eq!(stage.advance(now + PREFLIGHT_TIMEOUT / 2, false), Step::Wait);
        assert_eq!(stage.advance(now + PREFLIGHT_TIMEOUT, false), Step::Execute);
    }

    #[test]
    fn only_the_first_worker_of_the_new_program_completes_an_upgrade() {
        let mut stage = Stage::Idle;
        assert!(!stage.complete());
        stage = Stage::AwaitingWorker;
        assert_eq!(stage.advance(Instant::now(), false), Step::Wait);
        assert!(stage.complete());
        assert!(!stage.complete());
    }

    #[test]
    fn the_result_is_written_only_into_an_existing_request() {
        let directory = tempfile::tempdir().unwrap();
        let request = directory.path().join(REQUEST);
        report(directory.path(), Some("no room"));
        report(directory.path(), None);
        assert!(!request.exists(), "nobody has asked");
        fs::write(&request, "/bin/kcm").unwrap();
        assert_eq!(requested_program(directory.path()).unwrap(), Path::new("/bin/kcm"));
        report(directory.path(), Some("no room"));
        assert_eq!(fs::read_to_string(&request).unwrap(), "failed: no room");
        let own = fs::read_link(THIS_PROGRAM).unwrap();
        assert_eq!(requested_program(directory.path()).unwrap(), own, "an answer is not a request");
        report(directory.path(), None);
        assert!(!request.exists());
    }
}
