//! The CDI spec of a pool (Container Device Interface, version 0.5.0).
//!
//! Owns the names of kinds, devices and files, and what a spec says. Does not know where specs are, or how pools are read.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Error};
use serde_json::{Value, json};

use crate::commands::isolate::CPUS_ASSIGNED;

/// The oldest version in which the name of a device may begin with a digit.
const VERSION: &str = "0.5.0";
/// The first part of each kind.
const VENDOR: &str = "kcm.intel.com";
/// The device that is any free list of its pool.
const ANY: &str = "any";
/// The first argument of the hook: the name under which the program starts.
pub(in crate::commands) const HOOK_PROGRAM: &str = "kcm";
/// The command that is the hook.
pub(in crate::commands) const HOOK_COMMAND: &str = "hook";
/// Seconds after which a runtime ends the hook, which ends by itself before.
const HOOK_TIMEOUT: u32 = 30;

/// The common part of the specs of a directory.
#[derive(Debug)]
pub(super) struct Source {
    /// The program that is the hook, on the machine of the container runtime.
    program: String,
    /// The configuration directory.
    conf_dir: String,
    /// Whether containers get that directory.
    has_mount: bool,
}

impl Source {
    /// # Errors
    /// A path is not UTF-8, which JSON cannot have.
    pub(super) fn new(program: &Path, conf_dir: &Path) -> Result<Self, Error> {
        let text = |path: &Path| {
            let path = std::path::absolute(path)?;
            let name = path.display().to_string();
            path.into_os_string().into_string().ok().with_context(|| format!("{name}: not UTF-8; rename it"))
        };
        Ok(Self { program: text(program)?, conf_dir: text(conf_dir)?, has_mount: true })
    }

    /// Returns the source of specs that leave the directory out of the containers.
    pub(super) fn without_mount(self) -> Self {
        Self { has_mount: false, ..self }
    }

    pub(super) fn conf_dir(&self) -> &str {
        &self.conf_dir
    }

    /// Returns the spec of a pool with these lists.
    pub(super) fn spec<'a>(&self, pool: &str, lists: impl Iterator<Item = &'a str>) -> Value {
        let named = |list: &str| {
            let edits = json!({
                "env": [format!("{CPUS_ASSIGNED}={list}")],
                "hooks": [self.hook(pool, Some(list))],
            });
            json!({ "name": device(list), "containerEdits": edits })
        };
        let any = json!({ "name": ANY, "containerEdits": { "hooks": [self.hook(pool, None)] } });
        let devices: Vec<Value> = std::iter::once(any).chain(lists.map(named)).collect();
        let mut spec = json!({ "cdiVersion": VERSION, "kind": kind(pool), "devices": devices });
        if let Some(spec) = spec.as_object_mut().filter(|_| self.has_mount) {
            spec.insert("containerEdits".into(), json!({ "mounts": [self.mount()] }));
        }
        spec
    }

    fn hook(&self, pool: &str, list: Option<&str>) -> Value {
        let mut args = vec![
            HOOK_PROGRAM.to_owned(),
            HOOK_COMMAND.to_owned(),
            format!("--pool={pool}"),
            self.conf_dir_arg(),
        ];
        args.extend(list.map(|list| format!("--list={list}")));
        json!({ "hookName": "createRuntime", "path": self.program, "args": args, "timeout": HOOK_TIMEOUT })
    }

    fn conf_dir_arg(&self) -> String {
        format!("--conf-dir={}", self.conf_dir)
    }

    /// The directory as a mount of the container, at the same path. If its parent is kcm's own, that is mounted, read-only: then
    /// mounts that come later reach the container, and nobody can put anything into the empty mount point.
    fn mount(&self) -> Value {
        let conf_dir = Path::new(&self.conf_dir);
        let own =
            conf_dir.parent().filter(|parent| is_own(parent)).map(|parent| parent.display().to_string());
        let mut options = vec!["rbind", "rslave", "nosuid", "nodev", "noexec"];
        if own.is_some() {
            options.push("ro");
        }
        let path = own.unwrap_or_else(|| self.conf_dir.clone());
        json!({ "hostPath": path, "containerPath": path, "options": options })
    }

    /// Whether a document is a spec that was made from this directory for a file of this name.
    pub(super) fn has_made(&self, file: &str, spec: &Value) -> bool {
        let is_of_file = spec.get("kind").and_then(Value::as_str).is_some_and(|kind| file_of(kind) == file);
        let conf_dir = self.conf_dir_arg();
        let mut hooks = hooks(spec.pointer("/devices/0/containerEdits/hooks"));
        is_of_file && hooks.any(|args| args.contains(&conf_dir.as_str()))
    }
}

/// Returns the arguments of each hook in this list that is `kcm hook`.
pub(in crate::commands) fn hooks(list: Option<&Value>) -> impl Iterator<Item = Vec<&str>> {
    let list = list.and_then(Value::as_array).into_iter().flatten();
    let args = list.filter_map(|hook| hook.get("args")?.as_array());
    let args = args.map(|args| args.iter().filter_map(Value::as_str).collect::<Vec<_>>());
    args.filter(|args| matches!(args[..], [HOOK_PROGRAM, HOOK_COMMAND, ..]))
}

/// Whether a directory is only for kcm, such as `/run/kcm`.
fn is_own(directory: &Path) -> bool {
    directory.file_name().is_some_and(|name| name == "kcm")
}

/// Whether the name of a pool can be a class of CDI as it is.
pub(super) fn is_class(pool: &str) -> bool {
    pool.starts_with(|first: char| first.is_ascii_alphabetic())
}

/// Returns the kind of a pool. A class begins with a letter, and no name of a pool has an underscore.
pub(in crate::commands) fn kind(pool: &str) -> String {
    let class: Cow<'_, str> = if is_class(pool) { pool.into() } else { format!("pool_{pool}").into() };
    format!("{VENDOR}/{class}")
}

/// Returns the device of a list. The name of a device has no comma, and no name of a list has an underscore.
pub(in crate::commands) fn device(list: &str) -> String {
    list.replace(',', "_")
}

/// Returns the file name of the spec of a kind.
pub(super) fn file_of(kind: &str) -> String {
    format!("{}.json", kind.replace('/', "-"))
}

/// Whether a file name may be of a spec, or of one that was not finished.
pub(super) fn may_be_file(name: &str) -> bool {
    name.strip_prefix(VENDOR).is_some_and(|rest| rest.starts_with('-'))
}

/// Returns the name of the spec that a file of this name was to become, and the PID of the process that wrote it.
pub(super) fn unfinished(name: &str) -> Option<(&str, &str)> {
    let (file, pid) = name.strip_suffix(".new")?.rsplit_once('.')?;
    let is_pid = !pid.is_empty() && pid.bytes().all(|byte| byte.is_ascii_digit());
    (is_pid && file.ends_with(".json") && may_be_file(file)).then_some((file, pid))
}

/// Returns the path of this program for hooks.
///
/// # Errors
/// `/proc` does not tell.
pub(super) fn own_program() -> Result<PathBuf, Error> {
    let program = std::env::current_exe().context("kcm cannot find itself; is /proc mounted?")?;
    // A package has replaced the file that runs.
    let name = program.to_str().and_then(|name| name.strip_suffix(" (deleted)"));
    Ok(name.map(PathBuf::from).unwrap_or(program))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(conf_dir: &str) -> Source {
        Source::new(Path::new("/opt/bin/kcm"), Path::new(conf_dir)).unwrap()
    }

    #[test]
    fn a_spec_has_a_device_for_each_list_and_any() {
        let spec = source("/run/kcm/conf").spec("dp", ["0-3", "4,12"].into_iter());
        let hook = |list: &[&str]| {
            let args = ["kcm", "hook", "--pool=dp", "--conf-dir=/run/kcm/conf"].iter().chain(list);
            let args: Vec<_> = args.collect();
            json!([{ "hookName": "createRuntime", "path": "/opt/bin/kcm", "args": args, "timeout": 30 }])
        };
        let expected = json!({
            "cdiVersion": "0.5.0",
            "kind": "kcm.intel.com/dp",
            "devices": [
                { "name": "any", "containerEdits": { "hooks": hook(&[]) } },
                { "name": "0-3", "containerEdits": {
                    "env": ["KCM_CPUS_ASSIGNED=0-3"], "hooks": hook(&["--list=0-3"]) } },
                { "name": "4_12", "containerEdits": {
                    "env": ["KCM_CPUS_ASSIGNED=4,12"], "hooks": hook(&["--list=4,12"]) } },
            ],
            "containerEdits": { "mounts": [{
                "hostPath": "/run/kcm", "containerPath": "/run/kcm",
                "options": ["rbind", "rslave", "nosuid", "nodev", "noexec", "ro"],
            }] },
        });
        assert_eq!(spec, expected);
        let without = source("/run/kcm/conf").without_mount();
        let mut expected = expected;
        expected.as_object_mut().unwrap().remove("containerEdits");
        assert_eq!(without.spec("dp", ["0-3", "4,12"].into_iter()), expected);
    }

    #[test]
    fn only_a_directory_of_kcm_is_mounted() {
        for (conf_dir, mounted) in [
            ("/run/kcm/conf", "/run/kcm"),
            ("/etc/kcm", "/etc/kcm"),
            ("/kcm", "/kcm"),
            ("/srv/pools", "/srv/pools"),
            ("/kcm/conf", "/kcm"),
        ] {
            let mount = source(conf_dir).mount();
            assert_eq!((&mount["hostPath"], &mount["containerPath"]), (&json!(mounted), &json!(mounted)));
            // A claim is a write, so the mount itself stays writable.
            let is_read_only = mount["options"].as_array().unwrap().contains(&json!("ro"));
            assert_eq!(is_read_only, mounted != conf_dir, "{conf_dir}");
        }
    }

    #[test]
    fn every_name_of_a_pool_has_a_class_of_its_own() {
        for (pool, kind_of_pool) in [("dp", "kcm.intel.com/dp"), ("4dp", "kcm.intel.com/pool_4dp")] {
            assert_eq!(kind(pool), kind_of_pool);
        }
        assert_eq!(file_of(&kind("4dp")), "kcm.intel.com-pool_4dp.json");
    }

    #[test]
    fn a_spec_is_known_by_its_file_kind_and_directory() {
        let own = source("/etc/kcm");
        let spec = own.spec("dp", ["0"].into_iter());
        assert!(own.has_made("kcm.intel.com-dp.json", &spec));
        assert!(!own.has_made("kcm.intel.com-other.json", &spec));
        assert!(!source("/run/kcm/conf").has_made("kcm.intel.com-dp.json", &spec));
        for (at, value) in [("/kind", json!(1)), ("/devices", json!([])), ("/devices", json!("x"))] {
            let mut other = spec.clone();
            *other.pointer_mut(at).unwrap() = value;
            assert!(!own.has_made("kcm.intel.com-dp.json", &other), "{other}");
        }
    }

    #[test]
    fn an_unfinished_file_is_known_by_its_name() {
        assert_eq!(unfinished("kcm.intel.com-dp.json.42.new"), Some(("kcm.intel.com-dp.json", "42")));
        for name in ["kcm.intel.com-dp.json", "kcm.intel.com-dp.json.new", "nvidia.com-gpu.json.42.new"] {
            assert_eq!(unfinished(name), None, "{name}");
        }
    }
}
