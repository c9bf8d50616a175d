//! Programs for tests: copies of the test binary with the threads, open files and system calls that a test needs.
//!
//! The crate root has an ignored test named [`NAME`] with the table of all programs.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};

use super::Sleeper;

const NAME: &str = "program";
/// The variable that selects the program.
const PROGRAM: &str = "KCM_TEST_PROGRAM";

/// Runs the program that the environment asks for; does nothing if this is not a copy that [`command`] started.
pub fn run(programs: &[(&str, fn())]) {
    let Ok(kind) = std::env::var(PROGRAM) else { return };
    let found = programs.iter().find(|(name, _)| *name == kind);
    let (_, program) = found.unwrap_or_else(|| panic!("no such program: {kind}"));
    program();
}

/// A command that starts the program. `by`: a command in front of it, such as `unshare --pid --fork`.
pub fn command(by: &[&str], kind: &str) -> Command {
    let this = std::env::current_exe().expect("a path");
    let mut command = match by {
        [] => Command::new(&this),
        [first, rest @ ..] => {
            let mut command = Command::new(first);
            command.args(rest).arg(&this);
            command
        }
    };
    // Two test threads, so that the program does not run in the first thread of the process.
    let as_program = [NAME, "--exact", "--ignored", "--nocapture", "--test-threads=2"];
    command.args(as_program).env(PROGRAM, kind).stdin(Stdio::piped()).stdout(Stdio::piped());
    command
}

/// A running program; killed when dropped.
pub struct Program {
    process: Sleeper,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Program {
    /// Starts it and waits for [`ready`].
    pub fn start(command: &mut Command) -> Self {
        let mut process = Sleeper::spawn(command);
        let input = process.child().stdin.take().expect("a pipe");
        let output = BufReader::new(process.child().stdout.take().expect("a pipe"));
        let mut program = Self { process, input, output };
        while program.hear() != "ready" {}
        program
    }

    /// Its PID, or the PID of the command in front of it.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    pub fn say(&mut self, line: &str) {
        writeln!(self.input, "{line}").expect("a program that reads");
    }

    pub fn hear(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.output.read_line(&mut line).expect("text"), 0, "the program has ended");
            // The program is a test, and its library says so if it takes long.
            if !line.contains(" has been running for over ") {
                return line.trim_end().to_owned();
            }
        }
    }

    /// Kills and reaps it.
    pub fn end(self) {
        self.process.end();
    }
}

// Functions for the programs.

pub fn ready() {
    // On its own line, after the output of the test harness.
    println!("\nready");
}

/// The next line of input; ends the program at the end of the input.
pub fn heard() -> String {
    let mut line = String::new();
    if std::io::stdin().read_line(&mut line).unwrap_or(0) == 0 {
        std::process::exit(0);
    }
    line.trim_end().to_owned()
}
