//! File descriptors that one program passes to the next.
//!
//! Owns duplicating, inheriting and closing them. Does not know which numbers are agreed upon.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd, RawFd};

use super::sys;

/// Takes ownership of the descriptor that was inherited as `number`.
///
/// # Errors
/// Returns `EBADF` if there is none.
pub(crate) fn inherited_fd(number: RawFd) -> io::Result<OwnedFd> {
    sys::inherited_fd(number)
}

/// Whether the number is that of an open descriptor.
pub(crate) fn is_open(number: RawFd) -> bool {
    std::fs::symlink_metadata(format!("/proc/self/fd/{number}")).is_ok()
}

/// Duplicates `fd` as `number`, without close-on-exec. Closes what `number` was before.
pub(crate) fn dup_to(fd: BorrowedFd<'_>, number: RawFd) -> io::Result<OwnedFd> {
    sys::dup_to(fd, number)
}

/// Makes `other` refer to the same file as `fd` (dup2(2)).
pub(crate) fn replace_fd(fd: BorrowedFd<'_>, other: BorrowedFd<'_>) -> io::Result<()> {
    sys::replace_fd(fd, other)
}

/// Clears close-on-exec, so that started programs inherit the descriptor.
pub(crate) fn clear_cloexec(fd: BorrowedFd<'_>) -> io::Result<()> {
    nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()))?;
    Ok(())
}

/// Closes all descriptors from 3 up that are not in `kept`. A daemon would otherwise keep files, pipes and mounts of its
/// starter open for as long as it runs.
pub(crate) fn close_inherited(kept: &[Option<&OwnedFd>]) {
    let mut kept: Vec<u32> = kept.iter().flatten().map(|fd| fd.as_raw_fd() as u32).collect();
    kept.sort_unstable();
    let mut first = 3;
    for fd in kept.into_iter().chain([u32::MAX]) {
        if first < fd
            && let Err(error) = sys::close_range(first, fd - 1)
        {
            log::warn!("inherited descriptors cannot be closed: {error}");
        }
        first = fd.saturating_add(1);
    }
}

/// The lowest number that no program agrees upon with another.
const FIRST_FREE: RawFd = 16;

/// Moves a descriptor to a number from 16 up, with close-on-exec, so that the numbers below stay free for
/// [`dup_to`].
pub(crate) fn dup_above(fd: OwnedFd) -> io::Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(&fd, FIRST_FREE)?)
}
