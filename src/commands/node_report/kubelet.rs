//! The check `kubelet`: whether the kubelet's static CPU manager and the pools get along.
//!
//! Owns which settings of the kubelet work for claims, and where they are found. Does not know the other checks.
//!
//! A pod can claim a CPU if its cpuset has it, and it keeps the CPU if the kubelet gives it to no other pod. Tried with
//! kubelet 1.36:
//!
//! | policy | the CPUs of a list | a claim by a pod |
//! | --- | --- | --- |
//! | none | | granted |
//! | static | not reserved | granted, until a pod with whole CPUs gets one of them: then the claimant is moved elsewhere |
//! | static | reserved, `strict-cpu-reservation` off | granted, and kept |
//! | static | reserved, `strict-cpu-reservation` on | refused: the cpusets of pods do not have them |
//!
//! `cpu_manager_state` has the policy and the CPUs that are given away now. The reserved CPUs are only in the kubelet's configuration:
//! its file, its drop-in files, and its command line, which take precedence in this order.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use kcm_mount::model::cpuset::CpuSet;
use serde_json::Value;

use super::{List, lists};
use crate::cli::KubeletArg;
use crate::confdir::Pools;
use crate::host::Host;

/// The name of the kubelet's process.
const PROGRAM: &str = "kubelet";
/// The name of its configuration in its directory, if its command line does not say another one.
const CONFIG: &str = "config.yaml";
const STRICT: &str = "strict-cpu-reservation";

/// The CPU settings of the kubelet's configuration.
#[derive(Debug, Default, PartialEq, Eq)]
struct Reservation {
    cpus: CpuSet,
    is_strict: bool,
}

/// What `cpu_manager_state` says.
struct State {
    is_static: bool,
    /// The CPUs of pods that have no CPUs of their own.
    shared: CpuSet,
    /// A pod, a container, and its own CPUs.
    given: Vec<(String, String, CpuSet)>,
}

/// Returns an error for each list of which the kubelet has or may give CPUs to a pod, or which pods cannot use.
pub(super) fn check(pools: &Pools, online: &CpuSet, args: &KubeletArg, host: &Host) -> Vec<String> {
    let file = args.kubelet_dir.join("cpu_manager_state");
    let text = match fs::read(&file) {
        Ok(text) => text,
        Err(error) => {
            // Most machines have no kubelet.
            log::debug!("{}: {error}; not checked", file.display());
            return Vec::new();
        }
    };
    let Ok(state) = serde_json::from_slice(&text) else {
        return vec![format!("{}: not JSON", file.display())];
    };
    let state = State::new(&state);
    let reservation = || reservation(args, &host.root_command_lines(PROGRAM));
    conflicts(pools, online, &state, reservation)
}

impl State {
    fn new(state: &Value) -> Self {
        let cpus = |value: &Value| value.as_str().and_then(|text| text.parse().ok()).unwrap_or_default();
        let entries = state.get("entries").and_then(Value::as_object).into_iter().flatten();
        let given = entries.flat_map(|(pod, containers)| {
            let containers = containers.as_object().into_iter().flatten();
            containers.map(move |(container, given)| (pod.clone(), container.clone(), cpus(given)))
        });
        Self {
            is_static: state.get("policyName").and_then(Value::as_str) == Some("static"),
            shared: state.get("defaultCpuSet").map(cpus).unwrap_or_default(),
            given: given.collect(),
        }
    }
}

/// As [`check`], for a state. `reservation`: what is reserved, or why that cannot be known.
fn conflicts(
    pools: &Pools,
    online: &CpuSet,
    state: &State,
    reservation: impl FnOnce() -> Result<Reservation, String>,
) -> Vec<String> {
    let mut errors = Vec::new();
    for (pod, container, cpus) in &state.given {
        for list in lists(pools) {
            let both = list.cpus.intersection(cpus);
            if !both.is_empty() {
                errors.push(format!(
                    "the kubelet has given CPU {both} of {} to {container} of pod {pod}",
                    list.name
                ));
            }
        }
    }
    if !state.is_static {
        return errors;
    }
    let reservation = reservation();
    let given = state.given.iter().fold(CpuSet::new(), |all, (_, _, cpus)| all.union(cpus));
    for list in lists(pools).filter(|list| list.exclusive) {
        errors.extend(of_list(&list, online, state, &given, reservation.as_ref()));
    }
    errors
}

/// Returns what is wrong with an exclusive list under the static policy.
fn of_list(
    list: &List<'_>,
    online: &CpuSet,
    state: &State,
    given: &CpuSet,
    reservation: Result<&Reservation, &String>,
) -> Option<String> {
    let name = &list.name;
    let cpus = list.cpus.intersection(online).difference(given);
    // CPUs that neither the other pods have nor one of its own are reserved strictly, whatever can be known of the
    // configuration.
    let mut strict = cpus.difference(&state.shared);
    if let Ok(Reservation { cpus: reserved, is_strict: true }) = reservation {
        strict = strict.union(&cpus.intersection(reserved));
    }
    if !strict.is_empty() {
        return Some(format!(
            "pods cannot use CPU {strict} of {name}, because the kubelet reserves it strictly; switch {STRICT} off, and \
             leave the CPUs in reservedSystemCPUs"
        ));
    }
    let open = match reservation {
        Ok(reservation) => cpus.difference(&reservation.cpus),
        Err(_) => cpus,
    };
    match reservation {
        _ if open.is_empty() => None,
        Ok(_) => Some(format!(
            "the kubelet may give CPU {open} of {name} to a pod; name it in reservedSystemCPUs, without {STRICT}"
        )),
        Err(why) => Some(format!(
            "whether the kubelet may give CPU {open} of {name} to a pod is not known: {why}; look for reservedSystemCPUs \
             in the kubelet's configuration, and say where that is: --kubelet-config"
        )),
    }
}

/// Returns what is reserved, or why that cannot be known. `lines`: the command lines of kubelets.
fn reservation(args: &KubeletArg, lines: &[Vec<String>]) -> Result<Reservation, String> {
    // With two kubelets, it is not known which one has the directory.
    let line = match lines {
        [line] => Some(line.as_slice()),
        _ => None,
    };
    let flag = |name: &str| line.and_then(|line| flag(line, name));
    let mut config = Value::Object(serde_json::Map::new());
    let named = args.kubelet_config.clone().or_else(|| flag("--config").map(PathBuf::from));
    let file = named.clone().unwrap_or_else(|| args.kubelet_dir.join(CONFIG));
    match read(&file) {
        Ok(found) => json_patch::merge(&mut config, &found),
        // A kubelet that has no file is configured by its command line only.
        Err((ErrorKind::NotFound, _)) if named.is_none() && line.is_some() => {}
        Err((_, why)) => return Err(why),
    }
    if let Some(directory) = flag("--config-dir") {
        for file in drop_ins(Path::new(directory))? {
            // As the kubelet merges them (RFC 7386).
            json_patch::merge(&mut config, &read(&file).map_err(|(_, why)| why)?);
        }
    }
    let reserved = config.get("reservedSystemCPUs").and_then(Value::as_str);
    let reserved = flag("--reserved-cpus").or(reserved).unwrap_or_default();
    let cpus = reserved.parse().map_err(|_| format!("{reserved:?} is not a CPU list"));
    let cpus = if reserved.is_empty() { CpuSet::new() } else { cpus? };
    let is_strict = match flag("--cpu-manager-policy-options") {
        Some(options) => options.split(',').any(|option| option.trim() == format!("{STRICT}=true")),
        None => {
            let option = config.get("cpuManagerPolicyOptions").and_then(|options| options.get(STRICT));
            option.is_some_and(|option| option == "true" || option == true)
        }
    };
    Ok(Reservation { cpus, is_strict })
}

/// Reads a file of YAML. An error has its kind and says what is wrong.
fn read(file: &Path) -> Result<Value, (ErrorKind, String)> {
    let failed = |kind, why: &dyn std::fmt::Display| (kind, format!("{}: {why}", file.display()));
    let text = fs::read_to_string(file).map_err(|error| match error.kind() {
        ErrorKind::NotFound => failed(ErrorKind::NotFound, &"no such file"),
        ErrorKind::PermissionDenied => failed(ErrorKind::PermissionDenied, &"permission denied"),
        kind => failed(kind, &"cannot be read"),
    })?;
    // The text of the error could have parts of the file.
    serde_saphyr::from_str(&text).map_err(|_| failed(ErrorKind::InvalidData, &"not YAML"))
}

/// Returns the drop-in files of a directory, in the order of their names.
fn drop_ins(directory: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(directory).map_err(|_| format!("{}: cannot be read", directory.display()))?;
    let paths = entries.filter_map(Result::ok).map(|entry| entry.path());
    let mut files: Vec<PathBuf> =
        paths.filter(|path| path.extension().is_some_and(|extension| extension == "conf")).collect();
    files.sort();
    Ok(files)
}

/// Returns the value of a flag on a command line, `--name=value` or `--name value`. The last one counts.
fn flag<'a>(line: &'a [String], name: &str) -> Option<&'a str> {
    let mut values = line.iter().enumerate().filter_map(|(at, word)| match word.strip_prefix(name)? {
        "" => line.get(at + 1).map(String::as_str),
        rest => rest.strip_prefix('='),
    });
    values.next_back()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::intruders::tests::{cpus, pools};
    use super::*;

    fn args(kubelet_dir: &Path) -> KubeletArg {
        KubeletArg { kubelet_dir: kubelet_dir.to_owned(), kubelet_config: None }
    }

    fn line(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    /// The errors for the exclusive list 2-3 of a machine with the CPUs 0-7.
    fn errors(state: Value, reservation: Result<Reservation, String>) -> Vec<String> {
        let pools = pools(&[("dp", true, &["2-3"]), ("infra", false, &["0-1,4-7"])]);
        conflicts(&pools, &cpus("0-7"), &State::new(&state), || reservation)
    }

    fn reserved(list: &str, is_strict: bool) -> Result<Reservation, String> {
        Ok(Reservation { cpus: list.parse().unwrap_or_default(), is_strict })
    }

    /// The four rows of the table above, and what is in `cpu_manager_state` then.
    #[test]
    fn every_setting_is_judged_by_what_a_claim_gets() {
        let none = json!({ "policyName": "none", "defaultCpuSet": "", "checksum": 1 });
        let whole = json!({ "policyName": "static", "defaultCpuSet": "0-7", "checksum": 1 });
        let without = json!({ "policyName": "static", "defaultCpuSet": "0-1,4-7", "checksum": 1 });
        assert_eq!(errors(none, reserved("", false)), [""; 0]);
        let may = "the kubelet may give CPU 2-3 of dp:2-3 to a pod; \
            name it in reservedSystemCPUs, without strict-cpu-reservation";
        assert_eq!(errors(whole.clone(), Ok(Reservation::default())), [may]);
        assert_eq!(errors(whole.clone(), reserved("2-3", false)), [""; 0]);
        let strict = "pods cannot use CPU 2-3 of dp:2-3, because the kubelet reserves it strictly; \
            switch strict-cpu-reservation off, and leave the CPUs in reservedSystemCPUs";
        assert_eq!(errors(without.clone(), reserved("2-3", true)), [strict]);
        // The state shows it without the configuration.
        assert_eq!(errors(without, Err("x: no such file".into())), [strict]);
        let unknown = "whether the kubelet may give CPU 2-3 of dp:2-3 to a pod is not known: x: no such file; \
            look for reservedSystemCPUs in the kubelet's configuration, and say where that is: --kubelet-config";
        assert_eq!(errors(whole.clone(), Err("x: no such file".into())), [unknown]);
        assert_eq!(
            errors(whole, reserved("0,2", false)),
            [may.replace("CPU 2-3 of", "CPU 3 of")],
            "a part is reserved"
        );
    }

    #[test]
    fn cpus_of_a_pod_are_named_once() {
        let state = json!({
            "policyName": "static",
            "defaultCpuSet": "0-1,3-7",
            "entries": { "pod-1": { "main": "2", "other": "7" } },
        });
        let expected = [
            "the kubelet has given CPU 2 of dp:2-3 to main of pod pod-1",
            "the kubelet has given CPU 7 of infra:0-1,4-7 to other of pod pod-1",
        ];
        assert_eq!(errors(state, reserved("3", false)), expected);
    }

    #[test]
    fn offline_cpus_are_not_strictly_reserved() {
        let pools = pools(&[("dp", true, &["2-3"])]);
        let state = json!({ "policyName": "static", "defaultCpuSet": "0-2" });
        let errors = conflicts(&pools, &cpus("0-2"), &State::new(&state), || reserved("2-3", false));
        assert_eq!(errors, [""; 0]);
    }

    #[test]
    fn the_configuration_is_found_where_the_kubelet_finds_it() {
        let home = tempfile::tempdir().unwrap();
        let (at, elsewhere, dir) = (home.path(), home.path().join("k.yaml"), home.path().join("conf.d"));
        let found = |line: &[Vec<String>]| reservation(&args(at), line);
        let missing = format!("{}: no such file", at.join("config.yaml").display());
        assert_eq!(found(&[]), Err(missing));
        // A kubelet without a file.
        assert_eq!(found(&[line("--v=2 --reserved-cpus=4,5")]), reserved("4-5", false));
        let config = "kind: KubeletConfiguration\ncpuManagerPolicy: static\nreservedSystemCPUs: \"2-3\"\n";
        fs::write(at.join("config.yaml"), config).unwrap();
        assert_eq!(found(&[]), reserved("2-3", false));
        assert_eq!(found(&[line("--reserved-cpus 1"), line("--reserved-cpus 2")]), reserved("2-3", false));
        let options =
            "cpuManagerPolicyOptions:\n  full-pcpus-only: \"true\"\n  strict-cpu-reservation: \"true\"\n";
        fs::write(&elsewhere, format!("{config}{options}")).unwrap();
        let named = line(&format!("--config={}", elsewhere.display()));
        assert_eq!(found(std::slice::from_ref(&named)), reserved("2-3", true));
        let by_flag = KubeletArg { kubelet_config: Some(elsewhere.clone()), ..args(at) };
        assert_eq!(reservation(&by_flag, &[]), reserved("2-3", true));
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("10-a.conf"), "reservedSystemCPUs: '6'\n").unwrap();
        fs::write(dir.join("20-b.conf"), "cpuManagerPolicyOptions:\n  strict-cpu-reservation: 'false'\n")
            .unwrap();
        fs::write(dir.join("30-c.txt"), "reservedSystemCPUs: '7'\n").unwrap();
        let mut with_drop_ins = [named, line(&format!("--config-dir {}", dir.display()))].concat();
        assert_eq!(found(std::slice::from_ref(&with_drop_ins)), reserved("6", false));
        with_drop_ins
            .extend(line("--reserved-cpus=1 --cpu-manager-policy-options=a=b,strict-cpu-reservation=true"));
        assert_eq!(found(&[with_drop_ins]), reserved("1", true));
    }

    #[test]
    fn a_configuration_that_cannot_be_used_is_named() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("config.yaml");
        let why = || reservation(&args(home.path()), &[]).unwrap_err();
        fs::write(&file, "a: [\n").unwrap();
        assert_eq!(why(), format!("{}: not YAML", file.display()));
        fs::write(&file, "reservedSystemCPUs: x\n").unwrap();
        assert_eq!(why(), "\"x\" is not a CPU list");
        let named = line(&format!("--config={}/none", home.path().display()));
        let why = reservation(&args(home.path()), &[named]).unwrap_err();
        assert_eq!(why, format!("{}/none: no such file", home.path().display()));
    }
}
