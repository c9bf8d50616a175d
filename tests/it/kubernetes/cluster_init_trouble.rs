//! `kcm cluster-init` with problems: pods that fail, a server with errors, and signals.

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;
use std::time::Duration;

use super::api_server::Fault;
use super::api_server::nodes::{
    KINDS, PODS, cluster, cluster_init, cluster_uninstall, made, name, pod_path, well,
};
use super::api_server::rights::Rights;
use crate::harness::{run, text, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

#[test]
fn a_different_existing_pod_is_left_alone() {
    let server = cluster(2);
    assert_eq!(run(&mut cluster_init(&server, &["--all-hosts", "--kcm-img=old"])).2, Some(0));
    server.forget_log();
    let (_, err, code) = run(&mut cluster_init(&server, &["--host-list=n1", "--kcm-img=new"]));
    assert_eq!(code, Some(1));
    assert!(err.contains("ERROR:root:pod default/kcm-mount-pod-n1: exists with a different spec.containers[0].image; kubectl delete pod -n default kcm-mount-pod-n1\n"), "{err}");
    assert_eq!(server.changes().len(), 0);
    // A pod of somebody else with the same name.
    server.remove(&pod_path(KINDS[0], "n2"));
    server.put(
        &pod_path(KINDS[0], "n2"),
        json!({ "kind": "Pod", "metadata": { "name": "kcm-mount-pod-n2" }, "spec": {} }),
    );
    let (_, err, code) = run(&mut cluster_init(&server, &["--host-list=n2", "--kcm-img=old"]));
    assert_eq!(code, Some(1));
    assert!(err.contains("pod default/kcm-mount-pod-n2: exists with a different "), "{err}");
}

#[test]
fn a_failed_pod_is_explained() {
    let server = cluster(3);
    server.kubelet(|pod| match name(pod) {
        "kcm-init-install-discover-pod-n2" => vec![(Duration::ZERO, json!({
            "phase": "Failed",
            "initContainerStatuses": [{ "name": "init", "state": { "terminated": { "exitCode": 1, "reason": "Error" } } }],
        }))],
        "kcm-mount-pod-n3" => vec![(Duration::ZERO, json!({
            "phase": "Running",
            "containerStatuses": [{ "name": "mount", "ready": false, "state": { "waiting": { "reason": "CrashLoopBackOff" } } }],
        }))],
        _ => well(pod),
    });
    server.write_log(
        "kcm-init-install-discover-pod-n2",
        "init",
        "INFO:root:x\nERROR:root:99 cores requested\n",
    );
    server.write_log("kcm-mount-pod-n3", "mount", "ERROR:root:/dev/fuse: no such device\n");
    let (_, err, code) = run(&mut cluster_init(&server, &["--all-hosts"]));
    assert_eq!(code, Some(1));
    for line in [
        "ERROR:root:pod default/kcm-init-install-discover-pod-n2, container init: Error (exit code 1); its last line: ERROR:root:99 cores requested; then kubectl delete pod -n default kcm-init-install-discover-pod-n2\n",
        "ERROR:root:pod default/kcm-mount-pod-n3, container mount: CrashLoopBackOff; its last line: ERROR:root:/dev/fuse: no such device; then kubectl delete pod -n default kcm-mount-pod-n3\n",
        "ERROR:root:2 of 3 nodes failed; solve the problems and run again\n",
    ] {
        assert!(err.contains(line), "{line} in {err}");
    }
    assert!(err.contains("INFO:root:n1: ready"), "the other nodes are prepared");
    assert!(server.object(&pod_path(KINDS[2], "n2")).is_none(), "the next pod is not created");
}

#[test]
fn missing_rights_of_the_default_account_have_a_cure_that_helps() {
    let server = cluster(1);
    server.kubelet(|pod| match name(pod) {
        "kcm-init-install-discover-pod-n1" => vec![(Duration::ZERO, json!({
            "phase": "Failed",
            "containerStatuses": [{ "name": "discover", "state": { "terminated": { "exitCode": 1, "reason": "Error" } } }],
        }))],
        _ => well(pod),
    });
    let line = "ERROR:root:node n1: nodes \"n1\" is forbidden: User \"system:serviceaccount:default:default\" cannot get resource \"nodes\" (403 Forbidden); …\n";
    server.write_log("kcm-init-install-discover-pod-n1", "discover", line);
    let (_, err, code) = run(&mut cluster_init(&server, &["--all-hosts"]));
    assert_eq!(code, Some(1));
    let cure = "; the default service account has no rights: kcm cluster-uninstall --host-list=n1 --namespace=default, kubectl apply -f deploy/rbac.yaml -f deploy/crds.yaml, then run again with --namespace=kcm-system --service-account=kcm-node\n";
    assert!(err.contains(cure), "{err}");
    // With an account, the message of the server is the cure.
    assert_eq!(run(&mut cluster_uninstall(&server, &["--all-hosts"])).2, Some(0));
    let (_, err, code) = run(&mut cluster_init(&server, &["--all-hosts", "--service-account=a"]));
    assert_eq!(code, Some(1));
    assert!(err.contains("403 Forbidden") && !err.contains(cure), "{err}");
}

#[test]
fn a_pod_that_hangs_ends_at_the_timeout() {
    let server = cluster(1);
    server.kubelet(|_| {
        vec![(Duration::ZERO, json!({
            "phase": "Pending",
            "containerStatuses": [{ "name": "mount", "ready": false, "state": { "waiting": { "reason": "ImagePullBackOff", "message": "no such image" } } }],
        }))]
    });
    let (_, err, code) = run(&mut cluster_init(&server, &["--host-list=n1", "--timeout=1"]));
    assert_eq!(code, Some(1));
    assert!(
        err.contains(
            "pod default/kcm-mount-pod-n1: not ready after 1 s: mount: ImagePullBackOff: no such image; "
        ),
        "{err}"
    );
}

#[test]
fn unknown_nodes_are_refused_first() {
    let server = cluster(2);
    let (_, err, code) = run(&mut cluster_init(&server, &["--host-list=n1, n7,n2,n8"]));
    assert_eq!(
        (err.as_str(), code),
        ("ERROR:root:not in this cluster: n7, n8; nothing was created; see kubectl get nodes\n", Some(1))
    );
    assert_eq!(server.changes().len(), 0);
}

#[test]
fn cluster_init_survives_server_errors() {
    let server = cluster(3);
    server.misbehave(Fault::Status(500, None), 2, |method, _| method == "POST");
    server.misbehave(Fault::CutAfterwards, 2, |method, _| method == "POST");
    server.misbehave(Fault::Status(429, Some(1)), 1, |method, _| method == "POST");
    server.misbehave(Fault::Cut, 2, |_, path| path.contains("watch=true"));
    server.misbehave(Fault::Expired, 1, |_, path| path.contains("watch=true"));
    server.misbehave(Fault::Status(410, None), 1, |_, path| path.contains("watch=true"));
    server.misbehave(Fault::Garbage, 1, |_, path| path.contains("watch=true"));
    server.misbehave(Fault::Half, 2, |_, path| path.contains("watch=true"));
    server.misbehave(Fault::Half, 2, |_, path| path.contains("/nodes"));
    server.misbehave(Fault::Slow(Duration::from_millis(300)), 2, |_, path| path.contains("/nodes"));
    let (_, err, code) = run(&mut cluster_init(&server, &["--all-hosts"]));
    assert_eq!(code, Some(0), "{err}");
    assert_eq!(made(&server).len(), 9, "no pod is created twice");
}

#[test]
fn an_expired_watch_starts_from_a_list() {
    let server = cluster(1);
    let count = |part: &str| server.log().iter().filter(|entry| entry.path.contains(part)).count();
    // Each watch ends after one event, and the next one continues from there.
    server.kubelet(|_| Vec::new());
    server.misbehave(Fault::Ends, usize::MAX, |_, path| path.contains("watch=true"));
    let child =
        cluster_init(&server, &["--all-hosts", "--timeout=15"]).stderr(Stdio::piped()).spawn().unwrap();
    until("it has taken the watch up", || count("watch=true") >= 2);
    assert_eq!(count("pods?labelSelector"), 1, "the next watch continues without a list");
    server.change(&pod_path(KINDS[0], "n1"), |pod| pod["status"] = well(pod).pop().unwrap().1);
    server.forget_changes();
    server.kubelet(well);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
}

#[test]
fn lists_replace_watches_that_report_nothing() {
    let server = cluster(1);
    server.misbehave(Fault::Garbage, usize::MAX, |_, path| path.contains("watch=true"));
    let (_, err, code) = run(&mut cluster_init(&server, &["--all-hosts", "--timeout=15"]));
    assert_eq!(code, Some(0), "{err}");
}

#[test]
fn a_quota_conflict_is_retried() {
    let server = cluster(3);
    // There is no pod of this name: the quota has changed.
    server.misbehave(Fault::Conflict, 10, |method, _| method == "POST");
    let (_, err, code) = run(&mut cluster_init(&server, &["--all-hosts"]));
    assert_eq!(code, Some(0), "{err}");
    assert_eq!(server.log().iter().filter(|entry| entry.status == 409).count(), 10);
    assert_eq!(made(&server).len(), 9);
}

#[test]
fn a_pod_is_created_after_its_deletion_ends() {
    let server = cluster(1);
    assert_eq!(run(&mut cluster_init(&server, &["--all-hosts"])).2, Some(0));
    server.change(&pod_path(KINDS[0], "n1"), |pod| {
        pod["metadata"]["deletionTimestamp"] = json!("2026-11-23T20:57:18Z");
    });
    server.forget_log();
    let child = cluster_init(&server, &["--all-hosts"]).stderr(Stdio::piped()).spawn().unwrap();
    until("it watches", || server.log().iter().any(|entry| entry.path.contains("watch=true")));
    assert_eq!(made(&server).len(), 0);
    server.remove(&pod_path(KINDS[0], "n1"));
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(made(&server), ["kcm-mount-pod-n1"]);
}

#[test]
fn a_deleted_pod_is_named() {
    let server = cluster(1);
    server.kubelet(|_| Vec::new());
    let child = cluster_init(&server, &["--all-hosts"]).stderr(Stdio::piped()).spawn().unwrap();
    until("mount is there", || server.object(&pod_path(KINDS[0], "n1")).is_some());
    server.remove(&pod_path(KINDS[0], "n1"));
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let err = text(&output.stderr);
    assert!(
        err.contains("ERROR:root:pod default/kcm-mount-pod-n1: it was deleted meanwhile; run again\n"),
        "{err}"
    );
}

#[test]
fn cluster_init_without_rights_names_the_role() {
    let server = cluster(1);
    server.add_user("tied", "tied", Rights::None);
    let mut command = cluster_init(&server, &["--all-hosts"]);
    let (_, err, code) = run(command.env("KUBECONFIG", server.kubeconfig("tied")));
    assert_eq!((code, err.lines().count()), (Some(1), 1), "{err}");
    assert!(err.contains("403 Forbidden") && err.contains("deploy/rbac.yaml"), "{err}");
}

#[test]
fn an_interrupt_lists_the_created_pods() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let server = cluster(2);
        server.kubelet(|pod| if name(pod).ends_with("n1") { Vec::new() } else { well(pod) });
        let mut child = cluster_init(&server, &["--host-list=n1,n2"]).stderr(Stdio::piped()).spawn().unwrap();
        // When a node is ready, all answers have arrived.
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
        assert!(lines.any(|line| line.contains("n2: ready")));
        kill(Pid::from_raw(child.id() as i32), signal).unwrap();
        let last = lines.last().expect("a line");
        assert_eq!(child.wait().unwrap().code(), Some(1));
        let said = last.strip_prefix("ERROR:root:interrupted; created pods, which stay: ").expect(&last);
        let mut pods: Vec<&str> =
            said.strip_suffix("; run again to continue").expect(&last).split(", ").collect();
        pods.sort_unstable();
        let mut expected = vec![format!("{}-n1", KINDS[0])];
        expected.extend(KINDS.map(|kind| format!("{kind}-n2")));
        expected.sort_unstable();
        assert_eq!(pods, expected);
        assert!(pods.iter().all(|pod| server.object(&format!("{PODS}/{pod}")).is_some()));
    }
}
