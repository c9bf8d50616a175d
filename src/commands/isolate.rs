//! `kcm isolate`: runs a command on a CPU list of a pool.
//!
//! Owns the command's arguments and environment, and its start. Does not know how a list is chosen on a mount: the
//! daemon does that.

mod account;
mod failure;
mod plain;
mod simple;
mod turn;
mod wait;

use std::ffi::{CString, OsString};
use std::fs;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Error, anyhow, bail};
use kcm_mount::child;
use kcm_mount::model::cpuset::CpuSet;
use nix::errno::Errno;

use account::Account;

use super::describe;
use crate::cli::{self, Program};
use crate::confdir::{self, ConfDir};
use crate::service;

pub(super) use wait::{Wanted, claim, deadline, opened};

/// The environment variable in which the command finds its CPU list.
pub(super) const CPUS_ASSIGNED: &str = "KCM_CPUS_ASSIGNED";
/// The status of a shell if a program cannot be executed.
const NOT_EXECUTABLE: u8 = 126;
/// The status of a shell if a program does not exist.
const NOT_FOUND: u8 = 127;

/// Claims a list and executes the command in this process; on a plain directory, runs it as a child.
pub(super) fn run(args: &cli::Isolate) -> Result<ExitCode, Error> {
    args.check_wait().unwrap_or_else(|error| error.exit());
    if args.scope {
        return Err(enter_scope());
    }
    let deadline = deadline(args.wait);
    let (dir, list) = opened(&args.dir.conf_dir, deadline, |dir| {
        check_pool(dir, &args.pool)?;
        args.list.as_ref().map(|cpus| find_list(dir, &args.pool, cpus)).transpose()
    })?;
    let wanted = Wanted { pool: &args.pool, list: list.as_deref(), pid: args.pid };
    if !dir.is_mounted() && (args.pid.is_some() || args.user.is_some()) {
        bail!("{}: --pid and --user need a mount; run kcm mount --import", dir.path().display());
    }
    if let Some(pid) = args.pid {
        let list = claim(&dir, &wanted, deadline)?;
        log::info!("{pid} is on {} {list}.", args.pool);
        return Ok(ExitCode::SUCCESS);
    }
    let Some(program) = args.program().map(simple::without_shell) else { bail!("no command; give one") };
    if !dir.is_mounted() {
        return plain::run(&dir, &wanted, &program, deadline);
    }
    let account = args.user.as_deref().map(Account::find).transpose()?;
    name_process(&program);
    let cpus = claim(&dir, &wanted, deadline)?;
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
}
