//! Failpoints: the steps of every operation that changes something, at each of which a test can kill the daemon.
//!
//! Owns the list of steps, and what a daemon under test must not see. Does not know what the steps do. Debug builds only:
//! in a release build `reached` is empty.

macro_rules! steps {
    ($($(#[$doc:meta])* $step:ident = $name:literal,)*) => {
        /// A step of an operation, named for `KCM_FAULT`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Step { $($(#[$doc])* $step,)* }

        impl Step {
            /// All steps.
            pub const ALL: &'static [Step] = &[$(Step::$step,)*];

            /// Returns the name of the step in `KCM_FAULT`.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Step::$step => $name,)* }
            }

            /// Returns whether it is reached only on a machine that can isolate CPUs.
            #[must_use]
            pub fn is_of_partitions(self) -> bool {
                self.name().starts_with("partition-")
            }
        }
    };
}

steps! {
    /// A write has been decided and its lists are reserved.
    WriteDecided = "write-decided",
    /// The intents are in the claims log.
    IntentRecorded = "intent-recorded",
    /// All masks are set and read back.
    MasksSet = "masks-set",
    /// The claims log has everything that is going to be written for a partition.
    PartitionRecorded = "partition-recorded",
    /// The partition's cgroup is made, and the cpuset controller is on above it.
    PartitionEnabled = "partition-enabled",
    /// The partition has its CPUs, and so have the cgroups above it.
    PartitionExclusive = "partition-exclusive",
    /// The kernel has isolated the CPUs. The task is not on them.
    PartitionIsolated = "partition-isolated",
    /// The task is in its partition, or the partition could not be made.
    PartitionMade = "partition-made",
    /// The partition has no process.
    PartitionEmpty = "partition-empty",
    /// The partition's cgroup is removed.
    PartitionRemoved = "partition-removed",
    /// The cgroups above the partition are as before. That may not be recorded yet.
    PartitionTakenBack = "partition-taken-back",
    /// The claims, and the releases to be made, are in the claims log.
    WriteRecorded = "write-recorded",
    /// The masks of released tasks are restored.
    MasksBack = "masks-back",
    /// The releases are recorded.
    ReleaseRecorded = "release-recorded",
    /// The write is settled and not yet answered.
    WriteSettled = "write-settled",
    /// The claim of a dead task was inherited or has ended. Its record may not be written yet.
    DeathReaped = "death-reaped",
    /// A refusal is recorded and not yet answered.
    RefusalRecorded = "refusal-recorded",
    /// An acknowledgement is recorded and not yet answered.
    AcknowledgementRecorded = "acknowledgement-recorded",
    /// A change of the configuration has been decided.
    ConfigDecided = "config-decided",
    /// The changed configuration is on disk.
    ConfigStored = "config-stored",
    /// The change is in effect and not yet answered.
    ConfigApplied = "config-applied",
}

/// The environment variable that names the step at which to die: `<step>` for the first worker only, `<step>*` for every
/// worker, `<step>!` for the first worker and its supervisor. `?` logs every step instead. `@<file>` reads one of these
/// from a file at every step, and removes the file before it dies.
const VARIABLE: &str = "KCM_FAULT";
/// The environment variable with the time in milliseconds for which every resent request is delayed.
#[cfg(debug_assertions)]
const DELAY_VARIABLE: &str = "KCM_SLOW_REPEATS";
/// The environment variable with the time in milliseconds for which every write of a user other than root is delayed.
#[cfg(debug_assertions)]
const SLOW_WRITES_VARIABLE: &str = "KCM_SLOW_WRITES";
/// If this environment variable is set, the daemon behaves as on a kernel before 6.9.
const NO_RESEND_VARIABLE: &str = "KCM_FAULT_NO_RESEND";

/// Dies of SIGKILL if `KCM_FAULT` names this step.
#[cfg(debug_assertions)]
pub(crate) fn reached(step: Step) {
    use nix::sys::signal::{Signal, kill, raise};
    static FAULT: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    let Some(fault) = FAULT.get_or_init(|| std::env::var(VARIABLE).ok()) else { return };
    if fault == "?" {
        log::warn!("step {}", step.name());
    }
    let file = fault.strip_prefix('@');
    let fault = file.map_or_else(|| Ok(fault.clone()), std::fs::read_to_string).unwrap_or_default();
    let Some(suffix) = fault.strip_prefix(step.name()).filter(|suffix| matches!(*suffix, "" | "*" | "!"))
    else {
        return;
    };
    if file.is_some_and(|file| std::fs::remove_file(file).is_err()) {
        return;
    }
    if suffix == "!" {
        let _ = kill(nix::unistd::getppid(), Signal::SIGKILL);
    }
    let _ = raise(Signal::SIGKILL);
}

/// Does nothing in a release build.
#[cfg(not(debug_assertions))]
pub(crate) fn reached(_: Step) {}

/// Removes the failpoint from the environment of later workers, unless it is meant for every worker.
pub(crate) fn disarm(command: &mut std::process::Command) {
    if cfg!(debug_assertions)
        && std::env::var(VARIABLE).is_ok_and(|fault| !fault.ends_with('*') && !fault.starts_with('@'))
    {
        command.env_remove(VARIABLE);
    }
}

/// Delays a resent request by the time that `KCM_SLOW_REPEATS` names.
#[cfg(debug_assertions)]
pub(crate) fn delay_replay() {
    if let Some(ms) = std::env::var(DELAY_VARIABLE).ok().and_then(|ms| ms.parse().ok()) {
        std::thread::sleep(std::time::Duration::from_millis(ms));
    }
}

/// Does nothing in a release build.
#[cfg(not(debug_assertions))]
pub(crate) fn delay_replay() {}

/// Delays a write of a user other than root by the time that `KCM_SLOW_WRITES` names.
#[cfg(debug_assertions)]
pub(crate) fn delay_write(uid: u32) {
    static DELAY: std::sync::OnceLock<Option<u64>> = std::sync::OnceLock::new();
    let ms = DELAY.get_or_init(|| std::env::var(SLOW_WRITES_VARIABLE).ok().and_then(|ms| ms.parse().ok()));
    if let (Some(ms), 1..) = (*ms, uid) {
        std::thread::sleep(std::time::Duration::from_millis(ms));
    }
}

/// Does nothing in a release build.
#[cfg(not(debug_assertions))]
pub(crate) fn delay_write(_: u32) {}

/// Whether these are the cgroups of a test that runs beside the test of this daemon.
///
/// All tests use the same few CPUs and run as root, so without this a process of one test could be the heir or the
/// intruder of another. A test's processes are in `/kcm-tests-<pid>/<thread>` (`tests/it/harness/own_cgroup.rs`), which
/// a daemon in a cgroup namespace sees as `/../<thread>`, or in `/kcm-test-<pid>-<thread>-<number>`.
#[cfg(debug_assertions)]
pub(crate) fn is_of_another_test<'a>(paths: impl Iterator<Item = &'a str>) -> bool {
    static OWN: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    let own = OWN.get_or_init(|| {
        let text = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        test_of(text.lines().filter_map(|line| line.splitn(3, ':').nth(2)))
    });
    test_of(paths).is_some_and(|test| Some(test) != *own)
}

/// Always false in a release build.
#[cfg(not(debug_assertions))]
pub(crate) fn is_of_another_test<'a>(_: impl Iterator<Item = &'a str>) -> bool {
    false
}

/// Returns the thread of the test whose cgroups these are.
#[cfg(debug_assertions)]
fn test_of<'a>(mut paths: impl Iterator<Item = &'a str>) -> Option<String> {
    paths.find_map(|path| {
        let number = |text: &str| {
            text.split(['/', '-']).next().filter(|it| it.parse::<u32>().is_ok()).map(str::to_owned)
        };
        let after_pid = |rest: &str, separator| number(rest.split_once(separator)?.1);
        // Below the root of a cgroup namespace, other cgroups have paths that lead up first.
        let below = path.trim_start_matches("/..");
        let own = below.strip_prefix("/kcm-tests-").map(|rest| after_pid(rest, '/').unwrap_or_default());
        let other = || below.strip_prefix("/kcm-test-").and_then(|rest| after_pid(rest, '-'));
        let beside = || number(below.strip_prefix('/').filter(|_| below.len() < path.len())?);
        own.or_else(other).or_else(beside)
    })
}

/// Whether the daemon must behave as if the kernel could not send requests again. Never in a release build.
pub(crate) fn hides_resend() -> bool {
    cfg!(debug_assertions) && std::env::var_os(NO_RESEND_VARIABLE).is_some()
}
