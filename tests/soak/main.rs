//! The heavy tests: load, restarts and faults for a minute or longer, and the kernel's out-of-memory killer.
//!
//! They are a target of their own because cargo runs targets one after the other: a test here must not slow down the
//! timing-sensitive tests of the `it` target. They need root and `/dev/fuse`.
#![allow(
    unreachable_pub,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test fails by panicking, and nothing outside uses this crate"
)]

mod clients;
mod faults_under_load;
#[path = "../it/harness/mod.rs"]
mod harness;
mod out_of_memory;
mod reconcile;
mod restarts;
