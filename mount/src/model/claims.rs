//! The claim machine.

use serde::{Deserialize, Serialize};

use super::cpuset::CpuSet;
use super::pool::ListId;
use super::task::TaskId;

/// The affinity that a task gets back when its claim is released.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SavedMask {
    /// All CPUs: it had all that its cpuset allowed, and so follows its cpuset again.
    All,
    /// Just these.
    Cpus(CpuSet),
}

/// The fact that one task is on one CPU list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// Who.
    pub task: TaskId,
    /// On which list.
    pub list: ListId,
    /// What its leader's mask was before its first claim.
    pub saved: SavedMask,
    /// When the process started, in clock ticks since boot (proc(5), `/proc/PID/stat` field 22).
    pub started: u64,
    /// When the claim was made, in nanoseconds since boot (`CLOCK_BOOTTIME`).
    pub since: u64,
    /// The real uid of the task when it was claimed: heirs must have it too.
    pub uid: u32,
    /// A number for its cgroup when it was claimed: heirs must have it too.
    pub cgroup: u64,
    /// Whether root asked for it (the others share half of what the daemon can watch).
    pub by_root: bool,
}
