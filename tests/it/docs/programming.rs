//! The programs in docs/programming.md run, and do what the page says.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::harness::dir::Dir as _;
use crate::harness::{Mount, Sleeper, run, until, write};

/// The programs of the page: the heading above each, its language, and its text.
fn programs() -> Vec<(String, String, String)> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/programming.md");
    let page = fs::read_to_string(page).unwrap();
    let (mut found, mut heading, mut rest) = (Vec::new(), String::new(), page.as_str());
    while let Some((before, block)) = rest.split_once("\n```") {
        heading =
            before.lines().filter_map(|line| line.strip_prefix("## ")).next_back().unwrap_or(&heading).into();
        let (language, block) = block.split_once('\n').unwrap();
        let (text, after) = block.split_once("\n```").unwrap();
        found.push((heading.clone(), language.to_owned(), format!("{text}\n")));
        rest = after;
    }
    found
}

/// Returns the words that start the program, which is compiled if need be.
fn ready(directory: &Path, number: usize, language: &str, text: &str) -> Vec<PathBuf> {
    let source = directory.join(format!("program{number}.{language}"));
    let program = directory.join(format!("program{number}"));
    fs::write(&source, text).unwrap();
    let mut compiler = match language {
        "sh" => return vec!["sh".into(), source],
        "python" => return vec!["python3".into(), source],
        "c" => {
            let mut compiler = Command::new("cc");
            compiler.args(["-Wall", "-Wextra", "-Werror", "-x", "c"]);
            compiler
        }
        "rust" => {
            let mut compiler = Command::new("rustc");
            compiler.args(["--edition=2024", "-Dwarnings"]);
            compiler
        }
        "go" => {
            // The compiler of GCC: the other one is four times as large, and compiles its library first.
            let mut compiler = Command::new("gccgo");
            compiler.args(["-Wall", "-Werror"]);
            compiler
        }
        "java" => {
            let classes = directory.join(format!("classes{number}"));
            let source = directory.join("Claim.java");
            fs::write(&source, text).unwrap();
            let mut compiler = Command::new("javac");
            compiler.args(["-Xlint:all", "-Werror", "-d"]).arg(&classes).arg(source);
            return compiled(&mut compiler, vec!["java".into(), "-cp".into(), classes, "Claim".into()]);
        }
        other => panic!("no way to run {other}"),
    };
    compiled(compiler.arg(&source).arg("-o").arg(&program), vec![program.clone()])
}

/// Runs a compiler; returns the words.
fn compiled(compiler: &mut Command, words: Vec<PathBuf>) -> Vec<PathBuf> {
    let output = compiler.output().unwrap_or_else(|error| panic!("{compiler:?}: {error}"));
    assert!(output.status.success(), "{compiler:?}: {}", String::from_utf8_lossy(&output.stderr));
    words
}

#[test]
fn every_program_claims_and_says_why_it_is_refused() {
    let mount = Mount::new();
    mount.make_pool("p", true, &["0"]);
    let programs = programs();
    let languages: Vec<&str> = programs.iter().map(|(_, language, _)| language.as_str()).collect();
    assert_eq!(languages, ["sh", "python", "c", "rust", "go", "java", "python", "go"]);
    for (number, (heading, language, text)) in programs.iter().enumerate() {
        let words = ready(mount.home(), number, language, text);
        let command = || {
            let mut command = Command::new(&words[0]);
            command.args(&words[1..]).arg(mount.conf()).arg("p");
            command
        };
        assert_eq!(run(&mut command()), ("0\n".to_owned(), String::new(), Some(0)), "{heading}");
        let holder = Sleeper::new();
        until("the list is free", || write(&mount.tasks("p", "0"), holder.pid().to_string()).is_ok());
        if heading.starts_with("Waiting") {
            let waiting = command().stdout(Stdio::piped()).spawn().unwrap();
            std::thread::sleep(std::time::Duration::from_millis(300));
            assert_eq!(mount.tasks_of("p", "0"), holder.pid().to_string());
            holder.end();
            let output = waiting.wait_with_output().unwrap();
            assert_eq!((output.stdout.as_slice(), output.status.code()), (&b"0\n"[..], Some(0)), "{heading}");
        } else {
            let (out, err, status) = run(&mut command());
            assert_eq!((out.as_str(), status), ("", Some(1)), "{heading}: {err}");
            assert!(err.contains(&format!("p 0 is held by {} (sleep)", holder.pid())), "{heading}: {err}");
            holder.end();
        }
    }
}
