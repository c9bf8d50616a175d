//! The kernel's messages about CPUs that come and go.
//!
//! Owns the netlink socket (`NETLINK_KOBJECT_UEVENT`) and the format of a message. Does not know what is done about them.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recvmsg, socket,
};

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

    #[test]
    fn without_messages_nothing_has_changed() {
        let uevents = Uevents::new().unwrap();
        assert!(!uevents.have_cpus_changed());
    }
}
