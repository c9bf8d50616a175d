//! The pods of `cluster-init`, three a node at most, and what their state says.
#![allow(clippy::indexing_slicing, reason = "a JSON value answers null for what it does not have")]

use serde_json::{Value, json};

use super::{Method, Request};

/// By which the pods of all nodes are found at once.
const LABEL: &str = "app.kubernetes.io/managed-by";
const LABEL_VALUE: &str = "kcm-cluster-init";

/// Under which the node's directories are seen in our containers: mounting the parent of the configuration
/// directory at its own place (`/etc`) would hide what the runtime puts there.
const HOST: &str = "/host";

/// A command of the document that runs on each node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Init,
    Discover,
    Install,
    Reconcile,
    NodeReport,
}

impl Command {
    /// As the document lists it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Init => "init",
            Self::Discover => "discover",
            Self::Install => "install",
            Self::Reconcile => "reconcile",
            Self::NodeReport => "nodereport",
        }
    }

    fn runs_on(self) -> bool {
        matches!(self, Self::Reconcile | Self::NodeReport)
    }
}

/// What is to be on a node.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) commands: Vec<Command>,
    pub(crate) namespace: String,
    pub(crate) service_account: Option<String>,
    pub(crate) image: String,
    pub(crate) pull_policy: String,
    pub(crate) conf_dir: String,
    pub(crate) state_dir: String,
    pub(crate) install_dir: String,
    pub(crate) dataplane: usize,
    pub(crate) controlplane: usize,
}

/// When a pod has done what the next one waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Goal {
    Running,
    Succeeded,
}

/// One pod of a node.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Pod {
    pub(crate) name: String,
    /// What it does, for people.
    pub(crate) does: String,
    pub(crate) goal: Goal,
    pub(crate) object: Value,
}

impl Plan {
    /// The pods of a node, in the order in which they are made.
    pub(crate) fn pods(&self, node: &str) -> Vec<Pod> {
        let (on, once): (Vec<Command>, Vec<Command>) =
            self.commands.iter().partition(|command| command.runs_on());
        let mut pods = Vec::new();
        if self.commands.iter().any(|command| *command != Command::Install) {
            pods.push(self.pod(node, &["mount"], Goal::Running, &[], vec![self.mount()]));
        }
        if !once.is_empty() {
            // A pod has one container at least that is not for the start.
            let (first, rest) = match once.split_first() {
                Some((first, rest)) if *first == Command::Init && !rest.is_empty() => {
                    (std::slice::from_ref(first), rest)
                }
                _ => (&[][..], once.as_slice()),
            };
            let [first, rest] = [first, rest].map(|commands| self.containers(commands));
            pods.push(self.pod(node, &names(&once), Goal::Succeeded, &first, rest));
        }
        if !on.is_empty() {
            pods.push(self.pod(node, &names(&on), Goal::Running, &[], self.containers(&on)));
        }
        pods
    }

    fn containers(&self, commands: &[Command]) -> Vec<Value> {
        commands.iter().map(|command| self.container(*command)).collect()
    }

    fn pod(&self, node: &str, does: &[&str], goal: Goal, first: &[Value], containers: Vec<Value>) -> Pod {
        let name = format!("kcm-{}-pod-{node}", does.join("-"));
        let mut spec = json!({
            "nodeName": node,
            "hostPID": true,
            "restartPolicy": if goal == Goal::Running { "Always" } else { "Never" },
            // Ours above all: discover sets it before the last pod is made.
            "tolerations": [{ "operator": "Exists" }],
            "containers": containers,
            "volumes": [],
        });
        if !first.is_empty() {
            spec["initContainers"] = first.into();
        }
        if let Some(account) = &self.service_account {
            spec["serviceAccountName"] = account.as_str().into();
        }
        spec["volumes"] = self.volumes(&spec);
        let metadata = json!({
            "name": name, "namespace": self.namespace, "labels": { LABEL: LABEL_VALUE },
        });
        let object = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec });
        Pod { name, does: does.join(","), goal, object }
    }

    /// The volumes that the containers of a pod name.
    fn volumes(&self, spec: &Value) -> Value {
        let mounts = ["initContainers", "containers"].into_iter().filter_map(|kind| spec[kind].as_array());
        let mounts = mounts.flatten().filter_map(|container| container["volumeMounts"].as_array()).flatten();
        let mut names: Vec<&str> = mounts.filter_map(|mount| mount["name"].as_str()).collect();
        names.sort_unstable();
        names.dedup();
        let volume = |name: &str| {
            let (path, kind) = match name {
                "conf" => (parent(&self.conf_dir), "Directory"),
                "state" => (self.state_dir.as_str(), "DirectoryOrCreate"),
                "install" => (self.install_dir.as_str(), "DirectoryOrCreate"),
                "kubelet" => (KUBELET, "DirectoryOrCreate"),
                _ => (FUSE, "CharDevice"),
            };
            json!({ "name": name, "hostPath": { "path": path, "type": kind } })
        };
        names.into_iter().map(volume).collect()
    }

    /// The configuration directory as our containers see it.
    fn seen_conf_dir(&self) -> String {
        format!("{HOST}{}", self.conf_dir)
    }

    /// The parent of the configuration directory: what is mounted anew in it reaches the containers.
    fn conf_mount(&self, propagation: &str) -> Value {
        let path = format!("{HOST}{}", parent(&self.conf_dir));
        json!({ "name": "conf", "mountPath": path, "mountPropagation": propagation })
    }

    fn mount(&self) -> Value {
        let conf_dir = self.seen_conf_dir();
        json!({
            "name": "mount",
            "image": self.image,
            "imagePullPolicy": self.pull_policy,
            "args": ["mount", "--foreground", format!("--conf-dir={conf_dir}"), format!("--state-dir={}", self.state_dir)],
            "securityContext": { "privileged": true, "readOnlyRootFilesystem": true },
            "readinessProbe": answers(&conf_dir, 2),
            "volumeMounts": [
                self.conf_mount("Bidirectional"),
                { "name": "state", "mountPath": self.state_dir },
                { "name": "fuse", "mountPath": FUSE },
            ],
        })
    }

    fn container(&self, command: Command) -> Value {
        let conf_dir = format!("--conf-dir={}", self.seen_conf_dir());
        let namespace = format!("--namespace={}", self.namespace);
        let args = match command {
            Command::Init => json!([
                "init",
                conf_dir,
                format!("--num-dp-cores={}", self.dataplane),
                format!("--num-cp-cores={}", self.controlplane),
            ]),
            Command::Discover => json!(["discover", conf_dir]),
            Command::Install => json!(["install", format!("--install-dir={}", self.install_dir)]),
            Command::Reconcile => json!(["reconcile", conf_dir, "--interval=60", "--publish", namespace]),
            Command::NodeReport => json!(["node-report", conf_dir, "--interval=60", "--publish", namespace]),
        };
        let mut mounts = vec![match command {
            Command::Install => json!({ "name": "install", "mountPath": self.install_dir }),
            _ => self.conf_mount("HostToContainer"),
        }];
        if command == Command::NodeReport {
            mounts.push(kubelet_mount());
        }
        let mut container = plain_container(command.name(), &self.image, args, mounts);
        container["imagePullPolicy"] = self.pull_policy.as_str().into();
        container
    }
}

const FUSE: &str = "/dev/fuse";
/// Where the kubelet keeps `cpu_manager_state`.
pub(crate) const KUBELET: &str = "/var/lib/kubelet";

/// The kubelet writes a new file each time, so its directory is mounted.
pub(crate) fn kubelet_mount() -> Value {
    json!({ "name": "kubelet", "mountPath": KUBELET, "readOnly": true })
}

/// A container of our image without any privilege. It is root: what it reads belongs to root.
pub(crate) fn plain_container(name: &str, image: &str, args: Value, mounts: Vec<Value>) -> Value {
    json!({
        "name": name,
        "image": image,
        "args": args,
        "env": [{ "name": "NODE_NAME", "valueFrom": { "fieldRef": { "fieldPath": "spec.nodeName" } } }],
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "capabilities": { "drop": ["ALL"] },
            "readOnlyRootFilesystem": true,
        },
        "volumeMounts": mounts,
    })
}

/// A probe that is answered once the mount is: `kcm describe` reads all of it.
pub(crate) fn answers(conf_dir: &str, period: u32) -> Value {
    let command = json!(["/kcm", "describe", format!("--conf-dir={conf_dir}")]);
    json!({ "exec": { "command": command }, "periodSeconds": period, "failureThreshold": 30, "timeoutSeconds": 5 })
}

fn parent(directory: &str) -> &str {
    match directory.rsplit_once('/') {
        Some(("", _)) | None => "/",
        Some((parent, _)) => parent,
    }
}

fn names(commands: &[Command]) -> Vec<&'static str> {
    commands.iter().map(|command| command.name()).collect()
}

/// Makes a pod.
pub(crate) fn create(namespace: &str, pod: &Pod) -> Request {
    let path = format!("/api/v1/namespaces/{namespace}/pods");
    Request::with(Method::Create, path, pod.object.clone(), subject(namespace, &pod.name))
}

pub(crate) fn get(namespace: &str, name: &str) -> Request {
    Request::get(format!("/api/v1/namespaces/{namespace}/pods/{name}"), subject(namespace, name))
}

/// All pods of ours.
pub(crate) fn list(namespace: &str) -> Request {
    let path = format!("/api/v1/namespaces/{namespace}/pods?labelSelector={}", selector());
    Request::get(path, format!("the pods of namespace {namespace}"))
}

/// Their changes since a version.
pub(crate) fn watch(namespace: &str, version: &str) -> Request {
    let path = format!(
        "/api/v1/namespaces/{namespace}/pods?watch=true&allowWatchBookmarks=true&timeoutSeconds=240\
         &labelSelector={}&resourceVersion={version}",
        selector()
    );
    Request::get(path, format!("the pods of namespace {namespace}"))
}

/// The last line that a container has written.
pub(crate) fn last_line(namespace: &str, pod: &str, container: &str) -> Request {
    let path = format!("/api/v1/namespaces/{namespace}/pods/{pod}/log?container={container}&tailLines=1");
    Request::get(path, format!("the log of {}", subject(namespace, pod)))
}

fn selector() -> String {
    format!("{}%3D{LABEL_VALUE}", LABEL.replace('/', "%2F"))
}

fn subject(namespace: &str, name: &str) -> String {
    format!("pod {namespace}/{name}")
}

/// Where a pod has got to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Not there yet, and why.
    Waiting(String),
    Done,
    /// It will not get there.
    Failed {
        container: Option<String>,
        reason: String,
    },
}

/// What keeps a container from starting for good.
const HOPELESS: [&str; 5] = [
    "InvalidImageName",
    "ErrImageNeverPull",
    "CreateContainerConfigError",
    "CreateContainerError",
    "CrashLoopBackOff",
];

/// What the status of a pod says.
pub(crate) fn state(pod: &Value, goal: Goal) -> State {
    let status = &pod["status"];
    let containers = ["initContainerStatuses", "containerStatuses"]
        .into_iter()
        .filter_map(|kind| status[kind].as_array())
        .flatten();
    let mut waiting = None;
    for container in containers.clone() {
        let name = container["name"].as_str().unwrap_or("?");
        if let Some(reason) = container.pointer("/state/waiting/reason").and_then(Value::as_str) {
            let message = container.pointer("/state/waiting/message").and_then(Value::as_str);
            let reason = [Some(reason), message].into_iter().flatten().collect::<Vec<_>>().join(": ");
            if HOPELESS.iter().any(|hopeless| reason.starts_with(hopeless)) {
                return State::Failed { container: Some(name.into()), reason };
            }
            waiting.get_or_insert(format!("{name}: {reason}"));
        }
        if let Some(ended) = container.pointer("/state/terminated")
            && ended["exitCode"].as_i64().is_some_and(|code| code != 0)
            && goal == Goal::Succeeded
        {
            let code = ended["exitCode"].as_i64().unwrap_or_default();
            let reason = format!("{} (exit code {code})", ended["reason"].as_str().unwrap_or("Error"));
            return State::Failed { container: Some(name.into()), reason };
        }
    }
    let ready = |container: &Value| container["ready"] != false;
    let condition = |condition: &Value| condition["type"] == "Ready" && condition["status"] == "False";
    let is_ready = status["containerStatuses"].as_array().is_none_or(|all| all.iter().all(ready))
        && !status["conditions"].as_array().is_some_and(|all| all.iter().any(condition));
    match (status["phase"].as_str().unwrap_or("Pending"), goal) {
        ("Succeeded", Goal::Succeeded) => State::Done,
        ("Running", Goal::Running) if is_ready => State::Done,
        ("Failed", _) | ("Succeeded", Goal::Running) => {
            let said = [&status["reason"], &status["message"]].into_iter().filter_map(Value::as_str);
            let said: Vec<&str> = said.collect();
            let reason = if said.is_empty() { "it has ended".into() } else { said.join(": ") };
            State::Failed { container: None, reason }
        }
        (phase, _) => State::Waiting(waiting.unwrap_or_else(|| phase.into())),
    }
}

/// The first field in which a pod that is there is not as it is to be. What the server has added does not
/// count.
pub(crate) fn difference(there: &Value, wanted: &Value) -> Option<String> {
    // An item of a list does not say what it is.
    ["/metadata/labels", "/spec"].into_iter().find_map(|part| {
        let [there, wanted] = [there, wanted].map(|pod| pod.pointer(part).unwrap_or(&Value::Null));
        differs(there, wanted, &part.replace('/', "."))
    })
}

fn differs(there: &Value, wanted: &Value, path: &str) -> Option<String> {
    match (there, wanted) {
        (Value::Object(there), Value::Object(wanted)) => wanted.iter().find_map(|(name, wanted)| {
            let path = format!("{path}.{name}");
            match there.get(name) {
                Some(there) => differs(there, wanted, &path),
                None => Some(path),
            }
        }),
        // A server adds items (a volume with the token), and only at the end.
        (Value::Array(there), Value::Array(wanted)) => {
            wanted.iter().enumerate().find_map(|(index, wanted)| {
                let path = format!("{path}[{index}]");
                match there.get(index) {
                    Some(there) => differs(there, wanted, &path),
                    None => Some(path),
                }
            })
        }
        _ => (there != wanted).then(|| path.to_owned()),
    }
}
