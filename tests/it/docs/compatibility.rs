//! Promises of docs/compatibility.md that no other test covers.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::harness::{KCM, Machine, Plain, kcm_for, run, says};

/// The help of a command, one entry per flag: what follows `--flag` until the next flag.
fn flags(command: &str) -> BTreeMap<String, String> {
    let (help, err, status) = run(Command::new(KCM).args([command, "--help"]));
    assert_eq!((err.as_str(), status), ("", Some(0)), "{command}");
    let entries = help.split("\n      --").skip(1);
    let name = |entry: &str| entry.split([' ', '\n']).next().unwrap_or_default().to_owned();
    entries.map(|entry| (name(entry), entry.to_owned())).collect()
}

#[test]
fn cluster_commands_have_the_legacy_flags_and_defaults() {
    for (command, flag, default) in [
        ("cluster-init", "host-list", ""),
        ("cluster-init", "all-hosts", ""),
        ("cluster-init", "kcm-cmd-list", "[default: init,reconcile,install,discover,nodereport]"),
        ("cluster-init", "kcm-img", "[default: kcm]"),
        ("cluster-init", "kcm-img-pol", "[default: IfNotPresent]"),
        ("cluster-init", "conf-dir", "[default: /etc/kcm]"),
        ("cluster-init", "install-dir", "[default: /opt/bin]"),
        ("cluster-init", "num-dp-cores", "[default: 4]"),
        ("cluster-init", "num-cp-cores", "[default: 1]"),
        ("discover", "conf-dir", "[default: /etc/kcm]"),
        ("reconcile", "publish", ""),
        ("node-report", "publish", ""),
    ] {
        let flags = flags(command);
        let about = flags.get(flag).unwrap_or_else(|| panic!("{command}: no --{flag}"));
        assert!(about.contains(default), "{command} --{flag}: {about}");
    }
}

/// Every file below a directory, with its content.
fn files(directory: &Path, below: &str, found: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        let name = format!("{below}{}", entry.file_name().into_string().unwrap());
        if entry.file_type().unwrap().is_dir() {
            files(&entry.path(), &format!("{name}/"), found);
        } else {
            found.insert(name, fs::read_to_string(entry.path()).unwrap());
        }
    }
}

#[test]
fn init_writes_the_legacy_files_on_a_plain_directory() {
    let home = tempfile::tempdir().unwrap();
    let (conf, root) = (home.path().join("conf"), home.path().join("machine"));
    Machine::new(1, 4, 1).write(&root);
    let mut init = kcm_for(&conf, &["init", "--num-dp-cores=1", "--num-cp-cores=1"]);
    let (_, err, status) = run(init.env("KCM_DEV_LSCPU_SYSFS", &root).env("KCM_PROC_FS", root.join("proc")));
    assert_eq!(status, Some(0), "{err}");
    let mut found = BTreeMap::new();
    files(&conf, "", &mut found);
    let expected = [
        ("lock", ""),
        ("pools/controlplane/1/tasks", ""),
        ("pools/controlplane/exclusive", "0"),
        ("pools/dataplane/0/tasks", ""),
        ("pools/dataplane/exclusive", "1"),
        ("pools/infra/2-3/tasks", ""),
        ("pools/infra/exclusive", "0"),
    ];
    let expected = expected.map(|(name, content)| (name.to_owned(), content.to_owned()));
    assert_eq!(found, BTreeMap::from(expected));
}

#[test]
fn plain_files_are_read_as_the_legacy_program_reads_them() {
    for (flag, exclusive) in [("1", true), ("1\n", true), ("0", false), ("", false), ("true", false)] {
        for (tasks, pids) in
            [("", "[]"), ("4194301", "[4194301]"), (" 4194301 ,4194300,", "[4194301,4194300]")]
        {
            let plain = Plain::new();
            plain.make_pool("p", false, &[("0", tasks)]);
            fs::write(plain.conf().join("pools/p/exclusive"), flag).unwrap();
            let (out, err, status) = run(&mut plain.kcm(&["describe"]));
            assert_eq!((err.as_str(), status), ("", Some(0)), "{flag:?} {tasks:?}");
            let described: serde_json::Value = serde_json::from_str(&out).unwrap();
            let pool = &described["pools"]["p"];
            assert_eq!(pool["exclusive"], exclusive, "{flag:?}");
            assert_eq!(pool["cpuLists"]["0"]["tasks"].to_string(), pids, "{tasks:?}");
        }
    }
}

#[test]
fn a_plain_tasks_file_is_written_as_the_legacy_program_writes_it() {
    let plain = Plain::new();
    plain.make_pool("p", false, &[("0", "1")]);
    let tasks = plain.tasks("p", "0");
    let mut isolate = plain.kcm(&["isolate", "--pool=p", "cat"]);
    let during = run(isolate.arg("--").arg(&tasks)).0;
    let pid = during.strip_prefix("1,").expect("the PID that was there, a comma, the new PID");
    assert!(pid.parse::<u32>().is_ok(), "{during:?}: no newline at the end");
    assert_eq!(fs::read_to_string(&tasks).unwrap(), "1", "only its own PID is removed");
}

#[test]
fn the_list_of_an_isolated_command_is_in_its_environment() {
    let plain = Plain::new();
    plain.make_pool("p", true, &[("0", "")]);
    says(&mut plain.kcm(&["isolate", "--pool=p", "echo $KCM_CPUS_ASSIGNED"]), "0\n");
}
