//! The custom resources NodeReport and ReconcileReport: their definitions, and the objects.
//!
//! A field that is sent and not in the schema is refused by the server: what is published is tested against
//! these schemas.
#![allow(clippy::indexing_slicing, reason = "a JSON value answers null for what it does not have")]

use serde_json::{Map, Value, json};

use super::{CRDS, GROUP, Request};

/// The version of both.
const VERSION: &str = "v1";

/// A kind of report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Node,
    Reconcile,
}

impl Kind {
    #[cfg(test)]
    pub(crate) const ALL: [Self; 2] = [Self::Node, Self::Reconcile];

    fn name(self) -> &'static str {
        match self {
            Self::Node => "NodeReport",
            Self::Reconcile => "ReconcileReport",
        }
    }

    pub(crate) fn plural(self) -> &'static str {
        match self {
            Self::Node => "nodereports",
            Self::Reconcile => "reconcilereports",
        }
    }

    fn short(self) -> &'static str {
        match self {
            Self::Node => "nr",
            Self::Reconcile => "rr",
        }
    }
}

/// Which object: one a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) kind: Kind,
    pub(crate) namespace: String,
    pub(crate) node: String,
}

impl Target {
    fn path(&self) -> String {
        let Self { kind, namespace, node } = self;
        format!("/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{}/{node}", kind.plural())
    }

    fn subject(&self) -> String {
        format!("{} {}/{}", self.kind.name(), self.namespace, self.node)
    }

    pub(crate) fn get(&self) -> Request {
        Request::get(self.path(), self.subject())
    }

    /// Publishes `fields`, made at this time (UTC, to the microsecond, without a zone: as in 2017).
    pub(crate) fn apply(&self, fields: &Value, time: &str) -> Request {
        let mut object = without_nulls(fields);
        object["apiVersion"] = format!("{GROUP}/{VERSION}").into();
        object["kind"] = self.kind.name().into();
        object["metadata"] = json!({ "name": self.node, "namespace": self.namespace });
        object["last_updated"] = time.into();
        Request::apply(&self.path(), object, self.subject())
    }
}

/// The fields of a NodeReport: `report` holds checks and description, `topology` stands beside it; `summary` is
/// what `kubectl get` shows.
pub(crate) fn node(report: &Value) -> Value {
    let checks = report["checks"].as_object();
    let is_ok = checks.is_some_and(|checks| checks.values().all(|check| check["ok"] == true));
    let pools = report.pointer("/description/pools").and_then(Value::as_object);
    let pools: Vec<&Value> = pools.into_iter().flat_map(Map::values).collect();
    let exclusive = pools.iter().filter(|pool| pool["exclusive"] == true);
    let lists: Vec<&Value> =
        exclusive.filter_map(|pool| pool["cpuLists"].as_object()).flat_map(Map::values).collect();
    let free = lists.iter().filter(|list| list["tasks"].as_array().is_none_or(Vec::is_empty)).count();
    json!({
        "report": { "checks": report["checks"], "description": report["description"] },
        "topology": report["topology"],
        "summary": { "ok": is_ok, "pools": pools.len(), "exclusiveFree": format!("{free}/{}", lists.len()) },
    })
}

/// The fields of a ReconcileReport. `reclaims`: the newest reclaims with their times; `count`: all since the
/// first report; `seq`: that of the last event that is told of here.
pub(crate) fn reconcile(report: &Value, reclaims: &[Value], count: u64, seq: u64) -> Value {
    let mismatched = report["mismatchedCpuMasks"].as_array().map_or(0, Vec::len);
    json!({
        "report": report,
        "reclaims": reclaims,
        "seq": seq,
        "summary": { "reclaimed": count, "mismatched": mismatched },
    })
}

/// Makes the definition of a kind, or brings it to this version.
pub(crate) fn apply_definition(kind: Kind) -> Request {
    let name = definition_name(kind);
    let subject = format!("CustomResourceDefinition {name}");
    Request { manifest: CRDS, ..Request::apply(&format!("{DEFINITIONS}/{name}"), definition(kind), subject) }
}

pub(crate) fn get_definition(kind: Kind) -> Request {
    let name = definition_name(kind);
    Request {
        manifest: CRDS,
        ..Request::get(format!("{DEFINITIONS}/{name}"), format!("CustomResourceDefinition {name}"))
    }
}

/// Whether the server serves the kind that is so defined.
pub(crate) fn is_established(definition: &Value) -> bool {
    let conditions = definition.pointer("/status/conditions").and_then(Value::as_array);
    let established = |condition: &Value| condition["type"] == "Established" && condition["status"] == "True";
    conditions.is_some_and(|conditions| conditions.iter().any(established))
}

const DEFINITIONS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";

fn definition_name(kind: Kind) -> String {
    format!("{}.{GROUP}", kind.plural())
}

/// The CustomResourceDefinition of a kind.
pub(crate) fn definition(kind: Kind) -> Value {
    let (columns, properties) = match kind {
        Kind::Node => (node_columns(), node_properties()),
        Kind::Reconcile => (reconcile_columns(), reconcile_properties()),
    };
    let mut columns = columns;
    columns.push(column("Updated", "string", ".last_updated", "When the report was made, in UTC"));
    columns.push(column("Age", "date", ".metadata.creationTimestamp", "When the first report was made"));
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": { "name": definition_name(kind) },
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": kind.name(),
                "listKind": format!("{}List", kind.name()),
                "plural": kind.plural(),
                "singular": kind.name().to_lowercase(),
                "shortNames": [kind.short()],
            },
            "versions": [{
                "name": VERSION,
                "served": true,
                "storage": true,
                "additionalPrinterColumns": columns,
                "schema": { "openAPIV3Schema": object(properties) },
            }],
        },
    })
}

fn column(name: &str, kind: &str, path: &str, description: &str) -> Value {
    json!({ "name": name, "type": kind, "jsonPath": path, "description": description })
}

fn node_columns() -> Vec<Value> {
    vec![
        column("OK", "boolean", ".summary.ok", "Whether all checks have passed"),
        column("Pools", "integer", ".summary.pools", "How many pools there are"),
        column("Free", "string", ".summary.exclusiveFree", "CPU lists of exclusive pools: free/total"),
    ]
}

fn reconcile_columns() -> Vec<Value> {
    vec![
        column("Reclaimed", "integer", ".summary.reclaimed", "Claims taken back since the first report"),
        column("Mismatched", "integer", ".summary.mismatched", "Threads outside their CPU list"),
    ]
}

fn node_properties() -> Value {
    let check = json!({
        "ok": boolean(), "errors": array(string()), "live": boolean(), "since": string(),
    });
    let list = object(json!({ "cpus": string(), "tasks": array(integer()) }));
    let pool = object(json!({ "name": string(), "exclusive": boolean(), "cpuLists": map(list) }));
    let cpu = object(json!({ "id": integer(), "isolated": boolean() }));
    let core = object(json!({ "id": integer(), "cpus": array(cpu) }));
    let socket = object(json!({ "id": integer(), "cores": array(core) }));
    json!({
        "last_updated": string(),
        "report": object(json!({
            "checks": map(object(check)),
            "description": object(json!({ "path": string(), "pools": map(pool) })),
        })),
        "topology": object(json!({ "sockets": map(socket) })),
        "summary": object(json!({ "ok": boolean(), "pools": integer(), "exclusiveFree": string() })),
    })
}

fn reconcile_properties() -> Value {
    let mismatch =
        json!({ "actualCpus": array(integer()), "cpus": string(), "pid": integer(), "pool": string() });
    let reclaimed = json!({ "cpus": string(), "pid": integer(), "pool": string() });
    let mut dated = reclaimed.clone();
    dated["time"] = string();
    dated["seq"] = integer();
    json!({
        "last_updated": string(),
        "report": object(json!({
            "mismatchedCpuMasks": array(object(mismatch)),
            "reclaimedCpuLists": array(object(reclaimed)),
        })),
        "reclaims": array(object(dated)),
        "seq": integer(),
        "summary": object(json!({ "reclaimed": integer(), "mismatched": integer() })),
    })
}

fn object(properties: Value) -> Value {
    json!({ "type": "object", "properties": properties })
}

fn map(values: Value) -> Value {
    json!({ "type": "object", "additionalProperties": values })
}

fn array(items: Value) -> Value {
    json!({ "type": "array", "items": items })
}

fn string() -> Value {
    json!({ "type": "string" })
}

fn boolean() -> Value {
    json!({ "type": "boolean" })
}

fn integer() -> Value {
    json!({ "type": "integer", "format": "int64" })
}

/// What is null is left out: a schema would have to allow it.
fn without_nulls(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let there = fields.iter().filter(|(_, value)| !value.is_null());
            there.map(|(name, value)| (name.clone(), without_nulls(value))).collect::<Map<_, _>>().into()
        }
        Value::Array(items) => items.iter().map(without_nulls).collect(),
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_report_is_summed_up() {
        let list = |tasks: Value| json!({ "cpus": "0", "tasks": tasks });
        let report = json!({
            "checks": { "a": { "ok": true, "errors": [] }, "b": { "ok": false, "errors": ["x"] } },
            "description": { "path": "/etc/kcm", "pools": {
                "dataplane": { "exclusive": true, "cpuLists": { "0": list(json!([])), "1": list(json!([7])) } },
                "infra": { "exclusive": false, "cpuLists": { "2": list(json!([])) } },
            }},
            "topology": { "sockets": {} },
        });
        let summary = json!({ "ok": false, "pools": 2, "exclusiveFree": "1/2" });
        assert_eq!(node(&report)["summary"], summary);
        let target = Target { kind: Kind::Node, namespace: "default".into(), node: "n".into() };
        let mut unreadable = report;
        unreadable["description"] = Value::Null;
        let request = target.apply(&node(&unreadable), "2017-01-12T23:55:08.735918");
        assert_eq!(
            request.path,
            "/apis/kcm.intel.com/v1/namespaces/default/nodereports/n?fieldManager=kcm&force=true"
        );
        let body = request.body.unwrap();
        assert_eq!(body["report"].get("description"), None);
        assert_eq!(body["last_updated"], "2017-01-12T23:55:08.735918");
        assert_eq!(body["summary"]["exclusiveFree"], "0/0");
    }
}
