//! `kcm claim`: claims a CPU list for the shell that calls it, or for another process.
//!
//! Owns nothing but the order of the steps. Does not know how a list is chosen: the daemon does that.

use std::process::ExitCode;

use anyhow::{Context as _, Error, bail};
use kcm_mount::affinity;

use super::common::output::print;
use super::isolate::{self, Wanted};
use crate::cli;

/// Claims a list and prints its CPUs.
pub(super) fn run(args: &cli::Claim) -> Result<ExitCode, Error> {
    let deadline = isolate::deadline(args.wait);
    let (dir, ()) = isolate::opened(&args.dir.conf_dir, deadline, |dir| {
        if !dir.is_mounted() {
            bail!(
                "{}: a plain directory, which no daemon serves; start one: kcm mount",
                dir.path().display()
            );
        }
        isolate::check_pool(dir, &args.pool)
    })?;
    let pid = match args.pid {
        Some(pid) => pid,
        None => nix::unistd::getppid().as_raw() as u32,
    };
    if pid == 0 {
        bail!("the calling process is in another PID namespace; name one: --pid=PID");
    }
    let wanted = Wanted { pool: &args.pool, list: None, pid: Some(pid) };
    isolate::claim(&dir, &wanted, deadline)?;
    let cpus = affinity::get(pid).with_context(|| format!("the CPUs of {pid}"))?;
    let cpus = cpus.with_context(|| format!("{pid} has ended"))?;
    print(&format!("{cpus}\n"))?;
    Ok(ExitCode::SUCCESS)
}
