//! The manifests in `deploy/`, made of the same parts as the program's requests.
//!
//! Owns their contents and comments. They are committed, so that they can be read and applied; a test compares them
//! with what is made here, and `golden` says how to write them again. Does not know what a cluster does with them.

use std::fmt::Write as _;

use k8s_openapi::api::apps::v1::{DaemonSet, DaemonSetSpec, DaemonSetUpdateStrategy, RollingUpdateDaemonSet};
use k8s_openapi::api::core::v1::{
    Capabilities, Container, Namespace, Pod, PodSpec, PodTemplateSpec, ResourceRequirements, SecurityContext,
    ServiceAccount, Toleration, VolumeMount,
};
use k8s_openapi::api::rbac::v1::{ClusterRoleBinding, PolicyRule, RoleRef, Subject};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::core::ObjectMeta;
use serde_json::json;

use super::golden::assert_committed;
use super::pods::{
    KUBELET, admin_container, any_taint, host_path, kubelet_mount, mount_probe, plain_container, privileged,
    volume_mount,
};
use super::reports::{NodeReport, ReconcileReport, definition};
use super::{GROUP, yaml, yaml_stream};

const NAMESPACE: &str = "kcm-system";
const IMAGE: &str = "kcm";
/// Without it, the policy of `kcm:latest` would be `Always`, and no registry has that image.
const PULL_POLICY: &str = "IfNotPresent";
/// Shared with the pods of users: the parent of the mount point, so that a later mount reaches them.
const SHARED: &str = "/run/kcm";
const CONF_DIR: &str = "/run/kcm/conf";
const STATE_DIR: &str = "/var/lib/kcm";

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
        why: "cluster-init checks that the nodes exist, or prepares all of them",
        group: "",
        resource: "nodes",
        verbs: &["list"],
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
                kcm-node is for the DaemonSet and for the pods of cluster-init, kcm-cluster-init for that command.";
    let parts = [
        yaml(&namespace),
        account("kcm-node", &NODE_RULES),
        account("kcm-cluster-init", &CLUSTER_INIT_RULES),
    ];
    header(text) + &parts.join("---\n")
}

fn crds() -> String {
    let text = "The kinds NodeReport (kubectl get nr) and ReconcileReport (kubectl get rr).";
    let definitions = [definition::<NodeReport>().unwrap(), definition::<ReconcileReport>().unwrap()];
    header(text) + &yaml_stream(&definitions)
}

fn shared_mount(propagation: &str) -> VolumeMount {
    VolumeMount { mount_propagation: Some(propagation.into()), ..volume_mount("shared", SHARED) }
}

fn requests(memory: &str) -> ResourceRequirements {
    let requests = [("cpu", "10m"), ("memory", memory)];
    let requests = requests.map(|(name, quantity)| (name.to_owned(), Quantity(quantity.into())));
    ResourceRequirements { requests: Some(requests.into()), ..Default::default() }
}

/// Makes a container of a name, an image, arguments and mounts.
type Make = fn(&str, &str, Vec<String>, Vec<VolumeMount>) -> Container;

fn daemon_set() -> String {
    let conf_dir = format!("--conf-dir={CONF_DIR}");
    let container = |make: Make, name: &str, words: &[&str], more: Vec<VolumeMount>| {
        let args = words.iter().copied().chain([conf_dir.as_str()]).map(String::from).collect();
        let mounts = [vec![shared_mount("HostToContainer")], more].concat();
        Container {
            image_pull_policy: Some(PULL_POLICY.into()),
            resources: Some(requests("16Mi")),
            ..make(name, IMAGE, args, mounts)
        }
    };
    let state_dir = format!("--state-dir={STATE_DIR}");
    let mount = Container {
        name: "mount".into(),
        image: Some(IMAGE.into()),
        image_pull_policy: Some(PULL_POLICY.into()),
        args: Some(vec!["mount".into(), "--foreground".into(), conf_dir.clone(), state_dir]),
        // A sidecar: it keeps running, and the next container waits until the mount answers.
        restart_policy: Some("Always".into()),
        startup_probe: Some(mount_probe(CONF_DIR, 2)),
        security_context: Some(privileged()),
        resources: Some(requests("32Mi")),
        volume_mounts: Some(vec![
            shared_mount("Bidirectional"),
            volume_mount("state", STATE_DIR),
            volume_mount("fuse", "/dev/fuse"),
        ]),
        ..Default::default()
    };
    let init =
        container(admin_container, "init", &["init", "--num-dp-cores=4", "--num-cp-cores=1"], Vec::new());
    let every = "--interval=60";
    let containers = vec![
        container(admin_container, "reconcile", &["reconcile", "--publish", every], Vec::new()),
        container(
            plain_container,
            "node-report",
            &["node-report", "--publish", every],
            vec![kubelet_mount()],
        ),
        container(plain_container, "discover", &["discover", "--resource-name=extended", every], Vec::new()),
    ];
    let spec = PodSpec {
        service_account_name: Some("kcm-node".into()),
        // Claims name processes of the node.
        host_pid: Some(true),
        priority_class_name: Some("system-node-critical".into()),
        tolerations: Some(vec![any_taint()]),
        termination_grace_period_seconds: Some(30),
        init_containers: Some(vec![mount, init]),
        containers,
        volumes: Some(vec![
            host_path("shared", SHARED, "DirectoryOrCreate"),
            host_path("state", STATE_DIR, "DirectoryOrCreate"),
            host_path("fuse", "/dev/fuse", "CharDevice"),
            host_path("kubelet", KUBELET, "DirectoryOrCreate"),
        ]),
        ..Default::default()
    };
    let rolling = RollingUpdateDaemonSet { max_unavailable: Some(IntOrString::Int(1)), ..Default::default() };
    let object = DaemonSet {
        metadata: metadata("kcm"),
        spec: Some(DaemonSetSpec {
            selector: LabelSelector { match_labels: labelled().labels, ..Default::default() },
            update_strategy: Some(DaemonSetUpdateStrategy {
                type_: Some("RollingUpdate".into()),
                rolling_update: Some(rolling),
            }),
            template: PodTemplateSpec { metadata: Some(labelled()), spec: Some(spec) },
            ..Default::default()
        }),
        status: None,
    };
    let text = "kcm on every node. The container `mount` serves the mount. It is the only privileged one: its mount has to\n\
                reach the node (Bidirectional), which Kubernetes allows only to privileged containers, and it sets the CPU\n\
                masks of all processes. init and reconcile have CAP_SYS_ADMIN, without which the mount lets nobody configure\n\
                or read events. The others have no capability and cannot gain one. None can write to the image. All are\n\
                root, because the files that they read belong to root, and share the node's PID namespace, because claims\n\
                name processes of the node.\n\
                `mount` is a sidecar (an init container that keeps running; Kubernetes 1.29), because init, an ordinary\n\
                init container, needs the mount. The parent of the mount point is shared with the node. The arguments of\n\
                init say how many cores the pools get; docs/kubernetes.md explains the rest.";
    header(text) + &yaml(&object)
}

fn kustomization() -> String {
    let object = json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["rbac.yaml", "crds.yaml", "daemonset.yaml"],
        "images": [{ "name": IMAGE, "newName": IMAGE, "newTag": "latest" }],
    });
    header("kubectl apply -k deploy; set newName and newTag to your image.") + &yaml(&object)
}

fn example_pod() -> String {
    let line = "echo $$ > /run/kcm/conf/pools/dataplane/tasks || { cat /run/kcm/conf/self/last_error; exit 1; }\n\
                echo \"my CPUs: $(cat /run/kcm/conf/self/cpus)\"\n\
                exec sleep infinity\n";
    let limits = [("kcm.intel.com/dataplane".to_owned(), Quantity("1".into()))];
    let container = Container {
        name: "example".into(),
        image: Some("busybox".into()),
        command: Some(vec!["sh".into(), "-c".into(), line.into()]),
        resources: Some(ResourceRequirements { limits: Some(limits.into()), ..Default::default() }),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            capabilities: Some(Capabilities { drop: Some(vec!["ALL".into()]), ..Default::default() }),
            ..Default::default()
        }),
        volume_mounts: Some(vec![shared_mount("HostToContainer")]),
        ..Default::default()
    };
    let ours = Toleration {
        key: Some("kcm".into()),
        value: Some("true".into()),
        effect: Some("NoSchedule".into()),
        ..Default::default()
    };
    let spec = PodSpec {
        restart_policy: Some("Never".into()),
        tolerations: Some(vec![ours]),
        containers: vec![container],
        volumes: Some(vec![host_path("shared", SHARED, "Directory")]),
        ..Default::default()
    };
    let pod = Pod { metadata: named("kcm-example"), spec: Some(spec), status: None };
    let text = "A pod that claims one exclusive CPU list, without privilege and without the node's PID namespace: the PID\n\
                that it writes is the one that it sees. If the image has kcm, this does the same:\n\
                kcm isolate --conf-dir=/run/kcm/conf --pool=dataplane -- program";
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
fn the_manifests_are_as_committed() {
    for (name, text) in files() {
        assert_committed(&format!("deploy/{name}"), &text);
    }
}
