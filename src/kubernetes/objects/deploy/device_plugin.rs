//! The device plugin: pods get CPU lists by their resource requests.
//!
//! Owns what it adds to the DaemonSet, for kustomize and for the chart, and the example of a pod. Does not know what the containers do.

use k8s_openapi::api::core::v1::{
    Container, Pod, PodSecurityContext, PodSpec, ResourceRequirements, SeccompProfile, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use serde_json::{Value, json};

use super::super::pods::{host_path, plain_container, unprivileged, volume_mount};
use super::super::yaml;
use super::{CONF_DIR, IMAGE, PULL_POLICY, header, named, shared_mount, tolerates_kcm};

/// Where the program is on the node, for the container runtime.
const PROGRAMS: &str = "/opt/bin";
/// For specs that are gone after a reboot, which runtimes read as well as `/etc/cdi`.
const SPECS: &str = "/var/run/cdi";
/// The sockets of the kubelet and its device plugins.
const PLUGINS: &str = "/var/lib/kubelet/device-plugins";

pub(super) fn files() -> Vec<(String, String)> {
    [("kustomization.yaml", component()), ("example-pod.yaml", example())]
        .map(|(name, text)| (format!("components/device-plugin/{name}"), text))
        .into()
}

fn component() -> String {
    let object = json!({
        "apiVersion": "kustomize.config.k8s.io/v1alpha1",
        "kind": "Component",
        "patches": [{ "target": { "kind": "DaemonSet", "name": "kcm" }, "patch": yaml(&patch()) }],
    });
    header(
        "Pods get CPU lists by their resource requests, without hostPath (docs/kubernetes.md). The kubelet has the slots then, and\n\
         discover sets only label and taint. The runtime of the node executes the hook in /opt/bin, by the specs in /var/run/cdi.\n\
         No container of these has a capability or needs the API server.",
    ) + &yaml(&object)
}

/// The parts that the device plugin adds to the pod of the DaemonSet.
pub(super) struct Additions {
    pub(super) init_container: Container,
    pub(super) containers: [Container; 2],
    pub(super) volumes: [Volume; 3],
}

pub(super) fn additions() -> Additions {
    let conf_dir = format!("--conf-dir={CONF_DIR}");
    let shared = shared_mount("HostToContainer");
    let container = |name: &str, words: &[&str], mounts: Vec<VolumeMount>| {
        let args = words.iter().map(|word| (*word).to_owned()).collect();
        let made = plain_container(name, IMAGE, args, mounts);
        Container { image_pull_policy: Some(PULL_POLICY.into()), ..made }
    };
    let init_container = container(
        "install",
        &["install", &format!("--install-dir={PROGRAMS}")],
        vec![volume_mount("programs", PROGRAMS)],
    );
    let program = format!("--program={PROGRAMS}/kcm");
    let cdi = container(
        "cdi",
        &["cdi", "install", "--follow", "--no-mount", &format!("--dir={SPECS}"), &program, &conf_dir],
        vec![shared.clone(), volume_mount("specs", SPECS)],
    );
    let plugin = container(
        "device-plugin",
        &["device-plugin", &format!("--plugins-dir={PLUGINS}"), &conf_dir],
        vec![shared, volume_mount("plugins", PLUGINS)],
    );
    let volumes = [
        host_path("programs", PROGRAMS, "DirectoryOrCreate"),
        host_path("specs", SPECS, "DirectoryOrCreate"),
        host_path("plugins", PLUGINS, "DirectoryOrCreate"),
    ];
    Additions { init_container, containers: [cdi, plugin], volumes }
}

fn patch() -> Value {
    let Additions { init_container, containers, volumes } = additions();
    let add = |at: &str, value: Value| json!({ "op": "add", "path": format!("/spec/template/spec/{at}/-"), "value": value });
    let discover = "/spec/template/spec/containers/2";
    let mut patch = vec![
        // The patch fails if this is another container.
        json!({ "op": "test", "path": format!("{discover}/name"), "value": "discover" }),
        json!({ "op": "replace", "path": format!("{discover}/args/1"), "value": "--resource-name=none" }),
        add("initContainers", json!(init_container)),
    ];
    patch.extend(containers.iter().map(|container| add("containers", json!(container))));
    patch.extend(volumes.iter().map(|volume| add("volumes", json!(volume))));
    patch.into()
}

/// The variable is set by the device; `$(NAME)` would be replaced by Kubernetes, `$NAME` is left to the shell.
const SCRIPT: &str = "\
trap 'exit 0' TERM
echo my CPUs: $KCM_CPUS_ASSIGNED; grep Cpus_allowed_list /proc/self/status
sleep infinity &
wait
";

fn example() -> String {
    let quantities = |all: &[(&str, &str)]| {
        all.iter().map(|(name, quantity)| ((*name).to_owned(), Quantity((*quantity).into()))).collect()
    };
    let memory = ("memory", "32Mi");
    let container = Container {
        name: "example".into(),
        image: Some("busybox".into()),
        command: Some(vec!["sh".into(), "-c".into(), SCRIPT.into()]),
        resources: Some(ResourceRequirements {
            limits: Some(quantities(&[("kcm.intel.com/dataplane", "1"), memory])),
            requests: Some(quantities(&[("cpu", "1"), memory])),
            ..Default::default()
        }),
        security_context: Some(unprivileged()),
        ..Default::default()
    };
    let security = PodSecurityContext {
        run_as_non_root: Some(true),
        run_as_user: Some(65534),
        seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".into(), ..Default::default() }),
        ..Default::default()
    };
    let spec = PodSpec {
        host_users: Some(false),
        restart_policy: Some("Never".into()),
        security_context: Some(security),
        tolerations: Some(vec![tolerates_kcm()]),
        containers: vec![container],
        ..Default::default()
    };
    let pod = Pod { metadata: named("kcm-device-example"), spec: Some(spec), status: None };
    header(
        "A pod that gets one exclusive CPU list by asking for it. It meets the pod security level `restricted`, and its user is\n\
         nobody. hostUsers: false needs Kubernetes 1.33; without it, the pod works on older clusters, too. The request of one CPU\n\
         gives the pod a share of its CPU against other pods.",
    ) + &yaml(&pod)
}
