//! The paths of a mount, and how the processes that serve it are started and found.
//!
//! Owns: the command line of the daemon's processes. Must not know: what they do.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::mountpoint;

/// Tells the daemon from the command that starts it.
const FOREGROUND: &str = "--foreground";
/// What is mounted where, and where it is remembered.
#[derive(Clone, Debug)]
pub struct Places {
    /// The mount point.
    pub conf_dir: PathBuf,
    /// Where configuration and claims are kept.
    pub state_dir: PathBuf,
}

impl Places {
    /// A command that starts a process of the daemon: `ps` is to say what it serves.
    pub(crate) fn command(&self, mut command: Command) -> Command {
        command.arg0("kcm").args(["mount", FOREGROUND]);
        command.arg(self.flag()).arg(flag("--state-dir=", &self.state_dir));
        command
    }

    /// As other processes may know them, too.
    pub(crate) fn absolute(&self) -> io::Result<Self> {
        let conf_dir = mountpoint::resolved(&self.conf_dir);
        Ok(Self { conf_dir, state_dir: std::path::absolute(&self.state_dir)? })
    }

    /// The flag by which the processes of a daemon are found.
    pub(crate) fn flag(&self) -> OsString {
        flag("--conf-dir=", &self.conf_dir)
    }
}

fn flag(name: &str, path: &Path) -> OsString {
    let mut flag = OsString::from(name);
    flag.push(path);
    flag
}

/// The processes of the daemon that serves this directory, as far as they can be seen from here.
pub(crate) fn processes_of(conf_dir: &Path) -> Vec<u32> {
    let flag = flag("--conf-dir=", conf_dir);
    let entries = std::fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let serves = |pid: &u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = line.split(|&b| b == 0).skip(1).collect();
        let has = |wanted: &[u8]| words.contains(&wanted);
        has(b"mount") && has(FOREGROUND.as_bytes()) && has(flag.as_bytes())
    };
    pids.filter(|pid| *pid != std::process::id()).filter(serves).collect()
}
