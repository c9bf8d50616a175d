//! `deploy/components/device-plugin`: what it adds to the DaemonSet works together, and the example needs nothing of the node.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::kubelet::Kubelet;
use super::{DATAPLANE, HEALTHY, until_health};
use crate::harness::{KCM, Mount, Sleeper, run, until};
use serde_json::Value;

fn file(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy").join(name);
    serde_saphyr::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// Applies the component to the DaemonSet.
pub fn patch(daemon_set: &mut Value) {
    let component = file("components/device-plugin/kustomization.yaml");
    let text = component["patches"][0]["patch"].as_str().unwrap();
    let patch: Value = serde_saphyr::from_str(text).unwrap();
    json_patch::patch(daemon_set, &serde_json::from_value::<json_patch::Patch>(patch).unwrap()).unwrap();
}

#[test]
fn the_containers_of_the_component_serve_a_kubelet() {
    let mount = Mount::with_dataplane();
    let (plugins, specs, programs) =
        (mount.home().join("plugins"), mount.home().join("cdi"), mount.home().join("bin"));
    let mut patched = file("daemonset.yaml");
    patch(&mut patched);
    let pod = &patched["spec"]["template"]["spec"];
    let volumes = pod["volumes"].as_array().unwrap();
    let start = |container: &Value| {
        let mut command = Command::new(KCM);
        for arg in container["args"].as_array().unwrap() {
            // Each directory of the node is mounted from a volume that there is, at the same path.
            for mounted in container["volumeMounts"].as_array().unwrap() {
                let volume = volumes.iter().find(|it| it["name"] == mounted["name"]).expect("a volume");
                assert_eq!(volume["hostPath"]["path"], mounted["mountPath"]);
            }
            let arg = arg.as_str().unwrap();
            let arg = arg.replace("/run/kcm/conf", mount.conf().to_str().unwrap());
            let arg = arg.replace("/var/lib/kubelet/device-plugins", plugins.to_str().unwrap());
            let arg = arg.replace("/var/run/cdi", specs.to_str().unwrap());
            command.arg(arg.replace("/opt/bin", programs.to_str().unwrap()));
        }
        // Root without a capability.
        assert_eq!(container["securityContext"]["capabilities"]["drop"][0], "ALL");
        let mut limited = Command::new("setpriv");
        limited.args(["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]);
        limited.arg(command.get_program()).args(command.get_args()).env("KCM_LOG_LEVEL", "ERROR");
        limited
    };
    let install = pod["initContainers"].as_array().unwrap().last().unwrap();
    assert_eq!(install["name"], "install");
    let (_, err, code) = run(&mut start(install));
    assert_eq!((err.as_str(), code), ("", Some(0)));
    let kubelet = Kubelet::start(&plugins);
    let added: Vec<&Value> = pod["containers"].as_array().unwrap()[3..].iter().collect();
    assert_eq!(
        added.iter().map(|it| it["name"].as_str().unwrap()).collect::<Vec<_>>(),
        ["cdi", "device-plugin"]
    );
    let _running: Vec<Sleeper> =
        added.iter().map(|container| Sleeper::spawn(&mut start(container))).collect();
    until_health("it is registered", &kubelet, HEALTHY);
    let spec = specs.join("kcm.intel.com-dataplane.json");
    until("there is a spec", || spec.exists());
    let spec: Value = serde_json::from_str(&fs::read_to_string(spec).unwrap()).unwrap();
    let hook = &spec["devices"][0]["containerEdits"]["hooks"][0]["path"];
    assert_eq!(hook.as_str().unwrap(), programs.join("kcm").to_str().unwrap());
    assert!(programs.join("kcm").exists());
    // The kubelet has the slots.
    assert_eq!(pod["containers"][2]["args"][1], "--resource-name=none");
}

#[test]
fn the_example_is_a_pod_of_the_level_restricted_without_a_volume() {
    let pod = file("components/device-plugin/example-pod.yaml");
    let (spec, container) = (&pod["spec"], &pod["spec"]["containers"][0]);
    assert_eq!((&spec["volumes"], &container["volumeMounts"]), (&Value::Null, &Value::Null));
    assert_eq!(spec["hostUsers"], false);
    // https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted
    assert_eq!(spec["securityContext"]["runAsNonRoot"], true);
    assert_eq!(spec["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
    assert_eq!(container["securityContext"]["allowPrivilegeEscalation"], false);
    assert_eq!(container["securityContext"]["capabilities"]["drop"], serde_json::json!(["ALL"]));
    assert_eq!(container["resources"]["limits"][DATAPLANE], "1");
    let script = container["command"][2].as_str().unwrap();
    assert!(!script.contains("$(") && !script.contains("$$"), "Kubernetes would replace it: {script}");
    let (_, err, code) = run(Command::new("sh").args(["-n", "-c", script]));
    assert_eq!(code, Some(0), "{err}");
}
