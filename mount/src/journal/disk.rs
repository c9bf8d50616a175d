//! The system calls that the journal makes on its files.
//!
//! Owns the two ways in which a file changes: appended to, and replaced as a whole. A trait, so that a test can
//! make any of the calls fail, write short, or not return. Does not know what the files hold.

use std::fmt::Debug;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use nix::errno::Errno;

use super::trust;

/// The calls; by default the real ones.
pub(super) trait Disk: Debug + Send + Sync {
    /// Opens a file for appending, and creates it with mode 0600 if it does not exist.
    fn open(&self, path: &Path) -> io::Result<File> {
        trust::open(OpenOptions::new().append(true).create(true).mode(0o600), path)
    }

    /// Writes once, as write(2) does: possibly less than `bytes`.
    fn write(&self, mut file: &File, bytes: &[u8]) -> io::Result<usize> {
        file.write(bytes)
    }

    fn set_len(&self, file: &File, length: u64) -> io::Result<()> {
        file.set_len(length)
    }

    /// fsync(2), of a file or a directory.
    fn sync(&self, file: &File) -> io::Result<()> {
        file.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }
}

/// The disk of this machine.
#[derive(Debug)]
pub(super) struct RealDisk;

impl Disk for RealDisk {}

/// Whether a new file must survive a loss of power, or only the death of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Durability {
    Process,
    Power,
}

/// Replaces a file of the directory atomically. Returns the new file, open for appending: opening it afterwards
/// could fail when the old one is already gone. The content is only asked for once the disk can be written to: a read-only
/// one is tried often.
///
/// # Errors
/// The old file is unchanged. If the new one was in place already and only the directory could not be synced, the
/// old content is put back: the caller keeps to the old one, so the next reader must not find the new one.
pub(super) fn replace(
    disk: &dyn Disk,
    directory: &Path,
    name: &str,
    bytes: impl FnOnce() -> io::Result<Vec<u8>>,
    durability: Durability,
) -> io::Result<File> {
    let (path, new) = (directory.join(name), directory.join(format!("{name}.new")));
    let begin = || {
        let file = disk.open(&new)?;
        disk.set_len(&file, 0)?;
        Ok::<File, io::Error>(file)
    };
    let replace = || {
        let file = begin()?;
        write_all(disk, &file, &bytes()?)?;
        if durability == Durability::Power {
            disk.sync(&file)?;
        }
        if durability == Durability::Process {
            disk.rename(&new, &path)?;
            return Ok(file);
        }
        let parent = File::open(directory)?;
        let old = trust::read(&path);
        disk.rename(&new, &path)?;
        disk.sync(&parent).inspect_err(|_| {
            let put_back = match &old {
                Ok(old) => begin()
                    .and_then(|file| write_all(disk, &file, old))
                    .and_then(|()| disk.rename(&new, &path)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => fs::remove_file(&path),
                // A file that could not be read is worth less than the new one.
                Err(_) => Ok(()),
            };
            if let Err(error) = put_back {
                log::error!("{}: a change that was refused cannot be taken back: {error}", path.display());
            }
        })?;
        Ok(file)
    };
    replace().inspect_err(|_| {
        let _ = fs::remove_file(&new);
    })
}

fn write_all(disk: &dyn Disk, file: &File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match disk.write(file, bytes) {
            Ok(0) => return Err(Errno::ENOSPC.into()),
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A file that lines are appended to, each time all of them or none.
#[derive(Debug)]
pub(super) struct AppendFile {
    file: File,
    /// The length in bytes up to which the file is sound.
    length: u64,
    /// Whether there may be part of a line after `length`, which has to be cut off before the next write.
    torn: bool,
}

impl AppendFile {
    pub(super) fn new(file: File, length: u64) -> Self {
        Self { file, length, torn: false }
    }

    /// The length in bytes.
    pub(super) fn len(&self) -> u64 {
        self.length
    }

    /// Cuts off what is after the sound part of the file.
    pub(super) fn cut(&mut self, disk: &dyn Disk) -> io::Result<()> {
        self.torn = true;
        disk.set_len(&self.file, self.length)?;
        self.torn = false;
        Ok(())
    }

    /// Appends all of `bytes` with one write(2), so that a process that is killed leaves a prefix.
    ///
    /// # Errors
    /// Nothing of `bytes` counts: it is cut off now, or before the next write.
    pub(super) fn append(&mut self, disk: &dyn Disk, bytes: &[u8]) -> io::Result<()> {
        if self.torn {
            self.cut(disk)?;
        }
        match disk.write(&self.file, bytes) {
            Ok(written) if written == bytes.len() => {
                self.length += bytes.len() as u64;
                Ok(())
            }
            short => {
                let error = short.err().unwrap_or_else(|| Errno::ENOSPC.into());
                // The caller learns why the write failed, not why the file could not be cut.
                let _ = self.cut(disk);
                Err(error)
            }
        }
    }
}
