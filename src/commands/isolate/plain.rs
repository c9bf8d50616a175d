//! `kcm isolate` on a plain directory: the workflow of 2017, in which a program takes itself off the list.
//!
//! Owns: the steps, signals, and the command's status. Must not know: the mount. What is killed between its
//! steps leaves its PID behind; this layout has nobody else to take it off but `kcm reconcile`.

use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, ExitCode, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Error, bail};
use kcm_mount::model::cpuset::CpuSet;
use kcm_mount::{affinity, child};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, raise};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;

use crate::cli::{Program, Wait};
use crate::confdir::{self, ConfDir, Pool};
use crate::host::Host;

/// How often a free list is looked for: nobody tells of one here.
const LOOKING: Duration = Duration::from_millis(100);
/// The signals that are not caught: those that say that we ourselves are wrong, what a terminal does to somebody in
/// the background, and SIGPIPE, which we ignore. All others are passed on to the command.
const NOT_CAUGHT: [Signal; 10] = [
    Signal::SIGILL,
    Signal::SIGTRAP,
    Signal::SIGABRT,
    Signal::SIGBUS,
    Signal::SIGFPE,
    Signal::SIGSEGV,
    Signal::SIGSYS,
    Signal::SIGTTIN,
    Signal::SIGTTOU,
    Signal::SIGPIPE,
];

/// Claims under the lock, runs the command, and takes itself off.
pub(super) fn run(
    dir: &ConfDir,
    pool: &str,
    program: &Program,
    wait: Option<Wait>,
) -> Result<ExitCode, Error> {
    let pid = Host::from_env().own_pid()?;
    let deadline = wait.flatten().and_then(|wait| Instant::now().checked_add(wait));
    let (list, signals) = loop {
        if let Some(claimed) = claim(dir, pool, pid)? {
            break claimed;
        }
        if wait.is_none() || deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            bail!("No free cpu lists in pool {pool}");
        }
        std::thread::sleep(LOOKING);
    };
    let result = run_on(&list, program, &signals);
    let left = leave(dir, pool, &list, pid);
    let code = result?;
    left.map(|()| code)
}

/// Writes our PID into a list. From then on signals are caught: we must not end without taking it off.
fn claim(dir: &ConfDir, pool: &str, pid: u32) -> Result<Option<(String, SignalFd)>, Error> {
    let _lock = dir.lock()?;
    let found = dir.pools()?;
    let Some(list) = found.get(pool).and_then(choose) else { return Ok(None) };
    let signals = catch_signals()?;
    confdir::change_tasks(&dir.tasks(pool, &list), |tasks| tasks.push(pid))?;
    Ok(Some((list, signals)))
}

/// The first free list of an exclusive pool, the one with the fewest tasks of a shared one.
fn choose(pool: &Pool) -> Option<String> {
    let mut lists = pool.lists_by_cpu().into_iter();
    let list = if pool.exclusive {
        lists.find(|(_, tasks)| tasks.is_empty())
    } else {
        lists.min_by_key(|(_, tasks)| tasks.len())
    };
    list.map(|(list, _)| list.to_owned())
}

fn leave(dir: &ConfDir, pool: &str, list: &str, pid: u32) -> Result<(), Error> {
    let _lock = dir.lock()?;
    confdir::change_tasks(&dir.tasks(pool, list), |tasks| tasks.retain(|&task| task != pid))
}

fn run_on(list: &str, program: &Program, signals: &SignalFd) -> Result<ExitCode, Error> {
    let cpus = list.parse().with_context(|| format!("{list}: not a CPU list; rename its directory"))?;
    pin(&cpus).with_context(|| format!("CPU list {list}"))?;
    let mut command = super::command(program, list);
    child::tie_to_parent(&mut command);
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return Ok(super::not_started(program, &error)),
    };
    let result = attend(&mut child, signals);
    if result.is_err() {
        let _ = child.kill();
    }
    result
}

/// Our mask becomes the list; the command inherits it.
fn pin(cpus: &CpuSet) -> Result<(), Error> {
    let refused = "the kernel refuses these CPUs; look at the cpuset cgroup and at offline CPUs";
    affinity::set(std::process::id(), cpus).context(refused)?;
    match affinity::get(std::process::id())? {
        Some(got) if got == *cpus => Ok(()),
        got => bail!("the kernel narrows it to {}; look at the cpuset cgroup", got.unwrap_or_default()),
    }
}

fn catch_signals() -> Result<SignalFd, Error> {
    child::can_be_waited_for().context("the command could not be waited for")?;
    let mut caught = SigSet::all();
    NOT_CAUGHT.into_iter().for_each(|signal| caught.remove(signal));
    let signals = caught.thread_block().and_then(|()| SignalFd::with_flags(&caught, SfdFlags::SFD_CLOEXEC));
    signals.context("signals cannot be caught")
}

/// Passes signals on until the command ends; stops and goes on with it.
fn attend(child: &mut Child, signals: &SignalFd) -> Result<ExitCode, Error> {
    // What is there now may be older than the command.
    let mut is_new = true;
    loop {
        is_new = is_new
            && poll(&mut [PollFd::new(signals.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO) == Ok(1);
        let info = match signals.read_signal() {
            Err(Errno::EINTR) => continue,
            info => info.context("signals cannot be read")?.context("no signal")?,
        };
        // The terminal sends its signals to the whole foreground job: the command has them already.
        let has_it = info.ssi_code == libc::SI_KERNEL && !is_new;
        if info.ssi_signo == Signal::SIGCHLD as u32 {
            if let Some(code) = look_after(child)? {
                return Ok(code);
            }
        } else if !has_it {
            let _ = child::send(child, info.ssi_signo);
        }
    }
}

/// The status of the command where it has ended. Where it has stopped, so do we.
fn look_after(child: &mut Child) -> Result<Option<ExitCode>, Error> {
    if let Some(status) = child.try_wait()? {
        return Ok(Some(code_of(status)));
    }
    let pid = Pid::from_raw(i32::try_from(child.id()).context("the command has no PID")?);
    // As the first process of a container we are given those whose parent has ended. One who is the command has
    // ended just now, and is told of by the next signal.
    let ended = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    let next = || waitid(Id::All, ended).ok().and_then(|status| status.pid()).filter(|&other| other != pid);
    while let Some(other) = next() {
        let _ = waitpid(other, Some(WaitPidFlag::WNOHANG));
    }
    let stopped = waitid(Id::Pid(pid), WaitPidFlag::WSTOPPED | WaitPidFlag::WNOHANG);
    // The first process of a container cannot be stopped by us. Whoever lets us go on has either meant the whole job,
    // or sent us a signal to pass on; one of our own could undo a stop that has come since.
    if matches!(stopped, Ok(WaitStatus::Stopped(..))) && std::process::id() != 1 {
        raise(Signal::SIGSTOP).map_err(io::Error::from)?;
    }
    Ok(None)
}

/// As a shell says it: 128 and the signal.
fn code_of(status: ExitStatus) -> ExitCode {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    ExitCode::from(code as u8)
}
