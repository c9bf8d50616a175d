//! Nodes that cluster-init prepares.
//!
//! Owns how their pods run. Does not know what the tests check.

use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use super::{ADMIN, ApiServer};
use crate::harness::KCM;

pub const PODS: &str = "/api/v1/namespaces/default/pods";
pub const KINDS: [&str; 3] =
    ["kcm-mount-pod", "kcm-init-install-discover-pod", "kcm-reconcile-nodereport-pod"];

pub fn pod_path(kind: &str, node: &str) -> String {
    format!("{PODS}/{kind}-{node}")
}

pub fn name(pod: &Value) -> &str {
    pod["metadata"]["name"].as_str().unwrap()
}

/// Returns the statuses of a pod that reaches its goal.
pub fn well(pod: &Value) -> Vec<(Duration, Value)> {
    let moment = Duration::from_millis(5);
    let ready =
        |ready: bool| json!({ "phase": "Running", "containerStatuses": [{ "name": "c", "ready": ready }] });
    match pod["spec"]["restartPolicy"].as_str() {
        Some("Never") => {
            vec![(moment, json!({ "phase": "Running" })), (moment, json!({ "phase": "Succeeded" }))]
        }
        _ => vec![(moment, ready(false)), (moment, ready(true))],
    }
}

/// Returns a node on which discover has run.
pub fn advertised(name: &str) -> Value {
    json!({
        "kind": "Node", "apiVersion": "v1",
        "metadata": { "name": name, "labels": { "kcm.intel.com/kcm-node": "true" } },
        "spec": { "taints": [{ "key": "kcm", "value": "true", "effect": "NoSchedule" }] },
        "status": { "capacity": { "cpu": "8", "pod.alpha.kubernetes.io/opaque-int-resource-kcm": "4" } },
    })
}

/// Starts a server with nodes that discover has advertised.
pub fn cluster(nodes: usize) -> ApiServer {
    let server = ApiServer::start();
    for node in 1..=nodes {
        let node = format!("n{node}");
        server.put(&format!("/api/v1/nodes/{node}"), advertised(&node));
    }
    server.kubelet(well);
    server
}

pub fn cluster_init(server: &ApiServer, words: &[&str]) -> Command {
    let mut command = Command::new(KCM);
    command.arg("cluster-init").args(words).env("KUBECONFIG", server.kubeconfig(ADMIN));
    command
}

pub fn cluster_uninstall(server: &ApiServer, words: &[&str]) -> Command {
    let mut command = Command::new(KCM);
    command.arg("cluster-uninstall").args(words).env("KUBECONFIG", server.kubeconfig(ADMIN));
    command
}

/// The names of the pods that were created.
pub fn made(server: &ApiServer) -> Vec<String> {
    let log = server.log().into_iter().filter(|entry| entry.method == "POST" && entry.status == 201);
    log.map(|entry| name(&entry.body).to_owned()).collect()
}
