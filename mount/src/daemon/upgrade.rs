//! Replacing the program under a mount that goes on.
//!
//! Owns: the wish (a file in the state directory that names the new program, and in which the keeper says
//! what came of it) and the proof that the new program can read the state. Must not know: how the keeper
//! becomes another program.

use std::fs;
use std::io::{self, ErrorKind, Read, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::error::MountError;
use super::paths::{Places, processes_of};
use crate::journal::{StateDir, StateLock};
use crate::mountpoint;
use crate::process::PidFd;

/// In the state directory: the path of the program that is wanted; or, in answer, `failed: <reason>`. Gone
/// when the upgrade is done.
const WISH: &str = "upgrade";
const FAILED: &str = "failed: ";
/// How long a proof may take, and how long the command waits for the whole.
const PROOF: Duration = Duration::from_secs(10);
const WHOLE: Duration = Duration::from_secs(30);

/// Makes the program that runs here the one that serves, and waits until it does.
///
/// # Errors
/// Nothing is mounted, the state cannot be read by this program, or what the keeper says: the old one goes on.
pub fn upgrade(places: &Places) -> Result<(), MountError> {
    let failed = |reason: String| MountError::NotUpgraded(reason);
    let keeper = StateLock::supervisor(&places.state_dir)
        .ok_or_else(|| MountError::NotMounted(places.conf_dir.clone()))?;
    let daemons = processes_of(&mountpoint::resolved(&places.conf_dir));
    if !daemons.iter().any(|pid| i64::from(*pid) == i64::from(keeper)) {
        return Err(failed(format!("{keeper} does not keep {}; try again", places.conf_dir.display())));
    }
    StateDir::check(&places.state_dir)?;
    let program = fs::read_link("/proc/self/exe").map_err(|error| failed(error.to_string()))?;
    let wish = places.state_dir.join(WISH);
    fs::write(&wish, program.as_os_str().as_encoded_bytes())
        .map_err(|error| failed(format!("{}: {error}", wish.display())))?;
    kill(Pid::from_raw(keeper), Signal::SIGHUP)
        .map_err(|errno| failed(format!("its keeper {keeper} cannot be told: {errno}")))?;
    let deadline = Instant::now() + WHOLE;
    while Instant::now() < deadline {
        match fs::read_to_string(&wish) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Ok(text) if text.starts_with(FAILED) => {
                let _ = fs::remove_file(&wish);
                return Err(failed(text.trim_start_matches(FAILED).to_owned()));
            }
            _ => std::thread::sleep(Duration::from_millis(2)),
        }
    }
    Err(failed("the keeper does not say what came of it; look at its log".into()))
}

/// The program that is wanted: the one that was named, or whatever now has the name of the one that runs.
fn program(state_dir: &Path) -> io::Result<PathBuf> {
    match fs::read_to_string(state_dir.join(WISH)) {
        Ok(path) if !path.starts_with(FAILED) => Ok(path.into()),
        _ => {
            let own = fs::read_link("/proc/self/exe")?;
            // A program that was replaced is called deleted.
            let name = own.to_string_lossy();
            Ok(name.strip_suffix(" (deleted)").unwrap_or(&name).into())
        }
    }
}

/// What a program says that has read the state.
const PROVED: &str = "proved\n";

/// Says whether this program can read the state.
///
/// # Errors
/// It cannot.
pub(crate) fn give_proof(state_dir: &Path) -> Result<(), MountError> {
    StateDir::check(state_dir)?;
    io::stdout().write_all(PROVED.as_bytes()).map_err(|error| MountError::NotUpgraded(error.to_string()))
}

/// The program that is wanted, while it reads the state to say whether it can. Nobody waits for it.
#[derive(Debug)]
pub(crate) struct Proof {
    program: PathBuf,
    child: Child,
    handle: PidFd,
    /// When it has had time enough.
    pub(crate) deadline: Instant,
}

impl Proof {
    /// Has the program begin.
    ///
    /// # Errors
    /// It cannot be started.
    pub(crate) fn begin(places: &Places) -> io::Result<Self> {
        let program = program(&places.state_dir)?;
        let mut command = places.command(Command::new(&program));
        command.arg("--prove").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().map_err(|error| named(&program, &error))?;
        let handle = PidFd::open(child.id())?;
        Ok(Self { program, child, handle, deadline: Instant::now() + PROOF })
    }

    /// The program, if it has ended with the proof. If it has not ended, it does now.
    ///
    /// # Errors
    /// What it says instead.
    pub(crate) fn end(mut self) -> io::Result<PathBuf> {
        let in_time = self.handle.wait(Duration::ZERO);
        self.child.kill()?;
        let status = self.child.wait()?;
        let [said, reason] = [said(self.child.stdout.take()), said(self.child.stderr.take())];
        if status.success() && said == PROVED {
            return Ok(std::mem::take(&mut self.program));
        }
        let default =
            if in_time { "it ends without a reason" } else { "it does not say whether it can go on" };
        let reason = reason.lines().last().unwrap_or(default).trim_start_matches("ERROR:root:").to_owned();
        Err(named(&self.program, &reason))
    }
}

impl Drop for Proof {
    fn drop(&mut self) {
        let _ = self.child.kill().and_then(|()| self.child.wait());
    }
}

impl AsFd for Proof {
    /// Readable when the program has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.handle.as_fd()
    }
}

fn named(program: &Path, error: &dyn std::fmt::Display) -> io::Error {
    io::Error::other(format!("{}: {error}", program.display()))
}

/// What was written to a pipe so far: somebody else may hold it open.
fn said(pipe: Option<impl AsFd + Read>) -> String {
    let Some(mut pipe) = pipe else { return String::new() };
    let mut bytes = Vec::new();
    if fcntl(&pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).is_ok() {
        // Where it would block, that is all.
        let _ = pipe.read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Says what came of the wish, if there is one: done, or why not.
pub(crate) fn report(state_dir: &Path, failure: Option<&str>) {
    let wish = state_dir.join(WISH);
    let reported = match failure {
        None => fs::remove_file(&wish),
        Some(_) if !wish.exists() => return,
        Some(reason) => fs::write(&wish, format!("{FAILED}{reason}")),
    };
    match reported {
        Err(error) if error.kind() != ErrorKind::NotFound => log::warn!("{}: {error}", wish.display()),
        _ => {}
    }
}
