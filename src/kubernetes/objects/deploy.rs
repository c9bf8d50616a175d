//! The manifests in `deploy/`, made of the same parts as the program's requests.
//!
//! Owns their contents and comments. They are committed, so that they can be read and applied; a test compares them
//! with what is made here, and `golden` says how to write them again. Does not know what a cluster does with them.

use std::fmt::Write as _;

use k8s_openapi::api::core::v1::{Namespace, ServiceAccount, Toleration, VolumeMount};
use k8s_openapi::api::rbac::v1::{ClusterRoleBinding, PolicyRule, RoleRef, Subject};
use kube::core::ObjectMeta;
use serde_json::json;

use super::golden::assert_committed;
use super::pods::volume_mount;
use super::reports::{NodeReport, ReconcileReport, definition};
use super::{GROUP, yaml, yaml_stream};

mod admission;
mod daemon_set;
mod device_plugin;
mod example;
mod helm;
mod kustomize;

const NAMESPACE: &str = "kcm-system";
const IMAGE: &str = "kcm";
/// Without it, the policy of `kcm:latest` would be `Always`, and no registry has that image.
const PULL_POLICY: &str = "IfNotPresent";
/// Shared with the pods of users: the parent of the mount point, so that a later mount reaches them.
const SHARED: &str = "/run/kcm";
const CONF_DIR: &str = "/run/kcm/conf";
const STATE_DIR: &str = "/var/lib/kcm";
/// The account of the DaemonSet, and of the pods of cluster-init.
const NODE_ACCOUNT: &str = "kcm-node";
/// The label that chooses the nodes of the DaemonSet. It is not the one that discover sets: that one goes with the slots.
const SELECTED: &str = "kcm.intel.com/enabled";
/// The ConfigMap with the layouts of pools. It is optional.
const LAYOUTS: &str = "kcm-layouts";

/// A right of a service account, and why it needs it.
struct Rule {
    why: &'static str,
    group: &'static str,
    resource: &'static str,
    verbs: &'static [&'static str],
}

const NODE_RULES: [Rule; 5] = [
    Rule {
        why: "discover reads its node, and sets the label and the taint; reports name the node as their owner",
        group: "",
        resource: "nodes",
        verbs: &["get", "patch"],
    },
    Rule {
        why: "discover sets the node's capacity, which is part of its status",
        group: "",
        resource: "nodes/status",
        verbs: &["patch"],
    },
    Rule {
        why: "init, discover and node-report send Events of the node by server-side apply, which creates a missing object",
        group: "",
        resource: "events",
        verbs: &["create", "patch"],
    },
    Rule {
        why: "node-report publishes by server-side apply, which creates a missing object",
        group: GROUP,
        resource: "nodereports",
        verbs: &["create", "patch"],
    },
    Rule {
        why: "reconcile does the same, after it has read which reclaims are published",
        group: GROUP,
        resource: "reconcilereports",
        verbs: &["create", "get", "patch"],
    },
];

const CLUSTER_INIT_RULES: [Rule; 3] = [
    Rule {
        why: "cluster-init checks that the nodes exist, or prepares all of them, and waits until they are advertised",
        group: "",
        resource: "nodes",
        verbs: &["get", "list"],
    },
    Rule {
        why: "cluster-init creates pods, compares existing ones, and waits for them",
        group: "",
        resource: "pods",
        verbs: &["create", "get", "list", "watch"],
    },
    Rule {
        why: "cluster-init shows the last line of a container that has failed",
        group: "",
        resource: "pods/log",
        verbs: &["get"],
    },
];

const CLUSTER_UNINSTALL_RULES: [Rule; 6] = [
    Rule {
        why: "cluster-uninstall checks that the nodes exist, and removes the label and the taint",
        group: "",
        resource: "nodes",
        verbs: &["get", "list", "patch"],
    },
    Rule {
        why: "cluster-uninstall removes the slots from the capacity, which is part of the status",
        group: "",
        resource: "nodes/status",
        verbs: &["patch"],
    },
    Rule {
        why: "cluster-uninstall removes the report of node-report",
        group: GROUP,
        resource: "nodereports",
        verbs: &["delete"],
    },
    Rule {
        why: "cluster-uninstall removes the report of reconcile",
        group: GROUP,
        resource: "reconcilereports",
        verbs: &["delete"],
    },
    Rule {
        why: "cluster-uninstall creates the pod that uninstalls, waits for it, and deletes the pods of kcm",
        group: "",
        resource: "pods",
        verbs: &["create", "delete", "get", "list", "watch"],
    },
    Rule {
        why: "cluster-uninstall shows the last line of a container that has failed",
        group: "",
        resource: "pods/log",
        verbs: &["get"],
    },
];

fn named(name: &str) -> ObjectMeta {
    ObjectMeta { name: Some(name.into()), ..Default::default() }
}

fn labelled() -> ObjectMeta {
    let labels = [("app.kubernetes.io/name".to_owned(), "kcm".to_owned())];
    ObjectMeta { labels: Some(labels.into()), ..Default::default() }
}

fn metadata(name: &str) -> ObjectMeta {
    ObjectMeta { name: Some(name.into()), namespace: Some(NAMESPACE.into()), ..labelled() }
}

fn header(text: &str) -> String {
    let generated = "# Generated from src/kubernetes/objects/deploy.rs; that file says how to do it again.\n";
    let text: String = text.lines().map(|line| format!("# {line}\n")).collect();
    text + generated
}

/// Returns a role with a comment at each rule, its service account, and the binding of the two.
fn account(name: &str, rules: &[Rule]) -> String {
    let account = ServiceAccount { metadata: metadata(name), ..Default::default() };
    let mut role = yaml(&json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": { "name": name },
    }));
    role.push_str("rules:\n");
    for Rule { why, group, resource, verbs } in rules {
        let rule = PolicyRule {
            api_groups: Some(vec![(*group).into()]),
            resources: Some(vec![(*resource).into()]),
            verbs: verbs.iter().map(|verb| (*verb).into()).collect(),
            ..Default::default()
        };
        let _ = write!(role, "# {why}.\n{}", yaml(&[rule]));
    }
    let binding = ClusterRoleBinding {
        metadata: named(name),
        role_ref: RoleRef {
            api_group: "rbac.authorization.k8s.io".into(),
            kind: "ClusterRole".into(),
            name: name.into(),
        },
        subjects: Some(vec![Subject {
            kind: "ServiceAccount".into(),
            name: name.into(),
            namespace: Some(NAMESPACE.into()),
            ..Default::default()
        }]),
    };
    [yaml(&account), role, yaml(&binding)].join("---\n")
}

fn rbac() -> String {
    let labels = [("pod-security.kubernetes.io/enforce".to_owned(), "privileged".to_owned())];
    let metadata = ObjectMeta { labels: Some(labels.into()), ..named(NAMESPACE) };
    let namespace = Namespace { metadata, ..Default::default() };
    let text = "The namespace, and one role for each service account: the requests that kcm sends, and nothing else.\n\
                crds.yaml defines the kinds, so nobody here has the right to define any.\n\
                kcm-node is for the DaemonSet and for the pods of cluster-init; admission.yaml ties it to the node of its pod.\n\
                kcm-cluster-init and kcm-cluster-uninstall are for the commands of these names.";
    let parts = [
        yaml(&namespace),
        account(NODE_ACCOUNT, &NODE_RULES),
        account("kcm-cluster-init", &CLUSTER_INIT_RULES),
        account("kcm-cluster-uninstall", &CLUSTER_UNINSTALL_RULES),
    ];
    header(text) + &parts.join("---\n")
}

fn crds() -> String {
    let text = "The kinds NodeReport (kubectl get nr) and ReconcileReport (kubectl get rr).";
    let definitions = [definition::<NodeReport>().unwrap(), definition::<ReconcileReport>().unwrap()];
    header(text) + &yaml_stream(&definitions)
}

/// Tolerates the taint that discover sets by default.
fn tolerates_kcm() -> Toleration {
    Toleration {
        key: Some("kcm".into()),
        value: Some("true".into()),
        effect: Some("NoSchedule".into()),
        ..Default::default()
    }
}

fn shared_mount(propagation: &str) -> VolumeMount {
    VolumeMount { mount_propagation: Some(propagation.into()), ..volume_mount("shared", SHARED) }
}

/// All files by their path below `deploy/`.
fn files() -> Vec<(String, String)> {
    let mut files = vec![
        ("admission.yaml".into(), admission::policies()),
        ("crds.yaml".into(), crds()),
        ("daemonset.yaml".into(), daemon_set::manifest()),
        ("example-pod.yaml".into(), example::pod()),
        ("rbac.yaml".into(), rbac()),
    ];
    files.extend(kustomize::files());
    files.extend(device_plugin::files());
    files.extend(helm::files());
    files
}

#[test]
fn the_manifests_are_as_committed() {
    for (name, text) in files() {
        assert_committed(&format!("deploy/{name}"), &text);
    }
}
