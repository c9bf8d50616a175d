//! `kcm apply` and `kcm export`: the whole configuration as a file.

use std::fs;
use std::io::Write as _;
use std::process::{Command, Stdio};

use crate::harness::{Mount, Sleeper, held, run, text, write};

const FILE: &str = "\
pools:
  dataplane:
    exclusive: true
    lists: [0]
  infra:
    tasks: {group: 7, mode: \"0664\"}
    lists: [1]
";

/// Runs `kcm apply` on a file with this text. Returns its output, messages and status.
fn apply(mount: &Mount, content: &str, words: &[&str]) -> (String, String, Option<i32>) {
    let file = mount.home().join("pools.yaml");
    fs::write(&file, content).unwrap();
    run(mount.kcm(&[&["apply"], words].concat()).arg("--file").arg(&file))
}

fn export(mount: &Mount) -> String {
    let (out, err, status) = run(&mut mount.kcm(&["export"]));
    assert_eq!((err.as_str(), status), ("", Some(0)));
    out
}

#[test]
fn a_file_becomes_the_configuration_and_a_second_run_changes_nothing() {
    let mount = Mount::new();
    mount.make_pool("infra", false, &["0"]);
    mount.make_pool("old", true, &["1"]);
    let task = Sleeper::new();
    write(&mount.tasks("infra", "0"), task.pid().to_string()).unwrap();
    let difference = "\
+ pool dataplane
~ dataplane exclusive 0 -> 1
~ list infra 0 -> dataplane
~ infra tasks group 0 -> 7
~ infra tasks mode 0644 -> 0664
~ list old 1 -> infra
- pool old
";
    let before = mount.read("info/config");
    assert_eq!(apply(&mount, FILE, &["--dry-run"]), (difference.into(), String::new(), Some(0)));
    assert_eq!(mount.read("info/config"), before);
    assert_eq!(apply(&mount, FILE, &[]), (difference.into(), String::new(), Some(0)));
    assert_eq!(apply(&mount, FILE, &[]), ("unchanged\n".into(), String::new(), Some(0)));
    assert_eq!(held(&mount.tasks("dataplane", "0")), [task.pid()]);
    assert_eq!(fs::read_dir(mount.conf().join("pools")).unwrap().count(), 2);
}

#[test]
fn what_is_exported_can_be_applied() {
    let mount = Mount::with_dataplane();
    mount.sh("chmod 0606 $C/pools/dataplane/1/tasks; echo 1 > $C/pools/dataplane/partial");
    let exported = export(&mount);
    let (out, _, _) = apply(&mount, &exported, &[]);
    assert_eq!(out, "unchanged\n", "{exported}");
    let other = Mount::new();
    assert_eq!(apply(&other, &exported, &[]).2, Some(0));
    assert_eq!(export(&other), exported);
    let mut child = other.kcm(&["apply", "-f", "-"]);
    let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(other.read("info/config").as_bytes()).unwrap();
    assert_eq!(text(&child.wait_with_output().unwrap().stdout), "unchanged\n", "JSON on stdin");
}

#[test]
fn a_list_with_tasks_is_removed_only_by_force() {
    let mount = Mount::with_dataplane();
    let task = Sleeper::new();
    write(&mount.tasks("dataplane", "0"), task.pid().to_string()).unwrap();
    let none = "pools: {}\n";
    let difference = "- list dataplane 0\n- list dataplane 1\n- pool dataplane\n";
    let why = format!(
        "ERROR:root:{}: dataplane 0 has live tasks, one is {} (sleep); release them first\n",
        mount.conf().join("info/config").display(),
        task.pid()
    );
    assert_eq!(apply(&mount, none, &[]), (String::new(), why.clone(), Some(1)));
    assert_eq!(apply(&mount, none, &["--dry-run"]), (difference.into(), why, Some(1)));
    assert_eq!(apply(&mount, none, &["--dry-run", "--force"]), (difference.into(), String::new(), Some(0)));
    assert_eq!(held(&mount.tasks("dataplane", "0")), [task.pid()]);
    assert_eq!(apply(&mount, none, &["--force"]), (difference.into(), String::new(), Some(0)));
    assert_eq!(fs::read_dir(mount.conf().join("pools")).unwrap().count(), 0);
}

#[test]
fn draining_and_what_is_not_in_the_file_about_owners_stays() {
    let mount = Mount::with_dataplane();
    mount.sh("echo drain > $C/pools/dataplane/0/state; chmod 0606 $C/pools/dataplane/tasks");
    let (out, _, _) = apply(&mount, "pools: {dataplane: {exclusive: true, lists: [1, 0]}}\n", &[]);
    assert_eq!(out, "unchanged\n");
    assert_eq!(mount.read("pools/dataplane/0/state"), "free draining\n");
}

#[test]
fn a_wrong_file_is_refused_with_its_line_and_without_a_daemon() {
    let mount = Mount::new();
    let file = mount.home().join("pools.yaml");
    for (content, expected) in [
        ("pools:\n  a:\n    list: [0]\n", ":3: unknown field"),
        ("pools:\n  a:\n    mode: fast\n", ":3: unknown variant"),
        (
            "pools:\n  a: {lists: [0]}\n  b: {lists: [0-1]}\n",
            ":3: pool b: CPU 0 is in a 0 already; remove that list first",
        ),
        (
            "pools:\n  a: {mode: isolated}\n",
            ":2: pool a: a is shared, and only exclusive lists can be isolated; write 1 to its file exclusive first",
        ),
        ("pools:\n  A: {}\n", ":2: pool A: a pool name is 1 to 63"),
        ("pool: {}\n", ":1: unknown field"),
    ] {
        let (out, err, status) = apply(&mount, content, &[]);
        let expected = format!("ERROR:root:{}{expected}", file.display());
        assert!(out.is_empty() && status == Some(1) && err.starts_with(&expected), "{content}: {err}");
        assert_eq!(err.lines().count(), 1);
    }
    let (_, err, status) = run(mount.kcm(&["apply", "--file"]).arg(mount.home().join("none")));
    assert!(status == Some(1) && err.ends_with("none: No such file or directory\n"), "{err}");
    let (_, _, status) = run(&mut mount.kcm(&["apply"]));
    assert_eq!(status, Some(2));
    mount.stop();
    let (_, err, status) = apply(&mount, FILE, &[]);
    assert!(status == Some(1) && err.contains("kcm mount is not running"), "{err}");
}

#[test]
fn two_at_once_are_one_after_the_other() {
    let mount = Mount::new();
    let files = [(0, "pools: {a: {lists: [0]}, b: {lists: [1]}}"), (1, "pools: {b: {lists: [0, 1]}}")];
    let files = files.map(|(number, content)| {
        let file = mount.home().join(format!("{number}.yaml"));
        fs::write(&file, content).unwrap();
        file
    });
    for _ in 0..10 {
        let start = |file| -> Command {
            let mut command = mount.kcm(&["apply", "--file"]);
            command.arg(file).stdout(Stdio::null());
            command
        };
        let children = files.each_ref().map(|file| start(file).spawn().unwrap());
        for mut child in children {
            assert!(child.wait().unwrap().success());
        }
        let now = mount.read("info/config").replace('\n', "");
        let first = r#"{"pools":{"a":{"lists":["0"]},"b":{"lists":["1"]}}}"#;
        let second = r#"{"pools":{"b":{"lists":["0","1"]}}}"#;
        assert!(now == first || now == second, "{now}");
    }
}
