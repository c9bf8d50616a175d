//! `kcm cdi`: describes CPU lists to container runtimes, so that `--device` claims one for a container.
//!
//! Owns when specs are written: once, or whenever lists come and go. Does not know how a claim is made: `kcm hook` does that.

mod files;
pub(super) mod spec;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Error;
use kcm_mount::model::document::Document;
use nix::poll::PollTimeout;
use serde_json::Value;

use super::common::follow::{Follower, follow};
use crate::cli::{self, CdiCommand};
use crate::confdir::ConfDir;
use files::{Changes, Files};
use spec::Source;

/// How long to wait until files that could not be written are tried again, in milliseconds.
const RETRY_INTERVAL: u16 = 5000;
/// How often a change of the pools that came meanwhile is followed, without `--follow`.
const ATTEMPTS: usize = 10;

/// Writes or removes specs.
///
/// # Errors
/// The daemon does not run, or a file cannot be read or written.
pub(super) fn run(args: &cli::Cdi) -> Result<ExitCode, Error> {
    match &args.command {
        CdiCommand::Install { follow: is_following, program, no_mount } => {
            let program = program.clone().map_or_else(spec::own_program, Ok)?;
            let source = Source::new(&program, &args.conf_dir)?;
            let source = if *no_mount { source.without_mount() } else { source };
            let files = Files { directory: &args.dir, source: &source };
            if *is_following {
                match follow(&args.conf_dir, &mut Following { files: &files, said: None })? {}
            }
            install(&args.conf_dir, &files)?;
        }
        CdiCommand::Uninstall => {
            let removed = remove(&args.dir, &args.conf_dir)?;
            removed.iter().for_each(|file| log::info!("Removed {}.", file.display()));
            if removed.is_empty() {
                let (dir, conf_dir) = (args.dir.display(), args.conf_dir.display());
                log::info!("{dir}: has no specs of {conf_dir}; nothing to do");
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Removes the specs of a configuration directory, and returns their files.
///
/// # Errors
/// One of them cannot be removed.
pub(super) fn remove(directory: &Path, conf_dir: &Path) -> Result<Vec<PathBuf>, Error> {
    Files { directory, source: &Source::new(Path::new("/"), conf_dir)? }.remove_all()
}

/// Returns the files of the specs of a configuration directory.
///
/// # Errors
/// The directory of specs cannot be read.
pub(super) fn installed(directory: &Path, conf_dir: &Path) -> Result<Vec<PathBuf>, Error> {
    Files { directory, source: &Source::new(Path::new("/"), conf_dir)? }.own()
}

fn install(conf_dir: &Path, files: &Files<'_>) -> Result<(), Error> {
    let dir = ConfDir::open_mounted(conf_dir)?;
    let mut pools = dir.document()?;
    let mut has_changed = false;
    for _ in 0..ATTEMPTS {
        has_changed |= update(files, &pools)?;
        // Another process may have written specs of pools that have come meanwhile.
        let now = dir.document()?;
        if now == pools {
            break;
        }
        pools = now;
    }
    if !has_changed {
        log::info!("{}: the specs are up to date.", files.directory.display());
    }
    Ok(())
}

/// Specs that follow the pools.
struct Following<'a> {
    files: &'a Files<'a>,
    /// The last error, which is said once.
    said: Option<String>,
}

impl Follower for Following<'_> {
    fn changed(&mut self, _dir: &ConfDir, pools: Document) -> Result<PollTimeout, Error> {
        let Err(error) = update(self.files, &pools) else {
            self.said = None;
            return Ok(PollTimeout::NONE);
        };
        let message = format!("{error:#}");
        if self.said.as_ref() != Some(&message) {
            log::error!("{message}");
            self.said = Some(message);
        }
        Ok(PollTimeout::from(RETRY_INTERVAL))
    }
}

/// Writes the specs of these pools, and removes the others. Returns whether a file has changed.
fn update(files: &Files<'_>, pools: &Document) -> Result<bool, Error> {
    let specs: BTreeMap<String, Value> = pools
        .pools
        .iter()
        .map(|(name, pool)| {
            let lists = pool.lists.iter().map(|list| list.cpus.as_str());
            (spec::file_of(&spec::kind(name)), files.source.spec(name, lists))
        })
        .collect();
    let Changes { written, removed, failed } = files.update(&specs);
    written.iter().for_each(|file| log::info!("Wrote {}.", file.display()));
    for name in pools.pools.keys() {
        let kind = spec::kind(name);
        let is_new = written.iter().any(|file| file.ends_with(spec::file_of(&kind)));
        if is_new && !spec::is_class(name) {
            log::info!("The pool {name} has the kind {kind}, because a class of CDI begins with a letter.");
        }
    }
    removed.iter().for_each(|file| log::info!("Removed {}.", file.display()));
    failed.map_or(Ok(!written.is_empty() || !removed.is_empty()), Err)
}
