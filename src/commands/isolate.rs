//! `kcm isolate`: runs a command on a CPU list of a pool.
//!
//! Owns the command's arguments and environment, and its start. Does not know how a list is chosen on a mount: the
//! daemon does that.

mod account;
mod plain;
mod simple;
mod turn;

use std::ffi::{CString, OsString};
use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Error, anyhow, bail};
use kcm_mount::model::cpuset::CpuSet;
use kcm_mount::mountpoint::{self, Status};
use kcm_mount::{affinity, child};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};

use account::Account;

use super::common::deadline::Deadline;
use super::describe;
use crate::cli::{self, Program, Wait};
use crate::confdir::{self, ConfDir};
use crate::service;
use turn::Turn;

/// The environment variable in which the command finds its CPU list.
pub(super) const CPUS_ASSIGNED: &str = "KCM_CPUS_ASSIGNED";
/// The status of a shell if a program cannot be executed.
const NOT_EXECUTABLE: u8 = 126;
/// The status of a shell if a program does not exist.
const NOT_FOUND: u8 = 127;

/// How long a daemon that answers EAGAIN is tried again, and how often.
const PATIENCE: Duration = Duration::from_secs(5);
const BUSY_INTERVAL: Duration = Duration::from_millis(100);
/// How often a directory whose daemon is away is tried again.
const AWAY_INTERVAL: Duration = Duration::from_millis(100);

/// A claim: its pool or list, and its task.
pub(super) struct Wanted<'a> {
    pub(super) pool: &'a str,
    /// Any list of the pool, if there is none.
    pub(super) list: Option<&'a str>,
    /// This process, if there is none.
    pub(super) pid: Option<u32>,
}

impl Wanted<'_> {
    /// The file to write to.
    fn tasks(&self, dir: &ConfDir) -> PathBuf {
        match self.list {
            Some(list) => dir.tasks(self.pool, list),
            None => dir.pool(self.pool).join("tasks"),
        }
    }

    /// The line to write.
    fn line(&self) -> String {
        // The newline makes this a command. Through a file that is open for reading and writing, a list without
        // white space is a rewrite, as legacy clients make it; there "0" would not stand for the writer.
        format!("{}\n", self.pid.unwrap_or(0))
    }
}

/// Claims a list and executes the command in this process; on a plain directory, runs it as a child.
pub(super) fn run(args: &cli::Isolate) -> Result<ExitCode, Error> {
    args.check_wait().unwrap_or_else(|error| error.exit());
    if args.scope {
        return Err(enter_scope());
    }
    let dir = ConfDir::open(&args.dir.conf_dir)?;
    check_pool(&dir, &args.pool)?;
    let list = args.list.as_ref().map(|cpus| find_list(&dir, &args.pool, cpus)).transpose()?;
    let wanted = Wanted { pool: &args.pool, list: list.as_deref(), pid: args.pid };
    if !dir.is_mounted() && (args.pid.is_some() || args.user.is_some()) {
        bail!("{}: --pid and --user need a mount; run kcm mount --import", dir.path().display());
    }
    if let Some(pid) = args.pid {
        let list = claim(&dir, &wanted, deadline(args.wait))?;
        log::info!("{pid} is on {} {list}.", args.pool);
        return Ok(ExitCode::SUCCESS);
    }
    let Some(program) = args.program().map(simple::without_shell) else { bail!("no command; give one") };
    if !dir.is_mounted() {
        return plain::run(&dir, &wanted, &program, deadline(args.wait));
    }
    let account = args.user.as_deref().map(Account::find).transpose()?;
    name_process(&program);
    let cpus = claim(&dir, &wanted, deadline(args.wait))?;
    log::debug!("claimed {} {cpus}; executing the command", args.pool);
    Ok(execute_as(account.as_ref(), &program, &cpus, &dir.pool(&args.pool)))
}

/// Gives this process the name that it has as the program, so that refusals and events name that.
fn name_process(program: &Program) {
    let path = match program {
        Program::Shell { .. } => Path::new("sh"),
        Program::Direct { program, .. } => Path::new(program),
    };
    let name = path.file_name().and_then(|name| CString::new(name.as_encoded_bytes()).ok());
    if let Some(name) = name {
        // The kernel shortens it. Without it, only the name in messages is another one.
        let _ = nix::sys::prctl::set_name(&name);
    }
}

/// Executes the program in this process, which has claimed a list of the pool. Returns the status if that fails.
pub(super) fn execute(program: &Program, cpus: &str, pool: &Path) -> ExitCode {
    execute_as(None, program, cpus, pool)
}

/// As [`execute`], as another user.
fn execute_as(account: Option<&Account>, program: &Program, cpus: &str, pool: &Path) -> ExitCode {
    let mut command = command(program, cpus);
    if let Some(account) = account
        && let Err(error) = account.become_it(&mut command)
    {
        log::error!("--user: {error}; look at the capabilities of this process");
        return ExitCode::from(NOT_EXECUTABLE);
    }
    let error = command.exec();
    // A release is not needed, since this process ends, but it makes the list free before the error is shown.
    let _ = fs::write(pool.join("tasks"), "-0");
    not_started(program, &error)
}

/// Executes this command again in this process, without `--scope`, in a scope of systemd. systemd leaves the cgroups below a
/// scope with `Delegate=yes` alone, so that a partition there stays. Returns only if that fails.
pub(super) fn enter_scope() -> Error {
    if !service::manages_machine() {
        return anyhow!("--scope: systemd does not manage this machine; leave it out");
    }
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(error) => return anyhow!("--scope: kcm cannot find itself: {error}; is /proc mounted?"),
    };
    let mut words: Vec<OsString> = std::env::args_os().skip(1).collect();
    // The first one is the flag, because another one can only follow --.
    // It may be abbreviated.
    let is_flag = |word: &OsString| word.to_str().is_some_and(|it| it.len() > 2 && "--scope".starts_with(it));
    if let Some(flag) = words.iter().position(is_flag) {
        words.remove(flag);
    }
    let mut command = Command::new("systemd-run");
    command.args(["--quiet", "--scope", "--collect", "--property=Delegate=yes"]);
    if !nix::unistd::geteuid().is_root() {
        command.arg("--user");
    }
    command.arg("--").arg(program).args(words);
    child::keep_sigpipe(&mut command);
    let error = command.exec();
    anyhow!("--scope: systemd-run cannot be started: {error}; install it, or leave --scope out")
}

/// Checks that the pool exists.
pub(super) fn check_pool(dir: &ConfDir, pool: &str) -> Result<(), Error> {
    let flag = dir.pool(pool).join("exclusive");
    let is_name = !pool.contains('/');
    if !is_name || !flag.try_exists().map_err(|error| confdir::file_error(&flag, error))? {
        // If the directory has no pools at all, that error helps more.
        let pools = dir.find()?.pools;
        let names: Vec<String> = pools.keys().map(|name| describe::shown(name)).collect();
        bail!("Requested pool {pool} does not exist; the pools are {}", names.join(", "));
    }
    Ok(())
}

/// Returns the name of the list of the pool that has these CPUs.
fn find_list(dir: &ConfDir, pool: &str, cpus: &CpuSet) -> Result<String, Error> {
    let pools = dir.find()?.pools;
    let mut lists = pools.get(pool).into_iter().flat_map(|pool| pool.lists.keys());
    match lists.find(|list| confdir::parse_cpu_list(list).as_ref() == Some(cpus)) {
        Some(list) => Ok(list.clone()),
        None => bail!("pool {pool} has no CPU list {cpus}; kcm describe --format=table shows its lists"),
    }
}

/// Returns the name of the list of the pool that has this task. The task may have died since.
fn list_of(dir: &ConfDir, pool: &str, pid: u32) -> Result<String, Error> {
    let pools = dir.find()?.pools;
    let lists = pools.get(pool).into_iter().flat_map(|pool| &pool.lists);
    let mut lists = lists.filter(|(_, tasks)| tasks.contains(&pid));
    Ok(lists.next().map(|(list, _)| list.clone()).unwrap_or_default())
}

/// Returns until when to wait for a free list; without `--wait`, that is over at once.
pub(super) fn deadline(wait: Option<Wait>) -> Deadline {
    match wait {
        None => Deadline::after(Duration::ZERO),
        Some(None) => Deadline::NEVER,
        Some(Some(wait)) => Deadline::after(wait),
    }
}

/// Claims a list of the pool, and returns the list's name. Waits for a daemon that is away, too: a pod
/// that is replaced takes the mount along, and the next one mounts again.
pub(super) fn claim(dir: &ConfDir, wanted: &Wanted<'_>, deadline: Deadline) -> Result<String, Error> {
    loop {
        let before = device(dir.path());
        let error = match try_claim(dir, wanted, deadline) {
            Ok(list) => return Ok(list),
            Err(error) => error,
        };
        let status = mountpoint::status(dir.path());
        let is_away = matches!(status, Ok(Status::Stale | Status::Marked | Status::Absent));
        if deadline.has_passed() || !is_away && before == device(dir.path()) {
            return Err(error);
        }
        log::debug!("{error:#}; waiting for the next daemon");
        std::thread::sleep(AWAY_INTERVAL);
    }
}

/// The device number of the filesystem at a path. Each mount has another one.
fn device(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().map(|file| file.dev())
}

fn try_claim(dir: &ConfDir, wanted: &Wanted<'_>, deadline: Deadline) -> Result<String, Error> {
    let (pool, file) = (wanted.pool, wanted.tasks(dir));
    // For reading too, because poll(2) reports changes since the last read of this open file.
    let mut tasks = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&file)
        .map_err(|error| confdir::file_error(&file, error))?;
    let begun = Instant::now();
    let mut turn: Option<Turn> = None;
    loop {
        match tasks.write(wanted.line().as_bytes()) {
            Ok(_) => break,
            Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32) => {
                if deadline.has_passed() {
                    // Scripts know the beginning from the legacy kcm.
                    match dir.last_error(&error) {
                        Some(reason) if wanted.list.is_some() => bail!("{reason}"),
                        Some(reason) => bail!("No free cpu lists in pool {pool}: {reason}"),
                        None => bail!("No free cpu lists in pool {pool}"),
                    }
                }
                // A turn is for any list of the pool.
                if turn.is_none() && wanted.list.is_none() {
                    let reason = dir.last_error(&error).unwrap_or_default();
                    turn = Turn::enter(dir, pool, &wanted.line(), &reason)?;
                }
                match &turn {
                    Some(turn) => turn.wait(deadline)?,
                    None => wait_for_change(&mut tasks, deadline)
                        .map_err(|error| confdir::file_error(&file, error))?,
                }
            }
            // The daemon is busy with other requests of this user.
            Err(error)
                if error.raw_os_error() == Some(Errno::EAGAIN as i32) && begun.elapsed() < PATIENCE =>
            {
                log::debug!("{}: EAGAIN; trying again", file.display());
                std::thread::sleep(BUSY_INTERVAL);
            }
            // No free list suits this process. Another one may, once it is free.
            Err(error)
                if error.raw_os_error() == Some(Errno::EINVAL as i32)
                    && !deadline.has_passed()
                    && wanted.list.is_none()
                    && wanted.pid.is_none()
                    && a_taken_list_suits(dir, pool)? =>
            {
                log::debug!("{}: EINVAL; waiting for a list that suits", file.display());
                wait_for_change(&mut tasks, deadline).map_err(|error| confdir::file_error(&file, error))?;
            }
            Err(error) => return dir.with_reason(&file, || Err(error)),
        }
    }
    if let Some(pid) = wanted.pid {
        return list_of(dir, pool, pid);
    }
    let cpus = dir.path().join("self/cpus");
    let cpus = fs::read_to_string(&cpus).map_err(|error| confdir::file_error(&cpus, error))?;
    Ok(cpus.trim_end().to_owned())
}

/// Whether the kernel would let this process run on a list of the pool that is taken now.
fn a_taken_list_suits(dir: &ConfDir, pool: &str) -> Result<bool, Error> {
    let found = dir.find()?.pools;
    let Some(pool) = found.get(pool).filter(|pool| pool.exclusive) else { return Ok(false) };
    let taken = pool.lists.iter().filter(|(_, tasks)| !tasks.is_empty());
    let taken: Vec<CpuSet> = taken.filter_map(|(list, _)| confdir::parse_cpu_list(list)).collect();
    // Only the kernel knows, so it is asked. A mask belongs to a thread, and this thread ends.
    let suits = |cpus: &CpuSet| {
        affinity::set(0, cpus).is_ok() && affinity::get(0).is_ok_and(|got| got.as_ref() == Some(cpus))
    };
    let asked = std::thread::Builder::new().spawn(move || taken.iter().any(suits));
    Ok(asked.context("cannot start a thread")?.join().unwrap_or(false))
}

/// Waits until the file has changed since it was last read, and reads it.
fn wait_for_change(tasks: &mut fs::File, deadline: Deadline) -> io::Result<()> {
    match poll(&mut [PollFd::new(tasks.as_fd(), PollFlags::POLLPRI)], deadline.poll_timeout()) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    io::Seek::rewind(tasks)?;
    io::Read::read_to_end(tasks, &mut Vec::new()).map(|_| ())
}

/// Returns the command to start. Its arguments are passed on unchanged.
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
    child::keep_sigpipe(&mut command);
    command
}

/// Logs why the program did not start, and returns the status that a shell would return.
fn not_started(program: &Program, error: &io::Error) -> ExitCode {
    let name = match program {
        Program::Shell { .. } => Path::new("/bin/sh"),
        Program::Direct { program, .. } => Path::new(program),
    };
    let not_found = error.kind() == io::ErrorKind::NotFound;
    let cure = match (program, not_found) {
        (Program::Shell { .. }, true) => "; without a shell: kcm isolate --pool=<pool> -- <program> <args>",
        (Program::Direct { .. }, true) => "; look at its name and at PATH",
        _ => "; look at its mode",
    };
    log::error!(
        "{:#}",
        anyhow!("{}: {}{cure}", name.display(), Errno::from_raw(error.raw_os_error().unwrap_or(0)).desc())
    );
    ExitCode::from(if not_found { NOT_FOUND } else { NOT_EXECUTABLE })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(program: &Program) -> Vec<String> {
        let command = command(program, "0-1");
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        words.map(|word| word.to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn arguments_are_positional_parameters_of_a_shell() {
        let shell = |args: &[&str]| Program::Shell {
            line: "echo".into(),
            args: args.iter().map(Into::into).collect(),
        };
        assert_eq!(words(&shell(&[])), ["/bin/sh", "-c", "echo", "sh"]);
        assert_eq!(words(&shell(&["a  b"])), ["/bin/sh", "-c", "echo \"$@\"", "sh", "a  b"]);
        let direct = Program::Direct { program: "prog".into(), args: vec!["$HOME".into()] };
        assert_eq!(words(&direct), ["prog", "$HOME"]);
    }

    #[test]
    fn without_wait_there_is_one_attempt() {
        assert!(deadline(None).has_passed());
        assert_eq!(deadline(Some(None)), Deadline::NEVER);
        assert!(!deadline(Some(Some(Duration::from_secs(60)))).has_passed());
    }
}
