//! The manifests in `deploy/`, made of the same parts as the program's requests.
//!
//! They are in the repository so that they can be read and applied; a test compares them with what is made here.
//! How they are written anew is said in `golden`.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::golden::is_as_committed;
use super::pods::{KUBELET, answers, kubelet_mount, plain_container};
use super::reports::{Kind, definition};
use super::{GROUP, yaml, yaml_stream};

const NAMESPACE: &str = "kcm-system";
const IMAGE: &str = "kcm";
/// That of 2017. Left out, it would be `Always` for `kcm:latest`, which is in no registry.
const PULL_POLICY: &str = "IfNotPresent";
/// Shared with the pods of users: the parent of the mount point, so that a mount made anew reaches them.
const SHARED: &str = "/run/kcm";
const CONF_DIR: &str = "/run/kcm/conf";
const STATE_DIR: &str = "/var/lib/kcm";

/// What a service account may do, and why.
struct Rule {
    why: &'static str,
    group: &'static str,
    resource: &'static str,
    verbs: &'static [&'static str],
}

const NODE_RULES: [Rule; 4] = [
    Rule {
        why: "discover reads its node, and gives it the label and the taint",
        group: "",
        resource: "nodes",
        verbs: &["get", "patch"],
    },
    Rule {
        why: "discover sets the node's capacity, which only this way can be set",
        group: "",
        resource: "nodes/status",
        verbs: &["patch"],
    },
    Rule {
        why: "node-report publishes by server-side apply, which makes what is missing",
        group: GROUP,
        resource: "nodereports",
        verbs: &["create", "patch"],
    },
    Rule {
        why: "reconcile does the same, and reads first how far it has told",
        group: GROUP,
        resource: "reconcilereports",
        verbs: &["create", "get", "patch"],
    },
];

const CLUSTER_INIT_RULES: [Rule; 3] = [
    Rule {
        why: "cluster-init checks that the nodes exist, or takes all of them",
        group: "",
        resource: "nodes",
        verbs: &["list"],
    },
    Rule {
        why: "cluster-init makes pods, looks at those that are there already, and waits for them",
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

fn metadata(name: &str) -> Value {
    json!({ "name": name, "namespace": NAMESPACE, "labels": { "app.kubernetes.io/name": "kcm" } })
}

fn header(text: &str) -> String {
    let generated = "# Made by src/kubernetes/objects/deploy.rs; see there for how to make it anew.\n";
    let text: String = text.lines().map(|line| format!("# {line}\n")).collect();
    text + generated
}

/// A role with a comment at each rule, its service account, and what binds the two.
fn account(name: &str, rules: &[Rule]) -> String {
    let account = json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata(name) });
    let mut role = yaml(&json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": { "name": name },
    }));
    role.push_str("rules:\n");
    for Rule { why, group, resource, verbs } in rules {
        let rule = yaml(&json!([{ "apiGroups": [group], "resources": [resource], "verbs": verbs }]));
        let _ = write!(role, "# {why}.\n{rule}");
    }
    let binding = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": { "name": name },
        "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name },
        "subjects": [{ "kind": "ServiceAccount", "name": name, "namespace": NAMESPACE }],
    });
    [yaml(&account), role, yaml(&binding)].join("---\n")
}

fn rbac() -> String {
    let namespace = json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": { "name": NAMESPACE, "labels": { "pod-security.kubernetes.io/enforce": "privileged" } },
    });
    let text = "The namespace, and for each service account one role: what kcm sends, and nothing besides.\n\
                The kinds are defined by crds.yaml, so nobody here may define any.\n\
                kcm-node: for the DaemonSet, and the pods of cluster-init. kcm-cluster-init: for that command.";
    let parts = [
        yaml(&namespace),
        account("kcm-node", &NODE_RULES),
        account("kcm-cluster-init", &CLUSTER_INIT_RULES),
    ];
    header(text) + &parts.join("---\n")
}

fn crds() -> String {
    let text = "The kinds NodeReport (kubectl get nr) and ReconcileReport (kubectl get rr).";
    header(text) + &yaml_stream(&Kind::ALL.map(definition))
}

fn shared_mount(propagation: &str) -> Value {
    json!({ "name": "shared", "mountPath": SHARED, "mountPropagation": propagation })
}

fn host_path(name: &str, path: &str, kind: &str) -> Value {
    json!({ "name": name, "hostPath": { "path": path, "type": kind } })
}

fn daemon_set() -> String {
    let conf_dir = format!("--conf-dir={CONF_DIR}");
    let plain = |name: &str, words: &[&str], more: Vec<Value>| {
        let args: Vec<&str> = words.iter().copied().chain([conf_dir.as_str()]).collect();
        let mounts = [vec![shared_mount("HostToContainer")], more].concat();
        let mut container = plain_container(name, IMAGE, json!(args), mounts);
        container["imagePullPolicy"] = PULL_POLICY.into();
        container["resources"] = json!({ "requests": { "cpu": "10m", "memory": "16Mi" } });
        container
    };
    let mount = json!({
        "name": "mount",
        "image": IMAGE,
        "imagePullPolicy": PULL_POLICY,
        "args": ["mount", "--foreground", conf_dir, format!("--state-dir={STATE_DIR}")],
        // It runs beside the others to the end: what comes below waits until the mount answers.
        "restartPolicy": "Always",
        "startupProbe": answers(CONF_DIR, 2),
        // A mount that the node is to see, and CPU masks of everybody.
        "securityContext": { "privileged": true, "readOnlyRootFilesystem": true },
        "resources": { "requests": { "cpu": "10m", "memory": "32Mi" } },
        "volumeMounts": [
            shared_mount("Bidirectional"),
            { "name": "state", "mountPath": STATE_DIR },
            { "name": "fuse", "mountPath": "/dev/fuse" },
        ],
    });
    let init = plain("init", &["init", "--num-dp-cores=4", "--num-cp-cores=1"], Vec::new());
    let every = "--interval=60";
    let containers = [
        plain("reconcile", &["reconcile", "--publish", every], Vec::new()),
        plain("node-report", &["node-report", "--publish", every], vec![kubelet_mount()]),
        plain("discover", &["discover", "--resource-name=extended", every], Vec::new()),
    ];
    let spec = json!({
        "serviceAccountName": "kcm-node",
        // Claims name the node's processes.
        "hostPID": true,
        "priorityClassName": "system-node-critical",
        "tolerations": [{ "operator": "Exists" }],
        "terminationGracePeriodSeconds": 30,
        "initContainers": [mount, init],
        "containers": containers,
        "volumes": [
            host_path("shared", SHARED, "DirectoryOrCreate"),
            host_path("state", STATE_DIR, "DirectoryOrCreate"),
            host_path("fuse", "/dev/fuse", "CharDevice"),
            host_path("kubelet", KUBELET, "DirectoryOrCreate"),
        ],
    });
    let object = json!({
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": metadata("kcm"),
        "spec": {
            "selector": { "matchLabels": { "app.kubernetes.io/name": "kcm" } },
            "updateStrategy": { "type": "RollingUpdate", "rollingUpdate": { "maxUnavailable": 1 } },
            "template": { "metadata": { "labels": { "app.kubernetes.io/name": "kcm" } }, "spec": spec },
        },
    });
    let text = "kcm on every node. The mount is served by the container `mount`, the only privileged one: the node is to\n\
                see what it mounts (Bidirectional), which Kubernetes allows to no other, and it sets the CPU masks of\n\
                everybody. The others have no capability, can gain none, and cannot write to the image. All are root,\n\
                because what they read belongs to root, and see the node's processes, because claims name those.\n\
                `mount` is a sidecar (an init container that runs on; Kubernetes 1.29), because init, an ordinary init\n\
                container, must find the mount answering. What is shared with the node is the parent of the mount\n\
                point. How many cores the pools get is said at init; docs/kubernetes.md tells the rest.";
    header(text) + &yaml(&object)
}

fn kustomization() -> String {
    let object = json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["rbac.yaml", "crds.yaml", "daemonset.yaml"],
        "images": [{ "name": IMAGE, "newName": IMAGE, "newTag": "latest" }],
    });
    header("kubectl apply -k deploy; put the name of your image here.") + &yaml(&object)
}

fn example_pod() -> String {
    let line = "echo $$ > /run/kcm/conf/pools/dataplane/tasks || { cat /run/kcm/conf/self/last_error; exit 1; }\n\
                echo \"my CPUs: $(cat /run/kcm/conf/self/cpus)\"\n\
                exec sleep infinity\n";
    let pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": "kcm-example" },
        "spec": {
            "restartPolicy": "Never",
            "tolerations": [{ "key": "kcm", "value": "true", "effect": "NoSchedule" }],
            "containers": [{
                "name": "example",
                "image": "busybox",
                "command": ["sh", "-c", line],
                "resources": { "limits": { "kcm.intel.com/dataplane": "1" } },
                "securityContext": {
                    "allowPrivilegeEscalation": false,
                    "capabilities": { "drop": ["ALL"] },
                },
                "volumeMounts": [shared_mount("HostToContainer")],
            }],
            "volumes": [host_path("shared", SHARED, "Directory")],
        },
    });
    let text = "A pod that claims one exclusive CPU list, without privilege and without the host's PIDs: the PID that\n\
                it writes is its own. `kcm isolate --conf-dir=/run/kcm/conf --pool=dataplane -- program` does the\n\
                same where the image has kcm.";
    header(text) + &yaml(&pod)
}

fn files() -> [(&'static str, String); 5] {
    [
        ("crds.yaml", crds()),
        ("daemonset.yaml", daemon_set()),
        ("example-pod.yaml", example_pod()),
        ("kustomization.yaml", kustomization()),
        ("rbac.yaml", rbac()),
    ]
}

#[test]
fn the_manifests_are_what_the_program_is_made_of() {
    for (name, text) in files() {
        is_as_committed(&format!("deploy/{name}"), &text);
    }
}
