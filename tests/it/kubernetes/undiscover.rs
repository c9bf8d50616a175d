//! `kcm undiscover`: cleans nodes from outside, without a mount and without a kubelet.

use std::process::Command;

use super::api_server::rights::Rights;
use super::api_server::{ADMIN, ApiServer};
use crate::harness::{KCM, Mount, run};
use serde_json::{Value, json};

const OPAQUE: &str = "pod.alpha.kubernetes.io/opaque-int-resource-kcm";
const REPORTS: &str = "/apis/kcm.intel.com/v1/namespaces/default";

fn node(name: &str) -> String {
    format!("/api/v1/nodes/{name}")
}

/// A node as its kubelet creates it.
fn fresh(name: &str) -> Value {
    json!({
        "kind": "Node", "apiVersion": "v1",
        "metadata": { "name": name, "labels": { "zone": "a" }, "annotations": { "note": "x" } },
        "spec": { "taints": [{ "key": "gpu", "effect": "NoExecute" }] },
        "status": { "capacity": { "cpu": "2" }, "allocatable": { "cpu": "2" } },
    })
}

/// The parts of a node that kcm changes.
fn parts(server: &ApiServer, name: &str) -> [Option<Value>; 4] {
    let node = server.object(&node(name)).unwrap();
    ["/spec", "/status", "/metadata/labels", "/metadata/annotations"].map(|part| node.pointer(part).cloned())
}

/// Two nodes with slots under several names, another taint, and reports. Returns their parts before.
fn discovered(mount: &Mount) -> (ApiServer, [Option<Value>; 4]) {
    let server = ApiServer::start();
    for name in ["n1", "n2"] {
        server.put(&node(name), fresh(name));
    }
    let before = parts(&server, "n1");
    for (name, words) in [
        ("n1", &["discover", "--taint=dedicated=kcm:NoSchedule"][..]),
        ("n2", &["discover", "--resource-name=extended"]),
        ("n1", &["node-report", "--publish"]),
        ("n1", &["reconcile", "--publish"]),
    ] {
        let mut command = mount.kcm(words);
        command.env("KUBECONFIG", server.kubeconfig(ADMIN)).env("NODE_NAME", name);
        assert_eq!(run(&mut command).2, Some(0), "{words:?}");
    }
    for name in ["n1", "n2"] {
        // Slots that an older kcm or another tool has left, too.
        server.change(&node(name), |node| node["status"]["capacity"]["kcm.intel.com/old"] = "1".into());
        server.kubelet_copies(&node(name));
        // And the kubelet is gone.
        assert_ne!(parts(&server, name), before);
    }
    server.forget_log();
    (server, before)
}

fn undiscover(server: &ApiServer, words: &[&str]) -> (String, String, Option<i32>) {
    let mut command = Command::new(KCM);
    // The node of this machine does not matter.
    command.arg("undiscover").args(words).env("KUBECONFIG", server.kubeconfig(ADMIN)).env("NODE_NAME", "n9");
    run(&mut command)
}

#[test]
fn undiscover_removes_everything_from_outside() {
    let mount = Mount::with_dataplane();
    let (server, before) = discovered(&mount);
    drop(mount);
    let (out, err, code) = undiscover(&server, &["--node=n1"]);
    assert_eq!((out.as_str(), code), ("", Some(0)), "{err}");
    assert_eq!(
        err,
        "INFO:root:Removed the slots, the label and the taint of node n1.\n\
         INFO:root:Removed the NodeReport of node n1.\n\
         INFO:root:Removed the ReconcileReport of node n1.\n"
    );
    assert_eq!(parts(&server, "n1"), before);
    assert_ne!(parts(&server, "n2"), before);
    for plural in ["nodereports", "reconcilereports"] {
        assert_eq!(server.object(&format!("{REPORTS}/{plural}/n1")), None);
    }
    let (_, err, code) = undiscover(&server, &["--all-hosts"]);
    assert_eq!(
        (err.as_str(), code),
        (
            "INFO:root:Node n1 has nothing of kcm.\n\
             INFO:root:Removed the slots, the label and the taint of node n2.\n",
            Some(0)
        )
    );
    assert_eq!(parts(&server, "n2"), before);
    server.forget_log();
    let (_, err, code) = undiscover(&server, &["--node=n1,n2"]);
    assert_eq!((err.matches("has nothing of kcm").count(), code), (2, Some(0)), "{err}");
    assert!(server.changes().iter().all(|entry| entry.method == "DELETE" && entry.status == 404));
}

#[test]
fn a_dry_run_shows_the_requests_and_sends_none() {
    let mount = Mount::with_dataplane();
    let (server, _) = discovered(&mount);
    let (out, err, code) = undiscover(&server, &["--node=n1", "--dry-run"]);
    assert_eq!((err.as_str(), code), ("", Some(0)));
    assert_eq!(server.changes().len(), 0);
    let heads: Vec<&str> = out.lines().filter_map(|line| line.strip_prefix("# ")).collect();
    assert_eq!(
        heads,
        [
            "PATCH /api/v1/nodes/n1/status (application/json-patch+json)",
            "PATCH /api/v1/nodes/n1 (application/merge-patch+json)",
            "DELETE /apis/kcm.intel.com/v1/namespaces/default/nodereports/n1 (application/json)",
            "DELETE /apis/kcm.intel.com/v1/namespaces/default/reconcilereports/n1 (application/json)",
        ]
    );
    assert!(out.contains("/status/allocatable/pod.alpha.kubernetes.io~1opaque-int-resource-kcm"), "{out}");
    assert_eq!(undiscover(&server, &["--all-hosts"]).2, Some(0));
    let (out, err, code) = undiscover(&server, &["--node=n1", "--dry-run"]);
    assert_eq!((out.as_str(), err.as_str(), code), ("", "INFO:root:Node n1 has nothing of kcm.\n", Some(0)));
}

#[test]
fn a_node_that_fails_does_not_stop_the_others() {
    let mount = Mount::with_dataplane();
    let (server, before) = discovered(&mount);
    let (_, err, code) = undiscover(&server, &["--node=n7,n2"]);
    assert_eq!(code, Some(1));
    assert!(err.starts_with("ERROR:root:node n7: nodes \"n7\" not found (404 NotFound)"), "{err}");
    assert_eq!(parts(&server, "n2"), before);
    // Rights that are missing are named.
    let nodes = json!({ "apiGroups": [""], "resources": ["nodes", "nodes/status"], "verbs": ["get", "list", "patch"] });
    server.add_user("no-reports", "no-reports", Rights::Rules(vec![nodes]));
    let mut command = Command::new(KCM);
    command.args(["undiscover", "--all-hosts"]).env("KUBECONFIG", server.kubeconfig("no-reports"));
    let (_, err, code) = run(&mut command);
    assert_eq!(code, Some(1));
    assert_eq!(parts(&server, "n1"), before, "the node is clean nevertheless");
    assert!(err.contains("cannot delete resource \"nodereports\""), "{err}");
}

#[test]
fn the_nodes_must_be_named() {
    let server = ApiServer::start();
    for words in [&[][..], &["--node=N_1"], &["--node=n1", "--all-hosts"]] {
        let (out, err, code) = undiscover(&server, words);
        assert_eq!((out.as_str(), code), ("", Some(2)), "{words:?}: {err}");
    }
    assert_eq!(server.log().len(), 0);
    assert!(OPAQUE.contains("kubernetes.io/"), "a native resource for the kubelet");
}
