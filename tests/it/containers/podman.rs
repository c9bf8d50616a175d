//! `podman run --device kcm.intel.com/POOL=any`: a container has its list before it runs, or is not started and the reason is shown.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::{Node, devices};
use crate::harness::{Mount, Sleeper, masks, run, signal, until, write};
use nix::sys::signal::Signal;

#[test]
fn a_container_is_on_its_list_at_its_first_instruction() {
    let node = Node::new("dp", true, &["1", "0"]);
    let first = ["grep", "Cpus_allowed_list", "/proc/self/status"];
    let device = |name: &str| format!("--device={}", node.device(name));
    for (name, cpus) in [("1", "1"), ("any", "0"), ("0", "0")] {
        let (out, err, code) = run(&mut node.container(&["--rm", &device(name)], &first));
        assert_eq!((out, code), (format!("Cpus_allowed_list:\t{cpus}\n"), Some(0)), "{name}: {err}");
    }
    // Its first process sees its claim in the directory, which is at the same path.
    let conf = node.mount.conf().display().to_string();
    let line = format!(
        "cat {conf}/self/claim; echo ${{KCM_CPUS_ASSIGNED-unset}}; echo -0 > {conf}/pools/{}/tasks; cat {conf}/self/claim; echo released",
        node.pool
    );
    for (name, env) in [("any", "unset"), ("0", "0")] {
        let (out, err, code) = run(&mut node.container(&["--rm", &device(name)], &["sh", "-c", &line]));
        assert_eq!((out, code), (format!("{} 0\n{env}\nreleased\n", node.pool), Some(0)), "{name}: {err}");
    }
}

#[test]
fn a_list_with_a_comma_and_a_pool_with_a_digit_are_devices() {
    let node = Node::new("4dp", true, &["0,1"]);
    assert_eq!(node.device("0_1"), format!("kcm.intel.com/pool_{}=0_1", node.pool));
    let device = format!("--device={}", node.device("0_1"));
    let claim = format!("cat {}/self/claim; echo $KCM_CPUS_ASSIGNED", node.mount.conf().display());
    let (out, err, code) = run(&mut node.container(&["--rm", &device], &["sh", "-c", &claim]));
    assert_eq!((out, code), (format!("{} 0,1\n0,1\n", node.pool), Some(0)), "{err}");
}

#[test]
fn a_refusal_is_in_the_error_of_the_runtime() {
    let node = Node::new("dp", true, &["1"]);
    let holder = Sleeper::new();
    write(&node.mount.tasks(&node.pool, "1"), holder.pid().to_string()).unwrap();
    let held = format!("{} 1 is held by {} (sleep)", node.pool, holder.pid());
    for name in ["any", "1"] {
        let err = node.refused(&["--rm", &format!("--device={}", node.device(name))]);
        assert!(err.contains(&held), "{name}: {err}");
    }
    assert_eq!(node.held("1"), [holder.pid()]);
    let paused = node.mount.pause();
    let err = node.refused(&["--rm", &format!("--device={}", node.device("any"))]);
    assert!(err.contains("kcm mount does not answer"), "{err}");
    drop(paused);
}

#[test]
fn containers_get_different_lists_until_all_are_taken() {
    let node = Node::new("dp", true, &["0", "1"]);
    let (first, second) = (node.start("any"), node.start("any"));
    assert_eq!((node.held("0"), node.held("1")), (vec![first.1], vec![second.1]));
    assert_eq!((masks(first.1), masks(second.1)), (vec!["0".to_owned()], vec!["1".to_owned()]));
    let err = node.refused(&["--rm", &format!("--device={}", node.device("any"))]);
    assert!(err.contains("is free (2 taken)"), "{err}");
    // A process that is executed in the container later runs where the container may run.
    let exec = ["exec", &first.0, "grep", "Cpus_allowed_list", "/proc/self/status"];
    let (out, err, code) = run(&mut node.podman(&exec));
    assert_eq!(
        (out.trim(), code),
        (&*format!("Cpus_allowed_list:\t{}", masks(std::process::id())[0]), Some(0)),
        "{err}"
    );

    signal(first.1, Signal::SIGKILL);
    until("the list of the killed container is free", || node.held("0").is_empty());
    let (_, err, code) = run(&mut node.podman(&["stop", "--time=0", &second.0]));
    assert_eq!(code, Some(0), "{err}");
    assert_eq!(node.held("1"), [0; 0], "a container that was stopped has ended");
    // It gets a list again when it is started again.
    let (_, err, code) = run(&mut node.podman(&["restart", "--time=0", &second.0]));
    assert_eq!(code, Some(0), "{err}");
    let pid = node.pid(&second.0);
    assert_eq!((node.held("0"), masks(pid)), (vec![pid], vec!["0".to_owned()]));
}

#[test]
fn containers_share_a_list_of_a_shared_pool() {
    let node = Node::new("infra", false, &["1"]);
    let (first, second) = (node.start("1"), node.start("any"));
    let mut both = [first.1, second.1];
    both.sort_unstable();
    assert_eq!(node.held("1"), both);
}

#[test]
fn a_container_has_one_device_of_kcm() {
    let node = Node::new("dp", true, &["0", "1"]);
    let devices = ["0", "1"].map(|name| format!("--device={}", node.device(name)));
    let err = node.refused(&["--rm", &devices[0], &devices[1]]);
    let reason =
        format!("the container has several devices of kcm: {0} 0, {0} 1; it can have one", node.pool);
    assert!(err.contains(&reason), "{err}");
    assert_eq!((node.held("0"), node.held("1")), (vec![], vec![]));
}

#[test]
fn a_container_that_may_not_run_on_the_list_is_refused() {
    let node = Node::new("dp", true, &["1"]);
    let err = node.refused(&["--rm", "--cpuset-cpus=0", &format!("--device={}", node.device("1"))]);
    assert!(err.contains("the kernel"), "{err}");
    assert_eq!(node.held("1"), [0; 0]);
}

/// A directory that is shared with mount namespaces, as all are on a machine with systemd.
struct Shared(PathBuf);

impl Shared {
    fn new(directory: PathBuf) -> Self {
        fs::create_dir(&directory).unwrap();
        let path = directory.display().to_string();
        for words in [&["--bind", &path, &path][..], &["--make-private", &path], &["--make-shared", &path]] {
            let (_, err, code) = run(Command::new("mount").args(words));
            assert_eq!(code, Some(0), "{err}");
        }
        Self(directory)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).output();
    }
}

#[test]
fn a_container_sees_the_directory_again_if_its_parent_is_kcms() {
    let mount = Mount::not_mounted_below_kcm();
    let shared = Shared::new(mount.home().join("kcm"));
    mount.start();
    let node = Node::with(mount, "dp", true, &["1"]);
    let (id, pid) = node.start("any");
    let conf = node.mount.conf().display().to_string();
    let ask = |line: &str| {
        let (out, err, _) = run(&mut node.podman(&["exec", &id, "sh", "-c", line]));
        (out, err)
    };
    let held = (format!("{pid}\n"), String::new());
    let read = format!("cat {conf}/pools/{}/1/tasks", node.pool);
    assert_eq!(ask(&read), held);
    for place in [shared.0.display().to_string(), conf.clone()] {
        let (_, err) = ask(&format!("echo > {place}/x"));
        assert!(err.contains("can't create"), "nobody can put a file there: {err}");
    }
    node.mount.stop();
    let (_, err) = ask(&format!("echo > {conf}/x"));
    assert!(err.contains("Read-only file system"), "nor into the empty mount point: {err}");
    node.mount.start();
    assert_eq!(ask(&read), held);
    assert_eq!(ask(&format!("echo -1 > {conf}/pools/{}/tasks; {read}", node.pool)).0, "", "it can write");
}

#[test]
fn devices_come_and_go_with_the_lists() {
    let node = Node::new("dp", true, &["0"]);
    let mut follow = node.mount.kcm(&["cdi", "install", "--follow", "--dir", super::SPECS]);
    let _follower = Sleeper::spawn(follow.stderr(Stdio::null()));
    fs::create_dir(node.mount.pool(&node.pool).join("1")).unwrap();
    until("the list is a device", || devices(&node) == ["any", "0", "1"]);
    let (_, pid) = node.start("1");
    assert_eq!(node.held("1"), [pid]);
    fs::remove_dir(node.mount.pool(&node.pool).join("0")).unwrap();
    until("the list is not a device", || devices(&node) == ["any", "1"]);
    let err = node.refused(&["--rm", &format!("--device={}", node.device("0"))]);
    assert!(err.contains("unresolvable CDI devices"), "{err}");
    signal(pid, Signal::SIGKILL);
    until("the list is free", || node.held("1").is_empty());
    let words = [
        "uninstall",
        "--install-dir=/nowhere",
        "--systemd=/nowhere",
        "--share-dir=/nowhere",
        "--cdi-dir",
        super::SPECS,
    ];
    let (_, err, code) = run(&mut node.mount.kcm(&words));
    assert_eq!(code, Some(0), "{err}");
    assert!(!node.spec().exists(), "{err}");
}
