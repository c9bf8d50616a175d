//! `kcm node-report` on a node with pods: the kubelet's CPU manager, what keeps others off, and the names of pods.

use std::fs;

use super::node_report::{errors, on};
use crate::harness::{Cgroup, Machine, Mount, Sleeper, missing_for_isolation, report, run, until, write};
use serde_json::{Value, json};

#[test]
fn the_kubelets_cpus_are_compared_with_the_pools() {
    let mount = Mount::not_mounted();
    mount.start_on(&Machine::new(1, 4, 2));
    mount.make_pool("dataplane", true, &["0,4", "1,5"]);
    mount.make_pool("infra", false, &["2-3,6-7"]);
    let found = |state: &str| {
        let kubelet = mount.home().join("kubelet");
        fs::create_dir_all(&kubelet).unwrap();
        fs::write(kubelet.join("cpu_manager_state"), state).unwrap();
        let mut command = mount.kcm(&["node-report", "--kubelet-dir"]);
        errors(&report(on(command.arg(&kubelet), &mount.home().join("machine"))), "kubelet")
    };
    let configure = |text: &str| {
        fs::create_dir_all(mount.home().join("kubelet")).unwrap();
        fs::write(mount.home().join("kubelet/config.yaml"), text).unwrap();
    };
    configure("cpuManagerPolicy: static\n");
    let none = [""; 0];
    assert_eq!(found(r#"{"policyName":"none","defaultCpuSet":"","checksum":1}"#), none);
    assert_eq!(
        found(r#"{"policyName":"none","defaultCpuSet":"0-7","checksum":1}"#),
        none,
        "a socket without a kubelet"
    );
    assert_eq!(
        found(
            r#"{"policyName":"static","defaultCpuSet":"1-3,5-7","entries":{"8c4d":{"fwd":"0,4"}},"checksum":1}"#
        ),
        [
            "the kubelet has given CPU 0,4 of dataplane:0,4 to fwd of pod 8c4d",
            "the kubelet may give CPU 1,5 of dataplane:1,5 to a pod; name it in reservedSystemCPUs, without \
             strict-cpu-reservation",
        ]
    );
    // Reserved, so that no other pod gets them, but not strictly, so that pods can claim them.
    let reserved = "cpuManagerPolicy: static\nreservedSystemCPUs: 0-1,4-5\n";
    configure(reserved);
    let whole = r#"{"policyName":"static","defaultCpuSet":"0-7","checksum":1}"#;
    assert_eq!(found(whole), none);
    configure(&format!("{reserved}cpuManagerPolicyOptions:\n  strict-cpu-reservation: \"true\"\n"));
    let strict = |cpus: &str| {
        format!(
            "pods cannot use CPU {cpus} of dataplane:{cpus}, because the kubelet reserves it strictly; switch \
             strict-cpu-reservation off, and leave the CPUs in reservedSystemCPUs"
        )
    };
    let without = r#"{"policyName":"static","defaultCpuSet":"2-3,6-7","checksum":1}"#;
    assert_eq!(found(without), [strict("0,4"), strict("1,5")]);
    // Without a configuration it is not known whether they are reserved.
    fs::remove_file(mount.home().join("kubelet/config.yaml")).unwrap();
    let unknown = found(whole);
    let config = mount.home().join("kubelet/config.yaml");
    let begin = format!(
        "whether the kubelet may give CPU 0,4 of dataplane:0,4 to a pod is not known: {}: no such file; ",
        config.display()
    );
    assert!(unknown.len() == 2 && unknown[0].starts_with(&begin), "{unknown:?}");
    configure(reserved);
    assert_eq!(
        found(
            r#"{"policyName":"static","defaultCpuSet":"0-1,3-7","entries":{"8c4d":{"fwd":"2"}},"checksum":1}"#
        ),
        ["the kubelet has given CPU 2 of infra:2-3,6-7 to fwd of pod 8c4d"]
    );
    let file = mount.home().join("kubelet/cpu_manager_state");
    assert_eq!(found("nonsense"), [format!("{}: not JSON", file.display())]);
    let mut command = mount.kcm(&["node-report", "--kubelet-dir=/nowhere"]);
    assert_eq!(errors(&report(on(&mut command, &mount.home().join("machine"))), "kubelet"), none);
}

/// The warnings of the check `isolation`.
fn warnings(report: &Value) -> Vec<String> {
    let check = &report["checks"]["isolation"];
    assert_eq!(check["ok"], true, "a warning leaves the check ok");
    let warnings = check.get("warnings").and_then(Value::as_array).cloned().unwrap_or_default();
    warnings.iter().map(|warning| warning.as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_pool_from_which_nothing_keeps_others_off_is_a_warning() {
    let mount = Mount::new();
    mount.make_pool("a", true, &["0"]);
    mount.make_pool("b", false, &["1"]);
    let found = || warnings(&report(&mut mount.kcm(&["node-report"])));
    let expected = "nothing keeps other programs off CPU 0 of a; make the pool isolated (kcm init --isolated, or its \
                    file mode), or start the kernel with isolcpus=0";
    assert_eq!(found(), [expected]);
    let (out, err, _) = run(&mut mount.kcm(&["status", "--timeout=60"]));
    assert!(out.contains(&format!("\nnote: isolation: {expected}\n")), "{out}{err}");
    // Whether the kernel can isolate is for the errors of the check to say.
    if missing_for_isolation().is_none() {
        mount.sh("echo isolated > $C/pools/a/mode");
        assert_eq!(found(), [""; 0]);
    }
}

#[test]
fn the_pod_of_a_task_is_named() {
    let mount = Mount::with_dataplane();
    let (known, unknown) = ("3f".repeat(32), "4e".repeat(32));
    let logs = mount.home().join("logs");
    fs::create_dir(&logs).unwrap();
    let link = format!("fwd-7d_default_main-{known}.log");
    std::os::unix::fs::symlink("/nowhere", logs.join(link)).unwrap();
    let uid = "8c4d93c1-01d0-4d0b-9e2a-6a1d5f1f3a77";
    let slice = format!("kubepods-besteffort-pod{}.slice", uid.replace('-', "_"));
    let in_pods = [format!("{slice}/cri-containerd-{known}.scope"), format!("pod{uid}/{unknown}")];
    let (cgroup, tasks) = (Cgroup::new(), [Sleeper::new(), Sleeper::new()]);
    for (list, (path, task)) in in_pods.iter().zip(&tasks).enumerate() {
        let path = cgroup.path.join(path);
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("cgroup.procs"), task.pid().to_string()).unwrap();
        write(&mount.tasks("dataplane", &list.to_string()), task.pid().to_string()).unwrap();
    }
    let [first, second] = tasks.each_ref().map(Sleeper::pid);
    let with_logs = |words: &[&str]| {
        let mut command = mount.kcm(words);
        command.arg("--container-logs").arg(&logs);
        command
    };
    let found = report(&mut with_logs(&["node-report"]));
    let lists = &found["description"]["pools"]["dataplane"]["cpuLists"];
    assert_eq!(lists["0"]["tasks"], json!([first]));
    assert_eq!(lists["0"]["pods"], json!([{ "container": "main", "pid": first, "pod": "default/fwd-7d" }]));
    assert_eq!(lists["1"]["pods"], json!([{ "container": unknown, "pid": second, "pod": uid }]));
    assert_eq!(report(&mut with_logs(&["describe"])), found["description"]);
    for (format, task) in [("map", format!("{first} (sleep)")), ("table", first.to_string())] {
        let format = format!("--format={format}");
        let (wide, err, _) = run(&mut with_logs(&["describe", &format, "-o", "wide"]));
        assert!(wide.contains(&format!("{task} in default/fwd-7d:main")), "{wide}{err}");
        let (narrow, _, _) = run(&mut with_logs(&["describe", &format]));
        assert!(!narrow.contains("default/fwd-7d"), "{narrow}");
    }
    // It is of the class that gets what others leave.
    let expected = format!(
        "{first} (sleep) of dataplane:0 is in a pod without requests, so other pods come first on its CPUs; give its \
         container resources.requests.cpu"
    );
    let found = warnings(&found);
    assert!(
        found.contains(&expected) && !found.iter().any(|it| it.starts_with(&second.to_string())),
        "{found:?}"
    );
    tasks.into_iter().for_each(Sleeper::end);
    for path in in_pods {
        let path = cgroup.path.join(path);
        until("the cgroup is empty", || fs::remove_dir(&path).is_ok());
        fs::remove_dir(path.parent().unwrap()).unwrap();
    }
}
