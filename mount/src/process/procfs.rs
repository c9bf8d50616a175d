//! What /proc says, read with as few copies as it can be.
//!
//! Owns: the formats of proc(5) that are needed. Must not know: pidfds.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{Mode, fstatat};

use super::sys;

/// A kernel thread (`PF_KTHREAD`, include/linux/sched.h).
const PF_KTHREAD: u64 = 0x0020_0000;
/// Its affinity is the kernel's business alone (`PF_NO_SETAFFINITY`).
const PF_NO_SETAFFINITY: u64 = 0x0400_0000;

/// An open /proc.
#[derive(Debug)]
pub(super) struct ProcFs {
    root: OwnedFd,
}

/// The fields of `/proc/PID/stat` that are needed.
#[derive(Clone, Debug)]
pub(super) struct Stat {
    pub(super) state: u8,
    flags: u64,
    /// In clock ticks since boot.
    pub(super) started: u64,
    /// As wait(2) gives it.
    pub(super) exit_code: i32,
}

impl Stat {
    pub(super) fn is_kernel_thread(&self) -> bool {
        self.flags & PF_KTHREAD != 0
    }

    pub(super) fn is_pinned_by_the_kernel(&self) -> bool {
        self.flags & PF_NO_SETAFFINITY != 0
    }
}

impl ProcFs {
    pub(super) fn new() -> io::Result<Self> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Self { root: nix::fcntl::open("/proc", flags, Mode::empty())? })
    }

    pub(super) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// A descriptor of a file or directory; None where the process has gone.
    pub(super) fn open(&self, path: &str, flags: OFlag) -> io::Result<Option<OwnedFd>> {
        open(self.root(), path, flags)
    }

    /// How many directories there are in a directory, as its links tell; None where the process has gone.
    pub(super) fn directories(&self, path: &str) -> io::Result<Option<u64>> {
        match fstatat(self.root(), path, AtFlags::empty()) {
            // Its own name and `.` are links too (fs/proc/base.c, `proc_task_getattr`).
            Ok(stat) => Ok(Some(stat.st_nlink.saturating_sub(2))),
            Err(Errno::ENOENT | Errno::ESRCH) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The text of a file; None where the process has gone.
    pub(super) fn read(&self, path: &str) -> io::Result<Option<Vec<u8>>> {
        read(self.root(), path)
    }

    /// `/proc/PID/stat`; of a thread too.
    pub(super) fn stat(&self, tid: u32) -> io::Result<Option<Stat>> {
        Ok(self.read(&format!("{tid}/stat"))?.and_then(|text| parse_stat(&text)))
    }

    /// False for threads of the kernel and for who has ended: they run no program.
    pub(super) fn may_have_program(&self, pid: u32) -> bool {
        readlinkat(self.root(), format!("{pid}/exe").as_str()) != Err(Errno::ENOENT)
    }

    /// A line of `/proc/PID/status`, as words behind its name.
    pub(super) fn status(&self, tid: u32, names: &[&str]) -> io::Result<Option<Vec<Vec<u32>>>> {
        let Some(text) = self.read(&format!("{tid}/status"))? else { return Ok(None) };
        let text = String::from_utf8_lossy(&text);
        let line = |name: &&str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.unwrap_or("").split_whitespace().filter_map(|word| word.parse().ok()).collect()
        };
        Ok(Some(names.iter().map(line).collect()))
    }

    /// Every number that is a directory's name, without an allocation an entry.
    pub(super) fn numbers(directory: BorrowedFd<'_>, mut each: impl FnMut(u32)) -> io::Result<()> {
        nix::unistd::lseek(directory, 0, nix::unistd::Whence::SeekSet)?;
        let mut buffer = [0_u8; 8 * 1024];
        loop {
            let filled = match sys::getdents(directory, &mut buffer) {
                Ok(filled) => filled,
                // The process has gone while its threads were listed.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {
                    return Ok(());
                }
                Err(error) => return Err(error),
            };
            if filled == 0 {
                return Ok(());
            }
            let mut rest = buffer.get(..filled).unwrap_or_default();
            // struct linux_dirent64: inode and offset (8 bytes each), record length (2), type (1), name.
            while let Some(length) = rest.get(16..18).and_then(|b| b.try_into().ok()).map(u16::from_ne_bytes)
            {
                let name = rest.get(19..).unwrap_or_default().split(|&b| b == 0).next().unwrap_or_default();
                if let Some(number) = parse_number(name) {
                    each(number);
                }
                rest = rest.get(length.max(19) as usize..).unwrap_or_default();
            }
        }
    }
}

fn open(directory: BorrowedFd<'_>, path: &str, flags: OFlag) -> io::Result<Option<OwnedFd>> {
    match openat(directory, path, flags | OFlag::O_CLOEXEC, Mode::empty()) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::ENOENT | Errno::ESRCH) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// The text of a file that the kernel makes in one piece: a read that is not filled has had all of it.
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

/// `/proc/PID/task/TID/stat`, from the directory `/proc/PID/task`: unlike `/proc/TID/stat` it does not add up all
/// threads of the task.
pub(super) fn stat_of_thread(tasks: BorrowedFd<'_>, tid: u32) -> io::Result<Option<Stat>> {
    Ok(read(tasks, &format!("{tid}/stat"))?.and_then(|text| parse_stat(&text)))
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

/// The name of the program, in parentheses, may itself hold spaces and parentheses: fields count from the
/// last one.
fn parse_stat(text: &[u8]) -> Option<Stat> {
    let end = text.iter().rposition(|&b| b == b')')?;
    let rest = std::str::from_utf8(text.get(end + 1..)?).ok()?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    // The first one here is field 3 of proc(5).
    let field = |number: usize| fields.get(number - 3).copied();
    Some(Stat {
        state: *field(3)?.as_bytes().first()?,
        flags: field(9)?.parse().ok()?,
        started: field(22)?.parse().ok()?,
        exit_code: field(52)?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_may_have_any_name() {
        let text = b"17 (a) Z (b)) S 4 17 17 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 1792 \n";
        let stat = parse_stat(text).unwrap();
        assert_eq!((stat.state, stat.started, stat.exit_code), (b'S', 4711, 1792));
    }

    #[test]
    fn our_own_stat_is_read() {
        let proc = ProcFs::new().unwrap();
        let stat = proc.stat(std::process::id()).unwrap().unwrap();
        assert!(stat.started > 0);
        assert!(!stat.is_kernel_thread());
        assert!(proc.may_have_program(std::process::id()));
        assert!(!proc.may_have_program(u32::MAX));
        // Like a thread of the kernel, one that has ended and that nobody has collected has no memory.
        let mut ended = std::process::Command::new("true").spawn().unwrap();
        while proc.may_have_program(ended.id()) {
            std::thread::yield_now();
        }
        ended.wait().unwrap();
        assert_eq!(proc.stat(u32::MAX).unwrap().map(|_| ()), None);
        let mut found = false;
        ProcFs::numbers(proc.root(), |number| found |= number == std::process::id()).unwrap();
        assert!(found);
    }
}
