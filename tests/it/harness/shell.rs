//! A shell that stays and can be asked again and again.

use std::process::{Command, Stdio};

use super::Sleeper;

/// A shell that stays and can be asked again and again; killed when dropped.
pub struct Shell {
    process: Sleeper,
    input: std::process::ChildStdin,
    output: std::io::BufReader<std::process::ChildStdout>,
}

impl Shell {
    /// `command` starts a shell that reads its lines from standard input, such as `mount.bash("exec bash")`.
    pub fn start(command: &mut Command) -> Self {
        let mut process = Sleeper::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
        let input = process.child().stdin.take().expect("a pipe");
        let output = std::io::BufReader::new(process.child().stdout.take().expect("a pipe"));
        Self { process, input, output }
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// What the line prints on standard output.
    pub fn ask(&mut self, line: &str) -> String {
        self.tell(line);
        self.hear()
    }

    /// Has the line carried out; [`Shell::hear`] tells what came of it.
    pub fn tell(&mut self, line: &str) {
        use std::io::Write as _;
        writeln!(self.input, "{line}\necho; echo ---").expect("a shell that listens");
    }

    pub fn hear(&mut self) -> String {
        use std::io::BufRead as _;
        let mut said = String::new();
        while !said.ends_with("\n---\n") {
            assert_ne!(self.output.read_line(&mut said).expect("text"), 0, "the shell has gone: {said}");
        }
        // The empty line ends a last line without its newline.
        said.truncate(said.len() - "\n---\n".len());
        said
    }
}
