//! The configuration as the daemon works with it: pools, lists, owners and modes.
//!
//! Owns these types. Does not know how they are stored ([`super::format`]), or when ([`super::config`]).

use crate::model::cpuset::CpuSet;
use crate::model::pool::{Exclusivity, ListId, Mode, PoolName};

/// A pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PoolConfig {
    pub(crate) name: PoolName,
    pub(crate) exclusivity: Exclusivity,
    /// Whether exclusive lists with offline CPUs can be claimed.
    pub(crate) partial: bool,
    pub(crate) mode: Mode,
    /// Whether it and its lists are removed when they are not used any longer.
    pub(crate) transient: bool,
    /// The id of its directory.
    pub(crate) node: u64,
    pub(crate) lists: Vec<ListConfig>,
}

/// A CPU list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ListConfig {
    pub(crate) id: ListId,
    /// The name of its directory.
    pub(crate) name: String,
    pub(crate) cpus: CpuSet,
    /// Whether it takes no new tasks.
    pub(crate) draining: bool,
}

/// Owner and mode of a node, if they were changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NodeAttributes {
    pub(crate) node: u64,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// The permission bits.
    pub(crate) mode: u16,
}

/// A request of the kernel, and the mount in which its number is unique.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LastRequest {
    pub(crate) mount: u64,
    pub(crate) request: u64,
}
