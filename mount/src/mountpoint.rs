//! The state of a mount point from outside: served, no longer served, or a plain directory.
//!
//! Owns the mount table and the mark on the directory below the mount. Does not know what is served there.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use nix::errno::Errno;

/// The extended attribute on the directory below a mount. It tells every tool not to write into the empty directory
/// that is visible while no daemon runs.
pub const MARK: &str = "trusted.kcm.mountpoint";

/// The same for processes that may not read the first one, such as processes in an unprivileged container. Not every
/// filesystem supports it (tmpfs since 6.6).
const MARK_FOR_ALL: &str = "user.kcm.mountpoint";

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
    if is_mounted(path)? {
        return Ok(probe(path));
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
    let table = fs::read("/proc/self/mountinfo")?;
    Ok(topmost_type(&table, &resolved(path)).is_some_and(|fstype| fstype == FSTYPE))
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

/// Accesses the mount in a thread of its own, which may hang, and returns the state of the mount.
fn probe(path: &Path) -> Status {
    let (answer, answered) = mpsc::channel();
    let version = path.join("info/version");
    let asked = std::thread::Builder::new().spawn(move || answer.send(fs::read(version).map(|_| ())));
    let dead = |error: &io::Error| {
        matches!(
            error.raw_os_error().map(Errno::from_raw),
            Some(Errno::ENOTCONN | Errno::ECONNABORTED | Errno::ENODEV)
        )
    };
    match asked.map(|_| answered.recv_timeout(ANSWER_TIMEOUT)) {
        Ok(Ok(Ok(()))) => Status::Live,
        Ok(Ok(Err(error))) if dead(&error) => Status::Stale,
        Ok(Ok(Err(_))) => Status::Live,
        Ok(Err(_)) | Err(_) => Status::NotAnswering,
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

/// Returns the type of the last mount at the path (proc(5), `/proc/PID/mountinfo`).
fn topmost_type<'a>(table: &'a [u8], path: &Path) -> Option<&'a [u8]> {
    let mut mounts = table.split(|&b| b == b'\n').filter_map(|line| {
        let mut fields = line.split(|&b| b == b' ');
        let point = fields.nth(4)?;
        // Optional fields end with a single hyphen; the type comes after it.
        fields.find(|field| *field == b"-")?;
        Some((point, fields.next()?))
    });
    mounts.rfind(|(point, _)| unescape(point) == path.as_os_str()).map(|(_, fstype)| fstype)
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
        let fstype = |path| {
            topmost_type(table, Path::new(path)).map(|fstype| String::from_utf8_lossy(fstype).into_owned())
        };
        assert_eq!(fstype("/proc").as_deref(), Some("proc"));
        assert_eq!(fstype("/etc/kcm").as_deref(), Some("tmpfs"));
        assert_eq!(fstype("/a b\\c").as_deref(), Some("fuse.kcm"));
        assert_eq!(fstype("/etc"), None);
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
