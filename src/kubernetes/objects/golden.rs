//! Compares every request that kcm sends with a committed file.
//!
//! Owns the examples. A request is compared as `--dry-run` shows it: its method, path and body.
//! `KCM_WRITE_GOLDEN=1 cargo test --bin kcm objects` writes the files, those in `deploy/` too. Does not know how
//! requests are sent.

use std::path::Path;

use k8s_openapi::api::core::v1::Node;
use serde_json::{Value, json};

use super::event::{self, NodeEvent, Reason};
use super::node::{self, Change, Marks, OPAQUE, Slots, extended};
use super::pods::{self, Plan};
use super::reports::{self, NodeReport, PublishedState, ReconcileReport, Target};
use super::{Built, Request};
use crate::host_command::HostCommand;

/// Compares a text with a file of the repository.
pub(super) fn assert_committed(file: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    if std::env::var_os("KCM_WRITE_GOLDEN").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == text, "{file} differs; KCM_WRITE_GOLDEN=1 cargo test --bin kcm objects");
}

/// `requests`: each with what it is for.
fn assert_requests(file: &str, requests: &[(&str, String)]) {
    let all: Vec<String> = requests.iter().map(|(about, shown)| format!("# {about}:\n{shown}")).collect();
    assert_committed(&format!("tests/data/requests/{file}"), &all.join("---\n"));
}

fn shown<T>(request: Built<T>) -> String {
    request.unwrap().shown()
}

fn change(change: Change) -> String {
    change.unwrap().as_ref().map_or_else(|| "# nothing is sent\n".into(), Request::shown)
}

fn node(fields: &Value) -> Node {
    serde_json::from_value(fields.clone()).unwrap()
}

fn slots(slots: &[(&str, usize)]) -> Slots {
    slots.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
}

#[test]
fn requests_about_a_node() {
    let fresh = json!({
        "metadata": { "name": "n1", "resourceVersion": "7" },
        "spec": { "taints": [{ "key": "node.kubernetes.io/not-ready", "effect": "NoSchedule" }] },
        "status": { "capacity": { "cpu": "16" } },
    });
    let mut bare = fresh.clone();
    bare["status"] = json!({});
    bare["spec"] = json!({});
    let (dataplane, fast) = (extended("dataplane"), extended("fast"));
    let ours = json!({
        "metadata": { "name": "n1", "resourceVersion": "8", "labels": { "kcm.intel.com/kcm-node": "true", "zone": "a" } },
        "spec": { "taints": [
            { "key": "gpu", "value": "a", "effect": "NoExecute", "timeAdded": "2026-11-23T20:57:18Z" },
            { "key": "kcm", "value": "true", "effect": "NoSchedule" },
        ]},
        "status": { "capacity": { "cpu": "16", OPAQUE: "4" }, "allocatable": { "cpu": "15", OPAQUE: "4" } },
    });
    let taint = |key: &str, value: &str, effect: &str| {
        let taint = json!({ "key": key, "value": value, "effect": effect });
        Marks { taint: Some(serde_json::from_value(taint).unwrap()) }
    };
    let usual = taint("kcm", "true", "NoSchedule");
    let opaque = slots(&[(OPAQUE, 4)]);
    let pools = slots(&[(&dataplane, 4), (&fast, 2)]);
    let mut of_others = ours.clone();
    of_others["metadata"]["labels"] = json!({ "kcm.intel.com/kcm-node": "false" });
    of_others["spec"]["taints"][1]["value"] = "other".into();
    let [fresh, bare, ours, of_others] = [&fresh, &bare, &ours, &of_others].map(node);
    assert_requests(
        "node.yaml",
        &[
            ("every command reads the node first", shown(node::get("n1"))),
            ("cluster-init lists all nodes", shown(node::list(None))),
            ("cluster-init, the next page", shown(node::list(Some("a/b=")))),
            ("discover, slots of the legacy resource", change(node::capacity(&fresh, &opaque))),
            ("discover, slots of a node without capacity", change(node::capacity(&bare, &opaque))),
            ("discover, one slot less", change(node::capacity(&ours, &slots(&[(OPAQUE, 3)])))),
            ("discover, slots, a second time", change(node::capacity(&ours, &opaque))),
            (
                "discover --resource-name=extended, after the legacy one",
                change(node::capacity(&ours, &pools)),
            ),
            (
                "discover --resource-name=none, after the legacy one",
                change(node::without_legacy_capacity(&ours)),
            ),
            ("discover, label and taint", change(node::label_and_taint(&fresh, Some(&usual)))),
            (
                "discover, label and taint of a node without taints",
                change(node::label_and_taint(&bare, Some(&usual))),
            ),
            (
                "discover, label and taint with other values",
                change(node::label_and_taint(&of_others, Some(&usual))),
            ),
            ("discover, label and taint, a second time", change(node::label_and_taint(&ours, Some(&usual)))),
            (
                "discover --taint, after a run without it",
                change(node::label_and_taint(&ours, Some(&taint("dedicated", "kcm", "NoExecute")))),
            ),
            (
                "discover --no-taint, after a run without it",
                change(node::label_and_taint(&ours, Some(&Marks::default()))),
            ),
            ("a report names its node as owner", shown(node::metadata("n1"))),
            ("uninstall and undiscover, slots", change(node::capacity(&ours, &slots(&[])))),
            ("uninstall and undiscover, label and taint", change(node::label_and_taint(&ours, None))),
            (
                "uninstall and undiscover on a node that has nothing of ours",
                change(node::label_and_taint(&fresh, None)),
            ),
        ],
    );
}

#[test]
fn requests_about_events() {
    let at = |seconds| std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
    let message = "kcm mount does not answer; look at its log";
    let event = |reason, count| {
        let (first, last) = (at(1_484_265_308), at(1_484_267_108));
        shown(event::publish(&NodeEvent { node: "n1", reason, message, count, first, last }))
    };
    assert_requests(
        "events.yaml",
        &[
            ("discover, no daemon answers", event(Reason::Unavailable, 2)),
            ("discover, a daemon answers again", event(Reason::Available, 1)),
        ],
    );
}

#[test]
fn requests_about_reports() {
    let list = |tasks: Value| json!({ "cpus": "4,12", "tasks": tasks });
    let report = json!({
        "checks": {
            "configDirectory": { "ok": true, "errors": [] },
            "mount": { "ok": false, "errors": ["kcm mount is not running; start it"], "live": false, "since": null },
        },
        "description": { "path": "/etc/kcm", "pools": {
            "dataplane": { "name": "dataplane", "exclusive": true, "cpuLists": { "4,12": list(json!([2000])), "5": list(json!([])) } },
            "infra": { "name": "infra", "exclusive": false, "cpuLists": { "0": list(json!([3000, 3001])) } },
        }},
        "topology": { "sockets": { "0": { "id": 0, "cores": [{ "id": 0, "cpus": [{ "id": 0, "isolated": true }] }] } } },
    });
    let unreadable = json!({ "checks": {}, "description": null, "topology": { "sockets": {} } });
    let [report, unreadable] = [report, unreadable].map(|report| NodeReport::new(&report).unwrap());
    let reclaimed = json!({ "cpus": "4,12", "pid": 2000, "pool": "dataplane" });
    let mut reclaim = reclaimed.clone();
    reclaim["time"] = "2017-01-12T23:55:07Z".into();
    reclaim["seq"] = 7.into();
    let reconciled = json!({
        "mismatchedCpuMasks": [{ "actualCpus": [0, 1], "cpus": "0", "pid": 3001, "pool": "infra" }],
        "reclaimedCpuLists": [reclaimed],
    });
    let state = json!({ "reclaims": [reclaim], "seq": 7, "summary": { "reclaimed": 9 } });
    let state: PublishedState = serde_json::from_value(state).unwrap();
    let reconciled = ReconcileReport::new(&reconciled, state).unwrap();
    let time = "2017-01-12T23:55:08.735918";
    let target = Target { namespace: "default".into(), node: "kcm-02-zzwt7w".into() };
    assert_requests(
        "reports.yaml",
        &[
            ("node-report --publish", shown(reports::publish(&target, &report, time, Some("3f0c")))),
            (
                "node-report --publish, of an unreadable directory",
                shown(reports::publish(&target, &unreadable, time, None)),
            ),
            ("reconcile --publish reads what is published", shown(reports::get_state(&target))),
            ("reconcile --publish", shown(reports::publish(&target, &reconciled, time, Some("3f0c")))),
            ("undiscover", shown(reports::delete::<NodeReport>(&target))),
            ("undiscover --dry-run", shown(reports::get::<NodeReport>(&target))),
            ("the kind NodeReport is missing", shown(reports::apply_definition::<NodeReport>())),
            ("the kind ReconcileReport is missing", shown(reports::apply_definition::<ReconcileReport>())),
            ("is the kind established?", shown(reports::get_definition::<ReconcileReport>())),
        ],
    );
}

/// The pods of the default command list are in `cluster-init.yaml`.
#[test]
fn requests_about_pods() {
    let plan = |commands: &[HostCommand]| Plan {
        commands: commands.to_vec(),
        namespace: "kcm-system".into(),
        service_account: Some("kcm-node".into()),
        image: "registry/kcm:1".into(),
        pull_policy: "Always".into(),
        conf_dir: "/run/kcm/conf".into(),
        state_dir: "/var/lib/kcm".into(),
        install_dir: "/opt/bin".into(),
        dataplane: "auto".into(),
        controlplane: "2".into(),
        isolated: false,
        taint: None,
    };
    let create = |commands: &[HostCommand]| {
        let pods = plan(commands).pods("n1");
        pods.iter().map(|pod| shown(pods::create("kcm-system", pod))).collect::<Vec<_>>()
    };
    let mut requests = vec![
        ("cluster-init lists its pods", shown(pods::list("default"))),
        ("cluster-init watches its pods", shown(pods::watch("default", "263029"))),
        (
            "cluster-init reads a pod that somebody else has created",
            shown(pods::get("default", "kcm-mount-pod-n1")),
        ),
        ("why a pod has failed", shown(pods::last_line("default", "kcm-mount-pod-n1", "mount"))),
    ];
    let init = ["only init, which needs a mount", "only init, which is an ordinary container then"];
    requests.extend(init.into_iter().zip(create(&[HostCommand::Init])));
    requests.extend(["only install, which needs no mount"].into_iter().zip(create(&[HostCommand::Install])));
    assert_requests("pods.yaml", &requests);
}
