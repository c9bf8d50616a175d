//! `kcm isolate` on a plain directory: the legacy workflow, in which a program removes its own PID.
//!
//! Owns the steps, the signals, and the command's status. Does not know the mount. If this process is killed, its PID
//! stays in the file until `kcm reconcile` removes it.

use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, ExitCode, ExitStatus};
use std::time::Duration;

use anyhow::{Context as _, Error, bail};
use kcm_mount::model::cpuset::CpuSet;
use kcm_mount::{affinity, child};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, raise};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;

use super::Wanted;
use crate::cli::Program;
use crate::commands::common::deadline::Deadline;
use crate::confdir::{ConfDir, Pool};
use crate::host::Host;

/// The interval between attempts to find a free list: a plain directory has no notification.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);
/// The signals that are not caught: faults of this program, signals of a terminal to background processes, and
/// SIGPIPE, which is ignored. All others are forwarded to the command.
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

/// Claims a list under the lock, runs the command, and removes the claim.
pub(super) fn run(
    dir: &ConfDir,
    wanted: &Wanted<'_>,
    program: &Program,
    deadline: Deadline,
) -> Result<ExitCode, Error> {
    let pool = wanted.pool;
    let pid = Host::from_env().own_pid()?;
    let mut is_first = true;
    let (list, signals) = loop {
        if let Some(claimed) = claim(dir, wanted, pid, is_first)? {
            break claimed;
        }
        if deadline.has_passed() {
            bail!("No free cpu lists in pool {pool}: {}", why_not(dir, wanted)?);
        }
        is_first = false;
        std::thread::sleep(RETRY_INTERVAL);
    };
    log::debug!("claimed {pool} {list} for PID {pid}");
    let result = run_on(&list, program, &signals);
    let removed = remove_claim(dir, pool, &list, pid);
    let code = result?;
    removed.map(|()| code)
}

/// Writes `pid`, this process, into a free list. Signals are caught before, because the process must not end without
/// removing its PID. Returns `None` if no list is free. `warn`: whether damaged lists are named.
fn claim(
    dir: &ConfDir,
    &Wanted { pool, list: wanted, .. }: &Wanted<'_>,
    pid: u32,
    warn: bool,
) -> Result<Option<(String, SignalFd)>, Error> {
    let _lock = dir.lock()?;
    let found = dir.find()?;
    if found.pools.get(pool).is_none_or(|pool| pool.lists.is_empty()) {
        let pool_directory = format!("{}/", dir.pool(pool).display());
        if let Some(damage) = found.damaged.iter().find(|damage| damage.starts_with(&pool_directory)) {
            bail!("{damage}");
        }
    }
    let pools = if warn { found.warned() } else { found.pools };
    let Some(list) = pools.get(pool).and_then(|pool| choose(pool, wanted)) else { return Ok(None) };
    let signals = catch_signals()?;
    dir.change_tasks(pool, &list, |tasks| tasks.push(pid))?;
    Ok(Some((list, signals)))
}

/// Returns why no list is free, and what to do.
fn why_not(dir: &ConfDir, wanted: &Wanted<'_>) -> Result<String, Error> {
    let pools = dir.find()?.pools;
    let lists = pools.get(wanted.pool).map(Pool::lists_by_cpu).unwrap_or_default();
    let mut lists = lists.into_iter().filter(|(list, _)| wanted.list.is_none_or(|wanted| wanted == *list));
    let held = lists.find_map(|(list, tasks)| Some((list, *tasks.first()?)));
    Ok(match held {
        Some((list, pid)) => {
            let name = Host::from_env().program_name(pid);
            let holder = name.map_or_else(|| pid.to_string(), |name| format!("{pid} ({name})"));
            format!("{list} is held by {holder}; wait with --wait, or run kcm reconcile if that has ended")
        }
        None => format!(
            "{0} has no CPU lists; make one: mkdir pools/{0}/<cpulist>, and an empty file tasks in it",
            wanted.pool
        ),
    })
}

/// Returns the first free list of an exclusive pool, or the list with the fewest tasks of a shared pool. `wanted`: only this
/// list.
fn choose(pool: &Pool, wanted: Option<&str>) -> Option<String> {
    let is_wanted = |list: &str| wanted.is_none_or(|wanted| wanted == list);
    let mut lists = pool.lists_by_cpu().into_iter().filter(|(list, _)| is_wanted(list));
    let list = if pool.exclusive {
        lists.find(|(_, tasks)| tasks.is_empty())
    } else {
        lists.min_by_key(|(_, tasks)| tasks.len())
    };
    list.map(|(list, _)| list.to_owned())
}

/// Removes `pid` from a list.
fn remove_claim(dir: &ConfDir, pool: &str, list: &str, pid: u32) -> Result<(), Error> {
    let _lock = dir.lock()?;
    dir.change_tasks(pool, list, |tasks| tasks.retain(|&task| task != pid))
}

fn run_on(list: &str, program: &Program, signals: &SignalFd) -> Result<ExitCode, Error> {
    let cpus = list.parse().with_context(|| format!("{list}: not a CPU list; rename its directory"))?;
    pin(&cpus).with_context(|| format!("CPU list {list}"))?;
    let mut command = super::command(program, list);
    child::set_pdeathsig(&mut command);
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return Ok(super::not_started(program, &error)),
    };
    let result = supervise(&mut child, signals);
    if result.is_err() {
        let _ = child.kill();
    }
    result
}

/// Sets the affinity of this process, which the command inherits, and checks it.
fn pin(cpus: &CpuSet) -> Result<(), Error> {
    let rejected = "the kernel refuses these CPUs; look at the cpuset cgroup and at offline CPUs";
    affinity::set(std::process::id(), cpus).context(rejected)?;
    match affinity::get(std::process::id())? {
        Some(got) if got == *cpus => Ok(()),
        got => bail!("the kernel narrows it to {}; look at the cpuset cgroup", got.unwrap_or_default()),
    }
}

fn catch_signals() -> Result<SignalFd, Error> {
    child::reset_sigchld().context("cannot wait for the command")?;
    let mut caught = SigSet::all();
    NOT_CAUGHT.into_iter().for_each(|signal| caught.remove(signal));
    let signals = caught.thread_block().and_then(|()| SignalFd::with_flags(&caught, SfdFlags::SFD_CLOEXEC));
    signals.context("cannot catch signals")
}

/// Forwards signals until the command ends, and stops and continues with it.
fn supervise(child: &mut Child, signals: &SignalFd) -> Result<ExitCode, Error> {
    // Signals that are already pending may be older than the command.
    let mut maybe_older = true;
    loop {
        maybe_older = maybe_older
            && poll(&mut [PollFd::new(signals.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO) == Ok(1);
        let info = match signals.read_signal() {
            Err(Errno::EINTR) => continue,
            info => info.context("cannot read signals")?.context("no signal")?,
        };
        // A terminal sends its signals to the whole foreground process group, so the command has received it.
        let has_received = info.ssi_code == libc::SI_KERNEL && !maybe_older;
        if info.ssi_signo == Signal::SIGCHLD as u32 {
            if let Some(code) = on_child_change(child)? {
                return Ok(code);
            }
        } else if !has_received {
            log::debug!("forwarding signal {} to PID {}", info.ssi_signo, child.id());
            let _ = child::send(child, info.ssi_signo);
        }
    }
}

/// Handles SIGCHLD. Returns the command's status if it has ended; stops this process if the command has stopped.
fn on_child_change(child: &mut Child) -> Result<Option<ExitCode>, Error> {
    if let Some(status) = child.try_wait()? {
        return Ok(Some(exit_code(status)));
    }
    let pid = Pid::from_raw(i32::try_from(child.id()).context("the command has no PID")?);
    // The first process of a container becomes the parent of orphans, and has to collect them. If the command itself
    // has ended since `try_wait`, its own SIGCHLD follows.
    let ended = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    let next = || waitid(Id::All, ended).ok().and_then(|status| status.pid()).filter(|&other| other != pid);
    while let Some(other) = next() {
        let _ = waitpid(other, Some(WaitPidFlag::WNOHANG));
    }
    let stopped = waitid(Id::Pid(pid), WaitPidFlag::WSTOPPED | WaitPidFlag::WNOHANG);
    // The first process of a container cannot stop itself. Nothing is sent to the command when this process continues:
    // either the whole job was continued, or the signal was forwarded already. One more SIGCONT could undo a later
    // stop.
    if matches!(stopped, Ok(WaitStatus::Stopped(..))) && std::process::id() != 1 {
        log::debug!("the command has stopped; stopping too");
        raise(Signal::SIGSTOP).map_err(io::Error::from)?;
    }
    Ok(None)
}

/// Returns the status as a shell does: 128 plus the number of a signal.
fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    ExitCode::from(code as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(exclusive: bool, lists: &[(&str, &[u32])]) -> Pool {
        let lists = lists.iter().map(|(list, tasks)| ((*list).to_owned(), tasks.to_vec()));
        Pool { exclusive, lists: lists.collect(), ..Pool::default() }
    }

    #[test]
    fn an_exclusive_pool_has_the_first_free_list() {
        assert_eq!(choose(&pool(true, &[("10", &[]), ("2", &[]), ("1", &[7])]), None).as_deref(), Some("2"));
        assert_eq!(choose(&pool(true, &[("1", &[7])]), None), None);
        assert_eq!(choose(&pool(true, &[]), None), None);
        assert_eq!(choose(&pool(true, &[("1", &[7]), ("2", &[])]), Some("1")), None);
        assert_eq!(choose(&pool(true, &[("1", &[]), ("2", &[])]), Some("2")).as_deref(), Some("2"));
    }

    #[test]
    fn a_shared_pool_has_the_list_with_the_fewest_tasks() {
        let lists: &[(&str, &[u32])] = &[("0", &[1, 2]), ("1", &[3]), ("2", &[4])];
        assert_eq!(choose(&pool(false, lists), None).as_deref(), Some("1"));
    }
}
