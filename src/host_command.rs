//! The commands that `cluster-init` runs on each host.
//!
//! Owns their names. Does not know what a command needs on the host, or how it gets there.

/// A command that `cluster-init` runs on each host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HostCommand {
    Init,
    Discover,
    Install,
    Reconcile,
    NodeReport,
}

impl HostCommand {
    pub(crate) const ALL: [Self; 5] =
        [Self::Init, Self::Discover, Self::Install, Self::Reconcile, Self::NodeReport];

    /// Returns the legacy name, which for `node-report` has no hyphen.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Init => "init",
            Self::Discover => "discover",
            Self::Install => "install",
            Self::Reconcile => "reconcile",
            Self::NodeReport => "nodereport",
        }
    }

    /// Whether it runs again and again.
    pub(crate) fn is_periodic(self) -> bool {
        matches!(self, Self::Reconcile | Self::NodeReport)
    }
}
