//! The roles of the daemon's processes.
//!
//! Owns their words on the command line. Does not know what a role does.

/// The hidden command of the daemon's own processes.
pub(super) const COMMAND: &str = "__daemon";

pub(super) const WORKER: &str = "worker";
pub(super) const SUPERVISOR: &str = "supervisor";
pub(super) const REPLACE_WORKER: &str = "--replace-worker";
pub(super) const PREFLIGHT: &str = "preflight";
pub(super) const PROBE: &str = "probe";

/// The purpose of a daemon process. The first supervisor has no role on its command line: it is `kcm mount
/// --foreground`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Serves requests.
    Worker,
    /// Continues for a supervisor that has died or has executed this program.
    Supervisor {
        /// Whether the worker runs an older program and is replaced.
        replace_worker: bool,
    },
    /// Checks that this program can read the state directory.
    Preflight,
    /// Accesses the mount, to find out whether it answers.
    Probe,
}

impl Role {
    /// The words of this role on the command line.
    pub(super) fn words(self) -> &'static [&'static str] {
        match self {
            Self::Worker => &[WORKER],
            Self::Supervisor { replace_worker: false } => &[SUPERVISOR],
            Self::Supervisor { replace_worker: true } => &[SUPERVISOR, REPLACE_WORKER],
            Self::Preflight => &[PREFLIGHT],
            Self::Probe => &[PROBE],
        }
    }
}
