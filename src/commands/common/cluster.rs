//! The connection of a command to its Kubernetes cluster.
//!
//! Owns when the connection is made. Does not know what is sent.

use std::time::Duration;

use anyhow::{Context as _, Error};

use crate::kubernetes::Cluster;

/// Returns the cluster, and reads the client configuration on the first call only, so that a periodic command
/// that failed to connect tries again on its next run. `timeout`: how long each request is retried.
///
/// # Errors
/// The client configuration is missing or unusable.
pub(crate) fn connected(cluster: &mut Option<Cluster>, timeout: Duration) -> Result<&Cluster, Error> {
    if cluster.is_none() {
        *cluster = Some(Cluster::find(timeout)?);
    }
    cluster.as_ref().context("no cluster")
}
