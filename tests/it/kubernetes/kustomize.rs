//! `kubectl kustomize` renders `deploy/`, and each component changes what it says.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::api_server::deployed::manifest;
use super::device_plugin::component;
use crate::harness::run;
use serde_json::{Value, json};

/// Renders `deploy/` with components, as `kubectl apply -k` does first.
pub(super) fn rendered(components: &[&str]) -> Vec<Value> {
    let home = tempfile::tempdir().unwrap();
    let home = home.path().canonicalize().unwrap();
    // kustomize takes relative paths only.
    let up = "../".repeat(home.components().count() - 1);
    let deploy = format!("{up}{}/deploy", env!("CARGO_MANIFEST_DIR").trim_start_matches('/'));
    let components: Vec<String> = components.iter().map(|name| format!("{deploy}/{name}")).collect();
    let kustomization = json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
        "resources": [deploy], "components": components,
    });
    fs::write(home.join("kustomization.yaml"), kustomization.to_string()).unwrap();
    let mut command = Command::new("kubectl");
    command.arg("kustomize").arg(&home).env("KUBECONFIG", "/dev/null");
    let (out, err, code) = run(&mut command);
    assert_eq!((err.as_str(), code), ("", Some(0)), "{components:?}: kubectl 1.21 or newer is needed");
    serde_saphyr::from_multiple(&out).unwrap()
}

pub(super) fn daemon_set(objects: &[Value]) -> Value {
    objects.iter().find(|object| object["kind"] == "DaemonSet").expect("a DaemonSet").clone()
}

/// The pod of the committed DaemonSet, with the tag that the kustomization sets.
fn committed() -> Value {
    tagged(&manifest("daemonset.yaml").remove(0))
}

/// The object with the tag of the image, which kustomize does not set in what a component of another directory adds.
pub(super) fn tagged(object: &Value) -> Value {
    let text = object.to_string().replace(r#""image":"kcm""#, r#""image":"kcm:latest""#);
    serde_json::from_str(&text).unwrap()
}

fn push(object: &mut Value, container: &str, arg: &str) {
    object.pointer_mut(container).unwrap()["args"].as_array_mut().unwrap().push(arg.into());
}

#[test]
fn kubectl_renders_all_objects_of_deploy() {
    let mut objects = rendered(&[]);
    let mut expected: Vec<Value> =
        ["rbac.yaml", "crds.yaml", "admission.yaml"].iter().flat_map(|file| manifest(file)).collect();
    expected.push(committed());
    for all in [&mut objects, &mut expected] {
        all.sort_by_key(|object| (object["kind"].to_string(), object["metadata"]["name"].to_string()));
    }
    assert_eq!(objects, expected);
}

#[test]
fn each_component_changes_what_it_says() {
    type Change = fn(&mut Value);
    let components: [(&str, Change); 5] = [
        ("components/all-nodes", |object| {
            object["spec"]["template"]["spec"].as_object_mut().unwrap().remove("nodeSelector").unwrap();
        }),
        ("components/device-plugin", component::patch),
        ("components/isolated", |object| push(object, "/spec/template/spec/initContainers/1", "--isolated")),
        ("components/no-taint", |object| push(object, "/spec/template/spec/containers/2", "--no-taint")),
        ("components/systemd", |object| {
            let containers = &mut object["spec"]["template"]["spec"]["initContainers"];
            assert_eq!(containers.as_array_mut().unwrap().remove(0)["name"], "mount");
        }),
    ];
    for (name, change) in components {
        let mut expected = committed();
        change(&mut expected);
        assert_eq!(daemon_set(&rendered(&[name])), expected, "{name}");
    }
    // They can be combined.
    let names: Vec<&str> =
        components.iter().map(|(name, _)| *name).filter(|name| !name.ends_with("systemd")).collect();
    let mut expected = committed();
    components.iter().filter(|(name, _)| names.contains(name)).for_each(|(_, change)| change(&mut expected));
    assert_eq!(daemon_set(&rendered(&names)), expected);
    let mut found: Vec<String> =
        fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/components"))
            .unwrap()
            .map(|entry| format!("components/{}", entry.unwrap().file_name().to_string_lossy()))
            .collect();
    found.sort();
    assert_eq!(found, components.map(|(name, _)| name), "each component is tested");
}

#[test]
fn the_monitoring_component_has_the_rules_and_the_dashboard() {
    let objects = rendered(&["monitoring"]);
    let rules = objects.iter().find(|object| object["kind"] == "PrometheusRule").expect("rules");
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/monitoring");
    let alerts: Value =
        serde_saphyr::from_str(&fs::read_to_string(deploy.join("alerts.yaml")).unwrap()).unwrap();
    assert_eq!(rules["spec"], alerts);
    let dashboard = objects.iter().find(|object| object["metadata"]["name"] == "kcm-dashboard").expect("one");
    assert_eq!(dashboard["metadata"]["labels"]["grafana_dashboard"], "1");
    let text = fs::read_to_string(deploy.join("dashboard.json")).unwrap();
    assert_eq!(dashboard["data"]["kcm.json"], text);
}
