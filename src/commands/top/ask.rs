//! The other end of the process that looks: starts it, asks it, and hears its answers.
//!
//! Owns the process. Does not wait for it: it may hang with the mount. Does not know what is done with an answer.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, Command, Stdio};

use anyhow::{Context as _, Error};
use kcm_mount::child;

use super::sample::Answer;

/// The flag by which the program becomes the process that looks.
const LOOK: &str = "--look";

/// A message of the process that looks.
pub(super) enum Heard {
    Answer(Answer),
    /// It has ended.
    End,
}

/// A process that looks; killed when dropped.
pub(super) struct Looker {
    child: Child,
    requests: ChildStdin,
}

impl Looker {
    /// Starts it. `hear` is called by a thread, and returns whether it wants to hear more. The process dies with the thread
    /// that calls this.
    ///
    /// # Errors
    /// No process or thread can be started.
    pub(super) fn start(errors: Stdio, hear: impl Fn(Heard) -> bool + Send + 'static) -> Result<Self, Error> {
        let mut command = Command::new("/proc/self/exe");
        command.args(std::env::args_os().skip(1)).arg(LOOK);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(errors);
        child::set_pdeathsig(&mut command);
        let mut child =
            command.spawn().context("no process can be started; look at the limits of this user")?;
        let requests = child.stdin.take().context("no pipe")?;
        let answers = BufReader::new(child.stdout.take().context("no pipe")?);
        std::thread::Builder::new().spawn(move || {
            for line in answers.lines() {
                // A line that the same program has not written completely: it was killed.
                let Some(answer) = line.ok().and_then(|line| serde_json::from_str(&line).ok()) else { break };
                if !hear(Heard::Answer(answer)) {
                    return;
                }
            }
            hear(Heard::End);
        })?;
        Ok(Self { child, requests })
    }

    /// Asks for one answer.
    ///
    /// # Errors
    /// The process has ended.
    pub(super) fn ask(&mut self) -> io::Result<()> {
        self.requests.write_all(b"\n")
    }
}

impl Drop for Looker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        // It is collected if it has ended, and otherwise by the process that inherits it.
        let _ = self.child.try_wait();
    }
}
