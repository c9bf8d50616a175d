//! The pure model: what a CPU set, a pool, a claim and a refusal are, and what may happen to them.
//!
//! Owns: every decision about who holds which CPU list. Must not know: files, clocks, processes, threads,
//! FUSE. Time, liveness and masks come in as values; what is to be done goes out as values.

pub mod claims;
pub mod command;
pub mod cpuset;
pub mod pool;
pub mod refusal;
pub mod task;
pub mod topology;
