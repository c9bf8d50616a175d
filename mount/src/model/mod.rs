//! The pure model: CPU sets, pools, claims and refusals, and their rules.
//!
//! Owns every decision about which task holds which CPU list. Does not know files, clocks, processes, threads,
//! FUSE. Time, liveness and masks are input values; the work to do is an output value.

pub mod cgroup;
pub mod claims;
pub mod command;
pub mod cpuset;
pub mod document;
pub mod partition;
pub mod pool;
pub mod queue;
pub mod refusal;
pub mod rights;
pub mod task;
pub mod topology;
