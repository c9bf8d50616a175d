//! The `kcm` program: parses the command line, runs a command, returns the exit code.
//!
//! Owns the exit codes (0 success, 1 failure, 2 wrong usage), and prints a failure as one line. Does not know what a
//! command does.

mod backoff;
mod cli;
mod commands;
mod confdir;
mod host;
mod kubernetes;
mod logging;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    logging::init();
    match commands::run(cli::Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            if let Some(line) = commands::display_error(&error) {
                log::error!("{line}");
            }
            ExitCode::FAILURE
        }
    }
}
