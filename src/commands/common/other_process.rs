//! An answer from another process, within a bounded time.
//!
//! Owns the wait. Does not know what is asked.
//!
//! A process that reads a mount may hang, in a way that not even SIGKILL ends, if the daemon stops in between. So another
//! process reads, and this one waits.

use std::io::{self, Read as _};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// Returns what the command prints; `None` if it has not ended in time. Then it is killed as soon as that is possible.
///
/// # Errors
/// No process or thread can be started.
pub(crate) fn output_within(mut command: Command, most: Duration) -> io::Result<Option<String>> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let mut output = child.stdout.take().ok_or_else(|| io::Error::other("no pipe"))?;
    let (sender, answer) = mpsc::channel();
    std::thread::Builder::new().spawn(move || {
        let mut text = String::new();
        let _ = output.read_to_string(&mut text);
        let _ = sender.send(text);
    })?;
    let answer = answer.recv_timeout(most).ok();
    if answer.is_none() {
        let _ = child.kill();
    }
    // A command that runs periodically must not collect dead children. One that cannot be killed yet keeps the thread.
    let _ = std::thread::Builder::new().spawn(move || child.wait());
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_does_not_end_is_given_up() {
        let asked = |line: &str, most| {
            let mut command = Command::new("sh");
            command.args(["-c", line]);
            output_within(command, most).unwrap()
        };
        assert_eq!(asked("echo yes", Duration::from_secs(60)).as_deref(), Some("yes\n"));
        assert_eq!(asked("exec sleep 1000", Duration::from_millis(1)), None);
    }
}
