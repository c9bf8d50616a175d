//! PID namespaces: which process a PID means in which namespace.
//!
//! Owns the translation of PIDs: by the kernel's ioctls if it has them (6.11), else by `NSpid:` of
//! `/proc/PID/status`. Does not know claims.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::fcntl::OFlag;
use nix::sys::stat::fstat;

use super::{Process, Processes, Watch, sys};
use crate::model::task::{Pid, WrittenPid};
use crate::procfs::ProcFs;

/// A PID namespace.
#[derive(Debug)]
pub(super) struct Namespace {
    fd: OwnedFd,
    ino: u64,
}

impl Namespace {
    pub(super) fn own(proc: &ProcFs) -> io::Result<Self> {
        let fd = proc.open("self/ns/pid", OFlag::O_RDONLY)?.ok_or(io::ErrorKind::NotFound)?;
        Self::from_fd(fd)
    }

    fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let ino = fstat(&fd)?.st_ino;
        Ok(Self { fd, ino })
    }

    pub(super) fn can_translate(&self) -> bool {
        sys::translate(self.fd.as_fd(), sys::NS_GET_TGID_FROM_PIDNS, std::process::id()).is_ok()
    }

    /// Translates the id of a thread in this namespace to the PID of its process in the daemon's namespace.
    fn tgid(&self, number: u32) -> io::Result<Option<Pid>> {
        exists(sys::translate(self.fd.as_fd(), sys::NS_GET_TGID_FROM_PIDNS, number))
            .map(|pid| pid.and_then(Pid::new))
    }

    /// Translates a PID in the daemon's namespace to this one.
    pub(super) fn number_of(&self, pid: Pid) -> io::Result<Option<u32>> {
        exists(sys::translate(self.fd.as_fd(), sys::NS_GET_TGID_IN_PIDNS, pid.get()))
    }
}

fn exists<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        Err(error) => Err(error),
    }
}

impl Processes {
    /// Returns the PID of the process of thread `tid`, both in the daemon's namespace; `None` if the thread has gone.
    pub(super) fn tgid(&self, tid: Pid) -> io::Result<Option<Pid>> {
        if self.features.translation {
            return self.own.tgid(tid.get());
        }
        let status = self.proc.status(tid.get())?;
        Ok(status.and_then(|status| Pid::new(*status.numbers("Tgid").first()?)))
    }

    /// Whether the process is in the daemon's PID namespace.
    pub(crate) fn shares_namespace(&self, process: &Process) -> io::Result<bool> {
        match process.in_our_namespace.load(Ordering::Relaxed) {
            0 => {}
            known => return Ok(known > 0),
        }
        let Some(namespace) = self.namespace(process)? else { return Ok(false) };
        let is_ours = namespace.ino == self.own.ino;
        process.in_our_namespace.store(if is_ours { 1 } else { -1 }, Ordering::Relaxed);
        Ok(is_ours)
    }

    /// Opens the process that has the PID `written` in the PID namespace of `of`; `None` if there is none.
    ///
    /// The PID is translated again after the process was opened, because it may have been reused in between.
    ///
    /// # Errors
    /// Returns an error if no descriptors are left, or /proc cannot be read.
    pub(crate) fn open_in_namespace_of(
        &self,
        of: &Process,
        written: WrittenPid,
        watch: &Watch,
    ) -> io::Result<Option<Arc<Process>>> {
        if self.shares_namespace(of)? {
            return Pid::new(written.0.get()).map_or(Ok(None), |pid| self.of_thread(pid, watch));
        }
        let Some(namespace) = self.namespace(of)? else { return Ok(None) };
        let Some(pid) = self.translate(&namespace, of, written)? else { return Ok(None) };
        let Some(process) = self.open_leader(pid)? else { return Ok(None) };
        Ok((self.translate(&namespace, of, written)? == Some(pid)).then(|| Arc::new(process)))
    }

    /// Returns the PID of `pid` in the PID namespace of `of`; `None` if it has none there.
    pub(crate) fn number_in_namespace_of(&self, of: &Process, pid: Pid) -> Option<u32> {
        if self.shares_namespace(of).ok()? {
            return Some(pid.get());
        }
        let namespace = self.namespace(of).ok().flatten()?;
        if self.features.translation {
            return namespace.number_of(pid).ok().flatten();
        }
        let level = self.numbers(of.id().pid.get()).ok().flatten()?.len().checked_sub(1)?;
        let numbers = self.numbers(pid.get()).ok().flatten()?;
        let number = numbers.get(level).copied()?;
        // A different namespace may be at the same level.
        let is_inside = self.is_below(pid.get(), numbers.len() - 1 - level, &namespace).ok()?;
        is_inside.then_some(number)
    }

    /// Whether both processes are in the same PID namespace.
    pub(crate) fn same_namespace(&self, a: &Process, b: &Process) -> bool {
        match [a, b].map(|process| self.shares_namespace(process).ok()) {
            [Some(false), Some(false)] => {}
            [a, b] => return a.is_some() && a == b,
        }
        let ino = |process| self.namespace(process).ok().flatten().map(|namespace| namespace.ino);
        matches!((ino(a), ino(b)), (Some(a), Some(b)) if a == b)
    }

    /// Whether the process is the init process of its PID namespace.
    pub(crate) fn is_namespace_init(&self, process: &Process) -> bool {
        self.number_in_namespace_of(process, process.id().pid) == Some(1)
    }

    pub(super) fn namespace(&self, of: &Process) -> io::Result<Option<Namespace>> {
        if self.features.translation {
            return match sys::pidfd_pid_namespace(of.pidfd()) {
                Ok(fd) => Namespace::from_fd(fd).map(Some),
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
                Err(error) => Err(error),
            };
        }
        let fd = self.proc.open(&format!("{}/ns/pid", of.id().pid), OFlag::O_RDONLY)?;
        let namespace = fd.map(Namespace::from_fd).transpose()?;
        Ok(namespace.filter(|_| of.is_alive()))
    }

    fn translate(&self, namespace: &Namespace, of: &Process, written: WrittenPid) -> io::Result<Option<Pid>> {
        if self.features.translation {
            return namespace.tgid(written.0.get());
        }
        let Some(level) = self.numbers(of.id().pid.get())?.and_then(|numbers| numbers.len().checked_sub(1))
        else {
            return Ok(None);
        };
        self.search(namespace, level, written.0.get())
    }

    /// Searches all threads of the machine for the one that has this number in `namespace`, which is `level` levels
    /// below the daemon's.
    fn search(&self, namespace: &Namespace, level: usize, number: u32) -> io::Result<Option<Pid>> {
        let mut pids = Vec::new();
        self.proc.each_pid(|pid| pids.push(pid))?;
        for pid in pids {
            for tid in self.proc.threads(pid)? {
                let Some(numbers) = self.numbers(tid)? else { continue };
                if numbers.get(level) == Some(&number)
                    && self.is_below(pid, numbers.len() - 1 - level, namespace)?
                {
                    return Ok(Pid::new(pid));
                }
            }
        }
        Ok(None)
    }

    /// Whether `namespace` is the one `up` levels above the process's own.
    fn is_below(&self, pid: u32, up: usize, namespace: &Namespace) -> io::Result<bool> {
        let Some(mut fd) = self.proc.open(&format!("{pid}/ns/pid"), OFlag::O_RDONLY)? else {
            return Ok(false);
        };
        for _ in 0..up {
            fd = sys::parent_namespace(fd.as_fd())?;
        }
        Ok(fstat(&fd)?.st_ino == namespace.ino)
    }

    /// Returns the ids of a thread in each namespace, from the daemon's down to the thread's own.
    fn numbers(&self, tid: u32) -> io::Result<Option<Vec<u32>>> {
        Ok(self.proc.status(tid)?.map(|status| status.numbers("NSpid")))
    }
}
