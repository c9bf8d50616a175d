//! The `kcm` program: parse, dispatch, exit code.
//!
//! Owns: the three exit codes (0 done, 1 failed, 2 usage) and that a failure is one line. Must not know: what
//! a command does.

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
