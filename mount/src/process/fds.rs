//! File descriptors that one program passes to the next.
//!
//! Owns duplicating, inheriting and closing them. Does not know which numbers are agreed upon.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd, RawFd};

use super::sys;

/// The descriptor that was inherited under this number.
pub(crate) fn inherited_fd(number: RawFd) -> io::Result<OwnedFd> {
    sys::inherited_fd(number)
}

/// A copy of the descriptor under this number; programs that are started inherit it.
pub(crate) fn dup_to(fd: BorrowedFd<'_>, number: RawFd) -> io::Result<OwnedFd> {
    sys::dup_to(fd, number)
}

/// Makes `other` a copy of the descriptor.
pub(crate) fn replace_fd(fd: BorrowedFd<'_>, other: BorrowedFd<'_>) -> io::Result<()> {
    sys::replace_fd(fd, other)
}

/// Programs that are started inherit the descriptor.
pub(crate) fn clear_cloexec(fd: BorrowedFd<'_>) -> io::Result<()> {
    nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()))?;
    Ok(())
}

/// Closes what somebody has left open for us, but for what is kept: a daemon must not keep alive what it does
/// not know.
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

/// The same descriptor under a number that nobody has agreed upon; programs that are started do not get it.
pub(crate) fn dup_above(fd: OwnedFd) -> io::Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(&fd, 16)?)
}
