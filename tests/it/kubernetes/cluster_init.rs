//! `kcm cluster-init`: the pods that it creates, their order, and its messages.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::api_server::nodes::{KINDS, PODS, advertised, cluster, cluster_init, made, pod_path, well};
use super::api_server::rights::Rights;
use super::api_server::{ADMIN, Logged};
use crate::harness::{KCM, run, until};
use serde_json::{Value, json};

#[test]
fn each_node_gets_three_pods_in_order() {
    let server = cluster(3);
    let (out, err, code) = run(&mut cluster_init(&server, &["--all-hosts"]));
    assert_eq!((out.as_str(), code), ("", Some(0)), "{err}");
    let made = made(&server);
    assert_eq!(made.len(), 9);
    for node in ["n1", "n2", "n3"] {
        let at = |kind: &str| made.iter().position(|pod| *pod == format!("{kind}-{node}")).expect(kind);
        assert!(KINDS.map(at).is_sorted(), "{made:?}");
        assert!(err.contains(&format!("INFO:root:{node}: mount: ")), "{err}");
        assert!(err.contains(&format!("INFO:root:{node}: ready (")), "{err}");
    }
    assert!(err.ends_with("INFO:root:3 nodes are ready.\n"), "{err}");
    assert!(err.contains("keeps the mount that it started with"), "{err}");
    assert!(!err.contains('\x1b'), "lines without escape sequences if stderr is not a terminal");
}

#[test]
fn a_pod_waits_for_the_goal_of_the_previous_one() {
    let server = cluster(1);
    server.kubelet(|_| Vec::new());
    let mut child = cluster_init(&server, &["--host-list=n1"]).stderr(Stdio::null()).spawn().unwrap();
    let set = |kind: &str, status: Value| server.change(&pod_path(kind, "n1"), |pod| pod["status"] = status);
    let exists = |kind: &str| server.object(&pod_path(kind, "n1")).is_some();
    until("mount is there", || exists(KINDS[0]));
    set(KINDS[0], json!({ "phase": "Running", "containerStatuses": [{ "name": "mount", "ready": false }] }));
    std::thread::sleep(Duration::from_millis(100));
    assert!(!exists(KINDS[1]), "the mount does not answer yet");
    set(KINDS[0], json!({ "phase": "Running", "containerStatuses": [{ "name": "mount", "ready": true }] }));
    until("init is there", || exists(KINDS[1]));
    set(KINDS[1], json!({ "phase": "Running" }));
    std::thread::sleep(Duration::from_millis(100));
    assert!(!exists(KINDS[2]), "init has not ended yet");
    set(KINDS[1], json!({ "phase": "Succeeded" }));
    until("the reports are there", || exists(KINDS[2]));
    set(KINDS[2], json!({ "phase": "Running" }));
    assert!(child.wait().unwrap().success());
}

#[test]
fn the_pods_have_the_legacy_form() {
    let server = cluster(1);
    let words = [
        "--host-list=n1",
        "--kcm-img=registry/kcm:1",
        "--kcm-img-pol=Always",
        "--num-dp-cores=7",
        "--conf-dir=/etc/kcm",
        "--service-account=kcm-node",
    ];
    assert_eq!(run(&mut cluster_init(&server, &words)).2, Some(0));
    let [mount, once, on] = KINDS.map(|kind| server.object(&pod_path(kind, "n1")).unwrap()["spec"].clone());
    let container = &mount["containers"][0];
    assert_eq!(container["securityContext"]["privileged"], true);
    assert_eq!((&mount["hostPID"], &mount["nodeName"]), (&json!(true), &json!("n1")));
    assert!(
        container["volumeMounts"]
            .as_array()
            .unwrap()
            .iter()
            .any(|mount| mount["mountPropagation"] == "Bidirectional")
    );
    let host_paths = |spec: &Value| -> Vec<String> {
        spec["volumes"]
            .as_array()
            .unwrap()
            .iter()
            .map(|v| v["hostPath"]["path"].as_str().unwrap().to_owned())
            .collect()
    };
    assert!(host_paths(&mount).contains(&"/dev/fuse".into()));
    let names = |containers: &Value| -> Vec<String> {
        containers.as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names(&once["initContainers"]), ["init"]);
    assert_eq!(names(&once["containers"]), ["install", "discover"]);
    // The legacy pod, and discover again: what others reset on the node is set again.
    assert_eq!(names(&on["containers"]), ["reconcile", "nodereport", "discover"]);
    assert!(on["containers"][2]["args"].as_array().unwrap().contains(&json!("--interval=60")));
    assert!(once["initContainers"][0]["args"].as_array().unwrap().contains(&json!("--num-dp-cores=7")));
    assert_eq!((&once["restartPolicy"], &on["restartPolicy"]), (&json!("Never"), &json!("Always")));
    for spec in [&mount, &once, &on] {
        assert_eq!(spec["serviceAccountName"], "kcm-node");
        assert_eq!(spec["tolerations"], json!([{ "operator": "Exists" }]));
        assert_eq!(spec["priorityClassName"], "system-node-critical", "as in deploy/");
        for container in spec["containers"].as_array().unwrap() {
            assert_eq!(
                (&container["image"], &container["imagePullPolicy"]),
                (&json!("registry/kcm:1"), &json!("Always"))
            );
            assert!(container["resources"]["requests"]["cpu"].is_string(), "not best-effort: {container}");
        }
    }
    // kcm knows every argument of the containers.
    for spec in [&mount, &once, &on] {
        for container in
            ["initContainers", "containers"].iter().filter_map(|kind| spec[kind].as_array()).flatten()
        {
            let args: Vec<&str> =
                container["args"].as_array().unwrap().iter().map(|arg| arg.as_str().unwrap()).collect();
            let (_, err, code) = run(Command::new(KCM).args(&args).arg("--help"));
            assert_eq!(code, Some(0), "{args:?}: {err}");
        }
    }
}

#[test]
fn a_shorter_list_makes_fewer_pods() {
    let server = cluster(1);
    assert_eq!(run(&mut cluster_init(&server, &["--host-list=n1", "--kcm-cmd-list=install"])).2, Some(0));
    assert_eq!(made(&server), ["kcm-install-pod-n1"], "a pod without a mount is enough for install");
    server.forget_log();
    assert_eq!(run(&mut cluster_init(&server, &["--host-list=n1", "--kcm-cmd-list=init"])).2, Some(0));
    assert_eq!(made(&server), ["kcm-mount-pod-n1", "kcm-init-pod-n1"]);
    assert!(server.object(&pod_path("kcm-init-pod", "n1")).unwrap()["spec"].get("initContainers").is_none());
}

#[test]
fn five_hundred_nodes_side_by_side() {
    let server = cluster(500);
    server.add_user("watcher", "watcher", Rights::All);
    let started = Instant::now();
    let (_, err, code) = run(&mut cluster_init(&server, &["--all-hosts"]));
    assert_eq!(code, Some(0), "{err}");
    assert_eq!(made(&server).len(), 1500);
    assert!(err.ends_with("INFO:root:500 nodes are ready.\n"));
    let is_read = |entry: &&Logged| entry.method == "GET" && !entry.path.contains("/nodes/");
    let reads = server.log().iter().filter(is_read).count();
    assert!(reads < 100, "one watch sees all pods: {reads} reads");
    let looks = server.log().iter().filter(|entry| entry.path.contains("/nodes/")).count();
    assert_eq!(looks, 500, "each node is looked at once");
    assert!(started.elapsed() < Duration::from_secs(60));
}

#[test]
fn at_most_fifty_nodes_are_in_progress() {
    let server = cluster(60);
    server.kubelet(|_| Vec::new());
    let mut child = cluster_init(&server, &["--all-hosts"]).stderr(Stdio::null()).spawn().unwrap();
    until("fifty are in work", || made(&server).len() == 50);
    let first = made(&server)[0].clone();
    // A pod that reaches its goal lets only the next pod of its node be created.
    let pod = |name: &str| format!("{PODS}/{name}");
    for (kind, next) in KINDS.iter().zip(KINDS.iter().skip(1)) {
        let name = first.replace(KINDS[0], kind);
        server.change(&pod(&name), |pod| pod["status"] = well(pod).pop().unwrap().1);
        until("the next one is there", || server.object(&pod(&first.replace(KINDS[0], next))).is_some());
    }
    // The server logs a request after it has changed the object.
    until("both are logged", || made(&server).len() == 52);
    server.change(&pod(&first.replace(KINDS[0], KINDS[2])), |pod| pod["status"] = well(pod).pop().unwrap().1);
    until("another node is in work", || made(&server).len() == 53);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_second_cluster_init_creates_nothing() {
    let server = cluster(3);
    assert_eq!(run(&mut cluster_init(&server, &["--all-hosts"])).2, Some(0));
    server.forget_log();
    let (_, err, code) = run(&mut cluster_init(&server, &["--all-hosts"]));
    assert_eq!(code, Some(0), "{err}");
    assert_eq!(server.changes().len(), 0);
    // A missing pod is created.
    server.remove(&pod_path(KINDS[2], "n2"));
    assert_eq!(run(&mut cluster_init(&server, &["--all-hosts"])).2, Some(0));
    assert_eq!(made(&server), [format!("{}-n2", KINDS[2])]);
}

#[test]
fn a_node_is_ready_only_while_it_is_advertised() {
    let server = cluster(2);
    assert_eq!(run(&mut cluster_init(&server, &["--all-hosts"])).2, Some(0));
    let node = |name: &str| format!("/api/v1/nodes/{name}");
    let bare = |node: &mut Value| {
        node["status"]["capacity"] = json!({ "cpu": "8" });
        node["spec"]["taints"] = json!([]);
    };
    // All pods run, but the node has lost its slots and taint.
    server.change(&node("n1"), bare);
    let (_, err, code) = run(&mut cluster_init(&server, &["--all-hosts", "--timeout=1"]));
    assert_eq!(code, Some(1), "{err}");
    assert!(err.contains("ERROR:root:node n1: it has no slots of kcm after 1 s; look at the log of discover: kubectl logs -n default -l app.kubernetes.io/managed-by=kcm-cluster-init -c discover\n"), "{err}");
    assert!(err.contains("INFO:root:n2: ready"), "{err}");
    // discover, in the pod that keeps running, sets them again meanwhile.
    let child = cluster_init(&server, &["--all-hosts"]).stderr(Stdio::piped()).spawn().unwrap();
    let looks = || server.log().iter().filter(|entry| entry.path == node("n1")).count();
    let before = looks();
    until("it waits for the node", || looks() > before + 1);
    server.change(&node("n1"), |node| *node = advertised("n1"));
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", crate::harness::text(&output.stderr));
    // Without discover, nobody advertises.
    server.change(&node("n1"), bare);
    let words = ["--host-list=n1", "--kcm-cmd-list=install"];
    assert_eq!(run(&mut cluster_init(&server, &words)).2, Some(0));
}

#[test]
fn pools_and_the_taint_are_chosen_as_for_init_and_discover() {
    let server = cluster(1);
    let words = ["--host-list=n1", "--num-dp-cores=auto", "--no-taint"];
    server.change("/api/v1/nodes/n1", |node| node["spec"]["taints"] = json!([]));
    assert_eq!(run(&mut cluster_init(&server, &words)).2, Some(0), "a node without a taint is ready");
    let [_, once, on] = KINDS.map(|kind| server.object(&pod_path(kind, "n1")).unwrap()["spec"].clone());
    let has = |container: &Value, arg: &str| container["args"].as_array().unwrap().contains(&json!(arg));
    assert!(has(&once["initContainers"][0], "--num-dp-cores=auto"));
    assert!(has(&once["containers"][1], "--no-taint") && has(&on["containers"][2], "--no-taint"));
    let server = cluster(1);
    let words = ["--host-list=n1", "--taint=dedicated=kcm:NoExecute", "--timeout=1"];
    let (_, err, code) = run(&mut cluster_init(&server, &words));
    assert_eq!(code, Some(1));
    assert!(err.contains("node n1: it has no taint dedicated=kcm:NoExecute after 1 s"), "{err}");
}

#[test]
fn discover_by_itself_keeps_running() {
    let server = cluster(1);
    let words = ["--host-list=n1", "--kcm-cmd-list=discover"];
    assert_eq!(run(&mut cluster_init(&server, &words)).2, Some(0));
    assert_eq!(made(&server), ["kcm-mount-pod-n1", "kcm-discover-pod-n1"]);
    let spec = server.object(&pod_path("kcm-discover-pod", "n1")).unwrap()["spec"].clone();
    assert_eq!(spec["restartPolicy"], "Always");
}

#[test]
fn invalid_arguments_are_refused_before_any_request() {
    let server = cluster(1);
    let long = format!("--host-list={}", "a".repeat(250));
    for (words, code, part) in [
        (&[][..], 2, "--host-list <list>|--all-hosts"),
        (&["--host-list=n1", "--all-hosts"], 2, "cannot be used with"),
        (&["--host-list="], 2, "not a name that Kubernetes allows"),
        (&["--host-list=n1,N_2"], 2, "not a name that Kubernetes allows"),
        (&[&long], 1, "too long for the name of a pod"),
        (
            &["--all-hosts", "--kcm-cmd-list=init,fly"],
            2,
            "KCM command should be one of init, discover, install, reconcile, nodereport",
        ),
        (&["--all-hosts", "--kcm-cmd-list="], 2, "KCM command should be one of"),
        (&["--all-hosts", "--kcm-cmd-list=discover,init"], 2, "init command should be run and listed first"),
        (&["--all-hosts", "--kcm-cmd-list=init,install,install"], 2, "listed twice"),
        (&["--all-hosts", "--kcm-img-pol=Sometimes"], 2, "[possible values: Never, IfNotPresent, Always]"),
        (&["--all-hosts", "--num-dp-cores=-1"], 2, "--num-dp-cores"),
        (&["--all-hosts", "--num-cp-cores=x"], 2, "--num-cp-cores"),
        (&["--all-hosts", "--kcm-img="], 2, "--kcm-img"),
        (&["--all-hosts", "--conf-dir=etc"], 1, "give an absolute path"),
        (&["--all-hosts", "--conf-dir=/"], 1, "cannot be a directory of kcm"),
        (&["--all-hosts", "--install-dir=bin"], 1, "give an absolute path"),
        (&["--all-hosts", "--state-dir=state"], 1, "give an absolute path"),
        (&["--all-hosts", "--service-account=A"], 2, "not a name that Kubernetes allows"),
        (&["--all-hosts", "--num-dp-cores=1.5"], 2, "--num-dp-cores"),
        (&["--all-hosts", "--timeout=-1"], 2, "--timeout"),
        (&["--all-hosts", "--namespace=a.b"], 2, "not the name of a namespace"),
        (&["--all-hosts", "--timeout=soon"], 2, "not a number of seconds"),
    ] {
        let (_, err, got) = run(&mut cluster_init(&server, words));
        assert_eq!(got, Some(code), "{words:?}: {err}");
        assert!(err.contains(part), "{words:?}: {err}");
    }
    assert_eq!(server.log().len(), 0);
}

#[test]
fn a_dry_run_prints_the_pods() {
    let server = cluster(1);
    let (out, err, code) = run(&mut cluster_init(&server, &["--host-list=n1", "--dry-run"]));
    assert_eq!((err.as_str(), code), ("", Some(0)));
    assert_eq!(server.log().len(), 0);
    assert_eq!(out, include_str!("../../data/cluster-init.yaml"), "the pods of the default list");
    assert_eq!(run(&mut cluster_init(&server, &["--host-list=n1"])).2, Some(0));
    let sent: Vec<Value> = server.changes().into_iter().map(|entry| entry.body).collect();
    let printed: Vec<Value> = serde_saphyr::from_multiple(&out).unwrap();
    assert_eq!(printed, sent);
    assert!(!out.contains("--isolated"), "{out}");
    let (out, _, _) = run(&mut cluster_init(&server, &["--host-list=n1", "--dry-run", "--isolated"]));
    assert_eq!(out.matches("--isolated").count(), 1, "for init: {out}");
}

#[test]
fn on_a_terminal_each_node_has_one_line() {
    let server = cluster(3);
    let line = format!("{KCM} cluster-init --all-hosts");
    let mut command = Command::new("script");
    command.args(["-qec", &line, "/dev/null"]).env("KUBECONFIG", server.kubeconfig(ADMIN));
    let (out, _, code) = run(&mut command);
    assert_eq!(code, Some(0), "{out}");
    for node in ["n1", "n2", "n3"] {
        assert_eq!(out.matches(&format!("{node}: ready")).count(), 1, "{out}");
    }
    assert!(out.contains("\r\x1b[K"), "the line about the other nodes is drawn in its place: {out}");
}
