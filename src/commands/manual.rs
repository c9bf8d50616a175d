//! `kcm completions` and `kcm man`.
//!
//! Owns the choice of the page. Both are generated from the definitions in `cli`; this file does not know any flag.

use std::process::ExitCode;

use anyhow::Error;
use clap::CommandFactory as _;
use clap::error::ErrorKind;

use super::common::output::print;
use crate::cli;

/// Prints the completion script for a shell.
pub(super) fn completions(args: &cli::Completions) -> Result<ExitCode, Error> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut cli::Cli::command(), "kcm", &mut script);
    print(&String::from_utf8_lossy(&script))?;
    Ok(ExitCode::SUCCESS)
}

/// Prints the man page of kcm(1), or of one command.
pub(super) fn man(args: &cli::Man) -> Result<ExitCode, Error> {
    let mut command = cli::Cli::command();
    command.build();
    if let Some(name) = &args.command {
        let Some(found) = command.find_subcommand(name) else {
            command.error(ErrorKind::InvalidValue, format!("kcm has no command '{name}'")).exit()
        };
        command = found.clone();
    }
    print(&String::from_utf8_lossy(&page_of(command)?))?;
    Ok(ExitCode::SUCCESS)
}

/// Returns the man page of kcm(1).
pub(super) fn page() -> Result<Vec<u8>, Error> {
    let mut command = cli::Cli::command();
    command.build();
    page_of(command)
}

fn page_of(command: clap::Command) -> Result<Vec<u8>, Error> {
    let mut page = Vec::new();
    clap_mangen::Man::new(command).render(&mut page)?;
    Ok(page)
}
