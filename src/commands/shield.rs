//! `kcm shield`: runs a command alone on CPUs, on a list that is made for it.
//!
//! Owns the pool of these lists, and the daemon for a machine on which none runs. Removes nothing that it has made: the
//! daemon does, because this process becomes the command, and may be killed before.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Error, bail};
use kcm_mount::daemon::{self, MountPaths, Options};
use kcm_mount::model::cpuset::CpuSet;
use kcm_mount::mountpoint::{self, Status};

use super::isolate;
use crate::cli;
use crate::confdir::{self, ConfDir};

/// The pool of the lists that are made here.
const POOL: &str = "shield";
/// The files of the pool, in the order in which they are written: from the first one on the daemon removes what is left.
const SETTINGS: [(&str, &str); 3] = [("transient", "1"), ("exclusive", "1"), ("mode", "isolated")];
/// The mount on a machine on which no other daemon runs, and its state directory.
const OWN_CONF_DIR: &str = "/run/kcm-shield";
const OWN_STATE_DIR: &str = "/run/kcm-shield.state";
/// How long to try again when something is removed that this process needs, because another command has ended.
const PATIENCE: Duration = Duration::from_secs(10);
const INTERVAL: Duration = Duration::from_millis(20);

/// Why this attempt has failed.
enum Failure {
    /// Something was removed or made meanwhile.
    Meanwhile(Error),
    Final(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

/// Claims the CPUs and executes the command in this process.
pub(super) fn run(args: &cli::Shield) -> Result<ExitCode, Error> {
    if args.scope {
        return Err(isolate::enter_scope());
    }
    let Some(program) = args.program() else { bail!("no program; give one") };
    let begun = Instant::now();
    let pool = loop {
        match claim(&args.dir.conf_dir, &args.cpus) {
            Ok(pool) => break pool,
            Err(Failure::Meanwhile(error)) if begun.elapsed() < PATIENCE => {
                log::debug!("{error:#}; trying again");
                std::thread::sleep(INTERVAL);
            }
            Err(Failure::Meanwhile(error) | Failure::Final(error)) => return Err(error),
        }
    };
    Ok(isolate::execute(&program, &args.cpus.to_string(), &pool))
}

/// Puts this process on an isolated list with these CPUs, and returns the directory of its pool.
fn claim(conf_dir: &Path, cpus: &CpuSet) -> Result<PathBuf, Failure> {
    let dir = served(conf_dir)?;
    let pools = dir.find().map_err(|error| gone_or(&dir, error))?.pools;
    let has_cpus = |list: &&String| confdir::parse_cpu_list(list).as_ref() == Some(cpus);
    let isolated = pools.iter().filter(|(_, pool)| pool.isolated);
    let known = isolated.filter_map(|(name, pool)| Some((name, pool.lists.keys().find(has_cpus)?))).next();
    if let Some((pool, list)) = known {
        enter(&dir, pool, list)?;
        return Ok(dir.pool(pool));
    }
    let list = cpus.to_string();
    make(&dir, &list).and_then(|()| enter(&dir, POOL, &list)).inspect_err(|_| {
        // The daemon would do it, but later. What somebody uses stays.
        let _ = fs::remove_dir(dir.pool(POOL).join(&list));
        let _ = fs::remove_dir(dir.pool(POOL));
    })?;
    Ok(dir.pool(POOL))
}

/// Returns the mount at `conf_dir`. If nothing is there, and nothing was, it is a mount of commands like this one, whose
/// daemon is started if it does not run.
fn served(conf_dir: &Path) -> Result<ConfDir, Failure> {
    let is_empty = || fs::read_dir(conf_dir).is_ok_and(|mut entries| entries.next().is_none());
    match mountpoint::status(conf_dir) {
        Ok(Status::Absent) => {}
        Ok(Status::Plain) if is_empty() => {}
        Ok(Status::Plain) => {
            let conf_dir = conf_dir.display();
            return Err(Error::msg(format!(
                "{conf_dir}: only a mount has isolated pools; run kcm mount --import"
            ))
            .into());
        }
        _ => return Ok(ConfDir::open(conf_dir)?),
    }
    let own = Path::new(OWN_CONF_DIR);
    confdir::check_answers(own)?;
    if !matches!(mountpoint::status(own), Ok(Status::Live)) {
        let paths = MountPaths { conf_dir: own.to_owned(), state_dir: OWN_STATE_DIR.into() };
        let options = Options { until_unused: true, ..Options::default() };
        match daemon::start_in_background(&paths, options) {
            Ok(()) => {}
            // Another command may have started it.
            Err(_) if matches!(mountpoint::status(own), Ok(Status::Live)) => {}
            Err(error) => return Err(Failure::Final(error.into())),
        }
    }
    ConfDir::open(own).map_err(Failure::Meanwhile)
}

/// Makes the list, and its pool, as far as they are missing.
fn make(dir: &ConfDir, list: &str) -> Result<(), Failure> {
    let pool = dir.pool(POOL);
    attempt(dir, &pool, || make_dir(&pool))?;
    let is =
        |file: &str, value: &str| fs::read_to_string(pool.join(file)).is_ok_and(|text| text.trim() == value);
    for (file, value) in SETTINGS {
        if is(file, value) {
            continue;
        }
        let has_lists = fs::read_dir(&pool).is_ok_and(|entries| {
            entries.filter_map(Result::ok).any(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        });
        if has_lists {
            let pool = pool.display();
            let error = Error::msg(format!(
                "{pool}: somebody else has made this pool; remove it, or set {file} to {value}"
            ));
            return Err(error.into());
        }
        let file = pool.join(file);
        attempt(dir, &file, || fs::write(&file, value))?;
    }
    let list = pool.join(list);
    attempt(dir, &list, || make_dir(&list))
}

/// Puts this process on the list.
fn enter(dir: &ConfDir, pool: &str, list: &str) -> Result<(), Failure> {
    let tasks = dir.tasks(pool, list);
    attempt(dir, &tasks, || fs::write(&tasks, "0"))
}

/// Makes a directory, if it is not there yet.
fn make_dir(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        result => result,
    }
}

fn attempt(dir: &ConfDir, file: &Path, operation: impl FnOnce() -> io::Result<()>) -> Result<(), Failure> {
    let mut meanwhile = false;
    let operation = || {
        operation().inspect_err(|error| {
            let again = [ErrorKind::NotFound, ErrorKind::WouldBlock].contains(&error.kind());
            meanwhile = again || confdir::is_daemon_gone(error);
        })
    };
    let result = dir.with_reason(file, operation);
    result.map_err(|error| if meanwhile { Failure::Meanwhile(error) } else { Failure::Final(error) })
}

/// An error while the pools are read: if the daemon has ended meanwhile, another one is started.
fn gone_or(dir: &ConfDir, error: Error) -> Failure {
    match dir.check_mounted() {
        Err(gone) => Failure::Meanwhile(gone),
        Ok(()) => Failure::Final(error),
    }
}
