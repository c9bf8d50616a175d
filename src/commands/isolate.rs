//! `kcm isolate`: runs a command on a CPU list of a pool.
//!
//! Owns: what the command is told and how it is started. Must not know: how a list is chosen on a mount; that
//! is the daemon's.

mod plain;

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Error, anyhow, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::cli::{self, Program, Wait};
use crate::confdir::{self, ConfDir};

/// The environment variable in which the command finds its CPU list.
const CPUS_ASSIGNED: &str = "KCM_CPUS_ASSIGNED";
/// What a shell answers for a program that cannot be started, and for one that does not exist.
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;

/// Claims, and becomes the command; or, on a plain directory, runs it.
pub(super) fn run(args: &cli::Isolate) -> Result<ExitCode, Error> {
    let dir = ConfDir::open(&args.dir.conf_dir)?;
    let Some(program) = args.program() else { bail!("no command; give one") };
    let flag = dir.pool(&args.pool).join("exclusive");
    let is_name = !args.pool.contains('/');
    if !is_name || !flag.try_exists().map_err(|error| confdir::refused(&flag, error))? {
        // The directory itself may be what is missing; then that is the error.
        dir.pools()?;
        bail!("Requested pool {} does not exist", args.pool);
    }
    if !dir.is_mounted() {
        return plain::run(&dir, &args.pool, &program, args.wait);
    }
    let cpus = claim(&dir, &args.pool, args.wait)?;
    let mut command = command(&program, &cpus);
    let error = command.exec();
    // Nothing stays claimed by a program that was none; ours ends here anyway.
    let _ = fs::write(dir.pool(&args.pool).join("tasks"), "-0");
    Ok(not_started(&program, &error))
}

/// Claims a list of the pool for this process; gives its name.
fn claim(dir: &ConfDir, pool: &str, wait: Option<Wait>) -> Result<String, Error> {
    let file = dir.pool(pool).join("tasks");
    let mut tasks = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&file)
        .map_err(|error| confdir::refused(&file, error))?;
    let deadline = wait.flatten().and_then(|wait| Instant::now().checked_add(wait));
    loop {
        match tasks.write(b"0\n") {
            Ok(_) => break,
            Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32) => {
                if wait.is_none() || deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                    bail!("No free cpu lists in pool {pool}");
                }
                wait_for_change(&mut tasks, deadline).map_err(|error| confdir::refused(&file, error))?;
            }
            Err(error) => return dir.explained(&file, || Err(error)),
        }
    }
    let cpus = dir.path().join("self/cpus");
    let cpus = fs::read_to_string(&cpus).map_err(|error| confdir::refused(&cpus, error))?;
    Ok(cpus.trim_end().to_owned())
}

/// Returns when the file has changed since it was last read, and reads it.
fn wait_for_change(tasks: &mut fs::File, deadline: Option<Instant>) -> io::Result<()> {
    let timeout = match deadline {
        None => PollTimeout::NONE,
        Some(deadline) => {
            let left = deadline.saturating_duration_since(Instant::now()).as_millis() + 1;
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        }
    };
    match poll(&mut [PollFd::new(tasks.as_fd(), PollFlags::POLLPRI)], timeout) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    io::Seek::rewind(tasks)?;
    io::Read::read_to_end(tasks, &mut Vec::new()).map(|_| ())
}

/// The command as it is to be started. Its arguments reach it as they were given.
fn command(program: &Program, cpus: &str) -> Command {
    let mut command = match program {
        Program::Shell { line, args } => {
            let mut command = Command::new("/bin/sh");
            let mut line = line.clone();
            if !args.is_empty() {
                line.push(" \"$@\"");
            }
            command.arg("-c").arg(line).arg("sh").args(args);
            command
        }
        Program::Direct { program, args } => {
            let mut command = Command::new(program);
            command.args(args);
            command
        }
    };
    command.env(CPUS_ASSIGNED, cpus);
    command
}

/// Says why the program did not start, and gives the status that a shell would.
fn not_started(program: &Program, error: &io::Error) -> ExitCode {
    let name = match program {
        Program::Shell { .. } => Path::new("/bin/sh"),
        Program::Direct { program, .. } => Path::new(program),
    };
    let absent = error.kind() == io::ErrorKind::NotFound;
    let cure = match (program, absent) {
        (Program::Shell { .. }, true) => "; without a shell: kcm isolate --pool=<pool> -- <program> <args>",
        (Program::Direct { .. }, true) => "; look at its name and at PATH",
        _ => "; look at its mode",
    };
    log::error!(
        "{:#}",
        anyhow!("{}: {}{cure}", name.display(), Errno::from_raw(error.raw_os_error().unwrap_or(0)).desc())
    );
    ExitCode::from(if absent { NOT_FOUND } else { NOT_EXECUTABLE })
}
