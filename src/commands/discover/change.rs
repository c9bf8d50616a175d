//! Changes of a node, sent until none is missing.
//!
//! Owns conflicts with the changes of others, and what is removed as a whole. Does not know what is in a change.

use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use anyhow::{Error, bail};
use k8s_openapi::api::core::v1::Node;

use crate::backoff::Backoff;
use crate::kubernetes::Cluster;
use crate::kubernetes::objects::node::{self, Change, Slots};

/// The pauses after conflicts.
const PAUSES: RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_secs(1);

/// One thing that a node should have: the request that is missing, given the node as it is.
pub(in crate::commands) type Step<'a> = dyn Fn(&Node) -> Change + 'a;

/// The steps that remove from a node what discover sets.
pub(in crate::commands) fn removal() -> [&'static Step<'static>; 2] {
    [&without_slots, &without_marks]
}

/// Removes everything that discover has set from a node. Returns whether there was anything.
///
/// # Errors
/// As for [`apply`].
pub(in crate::commands) fn remove_all(
    cluster: &Cluster,
    name: &str,
    retry_timeout: Duration,
) -> Result<bool, Error> {
    let has_changed = apply(cluster, name, &removal(), retry_timeout)?;
    if has_changed {
        log::info!("Removed the slots, the label and the taint of node {name}.");
    }
    Ok(has_changed)
}

fn without_slots(node: &Node) -> Change {
    node::capacity(node, &Slots::new())
}

fn without_marks(node: &Node) -> Change {
    node::label_and_taint(node, None)
}

/// Sends what each step misses, until none misses anything. Returns whether anything was sent. `retry_timeout`: how long
/// conflicts are retried.
///
/// # Errors
/// The server refuses, is not available, or does not make a change.
pub(in crate::commands) fn apply(
    cluster: &Cluster,
    name: &str,
    steps: &[&Step<'_>],
    retry_timeout: Duration,
) -> Result<bool, Error> {
    let deadline = Instant::now() + retry_timeout;
    let mut node = cluster.send(&node::get(name)?)?;
    let mut has_changed = false;
    for step in steps {
        let mut backoff = Backoff::new(PAUSES);
        while let Some(request) = step(&node)? {
            match cluster.send(&request) {
                Ok(changed) => {
                    node = changed;
                    has_changed = true;
                    if step(&node)?.is_some() {
                        bail!(
                            "{}: the server accepted the change and did not make it; does a webhook undo it?",
                            request.subject()
                        );
                    }
                }
                // Somebody else changed the node first. That change is kept.
                Err(failure) if failure.code() == Some(409) && Instant::now() < deadline => {
                    log::debug!("{failure}; reading the node again");
                    std::thread::sleep(backoff.next());
                    node = cluster.send(&node::get(name)?)?;
                }
                Err(failure) => return Err(failure.into()),
            }
        }
    }
    Ok(has_changed)
}

/// Returns what would be sent. The second step is shown for the node as it is before the first one.
///
/// # Errors
/// The node cannot be read.
pub(in crate::commands) fn shown(
    cluster: &Cluster,
    name: &str,
    steps: &[&Step<'_>],
) -> Result<Vec<String>, Error> {
    let node = cluster.send(&node::get(name)?)?;
    let mut requests = Vec::new();
    for step in steps {
        requests.extend(step(&node)?.map(|request| request.shown()));
    }
    Ok(requests)
}
