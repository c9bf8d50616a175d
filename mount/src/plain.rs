//! Files of a plain directory, whose owner may be anybody.
//!
//! Owns how they are opened: without following a symbolic link below the directory, without waiting (for the other end
//! of a FIFO, for a lease), and only if they are regular files of bounded size. Does not know what is in them.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

/// The largest file that is read, in bytes: a `tasks` file with 100,000 PIDs.
pub const MAX_SIZE: u64 = 1 << 20;

/// The use of an opened file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading.
    Read,
    /// Reading and writing.
    Write,
    /// Reading and writing; a missing file is created, for the owner only.
    Create,
}

/// Opens the regular file whose path below `root` has these parts. `root` itself may be a symbolic link.
///
/// # Errors
/// It is not a regular file, a part of its path is a symbolic link, or the kernel refuses.
pub fn open(root: &Path, parts: &[&OsStr], access: Access) -> io::Result<File> {
    let Some((file, directories)) = parts.split_last() else { return Err(Errno::EINVAL.into()) };
    let common = OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    let directory = common | OFlag::O_RDONLY | OFlag::O_DIRECTORY;
    let mut at: OwnedFd = nix::fcntl::open(root, directory, Mode::empty())?;
    for name in directories {
        at = openat(at.as_fd(), *name, directory | OFlag::O_NOFOLLOW, Mode::empty())
            .map_err(|errno| not_followed(&at, name, errno))?;
    }
    let flags = match access {
        Access::Read => OFlag::O_RDONLY,
        Access::Write => OFlag::O_RDWR,
        Access::Create => OFlag::O_RDWR | OFlag::O_CREAT,
    };
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    let opened = openat(at.as_fd(), *file, flags | common | OFlag::O_NOFOLLOW | OFlag::O_NOCTTY, mode)
        .map_err(|errno| not_followed(&at, file, errno))?;
    let opened = File::from(opened);
    if !opened.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    Ok(opened)
}

/// Reads a whole file.
///
/// # Errors
/// It is larger than [`MAX_SIZE`], or the kernel refuses.
pub fn read(file: &mut File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(MAX_SIZE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_SIZE {
        return Err(io::Error::other("larger than 1 MiB"));
    }
    Ok(bytes)
}

/// Returns the error for a name that could not be opened: the kernel's, unless the name is the reason.
fn not_followed(directory: &OwnedFd, name: &OsStr, errno: Errno) -> io::Error {
    use nix::fcntl::AtFlags;
    use nix::sys::stat::{SFlag, fstatat};
    let kind = |mode| SFlag::from_bits_truncate(mode) & SFlag::S_IFMT;
    match fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW).map(|stat| kind(stat.st_mode)) {
        Ok(SFlag::S_IFLNK) => io::Error::other("a symbolic link, which is not followed"),
        // A socket, or a device without a driver.
        Ok(SFlag::S_IFSOCK | SFlag::S_IFCHR | SFlag::S_IFBLK | SFlag::S_IFIFO) => {
            io::Error::other("not a regular file")
        }
        _ => errno.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use nix::unistd::mkfifo;

    use super::*;

    fn open_text(root: &Path, path: &str, access: Access) -> Result<File, String> {
        let parts: Vec<&OsStr> = path.split('/').map(OsStr::new).collect();
        open(root, &parts, access).map_err(|error| error.to_string())
    }

    #[test]
    fn only_regular_files_below_the_directory_are_opened() {
        let home = tempfile::tempdir().unwrap();
        let root = home.path().join("conf");
        fs::create_dir_all(root.join("p/0")).unwrap();
        fs::write(home.path().join("outside"), "7").unwrap();
        fs::write(root.join("p/0/tasks"), "7").unwrap();
        fs::create_dir(root.join("p/0/directory")).unwrap();
        mkfifo(&root.join("p/0/fifo"), Mode::S_IRWXU).unwrap();
        symlink(home.path().join("outside"), root.join("p/0/link")).unwrap();
        symlink("0", root.join("p/1")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(root.join("p/0/socket")).unwrap();
        for access in [Access::Read, Access::Write, Access::Create] {
            let mut file = open_text(&root, "p/0/tasks", access).unwrap();
            assert_eq!(read(&mut file).unwrap(), b"7");
            for (path, why) in [
                ("p/0/fifo", "not a regular file"),
                ("p/0/socket", "not a regular file"),
                ("p/0/link", "a symbolic link, which is not followed"),
                ("p/1/tasks", "a symbolic link, which is not followed"),
            ] {
                assert_eq!(open_text(&root, path, access).unwrap_err(), why, "{path} {access:?}");
            }
        }
        assert_eq!(open_text(&root, "p/0/directory", Access::Read).unwrap_err(), "not a regular file");
        let absent = open(&root, &[OsStr::new("absent")], Access::Write).unwrap_err();
        assert_eq!(absent.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_created_file_is_for_its_owner_and_not_behind_a_link() {
        let home = tempfile::tempdir().unwrap();
        let file = open_text(home.path(), "lock", Access::Create).unwrap();
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        symlink(home.path().join("elsewhere"), home.path().join("dangling")).unwrap();
        assert!(open_text(home.path(), "dangling", Access::Create).is_err());
        assert!(!home.path().join("elsewhere").exists());
    }

    #[test]
    fn a_huge_file_is_not_read() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("tasks");
        File::create(&path).unwrap().set_len(1 << 40).unwrap();
        let mut file = open_text(home.path(), "tasks", Access::Read).unwrap();
        assert_eq!(read(&mut file).unwrap_err().to_string(), "larger than 1 MiB");
    }
}
