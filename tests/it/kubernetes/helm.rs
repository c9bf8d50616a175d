//! The Helm chart: Helm renders it, by default as the manifests of `deploy/`, and each value changes what it says.
//!
//! `scripts/helm-render` renders with Helm's own code, from a package that `scripts/test` puts into `target/tools`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use super::api_server::deployed::manifest;
use super::kustomize::{daemon_set, rendered, tagged};
use crate::harness::run;
use serde_json::{Value, json};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Renders the chart with these values. Returns the texts by file, or the message of Helm.
fn render(values: &Value) -> Result<BTreeMap<String, String>, String> {
    let mut command = Command::new(Path::new(ROOT).join("scripts/helm-render"));
    command.arg(Path::new(ROOT).join("deploy/helm/kcm")).arg("kcm-system").arg(values.to_string());
    let (out, err, code) = run(&mut command);
    match code {
        Some(0) => Ok(serde_json::from_str(&out).expect("JSON")),
        Some(1) => Err(err),
        _ => panic!("{err}"),
    }
}

/// Returns the rendered objects, sorted.
fn objects(values: &Value) -> Vec<Value> {
    let files = render(values).unwrap();
    let yaml = files.iter().filter(|(name, text)| name.ends_with(".yaml") && !text.trim().is_empty());
    sorted(yaml.flat_map(|(_, text)| serde_saphyr::from_multiple::<Value>(text).expect("YAML")).collect())
}

fn sorted(mut objects: Vec<Value>) -> Vec<Value> {
    objects.sort_by_key(|object| (object["kind"].to_string(), object["metadata"]["name"].to_string()));
    objects
}

fn of_kind(objects: &[Value], kind: &str) -> Vec<Value> {
    objects.iter().filter(|object| object["kind"] == kind).cloned().collect()
}

/// Returns the pod of the DaemonSet.
fn pod(values: &Value) -> Value {
    of_kind(&objects(values), "DaemonSet")[0]["spec"]["template"]["spec"].clone()
}

fn container<'a>(pod: &'a Value, name: &str) -> &'a Value {
    let all = ["initContainers", "containers"].iter().flat_map(|kind| pod[kind].as_array().unwrap());
    all.into_iter().find(|one| one["name"] == name).expect(name)
}

fn has_arg(pod: &Value, name: &str, arg: &str) -> bool {
    container(pod, name)["args"].as_array().unwrap().contains(&json!(arg))
}

/// The objects of `deploy/` that the chart has, with the tag of the image.
fn committed() -> Vec<Value> {
    let files = ["rbac.yaml", "admission.yaml", "daemonset.yaml"].iter().flat_map(|file| manifest(file));
    let objects = files.filter(|object| object["kind"] != "Namespace");
    sorted(objects.map(|object| tagged(&object)).collect())
}

#[test]
fn the_chart_renders_the_objects_of_deploy() {
    assert_eq!(objects(&json!({ "commandAccounts": true })), committed());
    let without: Vec<Value> = committed()
        .into_iter()
        .filter(|object| !object["metadata"]["name"].as_str().unwrap().starts_with("kcm-cluster-"))
        .collect();
    assert_eq!(objects(&json!({})), without, "the accounts of commands are optional");
    let crds = fs::read_to_string(Path::new(ROOT).join("deploy/helm/kcm/crds/crds.yaml")).unwrap();
    assert_eq!(crds, fs::read_to_string(Path::new(ROOT).join("deploy/crds.yaml")).unwrap());
    let notes = &render(&json!({})).unwrap()["kcm/templates/NOTES.txt"];
    assert!(notes.contains("kubectl label node NODE kcm.intel.com/enabled=true\n"), "{notes}");
}

#[test]
fn values_stand_for_the_components_of_kustomize() {
    for (values, component) in [
        (json!({ "devicePlugin": true }), "components/device-plugin"),
        (json!({ "mount": false }), "components/systemd"),
        (json!({ "nodeSelector": { "kcm.intel.com/enabled": null } }), "components/all-nodes"),
    ] {
        assert_eq!(
            daemon_set(&objects(&values)),
            tagged(&daemon_set(&rendered(&[component]))),
            "{component}"
        );
    }
    let both = json!({ "devicePlugin": true, "mount": false });
    // The component systemd removes the first container, so it comes last.
    let components = ["components/device-plugin", "components/systemd"];
    assert_eq!(daemon_set(&objects(&both)), tagged(&daemon_set(&rendered(&components))));
    let monitoring = objects(&json!({ "monitoring": { "rules": true, "dashboard": true } }));
    for kind in ["PrometheusRule", "ConfigMap"] {
        assert_eq!(of_kind(&monitoring, kind), of_kind(&rendered(&["monitoring"]), kind), "{kind}");
    }
}

#[test]
fn values_choose_pools_mode_and_taint() {
    let chosen = pod(&json!({
        "pools": { "dataplane": 4, "controlplane": 1, "mode": "isolated" }, "taint": "dedicated=kcm:NoSchedule",
    }));
    for arg in ["--num-dp-cores=4", "--num-cp-cores=1", "--isolated"] {
        assert!(has_arg(&chosen, "init", arg), "{arg}");
    }
    assert!(has_arg(&chosen, "discover", "--taint=dedicated=kcm:NoSchedule"));
    assert!(has_arg(&pod(&json!({ "taint": "" })), "discover", "--no-taint"));
    let layouts = "n1: {dataplane: 8, controlplane: 2}\n";
    let maps = of_kind(&objects(&json!({ "layouts": layouts })), "ConfigMap");
    assert_eq!(maps[0]["data"]["layouts.yaml"], layouts);
    let volumes = pod(&json!({}))["volumes"].as_array().unwrap().clone();
    let volume = volumes.iter().find(|volume| volume["name"] == "layouts").unwrap();
    assert_eq!(volume["configMap"], json!({ "name": maps[0]["metadata"]["name"], "optional": true }));
}

#[test]
fn values_choose_nodes_resources_image_and_account() {
    let resources = json!({ "limits": { "memory": "64Mi" } });
    let values = json!({
        "nodeSelector": { "pool": "fast" }, "tolerations": [{ "key": "kcm", "operator": "Exists" }],
        "priorityClassName": "high", "interval": 30, "resources": { "tools": resources, "mount": resources },
        "image": { "repository": "registry/kcm", "tag": "1", "pullPolicy": "Always" },
        "serviceAccount": { "name": "cpu" }, "monitoring": { "rules": true },
    });
    let (chosen, all) = (pod(&values), objects(&values));
    assert_eq!(
        chosen["nodeSelector"],
        json!({ "pool": "fast", "kcm.intel.com/enabled": "true" }),
        "Helm merges maps"
    );
    assert!(pod(&json!({ "nodeSelector": { "kcm.intel.com/enabled": null } })).get("nodeSelector").is_none());
    assert_eq!(chosen["tolerations"], values["tolerations"]);
    assert_eq!(
        (&chosen["priorityClassName"], &chosen["serviceAccountName"]),
        (&json!("high"), &json!("cpu"))
    );
    for name in ["mount", "init", "reconcile", "node-report", "discover"] {
        let container = container(&chosen, name);
        assert_eq!(
            (&container["image"], &container["imagePullPolicy"]),
            (&json!("registry/kcm:1"), &json!("Always"))
        );
        assert_eq!(container["resources"]["limits"], resources["limits"], "{name}");
    }
    for name in ["reconcile", "node-report", "discover"] {
        assert!(has_arg(&chosen, name, "--interval=30"), "{name}");
    }
    assert_eq!(of_kind(&all, "ServiceAccount")[0]["metadata"]["name"], "cpu");
    assert_eq!(of_kind(&all, "ClusterRoleBinding")[0]["subjects"][0]["name"], "cpu");
    let condition =
        &of_kind(&all, "ValidatingAdmissionPolicy")[0]["spec"]["matchConditions"][0]["expression"];
    assert!(
        condition.as_str().unwrap().ends_with("== 'system:serviceaccount:kcm-system:cpu'"),
        "{condition}"
    );
    let alerts = fs::read_to_string(Path::new(ROOT).join("deploy/monitoring/alerts.yaml")).unwrap();
    let alerts: Value = serde_saphyr::from_str(&alerts).unwrap();
    assert_eq!(of_kind(&all, "PrometheusRule")[0]["spec"], alerts);
    let none = objects(&json!({ "serviceAccount": { "create": false }, "admissionPolicy": false }));
    assert_eq!(none.len(), of_kind(&none, "DaemonSet").len(), "{none:?}");
}

#[test]
fn helm_refuses_values_that_have_no_meaning() {
    for (values, part) in [
        (json!({ "pools": { "mode": "isolate" } }), "/pools/mode"),
        (json!({ "pools": { "dataplane": -1 } }), "/pools/dataplane"),
        (json!({ "taint": "kcm" }), "/taint"),
        (json!({ "interval": 0 }), "/interval"),
        (json!({ "nodeselector": {} }), "nodeselector"),
    ] {
        let message = render(&values).expect_err("a refusal");
        assert!(message.contains(part), "{values}: {message}");
    }
}
