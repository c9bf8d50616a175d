//! `kcm cluster-uninstall`: the order in which it takes back what cluster-init has made, and what stays if it is refused.

use std::process::Command;
use std::time::Duration;

use super::api_server::ApiServer;
use super::api_server::nodes::{
    KINDS, PODS, advertised, cluster, cluster_init, cluster_uninstall, made, name, pod_path, well,
};
use crate::harness::{KCM, run};
use serde_json::{Value, json};

const UNINSTALL: &str = "kcm-uninstall-pod";

/// The names of pods that were deleted, and of nodes that were changed, in this order.
fn changes(server: &ApiServer) -> Vec<String> {
    let log = server.changes().into_iter().filter(|entry| entry.status < 300);
    let path = |path: &str| path.split('?').next().unwrap_or_default().to_owned();
    let log = log.filter(|entry| entry.method != "POST");
    log.map(|entry| path(&entry.path).trim_start_matches("/api/v1/").replace("namespaces/default/pods/", ""))
        .collect()
}

fn pods(server: &ApiServer, node: &str) -> usize {
    let kinds = KINDS.iter().chain([&UNINSTALL]);
    kinds.filter(|kind| server.object(&pod_path(kind, node)).is_some()).count()
}

/// A kubelet on whose nodes the uninstall pod is refused.
fn refusing(pod: &Value) -> Vec<(Duration, Value)> {
    if !name(pod).starts_with(UNINSTALL) {
        return well(pod);
    }
    let ended = json!({ "terminated": { "exitCode": 1, "reason": "Error" } });
    let status = json!({ "phase": "Failed", "containerStatuses": [{ "name": "uninstall", "state": ended }] });
    vec![(Duration::ZERO, status)]
}

#[test]
fn a_node_is_taken_back_in_an_order_that_works() {
    let server = cluster(1);
    assert_eq!(run(&mut cluster_init(&server, &["--all-hosts"])).2, Some(0));
    server.forget_log();
    let (_, err, code) = run(&mut cluster_uninstall(&server, &["--all-hosts"]));
    assert_eq!(code, Some(0), "{err}");
    // The pod that uninstalls needs the mount; discover would set slots again.
    assert_eq!(made(&server), ["kcm-uninstall-pod-n1"]);
    let order = [
        "kcm-init-install-discover-pod-n1",
        "kcm-reconcile-nodereport-pod-n1",
        "kcm-uninstall-pod-n1",
        "nodes/n1/status",
        "nodes/n1",
        "kcm-mount-pod-n1",
    ];
    assert_eq!(changes(&server), order);
    let node = server.object("/api/v1/nodes/n1").unwrap();
    assert_eq!(node["status"]["capacity"], json!({ "cpu": "8" }));
    assert_eq!((&node["spec"]["taints"], &node["metadata"]["labels"]), (&json!([]), &json!({})));
    assert!(
        err.contains("INFO:root:/var/lib/kcm and the mount point /etc/kcm stay on the nodes.\n"),
        "{err}"
    );

    server.forget_log();
    let (_, err, code) = run(&mut cluster_uninstall(&server, &["--all-hosts"]));
    assert_eq!((code, server.changes().len()), (Some(0), 0), "a second run does nothing: {err}");
}

#[test]
fn the_uninstall_pod_needs_no_right_at_the_server() {
    let server = cluster(1);
    assert_eq!(run(&mut cluster_init(&server, &["--all-hosts"])).2, Some(0));
    server.forget_log();
    let words = ["--all-hosts", "--force", "--kcm-img=registry/kcm:2", "--install-dir=/usr/local/bin"];
    assert_eq!(run(&mut cluster_uninstall(&server, &words)).2, Some(0));
    let pod = server.changes().into_iter().find(|entry| entry.method == "POST").unwrap().body;
    let container = &pod["spec"]["containers"][0];
    assert!(container.get("env").is_none(), "without NODE_NAME, kcm uninstall asks no API server");
    assert_eq!(
        container["args"],
        json!(["uninstall", "--conf-dir=/host/etc/kcm", "--install-dir=/usr/local/bin", "--force"])
    );
    assert_eq!(container["image"], "registry/kcm:2");
    assert_eq!(pod["spec"]["restartPolicy"], "Never");
    let mounts: Vec<_> = container["volumeMounts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|mount| mount["mountPath"].clone())
        .collect();
    assert_eq!(mounts, ["/host/etc", "/usr/local/bin"]);
    let args: Vec<&str> =
        container["args"].as_array().unwrap().iter().map(|arg| arg.as_str().unwrap()).collect();
    assert_eq!(run(Command::new(KCM).args(&args).arg("--help")).2, Some(0));
}

#[test]
fn a_live_claim_refuses_and_leaves_the_node_as_it_was() {
    let server = cluster(2);
    assert_eq!(run(&mut cluster_init(&server, &["--all-hosts"])).2, Some(0));
    let before = server.object("/api/v1/nodes/n1").unwrap();
    server.kubelet(|pod| if name(pod).ends_with("n1") { refusing(pod) } else { well(pod) });
    let line = "ERROR:root:dataplane 0 is held by 4711; end that first, or release it with --force";
    server.write_log("kcm-uninstall-pod-n1", "uninstall", &format!("{line}\n"));
    let (_, err, code) = run(&mut cluster_uninstall(&server, &["--all-hosts"]));
    assert_eq!(code, Some(1));
    assert!(err.contains("kcm-uninstall-pod-n1, container uninstall: Error (exit code 1); its last line: ERROR:root:dataplane 0 is held by 4711"), "{err}");
    assert!(err.ends_with("ERROR:root:1 of 2 nodes failed; solve the problems and run again\n"), "{err}");
    assert_eq!(
        (pods(&server, "n1"), pods(&server, "n2")),
        (3, 0),
        "the pods of n1 stay, without the last one"
    );
    assert_eq!(server.object("/api/v1/nodes/n1").unwrap(), before);

    // The claim has ended.
    server.kubelet(well);
    let (_, err, code) = run(&mut cluster_uninstall(&server, &["--all-hosts"]));
    assert_eq!((code, pods(&server, "n1")), (Some(0), 0), "{err}");
}

#[test]
fn a_named_node_without_pods_gets_a_mount_for_the_removal() {
    let server = cluster(2);
    // Only a daemon can take back what the state directory records.
    assert_eq!(run(&mut cluster_uninstall(&server, &["--host-list=n1"])).2, Some(0));
    assert_eq!(made(&server), ["kcm-mount-pod-n1", "kcm-uninstall-pod-n1"]);
    assert_eq!(pods(&server, "n1"), 0);
    assert_eq!(server.object("/api/v1/nodes/n1").unwrap()["spec"]["taints"], json!([]));
    assert_eq!(server.object("/api/v1/nodes/n2").unwrap()["spec"], advertised("n2")["spec"]);
}

#[test]
fn a_mount_that_was_made_for_the_removal_does_not_stay() {
    let server = cluster(1);
    server.kubelet(refusing);
    let (_, err, code) = run(&mut cluster_uninstall(&server, &["--host-list=n1"]));
    assert_eq!((code, pods(&server, "n1")), (Some(1), 0), "{err}");
}

#[test]
fn an_interrupted_uninstall_is_continued() {
    let server = cluster(1);
    assert_eq!(run(&mut cluster_init(&server, &["--all-hosts"])).2, Some(0));
    let mut left = server.object(&pod_path(KINDS[1], "n1")).unwrap();
    left["metadata"]["name"] = "kcm-uninstall-pod-n1".into();
    left["status"] = json!({ "phase": "Failed" });
    server.put(&pod_path(UNINSTALL, "n1"), left);
    server.remove(&pod_path(KINDS[1], "n1"));
    server.forget_log();
    let (_, err, code) = run(&mut cluster_uninstall(&server, &["--all-hosts"]));
    assert_eq!((code, pods(&server, "n1")), (Some(0), 0), "{err}");
    assert_eq!(made(&server), ["kcm-uninstall-pod-n1"], "the failed one is replaced");
}

#[test]
fn a_dry_run_of_cluster_uninstall_changes_nothing() {
    let server = cluster(2);
    assert_eq!(run(&mut cluster_init(&server, &["--host-list=n1"])).2, Some(0));
    server.forget_log();
    let (_, err, code) = run(&mut cluster_uninstall(&server, &["--all-hosts", "--dry-run"]));
    assert_eq!((code, server.changes().len()), (Some(0), 0));
    let line = "INFO:root:n1: would run kcm uninstall, delete kcm-init-install-discover-pod-n1, kcm-mount-pod-n1, \
                kcm-reconcile-nodereport-pod-n1, and remove slots, label and taint.\n";
    assert_eq!(err, line);
}

#[test]
fn a_node_that_is_not_known_or_a_wrong_path_is_refused_first() {
    let server = cluster(1);
    for (words, code, part) in [
        (&["--host-list=n1,n7"][..], 1, "not in this cluster: n7"),
        (&[], 2, "--host-list <list>|--all-hosts"),
        (&["--all-hosts", "--conf-dir=etc"], 1, "give an absolute path"),
        (&["--all-hosts", "--state-dir=/"], 1, "cannot be a directory of kcm"),
    ] {
        let (_, err, got) = run(&mut cluster_uninstall(&server, words));
        assert_eq!(got, Some(code), "{words:?}: {err}");
        assert!(err.contains(part), "{words:?}: {err}");
    }
    assert_eq!(server.changes().len(), 0);
    assert!(server.log().iter().all(|entry| !entry.path.starts_with(PODS)));
}
