//! The kinds of objects: which are served, their defaults, and their validation.
//!
//! Owns the knowledge about kinds. Does not know requests.

use serde_json::{Value, json};

use super::rights::Named;
use super::store::Store;

const DEFINITIONS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";

pub fn version() -> Value {
    json!({ "major": "1", "minor": "36", "gitVersion": "v1.36.2", "platform": "linux/amd64" })
}

/// Whether a resource is served. A custom one is once its definition is established.
pub fn is_served(store: &Store, named: &Named) -> bool {
    match named.group.as_str() {
        "" | "apiextensions.k8s.io" | "rbac.authorization.k8s.io" => true,
        _ => definition(store, named).is_some_and(|definition| {
            let conditions = definition["status"]["conditions"].as_array();
            conditions.is_some_and(|all| all.iter().any(|condition| condition["type"] == "Established"))
        }),
    }
}

fn definition<'a>(store: &'a Store, named: &Named) -> Option<&'a Value> {
    store.get(&format!("{DEFINITIONS}/{}.{}", named.resource, named.group))
}

/// The schema of a custom resource.
pub fn schema(store: &Store, named: &Named) -> Option<Value> {
    Some(definition(store, named)?.pointer("/spec/versions/0/schema/openAPIV3Schema")?.clone())
}

pub fn kind(store: &Store, named: &Named) -> String {
    match named.resource.as_str() {
        "nodes" => "Node".into(),
        "pods" => "Pod".into(),
        "events" => "Event".into(),
        _ => definition(store, named).and_then(|d| d["spec"]["names"]["kind"].as_str()).unwrap_or("?").into(),
    }
}

/// The status of a definition that is established.
pub fn established(definition: &Value) -> Value {
    let condition = |kind: &str, reason: &str, message: &str| {
        json!({
            "type": kind, "status": "True", "lastTransitionTime": "2026-11-23T20:57:18Z",
            "reason": reason, "message": message,
        })
    };
    json!({
        "conditions": [
            condition("NamesAccepted", "NoConflicts", "no conflicts found"),
            condition("Established", "InitialNamesAccepted", "the initial names have been accepted"),
        ],
        "acceptedNames": definition["spec"]["names"],
        "storedVersions": ["v1"],
    })
}

/// Whether objects of this resource have a generation.
pub fn has_generation(named: &Named) -> bool {
    !matches!(named.resource.as_str(), "nodes" | "clusterroles" | "events")
}

/// Records the manager who created an object.
pub fn note_manager(object: &mut Value, manager: &str) {
    let entry = json!({
        "manager": manager, "operation": "Update", "apiVersion": object["apiVersion"],
        "time": "2026-11-23T20:57:19Z", "fieldsType": "FieldsV1", "fieldsV1": {},
    });
    object["metadata"]["managedFields"] = json!([entry]);
}

fn set_default(object: &mut Value, field: &str, value: Value) {
    if object.get(field).is_none() {
        object[field] = value;
    }
}

/// Adds the defaults to a new object.
pub fn default(named: &Named, object: &mut Value) {
    match named.resource.as_str() {
        "pods" => default_pod(named, object),
        "customresourcedefinitions" => {
            set_default(&mut object["spec"], "conversion", json!({ "strategy": "None" }));
            object["status"] = json!({
                "conditions": null, "acceptedNames": { "plural": "", "kind": "" }, "storedVersions": ["v1"],
            });
        }
        _ => {}
    }
}

/// A node with capacity and without allocatable has everything allocatable.
pub fn default_allocatable(node: &mut Value) {
    let status = &mut node["status"];
    if status["capacity"].is_object() && !status["allocatable"].is_object() {
        status["allocatable"] = status["capacity"].clone();
    }
}

/// Copies capacity to allocatable, as a kubelet does every ten seconds: of what is no longer in capacity, it removes extended
/// resources only. The legacy name is a native one, because it contains `kubernetes.io/`.
pub fn copy_capacity(node: &mut Value) {
    let is_extended = |name: &str| name.contains('/') && !name.contains("kubernetes.io/");
    let status = &mut node["status"];
    let capacity = status["capacity"].as_object().cloned().unwrap_or_default();
    let mut allocatable = status["allocatable"].as_object().cloned().unwrap_or_default();
    allocatable.retain(|name, _| capacity.contains_key(name) || !is_extended(name));
    allocatable.extend(capacity);
    status["allocatable"] = allocatable.into();
}

fn default_pod(named: &Named, object: &mut Value) {
    if let Some(namespace) = &named.namespace {
        set_default(&mut object["metadata"], "namespace", namespace.as_str().into());
    }
    let spec = &mut object["spec"];
    for (field, value) in [
        ("restartPolicy", json!("Always")),
        ("terminationGracePeriodSeconds", json!(30)),
        ("dnsPolicy", json!("ClusterFirst")),
        ("securityContext", json!({})),
        ("schedulerName", json!("default-scheduler")),
        ("priority", json!(0)),
        ("enableServiceLinks", json!(true)),
        ("preemptionPolicy", json!("PreemptLowerPriority")),
    ] {
        set_default(spec, field, value);
    }
    for kind in ["initContainers", "containers"] {
        for container in spec[kind].as_array_mut().into_iter().flatten() {
            set_default(container, "resources", json!({}));
            set_default(container, "terminationMessagePath", json!("/dev/termination-log"));
            set_default(container, "terminationMessagePolicy", json!("File"));
            set_default(container, "imagePullPolicy", json!("IfNotPresent"));
            for variable in container["env"].as_array_mut().into_iter().flatten() {
                if let Some(field) = variable.pointer_mut("/valueFrom/fieldRef") {
                    set_default(field, "apiVersion", json!("v1"));
                }
            }
            remove_null(container, "env");
        }
        remove_null(spec, kind);
    }
    for volume in spec["volumes"].as_array_mut().into_iter().flatten() {
        if let Some(path) = volume.get_mut("hostPath") {
            set_default(path, "type", json!(""));
        }
    }
    remove_null(spec, "volumes");
    object["status"] = json!({ "phase": "Pending", "qosClass": "BestEffort" });
}

fn remove_null(object: &mut Value, field: &str) {
    if object.get(field).is_some_and(Value::is_null) {
        object.as_object_mut().map(|fields| fields.remove(field));
    }
}

/// One reason why an object is invalid.
pub struct Cause {
    pub field: String,
    pub reason: &'static str,
    pub message: String,
}

/// Returns why an object is invalid.
pub fn faults(named: &Named, object: &Value) -> Vec<Cause> {
    match named.resource.as_str() {
        "nodes" => node_faults(object),
        "pods" => pod_faults(object),
        "events" => event_faults(object),
        _ => Vec::new(),
    }
}

fn node_faults(node: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    for (name, count) in node["status"]["capacity"].as_object().into_iter().flatten() {
        let count = count.as_str().unwrap_or_default();
        if name.contains('/') && count.parse::<u64>().is_err() {
            let thousandths = count.parse::<f64>().map(|count| format!("{}m", count * 1000.0));
            causes.push(Cause {
                field: format!("status.capacity.{name}"),
                reason: "FieldValueInvalid",
                message: format!(
                    "Invalid value: \"{}\": must be an integer",
                    thousandths.unwrap_or(count.into())
                ),
            });
        }
    }
    let taints = node["spec"]["taints"].as_array().cloned().unwrap_or_default();
    for (index, taint) in taints.iter().enumerate() {
        let same = |other: &&Value| other["key"] == taint["key"] && other["effect"] == taint["effect"];
        if taints[..index].iter().any(|other| same(&other)) {
            let shown = format!(
                "{{\"Key\":{},\"Value\":{},\"Effect\":{},\"TimeAdded\":null}}",
                taint["key"], taint["value"], taint["effect"]
            );
            // A real server reports it twice, too.
            for _ in 0..2 {
                causes.push(Cause {
                    field: format!("metadata.taints[{index}]"),
                    reason: "FieldValueDuplicate",
                    message: format!(
                        "Duplicate value: {shown}: taints must be unique by key and effect pair"
                    ),
                });
            }
        }
    }
    causes
}

/// An Event about an object without a namespace is in `default`.
fn event_faults(event: &Value) -> Vec<Cause> {
    let involved = event["involvedObject"]["namespace"].as_str().unwrap_or_default();
    let own = event["metadata"]["namespace"].as_str().unwrap_or_default();
    let fits = if involved.is_empty() { own == "default" } else { own == involved };
    if fits {
        return Vec::new();
    }
    vec![Cause {
        field: "involvedObject.namespace".into(),
        reason: "FieldValueInvalid",
        message: format!("Invalid value: \"{involved}\": does not match event.namespace"),
    }]
}

fn pod_faults(pod: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let name = pod["metadata"]["name"].as_str().unwrap_or_default();
    if name.is_empty()
        || !name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(&b))
    {
        causes.push(Cause {
            field: "metadata.name".into(),
            reason: "FieldValueInvalid",
            message: format!(
                "Invalid value: \"{name}\": a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
            ),
        });
    }
    let spec = &pod["spec"];
    for kind in ["initContainers", "containers"] {
        for (index, container) in spec[kind].as_array().into_iter().flatten().enumerate() {
            let is_privileged = container["securityContext"]["privileged"] == true;
            for mount in container["volumeMounts"].as_array().into_iter().flatten() {
                let volume = &mount["name"];
                let volumes = spec["volumes"].as_array().cloned().unwrap_or_default();
                if !volumes.iter().any(|known| known["name"] == *volume) {
                    causes.push(Cause {
                        field: format!("spec.{kind}[{index}].volumeMounts.name"),
                        reason: "FieldValueNotFound",
                        message: format!("Not found: {volume}"),
                    });
                }
                if mount["mountPropagation"] == "Bidirectional" && !is_privileged {
                    causes.push(Cause {
                        field: format!("spec.{kind}[{index}].volumeMounts.mountPropagation"),
                        reason: "FieldValueForbidden",
                        message: "Forbidden: Bidirectional mount propagation is available only to privileged containers"
                            .into(),
                    });
                }
            }
        }
    }
    if spec["containers"].as_array().is_none_or(Vec::is_empty) {
        causes.push(Cause {
            field: "spec.containers".into(),
            reason: "FieldValueRequired",
            message: "Required value".into(),
        });
    }
    causes
}

/// Returns the table for `kubectl get`, with the columns of the definition.
pub fn table(store: &Store, named: &Named, items: &[Value], version: &str) -> Value {
    let columns = definition(store, named)
        .and_then(|definition| {
            definition.pointer("/spec/versions/0/additionalPrinterColumns")?.as_array().cloned()
        })
        .unwrap_or_default();
    let path = |column: &Value| column["jsonPath"].as_str().unwrap_or_default().to_owned();
    let mut definitions = vec![json!({ "name": "Name", "type": "string", "format": "name", "priority": 0 })];
    definitions.extend(columns.iter().map(|column| {
        let stands_for = format!("Custom resource definition column (in JSONPath format): {}", path(column));
        json!({
            "name": column["name"], "type": column["type"], "format": "", "priority": 0,
            "description": column["description"].as_str().unwrap_or(&stands_for),
        })
    }));
    let row = |item: &Value| {
        let cell =
            |column: &Value| item.pointer(&path(column).replace('.', "/")).cloned().unwrap_or_default();
        let mut cells = vec![item["metadata"]["name"].clone()];
        cells.extend(columns.iter().map(cell));
        json!({ "cells": cells, "object": {
            "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": item["metadata"],
        }})
    };
    let rows: Vec<Value> = items.iter().map(row).collect();
    json!({
        "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": { "resourceVersion": version },
        "columnDefinitions": definitions, "rows": rows,
    })
}
