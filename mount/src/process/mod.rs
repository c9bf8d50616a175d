//! Processes: their identity, owner, life, cgroup and CPU affinity.
//!
//! Owns pidfds, PID namespaces and affinity masks and, in `sys`, the only unsafe code of the crate. Does not know
//! claims.
//!
//! Newer kernels answer by system call what older ones answer only through `/proc`. [`Features`] says which way to
//! ask; it is found out once, at the start.

mod ancestors;
mod cgroups;
mod child;
mod clone;
mod credentials;
mod fds;
mod kept;
mod mask;
mod namespace;
mod passes;
mod priority;
mod scan;
mod stacks;
mod sys;
#[cfg(test)]
mod tests;
mod watch;

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI8, Ordering};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::fstat;
use parking_lot::Mutex;

use crate::model::command::{Ending, Uids};
use crate::model::cpuset::CpuSet;
use crate::model::task::{Pid, TaskId};
use crate::procfs::{self, ProcFs};

use cgroups::KnownCgroups;
pub(crate) use child::{
    Asked, PidFd, collect_children, keep_sigpipe, reset_sigchld, rmdir_in_child, send_signal, set_pdeathsig,
    stat_in_child,
};
pub(crate) use fds::{clear_cloexec, close_inherited, dup_above, dup_to, inherited_fd, is_open, replace_fd};
pub(crate) use kept::KeptPidfds;
pub(crate) use mask::{Look, MaskError, SavedMasks, Seen, Threads, mask_of};
use namespace::Namespace;
pub(crate) use passes::{BlockedWriter, TimeLimit, waited};
pub(crate) use priority::raise_low_priority;
pub(crate) use scan::ScannedProcess;
use stacks::Stacks;
pub(crate) use sys::{FilterStep, attach_filter, keep_heap_small, trim_heap};
pub(crate) use watch::Watch;

/// The list of offline CPUs.
const OFFLINE: &str = "/sys/devices/system/cpu/offline";
/// Marks a [`TaskId::ino`] that is a start time instead of an inode number.
const IS_START_TIME: u64 = 1 << 63;

/// The questions that this kernel answers by system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Features {
    /// Each process has its own pidfd inode (6.9).
    pub(crate) pidfs: bool,
    /// PID namespaces translate PIDs by ioctl (6.11).
    pub(crate) translation: bool,
    /// A pidfd returns facts about its process (`PIDFD_GET_INFO`, 6.13).
    pub(crate) info: bool,
}

/// The processes of this machine.
#[derive(Debug)]
pub(crate) struct Processes {
    proc: ProcFs,
    features: Features,
    own: Namespace,
    /// The link to the daemon's user namespace, which contains its inode; `None` if the kernel has no user namespaces.
    user_namespace: Option<OsString>,
    /// Whether the machine has cgroup v1 hierarchies with controllers. Then a process is in several cgroups, of which
    /// the kernel's cgroup id names only one.
    cgroup_v1: bool,
    /// The CPUs that the machine can have, online or not.
    possible: CpuSet,
    /// The file that lists the offline CPUs, kept open.
    offline: Option<File>,
    stacks: Stacks,
    known_cgroups: KnownCgroups,
    /// The processes that had more than one thread when that was last found out.
    multi_threaded: Mutex<Vec<u32>>,
}

/// One process, held by a pidfd, so that it stays the same process even if its PID is reused.
#[derive(Debug)]
pub(crate) struct Process {
    id: TaskId,
    pidfd: OwnedFd,
    /// Whether its PID namespace is the daemon's, once that was asked: 1 for yes, -1 for no. A process never changes its
    /// namespace. (There is one for each claim, so it is small.)
    in_our_namespace: AtomicI8,
    /// Whether its pidfd is kept for the next worker.
    is_kept: AtomicBool,
}

/// The facts about a living process.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    /// `None` if its parent is outside the daemon's PID namespace.
    pub(crate) parent: Option<Pid>,
    pub(crate) uids: Uids,
    pub(crate) kernel_thread: bool,
}

impl Process {
    fn new(id: TaskId, pidfd: OwnedFd) -> Self {
        Self { id, pidfd, in_our_namespace: AtomicI8::new(0), is_kept: AtomicBool::new(false) }
    }

    /// The identity of the process.
    pub(crate) fn id(&self) -> TaskId {
        self.id
    }

    /// Whether at least one thread of the process is alive.
    pub(crate) fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        !matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..))
    }

    fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Processes {
    /// Opens `/proc` and finds out what the kernel supports.
    ///
    /// # Errors
    /// Returns an error if `/proc` is not mounted or no descriptors are left.
    pub(crate) fn new() -> io::Result<Self> {
        Self::with_features(probe()?)
    }

    /// Like [`Processes::new`], using only these features of the kernel.
    ///
    /// # Errors
    /// Returns the errors of [`Processes::new`].
    pub(crate) fn with_features(features: Features) -> io::Result<Self> {
        let proc = ProcFs::new()?;
        let own = Namespace::own(&proc)?;
        let cgroups = proc.read("self/cgroup")?.unwrap_or_default();
        let has_controllers = |line: &str| {
            let controllers = line.split(':').nth(1).unwrap_or("");
            !controllers.is_empty() && !controllers.starts_with("name=")
        };
        let cgroup_v1 = String::from_utf8_lossy(&cgroups).lines().any(has_controllers);
        let possible = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
        let possible = possible.trim().parse().map_err(io::Error::other)?;
        let offline = File::open(OFFLINE).ok();
        let user_namespace = proc.link("self/ns/user");
        Ok(Self {
            proc,
            features,
            own,
            user_namespace,
            cgroup_v1,
            possible,
            offline,
            stacks: Stacks::new(),
            known_cgroups: KnownCgroups::default(),
            multi_threaded: Mutex::default(),
        })
    }

    /// Whether a process is certainly the one with its [`TaskId`]: the id is unique for this boot, or the pidfd is that
    /// of the worker before. If not, the mask of the task must confirm its claim after a restart.
    pub(crate) fn is_certain(&self, process: &Process) -> bool {
        self.features.pidfs || process.is_kept.load(Ordering::Relaxed)
    }

    /// Returns the process of thread `tid`, reusing a cached pidfd if there is one; `None` if the thread does not
    /// exist.
    ///
    /// # Errors
    /// Returns the errors of [`Processes::open`].
    pub(crate) fn of_thread(&self, tid: Pid, watch: &Watch) -> io::Result<Option<Arc<Process>>> {
        let Some(pid) = self.tgid(tid)? else { return Ok(None) };
        if let Some(process) = watch.with_pid(pid) {
            return Ok(Some(process));
        }
        let process = self.open_translated(pid, tid)?.map(Arc::new);
        Ok(process.inspect(|process| watch.cache(process)))
    }

    /// Opens the process of thread `tid`; `None` if the thread does not exist.
    ///
    /// # Errors
    /// Returns an error if no descriptors are left, or `/proc` cannot be read.
    pub(crate) fn open(&self, tid: Pid) -> io::Result<Option<Process>> {
        self.tgid(tid)?.map_or(Ok(None), |pid| self.open_translated(pid, tid))
    }

    /// Opens the process `pid` if thread `tid` belongs to it.
    fn open_translated(&self, pid: Pid, tid: Pid) -> io::Result<Option<Process>> {
        let Some(process) = self.open_leader(pid)? else { return Ok(None) };
        // Translated again, because the PID may have been reused before the process was opened.
        Ok((self.tgid(tid)? == Some(pid)).then_some(process))
    }

    /// Opens a known task. It may be dead, if its parent has not collected it yet.
    ///
    /// # Errors
    /// Returns an error if no descriptors are left, or `/proc` cannot be read.
    pub(crate) fn find(&self, task: TaskId) -> io::Result<Option<Process>> {
        Ok(self.identify(task.pid)?.filter(|process| process.id == task))
    }

    /// Opens the living process `pid`, which is the PID of a thread group.
    fn open_leader(&self, pid: Pid) -> io::Result<Option<Process>> {
        Ok(self.identify(pid)?.filter(Process::is_alive))
    }

    /// Opens the process `pid`, dead or alive.
    fn identify(&self, pid: Pid) -> io::Result<Option<Process>> {
        let pidfd = match sys::pidfd_open(pid.get()) {
            Ok(pidfd) => pidfd,
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return Ok(None),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::ENOENT)) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let ino = if self.features.pidfs {
            fstat(&pidfd)?.st_ino
        } else {
            match self.proc.stat(pid.get())? {
                Some(stat) => stat.started | IS_START_TIME,
                None => return Ok(None),
            }
        };
        Ok(Some(Process::new(TaskId { pid, ino }, pidfd)))
    }

    /// Returns the facts about a process; `None` if it has died.
    ///
    /// # Errors
    /// Returns an error if no descriptors are left, or `/proc` cannot be read.
    pub(crate) fn facts(&self, process: &Process) -> io::Result<Option<Facts>> {
        let pid = process.id.pid;
        let facts = if self.features.info {
            let wanted = sys::INFO_PID | sys::INFO_CREDS;
            match sys::pidfd_info(process.pidfd(), wanted) {
                Ok(info) if info.mask & sys::INFO_CREDS != 0 => {
                    let parent = Pid::new(info.ppid);
                    let uids = Uids { real: info.ruid, effective: info.euid, saved: info.suid };
                    // All kernel threads are children of PID 2 (kthreadd), so others need no look at /proc.
                    let suspect = pid.get() == 2 || parent.is_some_and(|parent| parent.get() == 2);
                    Facts { parent, uids, kernel_thread: suspect && self.is_kernel_thread(pid)? }
                }
                Ok(_) => return Ok(None),
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
                Err(error) => return Err(error),
            }
        } else {
            let Some(status) = self.proc.status(pid.get())? else { return Ok(None) };
            let (parent, uids) = (status.numbers("PPid"), status.numbers("Uid"));
            let (&[parent], &[real, effective, saved, _]) = (parent.as_slice(), uids.as_slice()) else {
                return Ok(None);
            };
            let uids = Uids { real, effective, saved };
            Facts { parent: Pid::new(parent), uids, kernel_thread: self.is_kernel_thread(pid)? }
        };
        // If the process has died, its PID may have been reused while the facts were read.
        Ok(process.is_alive().then_some(facts))
    }

    /// Returns the groups that count for a thread's access to files; empty if it has gone.
    ///
    /// # Errors
    /// Returns an error if no descriptors are left, or `/proc` cannot be read.
    pub(crate) fn groups(&self, tid: u32) -> io::Result<Vec<u32>> {
        let Some(status) = self.proc.status(tid)? else { return Ok(Vec::new()) };
        // The last of the four group ids is the one for access to files.
        Ok(status.numbers("Gid").into_iter().last().into_iter().chain(status.numbers("Groups")).collect())
    }

    /// Returns the start time in clock ticks since boot; `None` if the process has died.
    pub(crate) fn started(&self, process: &Process) -> Option<u64> {
        // Of its first thread: the process's own file adds up all threads, which takes long if there are many.
        let tasks = self.proc.open(&format!("{}/task", process.id.pid), OFlag::O_RDONLY | OFlag::O_DIRECTORY);
        let stat = procfs::stat_of_thread(tasks.ok()??.as_fd(), process.id.pid.get()).ok()??;
        process.is_alive().then_some(stat.started)
    }

    /// Returns the name of the process's program, safe to print on a terminal; `None` if the process has died.
    pub(crate) fn comm(&self, process: &Process) -> Option<String> {
        let name = self.proc.program_name(process.id.pid.get())?;
        process.is_alive().then_some(name)
    }

    /// Returns the name of the program that a dead process had in the end; `None` once its parent has collected it.
    pub(crate) fn comm_at_death(&self, process: &Process) -> Option<String> {
        let name = self.proc.program_name(process.id.pid.get())?;
        let same = self.identify(process.id.pid).ok().flatten().is_some_and(|found| found.id == process.id);
        same.then_some(name)
    }

    /// Returns whether a process is of another user than this one and has a controlling terminal.
    pub(crate) fn has_terminal_of_another(&self, task: TaskId, uid: u32) -> bool {
        let Some(process) = self.find(task).ok().flatten() else { return false };
        let is_of_another = self.facts(&process).ok().flatten().is_some_and(|facts| facts.uids.real != uid);
        is_of_another && self.proc.stat(task.pid.get()).ok().flatten().is_some_and(|stat| stat.has_terminal)
    }

    /// Returns how a dead process ended.
    pub(crate) fn ended(&self, process: &Process) -> Ending {
        // The pidfd knows once the parent has collected the process; until then it is a zombie in /proc.
        let collected = || {
            let info = sys::pidfd_info(process.pidfd(), sys::INFO_EXIT).ok();
            info.filter(|info| info.mask & sys::INFO_EXIT != 0).map(|info| info.exit_code)
        };
        let zombie = || {
            let stat = self.proc.stat(process.id.pid.get()).ok().flatten()?;
            let same = self.features.pidfs || process.id.ino == stat.started | IS_START_TIME;
            (same && stat.has_exited()).then_some(stat.exit_code)
        };
        // It may be collected between the first two questions.
        match collected().or_else(zombie).or_else(collected) {
            Some(code) if code & 0x7f == 0 => Ending::Exited(code >> 8),
            Some(code) => Ending::Killed(code & 0x7f),
            None => Ending::Unknown,
        }
    }

    /// Returns the real uid that a dead process had in the end; `None` once its parent has collected it, because then the
    /// kernel has forgotten it.
    pub(crate) fn user_at_death(&self, process: &Process) -> Option<u32> {
        if self.features.info {
            let info = sys::pidfd_info(process.pidfd(), sys::INFO_PID | sys::INFO_CREDS).ok()?;
            return (info.mask & sys::INFO_CREDS != 0).then_some(info.ruid);
        }
        let status = self.proc.status(process.id.pid.get()).ok().flatten()?;
        let same = self.identify(process.id.pid).ok().flatten().is_some_and(|found| found.id == process.id);
        status.numbers("Uid").first().copied().filter(|_| same)
    }

    fn is_kernel_thread(&self, pid: Pid) -> io::Result<bool> {
        Ok(self.proc.stat(pid.get())?.is_some_and(|stat| stat.is_kernel_thread()))
    }
}

/// Finds out what the kernel supports.
fn probe() -> io::Result<Features> {
    let own = sys::pidfd_open(std::process::id())?;
    let parent = sys::pidfd_open(nix::unistd::getppid().as_raw() as u32);
    // Before pidfs, all pidfds share the inode of anonymous files.
    let anonymous = nix::sys::eventfd::EventFd::new()?;
    let inode = |fd: BorrowedFd<'_>| fstat(fd).map(|stat| stat.st_ino);
    let pidfs = inode(own.as_fd())? != inode(anonymous.as_fd())?
        && parent.map_or(Ok(true), |parent| {
            Ok::<bool, io::Error>(inode(parent.as_fd())? != inode(own.as_fd())?)
        })?;
    let info = sys::pidfd_info(own.as_fd(), sys::INFO_PID | sys::INFO_CREDS).is_ok();
    let proc = ProcFs::new()?;
    let translation = Namespace::own(&proc)?.can_translate() && sys::pidfd_pid_namespace(own.as_fd()).is_ok();
    Ok(Features { pidfs, translation, info })
}

/// Returns the session of a thread (getsid(2)): the PID of its leader, which may be dead; 0 if that has none in this PID
/// namespace. `None` if the thread has gone.
pub(crate) fn session_of(tid: u32) -> Option<u32> {
    let tid = nix::unistd::Pid::from_raw(i32::try_from(tid).ok().filter(|tid| *tid > 0)?);
    let session = nix::unistd::getsid(Some(tid)).ok()?;
    u32::try_from(session.as_raw()).ok()
}

/// Sets the affinity mask of one thread.
pub(crate) fn set_mask_of(tid: u32, cpus: &CpuSet) -> io::Result<()> {
    sys::set_affinity(tid, cpus.words())
}
