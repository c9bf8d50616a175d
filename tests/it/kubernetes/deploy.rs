//! The manifests in `deploy/`: the roles grant only the rights that are used, and the manifests fit together.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::api_server::deployed::{deployed, manifest, of_kind};
use super::api_server::nodes;
use super::api_server::rights::{Named, Wanted};
use super::api_server::{ApiServer, apply, objects};
use crate::harness::{KCM, Mount, Sleeper, run};
use serde_json::{Value, json};

const NODE: &str = "/api/v1/nodes/n1";
const PODS: &str = "/api/v1/namespaces/default/pods";
const REPORTS: &str = "/apis/kcm.intel.com/v1/namespaces/default";

/// Returns every right of a role.
fn granted(role: &str) -> BTreeSet<Wanted> {
    let roles = of_kind("rbac.yaml", "ClusterRole");
    let role = roles.iter().find(|one| one["metadata"]["name"] == role).expect("a role");
    let words = |rule: &Value, field: &str| -> Vec<String> {
        rule[field].as_array().unwrap().iter().map(|word| word.as_str().unwrap().to_owned()).collect()
    };
    let mut all = BTreeSet::new();
    for rule in role["rules"].as_array().unwrap() {
        for group in words(rule, "apiGroups") {
            for resource in words(rule, "resources") {
                for verb in words(rule, "verbs") {
                    let verb = ["create", "delete", "get", "list", "patch", "watch"]
                        .into_iter()
                        .find(|known| *known == verb);
                    let wanted = Wanted {
                        verb: verb.expect("a verb"),
                        group: group.clone(),
                        resource: resource.clone(),
                    };
                    all.insert(wanted);
                }
            }
        }
    }
    all
}

fn used(server: &ApiServer, user: &str) -> BTreeSet<Wanted> {
    let log = server.log();
    let refused: Vec<_> = log.iter().filter(|entry| entry.status == 403).collect();
    assert!(refused.is_empty(), "{refused:?}");
    log.into_iter().filter(|entry| entry.user == user).flat_map(|entry| entry.wanted).collect()
}

#[test]
fn the_role_of_nodes_is_minimal() {
    let (server, mount) = (deployed(), Mount::with_dataplane());
    let home = mount.home().display().to_string();
    let (install, systemd) = (format!("--install-dir={home}"), format!("--systemd={home}"));
    for words in [
        &["discover", "--dry-run"][..],
        &["discover"],
        &["discover", "--resource-name=extended"],
        &["node-report", "--publish"],
        &["node-report", "--publish"],
        &["reconcile", "--publish"],
        &["reconcile", "--publish"],
        &["uninstall", &install, &systemd],
        // Too many cores: an Event says so.
        &["init", "--if-empty", "--num-dp-cores=9999"],
    ] {
        // The containers are root without capabilities, or with the one to configure.
        let kcm = mount.kcm(words);
        let mut command = Command::new("setpriv");
        let is_admin = matches!(words, ["init" | "reconcile" | "uninstall", ..]);
        let bounding = if is_admin { "--bounding-set=-all,+sys_admin" } else { "--bounding-set=-all" };
        command.args([bounding, "--inh-caps=-all", "--no-new-privs"]);
        command.arg(kcm.get_program()).args(kcm.get_args());
        command.env("KUBECONFIG", server.kubeconfig("kcm-node")).env("NODE_NAME", "n1");
        let (_, err, code) = run(&mut command);
        assert_eq!(code, Some(0), "{words:?}: {err}");
    }
    assert_eq!(used(&server, "kcm-node"), granted("kcm-node"));
}

#[test]
fn the_role_of_cluster_init_is_minimal() {
    let server = deployed();
    server.kubelet(|pod| {
        let status = match pod["metadata"]["name"].as_str().unwrap() {
            "kcm-init-install-discover-pod-n1" => json!({ "phase": "Failed" }),
            "kcm-init-install-discover-pod-n3" => json!({ "phase": "Succeeded" }),
            _ => json!({ "phase": "Running" }),
        };
        vec![(Duration::ZERO, status)]
    });
    // The pods of n3 run, and its node is advertised.
    server.put("/api/v1/nodes/n3", nodes::advertised("n3"));
    // A pod that has the name of one of ours, but not its label.
    let foreign = json!({ "kind": "Pod", "metadata": { "name": "kcm-mount-pod-n2" } });
    server.put(&format!("{PODS}/kcm-mount-pod-n2"), foreign);
    let mut command = Command::new(KCM);
    command.args(["cluster-init", "--all-hosts"]).env("KUBECONFIG", server.kubeconfig("kcm-cluster-init"));
    let (_, err, code) = run(&mut command);
    assert_eq!(code, Some(1), "{err}");
    assert_eq!(used(&server, "kcm-cluster-init"), granted("kcm-cluster-init"));
}

#[test]
fn the_role_of_cluster_uninstall_is_minimal() {
    let server = deployed();
    server.kubelet(nodes::well);
    let user = "kcm-cluster-uninstall";
    server.put("/api/v1/nodes/n1", nodes::advertised("n1"));
    let uninstall = |status: i32| {
        let mut command = Command::new(KCM);
        command.args(["cluster-uninstall", "--host-list=n1"]).env("KUBECONFIG", server.kubeconfig(user));
        let (_, err, code) = run(&mut command);
        assert_eq!(code, Some(status), "{err}");
    };
    uninstall(0);
    // A pod of this name has no label of kcm: it is read. And one that fails is explained.
    server.put(&format!("{PODS}/kcm-mount-pod-n1"), json!({ "kind": "Pod", "metadata": { "name": "x" } }));
    server.kubelet(|_| vec![(Duration::ZERO, json!({ "phase": "Failed" }))]);
    uninstall(1);
    server.remove(&format!("{PODS}/kcm-mount-pod-n1"));
    uninstall(1);
    assert_eq!(used(&server, user), granted(user));
}

/// Returns the command of a probe, for this mount.
fn probe(mount: &Mount, container: &Value, kind: &str) -> Command {
    let words = container[kind]["exec"]["command"].as_array().unwrap().iter();
    let words: Vec<&str> = words.map(|word| word.as_str().unwrap()).collect();
    let [kcm, rest @ .., conf_dir] = words.as_slice() else { panic!("{words:?}") };
    assert_eq!((*kcm, *conf_dir), ("/kcm", "--conf-dir=/run/kcm/conf"));
    mount.kcm(rest)
}

#[test]
fn probes_fail_only_if_no_daemon_answers() {
    let mount = Mount::with_dataplane();
    let daemon_set = manifest("daemonset.yaml").remove(0);
    let container = &daemon_set["spec"]["template"]["spec"]["initContainers"][0];
    let kinds = ["startupProbe", "readinessProbe", "livenessProbe"];
    // Whatever the checks of the node find is not a reason to take the mount away.
    let intruder = Sleeper::new();
    crate::harness::pin(intruder.pid(), &[0]);
    let (_, err, code) = run(&mut mount.kcm(&["status", "--timeout=60"]));
    assert_eq!(code, Some(1), "there are problems: {err}");
    for kind in kinds {
        let (out, err, code) = run(&mut probe(&mount, container, kind));
        assert_eq!((out.as_str(), err.as_str(), code), ("", "", Some(0)), "{kind}");
    }
    let paused = mount.pause();
    for kind in kinds {
        let (_, err, code) = run(&mut probe(&mount, container, kind));
        assert_eq!(code, Some(3), "{kind}: {err}");
        assert!(err.ends_with("kcm mount does not answer\n"), "{err}");
    }
    drop(paused);
    mount.stop();
    let (_, err, code) = run(&mut probe(&mount, container, "livenessProbe"));
    assert_eq!(code, Some(3), "{err}");
    assert!(err.ends_with("kcm mount is not running\n"), "{err}");

    // The watchdog gives a worker that has just been started 60 s. Restarting the container earlier would undo that.
    let number = |kind: &str, field: &str| container[kind][field].as_i64().unwrap();
    assert!(number("livenessProbe", "periodSeconds") * number("livenessProbe", "failureThreshold") > 60 + 6);
    for kind in kinds {
        // kcm waits for 2 s, so that the probe ends by itself.
        assert!(number(kind, "timeoutSeconds") > 2, "{kind}");
    }
}

#[test]
fn only_chosen_nodes_run_kcm() {
    let daemon_set = manifest("daemonset.yaml").remove(0);
    let pod = &daemon_set["spec"]["template"]["spec"];
    assert_eq!(pod["nodeSelector"], json!({ "kcm.intel.com/enabled": "true" }));
    assert!(document().contains("kubectl label node n1 kcm.intel.com/enabled=true\n"));
    // discover removes its own label with the slots: the choice must not go with it.
    assert_ne!(pod["nodeSelector"], json!({ "kcm.intel.com/kcm-node": "true" }));
    let namespace = of_kind("rbac.yaml", "Namespace").remove(0);
    assert_eq!(namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"], "privileged");
    // No container is best-effort, and the node ends other pods first.
    assert_eq!(pod["priorityClassName"], "system-node-critical");
    for container in ["initContainers", "containers"].iter().flat_map(|kind| pod[kind].as_array().unwrap()) {
        assert!(container["resources"]["requests"]["cpu"].is_string(), "{container}");
    }
}

#[test]
fn published_reports_fit_their_schema() {
    let (server, mount) = (deployed(), Mount::with_dataplane());
    mount.make_pool("shared", false, &[]);
    // The reports contain a reclaim, a claim and a thread outside its list.
    crate::harness::killed_on(&mount.tasks("dataplane", "0"));
    let claimed = Sleeper::new();
    crate::harness::write(&mount.tasks("dataplane", "0"), claimed.pid().to_string()).unwrap();
    crate::harness::pin(claimed.pid(), &[1]);
    for command in ["node-report", "reconcile"] {
        let mut command = mount.kcm(&[command, "--publish"]);
        command.env("KUBECONFIG", server.kubeconfig("kcm-node")).env("NODE_NAME", "n1");
        let (_, err, code) = run(&mut command);
        assert_eq!(code, Some(0), "{err}");
    }
    for definition in manifest("crds.yaml") {
        let schema = definition.pointer("/spec/versions/0/schema/openAPIV3Schema").unwrap();
        let plural = definition["spec"]["names"]["plural"].as_str().unwrap();
        let report = server.object(&format!("{REPORTS}/{plural}/n1")).unwrap();
        assert_eq!(apply::check(schema, &report), Ok(()), "{plural}");
        for part in
            ["mismatchedCpuMasks", "reclaimedCpuLists"].iter().filter(|_| plural == "reconcilereports")
        {
            assert_ne!(report["report"][part], json!([]), "{report}");
        }
        for column in
            definition.pointer("/spec/versions/0/additionalPrinterColumns").unwrap().as_array().unwrap()
        {
            let path = column["jsonPath"].as_str().unwrap().replace('.', "/");
            assert!(report.pointer(&path).is_some_and(|cell| !cell.is_null()), "{plural} {path}");
        }
    }
    assert!(server.object(NODE).is_some());
}

#[test]
fn only_the_mount_container_is_privileged() {
    let daemon_set = manifest("daemonset.yaml").remove(0);
    let spec = &daemon_set["spec"]["template"]["spec"];
    let all: Vec<&Value> =
        ["initContainers", "containers"].iter().filter_map(|kind| spec[kind].as_array()).flatten().collect();
    let names = |wanted: fn(&Value) -> bool| -> Vec<&str> {
        all.iter().filter(|one| wanted(one)).map(|one| one["name"].as_str().unwrap()).collect()
    };
    assert_eq!(names(|_| true), ["mount", "init", "reconcile", "node-report", "discover"]);
    assert_eq!(names(|one| one["securityContext"]["privileged"] == true), ["mount"]);
    let drops_all = |one: &Value| one["securityContext"]["capabilities"]["drop"] == json!(["ALL"]);
    assert_eq!(names(drops_all), ["init", "reconcile", "node-report", "discover"]);
    let configures = |one: &Value| one["securityContext"]["capabilities"]["add"] == json!(["SYS_ADMIN"]);
    assert_eq!(names(configures), ["init", "reconcile"]);
    for container in all {
        let args: Vec<&str> =
            container["args"].as_array().unwrap().iter().map(|arg| arg.as_str().unwrap()).collect();
        let (_, err, code) = run(Command::new(KCM).args(&args).arg("--help"));
        assert_eq!(code, Some(0), "{args:?}: {err}");
        for mount in container["volumeMounts"].as_array().unwrap() {
            assert!(spec["volumes"].as_array().unwrap().iter().any(|volume| volume["name"] == mount["name"]));
        }
    }
    let example = manifest("example-pod.yaml").remove(0);
    let container = &example["spec"]["containers"][0];
    assert!(example["spec"].get("hostPID").is_none());
    assert_eq!(container["securityContext"]["allowPrivilegeEscalation"], false);
    assert_eq!(container["volumeMounts"][0]["mountPropagation"], "HostToContainer");
    // The fake server refuses what a real one has refused.
    let pods = Named::parse(PODS).unwrap();
    for pod in [&json!({ "metadata": { "name": "kcm-x" }, "spec": spec }), &example] {
        let faults: Vec<_> = objects::faults(&pods, pod).into_iter().map(|cause| cause.message).collect();
        assert_eq!(faults, [""; 0]);
    }
}

#[test]
fn manifests_name_objects_that_exist() {
    let kustomization = manifest("kustomization.yaml").remove(0);
    let files: Vec<&str> =
        kustomization["resources"].as_array().unwrap().iter().map(|file| file.as_str().unwrap()).collect();
    let objects: Vec<Value> = files.iter().flat_map(|file| manifest(file)).collect();
    let has = |kind: &str, namespace: &Value, name: &Value| {
        let is_it = |object: &&Value| {
            object["kind"] == kind
                && object["metadata"]["namespace"] == *namespace
                && object["metadata"]["name"] == *name
        };
        objects.iter().filter(is_it).count() == 1
    };
    for object in &objects {
        let metadata = &object["metadata"];
        assert!(
            has(object["kind"].as_str().unwrap(), &metadata["namespace"], &metadata["name"]),
            "{metadata}"
        );
        if !metadata["namespace"].is_null() {
            assert!(has("Namespace", &Value::Null, &metadata["namespace"]), "{metadata}");
        }
        for subject in object["subjects"].as_array().into_iter().flatten() {
            assert!(has("ServiceAccount", &subject["namespace"], &subject["name"]), "{subject}");
            assert!(has("ClusterRole", &Value::Null, &object["roleRef"]["name"]), "{object}");
        }
    }
    let daemon_set = manifest("daemonset.yaml").remove(0);
    let (spec, namespace) = (&daemon_set["spec"], &daemon_set["metadata"]["namespace"]);
    let pod = &spec["template"]["spec"];
    assert!(has("ServiceAccount", namespace, &pod["serviceAccountName"]));
    assert_eq!(spec["selector"]["matchLabels"], spec["template"]["metadata"]["labels"]);
    for container in ["initContainers", "containers"].iter().flat_map(|kind| pod[kind].as_array().unwrap()) {
        assert!(
            kustomization["images"]
                .as_array()
                .unwrap()
                .iter()
                .any(|image| image["name"] == container["image"])
        );
        assert_eq!(container["imagePullPolicy"], "IfNotPresent", "an image that only the node has is found");
    }
    // Every file of deploy/ is a resource of the kustomization, or explained in docs/kubernetes.md.
    for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(files.contains(&&*name) || document().contains(&format!("| `{name}` |")), "{name}");
    }
}

fn document() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/kubernetes.md")).unwrap()
}
