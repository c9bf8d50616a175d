//! A command that a program of ours starts and waits for.
//!
//! Owns: nothing; it is the door of `process` to the outside. Must not know: what the command is for.

use std::io;
use std::process::{Child, Command};

use crate::process;

/// The command, once started, is killed when the thread that started it dies, and has no signals blocked.
pub fn tie_to_parent(command: &mut Command) {
    process::tie_to_parent(command);
}

/// How our children end can be waited for, also where whoever started us ignores SIGCHLD.
///
/// # Errors
/// What the kernel says.
pub fn can_be_waited_for() -> io::Result<()> {
    process::heed_children()
}

/// Sends a signal, which may be one of those that have no name, to a child that has not been collected.
///
/// # Errors
/// What the kernel says.
pub fn send(child: &Child, signal: u32) -> io::Result<()> {
    process::send_signal(child.id(), signal)
}
