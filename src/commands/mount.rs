//! `kcm mount` and `kcm unmount`.
//!
//! Owns the choice between the foreground, the background and an upgrade. Does not know how the daemon serves.

use std::process::ExitCode;

use anyhow::{Error, bail};
use kcm_mount::daemon::{self, Import, MountError, MountPaths, Options};

use crate::cli;
use crate::host::Host;
use crate::service;

/// Mounts the directory, in the background unless `--foreground` is given. Leaves the background to systemd if it has a unit
/// for the directory.
pub(super) fn mount(args: &cli::Mount) -> Result<ExitCode, Error> {
    let paths = MountPaths { conf_dir: args.dir.conf_dir.clone(), state_dir: args.state_dir.clone() };
    let import = args.import.map(|import| match import {
        cli::Import::All => Import::Whole,
        cli::Import::Partial => Import::Partial,
    });
    let options = Options { import, until_unused: args.until_unused };
    if args.upgrade {
        daemon::upgrade(&paths)?;
    } else if args.foreground {
        // In a statement of its own, so that the host's descriptors are closed before the daemon closes all that it
        // has not opened itself.
        let topology = Host::from_env().topology()?;
        daemon::serve(&paths, topology, options)?;
    } else if args.import.is_none() && daemon::is_served(&paths) {
        log::info!("{}: already mounted; nothing to do", paths.conf_dir.display());
    } else if let Some(unit) = service::unit_of(&paths.conf_dir) {
        // Two managers of one mount would work against each other.
        bail!("{}: mounts {}; run systemctl start kcm", unit.display(), paths.conf_dir.display());
    } else {
        daemon::start_in_background(&paths, options)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Unmounts the directory and ends the daemon. Does nothing if it is not mounted.
pub(super) fn unmount(args: &cli::Unmount) -> Result<ExitCode, Error> {
    let conf_dir = &args.dir.conf_dir;
    let is_service = service::is_active(conf_dir);
    match daemon::unmount(conf_dir) {
        // A directory that does not exist is probably a typing error.
        Err(error @ MountError::NotMounted(_)) if conf_dir.is_dir() => log::info!("{error}"),
        result => {
            result?;
            if is_service {
                let conf_dir = conf_dir.display();
                log::warn!("{conf_dir}: the service kcm mounts it again; to end it, run systemctl stop kcm");
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
