//! The scripts say what is missing, before they begin.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use crate::harness::run;

/// Runs a line with the functions of the scripts, and with a toolchain of this version.
fn with_rust(version: &str, line: &str) -> (String, String, Option<i32>) {
    let home = tempfile::tempdir().unwrap();
    for (name, script) in
        [("rustc", format!("echo 'rustc {version} (0123abc 2024-01-01)'")), ("cargo", String::new())]
    {
        let file = home.path().join(name);
        fs::write(&file, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let common = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/common.sh");
    let mut bash = Command::new("bash");
    bash.arg("-c").arg(format!("source '{}'; {line}", common.display()));
    bash.env("PATH", format!("{}:{}", home.path().display(), std::env::var("PATH").unwrap()));
    bash.env("CARGO_BUILD_TARGET", "any");
    run(&mut bash)
}

#[test]
fn a_toolchain_that_is_too_old_is_refused_by_its_version() {
    for old in ["1.75.0", "1.88.1", "1.9.0"] {
        let (out, err, code) = with_rust(old, "need_rust");
        assert_eq!((out.as_str(), code), ("", Some(1)), "{err}");
        assert!(
            err.contains(&format!("rustc {old} is too old: kcm needs Rust {} or newer", least())),
            "{err}"
        );
        assert_eq!(err.lines().count(), 1, "{err}");
    }
    for new in [format!("{}.0", least()), "1.100.0-nightly".to_owned(), "2.0.0".to_owned()] {
        let (_, err, code) = with_rust(&new, "need_rust");
        assert_eq!((err.as_str(), code), ("", Some(0)), "{new}");
    }
}

#[test]
fn a_part_of_the_toolchain_that_is_missing_is_named() {
    let (_, err, code) = with_rust("1.100.0", "need_component cargo-nothing clippy");
    assert_eq!(code, Some(1));
    assert!(err.contains("cargo-nothing is missing; install it: rustup component add clippy"), "{err}");
}

/// The oldest Rust with which kcm builds.
fn least() -> String {
    let manifest = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml")).unwrap();
    let line = manifest.lines().find_map(|line| line.strip_prefix("rust-version = \""));
    line.unwrap().trim_end_matches('"').to_owned()
}
