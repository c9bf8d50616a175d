//! The image of `deploy/Dockerfile`: one static file. Each container of the DaemonSet does its work in a read-only root
//! directory with only that file, with the arguments, rights and credentials of the manifest.

use std::fs;
use std::path::Path;

use super::api_server::deployed::{deployed, manifest};
use crate::harness::{KCM, Machine, Mount, Shell, require_static_kcm, until};
use serde_json::json;

fn file(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn the_image_contains_the_release_binary() {
    let dockerfile = file("deploy/Dockerfile");
    let lines: Vec<&str> = dockerfile.lines().filter(|line| !line.starts_with('#')).collect();
    let [from, copy, entry] = lines.try_into().expect("three lines");
    assert_eq!((from, entry), ("FROM scratch", "ENTRYPOINT [\"/kcm\"]"));
    let [_, source, "/kcm"] = copy.split(' ').collect::<Vec<_>>()[..] else { panic!("{copy}") };
    assert_eq!(source, "target/static/kcm");
    assert!(file("scripts/common.sh").contains("/release/kcm\" target/static/kcm"), "scripts/build makes it");
    assert!(file("deploy/Dockerfile.dockerignore").ends_with(&format!("\n*\n!{source}\n")));
    for probe in ["daemonset.yaml"].iter().flat_map(|name| manifest(name)) {
        assert!(
            probe.to_string().contains(r#""command":["/kcm","status","--alive""#),
            "the probe runs the program of the image"
        );
    }
}

#[test]
fn the_program_is_static() {
    require_static_kcm();
    let bytes = fs::read(KCM).unwrap();
    let number = |at: usize, size: usize| {
        bytes[at..at + size].iter().rev().fold(0_usize, |number, &byte| number << 8 | usize::from(byte))
    };
    assert_eq!(&bytes[..5], b"\x7fELF\x02");
    let (headers, size, count) = (number(32, 8), number(54, 2), number(56, 2));
    let kinds: Vec<usize> = (0..count).map(|index| number(headers + index * size, 4)).collect();
    const PT_LOAD: usize = 1;
    const PT_INTERP: usize = 3;
    assert!(kinds.contains(&PT_LOAD) && !kinds.contains(&PT_INTERP), "{kinds:?}");
}

#[test]
fn the_daemonset_works_with_only_the_program() {
    require_static_kcm();
    let (server, node) = (deployed(), Mount::not_mounted());
    let account = node.home().join("account");
    fs::create_dir(&account).unwrap();
    fs::write(account.join("token"), "kcm-node").unwrap();
    fs::write(account.join("ca.crt"), server.certificate()).unwrap();
    fs::write(account.join("namespace"), "kcm-system").unwrap();
    let machine = Machine { cmdline: "isolcpus=0-4", ..Machine::new(1, 8, 1) };
    machine.write(&node.home().join("machine"));
    let daemon_set = manifest("daemonset.yaml").remove(0);
    let pod = &daemon_set["spec"]["template"]["spec"];
    let container = |name: &str| {
        let mut all = ["initContainers", "containers"].iter().flat_map(|kind| pod[kind].as_array().unwrap());
        all.find(|one| one["name"] == name).expect(name).clone()
    };
    let words = |name: &str| {
        let args = container(name)["args"].as_array().unwrap().clone();
        // One run is enough.
        let args = args.iter().map(|arg| arg.as_str().unwrap()).filter(|arg| !arg.starts_with("--interval"));
        args.collect::<Vec<_>>().join(" ")
    };

    let mut shell =
        Shell::start(&mut node.bash("exec unshare --mount --pid --fork --kill-child --mount-proc bash"));
    let root = node.home().join("root").display().to_string();
    let account_dir = "run/secrets/kubernetes.io/serviceaccount";
    let said = shell.ask(&format!(
        "exec 2>&1; set -e; R={root}; H={}; mkdir $R; mount -t tmpfs none $R; cp $KCM $R/kcm; cd $R
         mkdir -p proc sys dev machine var/lib/kcm run/kcm {account_dir}; ln -s /run var/run
         mount -t proc proc proc; mount --rbind /sys sys; mount --rbind /dev dev; mount --rbind $H/machine machine
         mount --bind $H/account {account_dir}; for D in run/kcm var/lib/kcm; do mount -t tmpfs -o mode=755 none $D; done
         mount -o remount,ro $R; set +e; touch $R/x",
        node.home().display()
    ));
    assert!(said.contains("Read-only file system"), "{said}");
    let address = server.address();
    let environment = format!(
        "env -i PATH=$PATH NODE_NAME=n1 KCM_DEV_LSCPU_SYSFS=/machine KUBERNETES_SERVICE_HOST={} KUBERNETES_SERVICE_PORT={}",
        address.ip(),
        address.port()
    );
    let kcm = format!("{environment} chroot $R /kcm");
    shell.ask(&format!("{kcm} {} >$H/mount.log 2>&1 &", words("mount")));
    let probe = container("mount")["startupProbe"]["exec"]["command"].clone();
    let probe: Vec<&str> = probe.as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect();
    let probe = format!("{environment} chroot $R {} >/dev/null 2>&1 && echo it answers", probe.join(" "));
    until("the startup probe is answered", || shell.ask(&probe) == "it answers\n");
    for name in ["init", "discover", "node-report", "reconcile"] {
        let said = shell.ask(&format!("{kcm} {}; echo @$?", words(name)));
        assert!(said.ends_with("@0\n"), "{name}: {said}");
    }
    // init has chosen how many cores suit the node.
    let lists = shell.ask("ls -d $R/run/kcm/conf/pools/dataplane/[0-9]* | wc -l");
    let lists: usize = lists.trim().parse().unwrap();
    assert!(lists > 0);
    let node = server.object("/api/v1/nodes/n1").unwrap();
    assert_eq!(node["status"]["capacity"], json!({ "kcm.intel.com/dataplane": lists.to_string() }));
    let report = server.object("/apis/kcm.intel.com/v1/namespaces/default/nodereports/n1").unwrap();
    assert_eq!(report["summary"]["exclusiveFree"], format!("{lists}/{lists}"));
    // Pools that people have changed are the configuration: the next pod starts with them.
    shell.ask("mkdir $R/run/kcm/conf/pools/own && rmdir $R/run/kcm/conf/pools/controlplane/*");
    let said = shell.ask(&format!("{kcm} {}; echo @$?", words("init")));
    assert!(said.ends_with("@0\n"), "{said}");
    assert!(server.object("/apis/kcm.intel.com/v1/namespaces/default/reconcilereports/n1").is_some());

    // docs/kubernetes.md uninstalls in the container reconcile.
    assert!(file("docs/kubernetes.md").contains("-c reconcile -- /kcm uninstall --conf-dir=/run/kcm/conf\n"));
    let said = shell.ask(&format!("{kcm} uninstall --conf-dir=/run/kcm/conf; echo @$?"));
    assert!(said.ends_with("@0\n"), "{said}");
    let said = shell.ask(&format!("{kcm} {}; echo @$?", words("discover")));
    assert!(said.contains("Dataplane pool does not exist") && said.ends_with("@1\n"), "{said}");
    let node = server.object("/api/v1/nodes/n1").unwrap();
    assert_eq!(node["status"]["capacity"], json!({}));
    assert_eq!(node["spec"]["taints"], json!([]));
    // The kubelet ends the mount last.
    let said = shell.ask("kill %1; wait %1; echo @$?; ls $R/run/kcm/conf");
    assert!(said.starts_with("@0\n"), "{said}");
}
