//! `kcm cdi`: describes CPU lists to container runtimes, so that `--device` claims one for a container.
//!
//! Owns when specs are written: once, or whenever lists come and go. Does not know how a claim is made: `kcm hook` does that.

mod files;
pub(super) mod spec;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Error};
use kcm_mount::model::document::Document;
use kcm_mount::mountpoint::{self, Status};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::Value;

use crate::cli::{self, CdiCommand};
use crate::confdir::{self, ConfDir};
use files::{Changes, Files};
use spec::Source;

/// How often a directory whose daemon is away is tried again.
const AWAY_INTERVAL: Duration = Duration::from_millis(200);
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
        CdiCommand::Install { follow: is_following, program } => {
            let program = program.clone().map_or_else(spec::own_program, Ok)?;
            let source = Source::new(&program, &args.conf_dir)?;
            let files = Files { directory: &args.dir, source: &source };
            if *is_following { follow(&args.conf_dir, &files)? } else { install(&args.conf_dir, &files)? }
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

/// Writes specs whenever pools or lists come and go. Returns only if that is impossible.
fn follow(conf_dir: &Path, files: &Files<'_>) -> Result<(), Error> {
    let (mut is_waiting, mut was_final) = (false, false);
    loop {
        let error = match ConfDir::open_mounted(conf_dir).and_then(|dir| follow_mount(&dir, files)) {
            Ok(never) => match never {},
            Err(error) => error,
        };
        let causes = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>());
        let is_of_another = causes.into_iter().any(confdir::is_of_another_daemon);
        let is_away = !matches!(mountpoint::status(conf_dir), Ok(Status::Live | Status::Plain) | Err(_));
        let is_final = !is_of_another && !is_away;
        // The next daemon may have come after the attempt.
        if is_final && was_final {
            return Err(error);
        }
        if is_away && !is_waiting {
            log::info!("{}: no daemon answers; waiting for the next one", conf_dir.display());
        }
        (is_waiting, was_final) = (is_away, is_final);
        std::thread::sleep(AWAY_INTERVAL);
    }
}

/// Follows the configuration of one daemon.
fn follow_mount(dir: &ConfDir, files: &Files<'_>) -> Result<Infallible, Error> {
    let path = dir.path().join("info/config");
    let mut config = File::open(&path).map_err(|error| match error.kind() {
        // A daemon without this file is of an older version.
        io::ErrorKind::NotFound => confdir::file_error(&path, error),
        _ => failed(&path, error),
    })?;
    let mut said = None;
    loop {
        let mut text = Vec::new();
        let read = config.rewind().and_then(|()| config.read_to_end(&mut text));
        read.map_err(|error| failed(&path, error))?;
        let pools: Document = serde_json::from_slice(&text).with_context(|| {
            format!("{}: another version of kcm serves it; use the kcm that does", path.display())
        })?;
        let timeout = match update(files, &pools) {
            Ok(_) => {
                said = None;
                PollTimeout::NONE
            }
            Err(error) => {
                let message = format!("{error:#}");
                if said.as_ref() != Some(&message) {
                    log::error!("{message}");
                    said = Some(message);
                }
                PollTimeout::from(RETRY_INTERVAL)
            }
        };
        match poll(&mut [PollFd::new(config.as_fd(), PollFlags::POLLPRI)], timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(failed(&path, errno.into())),
        }
    }
}

/// An error of the mount, with its cause for [`confdir::is_of_another_daemon`].
fn failed(path: &Path, error: io::Error) -> Error {
    if confdir::is_of_another_daemon(&error) {
        return Error::new(error).context(format!("{}: cannot be read", path.display()));
    }
    confdir::file_error(path, error)
}

/// Makes the files those of these pools. Returns whether one has changed.
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
