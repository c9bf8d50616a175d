//! The paths of a mount, and how the processes that serve it are started and found.
//!
//! Owns the command lines of the daemon's processes: `ps` shows which directory they serve. Does not know what
//! the processes do.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::role::{self, Role};
use crate::mountpoint;

/// The running program, even if its file has been replaced.
pub(super) const THIS_PROGRAM: &str = "/proc/self/exe";
pub(super) const MOUNT: &str = "mount";
/// Distinguishes the daemon from the command that starts it.
pub(super) const FOREGROUND: &str = "--foreground";
pub(super) const CONF_DIR: &str = "--conf-dir=";
pub(super) const STATE_DIR: &str = "--state-dir=";

/// The two directories of a mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountPaths {
    /// The mount point.
    pub conf_dir: PathBuf,
    /// The directory with the configuration and the claims.
    pub state_dir: PathBuf,
}

impl MountPaths {
    /// The command that starts a supervisor in the foreground.
    pub(super) fn mount_command(&self, program: &Path) -> Command {
        self.command(program, &[MOUNT, FOREGROUND])
    }

    /// The command that starts a process with this role.
    pub(super) fn role_command(&self, program: &Path, role: Role) -> Command {
        self.command(program, &[&[role::COMMAND], role.words()].concat())
    }

    fn command(&self, program: &Path, words: &[&str]) -> Command {
        let mut command = Command::new(program);
        // Not the program's path: processes of this program are found by name.
        command.arg0("kcm").args(words);
        command.arg(self.conf_dir_arg()).arg(arg(STATE_DIR, &self.state_dir));
        command
    }

    /// The same paths, absolute, so that they mean the same to every process.
    pub(super) fn absolute(&self) -> io::Result<Self> {
        let conf_dir = mountpoint::resolved(&self.conf_dir);
        Ok(Self { conf_dir, state_dir: std::path::absolute(&self.state_dir)? })
    }

    /// The argument by which [`daemon_pids`] finds the processes of a mount.
    pub(super) fn conf_dir_arg(&self) -> OsString {
        arg(CONF_DIR, &self.conf_dir)
    }
}

fn arg(name: &str, path: &Path) -> OsString {
    let mut arg = OsString::from(name);
    arg.push(path);
    arg
}

/// The PIDs of the daemon processes that serve this directory, as far as they are visible from this PID namespace.
/// This process is not among them.
pub(super) fn daemon_pids(conf_dir: &Path) -> Vec<u32> {
    let conf_dir = arg(CONF_DIR, conf_dir);
    let entries = std::fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let serves = |pid: &u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        serves(&line, conf_dir.as_bytes())
    };
    pids.filter(|pid| *pid != std::process::id()).filter(serves).collect()
}

/// Whether a command line (proc(5), `/proc/PID/cmdline`) belongs to a daemon process with this argument.
fn serves(cmdline: &[u8], conf_dir: &[u8]) -> bool {
    let words: Vec<&[u8]> = cmdline.split(|&b| b == 0).skip(1).collect();
    let has = |wanted: &[u8]| words.contains(&wanted);
    let is_daemon = has(role::COMMAND.as_bytes()) || has(MOUNT.as_bytes()) && has(FOREGROUND.as_bytes());
    is_daemon && has(conf_dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn daemon_processes_are_found_by_their_command_line() {
        let is_found = |line: &str| serves(line.replace(' ', "\0").as_bytes(), b"--conf-dir=/conf");
        assert!(is_found("kcm mount --foreground --conf-dir=/conf --state-dir=/state"));
        assert!(is_found("kcm __daemon worker --conf-dir=/conf --state-dir=/state"));
        // A worker of a program without `__daemon`.
        assert!(is_found("kcm mount --foreground --conf-dir=/conf --state-dir=/state --worker"));
        assert!(!is_found("kcm mount --conf-dir=/conf"), "the command that starts the daemon");
        assert!(!is_found("kcm __daemon worker --conf-dir=/other --state-dir=/state"));
        assert!(!is_found("kcm describe --conf-dir=/conf"));
        assert!(!is_found(""));
    }

    #[test]
    fn a_daemon_process_shows_what_it_serves() {
        let paths = MountPaths { conf_dir: "/conf".into(), state_dir: "/state".into() };
        let words = |command: &Command| -> Vec<OsString> { command.get_args().map(Into::into).collect() };
        assert_eq!(
            words(&paths.mount_command("/bin/kcm".as_ref())),
            ["mount", "--foreground", "--conf-dir=/conf", "--state-dir=/state"]
        );
        assert_eq!(
            words(&paths.role_command("/bin/kcm".as_ref(), Role::Worker)),
            ["__daemon", "worker", "--conf-dir=/conf", "--state-dir=/state"]
        );
    }
}
