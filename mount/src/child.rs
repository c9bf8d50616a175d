//! A command that a program of ours starts and waits for.
//!
//! Owns: nothing; it is the door of `process` to the outside. Must not know: what the command is for.

use std::io;
use std::process::{Child, Command};

use crate::process;

/// The command, once started, is killed when the thread that started it dies, and has no signals blocked.
pub fn set_pdeathsig(command: &mut Command) {
    process::set_pdeathsig(command);
}

/// How our children end can be waited for, also where whoever started us ignores SIGCHLD.
///
/// # Errors
/// What the kernel says.
pub fn reset_sigchld() -> io::Result<()> {
    process::reset_sigchld()
}

/// Sends a signal, which may be one of those that have no name, to a child that has not been collected.
///
/// # Errors
/// What the kernel says.
pub fn send(child: &Child, signal: u32) -> io::Result<()> {
    process::send_signal(child.id(), signal)
}
