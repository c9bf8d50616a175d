//! Published reports: the objects on the API server, and publication while the server has problems.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::api_server::rights::Rights;
use super::api_server::{ADMIN, ApiServer, Fault};
use crate::harness::{Mount, Sleeper, run, text, until, write};
use serde_json::{Value, json};

const NODE_REPORT: &str = "/apis/kcm.intel.com/v1/namespaces/default/nodereports/n1";
const RECONCILE_REPORT: &str = "/apis/kcm.intel.com/v1/namespaces/default/reconcilereports/n1";
const DEFINITIONS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";

fn kcm(server: &ApiServer, mount: &Mount, words: &[&str]) -> Command {
    let mut command = mount.kcm(words);
    command.env("KUBECONFIG", server.kubeconfig(ADMIN)).env("NODE_NAME", "n1");
    command
}

/// Publishes both reports once, which defines the kinds.
fn defined(mount: &Mount) -> ApiServer {
    let server = ApiServer::start();
    for command in ["node-report", "reconcile"] {
        let (_, err, code) = run(&mut kcm(&server, mount, &[command, "--publish"]));
        assert_eq!(code, Some(0), "{err}");
    }
    server.forget_log();
    server
}

/// Creates a claim and kills its holder. Returns the PID.
fn killed_claim(mount: &Mount) -> u32 {
    let sleeper = Sleeper::new();
    let pid = sleeper.pid();
    fs::write(mount.tasks("shared", "0"), pid.to_string()).expect("a claim");
    sleeper.end();
    // Reading the tasks removes dead ones.
    assert_eq!(fs::read_to_string(mount.tasks("shared", "0")).unwrap(), "");
    pid
}

#[test]
fn a_node_report_has_the_legacy_form() {
    let (server, mount) = (ApiServer::start(), Mount::with_shared());
    mount.make_pool("dataplane", false, &[]);
    let (out, err, code) = run(&mut kcm(&server, &mount, &["node-report", "--publish"]));
    assert_eq!(code, Some(0), "{err}");
    assert_eq!(err, "INFO:root:Created CustomResourceDefinition nodereports.kcm.intel.com.\n");
    let printed: Value = serde_json::from_str(&out).unwrap();
    let object = server.object(NODE_REPORT).expect("a report");
    assert_eq!((&object["apiVersion"], &object["kind"]), (&json!("kcm.intel.com/v1"), &json!("NodeReport")));
    assert_eq!(object["report"]["description"], printed["description"]);
    assert_eq!(object["report"]["checks"]["configDirectory"], json!({ "ok": true, "errors": [] }));
    assert_eq!(object["topology"], printed["topology"]);
    let time = object["last_updated"].as_str().unwrap();
    assert_eq!(time.len(), "2017-01-12T23:55:08.735918".len(), "{time}");
    let definition = server.object(&format!("{DEFINITIONS}/nodereports.kcm.intel.com")).unwrap();
    assert_eq!(definition["spec"]["names"]["shortNames"], json!(["nr"]));
}

#[test]
fn kubectl_get_shows_the_summary() {
    let mount = Mount::with_shared();
    mount.make_pool("empty", true, &[]);
    let server = defined(&mount);
    let columns = |plural: &str| {
        let definition = server.object(&format!("{DEFINITIONS}/{plural}.kcm.intel.com")).unwrap();
        let columns = definition.pointer("/spec/versions/0/additionalPrinterColumns").unwrap().clone();
        let object =
            server.object(&format!("/apis/kcm.intel.com/v1/namespaces/default/{plural}/n1")).unwrap();
        let cell = |column: &Value| {
            let path = column["jsonPath"].as_str().unwrap().replace('.', "/");
            (column["name"].as_str().unwrap().to_owned(), object.pointer(&path).cloned().unwrap_or_default())
        };
        columns.as_array().unwrap().iter().map(cell).collect::<Vec<_>>()
    };
    let is = |columns: &[(String, Value)], index: usize, name: &str, value: Value| {
        assert_eq!(columns[index], (name.to_owned(), value));
    };
    let node = columns("nodereports");
    assert!(node[0].0 == "OK" && node[0].1.is_boolean());
    is(&node, 1, "Pools", json!(2));
    is(&node, 2, "Free", json!("0/0"));
    assert!(node[3].0 == "Updated" && node[3].1.is_string());
    assert!(node[4].0 == "Age" && node[4].1.is_string());
    let reconcile = columns("reconcilereports");
    is(&reconcile, 0, "Reclaimed", json!(0));
    is(&reconcile, 1, "Mismatched", json!(0));
}

#[test]
fn without_the_right_to_define_the_crd_is_named() {
    let (server, mount) = (ApiServer::start(), Mount::with_shared());
    let reports = json!({ "apiGroups": ["kcm.intel.com"], "resources": ["*"], "verbs": ["*"] });
    server.add_user("reporter", "reporter", Rights::Rules(vec![reports]));
    for command in ["node-report", "reconcile"] {
        let mut command = kcm(&server, &mount, &[command, "--publish"]);
        let (out, err, code) = run(command.env("KUBECONFIG", server.kubeconfig("reporter")));
        assert_eq!(code, Some(1));
        assert_eq!(err.lines().count(), 1, "{err}");
        assert!(
            err.ends_with(
                "the server does not let us create it (403 Forbidden); kubectl apply -f deploy/crds.yaml\n"
            ),
            "{err}"
        );
        assert!(!out.is_empty(), "the report is on stdout nevertheless");
    }
}

#[test]
fn without_the_right_to_report_the_role_is_named() {
    let mount = Mount::with_shared();
    let server = defined(&mount);
    server.add_user("tied", "tied", Rights::None);
    for command in ["node-report", "reconcile"] {
        let mut command = kcm(&server, &mount, &[command, "--publish"]);
        let (out, err, code) = run(command.env("KUBECONFIG", server.kubeconfig("tied")));
        assert_eq!((code, err.lines().count()), (Some(1), 1), "{err}");
        assert!(
            err.contains("403 Forbidden") && err.ends_with("kubectl apply -f deploy/rbac.yaml\n"),
            "{err}"
        );
        assert!(!out.is_empty());
    }
}

#[test]
fn a_definition_of_another_version_is_named() {
    let mount = Mount::with_shared();
    let server = defined(&mount);
    server.change(&format!("{DEFINITIONS}/nodereports.kcm.intel.com"), |definition| {
        let properties =
            definition.pointer_mut("/spec/versions/0/schema/openAPIV3Schema/properties").unwrap();
        properties.as_object_mut().unwrap().remove("summary");
    });
    let (_, err, code) = run(&mut kcm(&server, &mount, &["node-report", "--publish"]));
    assert_eq!((code, err.lines().count()), (Some(1), 1), "{err}");
    assert!(
        err.contains(".summary: field not declared in schema") && err.contains("deploy/crds.yaml"),
        "{err}"
    );
    assert_eq!(server.changes().len(), 1, "this error 500 is permanent");
}

#[test]
fn publication_waits_for_transient_errors() {
    let mount = Mount::with_shared();
    let server = defined(&mount);
    for (command, report) in [("node-report", NODE_REPORT), ("reconcile", RECONCILE_REPORT)] {
        let before = server.object(report).unwrap()["last_updated"].clone();
        for fault in [Fault::Status(500, None), Fault::Cut, Fault::Garbage, Fault::Half] {
            server.misbehave(fault, 1, |_, _| true);
        }
        let patch = |method: &str, _: &str| method == "PATCH";
        server.misbehave(Fault::Conflict, 10, patch);
        server.misbehave(Fault::CutAfterwards, 1, patch);
        server.misbehave(Fault::Status(429, Some(1)), 1, patch);
        server.misbehave(Fault::Slow(Duration::from_millis(200)), 1, patch);
        let started = Instant::now();
        let (_, err, code) = run(&mut kcm(&server, &mount, &[command, "--publish"]));
        assert_eq!((err.as_str(), code), ("", Some(0)), "{command}");
        assert!(started.elapsed() >= Duration::from_secs(1), "Retry-After is heeded");
        assert_ne!(server.object(report).unwrap()["last_updated"], before, "{command}");
        assert_eq!(server.log().iter().filter(|entry| entry.status == 409).count(), 10);
        server.behave();
        server.forget_log();
    }
}

#[test]
fn reports_go_with_their_node() {
    let mount = Mount::with_shared();
    let server = defined(&mount);
    let node = json!({ "kind": "Node", "apiVersion": "v1", "metadata": { "name": "n1" } });
    let publish = |token: &str| {
        for command in ["node-report", "reconcile"] {
            let mut command = kcm(&server, &mount, &[command, "--publish"]);
            let (_, err, code) = run(command.env("KUBECONFIG", server.kubeconfig(token)));
            assert_eq!((err.as_str(), code), ("", Some(0)));
        }
    };
    let owners = |report: &str| server.object(report).unwrap()["metadata"]["ownerReferences"].clone();
    for _ in 0..2 {
        // The second node has the same name and another UID.
        server.put("/api/v1/nodes/n1", node.clone());
        let uid = server.object("/api/v1/nodes/n1").unwrap()["metadata"]["uid"].clone();
        publish(ADMIN);
        let owner = json!([{ "apiVersion": "v1", "kind": "Node", "name": "n1", "uid": uid }]);
        assert_eq!([NODE_REPORT, RECONCILE_REPORT].map(owners), [owner.clone(), owner]);
        server.remove("/api/v1/nodes/n1");
        assert_eq!([NODE_REPORT, RECONCILE_REPORT].map(|report| server.object(report)), [None, None]);
    }

    // Without the right to read the node, or to name an owner, there is a report without one.
    server.put("/api/v1/nodes/n1", node);
    let reports =
        json!({ "apiGroups": ["kcm.intel.com"], "resources": ["*"], "verbs": ["create", "get", "patch"] });
    let nodes = json!({ "apiGroups": [""], "resources": ["nodes"], "verbs": ["get"] });
    server.add_user("reporter", "reporter", Rights::Rules(vec![reports.clone()]));
    server.add_user("reader", "reader", Rights::Rules(vec![reports, nodes]));
    publish("reporter");
    assert_eq!([NODE_REPORT, RECONCILE_REPORT].map(owners), [Value::Null, Value::Null]);
    server.remove(NODE_REPORT);
    server.remove(RECONCILE_REPORT);
    server.guard_owners();
    publish("reader");
    assert_eq!([NODE_REPORT, RECONCILE_REPORT].map(owners), [Value::Null, Value::Null]);
}

#[test]
fn failed_checks_become_events_of_the_node() {
    let mount = Mount::with_dataplane();
    let server = defined(&mount);
    let event = || server.object("/api/v1/namespaces/default/events/n1.kcmstrays");
    let sleeper = Sleeper::new();
    fs::write(mount.tasks("dataplane", "0"), sleeper.pid().to_string()).expect("a claim");
    let mut command = kcm(&server, &mount, &["node-report", "--publish", "--interval=0.05"]);
    let _reports = Sleeper::spawn(command.stdout(Stdio::null()));
    let written = || server.changes().iter().filter(|entry| entry.path.contains("nodereports/n1")).count();
    until("it has reported", || written() >= 1);
    assert_eq!(event(), None, "nothing is wrong");

    crate::harness::pin(sleeper.pid(), &[1]);
    until("the stray is an Event", || event().is_some());
    let found = event().unwrap();
    for (field, value) in [("type", "Warning"), ("reason", "KcmStrays")] {
        assert_eq!(found[field], value);
    }
    assert!(found["message"].as_str().unwrap().contains("kcm reconcile --repair"), "{found}");
    assert_eq!((&found["count"], &found["involvedObject"]["name"]), (&json!(1), &json!("n1")));
    let before = written();
    until("it has reported again", || written() > before);
    assert_eq!(event().unwrap()["count"], 1, "an Event is not sent at each run");
    crate::harness::pin(sleeper.pid(), &[0]);
    let is_ok = || server.object(NODE_REPORT).unwrap()["report"]["checks"]["masks"]["ok"] == true;
    until("the stray is back", is_ok);
    crate::harness::pin(sleeper.pid(), &[1]);
    until("it is gone again", || event().unwrap()["count"] == 2);
}

#[test]
fn a_report_without_pools_says_what_to_do() {
    let mount = Mount::new();
    let (out, err, code) = run(&mut mount.kcm(&["node-report"]));
    assert_eq!((err.as_str(), code), ("", Some(0)));
    let report: Value = serde_json::from_str(&out).unwrap();
    let check = &report["checks"]["configDirectory"];
    assert_eq!(check["ok"], false);
    assert!(check["errors"][0].as_str().unwrap().starts_with("there are no pools; make them"), "{check}");
    // A probe that asks kcm status does not wait for pools.
    let (out, _, code) = run(&mut mount.kcm(&["status", "--timeout=60"]));
    assert_eq!(code, Some(0), "{out}");
}

#[test]
fn concurrent_definitions_do_not_interfere() {
    let (server, mount) = (ApiServer::start(), Mount::with_shared());
    let start = || {
        kcm(&server, &mount, &["node-report", "--publish"])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let children: Vec<_> = (0..4).map(|_| start()).collect();
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
    }
    assert!(server.object(NODE_REPORT).is_some());
}

#[test]
fn a_report_is_written_on_change_or_every_tenth_run() {
    let mount = Mount::with_shared();
    let server = defined(&mount);
    let log = mount.home().join("log");
    let runs = || fs::read_to_string(&log).unwrap().matches("The next run is in").count();
    let mut command = kcm(&server, &mount, &["reconcile", "--publish", "--interval=0.05"]);
    command.env("KCM_LOG_LEVEL", "DEBUG").stdout(Stdio::null());
    let sleeper = Sleeper::spawn(command.stderr(fs::File::create(&log).unwrap()));
    until("it has run 25 times", || runs() >= 25);
    sleeper.end();
    let (run, written) = (runs(), server.changes().len());
    // The last run may have been ended in the middle.
    let expected = run.div_ceil(10)..=(run + 1).div_ceil(10);
    assert!(expected.contains(&written), "{written} of {run}");

    server.forget_log();
    let _loop = Sleeper::spawn(
        kcm(&server, &mount, &["reconcile", "--publish", "--interval=0.05"]).stdout(Stdio::null()),
    );
    until("the first is there", || server.changes().len() == 1);
    let pid = killed_claim(&mount);
    until("the change is there", || {
        server.object(RECONCILE_REPORT).unwrap()["reclaims"]
            .as_array()
            .unwrap()
            .iter()
            .any(|r| r["pid"] == pid)
    });
}

#[test]
fn no_reclaim_is_lost_or_published_twice() {
    let mount = Mount::with_shared();
    let server = defined(&mount);
    let published = || -> Vec<u64> {
        let object = server.object(RECONCILE_REPORT).unwrap();
        object["reclaims"].as_array().unwrap().iter().map(|one| one["pid"].as_u64().unwrap()).collect()
    };
    let publish = || run(&mut kcm(&server, &mount, &["reconcile", "--publish"]));
    let mut expected = Vec::new();
    let mut kill = || expected.push(u64::from(killed_claim(&mount)));

    // Another run reads the reclaim first.
    kill();
    assert!(mount.sh("$KCM reconcile --conf-dir=$C").contains("\"pid\""));
    kill();
    assert_eq!(publish().2, Some(0));
    // A publication fails after its reclaim was acknowledged.
    kill();
    server.misbehave(Fault::Status(403, None), 1, |method, _| method == "PATCH");
    let (out, err, code) = publish();
    assert_eq!(code, Some(1), "{err}");
    assert!(out.contains("\"pid\""));
    assert_eq!(publish().2, Some(0));
    // The daemon starts again.
    kill();
    mount.stop();
    mount.start();
    assert_eq!(publish().2, Some(0));
    assert_eq!(published(), expected);
    let object = server.object(RECONCILE_REPORT).unwrap();
    assert_eq!(object["summary"]["reclaimed"], 4);
    let first = &object["reclaims"][0];
    assert!(first["time"].as_str().unwrap().ends_with('Z') && first["seq"].is_u64(), "{first}");
    assert_eq!((&first["pool"], &first["cpus"]), (&json!("shared"), &json!("0")));

    for _ in 0..50 {
        expected.push(u64::from(killed_claim(&mount)));
    }
    assert_eq!(publish().2, Some(0));
    assert_eq!(published(), expected[4..], "the last 50");
    assert_eq!(server.object(RECONCILE_REPORT).unwrap()["summary"]["reclaimed"], 54);
}

#[test]
fn a_plain_directory_publishes_reclaims() {
    let mount = Mount::with_shared();
    let server = defined(&mount);
    let plain = mount.home().join("plain");
    mount.sh("mkdir -p $S/../plain/pools/p/0 && cd $S/../plain/pools/p && echo 0 > exclusive && echo 4194305 > 0/tasks");
    let mut command = Command::new(crate::harness::KCM);
    command.args(["reconcile", "--publish", "--node=n1", "--conf-dir"]).arg(&plain);
    command.env("KUBECONFIG", server.kubeconfig(ADMIN)).env_remove("NODE_NAME");
    assert_eq!(run(&mut command).2, Some(0));
    let object = server.object(RECONCILE_REPORT).unwrap();
    assert_eq!(object["report"]["reclaimedCpuLists"], json!([{ "cpus": "0", "pid": 4194305, "pool": "p" }]));
    assert_eq!(object["reclaims"][0]["pid"], 4194305);
}

#[test]
fn periodic_reports_survive_a_server_outage() {
    let mount = Mount::with_shared();
    let server = defined(&mount);
    server.misbehave(Fault::Cut, usize::MAX, |_, _| true);
    let out = mount.home().join("out");
    let mut command = kcm(&server, &mount, &["node-report", "--publish", "--interval=0.1"]);
    let mut running = Sleeper::spawn(command.stdout(fs::File::create(&out).unwrap()));
    until("it has tried again at a later beat", || server.log().len() > 8);
    let printed = || fs::read_to_string(&out).unwrap().matches("\"topology\"").count();
    let before = printed();
    let task = Sleeper::new();
    write(&mount.tasks("shared", "0"), task.pid().to_string()).unwrap();
    until("it reports on", || printed() > before);
    assert!(running.child().try_wait().unwrap().is_none(), "it lives");
    server.behave();
    server.forget_log();
    until("it publishes again", || server.changes().iter().any(|entry| entry.status == 200));
}
