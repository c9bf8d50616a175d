//! A node whose daemon does not serve has no slots and a report that says so, and it is well again afterwards: `kcm discover` and
//! `kcm node-report` with `--interval`.

use std::process::{Command, Stdio};

use super::api_server::{ADMIN, ApiServer, Fault};
use crate::harness::{Mount, Sleeper, run, signal, text, until};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const NODE: &str = "/api/v1/nodes/n1";
const EVENTS: &str = "/api/v1/namespaces/default/events";
const REPORT: &str = "/apis/kcm.intel.com/v1/namespaces/default/nodereports/n1";
const SLOTS: &str = "kcm.intel.com/dataplane";

fn cluster() -> ApiServer {
    let server = ApiServer::start();
    let node = json!({
        "kind": "Node", "apiVersion": "v1", "metadata": { "name": "n1" }, "status": { "capacity": { "cpu": "2" } },
    });
    server.put(NODE, node);
    server
}

fn discover(server: &ApiServer, mount: &Mount, interval: &str) -> Command {
    let mut command = mount.kcm(&["discover", "--resource-name=extended", interval]);
    command.env("KUBECONFIG", server.kubeconfig(ADMIN)).env("NODE_NAME", "n1");
    command
}

fn slots(server: &ApiServer, part: &str) -> Value {
    server.object(NODE).unwrap()["status"][part][SLOTS].clone()
}

fn event(server: &ApiServer, reason: &str) -> Option<Value> {
    server.object(&format!("{EVENTS}/n1.{}", reason.to_lowercase()))
}

/// Starts discover, ends the service with `end` and lets it come back with `back`.
fn withdrawn_meanwhile<T>(end: impl Fn(&Mount) -> T, back: impl Fn(&Mount, T)) {
    let (server, mount) = (cluster(), Mount::with_dataplane());
    let mut running = Sleeper::spawn(discover(&server, &mount, "--interval=0.05").stderr(Stdio::piped()));
    for round in 1..=2 {
        until("it is advertised", || slots(&server, "capacity") == "2");
        server.kubelet_copies(NODE);
        assert_eq!(slots(&server, "allocatable"), "2");
        let ended = end(&mount);
        until("it is withdrawn", || slots(&server, "capacity").is_null());
        // Set to 0, a kubelet that restarts would refuse the pods that run.
        assert_eq!(slots(&server, "allocatable"), Value::Null, "the scheduler counts no slot");
        let node = server.object(NODE).unwrap();
        assert_eq!(node["metadata"]["labels"]["kcm.intel.com/kcm-node"], "true", "label and taint stay");
        assert_eq!(node["spec"]["taints"][0]["key"], "kcm");
        assert_eq!(node["status"]["capacity"], json!({ "cpu": "2" }));
        until("there is an Event", || {
            event(&server, "KcmUnavailable").is_some_and(|event| event["count"] == round)
        });
        assert_eq!(event(&server, "KcmUnavailable").unwrap()["type"], "Warning");
        back(&mount, ended);
        until("it is advertised again", || slots(&server, "capacity") == "2");
        until("there is an Event", || {
            event(&server, "KcmAvailable").is_some_and(|event| event["count"] == round)
        });
        let event = event(&server, "KcmAvailable").unwrap();
        assert_eq!(event["type"], "Normal");
        assert_eq!(event["message"], "the node advertises 2 kcm.intel.com/dataplane again");
    }
    signal(running.pid(), Signal::SIGTERM);
    let output =
        std::mem::replace(running.child(), Command::new("true").spawn().unwrap()).wait_with_output().unwrap();
    let err = text(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{err}");
    assert_eq!(
        err.matches("; the slots of node n1 are withdrawn until then").count(),
        2,
        "once each time: {err}"
    );
    assert_eq!(slots(&server, "capacity"), "2", "SIGTERM withdraws nothing: the next pod continues");
}

#[test]
fn slots_are_withdrawn_while_the_daemon_is_away() {
    withdrawn_meanwhile(Mount::stop, |mount, ()| mount.start());
}

#[test]
fn slots_are_withdrawn_while_the_mount_is_dead() {
    withdrawn_meanwhile(Mount::kill_daemon, |mount, ()| mount.start());
}

#[test]
fn slots_are_withdrawn_while_the_daemon_does_not_answer() {
    withdrawn_meanwhile(|mount| mount.pause(), |_, paused| drop(paused));
}

#[test]
fn the_report_says_that_the_daemon_is_away() {
    let (server, mount) = (cluster(), Mount::with_dataplane());
    let mut command = mount.kcm(&["node-report", "--publish", "--interval=0.05"]);
    command.env("KUBECONFIG", server.kubeconfig(ADMIN)).env("NODE_NAME", "n1");
    let _running = Sleeper::spawn(command.stdout(Stdio::null()).stderr(Stdio::null()));
    let report = || server.object(REPORT).unwrap_or_default();
    let is_served = || report()["report"]["checks"]["mount"]["ok"] == true;
    let is_away = || report()["report"]["checks"]["mount"]["ok"] == false;
    until("all is well", is_served);
    for end in [Mount::stop, Mount::kill_daemon] {
        end(&mount);
        until("the report says it", is_away);
        assert_eq!(report()["summary"]["ok"], false, "{}", report());
        mount.start();
        until("it is well again", is_served);
    }
    let paused = mount.pause();
    until("the report says it", is_away);
    drop(paused);
    until("it is well again", is_served);
}

#[test]
fn slots_are_withdrawn_while_there_are_no_lists() {
    let (server, mount) = (cluster(), Mount::with_dataplane());
    let _discover = Sleeper::spawn(discover(&server, &mount, "--interval=0.05").stderr(Stdio::null()));
    until("it is advertised", || slots(&server, "capacity") == "2");
    let lists = ["0", "1"].map(|list| mount.pool("dataplane").join(list));
    for list in &lists {
        std::fs::write(list.join("state"), "drain").unwrap();
    }
    until("it is withdrawn", || slots(&server, "capacity").is_null());
    assert_eq!(event(&server, "KcmNoSlots"), None, "an administrator drains lists on purpose");
    for list in &lists {
        std::fs::write(list.join("state"), "undrain").unwrap();
    }
    until("it is advertised again", || slots(&server, "capacity") == "2");
    for list in &lists {
        std::fs::remove_dir(list).unwrap();
    }
    until("it is withdrawn", || slots(&server, "capacity").is_null());
    until("there is an Event", || event(&server, "KcmNoSlots").is_some());
    let found = event(&server, "KcmNoSlots").unwrap();
    assert!(found["message"].as_str().unwrap().starts_with("No CPU list in dataplane pool"), "{found}");
}

#[test]
fn a_pod_that_ends_does_not_withdraw() {
    let (server, mount) = (cluster(), Mount::with_dataplane());
    let mut command = discover(&server, &mount, "--interval=60");
    let mut running = Sleeper::spawn(command.stderr(Stdio::null()));
    until("it is advertised", || slots(&server, "capacity") == "2");
    mount.stop();
    signal(running.pid(), Signal::SIGTERM);
    assert_eq!(running.child().wait().unwrap().code(), Some(0));
    assert_eq!(slots(&server, "capacity"), "2");
    // A run that sees the daemon leave waits a moment, and ends on SIGTERM.
    server.forget_log();
    let mut command = discover(&server, &mount, "--interval=60");
    command.env("KCM_LOG_LEVEL", "DEBUG").stderr(Stdio::piped());
    let mut running = Sleeper::spawn(&mut command);
    let err = running.child().stderr.take().unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(err)).map_while(Result::ok);
    assert!(lines.any(|line| line.contains("kcm mount is not running")));
    signal(running.pid(), Signal::SIGTERM);
    assert_eq!(running.child().wait().unwrap().code(), Some(0));
    assert_eq!((server.log().len(), slots(&server, "capacity")), (0, json!("2")));
}

#[test]
fn without_the_right_to_send_events_everything_else_works() {
    let (server, mount) = (cluster(), Mount::with_dataplane());
    server.misbehave(Fault::Status(403, None), usize::MAX, |_, path| path.contains("/events/"));
    let mut running = Sleeper::spawn(discover(&server, &mount, "--interval=0.05").stderr(Stdio::piped()));
    until("it is advertised", || slots(&server, "capacity") == "2");
    mount.stop();
    until("it is withdrawn", || slots(&server, "capacity").is_null());
    let refused =
        |server: &ApiServer| server.log().iter().filter(|entry| entry.path.contains("/events/")).count();
    until("it tries again", || refused(&server) > 2);
    mount.start();
    until("it is advertised again", || slots(&server, "capacity") == "2");
    signal(running.pid(), Signal::SIGTERM);
    let output =
        std::mem::replace(running.child(), Command::new("true").spawn().unwrap()).wait_with_output().unwrap();
    let err = text(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{err}");
    assert_eq!(err.matches("; the Event is not sent").count(), 1, "{err}");
    assert!(err.contains("kubectl apply -f deploy/rbac.yaml"), "{err}");
}

#[test]
fn a_single_run_changes_nothing_without_a_daemon() {
    let (server, mount) = (cluster(), Mount::with_dataplane());
    let once = || {
        let mut command = mount.kcm(&["discover", "--resource-name=extended"]);
        run(command.env("KUBECONFIG", server.kubeconfig(ADMIN)).env("NODE_NAME", "n1"))
    };
    assert_eq!(once().2, Some(0));
    mount.stop();
    server.forget_log();
    let (_, err, code) = once();
    assert_eq!((code, err.lines().count(), server.log().len()), (Some(1), 1, 0), "{err}");
    assert!(err.contains("kcm mount is not running; start it"), "{err}");
}
