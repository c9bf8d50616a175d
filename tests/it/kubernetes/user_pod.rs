//! A user's pod: it has the directory with `HostToContainer`, its own PID namespace, and no capability. Every mount
//! reaches it, whether the pod or the daemon starts first.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use crate::harness::{KCM, Mount, Sleeper, run, set_mode, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A node. It shares the parent of the mount point with pods. The daemon has its own mount namespace, from which its
/// mount reaches the node (`Bidirectional`).
pub(super) struct Node {
    pub(super) mount: Mount,
}

impl Node {
    pub(super) fn new() -> Self {
        let mount = Mount::not_mounted();
        let home = mount.home().display().to_string();
        for words in [&["--bind", &home, &home][..], &["--make-private", &home], &["--make-shared", &home]] {
            let (_, err, code) = run(Command::new("mount").args(words));
            assert_eq!(code, Some(0), "{err}");
        }
        Self { mount }
    }

    pub(super) fn start(&self) {
        let mount = self.mount.mount_command();
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation=unchanged"]).arg(mount.get_program()).args(mount.get_args());
        let (_, err, code) = run(&mut command);
        assert_eq!(code, Some(0), "{err}");
        assert!(self.mount.conf().join("info/version").exists(), "the mount reaches the node");
    }

    fn pod(&self) -> Pod {
        Pod::new(self.mount.home(), &self.mount.conf())
    }

    /// Starts a pod whose hostPath is the mount point itself. The directory has another path in the pod.
    fn pod_of_the_mount_point(&self) -> Pod {
        Pod::of_host_path(&self.mount.conf(), Path::new("/run/kcm-of-the-node"))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.mount.kcm(&["unmount"]).stderr(Stdio::null()).status();
        for pid in self.mount.daemons() {
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
        }
        for directory in [self.mount.conf(), self.mount.home().to_path_buf()] {
            let _ = Command::new("umount").arg("-l").arg(directory).stderr(Stdio::null()).status();
        }
    }
}

/// Mounts as a container runtime does for `readOnly` and `HostToContainer`: only the mount itself is read-only.
pub(super) const READ_ONLY: &str =
    "mount --rbind $H $H && mount -o remount,bind,ro $H && mount --make-rslave $H";

/// A shell in a container: `mountPropagation: HostToContainer` is rslave.
struct Pod {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Pod {
    fn new(home: &Path, conf: &Path) -> Self {
        Self::start(&READ_ONLY.replace("$H", &home.display().to_string()), conf, Path::new("/"))
    }

    /// Mounts as a container runtime does: a recursive bind mount with slave propagation.
    fn of_host_path(path: &Path, place: &Path) -> Self {
        let bind = "mount -t tmpfs none /run && mkdir $C && mount --rbind $P $C && mount --make-rslave $C";
        let bind = bind.replace("$P", &path.display().to_string());
        Self::start(&bind, place, Path::new("/"))
    }

    fn start(first: &str, conf: &Path, directory: &Path) -> Self {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation=slave", "--pid", "--fork", "--mount-proc", "--kill-child"]);
        let then = "exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs bash";
        command.args(["bash", "-c", &format!("{first} && {then}")]);
        command.env("KCM", KCM).env("C", conf).current_dir(directory);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("unshare");
        let (stdin, stdout) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut pod = Self { child, stdin, stdout };
        assert_eq!(pod.sh("grep CapEff /proc/self/status"), ("CapEff:\t0000000000000000\n".into(), 0));
        assert_eq!(pod.sh("echo $$").0, "1\n", "its PIDs are its own");
        pod
    }

    /// Runs a line. Returns its output and status.
    fn sh(&mut self, line: &str) -> (String, i32) {
        writeln!(self.stdin, "( {line} ) 2>&1; echo @$?").unwrap();
        let mut text = String::new();
        loop {
            let mut line = String::new();
            assert!(self.stdout.read_line(&mut line).unwrap() > 0, "the pod has ended: {text}");
            match line.strip_prefix('@') {
                Some(status) => return (text, status.trim().parse().unwrap()),
                None => text.push_str(&line),
            }
        }
    }

    /// Claims with `kcm isolate` and with `echo`.
    fn claims(&mut self, when: &str) {
        let isolate =
            "$KCM isolate --conf-dir=$C --pool=dataplane -- grep Cpus_allowed_list /proc/self/status";
        assert_eq!(self.sh(isolate), ("Cpus_allowed_list:\t0\n".into(), 0), "{when}");
        let echo = "bash -c 'echo $$ > $C/pools/dataplane/tasks && cat $C/self/claim && cat $C/pools/dataplane/0/tasks'";
        let (text, status) = self.sh(echo);
        let (claim, pid) = text.split_once('\n').expect("two lines");
        assert_eq!((claim, status), ("dataplane 0", 0), "{when}: {text}");
        assert!(pid.trim().parse::<u32>().is_ok(), "{when}: {text}");
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn pods_claim_across_restarts_and_remounts() {
    let node = Node::new();
    let mut before = node.pod();
    let (text, status) = before.sh("$KCM describe --conf-dir=$C");
    assert!(status == 1 && text.contains("no such directory"), "{text}");

    node.start();
    node.mount.make_pool("dataplane", true, &["0", "1"]);
    let mut during = node.pod();
    before.claims("started before the mount");
    during.claims("started while it is mounted");

    let worker = node.mount.worker().expect("a worker");
    kill(Pid::from_raw(worker as i32), Signal::SIGKILL).unwrap();
    during.claims("over the death of the worker");
    before.claims("over the death of the worker");

    node.mount.stop();
    let mut after = node.pod();
    for pod in [&mut before, &mut during, &mut after] {
        let (text, status) = pod.sh("$KCM describe --conf-dir=$C");
        assert!(status == 1 && text.contains("kcm mount is not running"), "{text}");
    }
    node.start();
    before.claims("mounted anew");
    during.claims("mounted anew");
    after.claims("started after a stop");

    // The whole daemon is killed, as when a node runs out of memory: no process is left to unmount.
    node.mount.kill_daemon();
    node.start();
    for pod in [&mut before, &mut during, &mut after] {
        pod.claims("taken over");
    }
}

/// The container of `kcm cluster-uninstall`: it has two capabilities, the PIDs of the node, and no NODE_NAME.
#[test]
fn uninstall_in_a_pod_leaves_the_mount_to_its_pod() {
    let node = Node::new();
    node.start();
    node.mount.make_pool("dataplane", true, &["0"]);
    let program = node.mount.home().join("kcm");
    std::fs::write(&program, "x").unwrap();
    let uninstall = |more: &[&str]| {
        let mut command = Command::new("unshare");
        command.args([
            "--mount",
            "--propagation=slave",
            "setpriv",
            "--bounding-set=-all,+sys_admin,+sys_nice",
        ]);
        command.args(["--inh-caps=-all", KCM, "uninstall", "--systemd=/nowhere"]).args(more);
        command.arg(format!("--conf-dir={}", node.mount.conf().display()));
        run(command.arg(format!("--install-dir={}", node.mount.home().display())).env_remove("NODE_NAME"))
    };
    let claimed = Sleeper::new();
    crate::harness::write(&node.mount.tasks("dataplane", "0"), claimed.pid().to_string()).unwrap();
    let (_, err, code) = uninstall(&[]);
    assert_eq!(code, Some(1), "{err}");
    assert!(err.contains(&format!("dataplane 0 is held by {}", claimed.pid())), "{err}");
    assert!(program.exists() && node.mount.pool("dataplane").exists(), "nothing is removed");

    let (_, err, code) = uninstall(&["--force"]);
    assert_eq!(code, Some(0), "{err}");
    assert!(err.contains("is still served by a daemon in another mount namespace"), "{err}");
    assert!(!program.exists() && !node.mount.pool("dataplane").exists());
    assert!(node.mount.conf().join("info/version").exists(), "the mount ends with its pod");
}

#[test]
fn a_user_namespace_needs_a_mode_for_all() {
    let node = Node::new();
    node.start();
    node.mount.make_pool("dataplane", true, &["0"]);
    let conf = node.mount.conf();
    let claim = || {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=100000", "--regid=100000", "--clear-groups"]);
        command.args(["unshare", "--user", "--map-root-user", "--pid", "--fork", "bash", "-c"]);
        command
            .arg("id -u; echo 0 > $C/pools/dataplane/tasks && cat $C/self/claim || cat $C/self/last_error");
        run(command.env("C", &conf).current_dir("/"))
    };
    let (out, err, _) = claim();
    assert_eq!(out, "0\n", "root in its container, and no reason: {err}");
    assert!(err.contains("Permission denied"), "{err}");
    set_mode(&conf.join("pools/dataplane/tasks"), 0o666);
    let (out, err, code) = claim();
    assert_eq!((out.as_str(), err.as_str(), code), ("0\ndataplane 0\n", "", Some(0)));
}

#[test]
fn a_pod_can_put_nothing_into_the_empty_mount_point() {
    let node = Node::new();
    std::fs::create_dir(node.mount.conf()).unwrap();
    let mut pod = node.pod();
    for line in ["touch $C/x", "mkdir $C/pools", "rmdir $C && ln -s /etc $C", "mv $C $C.old"] {
        let (text, status) = pod.sh(line);
        assert!(status != 0 && text.contains("Read-only file system"), "{line}: {text}");
    }
    node.start();
    node.mount.make_pool("dataplane", true, &["0"]);
    pod.claims("the mount below is writable");
}

#[test]
fn a_claim_survives_sigterm_of_the_daemon() {
    let node = Node::new();
    node.start();
    node.mount.make_pool("dataplane", true, &["0"]);
    let mut pod = node.pod();
    let (_, status) = pod.sh("sleep 1000 & echo $! > $C/pools/dataplane/tasks");
    assert_eq!(status, 0);
    let holder = node.mount.read("pools/dataplane/0/tasks");
    assert!(!holder.is_empty());
    // The kubelet ends a container with SIGTERM.
    kill(Pid::from_raw(node.mount.supervisor() as i32), Signal::SIGTERM).unwrap();
    until("the daemon has gone", || node.mount.daemons().is_empty());
    let (text, status) = pod.sh("ls $C/pools");
    assert_ne!(status, 0, "{text}");
    node.start();
    assert_eq!(node.mount.read("pools/dataplane/0/tasks"), holder, "the claim has outlived the daemon");
    let (text, status) = pod.sh("bash -c 'echo $$ > $C/pools/dataplane/tasks'");
    assert!(status != 0 && text.contains("busy"), "{text}");
}

#[test]
fn a_pod_of_the_mount_point_keeps_its_mount() {
    let node = Node::new();
    std::fs::create_dir(node.mount.conf()).unwrap();
    let mut before = node.pod_of_the_mount_point();
    node.start();
    node.mount.make_pool("dataplane", true, &["0", "1"]);
    let mut during = node.pod_of_the_mount_point();
    // A pod that started before the mount gets it.
    before.claims("started before the mount");
    during.claims("started while it is mounted");

    let worker = node.mount.worker().expect("a worker");
    kill(Pid::from_raw(worker as i32), Signal::SIGKILL).unwrap();
    before.claims("over the death of the worker");
    during.claims("over the death of the worker: the mount is the same");

    node.mount.stop();
    let mut after = node.pod_of_the_mount_point();
    node.start();
    before.claims("mounted anew");
    after.claims("started after a stop");
    let is_dead = |pod: &mut Pod| {
        let (text, status) = pod.sh("ls $C/pools");
        assert!(status != 0 && text.contains("Transport endpoint is not connected"), "{text}");
        let (text, status) = pod.sh("$KCM isolate --conf-dir=$C --pool=dataplane -- true");
        assert!(status == 1 && text.contains("kcm mount is not running; start it"), "{text}");
    };
    is_dead(&mut during);
    node.mount.kill_daemon();
    node.start();
    is_dead(&mut during);
    before.claims("taken over");
    node.pod_of_the_mount_point().claims("what helps: a pod that is started anew");
}
