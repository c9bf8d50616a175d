//! `kcm mount --import` takes over a directory in the legacy layout: pools, lists and the living tasks that are
//! really on their list. The directory itself is renamed and not changed.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use crate::harness::dir::{Dir as _, failure, pinned};
use crate::harness::{Mount, Sleeper, masks, run, set_mode, until, write};

/// Every file below a directory, with its content.
fn content(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut todo = vec![directory.to_path_buf()];
    while let Some(path) = todo.pop() {
        for entry in fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()) {
            let below = entry.strip_prefix(directory).unwrap().to_path_buf();
            if entry.is_dir() {
                found.insert(below, Vec::new());
                todo.push(entry);
            } else {
                found.insert(below, fs::read(&entry).unwrap());
            }
        }
    }
    found
}

/// Creates a legacy pool: `lists` with the content of their `tasks`.
fn make_pool(mount: &Mount, pool: &str, exclusive: &str, lists: &[(&str, &str)]) {
    for (list, tasks) in lists {
        fs::create_dir_all(mount.pool(pool).join(list)).unwrap();
        fs::write(mount.tasks(pool, list), tasks).unwrap();
    }
    fs::create_dir_all(mount.pool(pool)).unwrap();
    fs::write(mount.pool(pool).join("exclusive"), exclusive).unwrap();
}

/// The directories that were renamed.
fn aside(mount: &Mount) -> Vec<PathBuf> {
    let entries = fs::read_dir(mount.home()).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("conf.2017-")).collect()
}

#[test]
fn pools_lists_and_pinned_tasks_are_imported() {
    let mount = Mount::not_mounted();
    let (on_0, on_1, also_on_1) = (pinned("0"), pinned("1"), pinned("1"));
    // One task has died; another PID is in the file although the process is not on the list: in the legacy layout
    // PIDs stay, and may be reused.
    let (dead, stranger) = (Sleeper::new(), Sleeper::new());
    let dead_pid = dead.pid();
    dead.end();
    make_pool(&mount, "dataplane", "1", &[("0", &format!("{},{dead_pid}", on_0.pid()))]);
    let shared = format!("{}, {},junk,{}\n", on_1.pid(), stranger.pid(), also_on_1.pid());
    make_pool(&mount, "infra", "0", &[("1", &shared)]);
    make_pool(&mount, "empty", "1", &[]);
    // The mount refuses these.
    make_pool(&mount, "Strange", "0", &[("1", "")]);
    make_pool(&mount, "later", "0", &[("0", ""), ("4000", ""), ("x", "")]);
    fs::write(mount.conf().join("lock"), "").unwrap();
    set_mode(&mount.conf(), 0o750);
    let before = content(&mount.conf());
    // The terminal names each thing that cannot be taken over. Nothing is changed.
    let (_, err, status) = run(mount.mount_command().arg("--import"));
    let expected = [
        format!(
            "infra 1: task {} may run on 0-1; pin it (taskset -a -p -c 1 {0}), or remove",
            stranger.pid()
        ),
        "infra 1: \"junk\" is not a PID; remove it from the file tasks\n".into(),
        "pool Strange: a pool name is 1 to 63 of a-z".into(),
        "later 0: CPU 0 is in dataplane 0 already; remove that list first\n".into(),
        "later 4000: ".into(),
        "later x: not a CPU list".into(),
        format!("{}: not imported and not changed: 6 things (above) cannot be taken", mount.conf().display()),
    ];
    for line in &expected {
        assert!(err.contains(&format!("ERROR:root:{line}")), "{line}\n---\n{err}");
    }
    assert_eq!((status, err.matches("ERROR:root:").count()), (Some(1), expected.len()), "{err}");
    assert!(err.contains(&format!("INFO:root:dataplane 0: task {dead_pid} has ended; left out\n")), "{err}");
    assert_eq!((mount.mounted(), content(&mount.conf()), aside(&mount)), (0, before.clone(), Vec::new()));
    assert!(!mount.state().exists());

    let (_, err, status) = run(mount.mount_command().arg("--import=partial"));
    assert_eq!(status, Some(0), "{err}");
    for line in &expected[..6] {
        assert!(err.contains(&format!("WARNING:root:not taken over: {line}")), "{line}\n---\n{err}");
    }

    assert_eq!(mount.sh("ls $C/pools"), "dataplane\nempty\ninfra\nlater\n");
    assert_eq!(mount.sh("ls $C/pools/dataplane $C/pools/empty $C/pools/later").matches("tasks").count(), 3);
    assert_eq!(mount.read("pools/dataplane/exclusive"), "1\n");
    assert_eq!(mount.read("pools/infra/exclusive"), "0\n");
    assert_eq!(mount.read("pools/empty/exclusive"), "1\n");
    assert_eq!(mount.tasks_of("dataplane", "0"), on_0.pid().to_string());
    let mut both = [on_1.pid(), also_on_1.pid()];
    both.sort_unstable();
    assert_eq!(mount.tasks_of("infra", "1"), format!("{},{}", both[0], both[1]));
    assert!(!mount.pool("later").join("0").exists(), "the list is another pool's already");
    assert_eq!(masks(stranger.pid()), ["0-1"]);
    // The message names each thing that was left out.
    let log = mount.log() + &err;
    for name in [
        format!("dataplane 0: task {dead_pid}: not taken over"),
        format!("infra 1: task {}: not taken over", stranger.pid()),
        "pool Strange: not taken over".into(),
        "later 0: not taken over".into(),
        "later 4000: not taken over".into(),
        "later x: not taken over".into(),
    ] {
        assert!(log.contains(&name), "{name}: {log}");
    }

    let [aside] = &aside(&mount)[..] else { panic!("one directory is renamed") };
    assert_eq!(content(aside), before, "unchanged");
    assert!(log.contains(aside.to_str().unwrap()), "{log}");
    mount.stop();
    assert_eq!(fs::metadata(mount.conf()).unwrap().permissions().mode() & 0o777, 0o750);
    // It is an ordinary mount now.
    mount.start();
    assert_eq!(mount.tasks_of("dataplane", "0"), on_0.pid().to_string());
    write(&mount.tasks("infra", "1"), format!("-{}", on_1.pid())).unwrap();
    assert_eq!(mount.tasks_of("infra", "1"), also_on_1.pid().to_string());
}

#[test]
fn an_exclusive_list_keeps_one_of_two_tasks() {
    let mount = Mount::not_mounted();
    let tasks = [pinned("0"), pinned("0")];
    make_pool(&mount, "p", "1", &[("0", &format!("{},{}", tasks[0].pid(), tasks[1].pid()))]);
    let (_, err, status) = run(mount.mount_command().arg("--import"));
    let line = format!(
        "p 0: task {}: the list is exclusive, and {} has it; end one",
        tasks[1].pid(),
        tasks[0].pid()
    );
    assert!(err.contains(&line), "{err}");
    assert_eq!((status, mount.mounted()), (Some(1), 0));
    assert_eq!(run(mount.mount_command().arg("--import=partial")).2, Some(0));
    assert_eq!(mount.tasks_of("p", "0"), tasks[0].pid().to_string());
    let log = mount.log();
    assert!(log.contains(&format!("p 0: task {}: not taken over", tasks[1].pid())), "{log}");
}

#[test]
fn another_layout_is_left_alone() {
    let mount = Mount::not_mounted();
    fs::create_dir_all(mount.conf().join("pools/p/0")).unwrap();
    fs::write(mount.conf().join("precious"), "data").unwrap();
    // A pool without its `exclusive`, then a list without its `tasks`.
    for file in ["exclusive", "0/tasks"] {
        let before = content(&mount.conf());
        let line = failure(mount.mount_command().arg("--import").env("KCM_LOG_LEVEL", "ERROR"));
        assert!(line.starts_with(&format!("{}: is not a legacy layout: ", mount.conf().display())), "{line}");
        assert_eq!((mount.mounted(), content(&mount.conf()), aside(&mount)), (0, before, Vec::new()));
        fs::write(mount.pool("p").join(file), "").unwrap();
    }
    assert_eq!(run(mount.mount_command().arg("--import")).2, Some(0));
    assert_eq!(aside(&mount).len(), 1);
}

#[test]
fn without_anything_to_import_it_is_a_plain_mount() {
    let mount = Mount::not_mounted();
    fs::create_dir(mount.conf()).unwrap();
    for _ in 0..2 {
        assert_eq!(run(mount.mount_command().arg("--import")).2, Some(0));
        assert_eq!(aside(&mount), Vec::<PathBuf>::new());
        mount.stop();
    }
    until("the moved directory is gone", || mount.mounted() == 0);
}

#[test]
fn what_the_state_directory_has_is_in_the_way() {
    let mount = Mount::new();
    mount.make_pool("p", false, &["0"]);
    mount.stop();
    make_pool(&mount, "p", "0", &[("1", "")]);
    make_pool(&mount, "q", "0", &[("0", "")]);
    let before = content(&mount.conf());
    let (_, err, status) = run(mount.mount_command().arg("--import"));
    assert!(err.contains("ERROR:root:pool p: the state directory has one; rename one of the two\n"), "{err}");
    assert!(err.contains("ERROR:root:q 0: CPU 0 is in p 0 already; remove that list first\n"), "{err}");
    assert_eq!((status, mount.mounted(), content(&mount.conf())), (Some(1), 0, before));
    // A directory that can be imported as a whole is.
    for pool in ["p", "q"] {
        fs::remove_dir_all(mount.pool(pool)).unwrap();
    }
    make_pool(&mount, "r", "1", &[("1", "")]);
    assert_eq!(run(mount.mount_command().arg("--import")).2, Some(0));
    assert_eq!(mount.sh("ls $C/pools"), "p\nr\n");
}
