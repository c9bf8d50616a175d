//! The uid 0 is not the node's root: configuring needs `CAP_SYS_ADMIN` in the daemon's user namespace, and claims for
//! other processes need what sched_setaffinity(2) needs. Both the opener and the writer are asked.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use nix::errno::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};

use crate::harness::{Mount, NOBODY, Shell, Sleeper, errno, set_mode, write};

/// A process that is root, without any capability.
const BARE: [&str; 4] = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--"];
/// The reason of a refusal to configure.
const ADMIN: &str =
    "EPERM: this needs CAP_SYS_ADMIN on the node, whatever uid and modes say; do it as root of the node";

const NO_POOLS: &str = r#"{"pools":{}}"#;

fn keep(wanted: CapabilitySet) {
    let capabilities = wanted.intersection(rustix::thread::capabilities(None).unwrap().permitted);
    let inheritable = CapabilitySet::empty();
    let sets = CapabilitySets { effective: capabilities, permitted: capabilities, inheritable };
    set_capabilities(None, sets).expect("fewer capabilities than before");
}

/// Runs `work` in a thread that is root and has only these capabilities.
fn with<T: Send>(capabilities: CapabilitySet, work: impl FnOnce() -> T + Send) -> T {
    let limited = || {
        keep(capabilities);
        work()
    };
    std::thread::scope(|scope| scope.spawn(limited).join()).expect("the work")
}

fn bare<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    with(CapabilitySet::empty(), work)
}

fn reason(mount: &Mount) -> String {
    mount.read("self/last_error").trim_end().splitn(3, ' ').nth(2).unwrap_or_default().to_owned()
}

/// Every operation that configures, and reading events, with its name.
fn administer(mount: &Mount) -> Vec<(&'static str, io::Result<()>)> {
    let pool = mount.pool("dataplane");
    let mode = <fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o666);
    vec![
        ("mkdir of a pool", fs::create_dir(mount.pool("new"))),
        ("mkdir of a list", fs::create_dir(mount.pool("infra").join("1"))),
        ("exclusive", write(&pool.join("exclusive"), "0")),
        ("partial", write(&pool.join("partial"), "1")),
        ("mv of a list", {
            let (here, there) = (pool.join("0"), mount.pool("infra").join("0"));
            fs::rename(&here, &there).and_then(|()| fs::rename(&there, &here))
        }),
        ("transient", write(&pool.join("transient"), "1")),
        ("mode", write(&pool.join("mode"), "affinity")),
        ("draining", write(&pool.join("0/state"), "drain")),
        ("mv of a pool", fs::rename(mount.pool("extra"), mount.pool("renamed"))),
        ("chmod", fs::set_permissions(pool.join("tasks"), mode)),
        ("chgrp", chown(pool.join("tasks"), None, Some(0))),
        ("rmdir of a list", fs::remove_dir(pool.join("0"))),
        ("rmdir of a pool", fs::remove_dir(mount.pool("empty"))),
        ("acknowledging", write(&mount.conf().join("info/reclaimed"), "1")),
        ("reading events", File::open(mount.conf().join("info/events")).map(drop)),
        ("a whole configuration", write(&mount.conf().join("info/config"), NO_POOLS)),
    ]
}

fn mount() -> Mount {
    let mount = Mount::new();
    mount.make_pool("dataplane", true, &["0"]);
    mount.make_pool("infra", false, &[]);
    mount.make_pool("empty", false, &[]);
    mount.make_pool("extra", false, &[]);
    mount
}

#[test]
fn uid_0_without_the_capability_does_not_configure() {
    let mount = mount();
    let all_but_admin = CapabilitySet::all().difference(CapabilitySet::SYS_ADMIN);
    for capabilities in [CapabilitySet::empty(), all_but_admin] {
        with(capabilities, || {
            for (operation, result) in administer(&mount) {
                assert_eq!(errno(result), Errno::EPERM, "{operation}");
                assert_eq!(reason(&mount), ADMIN, "{operation}");
            }
        });
    }
    with(CapabilitySet::SYS_ADMIN, || {
        for (operation, result) in administer(&mount) {
            assert!(result.is_ok(), "{operation}: {result:?}");
        }
    });
}

#[test]
fn root_of_a_container_does_not_configure() {
    let mount = mount();
    let bare = BARE.join(" ");
    let namespaces = "unshare --pid --fork --mount-proc --kill-child";
    for start in
        [format!("exec {namespaces} {bare} bash"), format!("exec {namespaces} --user --map-root-user bash")]
    {
        let mut container = Shell::start(&mut mount.bash(&start));
        for line in [
            "mkdir $C/pools/new",
            "mkdir $C/pools/infra/1",
            "rmdir $C/pools/dataplane/0",
            "echo 0 > $C/pools/dataplane/exclusive",
            "echo drain > $C/pools/dataplane/0/state",
            "mv $C/pools/infra $C/pools/other",
            "mv $C/pools/dataplane/0 $C/pools/infra/0",
            "echo '{\"pools\":{}}' > $C/info/config",
            "chmod 666 $C/pools/dataplane/tasks",
            "cat $C/info/events",
            "echo 1 > $C/info/reclaimed",
        ] {
            let printed = container.ask(&format!("{{ {line}; }} 2>&1"));
            assert!(printed.trim_end().ends_with("Operation not permitted"), "{start}: {line}: {printed}");
            let why = container.ask("cat $C/self/last_error");
            assert!(why.trim_end().ends_with(ADMIN), "{start}: {line}: {why}");
        }
        let claim =
            "echo $$ > $C/pools/dataplane/tasks && cat $C/self/claim; echo -$$ > $C/pools/dataplane/tasks";
        assert_eq!(container.ask(claim), "dataplane 0\n", "{start}: for itself it may claim");
        let child = "sleep 1000 >/dev/null & echo $! > $C/pools/dataplane/tasks && echo claimed; kill $!";
        assert_eq!(container.ask(child), "claimed\n", "{start}: and for its children");
    }
    assert_eq!(mount.read("pools/dataplane/exclusive"), "1\n");
}

#[test]
fn exclusive_and_acknowledging_need_the_capability_at_open_and_at_write() {
    let mount = mount();
    let files = [
        ("pools/dataplane/exclusive", "0"),
        ("pools/dataplane/0/state", "drain"),
        ("info/reclaimed", "1"),
        ("info/config", NO_POOLS),
    ];
    for (file, text) in files {
        let open = || File::options().write(true).open(mount.conf().join(file)).unwrap();
        let put = |mut file: &File| file.write(text.as_bytes());
        let (by_root, by_bare) = (open(), bare(open));
        assert_eq!(errno(bare(|| put(&by_root))), Errno::EPERM, "{file}: opened by root");
        assert_eq!(errno(put(&by_bare)), Errno::EPERM, "{file}: written by root");
        let dropped = with(CapabilitySet::all(), || {
            let file = open();
            keep(CapabilitySet::empty());
            put(&file)
        });
        assert_eq!(errno(dropped), Errno::EPERM, "{file}: dropped in between");
        mount.replace_worker();
        assert_eq!(errno(put(&by_bare)), Errno::EPERM, "{file}: the next worker knows the opener");
        assert_eq!(put(&by_root).unwrap(), text.len(), "{file}");
    }
}

#[test]
fn events_stay_open_for_a_reader_that_drops_its_capability() {
    let mount = mount();
    let _ = write(&mount.tasks("dataplane", "0"), "nonsense");
    let events = with(CapabilitySet::all(), || {
        let file = File::open(mount.conf().join("info/events")).unwrap();
        keep(CapabilitySet::empty());
        io::read_to_string(file).unwrap()
    });
    assert!(events.contains("nonsense"), "{events}");
}

#[test]
fn a_claim_for_another_process_needs_what_sched_setaffinity_needs() {
    let mount = mount();
    let list = mount.tasks("dataplane", "0");
    set_mode(&list, 0o666);
    let nobodys = Sleeper::spawn(Command::new("sleep").arg("1000").uid(NOBODY).gid(NOBODY));
    let roots = Sleeper::new();
    let bares = Sleeper::spawn(Command::new(BARE[0]).args(&BARE[1..]).args(["sleep", "1000"]));
    crate::harness::until("it has no capability", || {
        let status = fs::read_to_string(format!("/proc/{}/status", bares.pid())).unwrap();
        status.contains("CapPrm:\t0000000000000000") && status.contains("sleep")
    });
    let nice = CapabilitySet::SYS_NICE;
    for (capabilities, task, may, why) in [
        (CapabilitySet::empty(), &nobodys, false, "uid 0 owns nobody's process no more than others"),
        (CapabilitySet::empty(), &roots, false, "the process has more capabilities"),
        (CapabilitySet::empty(), &bares, true, "of the same user, without capabilities"),
        (CapabilitySet::SYS_ADMIN, &roots, false, "the wrong capability"),
        (nice, &nobodys, true, "CAP_SYS_NICE"),
        (nice, &roots, true, "CAP_SYS_NICE"),
    ] {
        let (pid, text) = (task.pid().to_string(), format!("-{}", task.pid()));
        let results = with(capabilities, || {
            let kernel = nix::sched::sched_setaffinity(
                nix::unistd::Pid::from_raw(task.pid() as i32),
                &nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0)).unwrap(),
            );
            (kernel.is_ok(), write(&list, &pid).is_ok(), write(&list, &text).is_ok())
        });
        assert_eq!(results, (may, may, may), "{why}: the kernel, a claim, a release");
    }
    let open = || File::options().write(true).open(&list).unwrap();
    let put = |mut file: &File| file.write(nobodys.pid().to_string().as_bytes());
    let (by_root, by_bare) = (open(), bare(open));
    assert_eq!(errno(bare(|| put(&by_root))), Errno::EPERM, "opened by root");
    assert_eq!(errno(put(&by_bare)), Errno::EPERM, "written by root");
    assert_eq!(mount.read("pools/dataplane/0/tasks"), "");
    let why = reason(&mount);
    assert!(why.starts_with("EPERM: uid 0 does not own the process"), "{why}");
    put(&by_root).unwrap();
    assert_eq!(mount.read("pools/dataplane/0/tasks"), format!("{}\n", nobodys.pid()));
}
