//! The live configuration directory of kcm: CPU pools as a filesystem. A write to a `tasks` file is a claim, which is
//! atomic, verified, and explained if it is refused.
//!
//! ```text
//!   daemon     two processes: the supervisor keeps the mount, the worker serves it
//!     |
//!   fuse       decodes requests, encodes replies
//!     |
//!   tree       one table of all files
//!     |
//!   engine     the claims lock, and the order of effects  --->  journal, process
//!     |
//!   model      decides; pure
//! ```
//!
//! Imports go down and to the right only. The invariants:
//! - [`model`] imports nothing of this crate but itself, and uses no clock, file, process or thread.
//! - [`model::claims::Claims::apply`] is the only way to get a claim.
//! - Only `process` has unsafe code, and only `fuse` names fuser.
//! - No request accesses the mount, and a request that waits has a bound for it.

pub mod affinity;
pub mod child;
mod clock;
pub mod daemon;
mod engine;
pub mod failpoint;
mod fair;
mod fuse;
mod handles;
mod import;
mod journal;
mod metrics;
pub mod model;
pub mod mountpoint;
mod partitions;
pub mod plain;
mod process;
pub mod procfs;
pub mod state;
pub mod text;
mod tree;
mod uevents;
