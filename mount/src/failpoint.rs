//! The steps of every operation that changes something, so that tests can kill the daemon after each.
//!
//! Owns: the list of steps. In a release build `reached` is nothing at all. Must not know: what the steps
//! do.

macro_rules! steps {
    ($($(#[$doc:meta])* $step:ident = $name:literal,)*) => {
        /// A step of an operation, named for `KCM_FAULT`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Step { $($(#[$doc])* $step,)* }

        impl Step {
            /// Every step that there is.
            pub const ALL: &'static [Step] = &[$(Step::$step,)*];

            /// What `KCM_FAULT` calls it.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Step::$step => $name,)* }
            }
        }
    };
}

steps! {
    /// A write has been decided and its lists are reserved.
    WriteDecided = "write-decided",
    /// The intents are in the log.
    IntentRecorded = "intent-recorded",
    /// All masks are set and read back.
    MasksSet = "masks-set",
    /// The claims, and the releases to be done, are in the log.
    WriteRecorded = "write-recorded",
    /// Released tasks have their masks back.
    MasksBack = "masks-back",
    /// That is in the log.
    ReleaseRecorded = "release-recorded",
    /// The write is settled and not yet answered.
    WriteSettled = "write-settled",
    /// A claim passes on or ends, and that is in the log.
    DeathRecorded = "death-recorded",
    /// A refusal is in the log and not yet answered.
    RefusalRecorded = "refusal-recorded",
    /// An acknowledgement is in the log and not yet answered.
    AcknowledgementRecorded = "acknowledgement-recorded",
    /// A change of the configuration has been decided.
    ConfigDecided = "config-decided",
    /// The changed configuration is on disk.
    ConfigStored = "config-stored",
    /// The change is in force and not yet answered.
    ConfigApplied = "config-applied",
}

/// Dies by SIGKILL where the environment variable `KCM_FAULT` names this step: the first worker alone; with a
/// `*` behind the name, every worker; with a `!`, the keeper too. A lone `?` has every step named in the log.
/// With `@<file>` the file says so, at any time, and is removed when it is obeyed. Debug builds only.
#[cfg(debug_assertions)]
pub(crate) fn reached(step: Step) {
    use nix::sys::signal::{Signal, kill, raise};
    static WANTED: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    let Some(wanted) = WANTED.get_or_init(|| std::env::var(VARIABLE).ok()) else { return };
    if wanted == "?" {
        log::warn!("step {}", step.name());
    }
    let file = wanted.strip_prefix('@');
    let wanted = file.map_or_else(|| Ok(wanted.clone()), std::fs::read_to_string).unwrap_or_default();
    let Some(how) = wanted.strip_prefix(step.name()).filter(|how| matches!(*how, "" | "*" | "!")) else {
        return;
    };
    if file.is_some_and(|file| std::fs::remove_file(file).is_err()) {
        return;
    }
    if how == "!" {
        let _ = kill(nix::unistd::getppid(), Signal::SIGKILL);
    }
    let _ = raise(Signal::SIGKILL);
}

/// For a keeper: what its next workers are to be spared.
pub(crate) fn spare(start: &mut std::process::Command) {
    if cfg!(debug_assertions)
        && std::env::var(VARIABLE).is_ok_and(|wanted| !wanted.ends_with('*') && !wanted.starts_with('@'))
    {
        start.env_remove(VARIABLE);
    }
}

/// Holds up a request that has come again, for as many milliseconds as the environment variable
/// `KCM_SLOW_REPEATS` says. Debug builds only.
#[cfg(debug_assertions)]
pub(crate) fn hold_up_repeat() {
    if let Some(ms) = std::env::var("KCM_SLOW_REPEATS").ok().and_then(|ms| ms.parse().ok()) {
        std::thread::sleep(std::time::Duration::from_millis(ms));
    }
}

/// Nothing, in a release build.
#[cfg(not(debug_assertions))]
pub(crate) fn hold_up_repeat() {}

const VARIABLE: &str = "KCM_FAULT";

/// Nothing, in a release build.
#[cfg(not(debug_assertions))]
pub(crate) fn reached(_: Step) {}
