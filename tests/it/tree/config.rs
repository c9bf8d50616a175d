//! `info/config`: the whole configuration in one write.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::harness::{Machine, Mount, Sleeper, as_nobody, errno, held, masks, write};
use nix::errno::Errno;

fn apply(mount: &Mount, json: &str) -> std::io::Result<()> {
    write(&mount.conf().join("info/config"), json)
}

fn reason(mount: &Mount) -> String {
    let line = mount.read("self/last_error");
    line.splitn(3, ' ').nth(2).unwrap_or_else(|| panic!("{line:?}")).trim_end().to_owned()
}

/// The names below `pools`, as the kernel finds them.
fn pools(mount: &Mount) -> Vec<String> {
    let names = mount.walk().into_iter().filter(|(_, stat)| stat.is_dir());
    names.filter_map(|(path, _)| Some(path.strip_prefix("pools/")?.to_owned())).collect()
}

#[test]
fn it_reads_as_it_is_written() {
    let mount = Mount::with_dataplane();
    let expected = "{\"pools\":{\n\"dataplane\":{\"exclusive\":true,\"lists\":[\"0\",\"1\"]}\n}}\n";
    assert_eq!(mount.read("info/config"), expected);
    mount.sh("cat $C/info/config > $S/../copy && cat $S/../copy > $C/info/config");
    assert_eq!(mount.read("info/config"), expected);
    mount.sh("chown 7:8 $C/pools/dataplane/0/tasks; chmod 0606 $C/pools/dataplane/tasks; echo 1 > $C/pools/dataplane/partial");
    let expected = "{\"pools\":{\n\"dataplane\":{\"exclusive\":true,\"partial\":true,\"tasks\":{\"mode\":\"0606\"},\
        \"lists\":[{\"cpus\":\"0\",\"tasks\":{\"owner\":7,\"group\":8}},\"1\"]}\n}}\n";
    assert_eq!(mount.read("info/config"), expected);
}

#[test]
fn one_write_changes_everything_and_claims_stay() {
    let mount = Mount::with_dataplane();
    mount.make_pool("gone", false, &[]);
    let task = Sleeper::new();
    write(&mount.tasks("dataplane", "0"), task.pid().to_string()).unwrap();
    let nodes = mount.walk().len();
    apply(
        &mount,
        r#"{"pools":{"new":{"tasks":{"group":9,"mode":"0664"},"lists":["0"]},"other":{"exclusive":true}}}"#,
    )
    .unwrap();
    assert_eq!(pools(&mount), ["new", "new/0", "other"]);
    assert!(mount.walk().len() < nodes);
    assert_eq!((held(&mount.tasks("new", "0")), masks(task.pid())), (vec![task.pid()], vec!["0".to_owned()]));
    let tasks = fs::metadata(mount.pool("new").join("tasks")).unwrap();
    assert_eq!((tasks.gid(), tasks.mode() & 0o777), (9, 0o664));
    // The kernel has forgotten the names, so they can be made again.
    for name in ["dataplane", "gone"] {
        assert_eq!(errno(fs::metadata(mount.pool(name))), Errno::ENOENT, "{name}");
        fs::create_dir(mount.pool(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    fs::create_dir(mount.pool("dataplane").join("1")).unwrap();
    mount.stop();
    mount.start();
    assert_eq!(pools(&mount), ["dataplane", "dataplane/1", "gone", "new", "new/0", "other"]);
    assert_eq!(held(&mount.tasks("new", "0")), [task.pid()]);
}

#[test]
fn a_write_takes_effect_completely_or_not_at_all() {
    let mount = Mount::with_dataplane();
    let task = Sleeper::new();
    write(&mount.tasks("dataplane", "0"), task.pid().to_string()).unwrap();
    let before = mount.read("info/config");
    for (json, expected, why) in [
        ("x", Errno::EINVAL, "not a configuration: expected value at line 1 column 1; write what kcm apply would".to_owned()),
        (r#"{"pools":{"new":{"lists":["1"]}}}"#, Errno::EBUSY, format!("dataplane 0 has live tasks, one is {} (sleep); release them first", task.pid())),
        (r#"{"pools":{"new":{"lists":["1"]},"dataplane":{"lists":["0","1000"]}}}"#, Errno::EINVAL, format!("this machine does not have CPU 1000, it has {}; choose among those", cpus())),
        (r#"{"pools":{"dataplane":{"mode":"isolated","lists":["0"]}}}"#, Errno::EINVAL, "dataplane is shared, and only exclusive lists can be isolated; write 1 to its file exclusive first".to_owned()),
    ] {
        assert_eq!(errno(apply(&mount, json)), expected, "{json}");
        assert_eq!(reason(&mount), format!("{expected:?}: {why}"), "{json}");
        assert_eq!(mount.read("info/config"), before, "{json}");
    }
    let half = &before.as_bytes()[..before.len() / 2];
    assert_eq!(
        errno(write(&mount.conf().join("info/config"), half)),
        Errno::EINVAL,
        "half of a document is none"
    );
    let other = Sleeper::new();
    write(&mount.tasks("dataplane", "1"), other.pid().to_string()).expect("nothing is left reserved");
}

fn cpus() -> String {
    fs::read_to_string("/sys/devices/system/cpu/present").unwrap().trim().to_owned()
}

#[test]
fn a_list_with_tasks_goes_only_by_force_and_its_tasks_are_released() {
    let mount = Mount::with_dataplane();
    let task = Sleeper::new();
    let before = masks(task.pid());
    write(&mount.tasks("dataplane", "0"), task.pid().to_string()).unwrap();
    assert_eq!(errno(apply(&mount, r#"{"pools":{}}"#)), Errno::EBUSY);
    apply(&mount, r#"{"pools":{},"force":true,"dry_run":true}"#).unwrap();
    assert_eq!(held(&mount.tasks("dataplane", "0")), [task.pid()], "a dry run changes nothing");
    apply(&mount, r#"{"pools":{},"force":true}"#).unwrap();
    assert_eq!((pools(&mount), masks(task.pid())), (Vec::new(), before));
    assert!(mount.read("info/events").contains("\"released\""), "{}", mount.read("info/events"));
}

#[test]
fn only_root_reads_and_writes_it() {
    let mount = Mount::with_dataplane();
    let file = mount.conf().join("info/config");
    as_nobody(|| {
        assert_eq!(errno(fs::read(&file)), Errno::EACCES);
        assert_eq!(errno(write(&file, "{}")), Errno::EACCES);
    });
    fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).unwrap();
    let answer = as_nobody(|| (fs::read(&file).is_ok(), errno(write(&file, r#"{"pools":{}}"#))));
    assert_eq!(answer, (true, Errno::EPERM));
    assert_eq!(pools(&mount), ["dataplane", "dataplane/0", "dataplane/1"]);
}

#[test]
fn a_thousand_lists_are_one_write() {
    let mount = Mount::on_machine(&Machine::new(1, 2048, 1));
    let lists: Vec<String> = (0..1024).map(|n| format!("\"{}-{}\"", 2 * n, 2 * n + 1)).collect();
    let json = format!(r#"{{"pools":{{"big":{{"exclusive":true,"lists":[{}]}}}}}}"#, lists.join(","));
    apply(&mount, &json).unwrap();
    assert_eq!(pools(&mount).len(), 1025);
    apply(&mount, r#"{"pools":{}}"#).unwrap();
    assert_eq!(pools(&mount), Vec::<String>::new());
}

#[test]
fn somebody_who_makes_and_removes_pools_meanwhile_does_not_matter() {
    let mount = Mount::with_dataplane();
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let others: Vec<_> = ["a", "b"]
            .into_iter()
            .map(|name| {
                let (mount, ended) = (&mount, &ended);
                scope.spawn(move || {
                    while !ended.load(Ordering::Relaxed) {
                        // Each may fail: the other one or the document has made it, or removed it.
                        let _ = fs::create_dir(mount.pool(name));
                        let _ = fs::rename(mount.pool(name), mount.pool("c"));
                        let _ = fs::remove_dir(mount.pool("c"));
                    }
                })
            })
            .collect();
        for _ in 0..20 {
            apply(&mount, r#"{"pools":{"a":{"lists":["0"]},"d":{"exclusive":true}}}"#).unwrap();
            apply(&mount, r#"{"pools":{"d":{"lists":["1"]}}}"#).unwrap();
        }
        ended.store(true, Ordering::Relaxed);
        others.into_iter().for_each(|other| other.join().unwrap());
    });
    apply(&mount, r#"{"pools":{"d":{"exclusive":true,"lists":["1"]}}}"#).unwrap();
    assert_eq!(pools(&mount), ["d", "d/1"]);
}
