//! `kcm cluster-uninstall`: takes back what `cluster-init` has made, on many nodes at the same time.
//!
//! Owns the order on a node, and what stays if a step fails. Does not know what `kcm uninstall` removes.
//!
//! On each node first a pod runs `kcm uninstall`, while the others still run: it needs the mount, and if it is refused, the
//! node is as it was. Then the pods are deleted, except the mount, and after them the slots, the label and the taint of the
//! node, which `discover` would set again. The mount is the last, so that a run which was interrupted finds the node again.

use std::collections::BTreeSet;
use std::process::ExitCode;

use anyhow::{Error, bail};
use futures_util::StreamExt as _;
use futures_util::stream;

use super::cluster_init::{Existing, NODES_AT_ONCE, Pods, RETRY_TIMEOUT, check_known, directory, nodes};
use super::undiscover;
use crate::cli;
use crate::kubernetes::Cluster;
use crate::kubernetes::objects::pods::Plan;
use crate::kubernetes::objects::reports::Target;

/// Uninstalls on the nodes, or says with `--dry-run` what it would do.
pub(super) fn run(args: &cli::ClusterUninstall) -> Result<ExitCode, Error> {
    let plan = plan(args)?;
    let named: Vec<String> = args.host_list.iter().cloned().collect::<BTreeSet<_>>().into_iter().collect();
    let cluster = Cluster::find(RETRY_TIMEOUT)?;
    let known = nodes(&cluster)?;
    let nodes = if args.all_hosts { known } else { check_known(named, &known)? };
    let work = |nodes: &[String]| {
        let pods = Pods::new(cluster.client(), &plan.namespace, args.timeout, nodes.len());
        Work { plan: &plan, pods, force: args.force }
    };
    // A node that is not named may have another kcm than the one of cluster-init.
    let nodes = if args.all_hosts { cluster.run(work(&nodes).with_pods(&nodes))? } else { nodes };
    let work = work(&nodes);
    if args.dry_run {
        return cluster.run(work.show_all(&nodes));
    }
    let results = cluster.run(work.on_all(&nodes, |node| work.uninstall(node)))?;
    let (done, mut failed) = split(nodes, results);
    // One node after another: these are a few small requests each.
    let target = |node: &String| Target { namespace: plan.namespace.clone(), node: node.clone() };
    let results = done.iter().map(|node| undiscover::clean(&cluster, &target(node))).collect();
    let (done, more) = split(done, results);
    failed.extend(more);
    let results = cluster.run(work.on_all(&done, |node| work.end_mount(node)))?;
    let (done, more) = split(done, results);
    failed.extend(more);
    for error in &failed {
        log::error!("{error:#}");
    }
    if !failed.is_empty() {
        bail!(
            "{} of {} nodes failed; solve the problems and run again",
            failed.len(),
            failed.len() + done.len()
        );
    }
    log::info!("{} nodes have no kcm of cluster-init now.", done.len());
    log::info!("{} and the mount point {} stay on the nodes.", plan.state_dir, plan.conf_dir);
    Ok(ExitCode::SUCCESS)
}

/// Returns the nodes whose step has succeeded, and the errors of the others.
fn split(nodes: Vec<String>, results: Vec<Result<(), Error>>) -> (Vec<String>, Vec<Error>) {
    let (mut done, mut failed) = (Vec::new(), Vec::new());
    for (node, result) in nodes.into_iter().zip(results) {
        match result {
            Ok(()) => done.push(node),
            Err(error) => failed.push(error),
        }
    }
    (done, failed)
}

fn plan(args: &cli::ClusterUninstall) -> Result<Plan, Error> {
    Ok(Plan {
        commands: Vec::new(),
        namespace: args.namespace.clone(),
        service_account: None,
        image: args.image.kcm_img.clone(),
        pull_policy: args.image.kcm_img_pol.clone(),
        conf_dir: directory("conf-dir", &args.dir.conf_dir)?,
        state_dir: directory("state-dir", &args.state_dir)?,
        install_dir: directory("install-dir", &args.target.install_dir)?,
        dataplane: String::new(),
        isolated: false,
        controlplane: String::new(),
        taint: None,
    })
}

/// One run of the command.
struct Work<'a> {
    plan: &'a Plan,
    pods: Pods,
    force: bool,
}

impl Work<'_> {
    /// Does a step on many nodes at the same time.
    async fn on_all<'n, F: Future<Output = Result<(), Error>>>(
        &self,
        nodes: &'n [String],
        step: impl Fn(&'n str) -> F,
    ) -> Result<Vec<Result<(), Error>>, Error> {
        let all = stream::iter(nodes).map(|node| step(node)).buffered(NODES_AT_ONCE);
        let results = self.pods.until_stopped(all.collect::<Vec<_>>()).await;
        results.map_err(|error| error.context("run again to continue"))
    }

    /// Runs `kcm uninstall` on the node, and deletes all pods except the mount.
    async fn uninstall(&self, node: &str) -> Result<(), Error> {
        self.pods.step(node, "waiting");
        let result = self.uninstall_in_order(node).await;
        if result.is_err() {
            self.pods.finish(node, "failed", false);
        }
        result
    }

    async fn uninstall_in_order(&self, node: &str) -> Result<(), Error> {
        let uninstall = self.plan.uninstall_pod(node, self.force);
        let mount = self.plan.mount_pod(node);
        // From a run that was interrupted.
        self.pods.delete(node, &uninstall.name).await?;
        let had_mount = self.pods.of_node(node).await.contains(&mount.name);
        let mut result = self.pods.bring_up(node, &mount, Existing::Any).await;
        if result.is_ok() {
            result = self.pods.bring_up(node, &uninstall, Existing::Any).await;
        }
        if result.is_err() {
            // The message has what the log says. Only pods that were there before stay.
            let _ = self.pods.delete(node, &uninstall.name).await;
            if !had_mount {
                let _ = self.pods.delete(node, &mount.name).await;
            }
            return result;
        }
        for name in self.pods.of_node(node).await.iter().filter(|name| **name != mount.name) {
            self.pods.delete(node, name).await?;
        }
        Ok(())
    }

    async fn end_mount(&self, node: &str) -> Result<(), Error> {
        let result = self.pods.delete(node, &self.plan.mount_pod(node).name).await;
        self.pods.finish(node, if result.is_ok() { "uninstalled" } else { "failed" }, result.is_ok());
        result
    }

    /// Returns the nodes that have pods of cluster-init.
    async fn with_pods(&self, nodes: &[String]) -> Result<Vec<String>, Error> {
        let look = async {
            let mut found = Vec::new();
            for node in nodes {
                if !self.pods.of_node(node).await.is_empty() {
                    found.push(node.clone());
                }
            }
            found
        };
        self.pods.until_stopped(look).await
    }

    async fn show_all(&self, nodes: &[String]) -> Result<ExitCode, Error> {
        let show = async {
            for node in nodes {
                let pods = self.pods.of_node(node).await;
                let pods = if pods.is_empty() { "no pods".into() } else { pods.join(", ") };
                log::info!(
                    "{node}: would run kcm uninstall, delete {pods}, and remove slots, label and taint."
                );
            }
        };
        self.pods.until_stopped(show).await?;
        Ok(ExitCode::SUCCESS)
    }
}
