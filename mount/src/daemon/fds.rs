//! The interface between the daemon's processes: descriptors under fixed numbers, the state of the mount, and
//! messages from the worker to the supervisor.
//!
//! Owns the numbers and the formats. Does not know what they are used for.
//!
//! A worker inherits its descriptors under these numbers, and so does a supervisor that continues for another one.
//! Nothing of this has a name in a file system, so nothing is lost or left behind between a death and a start.
//!
//! The numbers, the JSON of [`HandoffState`] and the bytes of [`Message`] are an interface between versions: in an
//! upgrade, a supervisor of one program has a worker of another.
//!
//! Longer than 400 lines because of the tests that show that interface byte by byte.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, IntoRawFd as _, OwnedFd, RawFd};
use std::path::PathBuf;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use serde::{Deserialize, Serialize};

use crate::failpoint;
use crate::fuse::abi;
use crate::journal::StateLock;
use crate::model::topology::Topology;
use crate::process::{self, KeptPidfds};

/// The open FUSE device. The mount lives as long as a process has it open.
pub(super) const DEVICE: RawFd = 3;
/// One end of the [`ControlSocket`] between the supervisor and its worker.
pub(super) const CONTROL: RawFd = 4;
/// The [`HandoffMemfd`].
pub(super) const HANDOFF: RawFd = 5;
/// The locked file of the state directory.
pub(super) const LOCK: RawFd = 6;
/// The pidfd of the worker, for a supervisor that continues for another one.
pub(super) const WORKER: RawFd = 7;
/// The memfd in which the journal keeps what its disk does not take. Earlier programs do not know it.
pub(super) const SPARE: RawFd = 8;
/// The socket of the [`KeptPidfds`]. Earlier programs do not know it.
pub(super) const KEPT: RawFd = 9;
/// All of these numbers.
const FIXED_FDS: std::ops::RangeInclusive<RawFd> = DEVICE..=KEPT;
const SPARE_NAME: &CStr = c"kcm-spare";

/// The longest message from a worker, in bytes: one character and a reason in one sentence.
const MAX_MESSAGE: usize = 1024;

/// The descriptors that every process of the daemon has open.
#[derive(Debug)]
pub(super) struct InheritedFds {
    pub(super) device: OwnedFd,
    pub(super) handoff: HandoffMemfd,
    pub(super) lock: StateLock,
    pub(super) spare: OwnedFd,
    pub(super) kept: KeptPidfds,
}

impl InheritedFds {
    /// The descriptors under their fixed numbers.
    ///
    /// # Errors
    /// This process was not started by a daemon.
    pub(super) fn take() -> io::Result<Self> {
        Ok(Self {
            device: process::inherited_fd(DEVICE)?,
            handoff: HandoffMemfd::from_fd(process::inherited_fd(HANDOFF)?),
            lock: StateLock::from_fd(process::inherited_fd(LOCK)?),
            spare: match process::inherited_fd(SPARE) {
                Ok(fd) if is_spare(&fd) => fd,
                _ => new_spare()?,
            },
            kept: kept(process::inherited_fd(KEPT).ok())?,
        })
    }

    /// Moves the descriptors to their fixed numbers, where workers inherit them.
    ///
    /// # Errors
    /// No descriptors are left.
    pub(super) fn install(self) -> io::Result<Self> {
        Ok(Self {
            device: install_fd_at(self.device, DEVICE)?,
            handoff: HandoffMemfd(install_fd_at(self.handoff.0, HANDOFF)?),
            lock: StateLock::from_fd(install_fd_at(self.lock.into_fd(), LOCK)?),
            spare: install_fd_at(self.spare, SPARE)?,
            kept: kept(Some(install_fd_at(self.kept.into_fd(), KEPT)?))?,
        })
    }
}

/// The kept pidfds of a process that has this descriptor under [`KEPT`]; none if its program does not know them.
///
/// # Errors
/// No descriptors are left.
pub(super) fn kept(descriptor: Option<OwnedFd>) -> io::Result<KeptPidfds> {
    descriptor.and_then(KeptPidfds::from_fd).map_or_else(KeptPidfds::new, Ok)
}

/// Makes an empty memfd for the journal.
///
/// # Errors
/// No descriptors or memory are left.
pub(super) fn new_spare() -> io::Result<OwnedFd> {
    process::dup_above(memfd_create(SPARE_NAME, MFdFlags::MFD_CLOEXEC)?)
}

/// Whether a descriptor that another process had under [`SPARE`] is that memfd.
pub(super) fn is_spare(fd: &OwnedFd) -> bool {
    let name = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    name.is_ok_and(|name| name.to_string_lossy().starts_with("/memfd:kcm-spare"))
}

/// The part of the state of a mount that is not in the state directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct HandoffState {
    /// Identifies the mount: the kernel numbers the requests of each mount separately.
    #[serde(rename = "mount")]
    pub(super) mount_id: u64,
    /// The machine as it was when the directory was mounted; used if it cannot be read.
    pub(super) topology: Topology,
    /// A legacy layout that has been moved aside and that the first worker imports.
    pub(super) import: Option<PathBuf>,
    /// The kernel's INIT request, once it has been answered. Every later worker replays it.
    pub(super) init: Option<Vec<u8>>,
    /// The CPUs on which the daemon was started. Earlier programs do not know them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) cpus: Option<String>,
    /// Whether the daemon ends when there are no pools. Earlier programs do not know it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) until_unused: bool,
}

impl HandoffState {
    /// Whether the kernel (6.9 and newer) sends requests again that a dead worker had not answered.
    pub(super) fn resends(&self) -> bool {
        self.init.as_deref().is_some_and(abi::offers_resend) && !failpoint::hides_resend()
    }
}

/// The [`HandoffState`] as JSON in a memfd.
#[derive(Debug)]
pub(super) struct HandoffMemfd(OwnedFd);

impl HandoffMemfd {
    pub(super) fn new(state: &HandoffState) -> io::Result<Self> {
        let memfd = Self(memfd_create(c"kcm-handoff", MFdFlags::empty())?);
        memfd.write(state)?;
        Ok(memfd)
    }

    pub(super) fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    pub(super) fn read(&self) -> io::Result<HandoffState> {
        let mut bytes = vec![0; usize::try_from(nix::sys::stat::fstat(&self.0)?.st_size).unwrap_or(0)];
        let read = nix::sys::uio::pread(&self.0, &mut bytes, 0)?;
        bytes.truncate(read);
        Ok(serde_json::from_slice(&bytes)?)
    }

    pub(super) fn write(&self, state: &HandoffState) -> io::Result<()> {
        let bytes = serde_json::to_vec(state)?;
        nix::unistd::ftruncate(&self.0, 0)?;
        match nix::sys::uio::pwrite(&self.0, &bytes, 0)? {
            written if written == bytes.len() => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }
}

impl AsFd for HandoffMemfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A message from a worker to its supervisor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// The worker serves. Whether the kernel sends unanswered requests to the next worker.
    Ready { resends: bool },
    /// The worker cannot serve, for this reason.
    Failed(String),
    /// The worker was asked to stop, so the mount ends.
    Stop,
    /// There are no pools, and the daemon was started for as long as there are.
    Unused,
}

/// One end of the socket between a supervisor and its worker. Each message is one packet.
#[derive(Debug)]
pub(super) struct ControlSocket(OwnedFd);

impl ControlSocket {
    /// Both ends.
    pub(super) fn pair() -> io::Result<(Self, Self)> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (a, b) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        Ok((Self(a), Self(b)))
    }

    pub(super) fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// The PID of the process that made the pair.
    pub(super) fn creator(&self) -> Option<u32> {
        let peer = nix::sys::socket::getsockopt(&self.0, nix::sys::socket::sockopt::PeerCredentials).ok()?;
        u32::try_from(peer.pid()).ok().filter(|pid| *pid != 0)
    }

    /// Moves this end to its fixed number, so that the next process inherits it.
    pub(super) fn install(self) -> io::Result<Self> {
        install_fd_at(self.0, CONTROL).map(Self)
    }

    /// Sends a message. Does nothing if the other end is closed.
    pub(super) fn send(&self, message: &Message) {
        let bytes = match message {
            Message::Ready { resends: true } => b"R".to_vec(),
            Message::Ready { resends: false } => b"r".to_vec(),
            Message::Stop => b"S".to_vec(),
            Message::Unused => b"U".to_vec(),
            Message::Failed(reason) => [b"F", reason.as_bytes()].concat(),
        };
        let _ = send(self.0.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL);
    }

    /// Receives a message without waiting. `None`: no message has arrived, the other end is closed, or the
    /// message is unknown.
    pub(super) fn receive(&self) -> Option<Message> {
        let mut bytes = [0; MAX_MESSAGE];
        let length = recv(self.0.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT).ok()?;
        Some(match bytes.get(..length)?.split_first()? {
            (b'R', []) => Message::Ready { resends: true },
            (b'r', []) => Message::Ready { resends: false },
            (b'S', []) => Message::Stop,
            (b'U', []) => Message::Unused,
            (b'F', reason) => Message::Failed(String::from_utf8_lossy(reason).into_owned()),
            _ => return None,
        })
    }
}

impl AsFd for ControlSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Moves a descriptor to a number, so that programs that this process starts inherit it. Closes the descriptor that
/// had the number before.
pub(super) fn install_fd_at(fd: OwnedFd, number: RawFd) -> io::Result<OwnedFd> {
    if fd.as_raw_fd() == number {
        process::clear_cloexec(fd.as_fd())?;
        return Ok(fd);
    }
    process::dup_to(fd.as_fd(), number)
}

/// Leaves a descriptor open, for the program that this process becomes.
pub(super) fn leak(installed: OwnedFd) {
    let _ = installed.into_raw_fd();
}

/// Occupies a number with `/dev/null`, so that no other descriptor gets it.
pub(super) fn reserve_fd(number: RawFd) -> io::Result<()> {
    // open(2) returns the lowest free number, which may be this one.
    let null = process::dup_above(std::fs::File::open("/dev/null")?.into())?;
    // Never closed, only replaced.
    leak(process::dup_to(null.as_fd(), number)?);
    Ok(())
}

/// Occupies a number that an earlier program may not have used, unless it has.
pub(super) fn reserve_if_free(number: RawFd) -> io::Result<()> {
    if process::is_open(number) { Ok(()) } else { reserve_fd(number) }
}

/// Occupies all fixed numbers.
pub(super) fn reserve_all() -> io::Result<()> {
    FIXED_FDS.into_iter().try_for_each(reserve_fd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::cpuset::CpuId;
    use crate::model::topology::Cpu;

    fn state() -> HandoffState {
        HandoffState {
            mount_id: 7,
            topology: Topology::default(),
            import: None,
            init: None,
            cpus: None,
            until_unused: false,
        }
    }

    #[test]
    fn the_handoff_state_is_read_as_it_was_written() {
        let memfd = HandoffMemfd::new(&state()).unwrap();
        assert_eq!(memfd.read().unwrap(), state());
        let answered = HandoffState { init: Some(vec![1; 80]), ..state() };
        memfd.write(&answered).unwrap();
        assert_eq!(memfd.read().unwrap(), answered);
        memfd.write(&state()).unwrap();
        assert_eq!(memfd.read().unwrap(), state(), "the shorter text replaces the longer one");
    }

    /// These bytes were written by a program before this type had its name. Do not change them: a running
    /// supervisor has them in its memfd during an upgrade.
    #[test]
    fn the_handoff_state_of_older_programs_is_read() {
        let old = concat!(
            r#"{"mount":81234567890123,"topology":{"cpus":["#,
            r#"{"id":0,"core":0,"socket":0,"node":0,"online":true,"isolated":false},"#,
            r#"{"id":1,"core":null,"socket":null,"node":null,"online":false,"isolated":true}]},"#,
            r#""import":"/etc/kcm.old","init":[104,0,0,0,26,0,0,0]}"#
        );
        let cpu = Cpu {
            id: CpuId::new(0).unwrap(),
            core: Some(0),
            socket: Some(0),
            node: Some(0),
            online: true,
            isolated: false,
        };
        let offline = Cpu {
            id: CpuId::new(1).unwrap(),
            core: None,
            socket: None,
            node: None,
            online: false,
            isolated: true,
        };
        let expected = HandoffState {
            mount_id: 81_234_567_890_123,
            topology: Topology::new(vec![cpu, offline]),
            import: Some("/etc/kcm.old".into()),
            init: Some(vec![104, 0, 0, 0, 26, 0, 0, 0]),
            cpus: None,
            until_unused: false,
        };
        let memfd = HandoffMemfd::new(&state()).unwrap();
        nix::sys::uio::pwrite(&memfd, old.as_bytes(), 0).unwrap();
        assert_eq!(memfd.read().unwrap(), expected);
        assert_eq!(
            serde_json::to_string(&expected).unwrap(),
            old,
            "older programs read what this one writes"
        );
    }

    #[test]
    fn a_torn_handoff_state_is_an_error() {
        let memfd = HandoffMemfd::new(&state()).unwrap();
        nix::unistd::ftruncate(&memfd, 10).unwrap();
        assert!(memfd.read().is_err());
    }

    #[test]
    fn resend_depends_on_the_kernels_init_request() {
        let mut init = vec![0; 104];
        assert!(!state().resends(), "before INIT");
        assert!(!HandoffState { init: Some(init.clone()), ..state() }.resends());
        init[56] = 1 << 7;
        assert!(HandoffState { init: Some(init), ..state() }.resends());
    }

    #[test]
    fn messages_arrive_as_they_were_sent() {
        let (ours, theirs) = ControlSocket::pair().unwrap();
        for message in [
            Message::Ready { resends: true },
            Message::Ready { resends: false },
            Message::Failed("no room".into()),
            Message::Stop,
            Message::Unused,
        ] {
            ours.send(&message);
            assert_eq!(theirs.receive(), Some(message));
        }
        assert_eq!(theirs.receive(), None, "no message");
        assert_eq!(theirs.creator(), Some(std::process::id()));
        drop(ours);
        assert_eq!(theirs.receive(), None, "the other end is closed");
    }

    /// Do not change these bytes: in an upgrade, an old worker speaks to a new supervisor.
    #[test]
    fn the_bytes_of_messages_are_those_of_older_programs() {
        for (bytes, message) in [
            (&b"R"[..], Message::Ready { resends: true }),
            (b"r", Message::Ready { resends: false }),
            (b"S", Message::Stop),
            (b"U", Message::Unused),
            (b"Fno room", Message::Failed("no room".into())),
        ] {
            let (ours, theirs) = ControlSocket::pair().unwrap();
            send(ours.0.as_raw_fd(), bytes, MsgFlags::empty()).unwrap();
            assert_eq!(theirs.receive(), Some(message));
        }
        let (ours, theirs) = ControlSocket::pair().unwrap();
        send(ours.0.as_raw_fd(), b"X", MsgFlags::empty()).unwrap();
        assert_eq!(theirs.receive(), None, "a message of a newer program");
    }
}
