//! `kcm node-report`: the report, byte for byte, and each check that fails.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::harness::{
    Cpuset, Machine, Mount, Plain, Sleeper, data, fails, masks, pin, report, run, says, until, write,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// The errors of one check; without errors, asserts that it is ok.
pub(super) fn errors(report: &Value, check: &str) -> Vec<String> {
    let check = &report["checks"][check];
    let errors = check["errors"].as_array().unwrap();
    assert_eq!(check["ok"], json!(errors.is_empty()));
    errors.iter().map(|error| error.as_str().unwrap().to_owned()).collect()
}

/// A command that sees a made-up machine.
pub(super) fn on<'a>(command: &'a mut Command, root: &Path) -> &'a mut Command {
    command.env("KCM_DEV_LSCPU_SYSFS", root)
}

/// The kernel's command line and the processes are in different places; this directory has both.
fn proc_with_cmdline(home: &Path, cmdline: &str) -> std::path::PathBuf {
    let proc = home.join("proc");
    fs::create_dir_all(&proc).unwrap();
    fs::write(proc.join("cmdline"), cmdline).unwrap();
    proc
}

#[test]
fn the_report_is_the_legacy_one_plus_new_checks() {
    let plain = Plain::new();
    plain.make_pool("exclusive", true, &[("0", "")]);
    plain.make_pool("shared", false, &[("0-1", "4711")]);
    let root = plain.home().join("machine");
    Machine::new(2, 2, 2).write(&root);
    let proc = proc_with_cmdline(plain.home(), "quiet isolcpus=1,5\n");
    let mut command = plain.kcm(&["node-report"]);
    on(&mut command, &root).env("KCM_PROC_FS", &proc).arg("--kubelet-dir").arg(plain.home());
    let conf = plain.conf().display().to_string();
    let names = [("conf", &*conf), ("pid", "4711")];
    says(&mut command, &data("node-report.json", &names));
}

#[test]
fn the_description_is_the_output_of_describe() {
    let mount = Mount::with_dataplane();
    let task = Sleeper::new();
    write(&mount.tasks("dataplane", "1"), task.pid().to_string()).unwrap();
    let found = report(&mut mount.kcm(&["node-report"]));
    let described: Value = report(&mut mount.kcm(&["describe"]));
    assert_eq!(found["description"], described);
}

#[test]
fn each_pair_of_overlapping_lists_is_named_once() {
    let plain = Plain::new();
    plain.make_pool("b", false, &[("0-1", ""), ("1", "")]);
    plain.make_pool("a", true, &[("0", "")]);
    let found = report(&mut plain.kcm(&["node-report"]));
    assert_eq!(
        errors(&found, "configDirectory"),
        [
            "CPU list overlap detected in a:0 and b:0-1 (in both: [0])",
            "CPU list overlap detected in b:0-1 and b:1 (in both: [1])",
        ]
    );
}

#[test]
fn an_unreadable_directory_is_reported_as_before() {
    let place = Mount::not_mounted();
    let root = place.home().join("machine");
    Machine::new(1, 1, 1).write(&root);
    let expected = data("node-report-unreadable.json", &[]);
    says(on(&mut place.kcm(&["node-report"]), &root), &expected);
    fs::create_dir(place.conf()).unwrap();
    says(on(&mut place.kcm(&["node-report"]), &root), &expected);
    fs::write(place.conf().join("pools"), "").unwrap();
    says(on(&mut place.kcm(&["node-report"]), &root), &expected);
}

#[test]
fn offline_cpus_of_a_list_are_named() {
    let mount = Mount::not_mounted();
    let mut machine = Machine::new(1, 4, 1);
    machine.offline = vec![2, 3];
    mount.start_on(&machine);
    mount.make_pool("p", false, &["0", "1-2", "3"]);
    let mut command = mount.kcm(&["node-report"]);
    let found = report(on(&mut command, &mount.home().join("machine")));
    assert_eq!(
        errors(&found, "cpus"),
        ["CPU list p:1-2 has offline CPUs: 2", "CPU list p:3 has offline CPUs: 3"]
    );
}

#[test]
fn tasks_that_are_not_on_their_list_are_named() {
    let mount = Mount::new();
    mount.make_pool("a", true, &["0"]);
    let task = Sleeper::new();
    until("it is called sleep", || {
        fs::read_to_string(format!("/proc/{}/comm", task.pid())).unwrap() == "sleep\n"
    });
    write(&mount.tasks("a", "0"), task.pid().to_string()).unwrap();
    let found = || errors(&report(&mut mount.kcm(&["node-report"])), "masks");
    assert_eq!(found(), [""; 0]);
    pin(task.pid(), &[1]);
    let cure = "kcm reconcile --repair moves it back";
    assert_eq!(found(), [format!("{} (sleep) of a:0 may run on 1; {cure}", task.pid())]);
    mount.sh("$KCM reconcile --conf-dir=\"$C\" --repair > /dev/null");
    assert_eq!(found(), [""; 0]);
}

#[test]
fn a_task_whose_cpuset_has_a_part_of_its_list_is_named() {
    let mount = Mount::new();
    mount.make_pool("a", true, &["0-1"]);
    let cpuset = Cpuset::new("0-1");
    let task = Sleeper::new();
    cpuset.add(task.pid());
    write(&mount.tasks("a", "0-1"), task.pid().to_string()).unwrap();
    let found = || errors(&report(&mut mount.kcm(&["node-report"])), "masks");
    assert_eq!(found(), [""; 0]);
    cpuset.set("1");
    let expected = format!(
        "{} (sleep) of a:0-1 cannot use CPU 0: the cpuset of its cgroup does not have it",
        task.pid()
    );
    assert_eq!(found(), [expected]);
}

#[test]
fn an_exclusive_list_with_a_part_of_a_core_is_named() {
    let mount = Mount::not_mounted();
    mount.start_on(&Machine::new(1, 3, 2));
    mount.make_pool("excl", true, &["0", "1", "2,5"]);
    mount.make_pool("shared", false, &["4"]);
    let found = report(on(&mut mount.kcm(&["node-report"]), &mount.home().join("machine")));
    assert_eq!(
        errors(&found, "siblings"),
        [
            "CPU list excl:0 shares a core with CPU 3, which is in no pool",
            "CPU list excl:1 shares a core with CPU 4, which is in shared:4",
        ]
    );
}

#[test]
fn only_intruders_are_named() {
    let mount = Mount::new();
    mount.make_pool("a", true, &["0"]);
    mount.make_pool("b", false, &["1"]);
    // The claimed task, its child and grandchild, a task on a shared list, and a process that somebody pinned.
    let mut holder =
        mount.bash("echo $$ > $C/pools/a/0/tasks; sleep 1000 & bash -c 'sleep 1000 & wait' & wait");
    let holder = Sleeper::spawn(holder.stdout(Stdio::null()));
    let is_held = || fs::read_to_string(mount.tasks("a", "0")).unwrap() == format!("{}\n", holder.pid());
    until("the list is held", is_held);
    let shared = Sleeper::spawn(Command::new("taskset").args(["-c", "1", "sleep", "1000"]));
    let intruder = Sleeper::spawn(Command::new("taskset").args(["-c", "0", "sleep", "1000"]));
    until("it sleeps", || masks(intruder.pid()) == ["0"] && masks(shared.pid()) == ["1"]);
    until("it is called sleep", || {
        fs::read_to_string(format!("/proc/{}/comm", intruder.pid())).unwrap() == "sleep\n"
    });
    let found = ours(&errors(&report(&mut mount.kcm(&["node-report"])), "intruders"));
    let expected = format!("{} (sleep) is pinned to 0, within CPU list a:0, without a claim", intruder.pid());
    assert_eq!(found, [expected]);

    // Now it has a claim.
    write(&mount.tasks("a", "0"), format!("-{}", holder.pid())).unwrap();
    write(&mount.tasks("a", "0"), intruder.pid().to_string()).unwrap();
    let found = errors(&report(&mut mount.kcm(&["node-report"])), "intruders");
    assert!(!found.iter().any(|error| error.starts_with(&format!("{} ", intruder.pid()))), "{found:?}");
}

/// The errors about processes that this test started. Other tests pin processes, too.
fn ours(errors: &[String]) -> Vec<String> {
    let cgroup = fs::read_to_string(format!("/proc/self/task/{}/cgroup", nix::unistd::gettid())).unwrap();
    let is_ours = |error: &&String| {
        let pid = error.split(' ').find_map(|word| word.parse::<u32>().ok()).expect("a PID");
        fs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|other| other == cgroup)
    };
    errors.iter().filter(is_ours).cloned().collect()
}

#[test]
fn a_dead_process_is_no_intruder() {
    let mount = Mount::new();
    mount.make_pool("a", true, &["0"]);
    // It is dead and not collected, and it keeps its mask.
    let mut dead = Command::new("taskset").args(["-c", "0", "true"]).spawn().unwrap();
    until("it is dead", || crate::harness::stat(dead.id(), 3) == "Z" && masks(dead.id()) == ["0"]);
    assert_eq!(ours(&errors(&report(&mut mount.kcm(&["node-report"])), "intruders")), [""; 0]);
    dead.wait().unwrap();
}

#[test]
fn one_pinned_thread_is_an_intruder() {
    let mount = Mount::new();
    mount.make_pool("a", true, &["0"]);
    let program = Sleeper::new();
    pin(program.pid(), &[0]);
    let found = ours(&errors(&report(&mut mount.kcm(&["node-report"])), "intruders"));
    assert_eq!(
        found,
        [format!("{} (sleep) is pinned to 0, within CPU list a:0, without a claim", program.pid())]
    );

    pin(program.pid(), &[0, 1]);
    assert_eq!(ours(&errors(&report(&mut mount.kcm(&["node-report"])), "intruders")), [""; 0]);
}

#[test]
fn a_process_on_all_cpus_is_no_intruder() {
    let mount = Mount::new();
    let all = fs::read_to_string("/sys/devices/system/cpu/online").unwrap();
    mount.make_pool("a", true, &[all.trim()]);
    let _program = Sleeper::new();
    assert_eq!(ours(&errors(&report(&mut mount.kcm(&["node-report"])), "intruders")), [""; 0]);
}

#[test]
fn the_mount_is_live_since_its_daemon_started() {
    let mount = Mount::with_dataplane();
    let found = report(&mut mount.kcm(&["node-report"]));
    assert_eq!(errors(&found, "mount"), [""; 0]);
    assert_eq!(found["checks"]["mount"]["live"], json!(true));
    let since = found["checks"]["mount"]["since"].as_str().unwrap().to_owned();
    assert!(since.len() == "2026-11-24T10:15:02.250Z".len() && since.ends_with('Z'), "{since}");

    mount.stop();
    let (out, err, code) = run(&mut mount.kcm(&["node-report"]));
    assert_eq!((err.as_str(), code), ("", Some(0)));
    let found: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(errors(&found, "mount"), ["kcm mount is not running; start it"]);
    assert_eq!(errors(&found, "configDirectory"), ["Unable to read the KCM configuration directory"]);
    assert_eq!(found["description"], Value::Null);
}

#[test]
fn damaged_state_is_reported() {
    let mount = Mount::with_dataplane();
    mount.stop();
    let config = mount.state().join("config");
    let mut bytes = fs::read(&config).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&config, bytes).unwrap();
    mount.start();
    let found = report(&mut mount.kcm(&["node-report"]));
    assert_eq!(
        errors(&found, "mount"),
        ["1 damaged state files were set aside when the daemon started; look at its log"]
    );
    assert_eq!(found["checks"]["mount"]["live"], json!(true));
}

#[test]
fn an_interval_runs_until_a_signal() {
    let mount = Mount::with_dataplane();
    let out = mount.home().join("reports");
    let mut command = mount.kcm(&["node-report", "--interval=0.05"]);
    let mut looking = Sleeper::spawn(command.stdout(fs::File::create(&out).unwrap()));
    let lines = || -> Vec<Value> {
        let text = fs::read_to_string(&out).unwrap();
        text.lines().map_while(|line| serde_json::from_str(line).ok()).collect()
    };
    let live = || -> Vec<bool> {
        lines().iter().map(|line| line["report"]["checks"]["mount"]["live"].as_bool().unwrap()).collect()
    };
    until("it has reported", || live() == [true]);
    mount.stop();
    until("it has noticed the end", || live().ends_with(&[false]));
    mount.start();
    until("it has noticed the start", || live().ends_with(&[true]));
    // The change is named.
    let task = Sleeper::new();
    write(&mount.tasks("dataplane", "0"), task.pid().to_string()).unwrap();
    let is_claim = |line: &Value| {
        line["report"]["description"]["pools"]["dataplane"]["cpuLists"]["0"]["tasks"] == json!([task.pid()])
    };
    until("it has noticed the claim", || lines().iter().any(is_claim));
    let all = lines();
    assert_eq!(all[0]["changed"], json!([""]));
    let claim = all.iter().find(|line| is_claim(line)).unwrap();
    let changed = claim["changed"].as_array().unwrap();
    assert!(changed.contains(&json!("/description/pools/dataplane")), "{changed:?}");
    let repeated = all.windows(2).find(|pair| pair[0]["report"] == pair[1]["report"]);
    assert_eq!(repeated, None, "a report that says the same is not printed");
    kill(Pid::from_raw(looking.pid() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(looking.child().wait().unwrap().code(), Some(0));
}

#[test]
fn an_unreadable_machine_is_one_line() {
    let plain = Plain::new();
    let mut command = plain.kcm(&["node-report"]);
    fails(on(&mut command, Path::new("/nowhere")), "", "look at KCM_DEV_LSCPU_SYSFS");
    let mut command = plain.kcm(&["node-report"]);
    fails(command.env("KCM_PROC_FS", "/nowhere"), "/nowhere: cannot be read", "");
}
