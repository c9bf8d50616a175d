//! `kcm status`: its exit status, what it prints, and that it answers in time.

use std::fs;
use std::time::{Duration, Instant};

use crate::harness::dir::Dir as _;
use crate::harness::{Mount, Plain, Sleeper, pin, run, until, write};
use serde_json::{Value, json};

/// Enough for the checks on a loaded machine.
const PATIENT: &str = "--timeout=60";

fn status(mount: &Mount) -> (Value, Option<i32>) {
    let (out, err, code) = run(&mut mount.kcm(&["status", "--json", PATIENT]));
    (serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{err}")), code)
}

#[test]
fn a_problem_is_named_with_its_cure_until_it_is_gone() {
    let mount = Mount::new();
    mount.make_pool("dataplane", true, &["0"]);
    mount.make_pool("shared", false, &["1"]);
    let (is, code) = status(&mount);
    // Other tests may have pinned processes on this CPU.
    let is_intruder = |problem: &&Value| problem["check"] == "intruders" || problem["check"] == "siblings";
    let problems = |is: &Value| -> Vec<Value> {
        is["problems"].as_array().unwrap().iter().filter(|it| !is_intruder(it)).cloned().collect()
    };
    assert_eq!(problems(&is), [json!(null); 0]);
    assert_eq!(code, Some(i32::from(is["state"] == "problems")));
    assert_eq!(is["pools"]["dataplane"]["free"], 1);
    assert_eq!(is["version"], mount.read("info/version").trim());

    let task = Sleeper::new();
    write(&mount.tasks("dataplane", "0"), task.pid().to_string()).unwrap();
    pin(task.pid(), &[0, 1]);
    let (is, code) = status(&mount);
    let expected = json!({
        "check": "masks",
        "cure": "kcm reconcile --repair moves it back",
        "problem": format!("{} (sleep) of dataplane:0 may run on 0-1", task.pid()),
    });
    assert_eq!((problems(&is), code), (vec![expected], Some(1)));
    let (out, err, code) = run(&mut mount.kcm(&["status", PATIENT]));
    let masks = out.lines().find(|line| line.starts_with("masks: ")).unwrap_or_else(|| panic!("{out}{err}"));
    assert!(masks.ends_with(" of dataplane:0 may run on 0-1; kcm reconcile --repair moves it back"), "{out}");
    assert!(out.contains("\ndataplane  exclusive  1      0     1      0\n"), "{out}");
    assert_eq!(code, Some(1));
    task.end();
    until("the list is free", || mount.tasks_of("dataplane", "0").is_empty());
    let (is, _) = status(&mount);
    assert_eq!((problems(&is), &is["pools"]["dataplane"]["tasks"]), (Vec::new(), &json!(0)));
}

#[test]
fn without_a_daemon_it_says_how_to_start_it() {
    let mount = Mount::with_dataplane();
    mount.stop();
    let (is, code) = status(&mount);
    assert_eq!((&is["state"], code), (&json!("notRunning"), Some(3)));
    let start = format!("start it: kcm mount --conf-dir={}", mount.conf().display());
    assert_eq!(is["problems"][0]["cure"], start);
    fs::remove_dir(mount.conf()).unwrap();
    assert_eq!(status(&mount).1, Some(3));
    let plain = Plain::new();
    assert_eq!(run(&mut plain.kcm(&["status"])).2, Some(3), "no pools");
    plain.make_pool("p", true, &[("0", "")]);
    let (out, err, _) = run(&mut plain.kcm(&["status", PATIENT]));
    assert!(out.contains(": a plain directory, which no daemon serves\n"), "{out}{err}");
}

#[test]
fn it_answers_in_time_if_the_daemon_does_not() {
    let mount = Mount::with_dataplane();
    let _paused = mount.pause();
    let begun = Instant::now();
    let (is, code) = {
        let (out, _, code) = run(&mut mount.kcm(&["status", "--json"]));
        (serde_json::from_str::<Value>(&out).unwrap(), code)
    };
    // Two seconds, and what a loaded machine adds.
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    assert_eq!((&is["state"], code), (&json!("notAnswering"), Some(3)));
    assert!(is["problems"][0]["problem"].as_str().unwrap().ends_with(": kcm mount does not answer"));
}

#[test]
fn it_answers_in_time_if_something_else_hangs() {
    let mount = Mount::with_dataplane();
    // A procfs that lets its reader wait.
    let proc = mount.home().join("proc");
    fs::create_dir_all(proc.join("1")).unwrap();
    for file in ["stat", "status"] {
        nix::unistd::mkfifo(&proc.join("1").join(file), nix::sys::stat::Mode::S_IRUSR).unwrap();
    }
    let begun = Instant::now();
    let (out, err, code) = run(mount.kcm(&["status"]).env("KCM_PROC_FS", &proc));
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    let expected = "checks: the checks take longer than --timeout; kcm node-report waits for them\n";
    assert!(out.ends_with(expected), "{out}{err}");
    assert_eq!(code, Some(1));
}
