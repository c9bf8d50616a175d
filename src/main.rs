//! The `kcm` program: parses the command line, runs a command, returns the exit code.
//!
//! Owns the exit codes (0 success, 1 failure, 2 wrong usage), and prints a failure as one line. Does not know what a
//! command does.

mod backoff;
mod cli;
mod commands;
mod confdir;
mod host;
mod host_command;
mod kubernetes;
mod logging;
mod service;
mod version;

use std::process::ExitCode;

use kcm_mount::daemon::Invocation;

fn main() -> ExitCode {
    logging::init();
    commands::complete_if_asked();
    // The daemon's own processes have a command line that is not for users; clap does not know it.
    let result = match Invocation::parse(std::env::args_os().skip(1)) {
        Some(invocation) => {
            let read = || Ok(host::current_topology()?);
            invocation
                .and_then(|it| it.run(read, version::VERSION))
                .map_err(Into::into)
                .map(|()| ExitCode::SUCCESS)
        }
        None => commands::run(cli::Cli::of_process()),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            if let Some(line) = commands::display_error(&error) {
                log::error!("{line}");
            }
            ExitCode::FAILURE
        }
    }
}
