//! The harness: a real mount in a temporary directory, a shell that knows it, and processes to claim for.
//!
//! Owns set-up and clean-up; does not know what a test checks. If a mount fails, the test fails.
#![allow(dead_code, unused_imports, unreachable_pub, reason = "two test targets and the benchmark share it")]

pub mod cgroup;
pub mod dir;
mod machine;
mod mount;
mod outputs;
mod own_cgroup;
pub mod pid_namespace;
mod plain;
mod processes;
pub mod program;
pub mod reconcile_loop;
mod shell;
mod terminal;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

pub use cgroup::{Cgroup, Cpuset, missing_for_isolation};
pub use machine::Machine;
pub use mount::Mount;
pub use outputs::{data, events, fails, pids_in, report, run, says, text};
pub use plain::{Plain, kcm_for};
pub use processes::{
    Sleeper, Stray, as_nobody, children, free, has_died, if_collected, killed_on, let_a_tick_pass, masks,
    pids, pin, proc_number, signal, sleeper_of_nobody, sleeps, stat, threads,
};
pub use shell::Shell;
pub use terminal::Terminal;

/// The program under test.
pub const KCM: &str = env!("CARGO_BIN_EXE_kcm");

/// The version of the kernel, such as (6, 12).
pub fn kernel() -> (u32, u32) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap())
}

/// Fails unless kcm is statically linked: the test runs it in a root directory without libraries. This crate is built
/// with the same flags as the program.
pub fn require_static_kcm() {
    if !cfg!(target_feature = "crt-static") {
        panic!("this test needs a statically linked kcm: run scripts/test, which builds one");
    }
}

/// The limit for something that takes milliseconds: machines are shared, and virtual ones without KVM are slow.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// Writes these bytes with one write(2) through a file opened for writing.
pub fn write(file: &Path, bytes: impl AsRef<[u8]>) -> std::io::Result<()> {
    use std::io::Write as _;
    let written = fs::OpenOptions::new().write(true).open(file)?.write(bytes.as_ref())?;
    assert_eq!(written, bytes.as_ref().len(), "a write is accepted completely or not at all");
    Ok(())
}

/// The errno of a refused operation.
pub fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> nix::errno::Errno {
    nix::errno::Errno::from_raw(result.expect_err("should be refused").raw_os_error().unwrap_or(0))
}

/// Waits until a condition is true; panics after [`TIMEOUT`].
pub fn until(what: &str, mut is_true: impl FnMut() -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !is_true() {
        assert!(Instant::now() < deadline, "timed out waiting until {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The user id of `nobody`, and its group.
pub const NOBODY: u32 = 65534;

pub fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
}

/// This test binary, started again to do the part of `test` for which the environment variable is set. `test`
/// includes the module path, as in `concat!(module_path!(), "::name")`.
pub fn again(test: &str, variable: &str, value: &str) -> Command {
    // The name of a test does not include the crate.
    let test = test.split_once("::").map_or(test, |(_, test)| test);
    let mut command = Command::new(std::env::current_exe().expect("the path of the test binary"));
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(variable, value);
    command
}

/// The PIDs in a `tasks` file.
pub fn held(file: &Path) -> Vec<u32> {
    let text = fs::read_to_string(file).expect("tasks");
    assert!(text.is_empty() || text.ends_with('\n'), "{text:?}");
    text.trim_end().split_terminator(',').map(|pid| pid.parse().expect("a PID")).collect()
}
