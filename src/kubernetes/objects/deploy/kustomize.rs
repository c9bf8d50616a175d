//! `kustomization.yaml`, and the components that change what it makes.
//!
//! Owns the patches. They are components and not overlays, so that several can be combined; kustomize does not let a
//! directory below `deploy/` use `deploy/` itself.

use serde_json::{Value, json};

use super::{IMAGE, header, yaml};

/// A component: its name, what it is for, and its patch of the DaemonSet.
struct Component {
    name: &'static str,
    why: &'static str,
    patch: Value,
}

/// The argument list of a container of the DaemonSet. `kind`: `initContainers` or `containers`.
fn args(kind: &str, index: usize) -> String {
    format!("/spec/template/spec/{kind}/{index}/args/-")
}

fn components() -> [Component; 4] {
    [
        Component {
            name: "all-nodes",
            why: "All nodes, and not only those with the label kcm.intel.com/enabled=true.",
            patch: json!([{ "op": "remove", "path": "/spec/template/spec/nodeSelector" }]),
        },
        Component {
            name: "isolated",
            why: "The dataplane pool is isolated: nothing else runs on the CPUs of a claimed list (cgroup v2, Linux 6.8).\n\
                  It has an effect on nodes that have no pools yet.",
            patch: json!([{ "op": "add", "path": args("initContainers", 1), "value": "--isolated" }]),
        },
        Component {
            name: "no-taint",
            why: "Nodes get no taint, so that pods which do not use kcm are scheduled to them, too.",
            patch: json!([{ "op": "add", "path": args("containers", 2), "value": "--no-taint" }]),
        },
        Component {
            name: "systemd",
            why: "Without the container `mount`: a unit of the node serves the mount, which an update does not interrupt.",
            patch: json!([{ "op": "remove", "path": "/spec/template/spec/initContainers/0" }]),
        },
    ]
}

fn kustomization() -> String {
    let object = json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["rbac.yaml", "crds.yaml", "admission.yaml", "daemonset.yaml"],
        "images": [{ "name": IMAGE, "newName": IMAGE, "newTag": "latest" }],
    });
    let mut text = String::from(
        "kubectl apply -k deploy; set newName and newTag to your image. Components change what is made; name those that\n\
         you want, in a list like this one:\ncomponents:\n",
    );
    for component in components() {
        text.push_str(&format!("- components/{}\n", component.name));
    }
    text.push_str("- components/device-plugin\n");
    text.push_str("- monitoring");
    header(&text) + &yaml(&object)
}

pub(super) fn files() -> Vec<(String, String)> {
    let mut files = vec![("kustomization.yaml".to_owned(), kustomization())];
    for Component { name, why, patch } in components() {
        let object = json!({
            "apiVersion": "kustomize.config.k8s.io/v1alpha1",
            "kind": "Component",
            "patches": [{ "target": { "kind": "DaemonSet", "name": "kcm" }, "patch": yaml(&patch) }],
        });
        files.push((format!("components/{name}/kustomization.yaml"), header(why) + &yaml(&object)));
    }
    files.push(("monitoring/kustomization.yaml".to_owned(), monitoring()));
    files.push(("monitoring/rules.yaml".to_owned(), rules()));
    files
}

fn monitoring() -> String {
    let object = json!({
        "apiVersion": "kustomize.config.k8s.io/v1alpha1",
        "kind": "Component",
        "resources": ["rules.yaml"],
        "configMapGenerator": [{
            "name": "kcm-dashboard",
            "namespace": super::NAMESPACE,
            "files": ["kcm.json=dashboard.json"],
            "options": { "disableNameSuffixHash": true, "labels": { "grafana_dashboard": "1" } },
        }],
    });
    header(
        "The alert rules as an object of the Prometheus operator, and the dashboard as a ConfigMap with the label for\n\
         which Grafana's sidecar looks. docs/kubernetes.md says how Prometheus gets the metrics.",
    ) + &yaml(&object)
}

/// The alert rules, as an object of the Prometheus operator.
fn rules() -> String {
    let alerts: Value =
        serde_saphyr::from_str(include_str!("../../../../deploy/monitoring/alerts.yaml")).unwrap();
    let object = json!({
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": super::metadata("kcm"),
        "spec": alerts,
    });
    header("The rules of alerts.yaml.") + &yaml(&object)
}
