//! `kcm uninstall`: takes down everything that kcm has on this machine.
//!
//! Owns the order: what can be refused first, then the pools, the service and the mount, the files, and with `--purge` the
//! state directory and the mount point. Does not know how files are installed.
//!
//! A claim can be taken back only by a daemon, because it has a mask to restore and perhaps a partition to remove. So if no
//! daemon runs and the state directory has claims or pools, one is started for the removal.

mod pools;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Error, bail};
use kcm_mount::daemon::{self, MountPaths, Options, Served};
use kcm_mount::mountpoint;
use kcm_mount::state::State;

use super::common::node::{is_in_pod, node_name_if_any};
use super::{cdi, discover, install};
use crate::cli;
use crate::confdir::{self, ConfDir};
use crate::service::{self, CDI_UNIT, UNIT};

/// What is there to be removed.
struct Installed<'a> {
    args: &'a cli::Uninstall,
    conf_dir: &'a Path,
    served: Served,
    /// The state directory of the mount, if it is known.
    state_dir: Option<PathBuf>,
    /// The unit that serves the directory.
    unit: Option<PathBuf>,
    /// Whether the mount point does not exist, so that it is not left behind either.
    is_absent: bool,
}

/// Uninstalls, or says with `--dry-run` what it would do.
pub(super) fn run(args: &cli::Uninstall) -> Result<ExitCode, Error> {
    let installed = Installed::find(args)?;
    if args.dry_run {
        installed.check()?;
        installed.show()?;
        return Ok(ExitCode::SUCCESS);
    }
    let is_started = installed.start_if_needed()?;
    let removed = installed.remove();
    if removed.is_err() && is_started {
        // As it was before.
        let _ = daemon::unmount(installed.conf_dir);
    }
    removed?;
    Ok(ExitCode::SUCCESS)
}

impl<'a> Installed<'a> {
    fn find(args: &'a cli::Uninstall) -> Result<Self, Error> {
        let conf_dir = &*args.dir.conf_dir;
        confdir::check_answers(conf_dir)?;
        let served = daemon::served(conf_dir)?;
        let state_dir = state_dir(args, &served)?;
        let (unit, is_absent) = (service::unit_of(conf_dir), !conf_dir.exists());
        let installed = Self { args, conf_dir, served, state_dir, unit, is_absent };
        if args.purge {
            installed.check_purge()?;
        }
        Ok(installed)
    }

    /// Checks that the state directory is known, and that no daemon will use it.
    fn check_purge(&self) -> Result<(), Error> {
        let conf_dir = self.conf_dir.display();
        if !self.can_unmount() && self.served != Served::No {
            bail!("{conf_dir}: its daemon ends elsewhere, so nothing can be purged here; end it there first");
        }
        if self.state_dir.is_none() {
            bail!("{conf_dir}: its state directory is not known without a daemon; give --state-dir");
        }
        Ok(())
    }

    /// Whether the mount can be ended from here, and stays ended: the kubelet starts a pod again.
    fn can_unmount(&self) -> bool {
        matches!(self.served, Served::Here(_) | Served::Stale) && !is_in_pod()
    }

    /// The state of the mount that is not served, if there is any.
    ///
    /// # Errors
    /// The state directory cannot be read, or another daemon uses it.
    fn left_state(&self) -> Result<Option<(&Path, State)>, Error> {
        let Some(path) = self.state_dir.as_deref().filter(|path| path.exists()) else { return Ok(None) };
        if !matches!(self.served, Served::No | Served::Stale) {
            return Ok(None);
        }
        let state = State::read(path).with_context(|| format!("{}: cannot be read", path.display()))?;
        if let Some(pid) = state.supervisor() {
            bail!("{}: PID {pid} uses it for another mount; give --state-dir", path.display());
        }
        Ok(Some((path, state)))
    }

    /// Starts a daemon if there is something that only a daemon can take back. Returns whether it has.
    fn start_if_needed(&self) -> Result<bool, Error> {
        let Some((state_dir, state)) = self.left_state()? else { return Ok(false) };
        let is_plain = self.conf_dir.join("pools").exists() && self.served == Served::No;
        let needs_one = state.has_claims() || state.has_pools() && !self.args.purge;
        if is_plain || !needs_one {
            return Ok(false);
        }
        if self.unit.is_some() {
            // It may be about to start again.
            service::systemctl(&["stop", UNIT])?;
        }
        let paths =
            MountPaths { conf_dir: self.conf_dir.to_owned(), state_dir: std::path::absolute(state_dir)? };
        match daemon::start_in_background(&paths, Options::default()) {
            Ok(()) => Ok(true),
            Err(error) if state.has_claims() => Err(error).with_context(|| {
                format!("{}: has claims, which only a daemon can release", state_dir.display())
            }),
            Err(_) => {
                let state_dir = state_dir.display();
                log::warn!(
                    "{state_dir}: has pools, which only a daemon can remove; --purge removes all of it"
                );
                Ok(false)
            }
        }
    }

    /// The directory, if it has pools.
    fn dir(&self) -> Result<Option<ConfDir>, Error> {
        let is_usable = mountpoint::is_mounted(self.conf_dir)? || !mountpoint::is_marked(self.conf_dir);
        if !self.conf_dir.exists() || !is_usable {
            return Ok(None);
        }
        Ok(Some(ConfDir::open(self.conf_dir)?).filter(|dir| dir.pools_dir().exists()))
    }

    /// Checks that nothing is held.
    fn check(&self) -> Result<(), Error> {
        let dir = if self.served == Served::Stale { None } else { self.dir()? };
        dir.as_ref().filter(|_| !self.args.force).map_or(Ok(()), pools::check_unused)
    }

    /// Removes everything, first what can be refused.
    fn remove(&self) -> Result<(), Error> {
        let served = daemon::served(self.conf_dir)?;
        let dir = if served == Served::Stale { None } else { self.dir()? };
        let locked_and_unused = || {
            let lock = dir.as_ref().map(ConfDir::lock).transpose()?;
            dir.as_ref().filter(|_| !self.args.force).map_or(Ok(()), pools::check_unused).map(|()| lock)
        };
        if let Some(node) = node_name_if_any(&self.args.node)? {
            // The API server may take long to answer, and others need the lock meanwhile.
            drop(locked_and_unused()?);
            discover::unadvertise(&node)?;
        }
        let lock = locked_and_unused()?;
        if let Some(dir) = &dir {
            // A claim that was made since the check keeps its list, and ends the command.
            pools::remove_all(dir, self.args.force)?;
            log::info!("Removed the pools of {}.", dir.path().display());
        }
        drop(lock);
        self.end_mount(&served)?;
        self.remove_files()?;
        if self.args.purge {
            self.purge()?;
        } else if self.is_absent {
            let _ = mountpoint::unmark(self.conf_dir).and_then(|()| fs::remove_dir(self.conf_dir));
        }
        self.show_rest();
        Ok(())
    }

    /// Stops the service and unmounts.
    fn end_mount(&self, served: &Served) -> Result<(), Error> {
        let conf_dir = self.conf_dir.display();
        let units = [(CDI_UNIT, service::cdi_unit_of(self.conf_dir)), (UNIT, self.unit.clone())];
        for (name, _) in units.into_iter().filter(|(_, unit)| unit.is_some()) {
            service::systemctl(&["disable", "--now", "--quiet", name])?;
            log::info!("Stopped {name}.");
        }
        if !mountpoint::is_mounted(self.conf_dir)? {
            return Ok(());
        }
        if is_in_pod() {
            log::info!("{conf_dir} is still served by its pod; delete that");
        } else if *served == Served::Elsewhere {
            let end = format!("end that there: kcm unmount --conf-dir={conf_dir}");
            log::info!("{conf_dir} is still served by a daemon in another mount namespace; {end}");
        } else {
            daemon::unmount(self.conf_dir)?;
            log::info!("Unmounted {conf_dir}.");
        }
        Ok(())
    }

    /// The files that `kcm install` may have made, if they do not serve another directory.
    fn files(&self) -> Vec<PathBuf> {
        let args = self.args;
        if service::unit_of_another(self.conf_dir, &args.systemd).is_some() {
            return Vec::new();
        }
        let default = args.target.install_dir.join(install::PROGRAM);
        // It was installed with --install-dir, if no package has it.
        let of_package = service::unit_of_package().and_then(|unit| named_program(&unit));
        let named = named_program(&args.systemd.join(UNIT)).filter(|program| {
            program.ends_with(install::PROGRAM) && *program != default && Some(program) != of_package.as_ref()
        });
        // The links that `systemctl enable` creates.
        let wanted = args.systemd.join(format!("{}.wants", install::TARGET));
        let units =
            [UNIT, CDI_UNIT].into_iter().flat_map(|unit| [wanted.join(unit), args.systemd.join(unit)]);
        std::iter::once(default)
            .chain(named)
            .chain(units)
            .filter(|file| fs::symlink_metadata(file).is_ok())
            .collect()
    }

    /// The pages and completions that `kcm install --systemd` may have made.
    fn documentation(&self) -> Result<Vec<PathBuf>, Error> {
        if service::unit_of_another(self.conf_dir, &self.args.systemd).is_some() {
            return Ok(Vec::new());
        }
        let files =
            install::documentation()?.into_iter().map(|(name, _)| self.args.share.share_dir.join(name));
        Ok(files.filter(|file| fs::symlink_metadata(file).is_ok()).collect())
    }

    fn remove_files(&self) -> Result<(), Error> {
        // A spec whose hook does not exist keeps containers from starting.
        for file in cdi::remove(&self.args.cdi_dir, self.conf_dir)? {
            log::info!("Removed {}.", file.display());
        }
        if let Some(unit) = service::unit_of_another(self.conf_dir, &self.args.systemd) {
            let (unit, conf_dir) = (unit.display(), service::CONF_DIR);
            log::info!("{unit} serves {conf_dir}, so the program and its service stay.");
            return Ok(());
        }
        for file in self.files() {
            remove_file(&file)?;
            log::info!("Removed {}.", file.display());
        }
        let pages = self.documentation()?;
        pages.iter().try_for_each(|file| remove_file(file))?;
        if !pages.is_empty() {
            let below = self.args.share.share_dir.display();
            log::info!("Removed the man pages and completions below {below}.");
        }
        if service::manages_machine() && self.unit.is_some() {
            service::systemctl(&["daemon-reload"])?;
            // A unit that has failed is shown until then. It fails if there is none.
            let _ = service::systemctl(&["reset-failed", UNIT]);
        }
        if let Some(unit) = service::unit_of_package().filter(|_| self.unit.is_some()) {
            let unit = unit.display();
            log::info!("{unit} is of a package; remove that: apt-get purge kcm, or dnf remove kcm");
        }
        Ok(())
    }

    /// Removes the state directory and the mount point.
    fn purge(&self) -> Result<(), Error> {
        let stays = |path: &Path| log::info!("{} has files that are not kcm's, and stays.", path.display());
        if let Some(state_dir) = self.state_dir.as_deref().filter(|path| path.exists()) {
            if daemon::remove_state(state_dir)? {
                log::info!("Removed {}.", state_dir.display());
            } else {
                stays(state_dir);
            }
        }
        if !self.conf_dir.exists() {
            return Ok(());
        }
        mountpoint::unmark(self.conf_dir).map_err(|error| confdir::file_error(self.conf_dir, error))?;
        match fs::remove_dir(self.conf_dir) {
            Ok(()) => log::info!("Removed {}.", self.conf_dir.display()),
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => stays(self.conf_dir),
            Err(error) => return Err(confdir::file_error(self.conf_dir, error)),
        }
        Ok(())
    }

    /// Says what was left for the next daemon.
    fn show_rest(&self) {
        if let Some(state_dir) = self.state_dir.as_deref().filter(|path| path.exists() && !self.args.purge)
            && !mountpoint::is_mounted(self.conf_dir).unwrap_or(true)
        {
            let (conf_dir, state_dir) = (self.conf_dir.display(), state_dir.display());
            log::info!("The mount point {conf_dir} and {state_dir} stay; --purge removes them, too.");
        }
    }

    /// Says what would be removed.
    fn show(&self) -> Result<(), Error> {
        if let Some(node) = node_name_if_any(&self.args.node)? {
            log::info!("Would remove the slots, the label and the taint of node {node}.");
        }
        let left = self.left_state()?;
        if self.dir()?.is_some() || left.is_some_and(|(_, state)| state.has_pools()) {
            log::info!("Would remove the pools of {}.", self.conf_dir.display());
        }
        if self.unit.is_some() {
            log::info!("Would stop {UNIT}.");
            if service::cdi_unit_of(self.conf_dir).is_some() {
                log::info!("Would stop {CDI_UNIT}.");
            }
        } else if self.can_unmount() {
            log::info!("Would unmount {}.", self.conf_dir.display());
        }
        let specs = cdi::installed(&self.args.cdi_dir, self.conf_dir)?;
        for file in specs.into_iter().chain(self.files()).chain(self.documentation()?) {
            log::info!("Would remove {}.", file.display());
        }
        let purged = self.state_dir.as_deref().into_iter().chain([self.conf_dir]);
        for directory in purged.filter(|path| self.args.purge && path.exists()) {
            log::info!("Would remove {}.", directory.display());
        }
        Ok(())
    }
}

/// Returns the state directory of the mount: the one that its daemon uses, or the one that was given. Without both, only
/// the directory of the service has one that is known.
fn state_dir(args: &cli::Uninstall, served: &Served) -> Result<Option<PathBuf>, Error> {
    let resolved = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    match (&args.state_dir, served) {
        (Some(given), Served::Here(Some(used))) if resolved(given) != resolved(used) => {
            let (conf_dir, used) = (args.dir.conf_dir.display(), used.display());
            bail!("{conf_dir}: its daemon uses the state directory {used}; give --state-dir={used}")
        }
        (Some(given), _) => Ok(Some(given.clone())),
        (None, Served::Here(used)) => Ok(used.clone()),
        (None, _) if args.dir.conf_dir == Path::new(service::CONF_DIR) => Ok(Some(service::STATE_DIR.into())),
        (None, _) => Ok(None),
    }
}

/// Returns the program that a unit of `kcm install` starts.
fn named_program(unit: &Path) -> Option<PathBuf> {
    let text = fs::read_to_string(unit).ok()?;
    let program = text.lines().find_map(|line| line.strip_prefix("ExecStart=\"")?.split('"').next())?;
    Some(PathBuf::from(program.replace("%%", "%")))
}

fn remove_file(file: &Path) -> Result<(), Error> {
    match fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(confdir::file_error(file, error)),
        _ => Ok(()),
    }
}
