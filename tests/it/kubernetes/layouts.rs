//! `kcm init --if-empty` on a node: numbers per node, and a node that cannot have its pools is no failure.

use std::fs;
use std::process::Command;

use super::api_server::{ADMIN, ApiServer, Fault};
use crate::harness::{Machine, Mount, run};
use serde_json::{Value, json};

const EVENT: &str = "/api/v1/namespaces/default/events/n1.kcmlayoutimpossible";

/// A mount without pools on a machine with four cores of two threads.
fn mount() -> Mount {
    Mount::on_machine(&Machine::new(1, 4, 2))
}

/// `kcm init --if-empty` in a pod of the node n1.
fn init(server: &ApiServer, mount: &Mount, words: &[&str]) -> Command {
    let mut command = mount.kcm(&["init", "--if-empty"]);
    let root = mount.home().join("machine");
    command.args(words).env("KCM_DEV_LSCPU_SYSFS", &root).env("KCM_PROC_FS", root.join("proc"));
    command.env("KUBECONFIG", server.kubeconfig(ADMIN)).env("NODE_NAME", "n1");
    command
}

fn lists(mount: &Mount, pool: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(mount.pool(pool)) else { return Vec::new() };
    let directories = entries.map(Result::unwrap).filter(|entry| entry.path().is_dir());
    let mut lists: Vec<String> = directories.map(|entry| entry.file_name().into_string().unwrap()).collect();
    lists.sort();
    lists
}

#[test]
fn a_node_has_the_numbers_of_its_entry() {
    let server = ApiServer::start();
    for (text, dataplane, controlplane) in [
        ("n1: {dataplane: 1, controlplane: 2}\ndefault: {dataplane: 3}\n", &["0,4"][..], &["1-2,5-6"][..]),
        ("n2: {dataplane: 1}\ndefault: {dataplane: auto, controlplane: 0}\n", &["0,4", "1,5", "2,6"], &[]),
        (r#"{"n1": {"dataplane": 2}}"#, &["0,4", "1,5"], &["2,6"]),
        ("", &["0,4", "1,5"], &["2,6"]),
    ] {
        let mount = mount();
        let file = mount.home().join("layouts.yaml");
        fs::write(&file, text).unwrap();
        let layouts = format!("--layouts={}", file.display());
        let (_, err, code) = run(&mut init(&server, &mount, &[&layouts, "--num-dp-cores=auto"]));
        assert_eq!(code, Some(0), "{err}");
        assert_eq!(
            (lists(&mount, "dataplane"), lists(&mount, "controlplane")),
            (own(dataplane), own(controlplane)),
            "{text}"
        );
    }
    // A node that is in no file has the numbers of the flags.
    let mount = mount();
    let (_, err, code) =
        run(&mut init(&server, &mount, &["--layouts=/nonexistent/layouts.yaml", "--num-dp-cores=1"]));
    assert_eq!((code, lists(&mount, "dataplane")), (Some(0), own(&["0,4"])), "{err}");
    let (_, err, code) = run(init(&server, &mount, &["--layouts=/nonexistent"]).env_remove("NODE_NAME"));
    assert_eq!(code, Some(0), "{err}");
    assert!(err.contains("set NODE_NAME, or give --node"), "{err}");
    assert_eq!(server.log().len(), 0, "nobody asks the API server");
}

fn own(lists: &[&str]) -> Vec<String> {
    lists.iter().map(|list| (*list).to_owned()).collect()
}

#[test]
fn a_node_that_cannot_have_its_pools_says_so_and_is_no_failure() {
    let (server, mount) = (ApiServer::start(), mount());
    let (out, err, code) = run(&mut init(&server, &mount, &["--num-dp-cores=9"]));
    assert_eq!((out.as_str(), code), ("", Some(0)), "{err}");
    let line = err.lines().last().unwrap();
    let message = "node n1 cannot have the requested pools: 9 cores requested for dataplane. Only 4 cores available; \
                   there are none; request other numbers, such as --num-dp-cores=auto, or make pools by hand";
    assert_eq!(line, format!("ERROR:root:{message}"));
    assert_eq!(err.matches("ERROR").count(), 1, "one line: {err}");
    let event = server.object(EVENT).expect("an Event");
    for (field, value) in [
        ("type", json!("Warning")),
        ("reason", json!("KcmLayoutImpossible")),
        ("message", json!(message)),
        ("count", json!(1)),
        ("involvedObject", json!({ "apiVersion": "v1", "kind": "Node", "name": "n1", "uid": "n1" })),
        ("source", json!({ "component": "kcm", "host": "n1" })),
    ] {
        assert_eq!(event[field], value);
    }
    assert_eq!(mount.sh("ls $C/pools"), "");
    assert_eq!(server.log().len(), 1);

    // A file that cannot be read is no failure either, and is named.
    let file = mount.home().join("layouts.yaml");
    fs::write(&file, "n1:\n  dp: 4\n").unwrap();
    let (_, err, code) = run(&mut init(&server, &mount, &[&format!("--layouts={}", file.display())]));
    assert_eq!(code, Some(0), "{err}");
    assert!(err.contains("layouts.yaml:2: unknown field") && err.contains("change its entry in "), "{err}");
    assert_eq!(
        server.object(EVENT).unwrap()["message"].as_str().map(|text| text.contains("layouts.yaml:2")),
        Some(true)
    );
}

#[test]
fn without_a_cluster_or_rights_init_succeeds_too() {
    let (server, mount) = (ApiServer::start(), mount());
    let impossible = ["--num-dp-cores=9"];
    for (command, part) in [
        (
            init(&server, &mount, &impossible).env("KUBECONFIG", server.kubeconfig("unknown")),
            "(401 Unauthorized)",
        ),
        (init(&server, &mount, &impossible).env("KUBECONFIG", "/nonexistent"), "no cluster to talk to"),
    ] {
        let (_, err, code) = run(command.env_remove("KUBERNETES_SERVICE_HOST"));
        assert_eq!(code, Some(0), "{err}");
        assert!(err.contains(part) && err.ends_with("; the Event is not sent\n"), "{err}");
    }
    server.misbehave(Fault::Cut, usize::MAX, |_, _| true);
    let started = std::time::Instant::now();
    let (_, err, code) = run(&mut init(&server, &mount, &impossible));
    assert_eq!(code, Some(0), "{err}");
    assert!(started.elapsed() < std::time::Duration::from_secs(20), "the other containers wait for it");
    // Without the name of a node there is nobody to send an Event about.
    let (_, err, code) = run(init(&server, &mount, &impossible).env_remove("NODE_NAME"));
    assert_eq!(code, Some(0));
    assert!(
        err.contains("ERROR:root:this machine cannot have the requested pools") && !err.contains("Event"),
        "{err}"
    );
}

#[test]
fn a_daemon_that_does_not_answer_is_a_failure() {
    let (server, mount) = (ApiServer::start(), mount());
    mount.kill_daemon();
    let (_, err, code) = run(&mut init(&server, &mount, &["--num-dp-cores=9"]));
    assert_eq!(code, Some(1), "the pod tries again: {err}");
    assert_eq!(server.object(EVENT), None::<Value>);
}
