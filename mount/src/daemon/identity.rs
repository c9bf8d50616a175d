//! Which processes serve a mount: what the kernel says, not what a process says of itself.
//!
//! Owns the proof that a process belongs to a daemon. Does not know what becomes of the process.
//!
//! Any user may write any command line, and open `/dev/fuse`. So a process serves a mount only if
//! - all its user ids are root's, in the user namespace of this process, and it may mount (CAP_SYS_ADMIN), which the root
//!   of a container may not, and
//! - its descriptor [`fds::HANDOFF`] is a handoff memfd, so that nobody is meant who only stores descriptors (a service
//!   manager), and
//! - its descriptor [`fds::DEVICE`] belongs to the connection of the mount. The mount table has the number of the
//!   connection (the minor number of the filesystem's device), and only root mounts. Linux 6.18 shows the same number for
//!   the descriptor (`fuse_connection` in `/proc/PID/fdinfo/FD`).
//!
//! Older kernels do not show the number. There the descriptor must be a FUSE device, and [`fds::LOCK`] a file that the
//! process has locked exclusively. Only root can do that in a state directory. The command line then only chooses among such
//! processes: it never makes a process a daemon. If daemons of several mount namespaces have the same path, the search
//! returns only the ones in the namespace of this process.

use std::fs;
use std::os::fd::{AsFd, AsRawFd as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, makedev, statx};

use super::fds;
use super::paths;
use crate::mountpoint::Connection;
use crate::process::PidFd;

/// A process that serves a mount.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) pid: u32,
    pub(super) pidfd: PidFd,
    /// Whether the kernel says that it serves this connection.
    is_certain: bool,
}

/// What the kernel says about a descriptor of a FUSE device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Device {
    /// It belongs to this connection.
    Connected(Connection),
    /// It belongs to no connection: nothing was mounted with it.
    Unconnected,
    /// The kernel does not tell.
    Unknown,
}

/// The processes that serve this connection at `conf_dir`, as far as they are visible from this PID namespace. This
/// process is not among them. A process that only claims to be one of them is named in the log.
pub(super) fn servers(connection: Connection, conf_dir: &Path) -> Vec<Server> {
    let entries = fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let others = pids.filter(|pid| *pid != std::process::id());
    let mut found: Vec<Server> = others.filter_map(|pid| server(pid, connection, conf_dir)).collect();
    let is_here = |server: &Server| !server.is_certain && is_in_this_mount_namespace(server.pid);
    if found.iter().any(is_here) {
        found.retain(is_here);
    }
    found
}

/// The connection to which a device belongs, if the kernel tells.
pub(super) fn connection_of(device: impl AsFd) -> Option<Connection> {
    let number = device.as_fd().as_raw_fd();
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{number}")).ok()?;
    match device_of(&info) {
        Device::Connected(connection) => Some(connection),
        Device::Unconnected | Device::Unknown => None,
    }
}

fn server(pid: u32, connection: Connection, conf_dir: &Path) -> Option<Server> {
    // Opened first: while it is alive, everything below is about the process that the descriptor holds.
    let pidfd = PidFd::open(pid).ok()?;
    let says_so = || {
        let cmdline = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        paths::serves(&cmdline, conf_dir)
    };
    let device = (is_root(pid) && has_handoff(pid)).then(|| device(pid)).flatten();
    let serves = match device {
        Some(Device::Connected(other)) => other == connection,
        Some(Device::Unknown) => says_so() && holds_lock(pid),
        Some(Device::Unconnected) | None => false,
    };
    if serves && pidfd.is_of_process() {
        return Some(Server { pid, pidfd, is_certain: device != Some(Device::Unknown) });
    }
    // The command line is read last. A process that exits loses its command line before its descriptors, so the device is
    // looked at again.
    if !is_of_a_daemon(pid) && says_so() && pidfd.is_of_process() {
        let owner = fs::metadata(format!("/proc/{pid}")).map_or(u32::MAX, |process| process.uid());
        log::warn!(
            "PID {pid} of user {owner} has the command line of a daemon of {}, but does not serve it; it is ignored",
            conf_dir.display()
        );
    }
    None
}

/// Whether the process is root's and serves a connection, such as one of another mount namespace, or is a child of such a
/// process: a probe has the command line of its supervisor until it executes, and closes the device before that. It is no
/// impostor.
fn is_of_a_daemon(pid: u32) -> bool {
    let is_connected = |pid: u32| matches!(device(pid), Some(Device::Connected(_)));
    let is_daemon = |pid: u32| is_root(pid) && is_connected(pid);
    is_root(pid) && (is_connected(pid) || parent_of(pid).is_some_and(is_daemon))
}

fn parent_of(pid: u32) -> Option<u32> {
    let status = fs::read(format!("/proc/{pid}/status")).ok()?;
    String::from_utf8_lossy(&status).lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
}

fn is_in_this_mount_namespace(pid: u32) -> bool {
    let namespace =
        |pid: &str| fs::metadata(format!("/proc/{pid}/ns/mnt")).map(|it| (it.dev(), it.ino())).ok();
    namespace("self").is_some_and(|own| namespace(&pid.to_string()) == Some(own))
}

/// Whether all user ids of the process are root's, in the user namespace of this process.
fn is_root(pid: u32) -> bool {
    let namespace = |pid: &str| fs::metadata(format!("/proc/{pid}/ns/user")).map(|file| file.ino()).ok();
    let own = namespace("self");
    let status = fs::read(format!("/proc/{pid}/status")).unwrap_or_default();
    own.is_some() && namespace(&pid.to_string()) == own && is_of_root(&String::from_utf8_lossy(&status))
}

/// The beginning of the link in `/proc/PID/fd` to a handoff memfd. Its name was another one in earlier programs.
const HANDOFF_LINK: &[u8] = b"/memfd:kcm-";

/// The bit of CAP_SYS_ADMIN (linux/capability.h) in a set of capabilities.
const CAP_SYS_ADMIN: u64 = 1 << 21;

/// Whether a status (proc(5), `/proc/PID/status`) has root as the real, effective, saved and filesystem user, with the
/// right to mount.
fn is_of_root(status: &str) -> bool {
    // The name of the process comes before, with its newlines escaped.
    let field = |name| status.lines().find_map(|line| line.strip_prefix(name));
    let has_ids = field("Uid:").is_some_and(|ids| ids.split_whitespace().eq(["0"; 4]));
    let capabilities = field("CapEff:").and_then(|set| u64::from_str_radix(set.trim(), 16).ok());
    has_ids && capabilities.is_some_and(|set| set & CAP_SYS_ADMIN != 0)
}

/// The descriptor [`fds::DEVICE`] of a process, if it is a FUSE device. It may as well be a file of a mount that does not
/// answer, this one for example, so only what the kernel knows is asked for (`AT_STATX_DONT_SYNC`).
fn device(pid: u32) -> Option<Device> {
    let path = format!("/proc/{pid}/fd/{}", fds::DEVICE);
    let file = statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE).ok()?;
    let is_device = FileType::from_raw_mode(file.stx_mode.into()) == FileType::CharacterDevice;
    if !is_device || makedev(file.stx_rdev_major, file.stx_rdev_minor) != crate::fuse::abi::DEVICE_NUMBER {
        return None;
    }
    let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", fds::DEVICE)).ok()?;
    Some(device_of(&info))
}

fn device_of(fdinfo: &str) -> Device {
    match fdinfo.lines().find_map(|line| line.strip_prefix("fuse_connection:")) {
        Some(number) => number
            .trim()
            .parse()
            .map_or(Device::Unconnected, |number| Device::Connected(Connection::new(number))),
        None if shows_connections() => Device::Unconnected,
        None => Device::Unknown,
    }
}

/// Whether this kernel certainly shows to which connection a descriptor belongs. Some older ones do as well.
fn shows_connections() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    is_at_least(&release, (6, 18))
}

fn is_at_least(release: &str, wanted: (u32, u32)) -> bool {
    let mut parts = release.split(|c: char| !c.is_ascii_digit()).map_while(|part| part.parse::<u32>().ok());
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) >= wanted
}

/// Whether the process has a handoff memfd where a daemon has it.
fn has_handoff(pid: u32) -> bool {
    let link = fs::read_link(format!("/proc/{pid}/fd/{}", fds::HANDOFF));
    link.is_ok_and(|link| link.as_os_str().as_bytes().starts_with(HANDOFF_LINK))
}

/// Whether the process has an exclusive lock on its descriptor [`fds::LOCK`].
fn holds_lock(pid: u32) -> bool {
    let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", fds::LOCK)).unwrap_or_default();
    is_locked(&info)
}

fn is_locked(fdinfo: &str) -> bool {
    let mut locks = fdinfo.lines().filter_map(|line| line.strip_prefix("lock:"));
    locks.any(|lock| lock.split_whitespace().skip(1).take(3).eq(["FLOCK", "ADVISORY", "WRITE"]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_root_by_all_its_ids_and_with_capabilities_is_root() {
        let status = |ids: &str, set: &str| format!("Name:\tkcm\nUid:\t{ids}\nCapEff:\t{set}\n");
        let all = "000001ffffffffff";
        assert!(is_of_root(&status("0\t0\t0\t0", all)));
        for ids in ["0\t0\t0\t65534", "65534\t0\t0\t0", "0\t65534\t0\t0", "0\t0\t65534\t0", "0\t0\t0", ""] {
            assert!(!is_of_root(&status(ids, all)), "{ids}");
        }
        assert!(!is_of_root(&status("0\t0\t0\t0", "00000000a80425fb")), "the root of a container");
        assert!(!is_of_root("Name:\tUid:\\n0 0 0 0\n"), "a name is not an id");
    }

    #[test]
    fn the_connection_of_a_device_is_what_the_kernel_shows() {
        let info = "pos:\t0\nflags:\t0100002\nmnt_id:\t24\nino:\t90\nfuse_connection:\t39\n";
        assert_eq!(device_of(info), Device::Connected(Connection::new(39)));
        let expected = if shows_connections() { Device::Unconnected } else { Device::Unknown };
        assert_eq!(device_of("pos:\t0\nflags:\t0100002\n"), expected);
        assert_eq!(connection_of(fs::File::open("/dev/null").unwrap()), None);
    }

    #[test]
    fn only_an_exclusive_lock_is_a_lock() {
        assert!(is_locked("pos:\t0\nlock:\t1: FLOCK  ADVISORY  WRITE 28411 fe:00:13189309 0 EOF\n"));
        assert!(!is_locked("pos:\t0\nlock:\t1: FLOCK  ADVISORY  READ 28411 fe:00:13189309 0 EOF\n"));
        assert!(!is_locked("pos:\t0\nlock:\t1: POSIX  ADVISORY  WRITE 28411 fe:00:13189309 0 EOF\n"));
        assert!(!is_locked("pos:\t0\n"));
    }

    #[test]
    fn versions_of_the_kernel_are_compared_by_number() {
        assert!(is_at_least("6.16.0-rc1", (6, 16)) && is_at_least("6.18.44-fc-v669\n", (6, 16)));
        assert!(is_at_least("7.0.1", (6, 16)) && !is_at_least("6.9.1", (6, 16)) && !is_at_least("", (6, 16)));
    }

    #[test]
    fn this_process_serves_nothing() {
        assert!(servers(Connection::new(u32::MAX), Path::new("/nowhere")).is_empty());
    }
}
