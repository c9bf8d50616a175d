//! The rights that the daemon needs, beside `limits`: capabilities, and a /proc that shows every process. From a
//! process with `CAP_SYS_PTRACE`, the option `hidepid=` of /proc hides nothing.
//!
//! Owns the list, and refuses the mount by the name of what is missing, because a daemon without it refuses claims one by
//! one. Does not know what it is used for.

use std::fs;
use std::io;
use std::path::Path;

use rustix::thread::CapabilitySet;

use super::error::MountError;

/// Each with its name in capabilities(7), and what it is for.
const CAPABILITIES: [(CapabilitySet, &str, &str); 3] = [
    (CapabilitySet::SYS_ADMIN, "CAP_SYS_ADMIN", "mount a directory"),
    (CapabilitySet::SYS_NICE, "CAP_SYS_NICE", "set the CPUs of other users' processes"),
    (CapabilitySet::SYS_PTRACE, "CAP_SYS_PTRACE", "look at other users' processes"),
];
const MOUNT_PROC: &str = "mount it for this PID namespace: mount -t proc proc /proc";
/// What is read of /proc outside the directories of processes, and why it may be missing.
const FILES: [(&str, &str); 2] = [
    ("/proc/sys/kernel/random/boot_id", "mount /proc without subset=pid"),
    ("/proc/self/mountinfo", MOUNT_PROC),
];

/// Checks that nothing is missing.
///
/// # Errors
/// [`MountError::Lacks`] names a capability, [`MountError::Io`] a file of /proc.
pub(super) fn check() -> Result<(), MountError> {
    let proc = |what, cause| MountError::Io { path: "/proc".into(), what, cause, cure: MOUNT_PROC };
    // As the mounted procfs numbers this process.
    let own = fs::read_link("/proc/self").map_err(|error| proc("shows no processes", error))?;
    let pid = std::process::id();
    if own != Path::new(&pid.to_string()) {
        let cause = io::Error::other(format!("this process is PID {pid} here, and {} there", own.display()));
        return Err(proc("is that of another PID namespace", cause));
    }
    let effective = rustix::thread::capabilities(None).map(|sets| sets.effective);
    let effective = effective.map_err(|errno| MountError::Start(format!("capabilities: {errno}")))?;
    for (capability, name, purpose) in CAPABILITIES {
        if !effective.contains(capability) {
            return Err(MountError::Lacks { name, purpose });
        }
    }
    for (path, cure) in FILES {
        if let Err(cause) = fs::read(path) {
            return Err(MountError::Io { path: path.into(), what: "cannot be read", cause, cure });
        }
    }
    Ok(())
}
