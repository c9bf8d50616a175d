//! A session with the kernel on a device that another worker may have used before.
//!
//! Owns the INIT handshake and its replay. Does not know how the device was mounted, or when a worker starts.
//!
//! The kernel sends INIT once per mount, but fuser expects it at the start of every session. So fuser gets one end
//! of a socket pair instead of the device. The INIT request is written to the other end: the first worker reads it
//! from the device, every later worker gets it from the handoff state. After the handshake, dup2(2) puts the
//! device in the place of fuser's end.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use fuser::{Config, SessionACL};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::abi;
use super::adapter::Fs;
use super::poll::PollWaker;
use crate::engine::Engine;
use crate::handles::OpenFiles;
use crate::process;

/// The number of threads that serve requests: a slow request must not stall the others.
const THREADS: usize = 4;

/// A session after its handshake.
#[derive(Debug)]
pub(crate) struct Session(fuser::Session<Fs>);

impl Session {
    /// Opens a session on the device. `known_init` is the kernel's INIT request if an earlier worker has answered
    /// it. Returns the INIT request with the session.
    ///
    /// # Errors
    /// The device or the handshake failed.
    pub(crate) fn open(
        engine: Arc<Engine>,
        files: OpenFiles,
        device: &OwnedFd,
        known_init: Option<Vec<u8>>,
    ) -> io::Result<(Self, Vec<u8>)> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        let is_first = known_init.is_none();
        let init = match known_init {
            Some(init) => init,
            None => {
                let mut buffer = vec![0; abi::MIN_READ_BUFFER];
                let length = nix::unistd::read(device, &mut buffer)?;
                buffer.truncate(length);
                buffer
            }
        };
        nix::unistd::write(&ours, &init)?;
        let mut config = Config::default();
        config.n_threads = Some(THREADS);
        let session = fuser::Session::from_fd(Fs::new(engine, files), theirs, SessionACL::All, config)?;
        let mut reply = vec![0; abi::MIN_READ_BUFFER];
        let length = nix::unistd::read(&ours, &mut reply)?;
        if is_first {
            let reply = reply.get(..length).unwrap_or_default();
            nix::sys::uio::writev(device, &[IoSlice::new(reply)])?;
        }
        process::replace_fd(device.as_fd(), session.as_fd())?;
        Ok((Self(session), init))
    }

    /// Returns the handle that wakes pollers of an earlier worker.
    pub(crate) fn poll_waker(&self) -> PollWaker {
        PollWaker::new(self.0.notifier())
    }

    /// Serves until the mount ends.
    ///
    /// # Errors
    /// The kernel does not deliver requests.
    pub(crate) fn run(self) -> io::Result<()> {
        self.0.run()
    }
}

/// Asks the kernel to send every request again that has been read and not answered. Call it before anything is
/// read from the device.
///
/// # Errors
/// The kernel does not support it (before 6.9), or the mount has ended.
pub(crate) fn request_resend(device: &OwnedFd) -> io::Result<()> {
    nix::unistd::write(device, &abi::RESEND)?;
    Ok(())
}
