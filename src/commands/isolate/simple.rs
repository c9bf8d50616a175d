//! Lines that no shell is needed for, or not until their end.
//!
//! Owns which lines these are. A shell that starts a program for such a line, or waits for the last one, would get the signals
//! that are meant for the program, and does nothing else. make(1) decides in the same way about lines without a shell.

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

/// Words that begin or end a compound command, and `trap`: after it the shell may have something to do at the end.
const COMPOUND: [&str; 20] = [
    "!", "case", "do", "done", "elif", "else", "esac", "fi", "for", "function", "if", "in", "select", "then",
    "time", "trap", "until", "while", "{", "}",
];

/// Returns the program of a line that consists of a program and arguments. Any other line is returned as a shell can carry it
/// out: with `exec` before its last command, if that is certain to be a program.
pub(super) fn without_shell(program: Program) -> Program {
    match &program {
        Program::Shell { line, args } => match words(line) {
            Some((name, words)) => Program::Direct {
                program: name.into(),
                args: words.into_iter().map(Into::into).chain(args.iter().cloned()).collect(),
            },
            None => match line.to_str().and_then(exec_last) {
                Some(line) => Program::Shell { line: line.into(), args: args.clone() },
                None => program,
            },
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

/// Returns the line with `exec` before its last command. Returns `None` if that is not certain to be a simple command that
/// runs a program: then the shell stays, as it always may.
fn exec_last(line: &str) -> Option<String> {
    let mut last = 0;
    let mut chars = line.char_indices().peekable();
    let mut before = ' ';
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => drop(chars.next()),
            '\'' => drop(chars.by_ref().find(|(_, c)| *c == '\'')?),
            '"' => skip_double_quotes(&mut chars)?,
            '(' | ')' | '`' | '#' => return None,
            '<' if before == '<' => return None,
            '&' if matches!(before, '<' | '>') => {}
            '&' if chars.peek().is_some_and(|(_, next)| *next == '>') => {}
            '|' if chars.peek().is_some_and(|(_, next)| *next == '|') => {
                chars.next();
                last = at + 2;
            }
            '|' => return None,
            ';' | '&' | '\n' => last = at + 1,
            _ => {}
        }
        before = c;
    }
    let is_end = |c: char| c.is_whitespace() || ";&|".contains(c);
    if line.split(is_end).any(|word| COMPOUND.contains(&word)) {
        return None;
    }
    let (head, tail) = line.split_at_checked(last)?;
    let command = tail.trim_start();
    let name = command.split(char::is_whitespace).next()?;
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_./+-".contains(c);
    let is_program = !name.is_empty() && name.chars().all(is_plain) && !OF_THE_SHELL.contains(&name);
    is_program.then(|| format!("{head}{}exec {command}", if head.is_empty() { "" } else { " " }))
}

/// Skips the rest of a word in double quotes. Returns `None` if it does not end, or contains a command.
fn skip_double_quotes(chars: &mut std::iter::Peekable<std::str::CharIndices<'_>>) -> Option<()> {
    loop {
        match chars.next()?.1 {
            '"' => return Some(()),
            '\\' => drop(chars.next()),
            '`' | '(' => return None,
            _ => {}
        }
    }
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
    #[test]
    fn the_last_program_of_a_line_replaces_the_shell() {
        for (line, expected) in [
            ("cd /src && make", "cd /src && exec make"),
            ("a; ./b 'c;d' \"e&f\" > g 2>&1", "a; exec ./b 'c;d' \"e&f\" > g 2>&1"),
            ("a || b", "a || exec b"),
            ("a & b $x", "a & exec b $x"),
            ("a\nb\tc", "a\n exec b\tc"),
            ("prog 'a  b'", "exec prog 'a  b'"),
            ("a &> f; b", "a &> f; exec b"),
            ("echo \\; b", "echo \\; b"),
        ] {
            let found = exec_last(line);
            assert_eq!(found.as_deref(), Some(expected).filter(|it| *it != line), "{line:?}");
        }
        for line in [
            "",
            "a;",
            "a &",
            "a | b",
            "a; echo b",
            "(a)",
            "a; (b)",
            "a; $b",
            "a; B=1 c",
            "if a; then b; fi",
            "trap x EXIT; b",
            "a $(b)",
            "a \"$(b)\"",
            "a `b`",
            "{ a; }",
            "! a",
            "a # b",
            "cat << E\nb\nE",
            "a 'b",
            "f() { b; }; f",
            "a; > f b",
            "for i in 1; do b; done",
        ] {
            assert_eq!(exec_last(line), None, "{line:?}");
        }
    }
}
