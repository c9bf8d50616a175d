//! What a keeper and its workers hand to each other: descriptors under fixed numbers, a letter about the
//! mount, and short messages.
//!
//! Owns: the numbers and the letter's form. Must not know: what is done with them.
//!
//! A worker finds its descriptors under these numbers, and so does a keeper that takes another one's place:
//! no names, no files, and nothing to be lost between a death and the next start.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, IntoRawFd as _, OwnedFd, RawFd};
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use serde::{Deserialize, Serialize};

use crate::fuse::abi;
use crate::journal::StateLock;
use crate::model::topology::Topology;
use crate::process;

/// The open `/dev/fuse`: as long as anybody holds it, the mount lives.
pub(crate) const DEVICE: RawFd = 3;
/// One end of the [`Control`] between the two.
pub(crate) const CONTROL: RawFd = 4;
/// The [`Letter`].
pub(crate) const LETTER: RawFd = 5;
/// The locked file of the state directory.
pub(crate) const LOCK: RawFd = 6;
/// For a keeper that takes another one's place: the pidfd of the worker that serves.
pub(crate) const WORKER: RawFd = 7;
/// All of them.
const NUMBERS: std::ops::RangeInclusive<RawFd> = DEVICE..=WORKER;

/// How long a worker that is told to end may take.
pub(crate) const ENDING: Duration = Duration::from_secs(2);

/// What a keeper holds.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) device: OwnedFd,
    pub(crate) letters: LetterBox,
    pub(crate) lock: StateLock,
}

/// What a worker has to know of the mount beside what is in the state directory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Letter {
    /// Tells this mount from every other one: the kernel numbers requests anew with each.
    pub(crate) mount: u64,
    /// The machine, as it was when it was mounted.
    pub(crate) topology: Topology,
    /// A layout of 2017, moved aside, that the first worker takes over.
    pub(crate) import: Option<PathBuf>,
    /// The kernel's first request, once it has been answered: every later worker needs it.
    pub(crate) init: Option<Vec<u8>>,
}

impl Letter {
    /// Whether the kernel (6.9 and newer) gives unanswered requests to the next worker.
    pub(crate) fn resends(&self) -> bool {
        self.init.as_deref().is_some_and(abi::offers_resend)
    }
}

/// The letter in a file that has no name.
#[derive(Debug)]
pub(crate) struct LetterBox(OwnedFd);

impl LetterBox {
    pub(crate) fn new(letter: &Letter) -> io::Result<Self> {
        let letters = Self(memfd_create(c"kcm-letter", MFdFlags::empty())?);
        letters.write(letter)?;
        Ok(letters)
    }

    pub(crate) fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    pub(crate) fn read(&self) -> io::Result<Letter> {
        let mut bytes = vec![0; usize::try_from(nix::sys::stat::fstat(&self.0)?.st_size).unwrap_or(0)];
        let read = nix::sys::uio::pread(&self.0, &mut bytes, 0)?;
        bytes.truncate(read);
        Ok(serde_json::from_slice(&bytes)?)
    }

    pub(crate) fn write(&self, letter: &Letter) -> io::Result<()> {
        let bytes = serde_json::to_vec(letter)?;
        nix::unistd::ftruncate(&self.0, 0)?;
        match nix::sys::uio::pwrite(&self.0, &bytes, 0)? {
            written if written == bytes.len() => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    /// Lays it under its number.
    pub(crate) fn place(self) -> io::Result<Self> {
        place(self.0, LETTER).map(Self)
    }
}

impl AsFd for LetterBox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What a worker says to its keeper.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// It serves. Whether the kernel gives unanswered requests to the next worker.
    Ready { resends: bool },
    /// It cannot serve, for this reason.
    Failed(String),
    /// It was told to end, and the mount with it.
    Stop,
}

/// A way for messages, one each.
#[derive(Debug)]
pub(crate) struct Control(OwnedFd);

impl Control {
    /// Both ends.
    pub(crate) fn pair() -> io::Result<(Self, Self)> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (a, b) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        Ok((Self(a), Self(b)))
    }

    pub(crate) fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// The process that has made the pair.
    pub(crate) fn maker(&self) -> Option<u32> {
        let peer = nix::sys::socket::getsockopt(&self.0, nix::sys::socket::sockopt::PeerCredentials).ok()?;
        u32::try_from(peer.pid()).ok().filter(|pid| *pid != 0)
    }

    /// Lays it under its number, where a program that is started finds it.
    pub(crate) fn place(self) -> io::Result<Self> {
        place(self.0, CONTROL).map(Self)
    }

    /// Tells the other one, if there still is one.
    pub(crate) fn send(&self, message: &Message) {
        let bytes = match message {
            Message::Ready { resends: true } => b"R".to_vec(),
            Message::Ready { resends: false } => b"r".to_vec(),
            Message::Stop => b"S".to_vec(),
            Message::Failed(reason) => [b"F", reason.as_bytes()].concat(),
        };
        let _ = send(self.0.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL);
    }

    /// What the other one says; None where it has gone, or speaks another language.
    pub(crate) fn receive(&self) -> Option<Message> {
        let mut bytes = [0; 1024];
        let length = recv(self.0.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT).ok()?;
        Some(match bytes.get(..length)?.split_first()? {
            (b'R', []) => Message::Ready { resends: true },
            (b'r', []) => Message::Ready { resends: false },
            (b'S', []) => Message::Stop,
            (b'F', reason) => Message::Failed(String::from_utf8_lossy(reason).into_owned()),
            _ => return None,
        })
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Lays a descriptor under a number, where programs that are started inherit it. What was there is closed.
pub(crate) fn place(fd: OwnedFd, number: RawFd) -> io::Result<OwnedFd> {
    if fd.as_raw_fd() == number {
        process::clear_cloexec(fd.as_fd())?;
        return Ok(fd);
    }
    process::dup_to(fd.as_fd(), number)
}

/// It stays open under its number, for a program that this one becomes.
pub(crate) fn leave(placed: OwnedFd) {
    let _ = placed.into_raw_fd();
}

/// Occupies a number, so that nothing else gets it by chance.
pub(crate) fn reserve(number: RawFd) -> io::Result<()> {
    // It may have got just this number, if that was free.
    let null = process::dup_above(std::fs::File::open("/dev/null")?.into())?;
    // Never closed, only replaced.
    leave(process::dup_to(null.as_fd(), number)?);
    Ok(())
}

/// Occupies all numbers.
pub(crate) fn reserve_all() -> io::Result<()> {
    NUMBERS.into_iter().try_for_each(reserve)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_letter_is_read_as_it_was_written() {
        let letter = Letter { mount: 7, topology: Topology::default(), import: None, init: None };
        let letters = LetterBox::new(&letter).unwrap();
        assert_eq!(letters.read().unwrap().mount, 7);
        letters.write(&Letter { init: Some(vec![1; 80]), ..letter.clone() }).unwrap();
        assert_eq!(letters.read().unwrap().init, Some(vec![1; 80]));
        letters.write(&letter).unwrap();
        assert_eq!(letters.read().unwrap().init, None);
    }

    #[test]
    fn messages() {
        let (ours, theirs) = Control::pair().unwrap();
        for message in [
            Message::Ready { resends: true },
            Message::Ready { resends: false },
            Message::Failed("no room".into()),
            Message::Stop,
        ] {
            ours.send(&message);
            assert_eq!(theirs.receive(), Some(message));
        }
        assert_eq!(theirs.receive(), None, "nothing is there");
        drop(ours);
        assert_eq!(theirs.receive(), None, "it has gone");
    }
}
