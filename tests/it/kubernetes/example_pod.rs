//! `deploy/example-pod.yaml`: started as a kubelet and a container runtime do, it claims, says why not, and ends at once.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};

use super::api_server::deployed::{expanded, manifest};
use super::user_pod::{Node, READ_ONLY};
use crate::harness::{children, run, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A container of the example pod. Its shell is the first process of a PID namespace, as in a container.
struct Example {
    child: Child,
    stdout: BufReader<ChildStdout>,
}

impl Example {
    /// `shell`: what the image has as `sh`.
    fn start(node: &Node, shell: &str) -> Self {
        let pod = manifest("example-pod.yaml").remove(0);
        let container = &pod["spec"]["containers"][0];
        let words: Vec<String> = container["command"]
            .as_array()
            .unwrap()
            .iter()
            .map(|word| expanded(word.as_str().unwrap(), &[]))
            .collect();
        let [sh, dash_c, script] = words.try_into().expect("three words");
        assert_eq!((sh.as_str(), dash_c.as_str()), ("sh", "-c"));
        let home = node.mount.home().display().to_string();
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation=slave", "--pid", "--fork", "--mount-proc", "--kill-child"]);
        let then = "exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs $SH -c \"$SCRIPT\" 2>&1";
        command.args(["bash", "-c", &format!("{READ_ONLY} && {then}")]);
        command.env("H", &home).env("SH", shell).env("SCRIPT", script.replace("/run/kcm", &home));
        let mut child = command.current_dir("/").stdout(Stdio::piped()).spawn().expect("unshare");
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Self { child, stdout }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    /// Sends the signal with which a kubelet ends a container. Returns the exit status.
    fn terminate(&mut self) -> Option<i32> {
        let first = children(self.child.id()).first().copied().expect("the first process");
        kill(Pid::from_raw(first as i32), Signal::SIGTERM).unwrap();
        let mut status = None;
        until("the container has ended", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.and_then(|status| status.code())
    }
}

impl Drop for Example {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn the_example_pod_claims_or_says_why_not() {
    let node = Node::new();
    node.start();
    node.mount.make_pool("dataplane", true, &["0"]);
    for shell in ["sh", "busybox sh"] {
        let mut first = Example::start(&node, shell);
        assert_eq!([first.line(), first.line()], ["my CPUs:", "0"], "{shell}");
        assert!(!node.mount.read("pools/dataplane/0/tasks").is_empty());
        let mut second = Example::start(&node, shell);
        let said = second.line();
        assert!(!said.is_empty(), "{shell}: the shell says that the write failed");
        let reason = second.line();
        assert!(reason.contains("EBUSY: no list of dataplane is free (1 taken"), "{shell}: {reason}");
        assert_eq!(second.child.wait().unwrap().code(), Some(1), "{shell}");

        // It is deleted: nothing waits for a SIGKILL, and it is not a claim that had to be taken back.
        assert_eq!(first.terminate(), Some(0), "{shell}");
        until("the list is free", || node.mount.read("pools/dataplane/0/tasks").is_empty());
        assert_eq!(node.mount.read("info/reclaimed"), "", "{shell}");
    }
}

#[test]
fn the_example_pod_has_a_share_of_its_cpu_and_a_read_only_parent() {
    let pod = manifest("example-pod.yaml").remove(0);
    let container = &pod["spec"]["containers"][0];
    let resources = &container["resources"];
    assert_eq!(resources["requests"]["cpu"], "1", "a pod without requests gets what others leave");
    assert!(resources["requests"]["memory"].is_string());
    assert!(
        resources["limits"].get("cpu").is_none(),
        "not Guaranteed: the static CPU manager pins such pods"
    );
    assert_eq!(container["volumeMounts"][0]["readOnly"], true);
    // Kubernetes would change these characters.
    assert!(!container["command"].to_string().contains('$'));
}

#[test]
fn a_process_of_kubectl_exec_is_not_on_the_list() {
    let node = Node::new();
    node.start();
    node.mount.make_pool("dataplane", true, &["0"]);
    let mut example = Example::start(&node, "sh");
    assert_eq!([example.line(), example.line()], ["my CPUs:", "0"]);
    let first = children(example.child.id()).first().copied().expect("the first process");
    // A runtime starts it beside the processes of the container.
    let exec = |words: &[&str]| {
        run(Command::new("nsenter").args(words).args(["grep", "Cpus_allowed_list", "/proc/self/status"])).0
    };
    let inside = exec(&["--mount", "--pid", "--target", &first.to_string(), "--"]);
    assert_eq!(inside, exec(&["--"]), "the CPUs are those of the runtime");
    assert_ne!(inside, "Cpus_allowed_list:\t0\n");
}
