//! Processes to claim for, and what the kernel says about them.

use std::fs;
use std::path::Path;
use std::process::{Child, Command};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{NOBODY, kernel, until, write};

/// Resets the signals that a shell makes background processes ignore (or nohup), so that processes of the test handle
/// them.
#[allow(unsafe_code, reason = "there is no safe way")]
pub(super) fn reset_signals() {
    use nix::sys::signal::SigHandler;
    for kind in [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGHUP] {
        // SAFETY: restores the default action and installs no handler.
        unsafe { nix::sys::signal::signal(kind, SigHandler::SigDfl) }.expect("signal");
    }
}

/// A process that does nothing; killed when dropped.
pub struct Sleeper(Child);

impl Sleeper {
    pub fn new() -> Self {
        Self::spawn(Command::new("sleep").arg("1000"))
    }

    /// Starts a program, and returns when the process has the name of it: execve(2) sets the name a moment after it has closed
    /// the files of this process, for which `Command::spawn` waits.
    pub fn spawn(command: &mut Command) -> Self {
        let child = command.spawn().expect("a process");
        let name = |task: &str| fs::read_to_string(format!("/proc/{task}/comm")).unwrap_or_default();
        let program = Path::new(command.get_program()).file_name().unwrap().to_string_lossy();
        let own = name("thread-self");
        until("it has its own name", || {
            let name = name(&child.id().to_string());
            // A test may start its own program.
            name != own || program.starts_with(name.trim_end())
        });
        Self(child)
    }

    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    pub fn child(&mut self) -> &mut Child {
        &mut self.0
    }

    /// Kills it, and collects it if the kernel tells how it ended all the same. Otherwise it is collected when the tests end:
    /// most are about tasks whose ending is known.
    pub fn end(mut self) {
        if tells_how_collected_tasks_ended() {
            return self.collect();
        }
        let _ = self.0.kill();
        until("it has died", || has_died(self.pid()));
        std::mem::forget(self);
    }

    /// Kills and collects it.
    pub fn collect(mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether the kernel tells how a task ended that its parent has collected already.
fn tells_how_collected_tasks_ended() -> bool {
    kernel() >= (6, 15)
}

/// The event of a task that was collected before the daemon looks, where it would be `event` otherwise.
pub fn if_collected(event: &'static str) -> &'static str {
    if tells_how_collected_tasks_ended() { event } else { "died" }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// All processes of the machine.
pub fn pids() -> Vec<u32> {
    let entries = fs::read_dir("/proc").expect("/proc").filter_map(Result::ok);
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// `Cpus_allowed_list` of each thread of a process.
pub fn masks(pid: u32) -> Vec<String> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let mask = |tid: fs::DirEntry| {
        let status = fs::read_to_string(tid.path().join("status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
        Some(line.trim().to_owned())
    };
    threads.filter_map(Result::ok).filter_map(mask).collect()
}

/// Runs `work` with the file permissions of `nobody`, in a thread of this process.
pub fn as_nobody<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
    let as_nobody = || {
        setfsgid(Gid::from_raw(NOBODY));
        setfsuid(Uid::from_raw(NOBODY));
        work()
    };
    std::thread::scope(|scope| scope.spawn(as_nobody).join()).expect("the work")
}

/// A process of `nobody`.
pub fn sleeper_of_nobody() -> Sleeper {
    use std::os::unix::process::CommandExt as _;
    Sleeper::spawn(Command::new("sleep").arg("1000").uid(NOBODY).gid(NOBODY))
}

/// Sends a signal to a process that may have ended. After `SIGSTOP`, waits until all threads have stopped: the kernel tells
/// only one of them at first, which may have to wait for a processor while the others go on.
pub fn signal(pid: u32, signal: Signal) {
    let sent = kill(Pid::from_raw(pid as i32), signal);
    if signal == Signal::SIGSTOP && sent.is_ok() {
        let runs = |thread: &str| fs::read_to_string(thread).is_ok_and(|stat| !has_stopped(&stat));
        until("all threads have stopped", || {
            let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
            !threads.map(|thread| thread.path().join("stat")).any(|stat| runs(&stat.to_string_lossy()))
        });
    }
}

/// Whether the line of a thread (proc(5), `/proc/PID/stat`) says that it has stopped, or has died.
fn has_stopped(stat: &str) -> bool {
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['T', 't', 'Z', 'X']))
}

/// The number after `key:` in a file of /proc.
pub fn proc_number(file: &str, key: &str) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

/// How often the threads of a process have gone to sleep.
pub fn sleeps(pid: u32) -> u64 {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("a process").filter_map(Result::ok);
    let sleeps = |thread: fs::DirEntry| {
        proc_number(&thread.path().join("status").to_string_lossy(), "voluntary_ctxt_switches")
    };
    threads.filter_map(sleeps).sum()
}

/// Sets the mask of one thread.
pub fn pin(tid: u32, cpus: &[usize]) {
    let mut set = nix::sched::CpuSet::new();
    cpus.iter().for_each(|&cpu| set.set(cpu).expect("a CPU"));
    nix::sched::sched_setaffinity(Pid::from_raw(tid as i32), &set).expect("sched_setaffinity");
}

/// The threads of a process, ascending.
pub fn threads(pid: u32) -> Vec<u32> {
    let entries = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().filter_map(Result::ok);
    let mut tids: Vec<u32> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    tids.sort_unstable();
    tids
}

/// The mask of a process that has no claim.
pub fn free() -> String {
    masks(std::process::id())[0].clone()
}

/// A process that is not a child of the test; killed when dropped.
pub struct Stray(pub u32);

impl Stray {
    /// Kills it and waits until it has died.
    pub fn end(self) {
        signal(self.0, Signal::SIGKILL);
        until("it has died", || has_died(self.0));
    }
}

impl Drop for Stray {
    fn drop(&mut self) {
        signal(self.0, Signal::SIGKILL);
    }
}

/// The children of a process that has one thread.
pub fn children(pid: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().map(|pid| pid.parse().expect("a PID")).collect()
}

/// A field of `/proc/PID/stat`, counted as in proc(5), from the third on.
pub fn stat(pid: u32, field: usize) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).expect("a process");
    let behind_the_name = text.rsplit_once(')').expect("a name").1;
    behind_the_name.split_whitespace().nth(field - 3).expect("a field").to_owned()
}

/// Returns whether no thread of a process runs, reaped or not.
pub fn has_died(pid: u32) -> bool {
    let Ok(text) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return true };
    let state = text.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    // If only the first thread has exited, others are left.
    let others = || fs::read_dir(format!("/proc/{pid}/task")).map_or(0, |threads| threads.count()) > 1;
    matches!(state, Some('Z' | 'X')) && !others()
}

/// Waits until a clock tick has passed since the start of the process, so that later events are later for the kernel,
/// too.
pub fn let_a_tick_pass(pid: u32) {
    use nix::time::{ClockId, clock_gettime};
    use nix::unistd::{SysconfVar, sysconf};
    let tick = 1_000_000_000 / sysconf(SysconfVar::CLK_TCK).expect("CLK_TCK").expect("CLK_TCK");
    let started: i64 = stat(pid, 22).parse().expect("ticks");
    until("a tick has passed", || {
        let now = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("a clock");
        (now.tv_sec() * 1_000_000_000 + now.tv_nsec()) / tick > started
    });
}

/// Puts a process on the list and kills it; returns its PID.
pub fn killed_on(tasks: &Path) -> u32 {
    let task = Sleeper::new();
    let pid = task.pid();
    write(tasks, pid.to_string()).expect("a claim");
    task.end();
    pid
}
