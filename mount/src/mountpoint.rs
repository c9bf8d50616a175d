//! The state of a mount point from outside: served, no longer served, or a plain directory.
//!
//! Owns the mount table and the mark on the directory below the mount. Does not know what is served there.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;

use crate::process::{self, Asked};

/// The extended attribute on the directory below a mount. It tells every tool not to write into the empty directory
/// that is visible while no daemon runs.
pub const MARK: &str = "trusted.kcm.mountpoint";

/// The same for processes that may not read the first one, such as processes in an unprivileged container. Not every
/// filesystem supports it (tmpfs since 6.6).
const MARK_FOR_ALL: &str = "user.kcm.mountpoint";

/// The mount table of this process (proc(5), `/proc/PID/mountinfo`).
const MOUNT_TABLE: &str = "/proc/self/mountinfo";
/// The type of the mount in the mount table.
const FSTYPE: &[u8] = b"fuse.kcm";
/// How long a daemon may take to answer before it counts as hanging. The longest bounded wait in a request takes as long.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// The state of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// A mount of kcm that answers.
    Live,
    /// A mount of kcm whose daemon has died.
    Stale,
    /// A mount of kcm whose daemon does not answer.
    NotAnswering,
    /// A directory that is served when a daemon runs, and none does.
    Marked,
    /// Any other directory.
    Plain,
    /// The path does not exist.
    Absent,
}

/// Returns the state of a path. Does not hang, even if the mount does.
///
/// # Errors
/// The path or the mount table cannot be read, or the path is not a directory.
pub fn status(path: &Path) -> io::Result<Status> {
    status_within(path, ANSWER_TIMEOUT)
}

/// The same for somebody who waits no longer than `most` for the answer of a daemon.
///
/// # Errors
/// As for [`status`].
pub fn status_within(path: &Path, most: Duration) -> io::Result<Status> {
    if is_mounted(path)? {
        return Ok(probe(path, most));
    }
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => Ok(if is_marked(path) { Status::Marked } else { Status::Plain }),
        Ok(_) => Err(Errno::ENOTDIR.into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Status::Absent),
        Err(error) => Err(error),
    }
}

/// Returns whether the topmost mount at the path belongs to kcm, whether its daemon runs or not.
///
/// # Errors
/// The mount table cannot be read.
pub fn is_mounted(path: &Path) -> io::Result<bool> {
    Ok(topmost(path)?.is_some())
}

/// A FUSE connection: the number by which the kernel knows it, in the mount table as the minor number of the
/// filesystem's device, and in `/sys/fs/fuse/connections`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Connection(u32);

impl Connection {
    pub(crate) fn new(number: u32) -> Self {
        Self(number)
    }
}

impl std::fmt::Display for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// One mount of kcm in the mount table of this process. Two that exist at the same time differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mounted {
    /// The kernel's number of the mount, which it may give to another mount later.
    id: u64,
    pub(crate) connection: Connection,
}

impl Mounted {
    /// Whether this mount still exists, wherever it is now and whatever is mounted over it.
    ///
    /// # Errors
    /// The mount table cannot be read.
    pub(crate) fn exists(self) -> io::Result<bool> {
        let table = fs::read(MOUNT_TABLE)?;
        Ok(entries(&table).any(|entry| entry.mounted() == Some(self)))
    }
}

/// Returns the topmost mount at the path, if it belongs to kcm. Does not access it.
///
/// # Errors
/// The mount table cannot be read.
pub fn topmost(path: &Path) -> io::Result<Option<Mounted>> {
    let (table, path) = (fs::read(MOUNT_TABLE)?, resolved(path));
    Ok(entries(&table).filter(|entry| entry.is_at(&path)).last().and_then(|entry| entry.mounted()))
}

/// Returns the mount of this connection at the path, or of any connection if that is unknown, whatever is mounted over
/// it.
///
/// # Errors
/// The mount table cannot be read.
pub(crate) fn at(path: &Path, connection: Option<Connection>) -> io::Result<Option<Mounted>> {
    let (table, path) = (fs::read(MOUNT_TABLE)?, resolved(path));
    let ours = entries(&table).filter(|entry| entry.is_at(&path)).filter_map(|entry| entry.mounted());
    Ok(ours.filter(|mounted| connection.is_none_or(|wanted| wanted == mounted.connection)).last())
}

/// Whether the process is in another mount namespace than this process, and the connection is mounted there; `false` if
/// that is unknown.
pub(crate) fn is_elsewhere(pid: u32, connection: Connection) -> bool {
    let namespace = |pid: &str| fs::metadata(format!("/proc/{pid}/ns/mnt")).map(|file| file.ino()).ok();
    let table = fs::read(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
    let mut mounts = entries(&table).filter_map(|entry| entry.mounted());
    namespace(&pid.to_string()) != namespace("self") && mounts.any(|mounted| mounted.connection == connection)
}

/// Marks the directory as a mount point of kcm.
///
/// # Errors
/// The filesystem does not support extended attributes, or the caller is not root.
pub fn mark(path: &Path) -> io::Result<()> {
    let set = |name| rustix::fs::setxattr(path, name, b"1", rustix::fs::XattrFlags::empty());
    let _ = set(MARK_FOR_ALL);
    Ok(set(MARK)?)
}

/// Removes the mark, if there is one.
///
/// # Errors
/// The caller is not root.
pub fn unmark(path: &Path) -> io::Result<()> {
    let _ = rustix::fs::removexattr(path, MARK_FOR_ALL);
    match rustix::fs::removexattr(path, MARK) {
        Err(errno) if errno != rustix::io::Errno::NODATA && errno != rustix::io::Errno::OPNOTSUPP => {
            Err(errno.into())
        }
        _ => Ok(()),
    }
}

/// Returns whether the directory is marked as a mount point of kcm.
#[must_use]
pub fn is_marked(path: &Path) -> bool {
    [MARK, MARK_FOR_ALL].iter().any(|name| rustix::fs::getxattr(path, *name, &mut [0_u8; 0]).is_ok())
}

/// Accesses the mount in a process of its own, which may hang, and returns the state of the mount.
fn probe(path: &Path, most: Duration) -> Status {
    let version = path.join("info/version");
    let answer = match process::stat_in_child(&version, most) {
        Ok(Asked::NoAnswer) => return Status::NotAnswering,
        Ok(Asked::Answered(answer)) => answer,
        // This user may have no more processes. That is no reason to believe that the mount hangs.
        Err(_) => fs::read(version).map(|_| ()),
    };
    let errno = answer.err().and_then(|error| error.raw_os_error()).map(Errno::from_raw);
    match errno {
        Some(Errno::ENOTCONN | Errno::ECONNABORTED | Errno::ENODEV) => Status::Stale,
        _ => Status::Live,
    }
}

/// Returns the path as in the mount table: absolute, with symbolic links resolved. Does not access the mount at the
/// path, not even with stat(2), because it may hang.
pub(crate) fn resolved(path: &Path) -> PathBuf {
    let whole = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    // A path without a file name (`/`, or `..` at its end) cannot be split.
    match (whole.parent(), whole.file_name()) {
        (Some(parent), Some(name)) => match fs::read_link(&whole) {
            Ok(_) => whole.canonicalize().unwrap_or(whole),
            Err(_) => parent.canonicalize().map_or_else(|_| whole.clone(), |parent| parent.join(name)),
        },
        _ => whole.canonicalize().unwrap_or(whole),
    }
}

/// A line of the mount table (proc(5), `/proc/PID/mountinfo`).
#[derive(Clone, Copy, Debug)]
struct Entry<'a> {
    id: &'a [u8],
    /// `major:minor` of the filesystem.
    device: &'a [u8],
    /// The mount point, escaped.
    point: &'a [u8],
    fstype: &'a [u8],
}

impl Entry<'_> {
    fn is_at(&self, path: &Path) -> bool {
        unescape(self.point) == path.as_os_str()
    }

    /// The mount, if it belongs to kcm.
    fn mounted(&self) -> Option<Mounted> {
        let number = |field: &[u8]| std::str::from_utf8(field).ok()?.parse().ok();
        let minor = self.device.strip_prefix(b"0:").and_then(number);
        let connection = Connection(u32::try_from(minor.filter(|_| self.fstype == FSTYPE)?).ok()?);
        Some(Mounted { id: number(self.id)?, connection })
    }
}

/// The mounts, each above those before it at the same path.
fn entries(table: &[u8]) -> impl Iterator<Item = Entry<'_>> {
    table.split(|&b| b == b'\n').filter_map(|line| {
        let mut fields = line.split(|&b| b == b' ');
        let (id, device) = (fields.next()?, fields.nth(1)?);
        let point = fields.nth(1)?;
        // Optional fields end with a single hyphen; the type comes after it.
        fields.find(|field| *field == b"-")?;
        Some(Entry { id, device, point, fstype: fields.next()? })
    })
}

/// Replaces each backslash and three octal digits by the byte that they stand for: a blank, newline or backslash.
fn unescape(field: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, behind)) = rest.split_first() {
        let octal =
            behind.get(..3).filter(|_| first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = behind.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(first);
                rest = behind;
            }
        }
    }
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt as _;

    #[test]
    fn the_topmost_mount_decides() {
        let table = b"22 1 0:20 / /proc rw shared:2 - proc proc rw\n\
            30 1 0:31 / /etc/kcm rw - fuse.kcm kcm rw\n\
            31 30 0:32 / /etc/kcm rw shared:1 master:2 - tmpfs tmpfs rw\n\
            32 1 0:33 / /a\\040b\\134c rw - fuse.kcm kcm rw\n";
        let topmost =
            |path: &str| entries(table).filter(|entry| entry.is_at(Path::new(path))).last().unwrap();
        assert_eq!(topmost("/proc").fstype, b"proc");
        assert_eq!(topmost("/etc/kcm").fstype, b"tmpfs");
        assert_eq!(topmost("/etc/kcm").mounted(), None);
        let below = Mounted { id: 30, connection: Connection(31) };
        assert!(entries(table).any(|entry| entry.mounted() == Some(below)), "what is below is known");
        assert_eq!(topmost("/a b\\c").mounted(), Some(Mounted { id: 32, connection: Connection(33) }));
        assert!(!entries(table).any(|entry| entry.is_at(Path::new("/etc"))));
    }

    #[test]
    fn escapes() {
        assert_eq!(unescape(b"a\\012b\\04\\"), OsStr::from_bytes(b"a\nb\\04\\"));
    }

    #[test]
    fn a_path_that_is_not_a_mount() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(status(directory.path()).unwrap(), Status::Plain);
        assert_eq!(status(&directory.path().join("nothing")).unwrap(), Status::Absent);
        let file = directory.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(status(&file).is_err());
    }
}
