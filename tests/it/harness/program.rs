//! Copies of a test that do something else: programs whose threads, open files and system calls are what a test
//! needs them to be.
//!
//! The crate root has an `#[ignore]`d test of the name [`NAME`] with the table of all programs.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};

use super::Sleeper;

const NAME: &str = "program";
/// Says what a copy is to be.
const PROGRAM: &str = "KCM_TEST_PROGRAM";

/// Runs the program that the environment asks for; does nothing if this is not a copy that [`command`] started.
pub fn run(programs: &[(&str, fn())]) {
    let Ok(kind) = std::env::var(PROGRAM) else { return };
    let found = programs.iter().find(|(name, _)| *name == kind);
    let (_, program) = found.unwrap_or_else(|| panic!("no such program: {kind}"));
    program();
}

/// The program of this kind. `by`: a command that starts it, such as `unshare --pid --fork`.
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
    // Two threads: the program must not be the first one.
    let as_program = [NAME, "--exact", "--ignored", "--nocapture", "--test-threads=2"];
    command.args(as_program).env(PROGRAM, kind).stdin(Stdio::piped()).stdout(Stdio::piped());
    command
}

/// A running one; killed when dropped.
pub struct Program {
    process: Sleeper,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Program {
    /// Starts it and waits until it says [`ready`].
    pub fn start(command: &mut Command) -> Self {
        let mut process = Sleeper::spawn(command);
        let input = process.child().stdin.take().expect("a pipe");
        let output = BufReader::new(process.child().stdout.take().expect("a pipe"));
        let mut program = Self { process, input, output };
        while program.hear() != "ready" {}
        program
    }

    /// Its PID, or that of the command that has started it.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    pub fn say(&mut self, line: &str) {
        writeln!(self.input, "{line}").expect("a program that listens");
    }

    pub fn hear(&mut self) -> String {
        let mut line = String::new();
        assert_ne!(self.output.read_line(&mut line).expect("text"), 0, "the program has gone");
        line.trim_end().to_owned()
    }

    /// Kills and collects it.
    pub fn end(self) {
        self.process.end();
    }
}

// For the programs.

pub fn ready() {
    // Behind what the test harness has to say.
    println!("\nready");
}

/// The next line that is said to it; ends the program where nobody is there any more.
pub fn heard() -> String {
    let mut line = String::new();
    if std::io::stdin().read_line(&mut line).unwrap_or(0) == 0 {
        std::process::exit(0);
    }
    line.trim_end().to_owned()
}
