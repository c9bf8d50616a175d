//! The connection to the kernel's FUSE driver.
//!
//! Owns everything that names fuser or FUSE's wire format: the adapter (requests in, replies out), the constants of
//! the ABI, the session and the wake-up of pollers. Does not know what a claim is, or how the mount is made.

pub(crate) mod abi;
mod adapter;
mod operations;
mod poll;
mod queue;
mod request;
mod session;
mod turns;

pub(crate) use session::{Session, request_resend};
