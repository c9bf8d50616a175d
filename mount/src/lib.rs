//! The live configuration directory of kcm: CPU pools as a filesystem, in which a write to a `tasks` file is a
//! claim that is atomic, verified and explained.
//!
//! ```text
//!            a write(2) by a client                      signals, unmount
//!                     |                                         |
//!   fs        FUSE requests in, replies out                  daemon    puts the parts together
//!   tree      one table of all files                           |
//!   engine    the lock, and the order of things  --------  journal, process
//!   model     decides; pure
//! ```
//!
//! Architecture invariants:
//! - [`model`] imports nothing of this crate but itself, and no clock, file, process or thread.
//! - [`model::claims::Claims::apply`] is the only way in which anybody gets onto a CPU list.
//! - `process` is the only module with unsafe code, `fs` the only one that names fuser's replies.
//! - Nothing on the way of a request waits for the mount itself, or without bound for anything.

pub mod affinity;
pub mod child;
mod clock;
pub mod daemon;
mod engine;
pub mod failpoint;
mod fuse;
mod handles;
mod import;
mod journal;
mod metrics;
pub mod model;
pub mod mountpoint;
mod process;
pub mod procfs;
pub mod state;
mod tree;
