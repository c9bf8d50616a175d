//! What `discover` says of a node, and how it is taken back.
//!
//! Each function looks at the node as it is and gives the one request that is missing, or none: run again on
//! the answer, it comes to an end, and a second run sends nothing. Every change carries the version of the
//! node that it was made from: somebody else's change in between makes it a conflict, not a loss.
#![allow(clippy::indexing_slicing, reason = "a JSON value answers null for what it does not have")]

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{GROUP, Method, Request};

/// The resource of 2017; its slots are those of the dataplane pool.
pub(crate) const OPAQUE: &str = "pod.alpha.kubernetes.io/opaque-int-resource-kcm";
const LABEL: &str = "kcm.intel.com/kcm-node";
const TAINT: &str = "kcm";
const EFFECT: &str = "NoSchedule";

/// How many slots of which resource a node has.
pub(crate) type Slots = BTreeMap<String, usize>;

/// The extended resource of a pool.
pub(crate) fn extended(pool: &str) -> String {
    format!("{GROUP}/{pool}")
}

pub(crate) fn get(node: &str) -> Request {
    Request::get(path(node), subject(node))
}

/// All nodes, a page at a time.
pub(crate) fn list(after: Option<&str>) -> Request {
    let after = after.map(|token| format!("&continue={}", encoded(token))).unwrap_or_default();
    Request::get(format!("/api/v1/nodes?limit=500{after}"), "the nodes".into())
}

/// What brings the node's capacity to these slots: ours under any other name are taken off.
pub(crate) fn capacity(node: &Value, slots: &Slots) -> Option<Request> {
    let capacity = node.pointer("/status/capacity").and_then(Value::as_object);
    let mut patch = Vec::new();
    let ours =
        |name: &&String| *name == OPAQUE || name.strip_prefix(GROUP).is_some_and(|r| r.starts_with('/'));
    for name in capacity.into_iter().flat_map(|capacity| capacity.keys()).filter(ours) {
        if !slots.contains_key(name) {
            patch.push(json!({ "op": "remove", "path": pointer(name) }));
        }
    }
    for (name, count) in slots {
        let count = count.to_string();
        let now = capacity.and_then(|capacity| capacity.get(name));
        if now.and_then(Value::as_str) != Some(&count) {
            patch.push(json!({ "op": "add", "path": pointer(name), "value": count }));
        }
    }
    if patch.is_empty() {
        return None;
    }
    if capacity.is_none() {
        patch.insert(0, json!({ "op": "add", "path": "/status/capacity", "value": {} }));
    }
    // In a JSON Patch, too, a version makes the server compare.
    patch.insert(0, json!({ "op": "add", "path": "/metadata/resourceVersion", "value": version(node)? }));
    let name = name(node)?;
    // Through the node itself it would be dropped without an error.
    let path = format!("{}/status", path(name));
    Some(Request::with(Method::JsonPatch, path, patch.into(), subject(name)))
}

/// What gives the node our label and taint, or takes them off. What others have set stays.
pub(crate) fn marks(node: &Value, marked: bool) -> Option<Request> {
    let label = node.pointer("/metadata/labels").and_then(|labels| labels.get(LABEL)).and_then(Value::as_str);
    let taints = node.pointer("/spec/taints").and_then(Value::as_array).cloned().unwrap_or_default();
    let is_ours = |taint: &Value| taint["key"] == TAINT && taint["effect"] == EFFECT;
    let is_tainted = taints.iter().any(is_ours);
    let is_right = |taint: &Value| !is_ours(taint) || taint["value"] == "true";
    let mut metadata = json!({ "resourceVersion": version(node)? });
    let mut patch = json!({});
    match (marked, label) {
        (true, Some("true")) | (false, None) => {}
        (true, _) => metadata["labels"] = json!({ LABEL: "true" }),
        (false, Some(_)) => metadata["labels"] = json!({ LABEL: null }),
    }
    if is_tainted != marked || (marked && !taints.iter().all(is_right)) {
        // The list is one value to the server: whoever writes it writes all of it.
        let mut taints: Vec<Value> = taints.into_iter().filter(|taint| !is_ours(taint)).collect();
        if marked {
            taints.push(json!({ "key": TAINT, "value": "true", "effect": EFFECT }));
        }
        patch["spec"] = json!({ "taints": taints });
    }
    if patch.get("spec").is_none() && metadata.get("labels").is_none() {
        return None;
    }
    patch["metadata"] = metadata;
    let name = name(node)?;
    Some(Request::with(Method::MergePatch, path(name), patch, subject(name)))
}

pub(crate) fn name(node: &Value) -> Option<&str> {
    node.pointer("/metadata/name").and_then(Value::as_str)
}

fn version(node: &Value) -> Option<&str> {
    node.pointer("/metadata/resourceVersion").and_then(Value::as_str)
}

fn path(node: &str) -> String {
    format!("/api/v1/nodes/{node}")
}

fn subject(node: &str) -> String {
    format!("node {node}")
}

/// A JSON Pointer (RFC 6901) to a resource of the node.
fn pointer(resource: &str) -> String {
    format!("/status/capacity/{}", resource.replace('~', "~0").replace('/', "~1"))
}

/// Percent-encoding of what a server gave us to give back.
fn encoded(text: &str) -> String {
    let encode = |b: u8| match b {
        b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' | b'-' | b'_' | b'.' | b'~' => char::from(b).to_string(),
        _ => format!("%{b:02X}"),
    };
    text.bytes().map(encode).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(capacity: Value, taints: Value) -> Value {
        json!({
            "metadata": { "name": "n", "resourceVersion": "7" },
            "spec": { "taints": taints },
            "status": { "capacity": capacity },
        })
    }

    fn slots(slots: &[(&str, usize)]) -> Slots {
        slots.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
    }

    #[test]
    fn slots_are_sold_under_one_name() {
        let node = node(json!({ "cpu": "16", OPAQUE: "4", "kcm.intel.com/old": "1" }), json!(null));
        let request = capacity(&node, &slots(&[("kcm.intel.com/dataplane", 4)])).unwrap();
        assert_eq!(request.path, "/api/v1/nodes/n/status");
        assert_eq!(
            request.body.unwrap(),
            json!([
                { "op": "add", "path": "/metadata/resourceVersion", "value": "7" },
                { "op": "remove", "path": "/status/capacity/kcm.intel.com~1old" },
                { "op": "remove", "path": "/status/capacity/pod.alpha.kubernetes.io~1opaque-int-resource-kcm" },
                { "op": "add", "path": "/status/capacity/kcm.intel.com~1dataplane", "value": "4" },
            ])
        );
    }

    #[test]
    fn a_node_without_capacity_gets_it_first() {
        let node = json!({ "metadata": { "name": "n", "resourceVersion": "7" } });
        let patch = capacity(&node, &slots(&[(OPAQUE, 1)])).unwrap().body.unwrap();
        assert_eq!(patch[1], json!({ "op": "add", "path": "/status/capacity", "value": {} }));
    }

    #[test]
    fn what_is_right_is_left_alone() {
        let ours = json!([{ "key": "kcm", "value": "true", "effect": "NoSchedule" }]);
        let mut node = node(json!({ OPAQUE: "4", "kcm.intel.community/x": "1" }), ours);
        node["metadata"]["labels"] = json!({ LABEL: "true" });
        assert_eq!(capacity(&node, &slots(&[(OPAQUE, 4)])), None);
        assert_eq!(marks(&node, true), None);
    }

    #[test]
    fn other_taints_stay_as_they_are() {
        let other = json!({ "key": "x", "effect": "NoExecute", "timeAdded": "2026-01-01T00:00:00Z" });
        let evict = json!({ "key": "kcm", "value": "y", "effect": "NoExecute" });
        let wrong = json!({ "key": "kcm", "value": "x", "effect": "NoSchedule" });
        let ours = json!({ "key": "kcm", "value": "true", "effect": "NoSchedule" });
        let node = node(json!({}), json!([other, wrong, evict]));
        let patch = marks(&node, true).unwrap().body.unwrap();
        assert_eq!(patch["spec"]["taints"], json!([other, evict, ours]));
        assert_eq!(patch["metadata"], json!({ "resourceVersion": "7", "labels": { LABEL: "true" } }));
        let patch = marks(&node, false).unwrap().body.unwrap();
        assert_eq!(patch["spec"]["taints"], json!([other, evict]));
        assert_eq!(patch["metadata"], json!({ "resourceVersion": "7" }));
    }
}
