//! The tree: names, modes, reads, polls and refused operations.

pub mod capabilities;
pub mod config;
pub mod configuring;
pub mod draining;
pub mod events;
pub mod fairness;
pub mod hostile;
pub mod metrics;
pub mod nodes;
pub mod page_cache;
pub mod polling;
pub mod refused;
pub mod renames;
pub mod rights;
pub mod self_dir;
pub mod shell;
pub mod snapshots;
pub mod transient;
