//! `kcm state`: prints or checks a state directory, for troubleshooting.
//!
//! Owns the exit status. Does not know the files; [`kcm_mount::state`] reads them.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Error};
use kcm_mount::state::State;

use super::common::output::{json_text, print};
use crate::cli::{self, StateCommand};

/// Runs `kcm state show` or `kcm state check`.
///
/// # Errors
/// The directory cannot be read. A problem in it is not an error but an exit status.
pub(super) fn run(args: &cli::State) -> Result<ExitCode, Error> {
    match &args.command {
        StateCommand::Show { dir, json } => {
            let state = read(&dir.state_dir)?;
            print(&if *json { json_text(&state.to_json()) } else { state.to_text() })?;
            Ok(ExitCode::SUCCESS)
        }
        StateCommand::Check { dir } => {
            let state = read(&dir.state_dir)?;
            for problem in state.problems() {
                print(&format!("{}/{problem}\n", dir.state_dir.display()))?;
            }
            Ok(if state.problems().is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
    }
}

fn read(path: &Path) -> Result<State, Error> {
    let hint = "give the --state-dir of kcm mount, and run this as its user";
    State::read(path).with_context(|| format!("{}: cannot be read; {hint}", path.display()))
}
