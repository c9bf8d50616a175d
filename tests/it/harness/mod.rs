//! What all tests need: a real mount in a temporary place, a shell that knows it, and processes to claim for.
//!
//! Owns: set-up and tidying. Must not know: any promise. A test that cannot mount fails.
#![allow(dead_code, unused_imports, unreachable_pub, reason = "two test targets and the benchmark share it")]

pub mod both;
pub mod cgroup;
pub mod enclosure;
pub mod looking;
mod machine;
mod mount;
mod outputs;
mod own_cgroup;
mod plain;
mod processes;
pub mod program;
mod shell;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

pub use cgroup::{Cgroup, Cpuset};
pub use machine::Machine;
pub use mount::Mount;
pub use outputs::{data, events, fails, report, run, says, text, told_of};
pub use plain::{Plain, kcm_for};
pub use processes::{
    Sleeper, Stray, as_nobody, children, free, has_died, killed_on, let_a_tick_pass, masks, pids, pin,
    proc_number, signal, sleeper_of_nobody, sleeps, stat, threads,
};
pub use shell::Shell;

/// The program under test.
pub const KCM: &str = env!("CARGO_BIN_EXE_kcm");

/// How long something may take that takes milliseconds: these machines are shared.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// One write(2) of these bytes through a descriptor opened for writing.
pub fn write(file: &Path, bytes: impl AsRef<[u8]>) -> std::io::Result<()> {
    use std::io::Write as _;
    let written = fs::OpenOptions::new().write(true).open(file)?.write(bytes.as_ref())?;
    assert_eq!(written, bytes.as_ref().len(), "a write is taken wholly or not at all");
    Ok(())
}

/// The errno of a refused operation.
pub fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> nix::errno::Errno {
    nix::errno::Errno::from_raw(result.expect_err("should be refused").raw_os_error().unwrap_or(0))
}

/// Waits for something that has to come true.
pub fn until(what: &str, mut is_true: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_true() {
        assert!(Instant::now() < deadline, "in vain waited until {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The user id of `nobody`, and its group.
pub const NOBODY: u32 = 65534;

pub fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
}

/// This test program, started again to do the part of `test` in which the environment variable is set. `test`: with
/// its module path, as in `concat!(module_path!(), "::name")`.
pub fn again(test: &str, variable: &str, value: &str) -> Command {
    // A test's name has no crate in front.
    let test = test.split_once("::").map_or(test, |(_, test)| test);
    let mut command = Command::new(std::env::current_exe().expect("our own path"));
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(variable, value);
    command
}

/// The PIDs in a `tasks` file.
pub fn held(file: &Path) -> Vec<u32> {
    let text = fs::read_to_string(file).expect("tasks");
    assert!(text.is_empty() || text.ends_with('\n'), "{text:?}");
    text.trim_end().split_terminator(',').map(|pid| pid.parse().expect("a PID")).collect()
}
