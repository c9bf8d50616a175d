//! `daemonset.yaml`: the pod on each chosen node.
//!
//! Owns its containers, probes, volumes and comments. Does not know what the components of kustomize or the values of Helm
//! change in it.

use k8s_openapi::api::apps::v1::{DaemonSet, DaemonSetSpec, DaemonSetUpdateStrategy, RollingUpdateDaemonSet};
use k8s_openapi::api::core::v1::{
    ConfigMapVolumeSource, Container, PodSpec, PodTemplateSpec, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::super::pods::{
    CONTAINER_LOGS, FUSE, KUBELET, PRIORITY, admin_container, any_taint, host_path, liveness_probe,
    node_report_mounts, plain_container, privileged, readiness_probe, requests, startup_probe, volume_mount,
};
use super::{
    CONF_DIR, IMAGE, LAYOUTS, NODE_ACCOUNT, PULL_POLICY, SELECTED, SHARED, STATE_DIR, header, labelled,
    metadata, shared_mount, yaml,
};

/// The directory of `init` that has the ConfigMap.
const LAYOUTS_DIR: &str = "/etc/kcm-layouts";

/// Makes a container of a name, an image, arguments and mounts.
type Make = fn(&str, &str, Vec<String>, Vec<VolumeMount>) -> Container;

pub(super) fn manifest() -> String {
    let text = "kcm on every node that has the label kcm.intel.com/enabled=true.\n\
                The container `mount` serves the mount. It is the only privileged one: its mount has to reach the node\n\
                (Bidirectional), which Kubernetes allows only to privileged containers, and it sets the CPU masks of all\n\
                processes. init and reconcile have CAP_SYS_ADMIN, without which the mount lets nobody configure or read\n\
                events. The others have no capability and cannot gain one. None can write to the image. All are root,\n\
                because the files that they read belong to root, and share the node's PID namespace, because claims name\n\
                processes of the node.\n\
                `mount` is a sidecar (an init container that keeps running; Kubernetes 1.29), because init, an ordinary\n\
                init container, needs the mount. The parent of the mount point is shared with the node. The liveness probe\n\
                fails only if no daemon answers for 90 s, because a restart takes the mount away for a moment; problems of\n\
                the node are in the reports. init makes pools only on a node that has none: as many cores as suit the node,\n\
                or what the ConfigMap kcm-layouts says. docs/kubernetes.md explains the rest.";
    header(text) + &yaml(&object())
}

fn object() -> DaemonSet {
    let rolling = RollingUpdateDaemonSet { max_unavailable: Some(IntOrString::Int(1)), ..Default::default() };
    DaemonSet {
        metadata: metadata("kcm"),
        spec: Some(DaemonSetSpec {
            selector: LabelSelector { match_labels: labelled().labels, ..Default::default() },
            update_strategy: Some(DaemonSetUpdateStrategy {
                type_: Some("RollingUpdate".into()),
                rolling_update: Some(rolling),
            }),
            template: PodTemplateSpec { metadata: Some(labelled()), spec: Some(pod()) },
            ..Default::default()
        }),
        status: None,
    }
}

fn pod() -> PodSpec {
    let conf_dir = format!("--conf-dir={CONF_DIR}");
    let container = |make: Make, name: &str, words: &[&str], more: Vec<VolumeMount>| {
        let args = words.iter().copied().chain([conf_dir.as_str()]).map(String::from).collect();
        let mounts = [vec![shared_mount("HostToContainer")], more].concat();
        Container { image_pull_policy: Some(PULL_POLICY.into()), ..make(name, IMAGE, args, mounts) }
    };
    let layouts_file = format!("--layouts={LAYOUTS_DIR}/layouts.yaml");
    let init = container(
        admin_container,
        "init",
        &["init", "--if-empty", "--num-dp-cores=auto", "--num-cp-cores=auto", &layouts_file],
        vec![VolumeMount { read_only: Some(true), ..volume_mount("layouts", LAYOUTS_DIR) }],
    );
    let every = "--interval=60";
    let containers = vec![
        container(admin_container, "reconcile", &["reconcile", "--publish", every], Vec::new()),
        container(
            plain_container,
            "node-report",
            &["node-report", "--publish", every],
            node_report_mounts().into(),
        ),
        container(plain_container, "discover", &["discover", "--resource-name=extended", every], Vec::new()),
    ];
    PodSpec {
        service_account_name: Some(NODE_ACCOUNT.into()),
        node_selector: Some([(SELECTED.to_owned(), "true".to_owned())].into()),
        // Claims name processes of the node.
        host_pid: Some(true),
        priority_class_name: Some(PRIORITY.into()),
        tolerations: Some(vec![any_taint()]),
        termination_grace_period_seconds: Some(30),
        init_containers: Some(vec![mount(&conf_dir), init]),
        containers,
        volumes: Some(vec![
            host_path("shared", SHARED, "DirectoryOrCreate"),
            host_path("state", STATE_DIR, "DirectoryOrCreate"),
            host_path("fuse", FUSE, "CharDevice"),
            host_path("kubelet", KUBELET, "DirectoryOrCreate"),
            host_path("container-logs", CONTAINER_LOGS, "DirectoryOrCreate"),
            layouts(),
        ]),
        ..Default::default()
    }
}

fn mount(conf_dir: &str) -> Container {
    Container {
        name: "mount".into(),
        image: Some(IMAGE.into()),
        image_pull_policy: Some(PULL_POLICY.into()),
        args: Some(vec![
            "mount".into(),
            "--foreground".into(),
            conf_dir.into(),
            format!("--state-dir={STATE_DIR}"),
        ]),
        // A sidecar: it keeps running, and the next container waits until the mount answers.
        restart_policy: Some("Always".into()),
        startup_probe: Some(startup_probe(CONF_DIR)),
        readiness_probe: Some(readiness_probe(CONF_DIR)),
        liveness_probe: Some(liveness_probe(CONF_DIR)),
        security_context: Some(privileged()),
        resources: Some(requests("32Mi")),
        volume_mounts: Some(vec![
            shared_mount("Bidirectional"),
            volume_mount("state", STATE_DIR),
            volume_mount("fuse", FUSE),
        ]),
        ..Default::default()
    }
}

/// The volume of a ConfigMap that need not exist.
fn layouts() -> Volume {
    let source = ConfigMapVolumeSource { name: LAYOUTS.into(), optional: Some(true), ..Default::default() };
    Volume { name: "layouts".into(), config_map: Some(source), ..Default::default() }
}
