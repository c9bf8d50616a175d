//! The pods of `cluster-init`, at most three per node.
//!
//! Owns names, containers, volumes and labels. Does not know in which order nodes are prepared, or how long a pod may
//! take.
//!
//! Longer than 400 lines because the pods of all stages share their containers and volumes.

use k8s_openapi::api::core::v1::{
    Capabilities, Container, EnvVar, EnvVarSource, ExecAction, HostPathVolumeSource, ObjectFieldSelector,
    Pod, PodSpec, Probe, ResourceRequirements, SecurityContext, Taint, Toleration, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::Resource as _;
use kube::core::params::{DeleteParams, GetParams, ListParams, PostParams, WatchParams};
use kube::core::request::Error as BuildError;
use kube::core::subresource::LogParams;
use kube::core::{ObjectList, ObjectMeta, WatchEvent};
use serde_json::Value;

use super::node::shown_taint;
use super::{Built, Request};
use crate::host_command::HostCommand;

mod status;

pub(crate) use status::{State, difference, state};

/// The label by which the pods of all nodes are found at once.
const LABEL: &str = "app.kubernetes.io/managed-by";
const LABEL_VALUE: &str = "kcm-cluster-init";

/// How long the server keeps a watch open, in seconds.
pub(crate) const WATCH_SECONDS: u32 = 240;

/// The directory of our containers that has the node's directories. The parent of the configuration directory cannot be mounted
/// at its own place: `/etc` would hide what the container runtime puts there.
const HOST: &str = "/host";

/// The options of `cluster-init`, which all nodes share.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) commands: Vec<HostCommand>,
    pub(crate) namespace: String,
    pub(crate) service_account: Option<String>,
    pub(crate) image: String,
    pub(crate) pull_policy: String,
    pub(crate) conf_dir: String,
    pub(crate) state_dir: String,
    pub(crate) install_dir: String,
    /// A number of cores, or `auto`.
    pub(crate) dataplane: String,
    /// Whether dataplane is isolated.
    pub(crate) isolated: bool,
    pub(crate) controlplane: String,
    /// The taint of the nodes, if they get one.
    pub(crate) taint: Option<Taint>,
}

/// The phase that a pod has to reach before the next one is created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Goal {
    Running,
    Succeeded,
}

/// One pod of a node.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PlannedPod {
    pub(crate) name: String,
    /// The part of the preparation that it does, for people: the names of its commands.
    pub(crate) phase: String,
    pub(crate) goal: Goal,
    pub(crate) object: Pod,
}

impl Plan {
    /// Whether the nodes are advertised.
    pub(crate) fn discovers(&self) -> bool {
        self.commands.contains(&HostCommand::Discover)
    }

    /// Returns the pods of a node in the order in which they are created.
    pub(crate) fn pods(&self, node: &str) -> Vec<PlannedPod> {
        let (periodic, mut once): (Vec<HostCommand>, Vec<HostCommand>) =
            self.commands.iter().partition(|command| command.is_periodic());
        // A pod has the name of its commands, and no two pods have the same one.
        if once == [HostCommand::Discover] && periodic.is_empty() {
            once.clear();
        }
        let mut pods = Vec::new();
        if self.commands.iter().any(|command| *command != HostCommand::Install) {
            pods.push(self.mount_pod(node));
        }
        if !once.is_empty() {
            // A pod needs at least one container that is not an init container.
            let (first, rest) = match once.split_first() {
                Some((HostCommand::Init, rest)) if !rest.is_empty() => {
                    (vec![self.container(HostCommand::Init)], rest)
                }
                _ => (Vec::new(), once.as_slice()),
            };
            pods.push(self.pod(node, &names(&once), Goal::Succeeded, first, self.containers(rest)));
        }
        let mut containers = self.containers(&periodic);
        if self.discovers() {
            // Kubelets reset capacity, and people remove taints.
            containers.push(self.repeated_discover());
        }
        if !containers.is_empty() {
            let phase = if periodic.is_empty() { vec!["discover"] } else { names(&periodic) };
            pods.push(self.pod(node, &phase, Goal::Running, Vec::new(), containers));
        }
        pods
    }

    /// Returns the pod that undoes the others, except their mount. `force`: releases live claims, which takes the right to set
    /// the CPU masks of other processes.
    pub(crate) fn uninstall_pod(&self, node: &str, force: bool) -> PlannedPod {
        let args = [
            "uninstall".into(),
            format!("--conf-dir={}", self.conf_dir_in_container()),
            format!("--install-dir={}", self.install_dir),
        ];
        let args = args.into_iter().chain(force.then(|| "--force".into())).collect();
        let mounts = vec![self.conf_mount("HostToContainer"), volume_mount("install", &self.install_dir)];
        let container = Container {
            image_pull_policy: Some(self.pull_policy.clone()),
            // Without the name of the node it asks no API server: its account may have no right to change nodes.
            env: None,
            security_context: Some(capable(&["SYS_ADMIN", "SYS_NICE"])),
            ..admin_container("uninstall", &self.image, args, mounts)
        };
        self.pod(node, &["uninstall"], Goal::Succeeded, Vec::new(), vec![container])
    }

    /// Returns the pod that mounts.
    pub(crate) fn mount_pod(&self, node: &str) -> PlannedPod {
        self.pod(node, &["mount"], Goal::Running, Vec::new(), vec![self.mount()])
    }

    fn repeated_discover(&self) -> Container {
        let mut container = self.container(HostCommand::Discover);
        container.args.get_or_insert_default().push("--interval=60".into());
        container
    }

    fn containers(&self, commands: &[HostCommand]) -> Vec<Container> {
        commands.iter().map(|command| self.container(*command)).collect()
    }

    fn pod(
        &self,
        node: &str,
        phase: &[&str],
        goal: Goal,
        init_containers: Vec<Container>,
        containers: Vec<Container>,
    ) -> PlannedPod {
        let name = format!("kcm-{}-pod-{node}", phase.join("-"));
        let spec = PodSpec {
            node_name: Some(node.into()),
            host_pid: Some(true),
            restart_policy: Some(if goal == Goal::Running { "Always" } else { "Never" }.into()),
            service_account_name: self.service_account.clone(),
            priority_class_name: Some(PRIORITY.into()),
            // Above all our own taint, which discover sets before the last pod is created.
            tolerations: Some(vec![any_taint()]),
            volumes: Some(self.volumes(init_containers.iter().chain(&containers))),
            init_containers: Some(init_containers).filter(|containers| !containers.is_empty()),
            containers,
            ..Default::default()
        };
        let metadata = ObjectMeta {
            name: Some(name.clone()),
            namespace: Some(self.namespace.clone()),
            labels: Some([(LABEL.to_owned(), LABEL_VALUE.to_owned())].into()),
            ..Default::default()
        };
        let object = Pod { metadata, spec: Some(spec), status: None };
        PlannedPod { name, phase: phase.join(","), goal, object }
    }

    /// Returns the volumes that these containers mount.
    fn volumes<'a>(&self, containers: impl Iterator<Item = &'a Container>) -> Vec<Volume> {
        let mounts = containers.filter_map(|container| container.volume_mounts.as_deref()).flatten();
        let mut names: Vec<&str> = mounts.map(|mount| mount.name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        let volume = |name: &str| match name {
            "conf" => host_path(name, parent(&self.conf_dir), "Directory"),
            "state" => host_path(name, &self.state_dir, "DirectoryOrCreate"),
            "install" => host_path(name, &self.install_dir, "DirectoryOrCreate"),
            "kubelet" => host_path(name, KUBELET, "DirectoryOrCreate"),
            "container-logs" => host_path(name, CONTAINER_LOGS, "DirectoryOrCreate"),
            _ => host_path(name, FUSE, "CharDevice"),
        };
        names.into_iter().map(volume).collect()
    }

    /// Returns the path of the configuration directory in our containers.
    fn conf_dir_in_container(&self) -> String {
        format!("{HOST}{}", self.conf_dir)
    }

    /// Mounts the parent of the configuration directory, so that later mounts on the directory reach the container.
    fn conf_mount(&self, propagation: &str) -> VolumeMount {
        let path = format!("{HOST}{}", parent(&self.conf_dir));
        VolumeMount { mount_propagation: Some(propagation.into()), ..volume_mount("conf", &path) }
    }

    fn mount(&self) -> Container {
        let conf_dir = self.conf_dir_in_container();
        Container {
            name: "mount".into(),
            image: Some(self.image.clone()),
            image_pull_policy: Some(self.pull_policy.clone()),
            args: Some(vec![
                "mount".into(),
                "--foreground".into(),
                format!("--conf-dir={conf_dir}"),
                format!("--state-dir={}", self.state_dir),
            ]),
            security_context: Some(privileged()),
            startup_probe: Some(startup_probe(&conf_dir)),
            readiness_probe: Some(readiness_probe(&conf_dir)),
            liveness_probe: Some(liveness_probe(&conf_dir)),
            resources: Some(requests("32Mi")),
            volume_mounts: Some(vec![
                self.conf_mount("Bidirectional"),
                volume_mount("state", &self.state_dir),
                volume_mount("fuse", FUSE),
            ]),
            ..Default::default()
        }
    }

    fn container(&self, command: HostCommand) -> Container {
        let conf_dir = format!("--conf-dir={}", self.conf_dir_in_container());
        let namespace = format!("--namespace={}", self.namespace);
        let periodic = |name: &str| {
            vec![name.into(), conf_dir.clone(), "--interval=60".into(), "--publish".into(), namespace.clone()]
        };
        let args = match command {
            HostCommand::Init => {
                let counts = [
                    format!("--num-dp-cores={}", self.dataplane),
                    format!("--num-cp-cores={}", self.controlplane),
                ];
                let isolated = self.isolated.then(|| "--isolated".into());
                ["init".into(), conf_dir].into_iter().chain(counts).chain(isolated).collect()
            }
            HostCommand::Discover => {
                let taint = self
                    .taint
                    .as_ref()
                    .map_or("--no-taint".into(), |taint| format!("--taint={}", shown_taint(taint)));
                vec!["discover".into(), conf_dir, taint]
            }
            HostCommand::Install => vec!["install".into(), format!("--install-dir={}", self.install_dir)],
            HostCommand::Reconcile => periodic("reconcile"),
            HostCommand::NodeReport => periodic("node-report"),
        };
        let mut mounts = vec![match command {
            HostCommand::Install => volume_mount("install", &self.install_dir),
            _ => self.conf_mount("HostToContainer"),
        }];
        if command == HostCommand::NodeReport {
            mounts.extend(node_report_mounts());
        }
        Container {
            image_pull_policy: Some(self.pull_policy.clone()),
            ..match command {
                HostCommand::Init | HostCommand::Reconcile => {
                    admin_container(command.name(), &self.image, args, mounts)
                }
                _ => plain_container(command.name(), &self.image, args, mounts),
            }
        }
    }
}

pub(crate) const FUSE: &str = "/dev/fuse";
/// The priority of our pods. Without it, a node that runs out of memory ends them before the pods of users.
pub(crate) const PRIORITY: &str = "system-node-critical";
/// The directory in which the kubelet keeps `cpu_manager_state` and often its configuration.
pub(crate) const KUBELET: &str = "/var/lib/kubelet";
/// The directory with a link for each container, named after the pod and the container.
pub(crate) const CONTAINER_LOGS: &str = "/var/log/containers";

/// Mounts what node-report reads of the kubelet: whole directories, because the kubelet replaces the files each time.
pub(crate) fn node_report_mounts() -> [VolumeMount; 2] {
    [("kubelet", KUBELET), ("container-logs", CONTAINER_LOGS)]
        .map(|(name, path)| VolumeMount { read_only: Some(true), ..volume_mount(name, path) })
}

pub(crate) fn volume_mount(name: &str, path: &str) -> VolumeMount {
    VolumeMount { name: name.into(), mount_path: path.into(), ..Default::default() }
}

pub(crate) fn host_path(name: &str, path: &str, type_: &str) -> Volume {
    let source = HostPathVolumeSource { path: path.into(), type_: Some(type_.into()) };
    Volume { name: name.into(), host_path: Some(source), ..Default::default() }
}

/// Tolerates every taint.
pub(crate) fn any_taint() -> Toleration {
    Toleration { operator: Some("Exists".into()), ..Default::default() }
}

/// The security context of a container that needs no privilege.
pub(crate) fn unprivileged() -> SecurityContext {
    SecurityContext {
        allow_privilege_escalation: Some(false),
        capabilities: Some(Capabilities { drop: Some(vec!["ALL".into()]), ..Default::default() }),
        ..Default::default()
    }
}

/// The security context of `kcm mount`, which mounts for the node and sets the CPU masks of other processes.
pub(crate) fn privileged() -> SecurityContext {
    SecurityContext { privileged: Some(true), read_only_root_filesystem: Some(true), ..Default::default() }
}

/// Returns a container of our image without any privilege. It is root, because the files that it reads belong to root.
pub(crate) fn plain_container(
    name: &str,
    image: &str,
    args: Vec<String>,
    mounts: Vec<VolumeMount>,
) -> Container {
    let node_name = ObjectFieldSelector { field_path: "spec.nodeName".into(), ..Default::default() };
    let node_name = EnvVarSource { field_ref: Some(node_name), ..Default::default() };
    Container {
        name: name.into(),
        image: Some(image.into()),
        args: Some(args),
        env: Some(vec![EnvVar {
            name: "NODE_NAME".into(),
            value_from: Some(node_name),
            ..Default::default()
        }]),
        security_context: Some(SecurityContext { read_only_root_filesystem: Some(true), ..unprivileged() }),
        resources: Some(requests("16Mi")),
        volume_mounts: Some(mounts),
        ..Default::default()
    }
}

/// Returns a container that may configure, read events and acknowledge reclaimed claims: the daemon demands
/// `CAP_SYS_ADMIN` for that, because the uid 0 of a container says nothing. The container has no other capability. API
/// servers refuse `allowPrivilegeEscalation: false` beside this one.
pub(crate) fn admin_container(
    name: &str,
    image: &str,
    args: Vec<String>,
    mounts: Vec<VolumeMount>,
) -> Container {
    Container {
        security_context: Some(capable(&["SYS_ADMIN"])),
        ..plain_container(name, image, args, mounts)
    }
}

/// Returns the security context with only these capabilities.
fn capable(names: &[&str]) -> SecurityContext {
    let add = names.iter().map(|name| (*name).to_owned()).collect();
    SecurityContext {
        capabilities: Some(Capabilities { add: Some(add), drop: Some(vec!["ALL".into()]) }),
        read_only_root_filesystem: Some(true),
        ..Default::default()
    }
}

/// The requests of a container. It is never best-effort: then every other pod would come first.
pub(crate) fn requests(memory: &str) -> ResourceRequirements {
    let requests = [("cpu", "10m"), ("memory", memory)];
    let requests = requests.map(|(name, quantity)| (name.to_owned(), Quantity(quantity.into())));
    ResourceRequirements { requests: Some(requests.into()), ..Default::default() }
}

/// Asks whether a daemon answers, and nothing else: a problem of the node is not a reason to restart the daemon.
fn probe(conf_dir: &str, period_seconds: i32, failure_threshold: i32) -> Probe {
    let command = vec!["/kcm".into(), "status".into(), "--alive".into(), format!("--conf-dir={conf_dir}")];
    Probe {
        exec: Some(ExecAction { command: Some(command) }),
        period_seconds: Some(period_seconds),
        failure_threshold: Some(failure_threshold),
        timeout_seconds: Some(5),
        ..Default::default()
    }
}

/// The daemon has a minute to restore claims. The next containers wait until it succeeds.
pub(crate) fn startup_probe(conf_dir: &str) -> Probe {
    probe(conf_dir, 2, 30)
}

/// Shows within 30 s that no daemon answers.
pub(crate) fn readiness_probe(conf_dir: &str) -> Probe {
    probe(conf_dir, 10, 3)
}

/// Restarts the container after 90 s without an answer. The watchdog replaces a worker that hangs within seconds, and gives
/// the next one a minute.
pub(crate) fn liveness_probe(conf_dir: &str) -> Probe {
    probe(conf_dir, 10, 9)
}

fn parent(directory: &str) -> &str {
    match directory.rsplit_once('/') {
        Some(("", _)) | None => "/",
        Some((parent, _)) => parent,
    }
}

fn names(commands: &[HostCommand]) -> Vec<&'static str> {
    commands.iter().map(|command| command.name()).collect()
}

fn pods(namespace: &str) -> kube::core::Request {
    kube::core::Request::new(Pod::url_path(&(), Some(namespace)))
}

/// Creates a pod.
pub(crate) fn create(namespace: &str, pod: &PlannedPod) -> Built<Pod> {
    let body = serde_json::to_vec(&pod.object).map_err(BuildError::SerializeBody)?;
    let http = pods(namespace).create(&PostParams::default(), body)?;
    Ok(Request::new(http, subject(namespace, &pod.name)))
}

/// Reads a pod.
pub(crate) fn get(namespace: &str, name: &str) -> Built<Pod> {
    Ok(Request::new(pods(namespace).get(name, &GetParams::default())?, subject(namespace, name)))
}

/// Deletes a pod. The server answers with the pod, which ends within its time, or with a status.
pub(crate) fn delete(namespace: &str, name: &str) -> Built<Value> {
    let http = pods(namespace).delete(name, &DeleteParams::default())?;
    Ok(Request::new(http, subject(namespace, name)))
}

/// Reads all our pods.
pub(crate) fn list(namespace: &str) -> Built<ObjectList<Pod>> {
    let params = ListParams::default().labels(&selector());
    Ok(Request::new(pods(namespace).list(&params)?, format!("the pods of namespace {namespace}")))
}

/// Watches all our pods from this resource version on.
pub(crate) fn watch(namespace: &str, version: &str) -> Built<WatchEvent<Pod>> {
    let params = WatchParams::default().labels(&selector()).timeout(WATCH_SECONDS);
    Ok(Request::new(pods(namespace).watch(&params, version)?, format!("the pods of namespace {namespace}")))
}

/// Reads the last line that a container has written.
pub(crate) fn last_line(namespace: &str, pod: &str, container: &str) -> Built<String> {
    let params = LogParams { container: Some(container.into()), tail_lines: Some(1), ..LogParams::default() };
    let http = pods(namespace).logs(pod, &params)?;
    Ok(Request::new(http, format!("the log of {}", subject(namespace, pod))))
}

/// Selects the pods of `cluster-init`.
pub(crate) fn selector() -> String {
    format!("{LABEL}={LABEL_VALUE}")
}

fn subject(namespace: &str, name: &str) -> String {
    format!("pod {namespace}/{name}")
}
