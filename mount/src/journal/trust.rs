//! Who may write to a path: only root, or it is not used.
//!
//! Owns the rule, and opening files so that no link and no pipe is followed. Does not know what the files hold.
//!
//! Each directory on the way is checked, and each symbolic link on it. If only root can write to all of them, the path
//! means the same file to everybody else from then on, whenever it is opened.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Component, Path, PathBuf};

use super::{StateError, failed};

/// The files of a state directory, and what replaces them while it is written.
const NAMES: [&str; 10] = [
    "lock",
    "config",
    "config.new",
    "claims",
    "claims.new",
    "events",
    "events.new",
    "log",
    "log.old",
    "upgrade",
];
/// What follows the name of a damaged file that was set aside; then comes the time.
pub(super) const DAMAGED: &str = ".damaged-";
/// The most symbolic links that are followed in one path, as in path_resolution(7).
const MAX_LINKS: usize = 40;
/// The bits of a mode: writable by the group, by others; only owners may remove entries.
const GROUP_WRITES: u32 = 0o020;
const OTHERS_WRITE: u32 = 0o002;
const STICKY: u32 = 0o1000;

/// Something that somebody other than root can change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Untrusted {
    pub(crate) path: PathBuf,
    pub(crate) why: String,
}

/// Removes the files of a state directory, the damaged ones that were set aside too, and the directory if nothing else is in
/// it.
///
/// # Errors
/// The directory is still there.
pub(crate) fn remove(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)?.filter_map(Result::ok) {
        let name = entry.file_name();
        let name = name.to_str().map(|name| name.split_once(DAMAGED).map_or(name, |(original, _)| original));
        if name.is_some_and(|name| NAMES.contains(&name)) {
            let _ = fs::remove_file(entry.path());
        }
    }
    fs::remove_dir(directory)
}

/// Checks a state directory, as far as it exists, and its files.
///
/// # Errors
/// [`StateError::Untrusted`] names what somebody other than root can change.
pub(crate) fn check_directory(path: &Path) -> Result<(), StateError> {
    let untrusted = find(path).map_err(failed(path, "cannot be examined"))?;
    let untrusted = match untrusted {
        Some(untrusted) => Some(untrusted),
        None => untrusted_file(path).map_err(failed(path, "cannot be read"))?,
    };
    untrusted.map_or(Ok(()), |Untrusted { path, why }| Err(StateError::Untrusted { path, why }))
}

/// Finds what somebody other than root can change, so that the path means something else or the file changes. What
/// does not exist yet is root's to make.
///
/// # Errors
/// Part of the path cannot be examined.
pub(crate) fn find(path: &Path) -> io::Result<Option<Untrusted>> {
    let mut todo: VecDeque<OsString> = names(&std::path::absolute(path)?);
    let (mut known, mut links) = (PathBuf::from("/"), 0);
    let mut metadata = fs::symlink_metadata(&known)?;
    while let Some(name) = todo.pop_front() {
        if let Some(why) = why_not(&metadata, false) {
            return Ok(Some(Untrusted { path: known, why }));
        }
        if name == ".." {
            known.pop();
            metadata = fs::symlink_metadata(&known)?;
            continue;
        }
        let next = known.join(name);
        metadata = match fs::symlink_metadata(&next) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        if !metadata.is_symlink() {
            known = next;
            continue;
        }
        if let Some(why) = not_of_root(&metadata) {
            return Ok(Some(Untrusted { path: next, why: format!("is a symbolic link that {why}") }));
        }
        links += 1;
        if links > MAX_LINKS {
            return Err(nix::errno::Errno::ELOOP.into());
        }
        let target = fs::read_link(&next)?;
        if target.is_absolute() {
            known = PathBuf::from("/");
        }
        metadata = fs::symlink_metadata(&known)?;
        names(&target).into_iter().rev().for_each(|name| todo.push_front(name));
    }
    Ok(why_not(&metadata, true).map(|why| Untrusted { path: known, why }))
}

fn names(path: &Path) -> VecDeque<OsString> {
    let name = |component: Component<'_>| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    };
    path.components().filter_map(name).collect()
}

/// Why somebody other than root can change this. `is_last`: whether it is what is used, and not only on the way to it.
fn why_not(metadata: &Metadata, is_last: bool) -> Option<String> {
    if let Some(why) = not_of_root(metadata) {
        return Some(why);
    }
    // In a sticky directory, such as /tmp, nobody can replace what is root's.
    if metadata.mode() & STICKY != 0 && !is_last {
        return None;
    }
    let by_group = metadata.mode() & GROUP_WRITES != 0 && metadata.gid() != 0;
    let by_others = metadata.mode() & OTHERS_WRITE != 0;
    (by_group || by_others).then(|| format!("is writable by others (mode {:04o})", metadata.mode() & 0o7777))
}

fn not_of_root(metadata: &Metadata) -> Option<String> {
    let own = nix::unistd::geteuid().as_raw();
    let owner = metadata.uid();
    (owner != 0 && owner != own).then(|| format!("belongs to user {owner}"))
}

fn untrusted_file(directory: &Path) -> io::Result<Option<Untrusted>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        if !NAMES.iter().any(|known| name == *known) {
            continue;
        }
        // A file that has gone meanwhile was replaced by a daemon.
        let Ok(metadata) = entry.metadata() else { continue };
        let why = if metadata.is_symlink() {
            Some("is a symbolic link".to_owned())
        } else {
            why_not(&metadata, true)
        };
        if let Some(why) = why {
            return Ok(Some(Untrusted { path: entry.path(), why }));
        }
    }
    Ok(None)
}

/// Opens a file of the state directory. Follows no symbolic link, and waits for no pipe.
///
/// # Errors
/// It cannot be opened, or is not a regular file.
pub(crate) fn open(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let file = options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("not a regular file")) }
}

/// Reads a file of the state directory.
///
/// # Errors
/// As [`open`].
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(OpenOptions::new().read(true), path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Reads a file that may name a program for root to run.
///
/// # Errors
/// As [`open`], or somebody other than root can write to the file.
pub(crate) fn read_private(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = open(OpenOptions::new().read(true), path)?;
    if let Some(why) = why_not(&file.metadata()?, true) {
        return Err(io::Error::other(why));
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Replaces the content of a file of the state directory.
///
/// # Errors
/// As [`open`], or it cannot be written.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = open(options.write(true).create(true).truncate(true).mode(0o600), path)?;
    io::Write::write_all(&mut file, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt as _, chown, symlink};

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn why(path: &Path) -> String {
        match check_directory(path) {
            Ok(()) => String::new(),
            Err(StateError::Untrusted { path, why }) => {
                format!("{} {why}", path.file_name().unwrap().to_string_lossy())
            }
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn what_others_can_write_to_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let (parent, state) = (directory.path().join("parent"), directory.path().join("parent/state"));
        assert_eq!(why(&state), "", "what does not exist is root's to make");
        fs::create_dir_all(&state).unwrap();
        assert_eq!(why(&state), "");
        mode(&state, 0o777);
        assert_eq!(why(&state), "state is writable by others (mode 0777)");
        mode(&state, 0o1777);
        assert_eq!(why(&state), "state is writable by others (mode 1777)");
        mode(&state, 0o700);
        mode(&parent, 0o777);
        assert_eq!(why(&state), "parent is writable by others (mode 0777)");
        mode(&parent, 0o1777);
        assert_eq!(why(&state), "", "nobody else can replace it");
        fs::write(state.join("claims"), "").unwrap();
        mode(&state.join("claims"), 0o666);
        assert_eq!(why(&state), "claims is writable by others (mode 0666)");
        mode(&state.join("claims"), 0o644);
        symlink("/etc/passwd", state.join("config.new")).unwrap();
        assert_eq!(why(&state), "config.new is a symbolic link");
        assert!(write(&state.join("config.new"), b"x").is_err(), "no link is followed");
        assert!(read(&state.join("config.new")).is_err());
    }

    #[test]
    fn only_files_of_a_state_directory_are_removed() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        fs::create_dir(&state).unwrap();
        for name in
            ["lock", "config", "config.damaged-1700000000", "claims.damaged-1700000000-1", "events.new"]
        {
            fs::write(state.join(name), "").unwrap();
        }
        for name in ["notes", "configuration", "notes.damaged-1"] {
            fs::write(state.join(name), "").unwrap();
        }
        assert!(remove(&state).is_err());
        let left =
            fs::read_dir(&state).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut left: Vec<String> = left.collect();
        left.sort();
        assert_eq!(left, ["configuration", "notes", "notes.damaged-1"]);
        left.iter().for_each(|name| fs::remove_file(state.join(name)).unwrap());
        remove(&state).unwrap();
        assert!(!state.exists());
    }

    mod as_root {
        use super::*;

        #[test]
        fn what_belongs_to_somebody_else_is_refused() {
            let directory = tempfile::tempdir().unwrap();
            let (state, link) = (directory.path().join("state"), directory.path().join("link"));
            fs::create_dir(&state).unwrap();
            symlink("state", &link).unwrap();
            assert_eq!(why(&link), "", "root's own link");
            std::os::unix::fs::lchown(&link, Some(65534), None).unwrap();
            assert_eq!(why(&link), "link is a symbolic link that belongs to user 65534");
            fs::write(state.join("upgrade"), "/bin/true").unwrap();
            assert!(read_private(&state.join("upgrade")).is_ok());
            chown(state.join("upgrade"), Some(65534), None).unwrap();
            assert_eq!(why(&state), "upgrade belongs to user 65534");
            assert!(read_private(&state.join("upgrade")).is_err());
            fs::remove_file(state.join("upgrade")).unwrap();
            chown(&state, Some(65534), None).unwrap();
            assert_eq!(why(&state), "state belongs to user 65534");
        }
    }
}
