//! The start of a container with the hook of `kcm cdi`.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use super::MILLI;
use super::commands::race;
use crate::common::{KCM, Mount, run};
use crate::stats::{Rounds, Samples};
use crate::table::{Row, Target};

pub(super) fn rows() -> Vec<Row> {
    let mount = Mount::with_dataplane();
    let args = json!(["kcm", "hook", "--pool=dataplane", format!("--conf-dir={}", mount.conf().display())]);
    let hook = json!([{ "path": KCM, "args": args }]);
    let empty = json!([{ "path": "/bin/true" }]);
    let container = |name: &str, hooks: Value| container(&mount.home().join(name), hooks);
    let mut containers =
        [container("with", hook), container("without", json!([])), container("empty", empty)];
    let [wall, _] = race(&mut containers, 12);
    let note = "the difference between a container with the hook and the same one without it, of runc run with a root file system \
of busybox. A hook that does nothing has its share in it: runc starts a process and waits for it";
    let row = |name: &str, beside: &str, theirs: &Rounds, target| Row {
        name: name.into(),
        work: "what the hook adds to the start of a container".into(),
        kcm: wall[0].difference(theirs, Samples::median) / MILLI,
        kcm_p99: None,
        beside: beside.into(),
        theirs: theirs.all().median() / MILLI,
        theirs_p99: Some(theirs.all().p99() / MILLI),
        unit: "ms",
        ratio: wall[0].ratio(theirs, Samples::median),
        target,
        note: note.into(),
    };
    vec![
        row("container-hook", "runc run without a hook", &wall[1], Target::Within(20.0)),
        row("container-hook-empty", "runc run with the hook true", &wall[2], Target::Informational),
    ]
}

/// A command that runs a container whose program ends at once.
fn container(bundle: &Path, hooks: Value) -> Command {
    let bin = bundle.join("rootfs/bin");
    fs::create_dir_all(&bin).expect("a root file system");
    let busybox = run(Command::new("sh").args(["-c", "command -v busybox"])).0;
    fs::copy(busybox.trim(), bin.join("busybox")).expect("busybox");
    let (_, err, code) = run(Command::new("runc").args(["spec", "--bundle"]).arg(bundle));
    assert_eq!(code, Some(0), "{err}");
    let config = bundle.join("config.json");
    let mut spec: Value = serde_json::from_slice(&fs::read(&config).expect("a file")).expect("JSON");
    spec["process"]["terminal"] = json!(false);
    spec["process"]["args"] = json!(["/bin/busybox", "true"]);
    spec["hooks"] = json!({ "createRuntime": hooks });
    fs::write(&config, spec.to_string()).expect("a configuration");
    let mut command = Command::new("sh");
    command
        .args(["-c", "exec runc --root=\"$B/state\" run --bundle=\"$B\" \"kcm-bench-$$\""])
        .env("B", bundle);
    command
}
