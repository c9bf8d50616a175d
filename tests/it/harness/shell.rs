//! A shell that keeps running and runs one line after the other.

use std::process::{Command, Stdio};

use super::Sleeper;

/// A running shell; killed when dropped.
pub struct Shell {
    process: Sleeper,
    input: std::process::ChildStdin,
    output: std::io::BufReader<std::process::ChildStdout>,
}

impl Shell {
    /// `command` starts a shell that reads its standard input, such as `mount.bash("exec bash")`.
    pub fn start(command: &mut Command) -> Self {
        let mut process = Sleeper::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
        let input = process.child().stdin.take().expect("a pipe");
        let output = std::io::BufReader::new(process.child().stdout.take().expect("a pipe"));
        Self { process, input, output }
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Runs a line; returns its standard output.
    pub fn ask(&mut self, line: &str) -> String {
        self.tell(line);
        self.hear()
    }

    /// Sends a line without waiting; [`Shell::hear`] returns its output.
    pub fn tell(&mut self, line: &str) {
        use std::io::Write as _;
        writeln!(self.input, "{line}\necho; echo ---").expect("a shell that reads");
    }

    pub fn hear(&mut self) -> String {
        use std::io::BufRead as _;
        let mut printed = String::new();
        while !printed.ends_with("\n---\n") {
            assert_ne!(
                self.output.read_line(&mut printed).expect("text"),
                0,
                "the shell has ended: {printed}"
            );
        }
        // The empty line completes a last line without a newline.
        printed.truncate(printed.len() - "\n---\n".len());
        printed
    }
}
