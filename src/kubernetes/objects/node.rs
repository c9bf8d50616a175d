//! What `discover` sets on a node, and how it is removed.
//!
//! Owns the resources, the label, the taint and the annotation about it. Does not know pools, or the order of the steps.
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
/// The key and the effect of the taint that is ours without a note.
const TAINT: &str = "kcm";
const EFFECT: &str = "NoSchedule";
/// The annotation that notes a taint other than the default, as `key:effect`, by which Kubernetes tells taints apart.
const TAINT_NOTE: &str = "kcm.intel.com/taint";
/// How many nodes a page of the list has: 500 nodes are some ten MB.
const PAGE: u32 = 500;

/// The number of slots by resource.
pub(crate) type Slots = BTreeMap<String, usize>;

/// The marks of a node that has slots, besides the label.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Marks {
    pub(crate) taint: Option<Taint>,
}

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

/// Reads the metadata of a node.
pub(crate) fn metadata(node: &str) -> Built<PartialObjectMeta<Node>> {
    Ok(Request::new(nodes().get_metadata(node, &GetParams::default())?, subject(node)))
}

/// Reads a page of the names of all nodes. `after`: the token of the page before.
pub(crate) fn list(after: Option<&str>) -> Built<ObjectList<PartialObjectMeta<Node>>> {
    let params = ListParams { continue_token: after.map(str::to_owned), ..ListParams::default() };
    Ok(Request::new(nodes().list(&params.limit(PAGE))?, "the nodes".into()))
}

/// Sets the node's capacity to these slots, and removes our slots under any other name.
///
/// The kubelet copies capacity to `allocatable`, by which the scheduler counts, but what has left capacity it removes there only
/// for extended resources, and the legacy name is none. On a node without a kubelet nothing is copied at all. So slots that go are
/// removed from both. New slots are left to the kubelet.
pub(crate) fn capacity(node: &Node, slots: &Slots) -> Change {
    capacity_of(node, slots, is_ours)
}

/// Removes the slots of the legacy resource. Those of a device plugin have the same names as our others, and belong to the
/// kubelet.
pub(crate) fn without_legacy_capacity(node: &Node) -> Change {
    capacity_of(node, &Slots::new(), |resource| resource == OPAQUE)
}

/// The same for the resources that are meant.
fn capacity_of(node: &Node, slots: &Slots, is_meant: fn(&str) -> bool) -> Change {
    let (Some(name), Some(version)) = (&node.metadata.name, &node.metadata.resource_version) else {
        return Ok(None);
    };
    let status = node.status.as_ref();
    let capacity = status.and_then(|status| status.capacity.as_ref());
    let allocatable = status.and_then(|status| status.allocatable.as_ref());
    let mut changes = Vec::new();
    for (part, amounts) in [("capacity", capacity), ("allocatable", allocatable)] {
        let ours = amounts.into_iter().flat_map(BTreeMap::keys).filter(|name| is_meant(name));
        let others = ours.filter(|name| !slots.contains_key(*name));
        changes.extend(others.map(|name| remove(&["status", part, name])));
    }
    for (name, &count) in slots {
        let set = |part| add(&["status", part, name], count.to_string().into());
        if capacity.and_then(|capacity| capacity.get(name)).is_none_or(|now| now.0 != count.to_string()) {
            changes.push(set("capacity"));
        }
        let allocatable = allocatable.and_then(|allocatable| allocatable.get(name));
        if allocatable.and_then(|now| now.0.parse::<usize>().ok()).is_some_and(|now| now > count) {
            changes.push(set("allocatable"));
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

/// Whether a resource has a name of kcm.
fn is_ours(resource: &str) -> bool {
    resource == OPAQUE || resource.strip_prefix(GROUP).is_some_and(|rest| rest.starts_with('/'))
}

/// Sets our label and these marks, or with `None` removes them. Labels and taints of others stay. A taint that an earlier run has
/// set is removed if it is another one.
pub(crate) fn label_and_taint(node: &Node, wanted: Option<&Marks>) -> Change {
    let (Some(name), Some(version)) = (&node.metadata.name, &node.metadata.resource_version) else {
        return Ok(None);
    };
    let wanted_taint = wanted.and_then(|marks| marks.taint.as_ref());
    let mut patch = json!({ "metadata": { "resourceVersion": version } });
    let text = |texts: &Option<BTreeMap<String, String>>, name| texts.as_ref()?.get(name).cloned();
    let (label, note) = (text(&node.metadata.labels, LABEL), text(&node.metadata.annotations, TAINT_NOTE));
    let wanted_label = wanted.map(|_| "true".to_owned());
    let wanted_note = wanted_taint.map(identity).filter(|taint| *taint != identity_of(TAINT, EFFECT));
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    let mut ours = vec![identity_of(TAINT, EFFECT)];
    ours.extend(note.clone());
    let taints = changed_taints(taints, &ours, wanted_taint);
    if label == wanted_label && note == wanted_note && taints.is_none() {
        return Ok(None);
    }
    if let Some(metadata) = patch.pointer_mut("/metadata").and_then(Value::as_object_mut) {
        if label != wanted_label {
            metadata.insert("labels".into(), json!({ LABEL: wanted_label }));
        }
        if note != wanted_note {
            metadata.insert("annotations".into(), json!({ TAINT_NOTE: wanted_note }));
        }
    }
    if let (Some(taints), Some(patch)) = (taints, patch.as_object_mut()) {
        patch.insert("spec".into(), json!({ "taints": taints }));
    }
    let http = nodes().patch(name, &PatchParams::default(), &Patch::Merge(&patch))?;
    Ok(Some(Request::new(http, subject(name))))
}

/// Returns which of slots, label and taint a node does not have.
pub(crate) fn missing(node: &Node, taint: Option<&Taint>) -> Option<String> {
    let capacity = node.status.as_ref().and_then(|status| status.capacity.as_ref());
    if !capacity.into_iter().flat_map(BTreeMap::keys).any(|name| is_ours(name)) {
        return Some("slots of kcm".into());
    }
    let labels = node.metadata.labels.as_ref();
    if labels.and_then(|labels| labels.get(LABEL)).is_none_or(|value| value != "true") {
        return Some("label kcm.intel.com/kcm-node=true".into());
    }
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    let lacks = |wanted: &&Taint| !taints.iter().any(|taint| identity(taint) == identity(wanted));
    taint.filter(lacks).map(|taint| format!("taint {}", shown_taint(taint)))
}

/// Returns a taint as `kubectl taint` takes it.
pub(crate) fn shown_taint(taint: &Taint) -> String {
    let value = taint.value.as_ref().map_or_else(String::new, |value| format!("={value}"));
    format!("{}{value}:{}", taint.key, taint.effect)
}

/// The key and the effect, by which Kubernetes tells taints apart.
fn identity(taint: &Taint) -> String {
    identity_of(&taint.key, &taint.effect)
}

fn identity_of(key: &str, effect: &str) -> String {
    format!("{key}:{effect}")
}

/// Returns the taints as they should be, or `None` if they are. A merge patch replaces the whole list. `ours`: the identities of
/// the taints that are ours.
fn changed_taints(taints: &[Taint], ours: &[String], wanted: Option<&Taint>) -> Option<Vec<Taint>> {
    let is_wanted = |taint: &Taint| wanted.is_some_and(|wanted| identity(wanted) == identity(taint));
    let is_ours = |taint: &&Taint| ours.contains(&identity(taint)) || is_wanted(taint);
    let is_right =
        |taint: &&Taint| is_wanted(taint) && wanted.is_some_and(|wanted| taint.value == wanted.value);
    let mut now = taints.iter().filter(is_ours).peekable();
    let is_there = now.peek().is_some();
    if is_there == wanted.is_some() && now.all(|taint| is_right(&taint)) {
        return None;
    }
    let mut taints: Vec<Taint> = taints.iter().filter(|taint| !is_ours(taint)).cloned().collect();
    taints.extend(wanted.cloned());
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

    fn taint(key: &str, value: Option<&str>, effect: &str) -> Taint {
        Taint { key: key.into(), value: value.map(str::to_owned), effect: effect.into(), time_added: None }
    }

    fn usual() -> Marks {
        Marks { taint: Some(taint("kcm", Some("true"), "NoSchedule")) }
    }

    #[test]
    fn slots_that_go_leave_allocatable_too() {
        let amounts = json!({ "cpu": "16", OPAQUE: "4", "kcm.intel.com/old": "1" });
        let mut node = node(amounts.clone(), json!(null));
        node.status.as_mut().unwrap().allocatable = Some(serde_json::from_value(amounts).unwrap());
        let patch = |slots: &Slots| capacity(&node, slots).unwrap().unwrap().body();
        let changes = |patch: Value| -> Vec<String> {
            let steps = patch.as_array().unwrap().iter().skip(1);
            steps
                .map(|step| format!("{} {} {}", step["op"], step["path"], step["value"]).replace('"', ""))
                .collect()
        };
        assert_eq!(
            changes(patch(&Slots::new())),
            [
                "remove /status/capacity/kcm.intel.com~1old null",
                "remove /status/capacity/pod.alpha.kubernetes.io~1opaque-int-resource-kcm null",
                "remove /status/allocatable/kcm.intel.com~1old null",
                "remove /status/allocatable/pod.alpha.kubernetes.io~1opaque-int-resource-kcm null",
            ]
        );
        assert_eq!(
            changes(patch(&slots(&[("kcm.intel.com/old", 1), (OPAQUE, 3)]))),
            [
                "add /status/capacity/pod.alpha.kubernetes.io~1opaque-int-resource-kcm 3",
                "add /status/allocatable/pod.alpha.kubernetes.io~1opaque-int-resource-kcm 3",
            ],
            "a slot that goes is not given away before the kubelet has copied the number"
        );
        assert_eq!(
            changes(patch(&slots(&[("kcm.intel.com/old", 1), (OPAQUE, 5)]))),
            ["add /status/capacity/pod.alpha.kubernetes.io~1opaque-int-resource-kcm 5"]
        );
    }

    #[test]
    fn a_node_that_is_right_is_left_alone() {
        let ours = json!([{ "key": "kcm", "value": "true", "effect": "NoSchedule" }]);
        let mut node = node(json!({ OPAQUE: "4", "kcm.intel.community/x": "1" }), ours);
        node.metadata.labels = Some([(LABEL.to_owned(), "true".to_owned())].into());
        assert!(capacity(&node, &slots(&[(OPAQUE, 4)])).unwrap().is_none());
        assert!(label_and_taint(&node, Some(&usual())).unwrap().is_none());
    }

    #[test]
    fn what_a_node_does_not_have_is_named() {
        let ours = json!([{ "key": "kcm", "value": "true", "effect": "NoSchedule" }]);
        let mut all = node(json!({ "cpu": "4", OPAQUE: "4" }), ours.clone());
        let taint = usual().taint;
        let missing = |node: &Node| missing(node, taint.as_ref()).unwrap_or_default();
        assert_eq!(missing(&all), "label kcm.intel.com/kcm-node=true");
        all.metadata.labels = Some([(LABEL.to_owned(), "true".to_owned())].into());
        assert_eq!(missing(&all), "");
        let untainted = Node { spec: None, ..all.clone() };
        assert_eq!(missing(&untainted), "taint kcm=true:NoSchedule");
        assert_eq!(super::missing(&untainted, None), None, "no taint is wanted");
        let other = Taint { value: None, ..taint.clone().unwrap() };
        let other = Taint { key: "x".into(), ..other };
        assert_eq!(super::missing(&all, Some(&other)), Some("taint x:NoSchedule".into()));
        assert_eq!(missing(&Node { status: None, ..all }), "slots of kcm");
        assert_eq!(missing(&node(json!({ "cpu": "4" }), ours)), "slots of kcm");
    }

    #[test]
    fn a_node_without_a_name_or_version_is_left_alone() {
        assert!(capacity(&Node::default(), &slots(&[(OPAQUE, 4)])).unwrap().is_none());
        assert!(label_and_taint(&Node::default(), Some(&usual())).unwrap().is_none());
    }

    #[test]
    fn taints_of_others_stay() {
        let other = json!({ "key": "x", "effect": "NoExecute", "timeAdded": "2026-01-01T00:00:00Z" });
        let evict = json!({ "key": "kcm", "value": "y", "effect": "NoExecute" });
        let wrong = json!({ "key": "kcm", "value": "x", "effect": "NoSchedule" });
        let ours = json!({ "key": "kcm", "value": "true", "effect": "NoSchedule" });
        let node = node(json!({}), json!([other, wrong, evict]));
        let patch = label_and_taint(&node, Some(&usual())).unwrap().unwrap().body();
        assert_eq!(patch["spec"]["taints"], json!([other, evict, ours]));
        assert_eq!(patch["metadata"], json!({ "resourceVersion": "7", "labels": { LABEL: "true" } }));
        let patch = label_and_taint(&node, None).unwrap().unwrap().body();
        assert_eq!(patch["spec"]["taints"], json!([other, evict]));
        assert_eq!(patch["metadata"], json!({ "resourceVersion": "7" }));
    }

    #[test]
    fn another_taint_is_noted_and_replaces_the_one_before() {
        let marks = |taint: Option<Taint>| Marks { taint };
        let mut now = node(json!({}), json!([{ "key": "kcm", "value": "true", "effect": "NoSchedule" }]));
        now.metadata.labels = Some([(LABEL.to_owned(), "true".to_owned())].into());
        // Applies the patch, which has the fields of a node.
        let mut become_marked = |wanted: Option<&Marks>| {
            let request = label_and_taint(&now, wanted).unwrap()?;
            let body = request.body();
            if let Some(taints) = body["spec"].get("taints") {
                now.spec.as_mut().unwrap().taints = serde_json::from_value(taints.clone()).unwrap();
            }
            for (part, texts) in
                [("labels", &mut now.metadata.labels), ("annotations", &mut now.metadata.annotations)]
            {
                for (name, value) in body["metadata"][part].as_object().into_iter().flatten() {
                    let texts = texts.get_or_insert_default();
                    match value.as_str() {
                        Some(value) => texts.insert(name.clone(), value.to_owned()),
                        None => texts.remove(name),
                    };
                }
            }
            let taints = now.spec.as_ref().unwrap().taints.as_deref().unwrap_or_default();
            let taints: Vec<String> =
                taints.iter().map(|one| format!("{}={:?}", identity(one), one.value)).collect();
            let note = now.metadata.annotations.as_ref().and_then(|notes| notes.get(TAINT_NOTE)).cloned();
            Some((taints, note))
        };
        let dedicated = marks(Some(taint("dedicated", Some("kcm"), "NoExecute")));
        let expected =
            (vec![r#"dedicated:NoExecute=Some("kcm")"#.to_owned()], Some("dedicated:NoExecute".to_owned()));
        assert_eq!(become_marked(Some(&dedicated)), Some(expected));
        assert_eq!(become_marked(Some(&dedicated)), None, "a second run changes nothing");
        let valueless = marks(Some(taint("dedicated", None, "NoExecute")));
        let expected = (vec!["dedicated:NoExecute=None".to_owned()], Some("dedicated:NoExecute".to_owned()));
        assert_eq!(become_marked(Some(&valueless)), Some(expected));
        assert_eq!(become_marked(Some(&marks(None))), Some((Vec::new(), None)), "--no-taint");
        assert_eq!(become_marked(Some(&marks(None))), None);
        assert!(become_marked(Some(&dedicated)).is_some());
        let expected = (vec![r#"kcm:NoSchedule=Some("true")"#.to_owned()], None);
        assert_eq!(become_marked(Some(&usual())), Some(expected));
        assert!(become_marked(Some(&dedicated)).is_some());
        assert_eq!(become_marked(None), Some((Vec::new(), None)), "undiscover knows it by the note");
        assert_eq!(become_marked(None), None);
    }
}
