//! The output of commands, and how it is compared.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Standard output, standard error and status of a command.
pub fn run(command: &mut Command) -> (String, String, Option<i32>) {
    let Output { stdout, stderr, status } = command.output().expect("a command");
    (text(&stdout), text(&stderr), status.code())
}

/// The content of a file of `tests/data`, with each `{name}` replaced.
pub fn data(file: &str, names: &[(&str, &str)]) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(file);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    names.iter().fold(text, |text, (name, value)| text.replace(&format!("{{{name}}}"), value))
}

/// Asserts success with exactly this output.
pub fn says(command: &mut Command, expected: &str) {
    let (out, err, code) = run(command);
    assert_eq!((out.as_str(), err.as_str(), code), (expected, "", Some(0)), "{command:?}");
}

/// Asserts failure with one line that begins and ends like this, and no standard output.
pub fn fails(command: &mut Command, begin: &str, end: &str) {
    let (out, err, code) = run(command);
    assert_eq!((out.as_str(), code), ("", Some(1)), "{command:?}: {err}");
    let line = err.strip_suffix('\n').expect("a line");
    assert!(!line.contains('\n'), "{command:?}: {err}");
    let text = line.strip_prefix("ERROR:root:").unwrap_or_else(|| panic!("{command:?}: {err}"));
    assert!(text.starts_with(begin) && text.ends_with(end), "{command:?}: {text}");
}

/// The events in the text of `info/events`, each with its PID.
pub fn events(text: &str) -> Vec<(String, u32)> {
    let event = |line: &str| {
        let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
        let pid = line["pid"].as_u64().unwrap_or(0) as u32;
        (line["event"].as_str().expect("an event").to_owned(), pid)
    };
    text.lines().map(event).collect()
}

/// The JSON output of a command; asserts that it prints nothing else.
pub fn report(command: &mut Command) -> serde_json::Value {
    let (out, err, code) = run(command);
    assert_eq!((err.as_str(), code), ("", Some(0)), "{command:?}: {out}");
    serde_json::from_str(&out).expect("JSON")
}

/// The PIDs in one part of a report of reconcile.
pub fn pids_in(report: &serde_json::Value, part: &str) -> Vec<u64> {
    report[part]
        .as_array()
        .expect("a list")
        .iter()
        .map(|entry| entry["pid"].as_u64().expect("a PID"))
        .collect()
}
