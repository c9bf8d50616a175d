//! The kernel's messages about CPUs that come and go.
//!
//! Owns the netlink socket (`NETLINK_KOBJECT_UEVENT`) and the format of a message. Does not know what is done about them.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recvmsg, socket,
};

use crate::process::{FilterStep, attach_filter};

/// The multicast group of the kernel's own messages; udev sends its copies to another one.
const KERNEL: u32 = 1;
/// The longest message (`UEVENT_BUFFER_SIZE` of the kernel, and its header).
const LONGEST: usize = 4096;

/// A socket that receives the messages.
#[derive(Debug)]
pub(crate) struct Uevents(OwnedFd);

impl Uevents {
    /// # Errors
    /// The kernel or the service manager does not allow the socket.
    pub(crate) fn new() -> nix::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let protocol = SockProtocol::NetlinkKObjectUEvent;
        let socket = socket(AddressFamily::Netlink, SockType::Datagram, flags, protocol)?;
        // Before the first message arrives. Without a filter, each device of the machine wakes the daemon.
        if let Err(error) = attach_filter(socket.as_fd(), &filter()) {
            log::debug!("messages about other devices arrive, too: {error}");
        }
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, KERNEL))?;
        Ok(Self(socket))
    }

    /// Receives all messages that are there. Returns whether one of them is about a CPU, or was lost.
    pub(crate) fn have_cpus_changed(&self) -> bool {
        let mut changed = false;
        let mut bytes = [0; LONGEST];
        loop {
            let mut space = [IoSliceMut::new(&mut bytes)];
            match recvmsg::<NetlinkAddr>(self.0.as_raw_fd(), &mut space, None, MsgFlags::empty()) {
                Ok(message) => {
                    // A process cannot send as the kernel, whose address is 0.
                    let is_kernel = message.address.is_some_and(|address| address.pid() == 0);
                    let length = message.bytes;
                    changed |= is_kernel && bytes.get(..length).is_some_and(is_about_a_cpu);
                }
                Err(nix::errno::Errno::EINTR) => {}
                // There were more messages than fit.
                Err(nix::errno::Errno::ENOBUFS) => changed = true,
                Err(_) => return changed,
            }
        }
    }
}

impl AsFd for Uevents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Accepts messages that begin with `online@` or `offline@`, and with `add@` or `remove@` and a device below
/// `/devices/system`. A filter sees words of four bytes.
fn filter() -> [FilterStep; 11] {
    let load = |offset| FilterStep { code: (BPF_LD | BPF_W | BPF_ABS) as u16, jt: 0, jf: 0, k: offset };
    let is = |word: &[u8; 4], jt, jf| FilterStep {
        code: (BPF_JMP | BPF_JEQ | BPF_K) as u16,
        jt,
        jf,
        k: u32::from_be_bytes(*word),
    };
    let answer = |bytes| FilterStep { code: (BPF_RET | BPF_K) as u16, jt: 0, jf: 0, k: bytes };
    let after = |action: &str| action.len() as u32 + "/devices/".len() as u32;
    [
        load(0),
        is(b"onli", 7, 0),
        is(b"offl", 6, 0),
        is(b"add@", 0, 2),
        load(after("add@")),
        is(b"syst", 3, 4),
        is(b"remo", 0, 3),
        load(after("remove@")),
        is(b"syst", 0, 1),
        answer(u32::MAX),
        answer(0),
    ]
}

fn is_about_a_cpu(message: &[u8]) -> bool {
    message.split(|&byte| byte == 0).any(|field| field == b"SUBSYSTEM=cpu")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_names_its_subsystem() {
        let message = b"offline@/devices/system/cpu/cpu9\0ACTION=offline\0DEVPATH=/devices/system/cpu/cpu9\0SUBSYSTEM=cpu\0";
        assert!(is_about_a_cpu(message));
        assert!(!is_about_a_cpu(b"add@/devices/virtual/net/cpu\0SUBSYSTEM=net\0INTERFACE=cpu\0"));
        assert!(!is_about_a_cpu(b""));
    }

    /// Runs the filter as the kernel does.
    fn accepts(message: &[u8]) -> bool {
        let program = filter();
        let (mut at, mut word) = (0, 0);
        loop {
            let step = program[at];
            at += 1;
            match u32::from(step.code) {
                code if code == BPF_LD | BPF_W | BPF_ABS => {
                    let Some(bytes) = message.get(step.k as usize..step.k as usize + 4) else { return false };
                    word = u32::from_be_bytes(bytes.try_into().unwrap());
                }
                code if code == BPF_JMP | BPF_JEQ | BPF_K => {
                    at += usize::from(if word == step.k { step.jt } else { step.jf });
                }
                _ => return step.k > 0,
            }
        }
    }

    #[test]
    fn the_filter_accepts_cpus_only() {
        for action in ["online", "offline", "add", "remove"] {
            assert!(
                accepts(format!("{action}@/devices/system/cpu/cpu9\0ACTION={action}").as_bytes()),
                "{action}"
            );
        }
        for message in
            ["add@/devices/virtual/block/loop7\0", "change@/devices/virtual/block/loop7\0", "remove@/x", ""]
        {
            assert!(!accepts(message.as_bytes()), "{message}");
        }
    }

    #[test]
    fn without_messages_nothing_has_changed() {
        let uevents = Uevents::new().unwrap();
        assert!(!uevents.have_cpus_changed());
    }
}
