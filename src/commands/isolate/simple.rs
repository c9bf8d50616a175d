//! Lines that no shell is needed for.
//!
//! Owns which lines these are. A shell that starts a program for such a line would get the signals that are meant for the
//! program, and does nothing else. make(1) decides in the same way.

use std::ffi::OsStr;

use crate::cli::Program;

/// Words that the shell carries out itself, or that begin something else than a simple command (XCU 2.4, 2.14 of POSIX).
const OF_THE_SHELL: [&str; 56] = [
    "!", ".", ":", "[", "alias", "bg", "break", "case", "cd", "command", "continue", "do", "done", "echo",
    "elif", "else", "esac", "eval", "exec", "exit", "export", "false", "fg", "fi", "for", "function",
    "getopts", "hash", "if", "in", "jobs", "kill", "local", "printf", "pwd", "read", "readonly", "return",
    "select", "set", "shift", "source", "test", "then", "time", "times", "trap", "true", "type", "ulimit",
    "umask", "unalias", "unset", "until", "wait", "while",
];

/// Returns the program of a line that consists of a program and arguments, and the line itself otherwise.
pub(super) fn without_shell(program: Program) -> Program {
    match &program {
        Program::Shell { line, args } => match words(line) {
            Some((name, words)) => Program::Direct {
                program: name.into(),
                args: words.into_iter().map(Into::into).chain(args.iter().cloned()).collect(),
            },
            None => program,
        },
        Program::Direct { .. } => program,
    }
}

/// Returns the name of the program and the other words of such a line.
fn words(line: &OsStr) -> Option<(&str, Vec<&str>)> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_./+,:@%-= ".contains(c);
    let line = line.to_str().filter(|line| line.chars().all(is_plain))?;
    let mut words = line.split(' ').filter(|word| !word.is_empty());
    let name = words.next().filter(|name| !OF_THE_SHELL.contains(name) && !name.contains('='))?;
    Some((name, words.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_program_with_plain_words_needs_no_shell() {
        let direct =
            |line: &str| match without_shell(Program::Shell { line: line.into(), args: vec!["$x".into()] }) {
                Program::Direct { program, args } => Some(format!("{program:?} {args:?}")),
                Program::Shell { .. } => None,
            };
        assert_eq!(direct("sleep").unwrap(), r#""sleep" ["$x"]"#);
        assert_eq!(direct(" ./a-b  --c=1 /d ").unwrap(), r#""./a-b" ["--c=1", "/d", "$x"]"#);
        for line in [
            "", " ", "echo", "exit 7", "a; b", "a | b", "a > b", "a & b", "$a", "a $b", "a 'b'", "a \\b",
            "a*", "(a)", "{ a", "a\nb", "a\tb", "A=1 b", "while", "a #b", "~/a", "a?", "ä",
        ] {
            assert_eq!(direct(line), None, "{line:?}");
        }
    }
}
