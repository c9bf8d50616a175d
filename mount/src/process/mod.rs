//! Processes as the kernel shows them: who they are, whose, whether they live, on which CPUs they may run.
//!
//! Owns: pidfds, PID namespaces, affinity masks, /proc; and in `sys` the only unsafe code. Must not know:
//! claims. What newer kernels know by a system call is asked of older ones through /proc; which way is found
//! out once, at the start.

mod child;
mod fds;
mod mask;
mod namespace;
mod scan;
mod sys;
#[cfg(test)]
mod tests;
mod watch;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::fstat;

use crate::model::command::Uids;
use crate::model::cpuset::CpuSet;
use crate::model::task::{Pid, TaskId};
use crate::procfs::ProcFs;

pub(crate) use child::{PidFd, collect_children, reset_sigchld, send_signal, set_pdeathsig};
pub(crate) use fds::{clear_cloexec, close_inherited, dup_above, dup_to, inherited_fd, replace_fd};
pub(crate) use mask::{BlockedWriter, MaskError, SavedMasks, Threads, mask_of};
use namespace::Namespace;
pub(crate) use scan::ScannedProcess;
pub(crate) use sys::{keep_heap_small, trim_heap};
pub(crate) use watch::Watch;

/// Set in [`TaskId::ino`] where it is a start time.
const IS_START_TIME: u64 = 1 << 63;

/// What this kernel can be asked directly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Features {
    /// A pidfd has an inode of its own (6.9).
    pub(crate) pidfs: bool,
    /// A PID namespace translates numbers (6.11).
    pub(crate) translation: bool,
    /// A pidfd tells about its process (6.13).
    pub(crate) info: bool,
}

/// The processes of this machine.
#[derive(Debug)]
pub(crate) struct Processes {
    proc: ProcFs,
    features: Features,
    own: Namespace,
    /// There are hierarchies of cgroup v1 with controllers: one number does not tell a cgroup.
    cgroup_v1: bool,
    /// The list of the online CPUs.
    online: Option<File>,
}

/// One process, by a pidfd: whatever happens to its number, this is the same process.
#[derive(Debug)]
pub(crate) struct Process {
    id: TaskId,
    pidfd: OwnedFd,
    /// Whether its PID namespace is ours, once somebody has asked: it never gets another.
    in_our_namespace: OnceLock<bool>,
}

/// What is known of a living process.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    /// None: it has none in our PID namespace.
    pub(crate) parent: Option<Pid>,
    pub(crate) uids: Uids,
    pub(crate) kernel_thread: bool,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// By itself, with this status.
    Exited(i32),
    /// By this signal.
    Killed(i32),
    /// Nobody can tell any more.
    Unknown,
}

impl Process {
    /// Which.
    pub(crate) fn id(&self) -> TaskId {
        self.id
    }

    /// Whether one of its threads lives.
    pub(crate) fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        !matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..))
    }

    fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Processes {
    /// Opens /proc and finds out what the kernel knows.
    ///
    /// # Errors
    /// /proc is not mounted, or no descriptors are left.
    pub(crate) fn new() -> io::Result<Self> {
        Self::with_features(probe()?)
    }

    /// With some of the kernel's abilities left unused.
    ///
    /// # Errors
    /// Those of [`Processes::new`].
    pub(crate) fn with_features(features: Features) -> io::Result<Self> {
        let proc = ProcFs::new()?;
        let own = Namespace::own(&proc)?;
        let cgroups = proc.read("self/cgroup")?.unwrap_or_default();
        let has_controllers = |line: &str| {
            let controllers = line.split(':').nth(1).unwrap_or("");
            !controllers.is_empty() && !controllers.starts_with("name=")
        };
        let cgroup_v1 = String::from_utf8_lossy(&cgroups).lines().any(has_controllers);
        let online = File::open("/sys/devices/system/cpu/online").ok();
        Ok(Self { proc, features, own, cgroup_v1, online })
    }

    /// Whether a task's identity tells it from every other task of this boot. Where it does not, its mask has
    /// to confirm it after a restart.
    pub(crate) fn tells_reused_pids(&self) -> bool {
        self.features.pidfs
    }

    /// The process of this thread, by a descriptor that is there already where it can be. None: it does not exist
    /// (any more).
    ///
    /// # Errors
    /// Those of [`Processes::open`].
    pub(crate) fn of_thread(&self, tid: Pid, watch: &Watch) -> io::Result<Option<Arc<Process>>> {
        let Some(pid) = self.tgid(tid)? else { return Ok(None) };
        if let Some(process) = watch.with_number(pid) {
            return Ok(Some(process));
        }
        let process = self.open_translated(pid, tid)?.map(Arc::new);
        Ok(process.inspect(|process| watch.remember(process)))
    }

    /// The living process with this number, by a descriptor that is there already where it can be.
    ///
    /// # Errors
    /// Those of [`Processes::open`].
    pub(crate) fn with_number(&self, pid: Pid, watch: &Watch) -> io::Result<Option<Arc<Process>>> {
        if let Some(process) = watch.with_number(pid) {
            return Ok(Some(process));
        }
        let process = self.open_leader(pid)?.map(Arc::new);
        Ok(process.inspect(|process| watch.remember(process)))
    }

    /// The process of this thread. None: it does not exist (any more).
    ///
    /// # Errors
    /// No descriptors are left, and the like.
    pub(crate) fn open(&self, tid: Pid) -> io::Result<Option<Process>> {
        self.tgid(tid)?.map_or(Ok(None), |pid| self.open_translated(pid, tid))
    }

    /// The process `pid`, if the thread is one of it.
    fn open_translated(&self, pid: Pid, tid: Pid) -> io::Result<Option<Process>> {
        let Some(process) = self.open_leader(pid)? else { return Ok(None) };
        // Translated again: the number may have been given to another process before it was opened.
        Ok((self.tgid(tid)? == Some(pid)).then_some(process))
    }

    /// A task that is known, also one that has died, as long as its parent has not collected it.
    ///
    /// # Errors
    /// No descriptors are left, and the like.
    pub(crate) fn find(&self, task: TaskId) -> io::Result<Option<Process>> {
        Ok(self.identify(task.pid)?.filter(|process| process.id == task))
    }

    /// `pid` is that of a thread group.
    fn open_leader(&self, pid: Pid) -> io::Result<Option<Process>> {
        Ok(self.identify(pid)?.filter(Process::is_alive))
    }

    /// Dead or alive.
    fn identify(&self, pid: Pid) -> io::Result<Option<Process>> {
        let pidfd = match sys::pidfd_open(pid.get()) {
            Ok(pidfd) => pidfd,
            Err(error) if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::ENOENT | libc::EINVAL)) => {
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
        Ok(Some(Process { id: TaskId { pid, ino }, pidfd, in_our_namespace: OnceLock::new() }))
    }

    /// Whose it is. None: it has died.
    ///
    /// # Errors
    /// No descriptors are left, and the like.
    pub(crate) fn facts(&self, process: &Process) -> io::Result<Option<Facts>> {
        let pid = process.id.pid;
        let facts = if self.features.info {
            let wanted = sys::INFO_PID | sys::INFO_CREDS;
            match sys::pidfd_info(process.pidfd(), wanted) {
                Ok(info) if info.mask & sys::INFO_CREDS != 0 => {
                    let parent = Pid::new(info.ppid);
                    let uids = Uids { real: info.ruid, effective: info.euid, saved: info.suid };
                    // Kernel threads descend from number 2 of the machine's PID namespace.
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
        // What was read by number was another's if this one has died.
        Ok(process.is_alive().then_some(facts))
    }

    /// The groups whose rights over files a thread has; none where it has gone.
    ///
    /// # Errors
    /// No descriptors are left, and the like.
    pub(crate) fn groups(&self, tid: u32) -> io::Result<Vec<u32>> {
        let Some(status) = self.proc.status(tid)? else { return Ok(Vec::new()) };
        // The last of the four group ids is the one for files.
        Ok(status.numbers("Gid").into_iter().last().into_iter().chain(status.numbers("Groups")).collect())
    }

    /// When it started, in clock ticks since boot. None: it has died.
    pub(crate) fn started(&self, process: &Process) -> Option<u64> {
        let stat = self.proc.stat(process.id.pid.get()).ok().flatten()?;
        process.is_alive().then_some(stat.started)
    }

    /// A number that tells its cgroup from others, the same for every daemon of this boot. None: it has died.
    pub(crate) fn cgroup(&self, process: &Process) -> Option<u64> {
        if self.features.info && !self.cgroup_v1 {
            let info = sys::pidfd_info(process.pidfd(), sys::INFO_CGROUP).ok()?;
            return (info.mask & sys::INFO_CGROUP != 0).then_some(info.cgroup);
        }
        let text = self.proc.read(&format!("{}/cgroup", process.id.pid)).ok().flatten()?;
        process.is_alive().then(|| fnv1a(&text))
    }

    /// The name of its program, with nothing in it that a terminal would act on.
    pub(crate) fn comm(&self, process: &Process) -> Option<String> {
        let name = self.proc.program_name(process.id.pid.get())?;
        process.is_alive().then_some(name)
    }

    /// How a dead process ended.
    pub(crate) fn ended(&self, process: &Process) -> Ending {
        // Known from the pidfd once its parent has collected it; until then it is a zombie in /proc.
        let info = sys::pidfd_info(process.pidfd(), sys::INFO_EXIT).ok();
        let collected = info.filter(|info| info.mask & sys::INFO_EXIT != 0).map(|info| info.exit_code);
        let zombie = || {
            let stat = self.proc.stat(process.id.pid.get()).ok().flatten()?;
            let same = self.features.pidfs || process.id.ino == stat.started | IS_START_TIME;
            (same && stat.has_exited()).then_some(stat.exit_code)
        };
        match collected.or_else(zombie) {
            Some(code) if code & 0x7f == 0 => Ending::Exited(code >> 8),
            Some(code) => Ending::Killed(code & 0x7f),
            None => Ending::Unknown,
        }
    }

    fn is_kernel_thread(&self, pid: Pid) -> io::Result<bool> {
        Ok(self.proc.stat(pid.get())?.is_some_and(|stat| stat.is_kernel_thread()))
    }
}

/// FNV-1a, 64 bits: the same in every build, unlike the standard library's hashes.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &b| (hash ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

fn probe() -> io::Result<Features> {
    let own = sys::pidfd_open(std::process::id())?;
    let parent = sys::pidfd_open(nix::unistd::getppid().as_raw() as u32);
    // Before pidfs all pidfds share the one inode of anonymous files.
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

/// Sets the mask of one thread.
pub(crate) fn set_mask_of(tid: u32, cpus: &CpuSet) -> io::Result<()> {
    sys::set_affinity(tid, cpus.words())
}
