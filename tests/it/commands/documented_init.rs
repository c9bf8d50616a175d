//! `kcm init`, row by row as docs/compatibility.md describes it, on a mount and on a plain directory: its messages,
//! its status, and what it creates.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::harness::{Machine, Mount, kcm_for, run};

/// A configuration directory of either kind, and a machine.
struct Place {
    mount: Option<Mount>,
    home: tempfile::TempDir,
    conf: PathBuf,
}

impl Place {
    /// Nothing is configured yet. The machine has 8 cores of two threads.
    fn both(isolcpus: &str) -> [Self; 2] {
        [true, false].map(|mounted| {
            let home = tempfile::tempdir().unwrap();
            let machine = Machine::new(1, 8, 2);
            machine.write(&home.path().join("machine"));
            fs::write(home.path().join("machine/proc/cmdline"), format!("quiet {isolcpus}\n")).unwrap();
            let mount = mounted.then(|| Mount::on_machine(&machine));
            let conf = mount.as_ref().map_or_else(|| home.path().join("conf"), Mount::conf);
            Self { mount, home, conf }
        })
    }

    /// `kcm <words>` for the directory, on the machine.
    fn kcm(&self, words: &[&str]) -> Command {
        let mut command = kcm_for(&self.conf, words);
        let root = self.home.path().join("machine");
        command.env("KCM_PROC_FS", root.join("proc")).env("KCM_DEV_LSCPU_SYSFS", root);
        command
    }

    fn kind(&self) -> &str {
        if self.mount.is_some() { "mount" } else { "plain" }
    }

    /// `<pool>/<list>…`, sorted, with `!` before exclusive pools.
    fn pools(&self) -> Vec<String> {
        let (out, _, code) = run(&mut kcm_for(&self.conf, &["describe"]));
        if code != Some(0) {
            return Vec::new();
        }
        let described: serde_json::Value = serde_json::from_str(&out).unwrap();
        let pools = described["pools"].as_object().unwrap().iter();
        let shown = pools.map(|(name, pool)| {
            let lists: Vec<&str> = pool["cpuLists"].as_object().unwrap().keys().map(String::as_str).collect();
            let mark = if pool["exclusive"] == true { "!" } else { "" };
            format!("{mark}{name} {}", lists.join(" "))
        });
        shown.collect()
    }
}

/// `isolcpus`, flags of init, its messages after the first three, status, and the pools.
type InitRow = (&'static str, &'static [&'static str], &'static [&'static str], i32, &'static [&'static str]);

const FOUR_ONE: &[&str] = &["controlplane 4,12", "!dataplane 0,8 1,9 2,10 3,11", "infra 5-7,13-15"];

const INIT: &[InitRow] = &[
    (
        "isolcpus=0,1,2,3,4,8,9,10,11,12",
        &[],
        &[
            "INFO:root:Isolated logical cores: 0,1,2,3,4,8,9,10,11,12",
            "INFO:root:Isolated physical cores: 0,1,2,3,4",
            "WARNING:root:CPU list 4,12 of controlplane is isolated at boot: the kernel does not spread programs over its CPUs",
            "INFO:root:Adding dataplane pool.",
            "INFO:root:Adding cpu list 0,8 to dataplane pool.",
            "INFO:root:Adding cpu list 1,9 to dataplane pool.",
            "INFO:root:Adding cpu list 2,10 to dataplane pool.",
            "INFO:root:Adding cpu list 3,11 to dataplane pool.",
            "INFO:root:Adding controlplane pool.",
            "INFO:root:Adding cpu list 4,12 to controlplane pool.",
            "INFO:root:Adding infra pool.",
            "INFO:root:Adding cpu list 5-7,13-15 to infra pool.",
        ],
        0,
        FOUR_ONE,
    ),
    (
        "",
        &["--num-dp-cores=1", "--num-cp-cores=1"],
        &[
            "INFO:root:No isolated physical cores detected: allocating control plane and data plane from full core list",
            "INFO:root:Adding dataplane pool.",
            "INFO:root:Adding cpu list 0,8 to dataplane pool.",
            "INFO:root:Adding controlplane pool.",
            "INFO:root:Adding cpu list 1,9 to controlplane pool.",
            "INFO:root:Adding infra pool.",
            "INFO:root:Adding cpu list 2-7,10-15 to infra pool.",
        ],
        0,
        &["controlplane 1,9", "!dataplane 0,8", "infra 2-7,10-15"],
    ),
    (
        "isolcpus=0,8,1",
        &["--num-dp-cores=1", "--num-cp-cores=0"],
        &[
            "INFO:root:Isolated logical cores: 0,1,8",
            "INFO:root:Isolated physical cores: 0",
            "WARNING:root:Physical core 1 is partially isolated: {\"cpus\":[{\"id\":1,\"isolated\":true},{\"id\":9,\"isolated\":false}],\"id\":1}",
            "INFO:root:Adding dataplane pool.",
            "INFO:root:Adding cpu list 0,8 to dataplane pool.",
            "INFO:root:Adding controlplane pool.",
            "INFO:root:Adding infra pool.",
            "INFO:root:Adding cpu list 2-7,9-15 to infra pool.",
        ],
        0,
        &["controlplane ", "!dataplane 0,8", "infra 2-7,9-15"],
    ),
    (
        "isolcpus=0-2,8-10",
        &["--num-dp-cores=1", "--num-cp-cores=1"],
        &[
            "INFO:root:Isolated logical cores: 0,1,2,8,9,10",
            "INFO:root:Isolated physical cores: 0,1,2",
            "WARNING:root:Not all isolated cores will be used by data and control plane. 3 isolated but only 2 used",
            "WARNING:root:CPU list 1,9 of controlplane is isolated at boot: the kernel does not spread programs over its CPUs",
            "INFO:root:Adding dataplane pool.",
            "INFO:root:Adding cpu list 0,8 to dataplane pool.",
            "INFO:root:Adding controlplane pool.",
            "INFO:root:Adding cpu list 1,9 to controlplane pool.",
            "INFO:root:Adding infra pool.",
            "INFO:root:Adding cpu list 3-7,11-15 to infra pool.",
        ],
        0,
        &["controlplane 1,9", "!dataplane 0,8", "infra 3-7,11-15"],
    ),
    (
        "isolcpus=0,8",
        &[],
        &[
            "INFO:root:Isolated logical cores: 0,8",
            "INFO:root:Isolated physical cores: 0",
            "ERROR:root:Cannot use isolated cores for data plane and control plane cores: not enough isolated cores 1 compared to requested 5",
        ],
        1,
        &[],
    ),
    (
        "",
        &["--num-dp-cores=99"],
        &[
            "INFO:root:No isolated physical cores detected: allocating control plane and data plane from full core list",
            "ERROR:root:99 cores requested for dataplane. Only 8 cores available",
        ],
        1,
        &[],
    ),
    (
        "",
        &["--num-dp-cores=8"],
        &[
            "INFO:root:No isolated physical cores detected: allocating control plane and data plane from full core list",
            "ERROR:root:No more free cores left to assign for controlplane",
        ],
        1,
        &[],
    ),
];

/// The value of the flag, or its default.
fn count<'a>(flags: &[&'a str], name: &str, default: &'a str) -> &'a str {
    flags.iter().find_map(|flag| flag.strip_prefix(name)?.strip_prefix('=')).unwrap_or(default)
}

#[test]
fn init_creates_the_documented_pools() {
    for (isolcpus, flags, messages, status, pools) in INIT {
        for place in Place::both(isolcpus) {
            let what = format!("{} {isolcpus} {flags:?}", place.kind());
            let (out, err, code) = run(place.kcm(&["init"]).args(*flags));
            assert_eq!((out.as_str(), code), ("", Some(*status)), "{what}: {err}");
            let begin = [
                format!("INFO:root:Writing config to {}.", place.conf.display()),
                format!("INFO:root:Requested data plane cores = {}.", count(flags, "--num-dp-cores", "4")),
                format!("INFO:root:Requested control plane cores = {}.", count(flags, "--num-cp-cores", "1")),
            ];
            let expected: Vec<&str> =
                begin.iter().map(String::as_str).chain(messages.iter().copied()).collect();
            // Nothing else may run on the CPUs that are isolated at boot.
            let advice = "INFO:root:Other programs may run on the CPUs of dataplane: only claims are kept off. --isolated keeps off everything.";
            let is_advised = place.mount.is_some()
                && messages.iter().any(|line| line.starts_with("INFO:root:No isolated physical cores"))
                && messages.iter().any(|line| line.ends_with("to dataplane pool."))
                && *status == 0;
            let expected: Vec<&str> = expected.into_iter().chain(is_advised.then_some(advice)).collect();
            assert_eq!(err.lines().collect::<Vec<_>>(), expected, "{what}");
            assert_eq!(place.pools(), *pools, "{what}");
            if *status != 0 && place.mount.is_none() {
                assert!(!place.conf.exists(), "{what}: nothing is left");
            }
        }
    }
}

#[test]
fn a_second_init_succeeds_or_names_the_mismatch() {
    for place in Place::both("") {
        run(&mut place.kcm(&["init"]));
        for (flags, last, status) in [
            (&[][..], &["INFO:root:Configuration directory already exists."][..], 0),
            (
                &["--num-dp-cores=2", "--num-cp-cores=3"],
                &[
                    "INFO:root:Configuration directory already exists.",
                    "ERROR:root:4 dataplane cores (2 requested)",
                    "ERROR:root:1 controlplane cores (3 requested)",
                ],
                1,
            ),
        ] {
            let (_, err, code) = run(place.kcm(&["init"]).args(flags));
            assert_eq!(err.lines().skip(3).collect::<Vec<_>>(), last, "{}", place.kind());
            assert_eq!(code, Some(status), "{}", place.kind());
            assert_eq!(place.pools(), FOUR_ONE, "{}", place.kind());
        }
    }
}
