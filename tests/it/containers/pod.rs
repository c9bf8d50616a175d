//! A pod that asks for a list: what the device plugin answers the kubelet, given to a runtime, is a container on that list.

use std::process::Command;

use super::Node;
use crate::harness::{Sleeper, masks, run, signal, until};
use crate::kubernetes::device_plugin::kubelet::Kubelet;
use crate::kubernetes::device_plugin::{directory, plugin};
use nix::sys::signal::Signal;

#[test]
fn an_allocated_device_is_a_container_on_that_list() {
    let node = Node::new("dp", true, &["0", "1"]);
    let resource = format!("kcm.intel.com/{}", node.pool);
    let kubelet = Kubelet::start(&directory(&node.mount));
    let _plugin = Sleeper::spawn(&mut plugin(&node.mount));
    until("there are devices", || kubelet.devices(&resource).len() == 2);
    let allocated = kubelet.allocate(&resource, &[&["1"]]).unwrap();
    let device = format!("--device={}", allocated[0][0]);
    // As a pod of the level `restricted` has it.
    let restricted = ["--detach", "--cap-drop=ALL", "--security-opt=no-new-privileges"];
    // As the kubelet names the cgroup of a pod.
    let pod = format!("/{}/pod8c4d93c1-01d0-4d0b-9e2a-6a1d5f1f3a77", node.cgroup.name());
    let parent = format!("--cgroup-parent={pod}");
    let options = [&restricted[..], &[&device, &parent]].concat();
    let line = "echo $KCM_CPUS_ASSIGNED > /tmp/list; exec sleep 1000";
    let (id, err, code) = run(&mut node.container(&options, &["sh", "-c", line]));
    assert_eq!(code, Some(0), "{err}");
    let pid = node.pid(id.trim());
    assert_eq!((node.held("1"), masks(pid)), (vec![pid], vec!["1".to_owned()]));
    let (list, err, _) = run(&mut node.podman(&["exec", id.trim(), "cat", "/tmp/list"]));
    assert_eq!(list, "1\n", "{err}");
    // The kubelet keeps the device of the pod, also when nobody else could have it.
    let pool = node.mount.pool(&node.pool);
    for list in ["0", "1"] {
        std::fs::write(pool.join(list).join("state"), "drain").unwrap();
    }
    let health = || kubelet.devices(&resource).iter().map(|it| it[..9].to_owned()).collect::<Vec<_>>();
    until("the free list is unhealthy", || health() == ["0 Unhealt", "1 Healthy"]);
    signal(pid, Signal::SIGKILL);
    until("both are unhealthy", || health() == ["0 Unhealt", "1 Unhealt"]);
}

#[test]
fn a_container_in_a_user_namespace_gets_its_list() {
    // As `hostUsers: false` makes it: root of the container is another user of the machine.
    let node = Node::new("dp", true, &["1"]);
    node.mount.let_everybody_in();
    let (_, err, code) = run(Command::new("chown").args(["-R", "100000:100000"]).arg(node.root()));
    assert_eq!(code, Some(0), "{err}");
    let device = format!("--device={}", node.device("1"));
    let maps = ["--uidmap=0:100000:65536", "--gidmap=0:100000:65536"];
    let options = [&["--rm", "--cap-drop=ALL", &device][..], &maps].concat();
    let line = "cat /proc/self/uid_map; grep Cpus_allowed_list /proc/self/status; echo $KCM_CPUS_ASSIGNED";
    let (out, err, code) = run(&mut node.container(&options, &["sh", "-c", line]));
    let words: Vec<&str> = out.split_whitespace().collect();
    assert_eq!(
        (words, code),
        (vec!["0", "100000", "65536", "Cpus_allowed_list:", "1", "1"], Some(0)),
        "{err}"
    );
}
