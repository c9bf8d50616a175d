//! `kcm discover`: it sets slots, label and taint of a node, and changes nothing else.

use std::process::Command;
use std::time::{Duration, Instant};

use super::api_server::rights::Rights;
use super::api_server::{ADMIN, ApiServer, Fault};
use crate::harness::{Mount, Sleeper, run, until};
use serde_json::{Value, json};

const NODE: &str = "/api/v1/nodes/n1";
const OPAQUE: &str = "pod.alpha.kubernetes.io/opaque-int-resource-kcm";

/// Returns a node as its kubelet creates it.
fn node(name: &str) -> Value {
    json!({
        "kind": "Node", "apiVersion": "v1", "metadata": { "name": name },
        "spec": { "taints": [{ "key": "node.kubernetes.io/not-ready", "effect": "NoSchedule" }] },
        "status": { "capacity": { "cpu": "2", "memory": "32Gi", "pods": "110" } },
    })
}

fn cluster() -> ApiServer {
    let server = ApiServer::start();
    server.put(NODE, node("n1"));
    server
}

/// Returns the command `kcm <words>` with the rights of an administrator.
fn kcm(server: &ApiServer, mount: &Mount, words: &[&str]) -> Command {
    let mut command = mount.kcm(words);
    command.env("KUBECONFIG", server.kubeconfig(ADMIN)).env("NODE_NAME", "n1");
    command
}

fn capacity(server: &ApiServer, name: &str) -> Value {
    server.object(NODE).unwrap()["status"]["capacity"][name].clone()
}

fn ours() -> Value {
    json!({ "key": "kcm", "value": "true", "effect": "NoSchedule" })
}

#[test]
fn discover_sets_slots_label_and_taint_once() {
    let (server, mount) = (cluster(), Mount::with_dataplane());
    let (out, err, code) = run(&mut kcm(&server, &mount, &["discover"]));
    assert_eq!((out.as_str(), code), ("", Some(0)), "{err}");
    assert_eq!(err, format!("INFO:root:Node n1 advertises 2 {OPAQUE}.\n"));
    let node = server.object(NODE).unwrap();
    assert_eq!(
        node["status"]["capacity"],
        json!({ "cpu": "2", "memory": "32Gi", "pods": "110", OPAQUE: "2" })
    );
    assert_eq!(node["metadata"]["labels"], json!({ "kcm.intel.com/kcm-node": "true" }));
    let not_ready = json!({ "key": "node.kubernetes.io/not-ready", "effect": "NoSchedule" });
    assert_eq!(node["spec"]["taints"], json!([not_ready, ours()]));
    assert_eq!(server.changes().len(), 2);
    let version = concat!("kcm/", env!("CARGO_PKG_VERSION"));
    assert!(server.log().iter().all(|entry| entry.agent == version), "each request names its author");

    server.forget_log();
    let (_, err, code) = run(&mut kcm(&server, &mount, &["discover"]));
    assert_eq!((err.as_str(), code), ("", Some(0)));
    assert_eq!(server.changes().len(), 0, "the second run changes nothing");
    assert_eq!(server.object(NODE).unwrap(), node);
}

#[test]
fn slots_have_one_resource_name() {
    let (server, mount) = (cluster(), Mount::with_dataplane());
    assert_eq!(run(&mut kcm(&server, &mount, &["discover"])).2, Some(0));
    assert_eq!(run(&mut kcm(&server, &mount, &["discover", "--resource-name=extended"])).2, Some(0));
    assert_eq!(capacity(&server, OPAQUE), Value::Null);
    assert_eq!(capacity(&server, "kcm.intel.com/dataplane"), "2");
    assert_eq!(run(&mut kcm(&server, &mount, &["discover"])).2, Some(0));
    assert_eq!(capacity(&server, OPAQUE), "2");
    assert_eq!(capacity(&server, "kcm.intel.com/dataplane"), Value::Null);
    assert_eq!(capacity(&server, "cpu"), "2");
}

#[test]
fn slots_of_another_name_leave_allocatable_too() {
    let (server, mount) = (cluster(), Mount::with_dataplane());
    let allocatable = |name: &str| {
        server.kubelet_copies(NODE);
        server.object(NODE).unwrap()["status"]["allocatable"][name].clone()
    };
    assert_eq!(run(&mut kcm(&server, &mount, &["discover"])).2, Some(0));
    assert_eq!(allocatable(OPAQUE), "2", "the kubelet copies it");
    // The kubelet itself never takes the legacy resource away.
    server.change(NODE, |node| {
        node["status"]["capacity"].as_object_mut().unwrap().remove(OPAQUE);
    });
    assert_eq!(allocatable(OPAQUE), "2");
    assert_eq!(run(&mut kcm(&server, &mount, &["discover", "--resource-name=extended"])).2, Some(0));
    assert_eq!((allocatable(OPAQUE), allocatable("kcm.intel.com/dataplane")), (Value::Null, json!("2")));
    assert_eq!(run(&mut kcm(&server, &mount, &["discover"])).2, Some(0));
    assert_eq!((allocatable(OPAQUE), allocatable("kcm.intel.com/dataplane")), (json!("2"), Value::Null));
    // A slot that goes is gone before the kubelet looks.
    std::fs::remove_dir(mount.pool("dataplane").join("1")).unwrap();
    assert_eq!(run(&mut kcm(&server, &mount, &["discover"])).2, Some(0));
    assert_eq!(server.object(NODE).unwrap()["status"]["allocatable"][OPAQUE], "1");
    let home = mount.home().display().to_string();
    let (install, systemd) = (format!("--install-dir={home}"), format!("--systemd={home}"));
    assert_eq!(run(&mut kcm(&server, &mount, &["uninstall", &install, &systemd])).2, Some(0));
    assert_eq!((allocatable(OPAQUE), allocatable("cpu")), (Value::Null, json!("2")));
}

#[test]
fn the_taint_is_chosen_and_the_one_before_is_removed() {
    let (server, mount) = (cluster(), Mount::with_dataplane());
    let not_ready = json!({ "key": "node.kubernetes.io/not-ready", "effect": "NoSchedule" });
    let discover = |words: &[&str]| {
        let (_, err, code) = run(kcm(&server, &mount, &["discover"]).args(words));
        assert_eq!(code, Some(0), "{words:?}: {err}");
        server.forget_log();
        let (_, err, code) = run(kcm(&server, &mount, &["discover"]).args(words));
        assert_eq!(
            (err.as_str(), code, server.changes().len()),
            ("", Some(0), 0),
            "{words:?} changes nothing more"
        );
        let node = server.object(NODE).unwrap();
        assert_eq!(node["metadata"]["labels"], json!({ "kcm.intel.com/kcm-node": "true" }), "{words:?}");
        let taints = node["spec"]["taints"].as_array().unwrap().clone();
        assert_eq!(taints[0], not_ready, "{words:?}");
        taints[1..].to_vec()
    };
    let dedicated = json!({ "key": "example.com/dedicated", "value": "kcm", "effect": "PreferNoSchedule" });
    assert_eq!(discover(&[]), [ours()]);
    assert_eq!(discover(&["--taint=example.com/dedicated=kcm:PreferNoSchedule"]), [dedicated]);
    assert_eq!(
        discover(&["--taint=dedicated:NoSchedule"]),
        [json!({ "key": "dedicated", "effect": "NoSchedule" })]
    );
    assert_eq!(discover(&["--no-taint"]), [Value::Null; 0]);
    assert_eq!(
        discover(&["--taint=kcm=yes:NoExecute"]),
        [json!({ "key": "kcm", "value": "yes", "effect": "NoExecute" })]
    );
    assert_eq!(discover(&[]), [ours()]);
    for words in [
        &["--taint=kcm"][..],
        &["--taint=k=v:Never"],
        &["--taint=a b:NoSchedule"],
        &["--taint=a:NoSchedule", "--no-taint"],
    ] {
        let (out, err, code) = run(kcm(&server, &mount, &["discover"]).args(words));
        assert_eq!((out.as_str(), code), ("", Some(2)), "{words:?}: {err}");
    }
}

#[test]
fn every_exclusive_pool_has_an_extended_resource() {
    let (server, mount) = (cluster(), Mount::new());
    mount.make_pool("dataplane", true, &["0"]);
    mount.make_pool("fast", true, &["1"]);
    mount.make_pool("slow", false, &[]);
    assert_eq!(run(&mut kcm(&server, &mount, &["discover", "--resource-name=extended"])).2, Some(0));
    let node = server.object(NODE).unwrap();
    let ours: Vec<_> =
        node["status"]["capacity"].as_object().unwrap().keys().filter(|k| k.contains('/')).collect();
    assert_eq!(ours, ["kcm.intel.com/dataplane", "kcm.intel.com/fast"]);
}

#[test]
fn a_node_without_capacity_gets_it() {
    let (server, mount) = (cluster(), Mount::with_dataplane());
    server.change(NODE, |node| node["status"] = json!({}));
    let (_, err, code) = run(&mut kcm(&server, &mount, &["discover"]));
    assert_eq!(code, Some(0), "{err}");
    assert_eq!(server.object(NODE).unwrap()["status"]["capacity"], json!({ OPAQUE: "2" }));
}

#[test]
fn taints_and_labels_of_others_stay() {
    let (server, mount) = (cluster(), Mount::with_dataplane());
    let others = json!([
        { "key": "gpu", "value": "a", "effect": "NoExecute", "timeAdded": "2026-11-23T20:57:18Z" },
        { "key": "kcm", "value": "other", "effect": "NoExecute" },
        { "key": "kcm", "value": "stale", "effect": "NoSchedule" },
    ]);
    server.change(NODE, |node| {
        node["spec"]["taints"] = others.clone();
        node["metadata"]["labels"] = json!({ "zone": "a" });
        node["spec"]["podCIDR"] = json!("10.0.0.0/24");
    });
    assert_eq!(run(&mut kcm(&server, &mount, &["discover"])).2, Some(0));
    let node = server.object(NODE).unwrap();
    assert_eq!(node["spec"]["taints"], json!([others[0], others[1], ours()]));
    assert_eq!(node["spec"]["podCIDR"], "10.0.0.0/24");
    assert_eq!(node["metadata"]["labels"], json!({ "zone": "a", "kcm.intel.com/kcm-node": "true" }));
}

#[test]
fn a_reset_capacity_is_set_again_at_the_next_run() {
    let (server, mount) = (cluster(), Mount::with_dataplane());
    let _discover = Sleeper::spawn(&mut kcm(&server, &mount, &["discover", "--interval=0.05"]));
    for _ in 0..3 {
        until("it is advertised", || capacity(&server, OPAQUE) == "2");
        server.change(NODE, |node| node["status"]["capacity"] = json!({ "cpu": "2" }));
    }
    until("it is advertised again", || capacity(&server, OPAQUE) == "2");
    // Each run counts the lists again.
    std::fs::remove_dir(mount.pool("dataplane").join("1")).unwrap();
    until("one list is left", || capacity(&server, OPAQUE) == "1");
}

#[test]
fn concurrent_discovers_do_not_interfere() {
    let (server, mount) = (cluster(), Mount::with_dataplane());
    let start = || kcm(&server, &mount, &["discover"]).stderr(std::process::Stdio::piped()).spawn().unwrap();
    let children: Vec<_> = (0..4).map(|_| start()).collect();
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", crate::harness::text(&output.stderr));
    }
    let node = server.object(NODE).unwrap();
    assert_eq!(node["spec"]["taints"].as_array().unwrap().len(), 2);
    assert_eq!(node["status"]["capacity"][OPAQUE], "2");
}

#[test]
fn conflicts_are_retried_on_the_new_node() {
    let (server, mount) = (cluster(), Mount::with_dataplane());
    server.misbehave(Fault::Conflict, 10, |method, path| method == "PATCH" && path.ends_with("status"));
    server.misbehave(Fault::Conflict, 10, |method, path| method == "PATCH" && !path.ends_with("status"));
    let (_, err, code) = run(&mut kcm(&server, &mount, &["discover"]));
    assert_eq!(code, Some(0), "{err}");
    let log = server.log();
    assert_eq!(log.iter().filter(|entry| entry.status == 409).count(), 20);
    assert_eq!(log.iter().filter(|entry| entry.method == "GET").count(), 21, "read again after each");
    assert_eq!(capacity(&server, OPAQUE), "2");
    assert_eq!(server.object(NODE).unwrap()["spec"]["taints"][1], ours());
}

#[test]
fn a_dry_run_shows_the_patches_and_sends_none() {
    let (server, mount) = (cluster(), Mount::with_dataplane());
    let (out, err, code) = run(&mut kcm(&server, &mount, &["discover", "--dry-run"]));
    assert_eq!((err.as_str(), code), ("", Some(0)));
    assert_eq!(server.changes().len(), 0);
    assert!(out.starts_with("# PATCH /api/v1/nodes/n1/status (application/json-patch+json)\n"), "{out}");
    for part in [
        "/status/capacity/pod.alpha.kubernetes.io~1opaque-int-resource-kcm",
        "---\n# PATCH /api/v1/nodes/n1 (",
        "NoSchedule",
    ] {
        assert!(out.contains(part), "{part} in {out}");
    }
    // The shown patches are the ones that are sent.
    assert_eq!(run(&mut kcm(&server, &mount, &["discover"])).2, Some(0));
    let sent: Vec<Value> = server.changes().into_iter().map(|entry| entry.body).collect();
    let [capacity, marks] = sent.try_into().expect("two patches");
    let mut shown: Vec<Value> = serde_saphyr::from_multiple(&out).unwrap();
    // The second patch is made from the node as the first one left it.
    shown[1]["metadata"]["resourceVersion"] = marks["metadata"]["resourceVersion"].clone();
    assert_eq!(shown, [capacity, marks]);
}

#[test]
fn transient_errors_and_retry_after_are_waited_for() {
    let (server, mount) = (cluster(), Mount::with_dataplane());
    server.misbehave(Fault::Status(500, None), 1, |_, _| true);
    server.misbehave(Fault::Cut, 1, |_, _| true);
    server.misbehave(Fault::Garbage, 1, |_, _| true);
    server.misbehave(Fault::Half, 1, |_, _| true);
    server.misbehave(Fault::Slow(Duration::from_millis(200)), 1, |_, _| true);
    server.misbehave(Fault::Status(503, None), 1, |_, _| true);
    server.misbehave(Fault::CutAfterwards, 1, |method, _| method == "PATCH");
    server.misbehave(Fault::Status(429, Some(2)), 1, |method, path| {
        method == "PATCH" && !path.ends_with("status")
    });
    let started = Instant::now();
    let (_, err, code) = run(&mut kcm(&server, &mount, &["discover"]));
    assert_eq!(code, Some(0), "{err}");
    assert!(started.elapsed() >= Duration::from_secs(2), "Retry-After is heeded");
    assert_eq!(capacity(&server, OPAQUE), "2");
}

#[test]
fn an_unanswered_request_is_sent_again() {
    let (server, mount) = (cluster(), Mount::with_dataplane());
    server.misbehave(Fault::Slow(Duration::from_secs(600)), 1, |_, _| true);
    let started = Instant::now();
    let (_, err, code) = run(&mut kcm(&server, &mount, &["discover"]));
    assert_eq!(code, Some(0), "{err}");
    assert!(started.elapsed() >= Duration::from_secs(10));
    assert_eq!(capacity(&server, OPAQUE), "2");
}

#[test]
fn a_refusal_is_final_and_names_the_cure() {
    let (server, mount) = (cluster(), Mount::with_dataplane());
    server.add_user("tied", "tied", Rights::None);
    for (token, node, line) in [
        (
            "unknown",
            "n1",
            "ERROR:root:node n1: Unauthorized (401 Unauthorized); the token or certificate is not accepted; check the kubeconfig or the service account\n",
        ),
        (
            "tied",
            "n1",
            "ERROR:root:node n1: nodes \"n1\" is forbidden: User \"tied\" cannot get resource \"nodes\" in API group \"\" at the cluster scope (403 Forbidden); grant the right: kubectl apply -f deploy/rbac.yaml\n",
        ),
        (
            ADMIN,
            "n2",
            "ERROR:root:node n2: nodes \"n2\" not found (404 NotFound); check the name, and the cluster that KUBECONFIG names\n",
        ),
    ] {
        server.forget_log();
        let mut command = kcm(&server, &mount, &["discover"]);
        command.env("KUBECONFIG", server.kubeconfig(token)).env("NODE_NAME", node);
        assert_eq!(run(&mut command), (String::new(), line.into(), Some(1)));
        assert_eq!(server.log().len(), 1, "a 4xx is not tried again");
    }
}

#[test]
fn local_errors_come_before_any_request() {
    let (server, mount) = (cluster(), Mount::new());
    let refused = |node: Option<&str>, words: &[&str]| {
        let mut command = kcm(&server, &mount, words);
        match node {
            Some(node) => command.env("NODE_NAME", node),
            None => command.env_remove("NODE_NAME"),
        };
        let (_, err, code) = run(&mut command);
        assert_eq!(code, Some(1), "{err}");
        assert_eq!(err.lines().count(), 1, "{err}");
        err
    };
    assert!(refused(Some("n1"), &["discover"]).starts_with("ERROR:root:Dataplane pool does not exist"));
    mount.make_pool("dataplane", true, &[]);
    assert!(refused(Some("n1"), &["discover"]).starts_with("ERROR:root:No CPU list in dataplane pool"));
    assert!(refused(None, &["discover"]).contains("set NODE_NAME, or give --node"));
    assert!(refused(Some("n/../x"), &["discover"]).contains("not the name of a node"));
    assert_eq!(server.log().len(), 0);
}

#[test]
fn without_a_cluster_there_is_one_line() {
    let mount = Mount::with_dataplane();
    let mut command = mount.kcm(&["discover", "--node=n1"]);
    command.env("KUBECONFIG", "/nonexistent").env_remove("NODE_NAME").env_remove("KUBERNETES_SERVICE_HOST");
    let (_, err, code) = run(&mut command);
    assert_eq!(code, Some(1));
    assert_eq!(err.lines().count(), 1, "{err}");
    assert!(err.contains("no cluster to talk to") && err.contains("set KUBECONFIG"), "{err}");
}

#[test]
fn uninstall_removes_only_what_discover_set() {
    let (server, mount) = (cluster(), Mount::with_dataplane());
    server.change(NODE, |node| node["metadata"]["labels"] = json!({ "zone": "a" }));
    let before = server.object(NODE).unwrap();
    assert_eq!(run(&mut kcm(&server, &mount, &["discover", "--resource-name=extended"])).2, Some(0));
    let sleeper = Sleeper::new();
    crate::harness::write(&mount.tasks("dataplane", "0"), sleeper.pid().to_string()).unwrap();
    let install_dir = format!("--install-dir={}", mount.home().display());
    let systemd = format!("--systemd={}", mount.home().display());
    let words = ["uninstall", &install_dir, &systemd];
    let (_, err, code) = run(&mut kcm(&server, &mount, &words));
    assert_eq!(code, Some(1), "{err}");
    assert_eq!(
        capacity(&server, "kcm.intel.com/dataplane"),
        "2",
        "while claims are live nothing is taken back"
    );
    sleeper.end();
    let (_, err, code) = run(&mut kcm(&server, &mount, &words));
    assert_eq!(code, Some(0), "{err}");
    assert!(err.starts_with("INFO:root:Removed the slots, the label and the taint of node n1.\n"), "{err}");
    let after = server.object(NODE).unwrap();
    for part in ["/spec", "/status", "/metadata/labels"] {
        assert_eq!(after.pointer(part), before.pointer(part));
    }
    assert!(!mount.pool("dataplane").exists());
}

#[test]
fn uninstall_without_the_cluster_removes_nothing() {
    let mount = Mount::with_dataplane();
    let mut command = mount.kcm(&["uninstall", "--node=n1"]);
    command.env("KUBECONFIG", "/nonexistent").env_remove("NODE_NAME").env_remove("KUBERNETES_SERVICE_HOST");
    let (_, err, code) = run(&mut command);
    assert_eq!((code, err.lines().count()), (Some(1), 1), "{err}");
    assert!(mount.pool("dataplane").exists());
}
