//! `kcm pool`: what it does, and what it says if the daemon refuses.

use std::fs;

use crate::harness::{Mount, Plain, Sleeper, held, masks, run, write};

/// Runs `kcm pool WORDS`, which succeeds and prints nothing.
fn pool(mount: &Mount, words: &[&str]) {
    let (out, err, status) = run(&mut mount.kcm(&[&["pool"], words].concat()));
    assert_eq!((out.as_str(), err.as_str(), status), ("", "", Some(0)), "{words:?}");
}

/// Runs `kcm pool WORDS`, which fails. Returns the message.
fn refused(mount: &Mount, words: &[&str]) -> String {
    let (out, err, status) = run(&mut mount.kcm(&[&["pool"], words].concat()));
    assert_eq!((out.as_str(), status), ("", Some(1)), "{words:?}: {err}");
    assert_eq!(err.lines().count(), 1, "{err}");
    err.trim_end().to_owned()
}

fn below_pools(mount: &Mount) -> Vec<String> {
    let directories = mount.walk().into_iter().filter(|(_, stat)| stat.is_dir());
    directories.filter_map(|(path, _)| Some(path.strip_prefix("pools/")?.to_owned())).collect()
}

#[test]
fn a_pool_is_made_changed_and_removed() {
    let mount = Mount::new();
    pool(&mount, &["create", "a", "0"]);
    pool(&mount, &["create", "b", "--exclusive", "--partial"]);
    assert_eq!(below_pools(&mount), ["a", "a/0", "b"]);
    let flags = ["a/exclusive", "b/exclusive", "b/partial"].map(|file| mount.read(&format!("pools/{file}")));
    assert_eq!(flags, ["0\n", "1\n", "1\n"]);
    pool(&mount, &["add", "b", "1"]);
    let task = Sleeper::new();
    write(&mount.tasks("a", "0"), task.pid().to_string()).unwrap();
    pool(&mount, &["delete", "b", "1"]);
    let table = |words: &[&str]| run(&mut mount.kcm(words));
    let (out, err, status) = table(&["pool", "list"]);
    assert!(out.contains("a ") && out.contains("b "), "{out}");
    assert_eq!((out, err, status), table(&["describe", "--format=table"]));
    pool(&mount, &["resize", "a", "0", "0-1"]);
    assert_eq!(
        (masks(task.pid()), held(&mount.tasks("a", "0-1"))),
        (vec!["0-1".to_owned()], vec![task.pid()])
    );
    pool(&mount, &["rename", "a", "c"]);
    pool(&mount, &["drain", "c"]);
    assert_eq!(mount.read("pools/c/0-1/state"), "affinity draining\n");
    pool(&mount, &["undrain", "c", "0-1"]);
    assert_eq!(mount.read("pools/c/0-1/state"), "affinity\n");
    pool(&mount, &["delete", "c", "--force"]);
    pool(&mount, &["delete", "b"]);
    assert_eq!(below_pools(&mount), Vec::<String>::new());
}

#[test]
fn a_refusal_is_explained_and_leaves_nothing_behind() {
    let mount = Mount::new();
    mount.make_pool("a", true, &["0"]);
    let task = Sleeper::new();
    write(&mount.tasks("a", "0"), task.pid().to_string()).unwrap();
    let before = (below_pools(&mount), mount.read("info/config"));
    let path = |below: &str| format!("ERROR:root:{}", mount.pool(below).display());
    for (words, expected) in [
        (
            &["create", "b", "--exclusive", "1", "0"][..],
            format!("{}: CPU 0 is in a 0 already; remove that list first", path("b/0")),
        ),
        (&["create", "a", "1"], format!("{}: File exists", path("a"))),
        (&["add", "a", "1", "4000"], format!("{}: this machine does not have CPU 4000", path("a/4000"))),
        (&["add", "none", "1"], "ERROR:root:pool none does not exist; look at kcm describe".into()),
        (&["drain", "a", "1"], "ERROR:root:pool a has no list 1; look at kcm describe".into()),
        (&["rename", "none", "b"], format!("{}: No such file or directory", path("none"))),
        (
            &["delete", "a"],
            format!(
                "ERROR:root:a 0 is held by {}; end that first, drain the list, or release it with --force",
                task.pid()
            ),
        ),
        (&["resize", "a", "1", "0"], format!("{}: ", path("a/1"))),
    ] {
        let message = refused(&mount, words);
        assert!(message.starts_with(&expected), "{words:?}: {message}");
        assert_eq!((below_pools(&mount), mount.read("info/config")), before, "{words:?}");
    }
}

#[test]
fn names_that_cannot_be_are_wrong_usage() {
    let mount = Mount::new();
    for words in [
        &["create", "../x"][..],
        &["create", "A"],
        &["create", "a", "0-"],
        &["delete", "a/.."],
        &["resize", "a", "0", "x"],
        &["rename", "a", "a/b"],
        &["delete", "a", "tasks"],
        &[],
    ] {
        let (_, err, status) = run(&mut mount.kcm(&[&["pool"], words].concat()));
        assert_eq!(status, Some(2), "{words:?}: {err}");
    }
}

#[test]
fn it_needs_a_daemon() {
    let plain = Plain::new();
    plain.make_pool("a", true, &[("0", "")]);
    let file = plain.home().join("pools.yaml");
    fs::write(&file, "pools: {}\n").unwrap();
    for words in [&["pool", "delete", "a"][..], &["export"], &["apply", "-f", file.to_str().unwrap()]] {
        let (_, err, status) = run(&mut plain.kcm(words));
        assert!(status == Some(1) && err.contains("this needs kcm mount"), "{words:?}: {err}");
    }
    assert!(fs::metadata(plain.conf().join("pools/a/0/tasks")).is_ok());
}
