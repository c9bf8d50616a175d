//! `kcm man`: the man pages.
//!
//! Owns which pages there are, and their files. `page` makes those of the commands from the definitions in `cli`, `tree` the
//! one of the configuration directory, kcm(5). This file does not know any flag or file.

mod heading;
mod page;
mod tree;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Error;
use clap::error::ErrorKind;
use clap::{Command, CommandFactory as _};

use super::common::output::print;
use crate::cli;

/// The word for kcm(5), after the section of the manual.
pub(super) const DIRECTORY: &str = "5";

/// A man page.
pub(super) struct Page {
    /// Its file below the directory of man pages.
    pub(super) file: PathBuf,
    pub(super) text: Vec<u8>,
}

/// Prints the man page of kcm(1), of one command, or of the configuration directory.
pub(super) fn run(args: &cli::Man) -> Result<ExitCode, Error> {
    let program = program();
    let text = match args.command.as_deref() {
        None => page::of_command(&program, &program)?,
        Some(DIRECTORY) => tree::page()?,
        Some(name) => match program.find_subcommand(name) {
            Some(command) => page::of_command(&program, command)?,
            None => {
                let error = format!("kcm has no command '{name}'; {DIRECTORY} is the directory, kcm(5)");
                cli::Cli::command().error(ErrorKind::InvalidValue, error).exit()
            }
        },
    };
    print(&String::from_utf8_lossy(&text))?;
    Ok(ExitCode::SUCCESS)
}

/// Returns all pages.
pub(super) fn all() -> Result<Vec<Page>, Error> {
    let program = program();
    let mut pages = vec![Page { file: "man5/kcm.5".into(), text: tree::page()? }];
    let mut todo = vec![&program];
    while let Some(command) = todo.pop() {
        let name = command.get_display_name().unwrap_or("kcm");
        let file = format!("man1/{name}.1").into();
        pages.push(Page { file, text: page::of_command(&program, command)? });
        todo.extend(command.get_subcommands());
    }
    Ok(pages)
}

/// Returns the definitions of all commands. The command `help` has no page.
fn program() -> Command {
    let mut command = cli::Cli::command().disable_help_subcommand(true);
    command.build();
    command
}
