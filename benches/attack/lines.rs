//! A program of the measurement and what it says, line by line, without a wait that has no bound: a process that waits
//! in the kernel for a filesystem may never end.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// How long a killed process may take to end.
const TO_DIE: Duration = Duration::from_secs(1);

/// A running program; killed when dropped.
pub struct Talker {
    child: Child,
    said: Receiver<(Instant, String)>,
}

impl Talker {
    /// Starts this program with other arguments.
    pub fn start(args: &[&str]) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("a process");
        let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        let (sender, said) = channel();
        // Ends with the program, or when nobody listens.
        std::thread::spawn(move || {
            stdout.lines().map_while(Result::ok).try_for_each(|line| sender.send((Instant::now(), line)))
        });
        Self { child, said }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn say(&mut self, line: &str) {
        // If it has ended, it does not answer.
        let _ = self.child.stdin.as_mut().map(|stdin| writeln!(stdin, "{line}"));
    }

    /// The next line, and when it was said.
    ///
    /// # Errors
    /// It has closed its output, or says nothing until the deadline.
    pub fn hear(&self, deadline: Instant) -> Result<(Instant, String), RecvTimeoutError> {
        self.said.recv_timeout(deadline.saturating_duration_since(Instant::now()))
    }

    /// Kills it. Returns whether it has ended.
    pub fn end(&mut self) -> bool {
        let _ = self.child.kill();
        let deadline = Instant::now() + TO_DIE;
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        false
    }
}

impl Drop for Talker {
    fn drop(&mut self) {
        self.end();
    }
}
