//! Child processes of programs other than the daemon.
//!
//! Owns nothing: it makes a part of `process` public. Does not know what the child is for.

use std::io;
use std::process::{Child, Command};

use crate::process;

/// Makes the command die with `SIGKILL` when the thread that starts it ends, and unblocks all signals in it.
pub fn set_pdeathsig(command: &mut Command) {
    process::set_pdeathsig(command);
}

/// Makes the command start with the `SIGPIPE` that this program was started with: ignored or not. Rust ignores it before
/// `main` and would set it to its default action in the command.
pub fn keep_sigpipe(command: &mut Command) {
    process::keep_sigpipe(command);
}

/// Sets `SIGCHLD` to its default action, so that children can be waited for even if the starter of this program ignored
/// it.
///
/// # Errors
/// Returns the error of sigaction(2).
pub fn reset_sigchld() -> io::Result<()> {
    process::reset_sigchld()
}

/// Sends a signal, which may be a real-time signal, to a child that has not been waited for.
///
/// # Errors
/// Returns the error of kill(2).
pub fn send(child: &Child, signal: u32) -> io::Result<()> {
    process::send_signal(child.id(), signal)
}
