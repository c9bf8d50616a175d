//! The systemd service of the daemon: its name, whether this machine has it, and stopping it.
//!
//! Owns where unit files are, and the calls of systemctl. Does not know what the unit says.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Error, bail};

/// The name of the unit.
pub(crate) const UNIT: &str = "kcm.service";
/// The name of the unit that keeps the specs for container runtimes up to date.
pub(crate) const CDI_UNIT: &str = "kcm-cdi.service";
/// The directory that the unit serves, unless an administrator has changed it.
pub(crate) const CONF_DIR: &str = "/etc/kcm";
/// The state directory that belongs to it.
pub(crate) const STATE_DIR: &str = "/var/lib/kcm";
/// Exists while systemd manages the machine (sd_booted(3)).
const BOOTED: &str = "/run/systemd/system";
/// Where units are installed (systemd.unit(5)): by an administrator, or by a package.
const UNIT_DIRS: [&str; 4] =
    ["/etc/systemd/system", "/usr/local/lib/systemd/system", PACKAGE_UNIT_DIRS[0], PACKAGE_UNIT_DIRS[1]];
const PACKAGE_UNIT_DIRS: [&str; 2] = ["/usr/lib/systemd/system", "/lib/systemd/system"];

/// Returns whether systemd manages the machine.
pub(crate) fn manages_machine() -> bool {
    Path::new(BOOTED).is_dir()
}

/// Returns the unit that serves this directory, if systemd manages the machine and has one.
pub(crate) fn unit_of(conf_dir: &Path) -> Option<PathBuf> {
    named_unit_of(conf_dir, UNIT)
}

/// Returns the unit that keeps the specs of this directory up to date, if systemd manages the machine and has one.
pub(crate) fn cdi_unit_of(conf_dir: &Path) -> Option<PathBuf> {
    named_unit_of(conf_dir, CDI_UNIT)
}

fn named_unit_of(conf_dir: &Path, name: &str) -> Option<PathBuf> {
    let units =
        || UNIT_DIRS.iter().map(|directory| Path::new(directory).join(name)).find(|unit| unit.exists());
    (conf_dir == Path::new(CONF_DIR) && manages_machine()).then(units).flatten()
}

/// Returns the unit in this directory if systemd uses it and it serves another directory than `conf_dir`.
pub(crate) fn unit_of_another(conf_dir: &Path, directory: &Path) -> Option<PathBuf> {
    let is_used = UNIT_DIRS.iter().any(|used| Path::new(used) == directory);
    let unit = directory.join(UNIT);
    (conf_dir != Path::new(CONF_DIR) && manages_machine() && is_used && unit.exists()).then_some(unit)
}

/// Returns the unit that a package has installed.
pub(crate) fn unit_of_package() -> Option<PathBuf> {
    PACKAGE_UNIT_DIRS.iter().map(|directory| Path::new(directory).join(UNIT)).find(|unit| unit.exists())
}

/// Returns whether the service serves this directory now.
pub(crate) fn is_active(conf_dir: &Path) -> bool {
    unit_of(conf_dir).is_some() && systemctl(&["is-active", "--quiet", UNIT]).is_ok()
}

/// Runs systemctl with these words.
///
/// # Errors
/// It fails; the message is its own.
pub(crate) fn systemctl(words: &[&str]) -> Result<(), Error> {
    let mut command = Command::new("systemctl");
    let output = command.args(words).stdin(Stdio::null()).output();
    let output = output.context("systemctl cannot be started; look at PATH")?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr);
        bail!("systemctl {}: {}; look at systemctl status kcm", words.join(" "), message.trim());
    }
    Ok(())
}

/// Returns the command that starts the daemon of this directory.
pub(crate) fn start_command(conf_dir: &Path) -> String {
    match unit_of(conf_dir) {
        Some(_) => "systemctl start kcm".to_owned(),
        None => format!("kcm mount --conf-dir={}", conf_dir.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_directory_has_no_unit() {
        assert_eq!(unit_of(Path::new("/run/kcm/conf")), None);
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join(UNIT), "").unwrap();
        assert_eq!(unit_of_another(Path::new("/run/kcm/conf"), home.path()), None, "systemd does not use it");
        assert_eq!(unit_of_another(Path::new(CONF_DIR), Path::new(UNIT_DIRS[0])), None);
        assert_eq!(start_command(Path::new("/run/kcm/conf")), "kcm mount --conf-dir=/run/kcm/conf");
    }
}
