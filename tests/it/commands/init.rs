//! `kcm init` creates the same pools on a mount and on a plain directory: whole cores, from the isolated CPUs. A
//! refused init leaves nothing behind; an interrupted init is completed by the next one.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::harness::dir::failure;
use crate::harness::{Machine, Mount, data, kcm_for, run};
use tempfile::TempDir;

/// Nothing is configured: the directory does not exist, or it is an empty mount. With a machine.
pub struct Place {
    _home: Option<TempDir>,
    pub mount: Option<Mount>,
    pub conf: PathBuf,
    root: PathBuf,
}

impl Place {
    pub fn plain(machine: &Machine) -> Self {
        let home = tempfile::tempdir().unwrap();
        let (conf, root) = (home.path().join("conf"), home.path().join("machine"));
        machine.write(&root);
        Self { _home: Some(home), mount: None, conf, root }
    }

    pub fn mounted(machine: &Machine) -> Self {
        let mount = Mount::on_machine(machine);
        let (conf, root) = (mount.conf(), mount.home().join("machine"));
        Self { _home: None, mount: Some(mount), conf, root }
    }

    pub fn both(machine: &Machine) -> [Self; 2] {
        [Self::mounted(machine), Self::plain(machine)]
    }

    pub fn kcm(&self, words: &[&str]) -> Command {
        let mut command = kcm_for(&self.conf, words);
        command.env("KCM_DEV_LSCPU_SYSFS", &self.root).env("KCM_PROC_FS", self.root.join("proc"));
        command
    }

    /// Runs an init that must succeed; returns its messages.
    pub fn init(&self, flags: &[&str]) -> String {
        let (out, err, status) = run(self.kcm(&["init"]).args(flags));
        assert_eq!((out.as_str(), status), ("", Some(0)), "{err}");
        err
    }

    fn describe(&self) -> String {
        let (out, err, status) = run(&mut self.kcm(&["describe"]));
        assert_eq!((err.as_str(), status), ("", Some(0)));
        out
    }

    /// `pool: list list`, with a star for an exclusive pool.
    pub fn pools(&self) -> Vec<String> {
        let described: serde_json::Value = serde_json::from_str(&self.describe()).unwrap();
        let pool = |(name, pool): (&String, &serde_json::Value)| {
            let lists: Vec<&str> = pool["cpuLists"].as_object().unwrap().keys().map(String::as_str).collect();
            let star = if pool["exclusive"] == true { "*" } else { "" };
            format!("{name}{star}: {}", lists.join(" "))
        };
        described["pools"].as_object().unwrap().iter().map(pool).collect()
    }

    /// Removes all pools.
    fn clear(&self) {
        if self.mount.is_none() {
            fs::remove_dir_all(&self.conf).unwrap();
            return;
        }
        for pool in directories(&self.conf.join("pools")) {
            directories(&pool).iter().for_each(|list| fs::remove_dir(list).unwrap());
            fs::remove_dir(pool).unwrap();
        }
    }
}

fn directories(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.is_dir()).collect()
}

/// Everything below a plain directory.
fn content(path: &Path) -> BTreeMap<PathBuf, Option<String>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(path).into_iter().flatten().map(|entry| entry.unwrap().path()) {
        if entry.is_dir() {
            found.extend(content(&entry));
            found.insert(entry, None);
        } else {
            found.insert(entry.clone(), Some(fs::read_to_string(&entry).unwrap()));
        }
    }
    found
}

pub fn machine(sockets: u32, cores: u32, cmdline: &'static str) -> Machine {
    Machine { cmdline, ..Machine::new(sockets, cores, 2) }
}

const EXAMPLE: &str = "net.ifnames=0 isolcpus=0,1,2,3,4,8,9,10,11,12";

#[test]
fn the_legacy_example_is_the_same_on_both() {
    for place in Place::both(&machine(1, 8, EXAMPLE)) {
        place.init(&["--num-dp-cores=4", "--num-cp-cores=1"]);
        assert_eq!(place.describe(), data("init-2017.json", &[("conf", place.conf.to_str().unwrap())]));
    }
}

#[test]
fn a_machine_without_lscpu_gets_the_same_pools() {
    for cmdline in [EXAMPLE, ""] {
        let with = Place::plain(&machine(2, 4, cmdline));
        with.init(&["--num-dp-cores=2"]);
        let without = Place::plain(&machine(2, 4, cmdline));
        let (_, err, status) = run(without.kcm(&["init", "--num-dp-cores=2"]).env("PATH", "/nowhere"));
        assert_eq!(status, Some(0), "{err}");
        assert_eq!(without.pools(), with.pools());
    }
}

#[test]
fn cores_are_taken_by_socket_then_by_core() {
    for (sockets, cores, flags, expected) in [
        (2, 4, [1, 1], ["controlplane: 1,9", "dataplane*: 0,8", "infra: 2-7,10-15"]),
        (2, 2, [3, 0], ["controlplane: ", "dataplane*: 0,4 1,5 2,6", "infra: 3,7"]),
        (4, 1, [2, 1], ["controlplane: 2,6", "dataplane*: 0,4 1,5", "infra: 3,7"]),
    ] {
        for place in Place::both(&machine(sockets, cores, "")) {
            place.init(&[&*format!("--num-dp-cores={}", flags[0]), &*format!("--num-cp-cores={}", flags[1])]);
            assert_eq!(place.pools(), expected);
        }
    }
}

#[test]
fn isolcpus_is_read_as_the_kernel_reads_it() {
    // Asks for two of the eight cores. If the first isolated ones are not 0 and 1, `isolcpus` was understood.
    let nothing = ["controlplane: 1,9", "dataplane*: 0,8", "infra: 2-7,10-15"];
    let two = ["controlplane: 5,13", "dataplane*: 4,12", "infra: 0-3,6-11,14-15"];
    for (cmdline, expected) in [
        ("isolcpus=4,5,12,13", two),
        ("isolcpus=4-5,12-13", two),
        ("quiet isolcpus=domain,managed_irq,4-5,12-13 ro", two),
        ("isolcpus=4-15:2/8", two),
        ("isolcpus=\"4,5, 12-13\"", two),
        ("isolcpus=5-4 isolcpus=4,5,12,13", two),
        ("isolcpus=nohz,4,5,12,13", nothing),
        ("-- isolcpus=4,5,12,13", nothing),
        ("isolcpus=4,5,12,13-x", nothing),
        ("nohz_full=4,5,12,13", nothing),
        ("isolcpus=6-7,14-N", ["controlplane: 7,15", "dataplane*: 6,14", "infra: 0-5,8-13"]),
    ] {
        let place = Place::plain(&machine(1, 8, cmdline));
        place.init(&["--num-dp-cores=1"]);
        assert_eq!(place.pools(), expected, "{cmdline}");
    }
}

#[test]
fn a_count_of_0_makes_a_pool_without_lists() {
    for place in Place::both(&machine(1, 4, "")) {
        place.init(&["--num-dp-cores=0", "--num-cp-cores=0"]);
        assert_eq!(place.pools(), ["controlplane: ", "dataplane*: ", "infra: 0-7"]);
        assert!(place.init(&["--num-dp-cores=0", "--num-cp-cores=0"]).contains("already exists"));
        let mut command = place.kcm(&["init", "--num-dp-cores=1", "--num-cp-cores=0"]);
        let line = failure(command.env("KCM_LOG_LEVEL", "ERROR"));
        assert_eq!(line, "0 dataplane cores (1 requested)");
    }
}

#[test]
fn a_second_init_changes_nothing() {
    for place in Place::both(&machine(1, 8, EXAMPLE)) {
        place.init(&[]);
        let before = content(&place.conf.join("pools"));
        for _ in 0..2 {
            assert!(place.init(&[]).ends_with("INFO:root:Configuration directory already exists.\n"));
            assert_eq!(content(&place.conf.join("pools")), before);
        }
    }
}

/// Flags with which init is refused on eight cores of which five, or none, are isolated.
const REFUSED: [(&str, &[&str]); 5] = [
    ("", &["--num-dp-cores=99"]),
    ("", &["--num-dp-cores=8"]),
    ("", &["--num-dp-cores=7"]),
    (EXAMPLE, &["--num-dp-cores=5"]),
    (EXAMPLE, &["--num-cp-cores=18446744073709551615"]),
];

#[test]
fn a_refused_init_leaves_nothing_behind() {
    for (cmdline, flags) in REFUSED {
        let refused = |place: &Place| {
            failure(place.kcm(&["init"]).args(flags).env("KCM_LOG_LEVEL", "ERROR"));
        };
        let [mounted, plain] = Place::both(&machine(1, 8, cmdline));
        refused(&mounted);
        assert_eq!(directories(&mounted.conf.join("pools")), Vec::<PathBuf>::new());
        refused(&plain);
        assert!(!plain.conf.exists());
        fs::create_dir(&plain.conf).unwrap();
        refused(&plain);
        assert_eq!(content(&plain.conf), BTreeMap::new());
        // The next init finds an empty directory again.
        plain.init(&["--num-dp-cores=1", "--num-cp-cores=0"]);
        mounted.init(&["--num-dp-cores=1", "--num-cp-cores=0"]);
        assert_eq!(plain.pools(), mounted.pools());
    }
}

#[test]
fn an_init_on_a_full_disk_leaves_nothing_behind() {
    let place = Place::plain(&machine(1, 8, EXAMPLE));
    let home = place.conf.parent().unwrap();
    // From too few inodes for anything to one too few for everything.
    for inodes in 2..22 {
        let script = format!(
            "mkdir -p disk && mount -t tmpfs -o nr_inodes={inodes} tmpfs disk && {{
                \"$KCM\" init --conf-dir=disk/conf && exit 9; ls -A disk | grep -q . && exit 8
                mkdir disk/conf || exit 0; \"$KCM\" init --conf-dir=disk/conf && exit 7
                ls -A disk/conf | grep -qvx lock && exit 6; exit 0; }}"
        );
        let mut command = Command::new("unshare");
        command.args(["--mount", "bash", "-c", &script]).env("KCM", crate::harness::KCM).current_dir(home);
        command.env("KCM_DEV_LSCPU_SYSFS", &place.root).env("KCM_PROC_FS", place.root.join("proc"));
        let (out, err, status) = run(&mut command);
        assert_eq!((out.as_str(), status), ("", Some(0)), "{inodes} inodes: {err}");
        assert!(err.contains("No space left on device; free some disk space"), "{inodes} inodes: {err}");
    }
}

#[test]
fn a_directory_with_other_content_is_refused() {
    let place = Place::plain(&machine(1, 8, ""));
    fs::create_dir(&place.conf).unwrap();
    fs::write(place.conf.join("precious"), "data").unwrap();
    let before = content(&place.conf);
    let line = failure(place.kcm(&["init"]).env("KCM_LOG_LEVEL", "ERROR"));
    let expected = format!(
        "{}: neither empty nor a configuration directory; empty it, or give another --conf-dir",
        place.conf.display()
    );
    assert_eq!(line, expected);
    assert_eq!(content(&place.conf), before);
    let file = place.conf.join("precious");
    let line = failure(kcm_for(&file, &["init"]).env("KCM_LOG_LEVEL", "ERROR"));
    assert!(line.starts_with(&format!("{}: ", file.display())), "{line}");
}

#[test]
fn a_killed_init_is_completed_by_the_next() {
    for place in Place::both(&machine(1, 8, EXAMPLE)) {
        let mut expected = None;
        for delay in 0..12 {
            let mut killed = place.kcm(&["init"]).stderr(Stdio::null()).spawn().unwrap();
            // At moments that are spread over its whole run.
            std::thread::sleep(Duration::from_micros(1500 * delay));
            killed.kill().unwrap();
            killed.wait().unwrap();
            place.init(&[]);
            let described = place.describe();
            assert_eq!(&described, expected.get_or_insert_with(|| described.clone()), "{delay}");
            assert_eq!(
                place.pools(),
                ["controlplane: 4,12", "dataplane*: 0,8 1,9 2,10 3,11", "infra: 5-7,13-15"]
            );
            place.clear();
        }
    }
}

/// The files (with their content) and directories (with a slash) that an interrupted init has created.
const PARTS: [&[(&str, &str)]; 9] = [
    &[("lock", "")],
    &[("lock", ""), ("pools/", "")],
    &[("pools/dataplane/", "")],
    &[("pools/dataplane/exclusive", "")],
    &[("pools/dataplane/exclusive", "1"), ("pools/dataplane/0,8/", "")],
    &[("pools/dataplane/exclusive", "1"), ("pools/dataplane/0,8/tasks", "")],
    &[("pools/dataplane/exclusive", "1"), ("pools/controlplane/", "")],
    &[("pools/dataplane/exclusive", "1"), ("pools/dataplane/0,8/tasks", ""), ("pools/infra/exclusive", "0")],
    &[("pools/infra/exclusive", "0"), ("pools/infra/5-7,13-15/", "")],
];

#[test]
fn any_part_of_an_init_is_completed() {
    let place = Place::plain(&machine(1, 8, EXAMPLE));
    place.init(&[]);
    let whole = content(&place.conf);
    for parts in PARTS {
        place.clear();
        for (path, text) in parts {
            let path = place.conf.join(path);
            if path.to_str().unwrap().ends_with('/') {
                fs::create_dir_all(path).unwrap();
            } else {
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
        }
        place.init(&[]);
        assert_eq!(content(&place.conf), whole, "{parts:?}");
    }
    // A part that the new flags do not ask for stays unchanged.
    place.clear();
    place.init(&["--num-dp-cores=2"]);
    fs::remove_dir_all(place.conf.join("pools/infra")).unwrap();
    let before = content(&place.conf);
    let mut command = place.kcm(&["init", "--num-dp-cores=1"]);
    let line = failure(command.env("KCM_LOG_LEVEL", "ERROR"));
    assert_eq!(line, "2 dataplane cores (1 requested)");
    assert_eq!(content(&place.conf), before);
}

#[test]
fn any_part_of_an_init_is_completed_on_a_mount() {
    let place = Place::mounted(&machine(1, 8, EXAMPLE));
    place.init(&[]);
    let whole = place.describe();
    let pools = place.conf.join("pools");
    for parts in [
        &["dataplane"][..],
        &["dataplane", "dataplane/1,9"],
        &["controlplane", "controlplane/4,12"],
        &["infra", "infra/5-7,13-15"],
        &["dataplane", "dataplane/0,8", "controlplane", "infra"],
    ] {
        place.clear();
        parts.iter().for_each(|part| fs::create_dir(pools.join(part)).unwrap());
        if parts.contains(&"dataplane/1,9") || parts.contains(&"dataplane/0,8") {
            fs::write(pools.join("dataplane/exclusive"), "1").unwrap();
        }
        place.init(&[]);
        assert_eq!(place.describe(), whole, "{parts:?}");
    }
}

#[test]
fn several_inits_at_once_create_it_once() {
    for place in Place::both(&machine(1, 8, EXAMPLE)) {
        for _ in 0..4 {
            let start = |_| place.kcm(&["init"]).stderr(Stdio::piped()).spawn().unwrap();
            let running: Vec<_> = (0..4).map(start).collect();
            for run in running {
                let output = run.wait_with_output().unwrap();
                assert_eq!(output.status.code(), Some(0), "{}", crate::harness::text(&output.stderr));
            }
            assert_eq!(
                place.pools(),
                ["controlplane: 4,12", "dataplane*: 0,8 1,9 2,10 3,11", "infra: 5-7,13-15"]
            );
            place.clear();
        }
    }
}
