//! The commands, one file each; `common` has what they share.
//!
//! Owns the dispatch. Does not know any flag.

mod apply;
mod cdi;
mod claim;
mod cluster_init;
mod cluster_uninstall;
mod common;
mod complete;
mod describe;
mod device_plugin;
mod discover;
mod events;
mod hook;
mod init;
mod install;
mod isolate;
mod manual;
mod mount;
mod node_report;
mod pool;
mod publish;
mod reclaims;
mod reconcile;
mod shield;
mod state;
mod status;
mod top;
mod undiscover;
mod uninstall;

use std::process::ExitCode;

use anyhow::Error;

pub(crate) use common::output::display_error;
pub(crate) use complete::complete_if_asked;

use crate::cli::{Cli, Command};
use crate::confdir;

/// Runs the command.
///
/// # Errors
/// The command failed.
pub(crate) fn run(cli: Cli) -> Result<ExitCode, Error> {
    // A mistake is an error now, and not only for the command that waits for a lock some day.
    confdir::lock_timeout()?;
    match cli.command {
        Command::Mount(args) => mount::mount(&args),
        Command::Unmount(args) => mount::unmount(&args),
        Command::ClusterInit(args) => cluster_init::run(&args),
        Command::ClusterUninstall(args) => cluster_uninstall::run(&args),
        Command::Init(args) => init::run(&args),
        Command::Pool(args) => pool::run(&args),
        Command::Apply(args) => apply::apply(&args),
        Command::Export(args) => apply::export(&args),
        Command::Isolate(args) => isolate::run(&args),
        Command::Claim(args) => claim::run(&args),
        Command::Events(args) => events::run(&args),
        Command::Cdi(args) => cdi::run(&args),
        Command::Hook(args) => hook::run(&args),
        Command::Shield(args) => shield::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Top(args) => top::run(&args),
        Command::Describe(args) => describe::run(&args),
        Command::DevicePlugin(args) => device_plugin::run(&args),
        Command::Discover(args) => discover::run(&args),
        Command::Undiscover(args) => undiscover::run(&args),
        Command::Reconcile(args) => reconcile::run(&args),
        Command::NodeReport(args) => node_report::run(&args),
        Command::Install(args) => install::run(&args),
        Command::Uninstall(args) => uninstall::run(&args),
        Command::Completions(args) => complete::run(&args),
        Command::Man(args) => manual::run(&args),
        Command::State(args) => state::run(&args),
    }
}
