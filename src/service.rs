//! The systemd service of the daemon: its name, and whether this machine has it.
//!
//! Owns where unit files are. Does not know what the unit says.

use std::path::{Path, PathBuf};

/// The name of the unit.
pub(crate) const UNIT: &str = "kcm.service";
/// The directory that the unit serves, unless an administrator has changed it.
const CONF_DIR: &str = "/etc/kcm";
/// Exists while systemd manages the machine (sd_booted(3)).
const BOOTED: &str = "/run/systemd/system";
/// Where units are installed, by an administrator or by a package (systemd.unit(5)).
const UNIT_DIRS: [&str; 4] = [
    "/etc/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
];

/// Returns whether systemd manages the machine.
pub(crate) fn manages_machine() -> bool {
    Path::new(BOOTED).is_dir()
}

/// Returns the unit that serves this directory, if systemd manages the machine and has one.
pub(crate) fn unit_of(conf_dir: &Path) -> Option<PathBuf> {
    let units =
        || UNIT_DIRS.iter().map(|directory| Path::new(directory).join(UNIT)).find(|unit| unit.exists());
    (conf_dir == Path::new(CONF_DIR) && manages_machine()).then(units).flatten()
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
        assert_eq!(start_command(Path::new("/run/kcm/conf")), "kcm mount --conf-dir=/run/kcm/conf");
    }
}
