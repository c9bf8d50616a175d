//! Access to a Kubernetes API server.
//!
//! `objects` builds every request and object without I/O; `client` sends requests and retries them; `failure` says
//! what went wrong, without secrets. Does not know configuration directories, the machine or the command line.
//!
//! The network stack (tokio, hyper, TLS) starts with `Cluster::find`; commands that do not talk to a cluster do not
//! pay for it.

mod client;
mod failure;
pub(crate) mod objects;

pub(crate) use client::{Client, Cluster, interrupted};
pub(crate) use failure::Failure;
