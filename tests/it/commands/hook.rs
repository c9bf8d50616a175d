//! `kcm hook`: claims for the process of a container's state, and refuses everything else with one line. `containers` has the
//! runtime.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::harness::{KCM, Mount, Plain, Sleeper, held, masks, text, until, write};
use serde_json::json;

/// Runs the hook with this on standard input. Returns its standard error and its status.
fn hook(command: &mut Command, state: &[u8]) -> (String, Option<i32>) {
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.spawn().expect("kcm");
    // It may have ended before it has read everything.
    let _ = child.stdin.take().expect("a pipe").write_all(state);
    let output = child.wait_with_output().expect("its output");
    assert_eq!(text(&output.stdout), "");
    (text(&output.stderr), output.status.code())
}

fn state(pid: u32) -> Vec<u8> {
    json!({ "ociVersion": "1.0.2", "id": "c", "status": "creating", "pid": pid, "bundle": "/nowhere" })
        .to_string()
        .into_bytes()
}

fn refused(command: &mut Command, state: &[u8]) -> String {
    let (err, code) = hook(command, state);
    let line = err.strip_prefix("ERROR:root:").and_then(|line| line.strip_suffix('\n'));
    let line = line.unwrap_or_else(|| panic!("not one line: {err:?}"));
    assert!(code == Some(1) && !line.contains(char::is_control) && line.len() < 500, "{code:?} {line}");
    line.to_owned()
}

#[test]
fn the_process_of_the_state_gets_a_list_or_the_named_one() {
    let mount = Mount::with_dataplane();
    let (first, second) = (Sleeper::new(), Sleeper::new());
    let said = hook(&mut mount.kcm(&["hook", "--pool=dataplane", "--list=1"]), &state(first.pid()));
    assert_eq!(said, (String::new(), Some(0)));
    let said = hook(&mut mount.kcm(&["hook", "--pool=dataplane"]), &state(second.pid()));
    assert_eq!(said, (String::new(), Some(0)));
    assert_eq!(held(&mount.tasks("dataplane", "1")), [first.pid()]);
    assert_eq!(
        (held(&mount.tasks("dataplane", "0")), masks(second.pid())),
        (vec![second.pid()], vec!["0".into()])
    );
    // A runtime starts hooks without an environment, and in any directory.
    let third = Sleeper::new();
    let mut bare = mount.kcm(&["hook", "--pool=dataplane"]);
    let line = refused(bare.env_clear().current_dir("/"), &state(third.pid()));
    let holder = format!("is held by {} (sleep)", first.pid());
    assert!(line.contains("no list of dataplane is free (2 taken)") && line.contains(&holder), "{line}");
    let line = refused(&mut mount.kcm(&["hook", "--pool=dataplane", "--list=1"]), &state(third.pid()));
    assert!(line.contains(&format!("dataplane 1 is held by {} (sleep)", first.pid())), "{line}");
}

#[test]
fn what_is_not_the_state_of_a_container_is_refused_with_one_line() {
    let mount = Mount::with_dataplane();
    let long = [br#"{"pid":1,"id":""#.as_slice(), &vec![b'x'; 8 << 20]].concat();
    let bytes: Vec<u8> = (0..=255).collect();
    for (input, expected) in [
        (b"".as_slice(), "standard input: not the state of a container"),
        (b"{", "standard input: not the state of a container"),
        (&bytes, "standard input: not the state of a container"),
        (b"{}", "standard input: the state of a container without a process"),
        (br#"{"pid":"\u001b[2J\n"}"#, "standard input: the state of a container has a pid that is not a PID"),
        (br#"{"pid":0}"#, "standard input: the state of a container has a pid that is not a PID"),
        (br#"{"pid":-7}"#, "standard input: the state of a container has a pid that is not a PID"),
        (br#"{"pid":4294967297}"#, "standard input: the state of a container has a pid that is not a PID"),
        (&vec![b'['; 1 << 20], "standard input: not the state of a container"),
        (&long, "standard input: longer than the state of a container"),
    ] {
        let line = refused(&mut mount.kcm(&["hook", "--pool=dataplane"]), input);
        assert!(line.starts_with(expected), "{line}");
    }
    // The kernel's first thread, the daemon, and a process that has ended.
    let mut ended = Command::new("true").spawn().unwrap();
    ended.wait().unwrap();
    for (pid, reason) in [(2, "kernel thread"), (mount.supervisor(), "kcm"), (ended.id(), "no such process")]
    {
        let line = refused(&mut mount.kcm(&["hook", "--pool=dataplane"]), &state(pid));
        assert!(line.to_lowercase().contains(reason), "{pid}: {line}");
    }
    assert_eq!(held(&mount.tasks("dataplane", "0")), [0; 0]);
}

#[test]
fn a_state_that_does_not_end_is_given_up() {
    let mount = Mount::with_dataplane();
    let mut command = mount.kcm(&["hook", "--pool=dataplane"]);
    let piped = command.stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    input.write_all(b"{").unwrap();
    // The pipe stays open.
    let output = child.wait_with_output().unwrap();
    assert_eq!(text(&output.stderr), "ERROR:root:standard input: no state of a container within 5 s\n");
    drop(input);
}

#[test]
fn an_unknown_pool_list_or_directory_is_named() {
    let mount = Mount::with_dataplane();
    let task = Sleeper::new();
    let state = state(task.pid());
    for (words, expected) in [
        (&["hook", "--pool=other"][..], "Requested pool other does not exist; the pools are dataplane"),
        (
            &["hook", "--pool=dataplane", "--list=7"],
            "pool dataplane has no CPU list 7; kcm cdi install writes",
        ),
    ] {
        let line = refused(&mut mount.kcm(words), &state);
        assert!(line.starts_with(expected), "{line}");
    }
    let plain = Plain::new();
    plain.make_pool("p", true, &[("0", "")]);
    let line = refused(&mut plain.kcm(&["hook", "--pool=p"]), &state);
    assert!(line.ends_with("a plain directory; this needs kcm mount, so run that first"), "{line}");
    for words in [&["--pool=../x"][..], &["--pool=p", "--list=../0"], &["--pool=p", "--list="], &[]] {
        let (_, code) = hook(Command::new(KCM).arg("hook").args(words), &state);
        assert_eq!(code, Some(2), "{words:?}");
    }
}

/// A bundle with these hooks.
fn make_bundle(home: &Path, hooks: &[&[&str]]) {
    let hooks: Vec<_> = hooks.iter().map(|args| json!({ "path": KCM, "args": args })).collect();
    let config = json!({ "ociVersion": "1.0.2", "hooks": { "createRuntime": hooks } });
    fs::write(home.join("config.json"), config.to_string()).unwrap();
}

#[test]
fn two_devices_in_a_container_are_refused() {
    let mount = Mount::with_dataplane();
    let task = Sleeper::new();
    let state = json!({ "pid": task.pid(), "bundle": mount.home() }).to_string();
    let other = ["nvidia", "hook"];
    make_bundle(
        mount.home(),
        &[&["kcm", "hook", "--pool=dataplane", "--list=0"], &other, &["kcm", "hook", "--pool=infra"]],
    );
    let line = refused(&mut mount.kcm(&["hook", "--pool=dataplane", "--list=0"]), state.as_bytes());
    assert_eq!(
        line,
        "the container has several devices of kcm: dataplane 0, infra; it can have one, so leave the others out"
    );
    assert_eq!(held(&mount.tasks("dataplane", "0")), [0; 0]);
    make_bundle(mount.home(), &[&["kcm", "hook", "--pool=dataplane", "--list=0"], &other]);
    let said = hook(&mut mount.kcm(&["hook", "--pool=dataplane", "--list=0"]), state.as_bytes());
    assert_eq!(said, (String::new(), Some(0)));
}

#[test]
fn a_daemon_that_does_not_answer_is_given_up_and_holds_nobody() {
    let mount = Mount::with_dataplane();
    let task = Sleeper::new();
    let paused = mount.pause();
    // The end of its standard error is awaited, too, as a runtime does it.
    let line = refused(&mut mount.kcm(&["hook", "--pool=dataplane"]), &state(task.pid()));
    assert!(line.starts_with(&format!("{}: kcm mount does not answer; ", mount.conf().display())), "{line}");
    drop(paused);
    until("it answers again", || fs::read_to_string(mount.tasks("dataplane", "0")).is_ok());
    write(&mount.tasks("dataplane", "0"), task.pid().to_string()).unwrap();
}

#[test]
fn a_daemon_that_is_replaced_is_waited_for_and_one_that_is_away_is_named() {
    let mount = Mount::with_dataplane();
    let task = Sleeper::new();
    mount.stop();
    let line = refused(&mut mount.kcm(&["hook", "--pool=dataplane"]), &state(task.pid()));
    assert!(line.contains("kcm mount is not running; start it: "), "{line}");
    let said = std::thread::scope(|scope| {
        let hook = scope.spawn(|| hook(&mut mount.kcm(&["hook", "--pool=dataplane"]), &state(task.pid())));
        mount.start();
        hook.join().unwrap()
    });
    assert_eq!(said, (String::new(), Some(0)));
    assert_eq!(held(&mount.tasks("dataplane", "0")), [task.pid()]);
}
