//! The admission policies of `deploy/`: the account of nodes can change only the node of its pod, and nothing of kcm breaks.

use super::api_server::admission::Admission;
use super::api_server::deployed::{admission, deployed, expanded};
use super::api_server::rights::Named;
use crate::harness::{Mount, run};
use serde_json::{Value, json};

const REPORTS: &str = "/apis/kcm.intel.com/v1/namespaces/default/nodereports/";
const EVENTS: &str = "/api/v1/namespaces/default/events/e1";
const OWN_NODE_ONLY: &str = "a pod of kcm may change only its own node and the reports of it";

/// Returns the message of a denial.
fn denial(admission: &Admission, path: &str, user: &str, operation: &str, object: &Value) -> Option<String> {
    let named = Named::parse(path).expect("a path");
    admission.denial(&named, user, operation, object).map(|(_, message)| message)
}

fn of_node(name: &str) -> Value {
    json!({ "metadata": { "name": name } })
}

fn event(kind: &str, name: &str) -> Value {
    json!({ "metadata": { "name": "e1" }, "involvedObject": { "kind": kind, "name": name } })
}

#[test]
fn the_account_of_nodes_changes_only_its_own_node() {
    let on_n1 = admission(Some("n1"));
    let denied =
        |path: &str, operation: &str, object: &Value| denial(&on_n1, path, "kcm-node", operation, object);
    for node in ["n1", "n2"] {
        let expected = (node != "n1").then(|| OWN_NODE_ONLY.to_owned());
        for path in [format!("/api/v1/nodes/{node}"), format!("/api/v1/nodes/{node}/status")] {
            assert_eq!(denied(&path, "UPDATE", &of_node(node)), expected, "{path}");
        }
        for operation in ["CREATE", "UPDATE"] {
            assert_eq!(denied(&format!("{REPORTS}{node}"), operation, &of_node(node)), expected);
            let reconciled = format!("{REPORTS}{node}").replace("nodereports", "reconcilereports");
            assert_eq!(denied(&reconciled, operation, &of_node(node)), expected);
            assert_eq!(denied(EVENTS, operation, &event("Node", node)), expected);
        }
    }
    assert_eq!(denied(EVENTS, "CREATE", &event("Pod", "n1")), Some(OWN_NODE_ONLY.into()), "not about a node");
}

#[test]
fn a_token_without_a_node_may_change_nothing() {
    let unknown = admission(None);
    for (path, object) in [("/api/v1/nodes/n1", of_node("n1")), (EVENTS, event("Node", "n1"))] {
        let message = denial(&unknown, path, "kcm-node", "UPDATE", &object).expect("a denial");
        assert!(message.contains("the token names no node") && message.contains("1.30"), "{message}");
    }
}

#[test]
fn other_accounts_are_not_concerned() {
    let on_n1 = admission(Some("n1"));
    for user in ["kcm-cluster-init", "kcm-cluster-uninstall", "kcm-node2", "admin"] {
        assert_eq!(denial(&on_n1, "/api/v1/nodes/n2", user, "UPDATE", &of_node("n2")), None, "{user}");
    }
    // And other resources are not.
    assert_eq!(
        denial(&on_n1, "/api/v1/namespaces/default/pods/p", "kcm-node", "CREATE", &of_node("p")),
        None
    );
}

#[test]
fn a_pod_on_another_node_is_refused_with_the_policy() {
    let (server, mount) = (deployed(), Mount::with_dataplane());
    for (node, status) in [("n1", 0), ("n2", 1)] {
        for words in [&["discover"][..], &["node-report", "--publish"], &["reconcile", "--publish"]] {
            let mut command = mount.kcm(words);
            command.env("KUBECONFIG", server.kubeconfig("kcm-node")).env("NODE_NAME", node);
            let (_, err, code) = run(&mut command);
            assert_eq!(code, Some(status), "{words:?} {node}: {err}");
            let is_explained =
                err.contains("ValidatingAdmissionPolicy 'kcm-node'") && err.contains(OWN_NODE_ONLY);
            assert_eq!(is_explained, status == 1, "{words:?} {node}: {err}");
        }
    }
    assert_eq!(server.object("/api/v1/nodes/n2").unwrap()["status"], json!({}));
    // Events, too. Without pools, init says that the machine cannot have so many cores.
    let empty = Mount::new();
    for node in ["n1", "n2"] {
        let mut init = empty.kcm(&["init", "--if-empty", "--num-dp-cores=9999"]);
        init.env("KUBECONFIG", server.kubeconfig("kcm-node")).env("NODE_NAME", node);
        assert_eq!(run(&mut init).2, Some(0));
        let event = format!("/api/v1/namespaces/default/events/{node}.kcmlayoutimpossible");
        assert_eq!(server.object(&event).is_some(), node == "n1");
    }
}

#[test]
fn commands_are_expanded_as_by_a_kubelet() {
    for (word, expected) in [
        ("echo $$ > x", "echo $ > x"),
        ("$$$$", "$$"),
        ("$(NODE)/$(NONE)", "n1/$(NONE)"),
        ("$$(NODE)", "$(NODE)"),
        ("$(NODE", "$(NODE"),
        ("a $x $", "a $x $"),
        ("$(cat f)", "$(cat f)"),
    ] {
        assert_eq!(expanded(word, &[("NODE", "n1")]), expected, "{word}");
    }
}
