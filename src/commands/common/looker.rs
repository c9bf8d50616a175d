//! Another process of the same program that looks at a mount, for a command that keeps running.
//!
//! Owns the process. Does not wait for it: it may hang with the mount. Does not know what is done with an answer.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, Command, Stdio};

use anyhow::{Context as _, Error};
use kcm_mount::child;
use serde::de::DeserializeOwned;

/// The flag by which the program becomes the process that looks.
const LOOK: &str = "--look";

/// A message of the process that looks, whose answers are lines of JSON.
pub(crate) enum Heard<A> {
    Answer(A),
    /// It has ended.
    End,
}

/// A process that looks; killed when dropped.
pub(crate) struct Looker {
    /// Always there until this is dropped.
    child: Option<Child>,
    requests: ChildStdin,
}

impl Looker {
    /// Starts it. `hear` is called by a thread, and returns whether it wants to hear more. The process dies with the thread
    /// that calls this.
    ///
    /// # Errors
    /// No process or thread can be started.
    pub(crate) fn start<A: DeserializeOwned>(
        errors: Stdio,
        hear: impl Fn(Heard<A>) -> bool + Send + 'static,
    ) -> Result<Self, Error> {
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
        Ok(Self { child: Some(child), requests })
    }

    /// Asks for one answer.
    ///
    /// # Errors
    /// The process has ended.
    pub(crate) fn ask(&mut self) -> io::Result<()> {
        self.requests.write_all(b"\n")
    }
}

impl Drop for Looker {
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        let _ = child.kill();
        // A command that keeps running must not collect dead children. One that cannot be killed yet keeps the thread.
        let _ = std::thread::Builder::new().spawn(move || child.wait());
    }
}
