//! `kcm mount` and `kcm unmount`.
//!
//! Owns: what the daemon is told on its command line. Must not know: how it serves.

use std::process::ExitCode;

use anyhow::Error;
use kcm_mount::daemon::{self, Part, Places};

use crate::cli;
use crate::host::Host;

/// Mounts, in the background unless told otherwise.
pub(super) fn mount(args: &cli::Mount) -> Result<ExitCode, Error> {
    let places = Places { conf_dir: args.dir.conf_dir.clone(), state_dir: args.state_dir.clone() };
    if args.upgrade {
        daemon::upgrade(&places)?;
    } else if args.foreground {
        daemon::run(&places, part(args)?)?;
    } else {
        daemon::start_in_background(&places, args.import)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn part(args: &cli::Mount) -> Result<Part, Error> {
    Ok(match &args.part {
        cli::Part { worker: true, .. } => Part::Work,
        cli::Part { prove: true, .. } => Part::Prove,
        cli::Part { probe: true, .. } => Part::Probe,
        cli::Part { adopt: true, replace, .. } => Part::Adopt { replace: *replace },
        _ => Part::Keep { topology: Host::from_env().topology()?, import: args.import },
    })
}

/// Ends the mount.
pub(super) fn unmount(args: &cli::Unmount) -> Result<ExitCode, Error> {
    daemon::unmount(&args.dir.conf_dir)?;
    Ok(ExitCode::SUCCESS)
}
