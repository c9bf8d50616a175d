//! Every command that talks to a server, and a cluster in which each of them succeeds.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::json;

use super::ApiServer;
use super::rights::Rights;
use crate::harness::{KCM, Mount};

/// Every command that talks to a server. The last one removes the pools.
pub const COMMANDS: [&[&str]; 9] = [
    &["discover", "--dry-run"],
    &["discover", "--resource-name=extended"],
    &["node-report", "--publish"],
    &["reconcile", "--publish"],
    &["cluster-init", "--all-hosts", "--timeout=60"],
    &["cluster-init", "--all-hosts", "--dry-run"],
    &["cluster-uninstall", "--all-hosts", "--timeout=60"],
    &["undiscover", "--node=n1"],
    &["uninstall"],
];

/// Starts a server with one node. The token `tied-4f1c` has no rights.
pub fn cluster() -> ApiServer {
    let server = ApiServer::start();
    server.put(
        "/api/v1/nodes/n1",
        json!({ "kind": "Node", "apiVersion": "v1", "metadata": { "name": "n1" }, "status": {} }),
    );
    server.kubelet(|pod| {
        let phase = if pod["spec"]["restartPolicy"] == "Never" { "Succeeded" } else { "Running" };
        vec![(Duration::ZERO, json!({ "phase": phase }))]
    });
    server.add_user("tied-4f1c", "tied", Rights::None);
    server
}

/// Returns the command `kcm <words>` on this mount, as in a pod of the node n1.
pub fn kcm(mount: &Mount, words: &[&str], kubeconfig: &Path, level: &str) -> Command {
    let mut command = Command::new(KCM);
    command.args(words);
    if words[0] == "uninstall" {
        let home = mount.home().display();
        command.args([format!("--install-dir={home}"), format!("--systemd={home}")]);
    }
    if words[0] != "undiscover" && !words[0].starts_with("cluster-") {
        command.arg("--conf-dir").arg(mount.conf());
    }
    command.env("KUBECONFIG", kubeconfig).env("NODE_NAME", "n1");
    command.env("KCM_LOG_LEVEL", level).env("RUST_LOG", "trace");
    command
}

/// Asserts that a text contains neither this secret nor a header that has one.
pub fn assert_no_secret(said: &str, secret: &str) {
    for word in [secret, "Bearer", "uthorization:"] {
        assert!(!said.contains(word), "{word} is in: {said}");
    }
}
