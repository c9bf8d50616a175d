//! Every request that kcm sends, beside the committed one.
//!
//! What is compared is what `--dry-run` shows: where a request goes, and its body as YAML. `KCM_WRITE_GOLDEN=1 cargo
//! test --bin kcm objects` writes the files anew, those in `deploy/` too.

use std::path::Path;

use serde_json::{Value, json};

use super::Request;
use super::node::{self, OPAQUE, Slots, extended};
use super::pods::{self, Command, Plan};
use super::reports::{self, Kind, Target};

/// Compares a text with a file of the repository.
pub(super) fn is_as_committed(file: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    if std::env::var_os("KCM_WRITE_GOLDEN").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
    }
    let there = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(there == text, "{file} is another one; KCM_WRITE_GOLDEN=1 cargo test --bin kcm objects");
}

fn are_as_committed(file: &str, requests: &[(&str, Option<Request>)]) {
    let shown = |(about, request): &(&str, Option<Request>)| {
        let request = request.as_ref().map_or_else(|| "# nothing is sent\n".into(), Request::shown);
        format!("# {about}:\n{request}")
    };
    let all: Vec<String> = requests.iter().map(shown).collect();
    is_as_committed(&format!("tests/data/requests/{file}"), &all.join("---\n"));
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
        "status": { "capacity": { "cpu": "16", OPAQUE: "4" } },
    });
    let opaque = slots(&[(OPAQUE, 4)]);
    let pools = slots(&[(&dataplane, 4), (&fast, 2)]);
    let mut of_others = ours.clone();
    of_others["metadata"]["labels"] = json!({ "kcm.intel.com/kcm-node": "false" });
    of_others["spec"]["taints"][1]["value"] = "other".into();
    are_as_committed(
        "node.yaml",
        &[
            ("any command looks at a node", Some(node::get("n1"))),
            ("cluster-init lists them", Some(node::list(None))),
            ("the next page", Some(node::list(Some("a/b=")))),
            ("discover, slots of 2017", node::capacity(&fresh, &opaque)),
            ("on a node without capacity", node::capacity(&bare, &opaque)),
            ("one slot less", node::capacity(&ours, &slots(&[(OPAQUE, 3)]))),
            ("a second time", node::capacity(&ours, &opaque)),
            ("discover --resource-name=extended, after that of 2017", node::capacity(&ours, &pools)),
            ("label and taint", node::marks(&fresh, true)),
            ("on a node without taints", node::marks(&bare, true)),
            ("whose values are wrong", node::marks(&of_others, true)),
            ("a second time", node::marks(&ours, true)),
            ("uninstall, slots", node::capacity(&ours, &slots(&[]))),
            ("label and taint", node::marks(&ours, false)),
            ("where there is nothing of ours", node::marks(&fresh, false)),
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
    let reclaimed = json!({ "cpus": "4,12", "pid": 2000, "pool": "dataplane" });
    let mut dated = reclaimed.clone();
    dated["time"] = "2017-01-12T23:55:07Z".into();
    dated["seq"] = 7.into();
    let reconciled = json!({
        "mismatchedCpuMasks": [{ "actualCpus": [0, 1], "cpus": "0", "pid": 3001, "pool": "infra" }],
        "reclaimedCpuLists": [reclaimed],
    });
    let time = "2017-01-12T23:55:08.735918";
    let target = |kind| Target { kind, namespace: "default".into(), node: "kcm-02-zzwt7w".into() };
    let (of_node, of_reconcile) = (target(Kind::Node), target(Kind::Reconcile));
    are_as_committed(
        "reports.yaml",
        &[
            ("node-report --publish", Some(of_node.apply(&reports::node(&report), time))),
            ("of an unreadable directory", Some(of_node.apply(&reports::node(&unreadable), time))),
            ("reconcile --publish, what was told last", Some(of_reconcile.get())),
            (
                "and what is told now",
                Some(of_reconcile.apply(&reports::reconcile(&reconciled, &[dated], 9, 7), time)),
            ),
            ("the kind NodeReport is missing", Some(reports::apply_definition(Kind::Node))),
            ("the kind ReconcileReport is missing", Some(reports::apply_definition(Kind::Reconcile))),
            ("is it there yet?", Some(reports::get_definition(Kind::Reconcile))),
        ],
    );
}

/// Those of the default list are in `cluster-init.yaml`.
#[test]
fn requests_about_pods() {
    let plan = |commands: &[Command]| Plan {
        commands: commands.to_vec(),
        namespace: "kcm-system".into(),
        service_account: Some("kcm-node".into()),
        image: "registry/kcm:1".into(),
        pull_policy: "Always".into(),
        conf_dir: "/run/kcm/conf".into(),
        state_dir: "/var/lib/kcm".into(),
        install_dir: "/opt/bin".into(),
        dataplane: 7,
        controlplane: 2,
    };
    let make = |commands: &[Command]| {
        let pods = plan(commands).pods("n1");
        pods.iter().map(|pod| Some(pods::create("kcm-system", pod))).collect::<Vec<_>>()
    };
    let mut requests = vec![
        ("the pods that are there", Some(pods::list("default"))),
        ("what becomes of them", Some(pods::watch("default", "263029"))),
        ("one that somebody else has made", Some(pods::get("default", "kcm-mount-pod-n1"))),
        ("why one has failed", Some(pods::last_line("default", "kcm-mount-pod-n1", "mount"))),
    ];
    requests.extend(
        ["init alone has a mount", "and is an ordinary container"].into_iter().zip(make(&[Command::Init])),
    );
    requests.extend(["install alone needs no mount"].into_iter().zip(make(&[Command::Install])));
    are_as_committed("pods.yaml", &requests);
}
