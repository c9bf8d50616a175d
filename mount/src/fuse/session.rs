//! A session with the kernel on a device that another worker may have used before.
//!
//! Owns the INIT handshake and its replay. Does not know how the device was mounted, or when a worker starts.
//!
//! The kernel sends INIT once per mount, but fuser expects it at the start of every session. So fuser gets one end
//! of a socket pair instead of the device. The INIT request is written to the other end: the first worker reads it
//! from the device, every later worker gets it from the handoff state. After the handshake, dup2(2) puts the
//! device in the place of fuser's end.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use fuser::{Config, SessionACL};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::abi;
use super::adapter::{Fs, LateRequests};
use super::poll::PollWaker;
use super::turns::THREADS;
use crate::engine::Engine;
use crate::handles::OpenFiles;
use crate::process;

/// A session after its handshake.
#[derive(Debug)]
pub(crate) struct Session {
    session: fuser::Session<Fs>,
    late: Arc<LateRequests>,
}

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
        let fs = Fs::new(engine, files);
        let late = Arc::new(fs.late_requests());
        let (session, init) = shake_hands(device, known_init, |fd| {
            let mut config = Config::default();
            config.n_threads = Some(THREADS);
            fuser::Session::from_fd(fs, fd, SessionACL::All, config)
        })?;
        Ok((Self { session, late }, init))
    }

    /// Returns the handle that wakes pollers of an earlier worker.
    pub(crate) fn poll_waker(&self) -> PollWaker {
        PollWaker::new(self.session.notifier())
    }

    /// Serves until the mount ends.
    ///
    /// # Errors
    /// The kernel does not deliver requests.
    pub(crate) fn run(self) -> io::Result<()> {
        let late = Arc::clone(&self.late);
        std::thread::Builder::new().name("kcm-late".into()).spawn(move || late.refuse())?;
        let result = self.session.run();
        self.late.end();
        result
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

/// Opens a session that shakes hands on a socket, and then puts the device in the place of the socket. Returns the
/// session and the kernel's INIT request.
fn shake_hands<S: AsFd>(
    device: &OwnedFd,
    known_init: Option<Vec<u8>>,
    open: impl FnOnce(OwnedFd) -> io::Result<S>,
) -> io::Result<(S, Vec<u8>)> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
    let is_first = known_init.is_none();
    let init = match known_init {
        Some(init) => init,
        None => receive(device)?,
    };
    nix::unistd::write(&ours, &init)?;
    let session = open(theirs)?;
    let reply = receive(&ours)?;
    if is_first {
        nix::sys::uio::writev(device, &[IoSlice::new(&reply)])?;
    }
    process::replace_fd(device.as_fd(), session.as_fd())?;
    Ok((session, init))
}

/// Reads one message.
fn receive(fd: &OwnedFd) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; abi::MIN_READ_BUFFER];
    let length = nix::unistd::read(fd, &mut buffer)?;
    buffer.truncate(length);
    Ok(buffer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{MsgFlags, recv};
    use std::os::fd::AsRawFd as _;

    /// A filesystem without files.
    struct Empty;

    impl fuser::Filesystem for Empty {}

    /// The INIT request of Linux 6.9 (protocol 7.40): `struct fuse_in_header` with opcode 26, `struct fuse_init_in`.
    fn init_request() -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [104_u32, 26] {
            bytes.extend(word.to_ne_bytes());
        }
        // Request ID 2; node, user, group and process are 0.
        bytes.extend(2_u64.to_ne_bytes());
        bytes.extend([0; 24]);
        for word in [7_u32, 40, 131_072, 0x73ff_fffb, 1 << 7] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.resize(104, 0);
        bytes
    }

    fn open(fd: OwnedFd) -> io::Result<fuser::Session<Empty>> {
        fuser::Session::from_fd(Empty, fd, SessionACL::All, Config::default())
    }

    /// The kernel's end of a device, and the device.
    fn device() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    /// The message that the kernel has got, if any.
    fn received(kernel: &OwnedFd) -> Option<Vec<u8>> {
        let mut bytes = [0; 1024];
        let length = recv(kernel.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT).ok()?;
        Some(bytes[..length].to_vec())
    }

    #[test]
    fn the_first_worker_answers_the_kernels_init_request() {
        let (kernel, device) = device();
        nix::unistd::write(&kernel, &init_request()).unwrap();
        let (_session, init) = shake_hands(&device, None, open).unwrap();
        assert_eq!(init, init_request());
        let reply = received(&kernel).expect("a reply");
        // `struct fuse_out_header`: length, error, request ID; then the protocol version.
        assert_eq!(reply[..4], (reply.len() as u32).to_ne_bytes());
        assert_eq!(reply[4..16], [0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(reply[16..20], 7_u32.to_ne_bytes());
    }

    #[test]
    fn a_later_worker_replays_the_init_request_without_the_kernel() {
        let (kernel, device) = device();
        let (session, init) = shake_hands(&device, Some(init_request()), open).unwrap();
        assert_eq!(init, init_request());
        assert_eq!(received(&kernel), None, "the kernel gets no second reply");
        // The session's descriptor is the device now.
        nix::unistd::write(&kernel, b"request").unwrap();
        let mut bytes = [0; 16];
        assert_eq!(nix::unistd::read(session.as_fd(), &mut bytes).unwrap(), 7);
        assert_eq!(&bytes[..7], b"request");
    }

    #[test]
    fn a_device_without_a_kernel_is_an_error() {
        let (kernel, device) = device();
        drop(kernel);
        assert!(shake_hands(&device, None, open).is_err());
    }

    #[test]
    fn the_resend_request_is_a_notification() {
        let (kernel, device) = device();
        request_resend(&device).unwrap();
        let message = received(&kernel).expect("a message");
        // `struct fuse_out_header`: length 16, `FUSE_NOTIFY_RESEND`, no request.
        let words: Vec<u32> =
            message.chunks(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap())).collect();
        assert_eq!(words, [16, 7, 0, 0]);
    }
}
