//! `kcm device-plugin`: the lists of exclusive pools are devices of the kubelet, which are healthy while the kubelet may give them
//! to a container. `containers` has a runtime that gets what is allocated.

pub mod component;
pub mod kubelet;

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::harness::{Cgroup, Machine, Mount, Sleeper, run, signal, until, write};
use crate::kubernetes::api_server::{ADMIN, ApiServer};
use kubelet::{DevicePluginOptions, Kubelet};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const DATAPLANE: &str = "kcm.intel.com/dataplane";

/// The directory of the sockets.
pub fn directory(mount: &Mount) -> PathBuf {
    mount.home().join("device-plugins")
}

pub fn plugin(mount: &Mount) -> Command {
    let mut command = mount.kcm(&["device-plugin", "--plugins-dir"]);
    command.arg(directory(mount)).env("KCM_LOG_LEVEL", "ERROR");
    command
}

/// Starts a kubelet and the plugin.
fn start(mount: &Mount) -> (Kubelet, Sleeper) {
    let kubelet = Kubelet::start(&directory(mount));
    let plugin = Sleeper::spawn(plugin(mount).stderr(Stdio::null()));
    (kubelet, plugin)
}

/// Waits until the lists 0 and 1 of dataplane have this health.
fn until_health(what: &str, kubelet: &Kubelet, health: [&str; 2]) {
    let health = [format!("0 {} ", health[0]), format!("1 {} ", health[1])];
    until(what, || {
        let devices = kubelet.devices(DATAPLANE);
        devices.len() == 2 && devices.iter().zip(&health).all(|(device, health)| device.starts_with(health))
    });
}

const HEALTHY: [&str; 2] = ["Healthy", "Healthy"];
const UNHEALTHY: [&str; 2] = ["Unhealthy", "Unhealthy"];

#[test]
fn each_exclusive_pool_is_a_resource_with_its_lists() {
    // Each socket is a NUMA node.
    let machine = Machine::new(2, 4, 1);
    let mount = Mount::on_machine(&machine);
    mount.make_pool("dataplane", true, &["0-1", "2,5"]);
    mount.make_pool("4fast", true, &["7"]);
    mount.make_pool("infra", false, &["3"]);
    mount.make_pool("shield", true, &["6"]);
    mount.sh("echo 1 > $C/pools/shield/transient");
    let root = mount.home().join("machine");
    machine.write(&root);
    let kubelet = Kubelet::start(&directory(&mount));
    let _plugin = Sleeper::spawn(plugin(&mount).env("KCM_DEV_LSCPU_SYSFS", &root));
    until("both are watched", || {
        [DATAPLANE, "kcm.intel.com/4fast"].iter().all(|name| kubelet.resource(name).is_watched)
    });
    assert_eq!(kubelet.resources(), ["kcm.intel.com/4fast", DATAPLANE]);
    assert_eq!(kubelet.devices(DATAPLANE), ["0-1 Healthy [0]", "2_5 Healthy [0, 1]"]);
    assert_eq!(kubelet.devices("kcm.intel.com/4fast"), ["7 Healthy [1]"]);
    // It wants and has none of the optional calls.
    let none = DevicePluginOptions::default();
    assert_eq!((kubelet.resource(DATAPLANE).options, kubelet.options(DATAPLANE)), (Some(none.clone()), none));
    let preferred = kubelet.refused(DATAPLANE, "/v1beta1.DevicePlugin/GetPreferredAllocation");
    assert_eq!(preferred.code(), tonic::Code::Unimplemented);
}

#[test]
fn a_container_gets_a_device_that_the_specs_have() {
    let mount = Mount::new();
    mount.make_pool("dataplane", true, &["0,1"]);
    mount.make_pool("4dp", true, &[]);
    let specs = mount.home().join("cdi");
    run(mount.kcm(&["cdi", "install", "--dir"]).arg(&specs));
    let (kubelet, _plugin) = start(&mount);
    until("it is watched", || kubelet.resource(DATAPLANE).is_watched);
    let allocated = kubelet.allocate(DATAPLANE, &[&["0_1"]]).unwrap();
    assert_eq!(allocated, [["kcm.intel.com/dataplane=0_1"]]);
    let (kind, device) = allocated[0][0].split_once('=').unwrap();
    let file = specs.join(format!("{}.json", kind.replace('/', "-")));
    let spec: Value = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    assert_eq!(spec["kind"], kind);
    let devices = spec["devices"].as_array().unwrap();
    assert!(devices.iter().any(|it| it["name"] == device), "{devices:?}");
    assert_eq!(crate::harness::held(&mount.tasks("dataplane", "0,1")), [0; 0], "nothing is claimed yet");
}

#[test]
fn two_lists_for_a_container_are_refused_with_the_reason() {
    let mount = Mount::with_dataplane();
    let (kubelet, _plugin) = start(&mount);
    until_health("it is watched", &kubelet, HEALTHY);
    let two = kubelet.allocate(DATAPLANE, &[&["0", "1"]]);
    let reason = "a container asks for 2 of kcm.intel.com/dataplane, and a process can have one CPU list: ask for 1, \
                  and make lists with more CPUs";
    assert_eq!(two, Err(reason.to_owned()));
    let gone = kubelet.allocate(DATAPLANE, &[&["2_3"]]);
    assert_eq!(gone, Err("pool dataplane has no CPU list 2,3".to_owned()));
    // Two containers of a pod.
    let each = kubelet.allocate(DATAPLANE, &[&["0"], &["1"]]).unwrap();
    assert_eq!(each, [["kcm.intel.com/dataplane=0"], ["kcm.intel.com/dataplane=1"]]);
}

#[test]
fn devices_follow_lists_and_pools() {
    let mount = Mount::new();
    mount.make_pool("dataplane", true, &["0"]);
    let (kubelet, _plugin) = start(&mount);
    until("there is a device", || kubelet.devices(DATAPLANE).len() == 1);
    fs::create_dir(mount.pool("dataplane").join("1")).unwrap();
    until_health("there are two", &kubelet, HEALTHY);
    fs::write(mount.pool("dataplane").join("1/state"), "drain").unwrap();
    until_health("one drains", &kubelet, ["Healthy", "Unhealthy"]);
    fs::write(mount.pool("dataplane").join("1/state"), "undrain").unwrap();
    until_health("none drains", &kubelet, HEALTHY);
    fs::remove_dir(mount.pool("dataplane").join("0")).unwrap();
    until("there is one", || kubelet.devices(DATAPLANE).len() == 1);
    // A pool that goes has no capacity, and its resource can come again.
    let socket = kubelet.resource(DATAPLANE).socket;
    for round in 1..=2 {
        mount.sh("rmdir $C/pools/dataplane/1 $C/pools/dataplane");
        until("it has no devices", || kubelet.devices(DATAPLANE).is_empty());
        until("the stream has ended", || !kubelet.resource(DATAPLANE).is_watched);
        until("the socket is gone", || !socket.exists());
        mount.make_pool("dataplane", true, &["1"]);
        until("it is there again", || kubelet.devices(DATAPLANE).len() == 1);
        assert_eq!(kubelet.resource(DATAPLANE).registrations, round + 1);
    }
}

#[test]
fn a_list_with_an_offline_cpu_is_unhealthy() {
    let mut machine = Machine::new(1, 2, 1);
    let mount = Mount::with_dataplane();
    let root = mount.home().join("machine");
    machine.write(&root);
    let kubelet = Kubelet::start(&directory(&mount));
    let _plugin = Sleeper::spawn(plugin(&mount).env("KCM_DEV_LSCPU_SYSFS", &root));
    until_health("both are online", &kubelet, HEALTHY);
    machine.offline = vec![1];
    machine.write(&root);
    until_health("one is offline", &kubelet, ["Healthy", "Unhealthy"]);
    machine.offline = Vec::new();
    machine.write(&root);
    until_health("both are online again", &kubelet, HEALTHY);
}

#[test]
fn a_list_that_somebody_else_holds_is_unhealthy_and_that_of_a_pod_is_not() {
    let mount = Mount::with_dataplane();
    let (kubelet, _plugin) = start(&mount);
    until_health("both are free", &kubelet, HEALTHY);
    // The cgroup of a container, as the kubelet and a runtime make it.
    let kubepods = Cgroup::new();
    let container = kubepods.path.join("pod8c4d93c1-01d0-4d0b-9e2a-6a1d5f1f3a77").join("3f".repeat(32));
    fs::create_dir_all(&container).unwrap();
    let (other, of_pod) = (Sleeper::new(), Sleeper::new());
    fs::write(container.join("cgroup.procs"), of_pod.pid().to_string()).unwrap();
    write(&mount.tasks("dataplane", "0"), other.pid().to_string()).unwrap();
    write(&mount.tasks("dataplane", "1"), of_pod.pid().to_string()).unwrap();
    until_health("one is held by somebody else", &kubelet, ["Unhealthy", "Healthy"]);
    // The pod keeps it while it drains, and nobody gets it afterwards.
    fs::write(mount.pool("dataplane").join("1/state"), "drain").unwrap();
    other.end();
    until_health("the other one is free", &kubelet, HEALTHY);
    of_pod.end();
    until_health("the pod has ended", &kubelet, ["Healthy", "Unhealthy"]);
}

#[test]
fn without_a_daemon_devices_stay_and_are_unhealthy() {
    let mount = Mount::with_dataplane();
    let (kubelet, _plugin) = start(&mount);
    for _ in 0..2 {
        until_health("the daemon answers", &kubelet, HEALTHY);
        mount.stop();
        until_health("it is stopped", &kubelet, UNHEALTHY);
        mount.start();
        until_health("it answers again", &kubelet, HEALTHY);
        mount.kill_daemon();
        until_health("it is dead", &kubelet, UNHEALTHY);
        assert!(kubelet.resource(DATAPLANE).is_watched);
        mount.start();
    }
    assert_eq!(kubelet.resource(DATAPLANE).registrations, 1);
}

#[test]
fn a_plugin_that_starts_before_the_daemon_waits_for_it() {
    let mount = Mount::not_mounted();
    let (kubelet, _plugin) = start(&mount);
    mount.start();
    mount.make_pool("dataplane", true, &["0", "1"]);
    until_health("there are lists", &kubelet, HEALTHY);
}

#[test]
fn devices_of_a_mount_that_hangs_are_unhealthy_and_the_plugin_can_end() {
    let mount = Mount::with_dataplane();
    let (kubelet, mut plugin) = start(&mount);
    until_health("it answers", &kubelet, HEALTHY);
    let paused = mount.pause();
    until_health("it does not answer", &kubelet, UNHEALTHY);
    // The kubelet is answered all the same.
    assert!(kubelet.allocate(DATAPLANE, &[&["0"]]).is_ok());
    drop(paused);
    until_health("it answers again", &kubelet, HEALTHY);
    let paused = mount.pause();
    until_health("it does not answer again", &kubelet, UNHEALTHY);
    signal(plugin.pid(), Signal::SIGTERM);
    assert_eq!(plugin.child().wait().unwrap().code(), Some(0));
    drop(paused);
}

#[test]
fn a_kubelet_that_starts_again_is_told_again() {
    let mount = Mount::with_dataplane();
    // The plugin may also start first.
    fs::create_dir(directory(&mount)).unwrap();
    let _plugin = Sleeper::spawn(plugin(&mount).stderr(Stdio::null()));
    for _ in 0..3 {
        let kubelet = Kubelet::start(&directory(&mount));
        until_health("it is registered", &kubelet, HEALTHY);
        assert!(kubelet.allocate(DATAPLANE, &[&["0"]]).is_ok());
        drop(kubelet);
        fs::remove_file(directory(&mount).join("kubelet.sock")).unwrap();
    }
}

#[test]
fn a_refused_registration_is_said_once_and_tried_again() {
    let mount = Mount::with_dataplane();
    let kubelet = Kubelet::start(&directory(&mount));
    kubelet.refuse(Some("the ResourceName is invalid"));
    let mut plugin = Sleeper::spawn(plugin(&mount).stderr(Stdio::piped()));
    let mut lines = BufReader::new(plugin.child().stderr.take().unwrap()).lines();
    let expected = format!(
        "ERROR:root:{}: the kubelet refuses the registration: the ResourceName is invalid",
        kubelet.socket().display()
    );
    assert_eq!(lines.next().unwrap().unwrap(), expected);
    kubelet.refuse(None);
    until_health("it is registered", &kubelet, HEALTHY);
    signal(plugin.pid(), Signal::SIGTERM);
    assert_eq!(lines.map(Result::unwrap).collect::<Vec<_>>(), [""; 0], "each problem is said once");
}

#[test]
fn sockets_are_removed_at_the_end_and_taken_over_from_a_dead_plugin() {
    let mount = Mount::with_dataplane();
    let (kubelet, mut first) = start(&mount);
    until_health("it is registered", &kubelet, HEALTHY);
    let socket = directory(&mount).join("kcm-dataplane.sock");
    assert_eq!(kubelet.resource(DATAPLANE).socket, socket);
    // A second one does not take it away.
    let mut second = Sleeper::spawn(plugin(&mount).stderr(Stdio::piped()));
    let mut lines = BufReader::new(second.child().stderr.take().unwrap()).lines();
    let served = format!(
        "ERROR:root:{}: another process serves it; is there another kcm device-plugin?",
        socket.display()
    );
    assert_eq!(lines.next().unwrap().unwrap(), served);
    second.collect();
    // One that is killed leaves its socket, and the next one makes it again.
    signal(first.pid(), Signal::SIGKILL);
    first.child().wait().unwrap();
    until_health("the plugin is away", &kubelet, UNHEALTHY);
    assert!(socket.exists());
    for end in [Signal::SIGTERM, Signal::SIGINT] {
        let mut next = Sleeper::spawn(&mut plugin(&mount));
        until_health("the next one is registered", &kubelet, HEALTHY);
        signal(next.pid(), end);
        assert_eq!(next.child().wait().unwrap().code(), Some(0));
        assert!(!socket.exists() && kubelet.socket().exists());
        until_health("the plugin is away again", &kubelet, UNHEALTHY);
    }
}

#[test]
fn foreign_bytes_on_its_socket_harm_nobody() {
    let mount = Mount::with_dataplane();
    let (kubelet, mut plugin) = start(&mount);
    until_health("it is registered", &kubelet, HEALTHY);
    let socket = kubelet.resource(DATAPLANE).socket;
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".as_slice();
    let long = [preface, &[0xff; 1 << 20]].concat();
    for bytes in [b"GET / HTTP/1.1\r\n\r\n".as_slice(), preface, &[0; 64], &long] {
        let mut stream = UnixStream::connect(&socket).unwrap();
        // The plugin may have closed it before all is written.
        let _ = stream.write_all(bytes);
    }
    // More connections than it serves at a time, which end again.
    let silent: Vec<UnixStream> = (0..40).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    drop(silent);
    assert!(kubelet.allocate(DATAPLANE, &[&["0"]]).is_ok());
    assert!(plugin.child().try_wait().unwrap().is_none());
    assert_eq!(kubelet.resource(DATAPLANE).registrations, 1);
}

#[test]
fn a_plain_directory_has_no_devices() {
    let mount = Mount::not_mounted();
    fs::create_dir_all(mount.conf().join("pools/dataplane/0")).unwrap();
    let _kubelet = Kubelet::start(&directory(&mount));
    let mut plugin = Sleeper::spawn(plugin(&mount).stderr(Stdio::piped()));
    let mut lines = BufReader::new(plugin.child().stderr.take().unwrap()).lines();
    let expected = format!(
        "ERROR:root:{}: a plain directory; this needs kcm mount, so run that first; nothing is allocated until then",
        mount.conf().display()
    );
    assert_eq!(lines.next().unwrap().unwrap(), expected);
}

#[test]
fn discover_leaves_the_slots_to_the_kubelet() {
    const NODE: &str = "/api/v1/nodes/n1";
    let (server, mount) = (ApiServer::start(), Mount::with_dataplane());
    let both = json!({ "cpu": "2", DATAPLANE: "2", "pod.alpha.kubernetes.io/opaque-int-resource-kcm": "2" });
    let kubelets = json!({ "cpu": "2", DATAPLANE: "2" });
    let node = json!({
        "kind": "Node", "apiVersion": "v1", "metadata": { "name": "n1" },
        "status": { "capacity": both, "allocatable": both },
    });
    server.put(NODE, node);
    let discover = |interval: &str| {
        let mut command = mount.kcm(&["discover", "--resource-name=none", interval]);
        command
            .env("KUBECONFIG", server.kubeconfig(ADMIN))
            .env("NODE_NAME", "n1")
            .env("KCM_LOG_LEVEL", "ERROR");
        command
    };
    let node = || server.object(NODE).unwrap();
    let (_, err, code) = run(&mut discover("--interval=0"));
    assert_eq!((err.as_str(), code), ("", Some(0)));
    for part in ["capacity", "allocatable"] {
        assert_eq!(node()["status"][part], kubelets, "only the legacy slots are removed");
    }
    assert_eq!(node()["metadata"]["labels"]["kcm.intel.com/kcm-node"], "true");
    assert_eq!(node()["spec"]["taints"][0]["key"], "kcm");
    // They also stay while the daemon is away: the plugin says that to the kubelet.
    let _running = Sleeper::spawn(discover("--interval=0.05").stderr(Stdio::null()));
    mount.stop();
    let event = "/api/v1/namespaces/default/events/n1.kcmunavailable";
    until("there is an Event", || server.object(event).is_some());
    assert_eq!(node()["status"]["capacity"], kubelets);
}
