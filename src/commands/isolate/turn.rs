//! Waiting in turn for a CPU list of a pool.
//!
//! Owns the line that says for what a program waits. Does not know the order of the queue: the daemon does.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};

use super::failure::Failure;
use crate::commands::common::deadline::Deadline;
use crate::confdir::ConfDir;

/// How long a task whose turn it is pauses before it claims again: the list was taken before the turn was withdrawn.
const PAUSE: Duration = Duration::from_millis(10);

/// A place in the queue of a pool, as long as this lives.
pub(super) struct Turn {
    queue: File,
    path: PathBuf,
}

impl Turn {
    /// Enters a task (`line` is its PID, or 0 for this process) at the end of the queue, and says so. `reason`: why it was refused.
    /// Returns `None` if the daemon is of a version without queues.
    ///
    /// # Errors
    /// The daemon refuses it.
    pub(super) fn enter(
        dir: &ConfDir,
        pool: &str,
        line: &str,
        reason: &str,
    ) -> Result<Option<Self>, Failure> {
        let path = dir.pool(pool).join("queue");
        let opened = OpenOptions::new().read(true).write(true).open(&path);
        let queue = match opened {
            Ok(queue) => queue,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Failure::of_file(dir, &path, error)),
        };
        (&queue).write_all(line.as_bytes()).map_err(|error| Failure::of_file(dir, &path, error))?;
        let mut turn = Self { queue, path };
        let before = turn.count_before().map_err(|error| Failure::of_file(dir, &turn.path, error))?;
        log::info!("waiting for {pool}: {}", waits_for(reason, before));
        Ok(Some(turn))
    }

    /// Returns how many tasks wait before this one.
    fn count_before(&mut self) -> io::Result<usize> {
        self.queue.rewind()?;
        let mut text = Vec::new();
        self.queue.read_to_end(&mut text)?;
        let text = String::from_utf8_lossy(&text);
        Ok(text.lines().take_while(|line| line.split(' ').nth(4) != Some("self")).count())
    }

    /// Waits until it is the turn of the task.
    ///
    /// # Errors
    /// The file cannot be polled.
    pub(super) fn wait(&self, dir: &ConfDir, deadline: Deadline) -> Result<(), Failure> {
        std::thread::sleep(PAUSE);
        match poll(&mut [PollFd::new(self.queue.as_fd(), PollFlags::POLLPRI)], deadline.poll_timeout()) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(Failure::of_file(dir, &self.path, errno.into())),
        }
    }
}

/// Returns for what a task waits: the holder, if the refusal names one, and how many wait before it.
fn waits_for(reason: &str, before: usize) -> String {
    let holder = reason.split("; ").find(|part| part.contains(" is held by "));
    let holder = holder.map(|part| part.trim_end_matches(", the longest time").to_owned());
    match (holder, before) {
        (Some(holder), 0) => holder,
        (Some(holder), before) => format!("{holder}, {before} before you"),
        (None, before) => format!("{before} before you"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waiter_reads_who_holds_a_list_and_how_many_wait() {
        let reason = "no list of p is free (2 taken); p 0-1 is held by 7 (x) for 180 s, the longest time; wait for one";
        assert_eq!(waits_for(reason, 2), "p 0-1 is held by 7 (x) for 180 s, 2 before you");
        assert_eq!(waits_for(reason, 0), "p 0-1 is held by 7 (x) for 180 s");
        let others = "the free lists of p are for 3 tasks that wait in turn; wait, too: kcm isolate --wait";
        assert_eq!(waits_for(others, 3), "3 before you");
    }
}
