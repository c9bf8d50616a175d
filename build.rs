//! The version of the program: that of the package, and the commit and its date, if they are known.
//!
//! Owns `KCM_VERSION`. The variable `KCM_COMMIT` has the commit and the date if there is no repository, such as in a package.

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-env-changed=KCM_COMMIT");
    let package = std::env::var("CARGO_PKG_VERSION").unwrap_or_default();
    let commit = std::env::var("KCM_COMMIT").ok().or_else(|| git(&["log", "-1", "--format=%h %cs"]));
    // A line is added to it by each commit and checkout.
    if let Some(log) = git(&["rev-parse", "--git-path", "logs/HEAD"]) {
        println!("cargo:rerun-if-changed={log}");
    }
    match commit.filter(|commit| !commit.is_empty()) {
        Some(commit) => println!("cargo:rustc-env=KCM_VERSION={package} ({commit})"),
        None => println!("cargo:rustc-env=KCM_VERSION={package}"),
    }
}

/// Returns the first line of what git prints; `None` if there is no git or no repository.
fn git(args: &[&str]) -> Option<String> {
    let output = Command::new("git").args(args).output().ok().filter(|output| output.status.success())?;
    String::from_utf8(output.stdout).ok()?.lines().next().map(str::to_owned)
}
