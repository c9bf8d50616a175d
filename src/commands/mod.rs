//! The commands, one file each.
//!
//! Owns: dispatch. Must not know: flags.

mod beat;
mod cluster_init;
mod describe;
mod discover;
mod init;
mod install;
mod isolate;
mod manual;
mod mount;
mod node_report;
mod publish;
mod reclaims;
mod reconcile;

use std::io::{ErrorKind, Write as _};
use std::process::ExitCode;

use anyhow::Error;
use kcm_mount::daemon::MountError;

use crate::cli::{Cli, Command};

/// Runs what was typed.
///
/// # Errors
/// Whatever keeps the command from doing what it is for.
pub(crate) fn run(cli: Cli) -> Result<ExitCode, Error> {
    match cli.command {
        Command::Mount(args) => mount::mount(&args),
        Command::Unmount(args) => mount::unmount(&args),
        Command::ClusterInit(args) => cluster_init::run(&args),
        Command::Init(args) => init::run(&args),
        Command::Isolate(args) => isolate::run(&args),
        Command::Describe(args) => describe::run(&args),
        Command::Discover(args) => discover::run(&args),
        Command::Reconcile(args) => reconcile::run(&args),
        Command::NodeReport(args) => node_report::run(&args),
        Command::Install(args) => install::install(&args),
        Command::Uninstall(args) => install::uninstall(&args),
        Command::Completions(args) => manual::completions(&args),
        Command::Man(args) => manual::man(&args),
    }
}

/// What is to be said of an error; None where it has been said.
pub(crate) fn one_line(error: &Error) -> Option<String> {
    if matches!(error.downcast_ref(), Some(MountError::Background)) {
        return None;
    }
    // Nobody reads any more, and wants no message about it.
    let gone = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
    };
    if error.chain().any(gone) {
        return None;
    }
    Some(format!("{error:#}").replace('\n', " "))
}

/// Writes to stdout what was asked for.
fn print(text: &str) -> Result<(), Error> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}
