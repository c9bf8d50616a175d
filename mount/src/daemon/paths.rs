//! The paths of a mount, and how the processes that serve it are started.
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

/// The running program, even if its file has been replaced.
pub(super) const THIS_PROGRAM: &str = "/proc/self/exe";
pub(super) const MOUNT: &str = "mount";
/// Distinguishes the daemon from the command that starts it.
pub(super) const FOREGROUND: &str = "--foreground";
pub(super) const CONF_DIR: &str = "--conf-dir=";
pub(super) const STATE_DIR: &str = "--state-dir=";

/// Environment variables with which the starter would change how the daemon works: the size of the stacks of threads
/// (std::thread), and the settings of the C library's heap (mallopt(3)), which may make it abort.
const FOREIGN_VARIABLES: [&str; 10] = [
    "RUST_MIN_STACK",
    "GLIBC_TUNABLES",
    "MALLOC_ARENA_MAX",
    "MALLOC_ARENA_TEST",
    "MALLOC_CHECK_",
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_PERTURB_",
    "MALLOC_TOP_PAD_",
    "MALLOC_TRIM_THRESHOLD_",
];

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
        for variable in FOREIGN_VARIABLES {
            command.env_remove(variable);
        }
        command.arg(self.conf_dir_arg()).arg(arg(STATE_DIR, &self.state_dir));
        command
    }

    /// The same paths, absolute, so that they mean the same to every process. A mount point that is a link stays one, so that
    /// it is refused.
    pub(super) fn absolute(&self) -> io::Result<Self> {
        let conf_dir = std::path::absolute(&self.conf_dir)?;
        let conf_dir = match (conf_dir.parent(), conf_dir.file_name()) {
            (Some(parent), Some(name)) => parent.canonicalize().map(|parent| parent.join(name)),
            _ => conf_dir.canonicalize(),
        };
        // If the directory above it is missing, too, nothing can be resolved yet.
        let conf_dir = conf_dir.or_else(|_| std::path::absolute(&self.conf_dir))?;
        Ok(Self { conf_dir, state_dir: std::path::absolute(&self.state_dir)? })
    }

    /// The argument that shows in `ps` which directory a process serves.
    pub(super) fn conf_dir_arg(&self) -> OsString {
        arg(CONF_DIR, &self.conf_dir)
    }
}

fn arg(name: &str, path: &Path) -> OsString {
    let mut arg = OsString::from(name);
    arg.push(path);
    arg
}

/// Whether a command line (proc(5), `/proc/PID/cmdline`) is that of a daemon process that serves this directory. Any user
/// may write one, so it proves nothing: see [`super::identity`].
pub(super) fn serves(cmdline: &[u8], conf_dir: &Path) -> bool {
    let words: Vec<&[u8]> = cmdline.split(|&b| b == 0).skip(1).collect();
    let has = |wanted: &[u8]| words.contains(&wanted);
    // A probe and a preflight end soon, and serve nothing.
    let ends_soon = [role::PROBE, role::PREFLIGHT].iter().any(|role| has(role.as_bytes()));
    let is_role = has(role::COMMAND.as_bytes()) && !ends_soon;
    let is_daemon = is_role || has(MOUNT.as_bytes()) && has(FOREGROUND.as_bytes());
    is_daemon && has(arg(CONF_DIR, conf_dir).as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_of_a_daemon_process_is_known() {
        let is_known = |line: &str| serves(line.replace(' ', "\0").as_bytes(), Path::new("/conf"));
        assert!(is_known("kcm mount --foreground --conf-dir=/conf --state-dir=/state"));
        assert!(is_known("kcm __daemon worker --conf-dir=/conf --state-dir=/state"));
        // A worker of a program without `__daemon`.
        assert!(is_known("kcm mount --foreground --conf-dir=/conf --state-dir=/state --worker"));
        assert!(!is_known("kcm __daemon probe --conf-dir=/conf --state-dir=/state"), "it serves nothing");
        assert!(!is_known("kcm mount --conf-dir=/conf"), "the command that starts the daemon");
        assert!(!is_known("kcm __daemon worker --conf-dir=/other --state-dir=/state"));
        assert!(!is_known("kcm describe --conf-dir=/conf"));
        assert!(!is_known(""));
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
