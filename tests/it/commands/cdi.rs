//! `kcm cdi`: the specs for container runtimes follow the pools, and files of others stay. `containers` has the runtime.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::install::{flag, logs, names};
use crate::harness::dir::{Dir as _, failure};
use crate::harness::{KCM, Mount, Plain, Sleeper, run, until};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

fn cdi(mount: &Mount, words: &[&str]) -> Command {
    let mut command = mount.kcm(&["cdi"]);
    command.args(words).arg(flag("--dir", &directory(mount)));
    command
}

fn directory(mount: &Mount) -> PathBuf {
    mount.home().join("cdi")
}

fn spec(mount: &Mount, pool: &str) -> Value {
    let file = directory(mount).join(format!("kcm.intel.com-{pool}.json"));
    serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap()
}

/// The devices of a pool; nothing without a spec.
fn devices(mount: &Mount, pool: &str) -> Vec<String> {
    let file = directory(mount).join(format!("kcm.intel.com-{pool}.json"));
    let Ok(text) = fs::read_to_string(file) else { return Vec::new() };
    let spec: Value = serde_json::from_str(&text).expect("a whole document");
    let names = spec["devices"].as_array().unwrap().iter().map(|device| &device["name"]);
    names.map(|name| name.as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_spec_has_a_device_for_each_list_and_any() {
    let mount = Mount::new();
    mount.make_pool("dp", true, &["0,1"]);
    mount.make_pool("empty", false, &[]);
    let files = ["dp", "empty"].map(|pool| directory(&mount).join(format!("kcm.intel.com-{pool}.json")));
    let wrote = files.each_ref().map(|file| format!("Wrote {}.", file.display()));
    logs(&mut cdi(&mount, &["install"]), &wrote);
    let conf = mount.conf().display().to_string();
    let hook = |list: &[&str]| {
        let own = ["kcm".to_owned(), "hook".into(), "--pool=dp".into(), format!("--conf-dir={conf}")];
        let args: Vec<String> = own.into_iter().chain(list.iter().map(|it| (*it).into())).collect();
        json!([{ "hookName": "createRuntime", "path": KCM, "args": args, "timeout": 30 }])
    };
    assert_eq!(
        spec(&mount, "dp"),
        json!({
            "cdiVersion": "0.5.0",
            "kind": "kcm.intel.com/dp",
            "devices": [
                { "name": "any", "containerEdits": { "hooks": hook(&[]) } },
                { "name": "0_1", "containerEdits": {
                    "env": ["KCM_CPUS_ASSIGNED=0,1"], "hooks": hook(&["--list=0,1"]) } },
            ],
            "containerEdits": { "mounts": [{
                "hostPath": conf, "containerPath": conf,
                "options": ["rbind", "rslave", "nosuid", "nodev", "noexec"],
            }] },
        })
    );
    assert_eq!(devices(&mount, "empty"), ["any"]);
    assert_eq!(names(&directory(&mount)).len(), 2, "nothing else is left there");
    for file in &files {
        assert_eq!(fs::metadata(file).unwrap().permissions().mode() & 0o7777, 0o644);
    }
    // A second run touches nothing.
    let inode = |file: &Path| fs::metadata(file).unwrap().ino();
    let before = inode(&files[0]);
    let up_to_date = format!("{}: the specs are up to date.", directory(&mount).display());
    logs(&mut cdi(&mount, &["install"]), &[up_to_date]);
    assert_eq!(inode(&files[0]), before);
}

#[test]
fn the_program_of_the_hook_can_be_named() {
    let mount = Mount::with_dataplane();
    run(&mut cdi(&mount, &["install", "--program=/opt/bin/kcm"]));
    let hook = &spec(&mount, "dataplane")["devices"][0]["containerEdits"]["hooks"][0];
    assert_eq!(hook["path"], "/opt/bin/kcm");
}

#[test]
fn a_pool_whose_name_begins_with_a_digit_has_a_class() {
    let mount = Mount::new();
    mount.make_pool("4dp", true, &["0"]);
    let file = directory(&mount).join("kcm.intel.com-pool_4dp.json");
    let said = [
        format!("Wrote {}.", file.display()),
        "The pool 4dp has the kind kcm.intel.com/pool_4dp, because a class of CDI begins with a letter."
            .into(),
    ];
    logs(&mut cdi(&mount, &["install"]), &said);
    assert_eq!(spec(&mount, "pool_4dp")["kind"], "kcm.intel.com/pool_4dp");
}

#[test]
fn a_transient_pool_has_no_spec() {
    let mount = Mount::with_dataplane();
    mount.make_pool("shield", true, &[]);
    mount.sh("echo 1 > $C/pools/shield/transient");
    run(&mut cdi(&mount, &["install"]));
    assert_eq!(names(&directory(&mount)), ["kcm.intel.com-dataplane.json"]);
}

#[test]
fn files_of_others_are_neither_overwritten_nor_removed() {
    let (mount, other) = (Mount::with_dataplane(), Mount::with_shared());
    let directory = directory(&mount);
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join("kcm.intel.com-dataplane.json"), "of somebody else").unwrap();
    let mut of_other = other.kcm(&["cdi", "install"]);
    assert_eq!(run(of_other.arg(flag("--dir", &directory))).2, Some(0));
    mount.make_pool("more", true, &[]);
    let (_, err, code) = run(&mut cdi(&mount, &["install"]));
    let refused = format!(
        "ERROR:root:{}: kcm has not written it for {}; move it away, or rename the pool\n",
        directory.join("kcm.intel.com-dataplane.json").display(),
        mount.conf().display()
    );
    assert_eq!(code, Some(1));
    assert!(err.ends_with(&refused) && err.lines().count() == 2, "the others are written: {err}");
    assert_eq!(devices(&mount, "more"), ["any"]);
    let removed = directory.join("kcm.intel.com-more.json");
    logs(&mut cdi(&mount, &["uninstall"]), &[format!("Removed {}.", removed.display())]);
    assert_eq!(names(&directory), ["kcm.intel.com-dataplane.json", "kcm.intel.com-shared.json"]);
    assert_eq!(fs::read(directory.join("kcm.intel.com-dataplane.json")).unwrap(), b"of somebody else");
    let nothing =
        format!("{}: has no specs of {}; nothing to do", directory.display(), mount.conf().display());
    logs(&mut cdi(&mount, &["uninstall"]), &[nothing]);
}

#[test]
fn a_failure_is_one_line() {
    let mount = Mount::with_dataplane();
    mount.let_everybody_in();
    let dir = flag("--dir", &directory(&mount));
    let line = failure(&mut mount.kcm_as_nobody(&["cdi", "install", &dir]));
    assert!(
        line.ends_with(
            "/info/config: Permission denied; run it as root, or let root grant access with chown or chmod"
        ),
        "{line}"
    );
    fs::create_dir(directory(&mount)).unwrap();
    let script =
        "mount --bind -o ro \"$D\" \"$D\" && exec \"$KCM\" cdi install --conf-dir=\"$C\" --dir=\"$D\"";
    let mut apart = Command::new("unshare");
    apart.args(["--mount", "bash", "-c", script]).env("C", mount.conf());
    apart.env("KCM", KCM).env("D", directory(&mount));
    let line = failure(&mut apart);
    assert!(line.ends_with("json: Read-only file system; mount it for writing"), "{line}");
    let below = flag("--dir", &mount.home().join("file/cdi"));
    fs::write(mount.home().join("file"), "").unwrap();
    let line = failure(&mut mount.kcm(&["cdi", "install", &below]));
    assert!(line.starts_with(&format!("{}: ", mount.home().join("file/cdi").display())), "{line}");
    let plain = Plain::new();
    plain.make_pool("p", true, &[("0", "")]);
    for words in [&["cdi", "install"][..], &["cdi", "install", "--follow"]] {
        let line = failure(plain.kcm(words).arg(&dir));
        assert!(line.ends_with("a plain directory; this needs kcm mount, so run that first"), "{line}");
    }
    mount.stop();
    assert!(failure(&mut cdi(&mount, &["install"])).contains("kcm mount is not running; start it: "));
}

#[test]
fn specs_follow_lists_and_pools_over_restarts_of_the_daemon() {
    let mount = Mount::with_dataplane();
    // The remains of a process that was killed while it wrote.
    fs::create_dir(directory(&mount)).unwrap();
    fs::write(directory(&mount).join("kcm.intel.com-dataplane.json.99999999.new"), "{").unwrap();
    let _follower = Sleeper::spawn(cdi(&mount, &["install", "--follow"]).stderr(Stdio::null()));
    until("the specs are written", || devices(&mount, "dataplane") == ["any", "0", "1"]);
    until("nothing else is left", || names(&directory(&mount)).len() == 1);
    let changes = |when: &str| {
        let lists = mount.pool("dataplane");
        fs::remove_dir(lists.join("1")).unwrap();
        until(&format!("{when}: a list has gone"), || devices(&mount, "dataplane") == ["any", "0"]);
        fs::create_dir(mount.pool("more")).unwrap();
        until(&format!("{when}: a pool has come"), || devices(&mount, "more") == ["any"]);
        fs::create_dir(mount.pool("more").join("1")).unwrap();
        until(&format!("{when}: with a list"), || devices(&mount, "more") == ["any", "1"]);
        fs::rename(mount.pool("more").join("1"), lists.join("1")).unwrap();
        until(&format!("{when}: the list has moved"), || {
            (devices(&mount, "more"), devices(&mount, "dataplane"))
                == (vec!["any".into()], ["any", "0", "1"].map(String::from).to_vec())
        });
        fs::remove_dir(mount.pool("more")).unwrap();
        until(&format!("{when}: the pool has gone"), || {
            names(&directory(&mount)) == ["kcm.intel.com-dataplane.json"]
        });
    };
    changes("at first");
    mount.replace_worker();
    changes("after the death of the worker");
    mount.stop();
    assert_eq!(devices(&mount, "dataplane"), ["any", "0", "1"], "the pools come back with the daemon");
    mount.start();
    changes("after a remount");
    mount.kill_daemon();
    mount.start();
    changes("after a kill of the daemon");
    assert_eq!(run(mount.mount_command().arg("--upgrade")).2, Some(0));
    changes("after an upgrade");
    mount.sh("rmdir $C/pools/dataplane/[01] $C/pools/dataplane");
    until("all pools have gone", || names(&directory(&mount)).is_empty());
}

#[test]
fn a_follower_waits_for_the_daemon_and_for_a_directory_that_can_be_written() {
    let mount = Mount::with_dataplane();
    mount.stop();
    fs::write(directory(&mount), "not a directory").unwrap();
    let mut follower = Sleeper::spawn(cdi(&mount, &["install", "--follow"]).stderr(Stdio::piped()));
    let mut err = std::io::BufReader::new(follower.child().stderr.take().unwrap());
    let mut hear = || {
        let mut line = String::new();
        std::io::BufRead::read_line(&mut err, &mut line).unwrap();
        line
    };
    assert!(hear().ends_with(": no daemon answers; waiting for the next one\n"));
    mount.start();
    let refused = hear();
    assert!(refused.starts_with("ERROR:root:") && refused.contains("cdi"), "{refused}");
    fs::remove_file(directory(&mount)).unwrap();
    until("it has tried again", || devices(&mount, "dataplane") == ["any", "0", "1"]);
    // The service manager ends it so.
    crate::harness::signal(follower.pid(), Signal::SIGTERM);
    follower.collect();
    assert_eq!(devices(&mount, "dataplane"), ["any", "0", "1"], "the pools are still there");
}

#[test]
fn uninstall_removes_the_specs_of_its_directory() {
    let (mount, other) = (Mount::with_dataplane(), Mount::with_shared());
    let dir = flag("--dir", &directory(&mount));
    for mount in [&mount, &other] {
        assert_eq!(run(&mut mount.kcm(&["cdi", "install", &dir])).2, Some(0));
    }
    let uninstall = |words: &[&str]| {
        let mut command = mount.kcm(&["uninstall", "--install-dir=/nowhere", "--systemd=/nowhere"]);
        command.args(["--share-dir=/nowhere", &flag("--cdi-dir", &directory(&mount))]).args(words);
        run(&mut command)
    };
    let file = directory(&mount).join("kcm.intel.com-dataplane.json");
    let (_, err, code) = uninstall(&["--dry-run"]);
    assert_eq!(code, Some(0), "{err}");
    assert!(err.contains(&format!("Would remove {}.", file.display())) && file.exists(), "{err}");
    let (_, err, code) = uninstall(&[]);
    assert_eq!(code, Some(0), "{err}");
    assert!(err.contains(&format!("Removed {}.", file.display())), "{err}");
    assert_eq!(names(&directory(&mount)), ["kcm.intel.com-shared.json"]);
}
