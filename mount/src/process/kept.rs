//! Keeps the pidfds of watched tasks from the death of a worker until the next worker has them.
//!
//! Owns the format of the messages in a socket that is connected to itself and that all processes of the daemon have open.
//! The messages carry the pidfds, and nobody receives them before the next worker starts: so the kernel keeps them, no
//! process has to run for it, and a claim costs one system call more. Does not know which tasks have claims.
//!
//! A task that is known by its pidfd needs no other proof that it is the recorded one, and the pidfd tells how it ended,
//! even if that was while no worker was there.

use std::collections::BTreeMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::SystemTime;

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, bind, connect, getsockname,
    recvmsg, sendmsg, socket_with, sockopt,
};

use super::dup_above;
use crate::model::task::{Pid, TaskId};

/// The most descriptors that the kernel takes in one message (`SCM_MAX_FD`).
const MOST_IN_MESSAGE: usize = 253;
/// The length of one task in a message: its PID and inode, little-endian.
const ENTRY: usize = 4 + 8;
/// The largest size of the queue, in bytes of kernel memory: enough for a million tasks.
const QUEUE_SIZE: usize = 64 << 20;

/// The socket. Only who has it open can send to it (unix(7): it is connected to another socket than theirs).
#[derive(Debug)]
pub(crate) struct KeptPidfds(OwnedFd);

/// The tasks of an earlier worker, with their pidfds.
pub(crate) type Taken = BTreeMap<TaskId, OwnedFd>;

impl KeptPidfds {
    /// Makes a socket without messages.
    ///
    /// # Errors
    /// No descriptors are left.
    pub(crate) fn new() -> io::Result<Self> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        // The kernel chooses a name.
        bind(&socket, &SocketAddrUnix::new_unnamed())?;
        connect(&socket, &getsockname(&socket)?)?;
        // Without the capability for more (CAP_NET_ADMIN in the first user namespace), as much as anybody gets.
        if sockopt::set_socket_send_buffer_size_force(&socket, QUEUE_SIZE).is_err() {
            let _ = sockopt::set_socket_send_buffer_size(&socket, QUEUE_SIZE);
        }
        Ok(Self(dup_above(socket)?))
    }

    /// The socket of another process; `None` if it is another file.
    pub(crate) fn from_fd(fd: OwnedFd) -> Option<Self> {
        let is_one = sockopt::socket_domain(&fd).is_ok_and(|domain| domain == AddressFamily::UNIX)
            && sockopt::socket_type(&fd).is_ok_and(|kind| kind == SocketType::DGRAM);
        is_one.then_some(Self(fd))
    }

    pub(crate) fn into_fd(self) -> OwnedFd {
        self.0
    }

    /// Keeps these pidfds. Returns how many messages it took.
    ///
    /// # Errors
    /// The queue is full (`EAGAIN`). Nothing or a part is kept.
    pub(super) fn keep(&self, tasks: &[(TaskId, BorrowedFd<'_>)]) -> io::Result<usize> {
        tasks.chunks(MOST_IN_MESSAGE).try_fold(0, |messages, tasks| {
            let bytes: Vec<u8> = tasks.iter().flat_map(|(task, _)| encode(*task)).collect();
            let fds: Vec<BorrowedFd<'_>> = tasks.iter().map(|(_, fd)| *fd).collect();
            self.send(&bytes, &fds)?;
            Ok(messages + 1)
        })
    }

    /// Removes the oldest messages, with their pidfds.
    pub(super) fn drop_oldest(&self, messages: usize) {
        for _ in 0..messages {
            if self.receive(RecvFlags::empty(), None).is_err() {
                break;
            }
        }
    }

    /// Takes the pidfds of the tasks that are wanted, and forgets the others. Those that are taken are kept as well, so a
    /// worker may be killed at any moment. Also returns how many messages they take.
    pub(crate) fn take(&self, is_wanted: impl Fn(&TaskId) -> bool) -> (Taken, usize) {
        let (mut taken, mut messages) = (Taken::new(), 0);
        // The messages up to this one are of earlier workers. No other message has its length, or its bytes.
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos() as u64;
        let end = (u64::from(std::process::id()) << 32 ^ now).to_le_bytes();
        if self.send(&end, &[]).is_err() {
            // The queue is full. The oldest message is the least useful one.
            self.drop_oldest(1);
            if let Err(error) = self.send(&end, &[]) {
                log::warn!("the pidfds of an earlier worker cannot be taken: {error}");
                return (taken, messages);
            }
        }
        loop {
            let mut fds = Vec::new();
            let Ok(bytes) = self.receive(RecvFlags::PEEK, Some(&mut fds)) else { break };
            if bytes == end {
                self.drop_oldest(1);
                break;
            }
            let tasks = bytes.chunks_exact(ENTRY).filter_map(decode).zip(fds);
            let new: Vec<(TaskId, OwnedFd)> =
                tasks.filter(|(task, _)| is_wanted(task) && !taken.contains_key(task)).collect();
            let again: Vec<(TaskId, BorrowedFd<'_>)> =
                new.iter().map(|(task, fd)| (*task, fd.as_fd())).collect();
            // Sent again before the message is removed.
            if let Err(error) = self.keep(&again).map(|sent| messages += sent) {
                log::warn!("the pidfds of an earlier worker cannot be kept: {error}");
            }
            self.drop_oldest(1);
            taken.extend(new);
        }
        (taken, messages)
    }

    fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_IN_MESSAGE))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Receives the oldest message, without its descriptors if nobody wants them.
    fn receive(&self, flags: RecvFlags, fds: Option<&mut Vec<OwnedFd>>) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; if fds.is_some() { MOST_IN_MESSAGE * ENTRY } else { 1 }];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_IN_MESSAGE))];
        let mut control = RecvAncillaryBuffer::new(if fds.is_some() { &mut space } else { &mut [] });
        let flags = flags | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = recvmsg(&self.0, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)?;
        bytes.truncate(received.bytes);
        if let Some(fds) = fds {
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = message {
                    fds.extend(received);
                }
            }
        }
        Ok(bytes)
    }
}

impl AsFd for KeptPidfds {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn encode(task: TaskId) -> impl Iterator<Item = u8> {
    task.pid.get().to_le_bytes().into_iter().chain(task.ino.to_le_bytes())
}

fn decode(entry: &[u8]) -> Option<TaskId> {
    let (pid, ino) = entry.split_first_chunk::<4>()?;
    Some(TaskId { pid: Pid::new(u32::from_le_bytes(*pid))?, ino: u64::from_le_bytes(ino.try_into().ok()?) })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use nix::sys::stat::fstat;

    use super::*;
    use crate::process::sys;

    /// A task with a descriptor that another one can be compared with.
    fn tasks(count: u32) -> (TaskId, OwnedFd) {
        let task = TaskId { pid: Pid::new(count + 1).unwrap(), ino: u64::MAX - u64::from(count) };
        (task, sys::pidfd_open(std::process::id()).unwrap())
    }

    fn queue() -> (KeptPidfds, Vec<(TaskId, OwnedFd)>) {
        (KeptPidfds::new().unwrap(), (0..600).map(tasks).collect())
    }

    fn borrowed(tasks: &[(TaskId, OwnedFd)]) -> Vec<(TaskId, BorrowedFd<'_>)> {
        tasks.iter().map(|(task, fd)| (*task, fd.as_fd())).collect()
    }

    fn keys(taken: &Taken) -> BTreeSet<TaskId> {
        taken.keys().copied().collect()
    }

    #[test]
    fn what_is_kept_can_be_taken_again_and_again() {
        let (kept, tasks) = queue();
        assert_eq!(kept.take(|_| true).1, 0, "nothing is kept yet");
        assert_eq!(kept.keep(&borrowed(&tasks)).unwrap(), 3);
        assert_eq!(kept.keep(&borrowed(&tasks[..1])).unwrap(), 1);
        for _ in 0..3 {
            let (taken, messages) = kept.take(|_| true);
            assert_eq!(keys(&taken), tasks.iter().map(|(task, _)| *task).collect());
            assert_eq!(messages, 3, "what was there twice is there once");
            let inode = |fd: &OwnedFd| fstat(fd).unwrap().st_ino;
            assert!(taken.values().all(|fd| inode(fd) == inode(&tasks[0].1)));
        }
    }

    #[test]
    fn what_is_not_wanted_is_forgotten() {
        let (kept, tasks) = queue();
        kept.keep(&borrowed(&tasks)).unwrap();
        let wanted = tasks[300].0;
        assert_eq!(keys(&kept.take(|task| *task == wanted).0), BTreeSet::from([wanted]));
        assert_eq!(keys(&kept.take(|_| true).0), BTreeSet::from([wanted]));
        kept.drop_oldest(1);
        assert_eq!(kept.take(|_| true).1, 0);
    }

    #[test]
    fn a_worker_that_is_killed_in_the_middle_loses_nothing() {
        let (kept, tasks) = queue();
        kept.keep(&borrowed(&tasks)).unwrap();
        // It has sent its own end of the queue, and one of three messages again.
        kept.send(&7_u32.to_le_bytes(), &[]).unwrap();
        kept.keep(&borrowed(&tasks[..MOST_IN_MESSAGE])).unwrap();
        assert_eq!(kept.take(|_| true).0.len(), tasks.len());
        assert_eq!(kept.take(|_| true).0.len(), tasks.len());
    }

    #[test]
    fn a_full_queue_is_an_error_and_what_is_in_it_stays() {
        let (kept, tasks) = queue();
        sockopt::set_socket_send_buffer_size(&kept.0, 4096).unwrap();
        let sent = tasks.chunks(1).take_while(|task| kept.keep(&borrowed(task)).is_ok()).count();
        assert!((1..tasks.len()).contains(&sent), "{sent}");
        let taken = kept.take(|_| true).0;
        assert!(
            taken.len() + 1 >= sent && !taken.is_empty(),
            "at most the oldest one is lost: {}",
            taken.len()
        );
    }

    #[test]
    fn nobody_else_sends_to_it() {
        let kept = KeptPidfds::new().unwrap();
        let other = std::os::unix::net::UnixDatagram::unbound().unwrap();
        assert!(connect(&other, &getsockname(&kept.0).unwrap()).is_err());
        assert!(KeptPidfds::from_fd(std::fs::File::open("/dev/null").unwrap().into()).is_none());
        assert!(KeptPidfds::from_fd(kept.into_fd()).is_some());
    }
}
