//! `kcm cluster-init`: prepares nodes with pods, one pod after another, many nodes at the same time.
//!
//! Owns the checks before the first request, the order on a node, and what a node must have in the end. Does not know what
//! is in a pod. It has async code (tokio, on one thread), because it waits for the pods of many nodes at the same time.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Error, anyhow, bail};
use futures_util::StreamExt as _;
use futures_util::stream;
use tokio::time::sleep;

use super::common::node::taint;
use super::common::output::print;
use crate::backoff::Backoff;
use crate::cli;
use crate::kubernetes::Cluster;
use crate::kubernetes::objects::pods::{self, Plan, PlannedPod};
use crate::kubernetes::objects::{CRDS, RBAC, node, yaml_stream};

mod bring_up;
mod pod_cache;
mod progress;

pub(super) use bring_up::{Existing, Pods};

/// How long a request is retried.
pub(super) const RETRY_TIMEOUT: Duration = Duration::from_secs(30);
/// How many nodes are in progress at the same time.
pub(super) const NODES_AT_ONCE: usize = 50;
/// The pauses between two looks at a node.
const PAUSES: RangeInclusive<Duration> = Duration::from_millis(50)..=Duration::from_secs(5);
/// How long the name of an object may be, in bytes (RFC 1123).
const LONGEST_NAME: usize = 253;

/// Prepares the nodes.
pub(super) fn run(args: &cli::ClusterInit) -> Result<ExitCode, Error> {
    let plan = plan(args)?;
    let named: Vec<String> = args.host_list.iter().cloned().collect::<BTreeSet<_>>().into_iter().collect();
    check_names(&plan, &named)?;
    if args.dry_run && !args.all_hosts {
        return show(&plan, &named);
    }
    let cluster = Cluster::find(RETRY_TIMEOUT)?;
    let known = nodes(&cluster)?;
    let nodes = if args.all_hosts { known } else { check_known(named, &known)? };
    check_names(&plan, &nodes)?;
    if args.dry_run {
        return show(&plan, &nodes);
    }
    log::info!(
        "A pod that mounts {0} itself keeps the mount that it started with; restart it when {0} is mounted again.",
        plan.conf_dir
    );
    let pods = Pods::new(cluster.client(), &plan.namespace, args.timeout, nodes.len());
    let work = Work { plan: &plan, pods };
    cluster.run(work.prepare_all(&nodes))
}

fn plan(args: &cli::ClusterInit) -> Result<Plan, Error> {
    Ok(Plan {
        commands: args.kcm_cmd_list.0.clone(),
        namespace: args.namespace.clone(),
        service_account: args.service_account.clone(),
        image: args.image.kcm_img.clone(),
        pull_policy: args.image.kcm_img_pol.clone(),
        conf_dir: directory("conf-dir", &args.dir.conf_dir)?,
        state_dir: directory("state-dir", &args.state_dir)?,
        install_dir: directory("install-dir", &args.target.install_dir)?,
        dataplane: args.num_dp_cores.to_string(),
        isolated: args.isolated,
        controlplane: args.num_cp_cores.to_string(),
        taint: taint(&args.taint),
    })
}

/// Checks a directory of the nodes.
///
/// # Errors
/// The path is relative, or the root.
pub(super) fn directory(flag: &str, path: &Path) -> Result<String, Error> {
    let text = path.to_str().filter(|text| text.starts_with('/'));
    let text = text.with_context(|| format!("--{flag}={}: give an absolute path", path.display()))?;
    match text.trim_end_matches('/') {
        "" => bail!("/ cannot be a directory of kcm; give a directory below it"),
        text => Ok(text.to_owned()),
    }
}

/// Checks that the pods of these nodes can have their names.
fn check_names(plan: &Plan, nodes: &[String]) -> Result<(), Error> {
    for node in nodes {
        if let Some(pod) = plan.pods(node).into_iter().find(|pod| pod.name.len() > LONGEST_NAME) {
            bail!("{}: too long for the name of a pod; give the node a shorter name", pod.name);
        }
    }
    Ok(())
}

fn show(plan: &Plan, nodes: &[String]) -> Result<ExitCode, Error> {
    let pods: Vec<PlannedPod> = nodes.iter().flat_map(|node| plan.pods(node)).collect();
    print(&yaml_stream(pods.iter().map(|pod| &pod.object)))?;
    Ok(ExitCode::SUCCESS)
}

/// Returns the names of all nodes.
pub(super) fn nodes(cluster: &Cluster) -> Result<Vec<String>, Error> {
    let (mut names, mut token) = (Vec::new(), None::<String>);
    loop {
        let page = cluster.send(&node::list(token.as_deref())?)?;
        names.extend(page.items.into_iter().filter_map(|node| node.metadata.name));
        token = page.metadata.continue_;
        if token.as_ref().is_none_or(String::is_empty) {
            return Ok(names);
        }
    }
}

/// Returns the named nodes, all of which the cluster has to know.
pub(super) fn check_known(named: Vec<String>, known: &[String]) -> Result<Vec<String>, Error> {
    let unknown: Vec<&str> = named.iter().filter(|name| !known.contains(name)).map(String::as_str).collect();
    if !unknown.is_empty() {
        bail!("not in this cluster: {}; nothing was created; see kubectl get nodes", unknown.join(", "));
    }
    Ok(named)
}

/// One run of the command.
struct Work<'a> {
    plan: &'a Plan,
    pods: Pods,
}

impl Work<'_> {
    async fn prepare_all(&self, nodes: &[String]) -> Result<ExitCode, Error> {
        let all = stream::iter(nodes).map(|node| self.prepare(node)).buffer_unordered(NODES_AT_ONCE);
        let results = self.pods.until_stopped(all.collect::<Vec<_>>()).await;
        let results = results.map_err(|error| {
            let created = self.pods.created();
            let created = if created.is_empty() { "none".into() } else { created.join(", ") };
            anyhow!("{error:#}; created pods, which stay: {created}; run again to continue")
        })?;
        check_all(&results)?;
        log::info!("{} nodes are ready.", nodes.len());
        Ok(ExitCode::SUCCESS)
    }

    /// Prepares one node: each of its pods has to reach its goal before the next one is created.
    async fn prepare(&self, node: &str) -> Result<(), Error> {
        self.pods.step(node, "waiting");
        for pod in &self.plan.pods(node) {
            if let Err(error) = self.pods.bring_up(node, pod, Existing::Equal).await {
                self.pods.finish(node, &format!("{}: failed", pod.phase), false);
                return Err(self.advised(node, error));
            }
        }
        if self.plan.discovers()
            && let Err(error) = self.advertised(node).await
        {
            self.pods.finish(node, "discover: failed", false);
            return Err(error);
        }
        self.pods.finish(node, "ready", true);
        Ok(())
    }

    /// Waits until the node has its slots, label and taint. They can be gone although all pods run.
    async fn advertised(&self, node: &str) -> Result<(), Error> {
        let started = Instant::now();
        let mut backoff = Backoff::new(PAUSES);
        loop {
            let current = self.pods.client.send(&node::get(node)?).await?;
            let Some(missing) = node::missing(&current, self.plan.taint.as_ref()) else { return Ok(()) };
            self.pods.step(node, &format!("discover: the node has no {missing}"));
            let pause = backoff.next();
            if let Some(limit) = self.pods.timeout.filter(|limit| started.elapsed() + pause > *limit) {
                bail!(
                    "node {node}: it has no {missing} after {} s; look at the log of discover: kubectl logs -n {} -l \
                     {} -c discover",
                    limit.as_secs(),
                    self.plan.namespace,
                    pods::selector()
                );
            }
            sleep(pause).await;
        }
    }

    /// Adds to the message about a pod without rights how it gets them.
    fn advised(&self, node: &str, error: Error) -> Error {
        let message = format!("{error:#}");
        if !message.contains("403 Forbidden") || self.plan.service_account.is_some() {
            return error;
        }
        anyhow!(
            "{message}; the default service account has no rights: kcm cluster-uninstall --host-list={node} \
             --namespace={}, kubectl apply -f {RBAC} -f {CRDS}, then run again with --namespace=kcm-system \
             --service-account=kcm-node",
            self.plan.namespace
        )
    }
}

/// Shows each failure, and counts them.
///
/// # Errors
/// There is a failure.
fn check_all(results: &[Result<(), Error>]) -> Result<(), Error> {
    let failures: Vec<&Error> = results.iter().filter_map(|result| result.as_ref().err()).collect();
    for failure in &failures {
        log::error!("{failure:#}");
    }
    if !failures.is_empty() {
        bail!("{} of {} nodes failed; solve the problems and run again", failures.len(), results.len());
    }
    Ok(())
}
