//! `kcm mount` and `kcm unmount`.
//!
//! Owns: what the daemon is told on its command line. Must not know: how it serves.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Error;
use kcm_mount::daemon::{self, Options};

use crate::cli;
use crate::host::Host;

/// Mounts, in the background unless told otherwise.
pub(super) fn mount(args: &cli::Mount) -> Result<ExitCode, Error> {
    if !args.foreground {
        daemon::start_in_background(&daemon_args(args)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let options = Options {
        conf_dir: args.dir.conf_dir.clone(),
        state_dir: args.state_dir.clone(),
        topology: Host::from_env().topology()?,
        import: args.import,
    };
    daemon::serve(&options)?;
    Ok(ExitCode::SUCCESS)
}

/// The daemon's paths are absolute: its working directory is `/`, and `ps` is to say what it serves.
fn daemon_args(args: &cli::Mount) -> Result<Vec<OsString>, Error> {
    let flag = |name: &str, path: &Path| {
        let mut flag = OsString::from(name);
        flag.push(std::path::absolute(path)?);
        Ok::<_, std::io::Error>(flag)
    };
    let mut all = vec![
        "mount".into(),
        "--foreground".into(),
        flag("--conf-dir=", &args.dir.conf_dir)?,
        flag("--state-dir=", &args.state_dir)?,
    ];
    all.extend(args.import.then(|| "--import".into()));
    Ok(all)
}

/// Ends the mount.
pub(super) fn unmount(args: &cli::Unmount) -> Result<ExitCode, Error> {
    daemon::unmount(&args.dir.conf_dir)?;
    Ok(ExitCode::SUCCESS)
}
