//! `kcm state`: prints and checks a state directory, beside a daemon and without one, and never changes it.

use std::fs;
use std::path::Path;

use crate::harness::{KCM, Mount, Sleeper, run, write};

/// Every file with its content.
fn files(state: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(state).unwrap().map(Result::unwrap);
    let mut files: Vec<(String, Vec<u8>)> = entries
        .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
        .collect();
    files.sort();
    files
}

/// Runs `kcm state WORDS` on the directory, which stays as it is. Returns its output and exit status.
fn state(state: &Path, words: &[&str]) -> (String, Option<i32>) {
    let before = files(state);
    let mut command = std::process::Command::new(KCM);
    command.arg("state").args(words).arg("--state-dir").arg(state);
    let (out, err, status) = run(&mut command);
    assert_eq!(err, "");
    assert!(files(state) == before, "nothing is changed");
    (out, status)
}

#[test]
fn a_running_daemon_is_shown_and_has_no_problems() {
    let mount = Mount::with_dataplane();
    let task = Sleeper::new();
    write(&mount.tasks("dataplane", "0"), task.pid().to_string()).unwrap();
    assert_eq!(state(&mount.state(), &["check"]), (String::new(), Some(0)));
    let (text, status) = state(&mount.state(), &["show"]);
    assert_eq!(status, Some(0));
    for expected in [
        format!("used by the daemon with the supervisor {}", mount.supervisor()),
        "pool dataplane (exclusive, ".into(),
        "    list 1 (".into(),
        format!("claim of task {} on dataplane 0: ", task.pid()),
        "(this one)".into(),
    ] {
        assert!(text.contains(&expected), "{expected}: {text}");
    }
    let (text, _) = state(&mount.state(), &["show", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["claims"][0]["pid"], task.pid());
    assert_eq!(json["claims"][0]["list"], "dataplane 0");
    assert_eq!(json["supervisor"], mount.supervisor());
    assert_eq!((&json["intents"], &json["problems"]), (&serde_json::json!([]), &serde_json::json!([])));
}

#[test]
fn damage_is_reported_with_file_and_line() {
    let mount = Mount::with_dataplane();
    let tasks = [Sleeper::new(), Sleeper::new()];
    for (task, list) in tasks.iter().zip(["0", "1"]) {
        write(&mount.tasks("dataplane", list), task.pid().to_string()).unwrap();
    }
    mount.stop();
    let directory = mount.state();
    assert_eq!(state(&directory, &["check"]), (String::new(), Some(0)));
    assert!(state(&directory, &["show"]).0.contains("not in use"));
    for name in ["config", "claims"] {
        let file = directory.join(name);
        let sound = fs::read(&file).unwrap();
        let mut damaged = sound.clone();
        let second_line = sound.iter().position(|&b| b == b'\n').unwrap() + 12;
        damaged[second_line] ^= 1;
        fs::write(&file, &damaged).unwrap();
        let (problems, status) = state(&directory, &["check"]);
        let expected = format!("{}:2: the checksum does not match\n", file.display());
        assert!(problems.starts_with(&expected), "{problems}");
        assert_eq!(status, Some(1));
        let (text, status) = state(&directory, &["show"]);
        assert!(text.contains(&format!("problem: {name}:2: the checksum does not match")), "{text}");
        assert_eq!(status, Some(0));
        fs::write(&file, &sound).unwrap();
    }
}

#[test]
fn wrong_usage_and_a_missing_directory() {
    let (_, err, status) = run(std::process::Command::new(KCM).args(["state", "list"]));
    assert!(err.contains("list"), "{err}");
    assert_eq!(status, Some(2));
    let (out, err, status) =
        run(std::process::Command::new(KCM).args(["state", "check", "--state-dir=/nonexistent"]));
    assert!(err.contains("/nonexistent: cannot be read; give the --state-dir"), "{err}");
    assert_eq!((out.as_str(), status), ("", Some(1)));
    let (help, _, _) = run(std::process::Command::new(KCM).arg("--help"));
    assert!(!help.contains("state directory, for troubleshooting"), "{help}");
    let (page, _, _) = run(std::process::Command::new(KCM).args(["man", "state"]));
    assert!(page.contains("kcm\\-state"), "{page}");
}
