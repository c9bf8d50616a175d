//! The formats of proc(5) that this program needs, read below a root that the caller chooses.
//!
//! Owns the only parsers of `/proc/PID/stat` and `/proc/PID/status`. Does not know pidfds, claims or pools.
//! Both the daemon and the command line use it: the daemon on `/proc`, the command line on `$KCM_PROC_FS`.
//!
//! Longer than 400 lines because a quarter of it is the tests of the parsers.

use std::collections::HashSet;
use std::ffi::OsString;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{Mode, fstatat};
use rustix::fs::RawDir;

use crate::model::cpuset::CpuSet;
use crate::text;

/// The flag of kernel threads (`PF_KTHREAD`, include/linux/sched.h).
const PF_KTHREAD: u64 = 0x0020_0000;
/// The flag of threads whose affinity only the kernel may change (`PF_NO_SETAFFINITY`).
const PF_NO_SETAFFINITY: u64 = 0x0400_0000;

/// An open procfs.
#[derive(Debug)]
pub struct ProcFs {
    root: OwnedFd,
}

/// The fields of `/proc/PID/stat` that this program needs.
#[derive(Clone, Debug)]
pub struct Stat {
    /// The state letter, for example `b'R'` or `b'S'`.
    pub state: u8,
    /// The PID of the parent; 0 if the parent is outside the PID namespace.
    pub parent: u32,
    /// Whether it has a controlling terminal.
    pub(crate) has_terminal: bool,
    flags: u64,
    /// The CPU time that it has used in user mode and in the kernel, in clock ticks.
    pub used: u64,
    /// The number of threads of its process. The kernel locks the process to read it, so a thread that is no longer
    /// counted is no longer found either.
    pub(crate) threads: u64,
    /// The start time in clock ticks since boot.
    pub started: u64,
    /// The CPU on which it runs or ran last.
    pub cpu: u32,
    /// The exit status in the encoding of wait(2).
    pub exit_code: i32,
}

impl Stat {
    /// Whether this is a thread of the kernel.
    #[must_use]
    pub fn is_kernel_thread(&self) -> bool {
        self.flags & PF_KTHREAD != 0
    }

    /// Whether only the kernel may change the affinity of this thread.
    #[must_use]
    pub fn is_pinned_by_kernel(&self) -> bool {
        self.flags & PF_NO_SETAFFINITY != 0
    }

    /// Whether this thread has exited. The process may live on in its other threads.
    #[must_use]
    pub fn has_exited(&self) -> bool {
        matches!(self.state, b'Z' | b'X')
    }

    /// Whether a signal or a debugger has stopped this thread.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        matches!(self.state, b'T' | b't')
    }

    /// Whether this thread has a processor or waits for one.
    #[must_use]
    pub fn is_runnable(&self) -> bool {
        self.state == b'R'
    }

    /// Parses the text of the file. The program's name, in parentheses, may itself contain spaces and
    /// parentheses, so fields count from the last closing one.
    fn parse(text: &[u8]) -> Option<Self> {
        let end = text.iter().rposition(|&b| b == b')')?;
        let rest = std::str::from_utf8(text.get(end + 1..)?).ok()?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        // The first field here is field 3 of proc(5).
        let field = |number: usize| fields.get(number - 3).copied();
        Some(Self {
            state: *field(3)?.as_bytes().first()?,
            parent: field(4)?.parse().ok()?,
            has_terminal: field(7)? != "0",
            flags: field(9)?.parse().ok()?,
            used: field(14)?.parse::<u64>().ok()? + field(15)?.parse::<u64>().ok()?,
            threads: field(20)?.parse().ok()?,
            started: field(22)?.parse().ok()?,
            cpu: field(39)?.parse().ok()?,
            exit_code: field(52)?.parse().ok()?,
        })
    }
}

/// The text of `/proc/PID/status`.
#[derive(Clone, Debug)]
pub struct Status(String);

impl Status {
    /// The value of the line `name:`, without the white space around it.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<&str> {
        self.0.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
    }

    /// The decimal numbers in the line `name:`. Empty if the line is missing.
    #[must_use]
    pub fn numbers(&self, name: &str) -> Vec<u32> {
        let words = self.field(name).unwrap_or_default().split_whitespace();
        words.filter_map(|word| word.parse().ok()).collect()
    }

    /// Whether this thread has exited. It keeps its mask until it is collected.
    #[must_use]
    pub fn has_exited(&self) -> bool {
        self.field("State").is_some_and(|state| state.starts_with(['Z', 'X']))
    }

    /// The affinity mask (`Cpus_allowed_list`), offline CPUs included.
    #[must_use]
    pub fn allowed_cpus(&self) -> Option<CpuSet> {
        self.field("Cpus_allowed_list")?.parse().ok()
    }
}

impl ProcFs {
    /// Opens `/proc`.
    ///
    /// # Errors
    /// Returns an error if `/proc` is not mounted or no descriptors are left.
    pub fn new() -> io::Result<Self> {
        Self::at(Path::new("/proc"))
    }

    /// Opens the procfs at `root`.
    ///
    /// # Errors
    /// Returns an error if `root` is not a directory that can be opened.
    pub fn at(root: &Path) -> io::Result<Self> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Self { root: nix::fcntl::open(root, flags, Mode::empty())? })
    }

    /// Opens a file or directory; `None` if the process has gone.
    pub(crate) fn open(&self, path: &str, flags: OFlag) -> io::Result<Option<OwnedFd>> {
        open(self.root.as_fd(), path, flags)
    }

    /// The number of subdirectories of a directory, taken from its link count; `None` if the process has gone.
    pub(crate) fn count_subdirectories(&self, path: &str) -> io::Result<Option<libc::nlink_t>> {
        match fstatat(&self.root, path, AtFlags::empty()) {
            // The directory's own name and `.` are links, too (fs/proc/base.c, `proc_task_getattr`).
            Ok(stat) => Ok(Some(stat.st_nlink.saturating_sub(2))),
            Err(Errno::ENOENT | Errno::ESRCH) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The text of a link, such as `user:[4026531837]`, without following it, which costs more than twice as much;
    /// `None` if there is none, or if the process has gone.
    pub(crate) fn link(&self, path: &str) -> Option<OsString> {
        readlinkat(&self.root, path).ok()
    }

    /// Reads a file; `None` if the process has gone.
    pub(crate) fn read(&self, path: &str) -> io::Result<Option<Vec<u8>>> {
        read(self.root.as_fd(), path)
    }

    /// Reads `/proc/TID/stat` of a process or thread; `None` if it has gone.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read for another reason.
    pub fn stat(&self, tid: u32) -> io::Result<Option<Stat>> {
        Ok(self.read(&format!("{tid}/stat"))?.and_then(|text| Stat::parse(&text)))
    }

    /// Reads `/proc/PID/task/TID/stat`; `None` if the thread has gone. Unlike [`ProcFs::stat`] of a process, it does not add
    /// up all threads.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read for another reason.
    pub fn thread_stat(&self, pid: u32, tid: u32) -> io::Result<Option<Stat>> {
        Ok(self.read(&format!("{pid}/task/{tid}/stat"))?.and_then(|text| Stat::parse(&text)))
    }

    /// Returns the CPU time that a thread has used, in nanoseconds (`/proc/PID/task/TID/schedstat`); `None` if the thread has
    /// gone, or the kernel does not have the file. The kernel brings it up to date at each clock tick, and when the thread
    /// stops running.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read for another reason.
    pub fn thread_nanoseconds(&self, pid: u32, tid: u32) -> io::Result<Option<u64>> {
        let run_time = run_time(self.root.as_fd(), &format!("{pid}/task/{tid}/schedstat"))?;
        Ok(run_time.map(|run_time| run_time.nanoseconds))
    }

    /// Reads `/proc/TID/status` of a process or thread; `None` if it has gone.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read for another reason.
    pub fn status(&self, tid: u32) -> io::Result<Option<Status>> {
        self.status_at(&format!("{tid}/status"))
    }

    /// Reads `/proc/PID/task/TID/status`; `None` if the thread has gone.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read for another reason.
    pub fn thread_status(&self, pid: u32, tid: u32) -> io::Result<Option<Status>> {
        self.status_at(&format!("{pid}/task/{tid}/status"))
    }

    fn status_at(&self, path: &str) -> io::Result<Option<Status>> {
        Ok(self.read(path)?.map(|text| Status(String::from_utf8_lossy(&text).into_owned())))
    }

    /// Returns the name of the process's program as [`text::name`] shows it; `None` if the process has gone.
    #[must_use]
    pub fn program_name(&self, pid: u32) -> Option<String> {
        let comm = self.read(&format!("{pid}/comm")).ok().flatten()?;
        Some(text::name(comm.strip_suffix(b"\n").unwrap_or(&comm)).into_owned())
    }

    /// Returns false for kernel threads and for processes that have exited: neither has a program.
    pub(crate) fn may_have_program(&self, pid: u32) -> bool {
        readlinkat(&self.root, format!("{pid}/exe").as_str()) != Err(Errno::ENOENT)
    }

    /// Calls `each` with the PID of every process.
    ///
    /// # Errors
    /// Returns an error if the directory cannot be read.
    pub fn each_pid(&self, each: impl FnMut(u32)) -> io::Result<()> {
        each_number(self.root.as_fd(), each)
    }

    /// The thread ids of a process; empty if it has gone.
    ///
    /// # Errors
    /// Returns an error if the directory cannot be read for another reason.
    pub fn threads(&self, pid: u32) -> io::Result<Vec<u32>> {
        let mut tids = Vec::new();
        if let Some(tasks) = self.open(&format!("{pid}/task"), OFlag::O_RDONLY | OFlag::O_DIRECTORY)? {
            each_number(tasks.as_fd(), |tid| tids.push(tid))?;
        }
        Ok(tids)
    }
}

/// Calls `each` with every number that is the name of an entry, without an allocation per entry. Stops without an
/// error if the process goes while its threads are listed.
pub(crate) fn each_number(directory: BorrowedFd<'_>, mut each: impl FnMut(u32)) -> io::Result<()> {
    nix::unistd::lseek(directory, 0, nix::unistd::Whence::SeekSet)?;
    let mut buffer = [MaybeUninit::<u8>::uninit(); 8 * 1024];
    let mut entries = RawDir::new(directory, &mut buffer);
    while let Some(entry) = entries.next() {
        match entry {
            Ok(entry) => {
                if let Some(number) = parse_number(entry.file_name().to_bytes()) {
                    each(number);
                }
            }
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::SRCH) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Lists the threads of the directory `/proc/PID/task`, each once and by age. If `leader`, the PID, is given, its
/// `stat` is read after that, which has the number of threads; it is `None` if the process has gone.
///
/// The link count of the directory would be cheaper, but the kernel reads it without a lock: a thread that exits is no
/// longer counted a moment before it is no longer found, and another one that the listing has missed would take its
/// place in the count.
///
/// The count can only agree with the listing if no thread is created in between. So it is read as soon as the kernel
/// has returned the entries, before they are looked at.
pub(crate) fn list_threads(
    tasks: BorrowedFd<'_>,
    leader: Option<u32>,
) -> io::Result<(Vec<u32>, Option<Stat>)> {
    // For 1,000 threads at a time. The allocator tidies up when a block of 64 KiB is freed.
    const BUFFER: usize = 32 * 1024;
    nix::unistd::lseek(tasks, 0, nix::unistd::Whence::SeekSet)?;
    let mut buffer = Vec::with_capacity(BUFFER);
    let mut entries = RawDir::new(tasks, buffer.spare_capacity_mut());
    let (mut tids, mut seen, mut counted) = (Vec::new(), HashSet::new(), None);
    loop {
        let reads = entries.is_buffer_empty();
        match entries.next() {
            None | Some(Err(rustix::io::Errno::NOENT | rustix::io::Errno::SRCH)) => {
                return Ok((tids, counted));
            }
            Some(Err(errno)) => return Err(errno.into()),
            Some(Ok(entry)) => {
                if let Some(leader) = leader.filter(|_| reads) {
                    counted = stat_of_thread(tasks, leader)?;
                }
                if let Some(tid) = parse_number(entry.file_name().to_bytes())
                    && seen.insert(tid)
                {
                    tids.push(tid);
                }
            }
        }
    }
}

/// Reads `TID/stat` below the directory `/proc/PID/task`. Unlike `/proc/TID/stat`, it does not add up all threads of
/// the process, which takes long if there are many.
pub(crate) fn stat_of_thread(tasks: BorrowedFd<'_>, tid: u32) -> io::Result<Option<Stat>> {
    Ok(read(tasks, &format!("{tid}/stat"))?.and_then(|text| Stat::parse(&text)))
}

/// What `TID/schedstat` says about a thread (Documentation/scheduler/sched-stats.rst).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RunTime {
    /// The CPU time that it has used, in nanoseconds. The kernel brings it up to date at each clock tick, when the
    /// thread stops running, and when its affinity changes.
    pub(crate) nanoseconds: u64,
    /// How often it was given a CPU.
    pub(crate) turns: u64,
}

/// Reads `TID/schedstat` below the directory `/proc/PID/task`; `None` if the thread has gone, or the kernel does not
/// have the file.
pub(crate) fn run_time_of_thread(tasks: BorrowedFd<'_>, tid: u32) -> io::Result<Option<RunTime>> {
    run_time(tasks, &format!("{tid}/schedstat"))
}

fn run_time(directory: BorrowedFd<'_>, path: &str) -> io::Result<Option<RunTime>> {
    Ok(read(directory, path)?.and_then(|text| {
        let text = String::from_utf8_lossy(&text);
        let mut numbers = text.split_ascii_whitespace().map(str::parse);
        let (nanoseconds, _, turns) = (numbers.next()?.ok()?, numbers.next()?.ok()?, numbers.next()?.ok()?);
        Some(RunTime { nanoseconds, turns })
    }))
}

/// Reads `TID/stack` below the directory `/proc/PID/task`: the functions of the kernel that the thread is in.
///
/// May wait as long as another thread of the process is inside execve(2). Needs `CAP_SYS_ADMIN` and
/// `CAP_SYS_PTRACE`.
pub(crate) fn stack_of_thread(tasks: BorrowedFd<'_>, tid: u32) -> io::Result<Option<String>> {
    Ok(read(tasks, &format!("{tid}/stack"))?.map(|text| String::from_utf8_lossy(&text).into_owned()))
}

fn open(directory: BorrowedFd<'_>, path: &str, flags: OFlag) -> io::Result<Option<OwnedFd>> {
    match openat(directory, path, flags | OFlag::O_CLOEXEC, Mode::empty()) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::ENOENT | Errno::ESRCH) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Reads a file that the kernel generates in one piece: a read that does not fill the buffer has returned all of it.
fn read(directory: BorrowedFd<'_>, path: &str) -> io::Result<Option<Vec<u8>>> {
    let Some(fd) = open(directory, path, OFlag::O_RDONLY)? else { return Ok(None) };
    let mut text = vec![0; 4096];
    let mut filled = 0;
    loop {
        match nix::unistd::read(&fd, text.get_mut(filled..).unwrap_or_default()) {
            Ok(more) => filled += more,
            Err(Errno::ESRCH) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        }
        if filled < text.len() {
            text.truncate(filled);
            return Ok(Some(text));
        }
        text.resize(text.len() * 2, 0);
    }
}

fn parse_number(name: &[u8]) -> Option<u32> {
    if name.is_empty() {
        return None;
    }
    name.iter().try_fold(0_u32, |number, &b| {
        let digit = b.is_ascii_digit().then(|| u32::from(b - b'0'))?;
        number.checked_mul(10)?.checked_add(digit)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str = "S 4 17 17 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 \
        18 19 20 21 22 23 24 25 26 27 28 29 1792 \n";

    #[test]
    fn a_program_may_have_any_name() {
        for name in ["a", "a) Z (b", "", "a b\n", ") R 1 1"] {
            let stat = Stat::parse(format!("17 ({name}) {STAT}").as_bytes()).unwrap();
            let fields = (stat.state, stat.parent, stat.started, stat.exit_code);
            assert_eq!(fields, (b'S', 4, 4711, 1792), "{name}");
        }
        for text in ["", "17 (a", "17 (a) S", "17 (a) S x 17 17 0 -1 4194560"] {
            assert!(Stat::parse(text.as_bytes()).is_none(), "{text}");
        }
    }

    #[test]
    fn flags_and_states_of_stat() {
        let stat = |state: &str, flags: u64| {
            let text = STAT.replacen('S', state, 1).replacen("4194560", &flags.to_string(), 1);
            Stat::parse(format!("2 (x) {text}").as_bytes()).unwrap()
        };
        let kthreadd = stat("S", 2_129_984);
        assert!(kthreadd.is_kernel_thread() && !kthreadd.is_pinned_by_kernel());
        assert!(stat("S", 69_238_880).is_pinned_by_kernel());
        assert!(!stat("S", 4_194_560).is_kernel_thread());
        assert_eq!(["R", "S", "Z", "X"].map(|state| stat(state, 0).has_exited()), [false, false, true, true]);
        assert_eq!(["R", "Z", "T", "t"].map(|state| stat(state, 0).is_stopped()), [false, false, true, true]);
    }

    #[test]
    fn lines_of_status() {
        let text =
            "Name:\tUid: 7\nUid:\t1\t2\t3\t4\nGroups:\t\nCpus_allowed:\tff\nCpus_allowed_list:\t0-2,8\n";
        let status = Status(text.into());
        assert_eq!(status.numbers("Uid"), [1, 2, 3, 4]);
        assert!(status.numbers("Groups").is_empty());
        assert!(status.numbers("NSpid").is_empty());
        assert_eq!(status.field("Name"), Some("Uid: 7"));
        assert_eq!(status.allowed_cpus(), "0-2,8".parse().ok());
        let has_exited = |state: &str| Status(format!("Name:\tState: Z\nState:\t{state}\n")).has_exited();
        assert!(has_exited("Z (zombie)") && has_exited("X (dead)") && !has_exited("S (sleeping)"));
    }

    #[test]
    fn a_made_up_procfs_below_another_root() {
        let root = tempfile::tempdir().unwrap();
        let thread = root.path().join("17/task/18");
        std::fs::create_dir_all(&thread).unwrap();
        std::fs::create_dir(root.path().join("99999999999")).unwrap();
        std::fs::create_dir(root.path().join("sys")).unwrap();
        std::fs::write(root.path().join("17/stat"), format!("17 (a) {STAT}")).unwrap();
        std::fs::write(root.path().join("17/comm"), "a\x1bb\n").unwrap();
        std::fs::write(thread.join("status"), "Cpus_allowed_list:\t3\n").unwrap();
        let proc = ProcFs::at(root.path()).unwrap();
        let mut pids = Vec::new();
        proc.each_pid(|pid| pids.push(pid)).unwrap();
        assert_eq!(pids, [17]);
        assert_eq!(proc.threads(17).unwrap(), [18]);
        assert!(proc.threads(18).unwrap().is_empty());
        assert_eq!(proc.stat(17).unwrap().unwrap().parent, 4);
        assert_eq!(proc.program_name(17).as_deref(), Some(r#""a\u{1b}b""#));
        let status = proc.thread_status(17, 18).unwrap().unwrap();
        assert_eq!(status.allowed_cpus(), "3".parse().ok());
        assert!(proc.status(17).unwrap().is_none());
        assert!(ProcFs::at(&root.path().join("none")).is_err());
    }

    #[test]
    fn this_process_is_found() {
        let proc = ProcFs::new().unwrap();
        let stat = proc.stat(std::process::id()).unwrap().unwrap();
        assert!(stat.started > 0 && !stat.is_kernel_thread());
        assert_eq!(stat.parent, std::os::unix::process::parent_id());
        assert!(proc.stat(u32::MAX).unwrap().is_none());
        let mut found = false;
        proc.each_pid(|pid| found |= pid == std::process::id()).unwrap();
        assert!(found);
    }

    #[test]
    fn a_process_that_has_exited_has_no_program() {
        let proc = ProcFs::new().unwrap();
        assert!(proc.may_have_program(std::process::id()));
        assert!(!proc.may_have_program(u32::MAX));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        while proc.may_have_program(child.id()) {
            std::thread::yield_now();
        }
        child.wait().unwrap();
    }
}
