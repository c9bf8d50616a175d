//! An unreachable API server: each command retries for a limited time and ends with one line; a periodic one continues.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use super::api_server::commands::{COMMANDS, assert_no_secret, cluster, kcm};
use super::api_server::{ADMIN, Fault};
use crate::harness::{Mount, text};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

#[test]
fn cut_connections_show_no_token() {
    let (server, mount) = (cluster(), Mount::with_dataplane());
    server.misbehave(Fault::Cut, usize::MAX, |_, _| true);
    let start = |words: &&[&str]| {
        let mut command = kcm(&mount, words, &server.kubeconfig(ADMIN), "DEBUG");
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let children: Vec<_> = COMMANDS.iter().map(start).collect();
    for (child, words) in children.into_iter().zip(COMMANDS) {
        let output = child.wait_with_output().unwrap();
        let err = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{words:?} {err}");
        assert!(err.contains("; trying again in ") && err.contains("; gave up after "), "{words:?} {err}");
        assert_no_secret(&format!("{}{err}", text(&output.stdout)), ADMIN);
    }
    assert!(mount.pool("dataplane").exists(), "nothing is removed");
}

#[test]
fn an_unreachable_server_is_tried_for_30_seconds() {
    let (server, mount) = (cluster(), Mount::with_dataplane());
    let kubeconfig = fs::read_to_string(server.kubeconfig(ADMIN)).unwrap();
    // A port on which nothing listens: it was free a moment ago.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let file = mount.home().join("kubeconfig");
    fs::write(&file, kubeconfig.replace(&server.address().to_string(), &free.to_string())).unwrap();
    let start = |words: &[&str]| -> Child {
        let mut command = kcm(&mount, words, &file, "ERROR");
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let started = Instant::now();
    let once: Vec<Child> = COMMANDS.iter().map(|words| start(words)).collect();
    let loops = ["discover", "node-report --publish", "reconcile --publish"].map(|words| {
        let words: Vec<&str> = words.split(' ').chain(["--interval=1"]).collect();
        start(&words)
    });
    for (child, words) in once.into_iter().zip(COMMANDS) {
        let output = child.wait_with_output().unwrap();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert_eq!((output.status.code(), err.lines().count()), (Some(1), 1), "{words:?} {err}");
        assert!(started.elapsed() > Duration::from_secs(20), "{words:?} was tried for long");
        assert!(err.contains("Connection refused") && err.contains("; gave up after "), "{words:?} {err}");
        assert_eq!(
            !out.is_empty(),
            words.contains(&"--publish"),
            "a report is on stdout all the same: {out}"
        );
    }
    for mut child in loops {
        assert!(child.try_wait().unwrap().is_none(), "the periodic command continues");
        kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "SIGTERM ends it with success");
        let out = text(&output.stdout);
        // `discover` reports nothing, and the others only what is new.
        assert!(out.is_empty() || out.starts_with("{\"time\":\""), "{out}");
        assert!(text(&output.stderr).lines().count() > 1, "each run has tried");
    }
}

#[test]
fn an_uninstall_that_waits_for_the_server_does_not_hold_the_lock() {
    let (server, mount) = (cluster(), Mount::with_dataplane());
    server.misbehave(Fault::Cut, usize::MAX, |_, _| true);
    let mut command = kcm(&mount, &["uninstall"], &server.kubeconfig(ADMIN), "DEBUG");
    let mut uninstall = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(uninstall.stderr.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.any(|line| line.contains("; trying again in ")), "the server does not answer");
    let lock = fs::File::open(mount.conf().join("lock")).unwrap();
    let locked = nix::fcntl::Flock::lock(lock, nix::fcntl::FlockArg::LockExclusiveNonblock);
    let held = uninstall.try_wait().unwrap().is_none();
    uninstall.kill().unwrap();
    uninstall.wait().unwrap();
    assert!(locked.is_ok() && held, "the lock is free while the command waits: {locked:?}");
}
