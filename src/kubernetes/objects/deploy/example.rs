//! `example-pod.yaml`: a pod of a user.
//!
//! Owns its script, which has no `$`: in a command Kubernetes turns `$$` into `$`, and replaces `$(NAME)`.

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, ResourceRequirements, VolumeMount};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::super::pods::{host_path, unprivileged};
use super::{SHARED, header, named, shared_mount, tolerates_kcm, yaml};

/// The shell is the first process of the container, which ignores SIGTERM unless it handles it.
const SCRIPT: &str = "\
trap 'exit 0' TERM
echo 0 > /run/kcm/conf/pools/dataplane/tasks || { cat /run/kcm/conf/self/last_error; exit 1; }
echo my CPUs:; cat /run/kcm/conf/self/cpus
sleep infinity &
wait
";

fn quantities(all: &[(&str, &str)]) -> Option<std::collections::BTreeMap<String, Quantity>> {
    Some(all.iter().map(|(name, quantity)| ((*name).to_owned(), Quantity((*quantity).into()))).collect())
}

pub(super) fn pod() -> String {
    let memory = ("memory", "32Mi");
    let resources = ResourceRequirements {
        limits: quantities(&[("kcm.intel.com/dataplane", "1"), memory]),
        requests: quantities(&[("cpu", "1"), memory]),
        ..Default::default()
    };
    let container = Container {
        name: "example".into(),
        image: Some("busybox".into()),
        command: Some(vec!["sh".into(), "-c".into(), SCRIPT.into()]),
        resources: Some(resources),
        security_context: Some(unprivileged()),
        volume_mounts: Some(vec![VolumeMount { read_only: Some(true), ..shared_mount("HostToContainer") }]),
        ..Default::default()
    };
    let spec = PodSpec {
        restart_policy: Some("Never".into()),
        tolerations: Some(vec![tolerates_kcm()]),
        containers: vec![container],
        volumes: Some(vec![host_path("shared", SHARED, "Directory")]),
        ..Default::default()
    };
    let pod = Pod { metadata: named("kcm-example"), spec: Some(spec), status: None };
    let text = "A pod that claims one exclusive CPU list, without privilege and without the node's PID namespace. `0` is the\n\
                process that writes: the shell. If the image has kcm, this does the same:\n\
                kcm isolate --conf-dir=/run/kcm/conf --pool=dataplane -- program\n\
                readOnly is for the parent of the mount point: nothing can be put into an empty mount point while the daemon\n\
                is away. The mount below it stays writable. The request of one CPU gives the pod a share of its CPU against\n\
                other pods. There is no limit of CPU, because the kubelet's static CPU manager gives pods with limits that\n\
                equal their requests CPUs of its own, and takes the others from them.\n\
                The trap ends the claim at once when the pod is deleted; without it, the kubelet kills the shell after 30 s.";
    header(text) + &yaml(&pod)
}
