//! `kcm shield` on a machine that cannot isolate CPUs, and on wrong arguments. What it does elsewhere is in `tests/vm`.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::harness::dir::failure;
use crate::harness::{KCM, Mount, missing_for_isolation, run, text, until};

#[test]
fn a_refusal_leaves_nothing() {
    let Some(missing) = missing_for_isolation() else { return leaves_nothing_elsewhere() };
    let mount = Mount::new();
    mount.make_pool("dataplane", true, &["0"]);
    let refused = failure(&mut mount.kcm(&["shield", "--cpus=1", "true"]));
    assert!(refused.contains(missing), "{refused}");
    let pools: Vec<_> = fs::read_dir(mount.conf().join("pools")).unwrap().flatten().collect();
    assert_eq!(pools.len(), 1, "{pools:?}");
    // Without a mount, the daemon that was started ends.
    mount.stop();
    let absent = mount.home().join("absent");
    let mut command = Command::new(KCM);
    command.args(["shield", "--cpus=1", "--conf-dir"]).arg(&absent).arg("true");
    command.env("KCM_LOG_LEVEL", "ERROR");
    let refused = failure(&mut command);
    assert!(refused.contains(missing), "{refused}");
    let own = Path::new("/run/kcm-shield");
    until("its daemon has ended", || !own.exists() && !own.with_extension("state").exists());
    assert!(!absent.exists());
}

/// Where CPUs can be isolated.
fn leaves_nothing_elsewhere() {
    let mount = Mount::new();
    mount.make_pool("dataplane", true, &["0"]);
    let (out, err, status) =
        run(&mut mount.kcm(&["shield", "--cpus=1", "sh", "-c", "echo $KCM_CPUS_ASSIGNED"]));
    assert_eq!((out.as_str(), status), ("1\n", Some(0)), "{err}");
    until("the pool is removed", || !mount.pool("shield").exists());
}

#[test]
fn what_cannot_be_shielded_is_named() {
    let mount = Mount::with_dataplane();
    mount.make_pool("shield", true, &[]);
    fs::remove_dir(mount.pool("dataplane").join("1")).unwrap();
    fs::create_dir(mount.pool("shield").join("1")).unwrap();
    let refused = failure(&mut mount.kcm(&["shield", "--cpus=0", "true"]));
    assert!(refused.contains("somebody else has made this pool; remove it"), "{refused}");
    assert!(mount.pool("shield").join("1").exists(), "it stays");
    let plain = tempfile::tempdir().unwrap();
    fs::create_dir(plain.path().join("pools")).unwrap();
    let mut command = Command::new(KCM);
    let refused = failure(command.args(["shield", "--cpus=0", "--conf-dir"]).arg(plain.path()).arg("true"));
    assert!(refused.contains("only a mount has isolated pools; run kcm mount --import"), "{refused}");
    for wrong in [
        &["shield", "true"][..],
        &["shield", "--cpus=0"],
        &["shield", "--cpus=", "x"],
        &["shield", "--cpus=1,1", "x"],
    ] {
        let output = mount.kcm(wrong).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{wrong:?}: {}", text(&output.stderr));
    }
}
