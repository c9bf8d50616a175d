//! What kcm asks of a Kubernetes API server.
//!
//! `objects` builds every request and object, purely; `client` sends them. Must not know: configuration
//! directories, the machine, or what was typed. tokio and TLS live in `client` alone, and start with the first
//! request: no other command pays for them.

mod client;
pub(crate) mod objects;

pub(crate) use client::{Cluster, Failure, Notify, Sender, interrupted, sleep, timeout};
