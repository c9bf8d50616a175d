//! `kcm hook`: claims a CPU list for the first process of a container, before that runs.
//!
//! Owns the bounds of time, and that a container has one device of kcm. Does not know how a list is chosen: the daemon does that.
//!
//! A write to a mount that does not answer hangs, in a way that not even SIGKILL ends, and a runtime waits for its hook and for
//! everybody who has the hook's standard error. So another process claims, and is given up after a bounded time.

mod container;

use std::fs::OpenOptions;
use std::io::{self, ErrorKind, Write as _};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Error, bail};
use kcm_mount::mountpoint::{self, Status};
use serde::{Deserialize, Serialize};

use super::common::other_process::output_within;
use super::common::output::{display_error, print};
use super::isolate;
use crate::cli;
use crate::confdir::ConfDir;
use container::Container;

/// How long a claim may take: longer than the daemon takes for a write of root, 10 s, and than `mountpoint::status`.
const MOST: Duration = Duration::from_secs(15);
/// How long a daemon that is away, because it is replaced, is waited for: a pod takes about half a second for that.
const AWAY_PATIENCE: Duration = Duration::from_secs(5);
/// How long a daemon that answers EAGAIN is tried again.
const BUSY_PATIENCE: Duration = Duration::from_secs(5);
const INTERVAL: Duration = Duration::from_millis(50);

/// The answer of the process that claims.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Answer {
    Claimed,
    Refused(String),
}

/// Claims for the container whose state is on standard input.
///
/// # Errors
/// The state is not one, or the daemon refuses the claim or does not answer.
pub(super) fn run(args: &cli::Hook) -> Result<ExitCode, Error> {
    if let Some(pid) = args.claim {
        // Events name it. Without this it has the name of the link to itself.
        let _ = nix::sys::prctl::set_name(c"kcm");
        let claimed = check_bundle(args.bundle.as_deref()).and_then(|()| claim(args, pid));
        let answer = match claimed {
            Ok(()) => Answer::Claimed,
            Err(error) => Answer::Refused(display_error(&error).unwrap_or_default()),
        };
        print(&serde_json::to_string(&answer)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let container = Container::of_standard_input()?;
    let conf_dir = args.dir.conf_dir.display();
    match output_within(claiming(args, &container), MOST)?.as_deref().map(serde_json::from_str) {
        Some(Ok(Answer::Claimed)) => Ok(ExitCode::SUCCESS),
        Some(Ok(Answer::Refused(reason))) => bail!("{reason}"),
        Some(Err(_)) => bail!("{conf_dir}: the process that claims has ended; look at the log of the kernel"),
        None => bail!("{conf_dir}: kcm mount does not answer; look at its log, and at kcm status"),
    }
}

/// Returns the command that claims for the container.
fn claiming(args: &cli::Hook, container: &Container) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg("hook").arg("--conf-dir").arg(&args.dir.conf_dir).arg(format!("--pool={}", args.pool));
    command.args(args.list.as_ref().map(|list| format!("--list={list}")));
    command.arg(format!("--claim={}", container.pid));
    if let Some(bundle) = &container.bundle {
        command.arg("--bundle").arg(bundle);
    }
    // A process that hangs must not keep the runtime waiting for the end of the hook's standard error.
    command.stderr(Stdio::null());
    command
}

/// Checks that no other device of kcm was given to the container: the second claim would move its process off the list of the
/// first one.
fn check_bundle(bundle: Option<&Path>) -> Result<(), Error> {
    let devices = bundle.map(container::devices).unwrap_or_default();
    if let [_, _, ..] = devices[..] {
        bail!(
            "the container has several devices of kcm: {}; it can have one, so leave the others out",
            devices.join(", ")
        );
    }
    Ok(())
}

/// Claims, and waits a little for a daemon that is away.
fn claim(args: &cli::Hook, pid: u32) -> Result<(), Error> {
    let begun = Instant::now();
    loop {
        let error = match try_claim(args, pid) {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        let is_away = matches!(
            mountpoint::status(&args.dir.conf_dir),
            Ok(Status::Stale | Status::Marked | Status::Absent)
        );
        if !is_away || begun.elapsed() > AWAY_PATIENCE {
            return Err(error);
        }
        std::thread::sleep(INTERVAL);
    }
}

fn try_claim(args: &cli::Hook, pid: u32) -> Result<(), Error> {
    let dir = ConfDir::open_mounted(&args.dir.conf_dir)?;
    let pool = dir.pool(&args.pool);
    let list = args.list.as_ref().map_or_else(|| pool.clone(), |list| pool.join(list));
    let tasks = list.join("tasks");
    let begun = Instant::now();
    let written = loop {
        match write(&tasks, pid) {
            Err(error) if error.kind() == ErrorKind::WouldBlock && begun.elapsed() < BUSY_PATIENCE => {
                std::thread::sleep(INTERVAL);
            }
            written => break written,
        }
    };
    if written.as_ref().is_err_and(|error| error.kind() == ErrorKind::NotFound) {
        isolate::check_pool(&dir, &args.pool)?;
        if let Some(list) = &args.list {
            bail!(
                "pool {} has no CPU list {list}; kcm cdi install writes the devices that there are",
                args.pool
            );
        }
    }
    dir.with_reason(&tasks, || written)
}

fn write(tasks: &Path, pid: u32) -> io::Result<()> {
    OpenOptions::new().write(true).open(tasks)?.write_all(format!("cgroup:{pid}\n").as_bytes())
}
