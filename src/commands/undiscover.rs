//! `kcm undiscover`: removes from nodes what discover has set, from anywhere.
//!
//! Owns which nodes, and that one failure does not stop the others. Does not know what is on a node.

use std::process::ExitCode;

use anyhow::Error;

use super::cluster_init::nodes;
use super::common::output;
use super::discover::RETRY_TIMEOUT;
use super::discover::change::{self, removal};
use crate::cli;
use crate::kubernetes::objects::Built;
use crate::kubernetes::objects::reports::{self, NodeReport, ReconcileReport, Report, Target};
use crate::kubernetes::{Cluster, Failure};

/// Cleans the nodes.
pub(super) fn run(args: &cli::Undiscover) -> Result<ExitCode, Error> {
    let cluster = Cluster::find(RETRY_TIMEOUT)?;
    let names = if args.all_hosts { nodes(&cluster)? } else { args.node.clone() };
    let mut code = ExitCode::SUCCESS;
    let mut shown = Vec::new();
    for name in names {
        let target = Target { namespace: args.namespace.clone(), node: name };
        let done = if args.dry_run {
            show(&cluster, &target).map(|requests| shown.extend(requests))
        } else {
            clean(&cluster, &target)
        };
        if let Err(error) = done {
            log::error!("{error:#}");
            code = ExitCode::FAILURE;
        }
    }
    output::print(&shown.join("---\n"))?;
    Ok(code)
}

/// Removes from a node what discover has set, and its reports. The reports of a node that does not exist are removed, too.
pub(super) fn clean(cluster: &Cluster, target: &Target) -> Result<(), Error> {
    let node = &target.node;
    let changed = match change::remove_all(cluster, node, RETRY_TIMEOUT) {
        Err(error) if !is_missing(&error) => return Err(error),
        changed => changed,
    };
    let mut has_reports = false;
    for (kind, request) in [
        (NodeReport::KIND, reports::delete::<NodeReport>(target)),
        (ReconcileReport::KIND, reports::delete::<ReconcileReport>(target)),
    ] {
        if is_there(cluster, request)? {
            has_reports = true;
            log::info!("Removed the {kind} of node {node}.");
        }
    }
    if !changed? && !has_reports {
        log::info!("Node {node} has nothing of kcm.");
    }
    Ok(())
}

/// Whether the object of a request does not exist.
fn is_missing(error: &Error) -> bool {
    error.downcast_ref::<Failure>().is_some_and(|failure| failure.code() == Some(404))
}

/// Returns what would be sent.
fn show(cluster: &Cluster, target: &Target) -> Result<Vec<String>, Error> {
    let mut requests = change::shown(cluster, &target.node, &removal())?;
    if is_there(cluster, reports::get::<NodeReport>(target))? {
        requests.push(reports::delete::<NodeReport>(target)?.shown());
    }
    if is_there(cluster, reports::get::<ReconcileReport>(target))? {
        requests.push(reports::delete::<ReconcileReport>(target)?.shown());
    }
    if requests.is_empty() {
        log::info!("Node {} has nothing of kcm.", target.node);
    }
    Ok(requests)
}

/// Sends a request about an object, and returns whether there was one.
fn is_there<T: serde::de::DeserializeOwned>(cluster: &Cluster, request: Built<T>) -> Result<bool, Failure> {
    match cluster.send(&request?) {
        Ok(_) => Ok(true),
        Err(failure) if failure.code() == Some(404) => Ok(false),
        Err(failure) => Err(failure),
    }
}
