//! The custom resources NodeReport and ReconcileReport: their fields and the requests.
//!
//! Owns what is published of a report. Does not know when it is published, or how the checks are made.
//!
//! The schemas are derived from the types, so a field cannot be sent that the schema does not have: the server would
//! refuse it. `kube::CustomResource` cannot derive these kinds, because it puts all fields under `spec`, and the
//! reports keep the form of the legacy ones: `report`, `topology` and `last_updated` at the top.
//!
//! Longer than 400 lines because the two resources share their types and their schema.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceColumnDefinition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::Resource as _;
use kube::core::params::{DeleteParams, GetParams, Patch};
use kube::core::request::Error as BuildError;
use kube::core::{ApiResource, DynamicObject};
use schemars::JsonSchema;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Built, GROUP, Request, apply};

mod definition;

#[cfg(test)]
pub(crate) use definition::definition;
pub(crate) use definition::{apply_definition, get_definition, is_established};

/// The version of both kinds.
const VERSION: &str = "v1";

/// The fields of a kind of report. Each node has one object of each kind.
pub(crate) trait Report: Clone + JsonSchema + PartialEq + Serialize {
    const KIND: &'static str;
    const PLURAL: &'static str;
    const SHORT: &'static str;

    /// Returns the columns of `kubectl get`, except for the times.
    fn columns() -> Vec<CustomResourceColumnDefinition>;

    /// Returns the checks whose errors are other ones than before; without an earlier report, those that have errors.
    fn changes(&self, _before: Option<&Self>) -> Vec<CheckChange> {
        Vec::new()
    }
}

/// A check whose errors have changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CheckChange {
    pub(crate) check: String,
    /// The errors now; empty if it is ok again.
    pub(crate) errors: Vec<String>,
}

/// The name of a report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) namespace: String,
    pub(crate) node: String,
}

/// The fields of a NodeReport.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
pub(crate) struct NodeReport {
    report: NodeChecks,
    topology: Topology,
    summary: NodeSummary,
}

#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
struct NodeChecks {
    checks: BTreeMap<String, Check>,
    #[serde(skip_serializing_if = "Option::is_none")]
    description: Option<Description>,
}

#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
struct Check {
    ok: bool,
    errors: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    live: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    since: Option<String>,
}

#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
struct Description {
    path: String,
    pools: BTreeMap<String, Pool>,
}

#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Pool {
    name: String,
    exclusive: bool,
    cpu_lists: BTreeMap<String, CpuList>,
}

#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
struct CpuList {
    cpus: String,
    tasks: Vec<i64>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pods: Vec<InPod>,
}

/// A task that is in a pod.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
struct InPod {
    pid: i64,
    pod: String,
    container: String,
}

#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
struct Topology {
    sockets: BTreeMap<String, Socket>,
}

#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
struct Socket {
    id: i64,
    cores: Vec<Core>,
}

#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
struct Core {
    id: i64,
    cpus: Vec<Cpu>,
}

#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
struct Cpu {
    id: i64,
    isolated: bool,
}

/// The columns of `kubectl get`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct NodeSummary {
    ok: bool,
    pools: i64,
    /// CPU lists of exclusive pools: free/total.
    exclusive_free: String,
}

impl NodeReport {
    /// Takes the fields from a report as `kcm node-report` prints it.
    ///
    /// # Errors
    /// The report has another form.
    pub(crate) fn new(printed: &Value) -> Result<Self, serde_json::Error> {
        #[derive(Deserialize)]
        struct Printed {
            #[serde(flatten)]
            report: NodeChecks,
            topology: Topology,
        }
        let Printed { report, topology } = Printed::deserialize(printed)?;
        let pools = report.description.iter().flat_map(|description| description.pools.values());
        let exclusive = pools.clone().filter(|pool| pool.exclusive);
        let lists = exclusive.flat_map(|pool| pool.cpu_lists.values());
        let free = lists.clone().filter(|list| list.tasks.is_empty()).count();
        let summary = NodeSummary {
            ok: report.checks.values().all(|check| check.ok),
            pools: to_i64(pools.count()),
            exclusive_free: format!("{free}/{}", lists.count()),
        };
        Ok(Self { report, topology, summary })
    }
}

impl Report for NodeReport {
    fn changes(&self, before: Option<&Self>) -> Vec<CheckChange> {
        let had = |name: &str| before.and_then(|before| before.report.checks.get(name));
        let checks = self.report.checks.iter().filter(|(name, check)| {
            had(name).map_or(&[][..], |check| &check.errors) != check.errors.as_slice()
        });
        checks
            .map(|(name, check)| CheckChange { check: name.clone(), errors: check.errors.clone() })
            .collect()
    }

    const KIND: &'static str = "NodeReport";
    const PLURAL: &'static str = "nodereports";
    const SHORT: &'static str = "nr";

    fn columns() -> Vec<CustomResourceColumnDefinition> {
        vec![
            column("OK", "boolean", ".summary.ok", "Whether all checks have passed"),
            column("Pools", "integer", ".summary.pools", "The number of pools"),
            column("Free", "string", ".summary.exclusiveFree", "CPU lists of exclusive pools: free/total"),
        ]
    }
}

/// The fields of a ReconcileReport.
#[derive(Clone, Debug, JsonSchema, PartialEq, Serialize)]
pub(crate) struct ReconcileReport {
    report: Reconciled,
    #[serde(flatten)]
    state: PublishedState,
}

/// The part of a ReconcileReport that outlives a run of `kcm reconcile`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(default)]
pub(crate) struct PublishedState {
    /// The newest reclaims.
    pub(crate) reclaims: Vec<Reclaim>,
    /// The number of the last event that was published: every reclaim up to it has been.
    pub(crate) seq: i64,
    pub(crate) summary: ReconcileSummary,
}

#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(default)]
pub(crate) struct ReconcileSummary {
    /// All reclaims since the first report.
    pub(crate) reclaimed: i64,
    /// Threads outside their CPU list in the last run.
    mismatched: i64,
}

#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Reconciled {
    mismatched_cpu_masks: Vec<Mismatch>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    not_isolated: Vec<NotIsolated>,
    reclaimed_cpu_lists: Vec<Reclaimed>,
}

/// A claimed list of an isolated pool on which others may run, as it is printed, too.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
pub(crate) struct NotIsolated {
    pub(crate) cpus: String,
    pub(crate) pool: String,
    pub(crate) reason: String,
}

#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Mismatch {
    actual_cpus: Vec<i64>,
    cpus: String,
    pid: i64,
    pool: String,
}

#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
struct Reclaimed {
    cpus: String,
    pid: i64,
    pool: String,
}

/// A reclaim, as the lines of `info/events` and `info/reclaimed` have it.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
pub(crate) struct Reclaim {
    /// The number of the event; `None` in a plain directory, which has no events.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) seq: Option<i64>,
    /// RFC 3339.
    pub(crate) time: String,
    pub(crate) cpus: String,
    pub(crate) pid: i64,
    pub(crate) pool: String,
}

impl ReconcileReport {
    /// Takes the fields from a report as `kcm reconcile` prints it.
    ///
    /// # Errors
    /// The report has another form.
    pub(crate) fn new(printed: &Value, mut state: PublishedState) -> Result<Self, serde_json::Error> {
        let report = Reconciled::deserialize(printed)?;
        state.summary.mismatched = to_i64(report.mismatched_cpu_masks.len());
        Ok(Self { report, state })
    }
}

impl Report for ReconcileReport {
    const KIND: &'static str = "ReconcileReport";
    const PLURAL: &'static str = "reconcilereports";
    const SHORT: &'static str = "rr";

    fn columns() -> Vec<CustomResourceColumnDefinition> {
        vec![
            column("Reclaimed", "integer", ".summary.reclaimed", "Claims reclaimed since the first report"),
            column("Mismatched", "integer", ".summary.mismatched", "Threads outside their CPU list"),
        ]
    }
}

fn column(name: &str, type_: &str, path: &str, description: &str) -> CustomResourceColumnDefinition {
    CustomResourceColumnDefinition {
        name: name.into(),
        type_: type_.into(),
        json_path: path.into(),
        description: Some(description.into()),
        ..Default::default()
    }
}

fn to_i64(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// The fields of an object: the report, and the time when it was made.
#[derive(JsonSchema, Serialize)]
struct Dated<R> {
    /// UTC, to the microsecond, without a time zone, as the legacy reports have it.
    last_updated: String,
    #[serde(flatten)]
    report: R,
}

fn resource<R: Report>() -> ApiResource {
    ApiResource {
        group: GROUP.into(),
        version: VERSION.into(),
        api_version: format!("{GROUP}/{VERSION}"),
        kind: R::KIND.into(),
        plural: R::PLURAL.into(),
    }
}

fn objects<R: Report>(target: &Target) -> kube::core::Request {
    kube::core::Request::new(DynamicObject::url_path(&resource::<R>(), Some(&target.namespace)))
}

fn subject<R: Report>(target: &Target) -> String {
    format!("{} {}/{}", R::KIND, target.namespace, target.node)
}

/// Reads the published ReconcileReport of a node.
pub(crate) fn get_state(target: &Target) -> Built<PublishedState> {
    let http = objects::<ReconcileReport>(target).get(&target.node, &GetParams::default())?;
    Ok(Request::new(http, subject::<ReconcileReport>(target)))
}

/// Reads a report, to know whether there is one.
pub(crate) fn get<R: Report>(target: &Target) -> Built<IgnoredAny> {
    let http = objects::<R>(target).get(&target.node, &GetParams::default())?;
    Ok(Request::new(http, subject::<R>(target)))
}

/// Deletes a report.
pub(crate) fn delete<R: Report>(target: &Target) -> Built<IgnoredAny> {
    let http = objects::<R>(target).delete(&target.node, &DeleteParams::default())?;
    Ok(Request::new(http, subject::<R>(target)))
}

/// Publishes a report. `time`: see [`Dated::last_updated`]. `node_uid`: the UID of the node, if it is known; then Kubernetes
/// deletes the report with the node.
pub(crate) fn publish<R: Report>(
    target: &Target,
    report: &R,
    time: &str,
    node_uid: Option<&str>,
) -> Built<IgnoredAny> {
    let fields = Dated { last_updated: time.to_owned(), report };
    let fields = serde_json::to_value(fields).map_err(BuildError::SerializeBody)?;
    let mut object =
        DynamicObject::new(&target.node, &resource::<R>()).within(&target.namespace).data(fields);
    object.metadata.owner_references = node_uid.map(|uid| {
        let (api_version, kind) = (Node::api_version(&()).into(), Node::kind(&()).into());
        vec![OwnerReference {
            api_version,
            kind,
            name: target.node.clone(),
            uid: uid.into(),
            ..Default::default()
        }]
    });
    let http = objects::<R>(target).patch(&target.node, &apply(), &Patch::Apply(&object))?;
    Ok(Request::new(http, subject::<R>(target)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn printed() -> Value {
        let list = |tasks: Value| json!({ "cpus": "0", "tasks": tasks });
        json!({
            "checks": { "a": { "ok": true, "errors": [] }, "b": { "ok": false, "errors": ["x"] } },
            "description": { "path": "/etc/kcm", "pools": {
                "dataplane": {
                    "name": "dataplane", "exclusive": true,
                    "cpuLists": { "0": list(json!([])), "1": list(json!([7])) },
                },
                "infra": { "name": "infra", "exclusive": false, "cpuLists": { "2": list(json!([])) } },
            }},
            "topology": { "sockets": {} },
        })
    }

    #[test]
    fn a_node_report_has_a_summary() {
        let report = NodeReport::new(&printed()).unwrap();
        let summary = json!({ "ok": false, "pools": 2, "exclusiveFree": "1/2" });
        assert_eq!(serde_json::to_value(&report).unwrap()["summary"], summary);
    }

    #[test]
    fn a_check_changes_with_its_errors() {
        let first = NodeReport::new(&printed()).unwrap();
        let change = |check: &str, errors: &[&str]| {
            let errors = errors.iter().map(|&error| error.to_owned()).collect();
            CheckChange { check: check.into(), errors }
        };
        assert_eq!(first.changes(None), [change("b", &["x"])]);
        assert_eq!(first.changes(Some(&first)), []);
        let mut other = printed();
        other["checks"] = json!({ "a": { "ok": false, "errors": ["y"] }, "b": { "ok": true, "errors": [] } });
        let now = NodeReport::new(&other).unwrap();
        assert_eq!(now.changes(Some(&first)), [change("a", &["y"]), change("b", &[])]);
    }

    #[test]
    fn a_report_of_an_unreadable_directory_has_no_description() {
        let target = Target { namespace: "default".into(), node: "n".into() };
        let mut unreadable = printed();
        unreadable["description"] = Value::Null;
        let report = NodeReport::new(&unreadable).unwrap();
        let request = publish(&target, &report, "2017-01-12T23:55:08.735918", None).unwrap();
        assert_eq!(
            request.path(),
            "/apis/kcm.intel.com/v1/namespaces/default/nodereports/n?force=true&fieldManager=kcm"
        );
        let body = request.body();
        assert_eq!(body["report"].get("description"), None);
        assert_eq!(body["last_updated"], "2017-01-12T23:55:08.735918");
        assert_eq!(body["summary"]["exclusiveFree"], "0/0");
    }

    #[test]
    fn the_published_state_is_read_as_it_was_sent() {
        let reclaim = |seq| Reclaim {
            seq,
            time: "2017-01-12T23:55:07Z".into(),
            cpus: "4,12".into(),
            pid: 2000,
            pool: "dataplane".into(),
        };
        let mismatch = json!({ "actualCpus": [0], "cpus": "4", "pid": 7, "pool": "infra" });
        let printed = json!({ "mismatchedCpuMasks": [mismatch], "reclaimedCpuLists": [] });
        let mut state =
            PublishedState { reclaims: vec![reclaim(Some(7)), reclaim(None)], seq: 7, ..Default::default() };
        state.summary.reclaimed = 9;
        let report = ReconcileReport::new(&printed, state.clone()).unwrap();
        let target = Target { namespace: "default".into(), node: "n".into() };
        let body = publish(&target, &report, "t", None).unwrap().body();
        assert_eq!(body["summary"], json!({ "reclaimed": 9, "mismatched": 1 }));
        state.summary.mismatched = 1;
        assert_eq!(serde_json::from_value::<PublishedState>(body).unwrap(), state);
        assert_eq!(serde_json::from_value::<PublishedState>(json!({})).unwrap(), PublishedState::default());
    }
}
