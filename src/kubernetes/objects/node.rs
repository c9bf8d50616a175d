//! What `discover` sets on a node, and how it is removed.
//!
//! Owns the resources, the label and the taint. Does not know pools, or the order of the steps.
//!
//! Each function looks at a node and returns the one request that is missing, or none. Run again on the answer, it
//! comes to an end, so a second run sends nothing. Every change carries the resource version of the node that it was
//! made from: if somebody else changed the node meanwhile, the server reports a conflict and nothing is lost.

use std::collections::BTreeMap;

use json_patch::jsonptr::PointerBuf;
use json_patch::{AddOperation, Patch as JsonPatch, PatchOperation, RemoveOperation};
use k8s_openapi::api::core::v1::{Node, Taint};
use kube::Resource as _;
use kube::core::params::{GetParams, ListParams, Patch, PatchParams};
use kube::core::{ObjectList, PartialObjectMeta};
use serde_json::{Value, json};

use super::{Built, GROUP, Request};

/// The resource of the legacy kcm. It has a slot for each CPU list of the dataplane pool.
pub(crate) const OPAQUE: &str = "pod.alpha.kubernetes.io/opaque-int-resource-kcm";
const LABEL: &str = "kcm.intel.com/kcm-node";
const TAINT: &str = "kcm";
const EFFECT: &str = "NoSchedule";
/// How many nodes a page of the list has: 500 nodes are some ten MB.
const PAGE: u32 = 500;

/// The number of slots by resource.
pub(crate) type Slots = BTreeMap<String, usize>;

/// The request that changes a node, or `None` if there is nothing to change.
pub(crate) type Change = Result<Option<Request<Node>>, kube::core::request::Error>;

/// Returns the name of the extended resource of a pool.
pub(crate) fn extended(pool: &str) -> String {
    format!("{GROUP}/{pool}")
}

fn nodes() -> kube::core::Request {
    kube::core::Request::new(Node::url_path(&(), None))
}

/// Reads a node.
pub(crate) fn get(node: &str) -> Built<Node> {
    Ok(Request::new(nodes().get(node, &GetParams::default())?, subject(node)))
}

/// Reads a page of the names of all nodes. `after`: the token of the page before.
pub(crate) fn list(after: Option<&str>) -> Built<ObjectList<PartialObjectMeta<Node>>> {
    let params = ListParams { continue_token: after.map(str::to_owned), ..ListParams::default() };
    Ok(Request::new(nodes().list(&params.limit(PAGE))?, "the nodes".into()))
}

/// Sets the node's capacity to these slots, and removes our slots under any other name.
pub(crate) fn capacity(node: &Node, slots: &Slots) -> Change {
    let (Some(name), Some(version)) = (&node.metadata.name, &node.metadata.resource_version) else {
        return Ok(None);
    };
    let capacity = node.status.as_ref().and_then(|status| status.capacity.as_ref());
    let ours = |name: &&String| {
        *name == OPAQUE || name.strip_prefix(GROUP).is_some_and(|rest| rest.starts_with('/'))
    };
    let mut changes = Vec::new();
    for name in capacity.into_iter().flat_map(BTreeMap::keys).filter(ours) {
        if !slots.contains_key(name) {
            changes.push(remove(&["status", "capacity", name]));
        }
    }
    for (name, count) in slots {
        let count = count.to_string();
        if capacity.and_then(|capacity| capacity.get(name)).is_none_or(|now| now.0 != count) {
            changes.push(add(&["status", "capacity", name], count.into()));
        }
    }
    if changes.is_empty() {
        return Ok(None);
    }
    // With a resource version in it, the server checks that the node has not changed.
    let mut patch = vec![add(&["metadata", "resourceVersion"], version.as_str().into())];
    if capacity.is_none() {
        patch.push(add(&["status", "capacity"], json!({})));
    }
    patch.extend(changes);
    // Sent to the node itself, a change of its status would be dropped without an error.
    let patch: Patch<()> = Patch::Json(JsonPatch(patch));
    let http = nodes().patch_subresource("status", name, &PatchParams::default(), &patch)?;
    Ok(Some(Request::new(http, subject(name))))
}

/// Sets our label and taint, or removes them. Labels and taints of others stay.
pub(crate) fn label_and_taint(node: &Node, wanted: bool) -> Change {
    let (Some(name), Some(version)) = (&node.metadata.name, &node.metadata.resource_version) else {
        return Ok(None);
    };
    let mut patch = json!({ "metadata": { "resourceVersion": version } });
    let label = node.metadata.labels.as_ref().and_then(|labels| labels.get(LABEL)).map(String::as_str);
    let label = match (wanted, label) {
        (true, Some("true")) | (false, None) => None,
        (true, _) => Some(json!("true")),
        (false, Some(_)) => Some(Value::Null),
    };
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    let taints = changed_taints(taints, wanted);
    if label.is_none() && taints.is_none() {
        return Ok(None);
    }
    if let (Some(label), Some(metadata)) =
        (label, patch.pointer_mut("/metadata").and_then(Value::as_object_mut))
    {
        metadata.insert("labels".into(), json!({ LABEL: label }));
    }
    if let (Some(taints), Some(patch)) = (taints, patch.as_object_mut()) {
        patch.insert("spec".into(), json!({ "taints": taints }));
    }
    let http = nodes().patch(name, &PatchParams::default(), &Patch::Merge(&patch))?;
    Ok(Some(Request::new(http, subject(name))))
}

/// Returns the taints as they should be, or `None` if they are. A merge patch replaces the whole list.
fn changed_taints(taints: &[Taint], wanted: bool) -> Option<Vec<Taint>> {
    let is_ours = |taint: &Taint| taint.key == TAINT && taint.effect == EFFECT;
    let mut ours = taints.iter().filter(|taint| is_ours(taint)).peekable();
    let is_right = match wanted {
        true => ours.peek().is_some() && ours.all(|taint| taint.value.as_deref() == Some("true")),
        false => ours.peek().is_none(),
    };
    if is_right {
        return None;
    }
    let mut taints: Vec<Taint> = taints.iter().filter(|taint| !is_ours(taint)).cloned().collect();
    if wanted {
        let (key, value, effect) = (TAINT.into(), Some("true".into()), EFFECT.into());
        taints.push(Taint { key, value, effect, time_added: None });
    }
    Some(taints)
}

fn subject(node: &str) -> String {
    format!("node {node}")
}

fn add(path: &[&str], value: Value) -> PatchOperation {
    PatchOperation::Add(AddOperation { path: PointerBuf::from_tokens(path.iter().copied()), value })
}

fn remove(path: &[&str]) -> PatchOperation {
    PatchOperation::Remove(RemoveOperation { path: PointerBuf::from_tokens(path.iter().copied()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(capacity: Value, taints: Value) -> Node {
        let node = json!({
            "metadata": { "name": "n", "resourceVersion": "7" },
            "spec": { "taints": taints },
            "status": { "capacity": capacity },
        });
        serde_json::from_value(node).unwrap()
    }

    fn slots(slots: &[(&str, usize)]) -> Slots {
        slots.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
    }

    #[test]
    fn slots_have_one_name() {
        let node = node(json!({ "cpu": "16", OPAQUE: "4", "kcm.intel.com/old": "1" }), json!(null));
        let request = capacity(&node, &slots(&[("kcm.intel.com/dataplane", 4)])).unwrap().unwrap();
        assert_eq!(request.path(), "/api/v1/nodes/n/status");
        assert_eq!(
            request.body(),
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
        let node =
            serde_json::from_value(json!({ "metadata": { "name": "n", "resourceVersion": "7" } })).unwrap();
        let patch = capacity(&node, &slots(&[(OPAQUE, 1)])).unwrap().unwrap().body();
        assert_eq!(patch[1], json!({ "op": "add", "path": "/status/capacity", "value": {} }));
    }

    #[test]
    fn a_node_that_is_right_is_left_alone() {
        let ours = json!([{ "key": "kcm", "value": "true", "effect": "NoSchedule" }]);
        let mut node = node(json!({ OPAQUE: "4", "kcm.intel.community/x": "1" }), ours);
        node.metadata.labels = Some([(LABEL.to_owned(), "true".to_owned())].into());
        assert!(capacity(&node, &slots(&[(OPAQUE, 4)])).unwrap().is_none());
        assert!(label_and_taint(&node, true).unwrap().is_none());
    }

    #[test]
    fn a_node_without_a_name_or_version_is_left_alone() {
        assert!(capacity(&Node::default(), &slots(&[(OPAQUE, 4)])).unwrap().is_none());
        assert!(label_and_taint(&Node::default(), true).unwrap().is_none());
    }

    #[test]
    fn taints_of_others_stay() {
        let other = json!({ "key": "x", "effect": "NoExecute", "timeAdded": "2026-01-01T00:00:00Z" });
        let evict = json!({ "key": "kcm", "value": "y", "effect": "NoExecute" });
        let wrong = json!({ "key": "kcm", "value": "x", "effect": "NoSchedule" });
        let ours = json!({ "key": "kcm", "value": "true", "effect": "NoSchedule" });
        let node = node(json!({}), json!([other, wrong, evict]));
        let patch = label_and_taint(&node, true).unwrap().unwrap().body();
        assert_eq!(patch["spec"]["taints"], json!([other, evict, ours]));
        assert_eq!(patch["metadata"], json!({ "resourceVersion": "7", "labels": { LABEL: "true" } }));
        let patch = label_and_taint(&node, false).unwrap().unwrap().body();
        assert_eq!(patch["spec"]["taints"], json!([other, evict]));
        assert_eq!(patch["metadata"], json!({ "resourceVersion": "7" }));
    }
}
