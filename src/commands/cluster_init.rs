//! `kcm cluster-init`: prepares nodes with pods, one pod after another, many nodes at the same time.
//!
//! Owns the checks before the first request, the order on a node, and the message about a pod that fails. Does not
//! know what is in a pod. It is the only command with async code of its own (tokio, on one thread), because it waits for
//! the pods of many nodes at the same time.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Error, anyhow, bail};
use futures_util::StreamExt as _;
use futures_util::future::{Either, select};
use futures_util::stream;
use k8s_openapi::api::core::v1::Pod;
use tokio::time::{sleep, timeout};

use super::common::output::print;
use crate::backoff::Backoff;
use crate::cli;
use crate::kubernetes::objects::pods::{self, Plan, PlannedPod, State};
use crate::kubernetes::objects::{node, yaml_stream};
use crate::kubernetes::{Client, Cluster, interrupted};

mod pod_cache;
mod progress;

use pod_cache::PodCache;
use progress::Progress;

/// How long a request is retried.
const RETRY_TIMEOUT: Duration = Duration::from_secs(30);
/// How many nodes are in progress at the same time.
const NODES_AT_ONCE: usize = 50;
/// The pauses after conflicts.
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
    let work = Work {
        plan: &plan,
        client: cluster.client(),
        timeout: args.timeout,
        cache: PodCache::new(cluster.client(), &plan.namespace),
        created: RefCell::default(),
        progress: RefCell::new(Progress::new(nodes.len())),
    };
    cluster.run(work.prepare_all(&nodes))
}

fn plan(args: &cli::ClusterInit) -> Result<Plan, Error> {
    let path = |flag: &str, path: &Path| {
        let text = path.to_str().filter(|text| text.starts_with('/'));
        let text = text.with_context(|| format!("--{flag}={}: give an absolute path", path.display()))?;
        Ok::<_, Error>(text.trim_end_matches('/').to_owned())
    };
    let plan = Plan {
        commands: args.kcm_cmd_list.0.clone(),
        namespace: args.namespace.clone(),
        service_account: args.service_account.clone(),
        image: args.kcm_img.clone(),
        pull_policy: args.kcm_img_pol.clone(),
        conf_dir: path("conf-dir", &args.dir.conf_dir)?,
        state_dir: path("state-dir", &args.state_dir)?,
        install_dir: path("install-dir", &args.target.install_dir)?,
        dataplane: args.num_dp_cores,
        isolated: args.isolated,
        controlplane: args.num_cp_cores,
    };
    if [&plan.conf_dir, &plan.state_dir, &plan.install_dir].iter().any(|path| path.is_empty()) {
        bail!("/ cannot be a directory of kcm; give a directory below it");
    }
    Ok(plan)
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

fn check_known(named: Vec<String>, known: &[String]) -> Result<Vec<String>, Error> {
    let unknown: Vec<&str> = named.iter().filter(|name| !known.contains(name)).map(String::as_str).collect();
    if !unknown.is_empty() {
        bail!("not in this cluster: {}; nothing was created; see kubectl get nodes", unknown.join(", "));
    }
    Ok(named)
}

/// One run of the command.
struct Work<'a> {
    plan: &'a Plan,
    client: Client,
    /// How long a pod may take.
    timeout: cli::Wait,
    cache: PodCache,
    /// The names of the pods that were created.
    created: RefCell<Vec<String>>,
    progress: RefCell<Progress>,
}

impl Work<'_> {
    async fn prepare_all(&self, nodes: &[String]) -> Result<ExitCode, Error> {
        let all = stream::iter(nodes).map(|node| self.prepare(node)).buffer_unordered(NODES_AT_ONCE);
        let all = std::pin::pin!(all.collect::<Vec<_>>());
        let stopped = std::pin::pin!(self.stopped());
        let results = select(all, stopped).await;
        self.progress.borrow_mut().end();
        let results = match results {
            Either::Left((results, _)) => results,
            Either::Right((error, _)) => {
                let created = self.created.borrow();
                let created = if created.is_empty() { "none".into() } else { created.join(", ") };
                bail!("{error:#}; created pods, which stay: {created}; run again to continue");
            }
        };
        let failures: Vec<&Error> = results.iter().filter_map(|result| result.as_ref().err()).collect();
        for failure in &failures {
            log::error!("{failure:#}");
        }
        if !failures.is_empty() {
            bail!("{} of {} nodes failed; solve the problems and run again", failures.len(), nodes.len());
        }
        log::info!("{} nodes are ready.", nodes.len());
        Ok(ExitCode::SUCCESS)
    }

    /// Returns when a signal arrives, or when the server does not let us see our pods.
    async fn stopped(&self) -> Error {
        match select(std::pin::pin!(self.cache.run()), std::pin::pin!(interrupted())).await {
            Either::Left((failure, _)) => failure.into(),
            Either::Right((Ok(()), _)) => anyhow!("interrupted"),
            Either::Right((Err(error), _)) => Error::from(error).context("cannot catch signals"),
        }
    }

    /// Prepares one node: each of its pods has to reach its goal before the next one is created.
    async fn prepare(&self, node: &str) -> Result<(), Error> {
        self.progress.borrow_mut().step(node, "waiting");
        for pod in &self.plan.pods(node) {
            if let Err(error) = self.bring_up(node, pod).await {
                self.progress.borrow_mut().finish(node, &format!("{}: failed", pod.phase), false);
                return Err(error);
            }
        }
        self.progress.borrow_mut().finish(node, "ready", true);
        Ok(())
    }

    /// Creates a pod and waits until it reaches its goal.
    async fn bring_up(&self, node: &str, pod: &PlannedPod) -> Result<(), Error> {
        let subject = format!("pod {}/{}", self.plan.namespace, pod.name);
        let last = RefCell::new("not created yet".to_owned());
        let reached = async {
            self.create(pod).await?;
            let outcome = self.cache.wait_for(|pods| {
                let Some(current) = pods.get(&pod.name) else { return Some(None) };
                match pods::state(current, pod.goal) {
                    State::Waiting(why) if why != *last.borrow() => {
                        self.progress.borrow_mut().step(node, &format!("{}: {why}", pod.phase));
                        last.replace(why);
                        None
                    }
                    State::Waiting(_) => None,
                    state => Some(Some(state)),
                }
            });
            match outcome.await {
                Some(State::Failed { container, reason }) => {
                    Err(self.failure(&subject, pod, container, &reason).await)
                }
                Some(_) => Ok(()),
                None => Err(anyhow!("{subject}: it was deleted meanwhile; run again")),
            }
        };
        let Some(limit) = self.timeout else { return reached.await };
        timeout(limit, reached).await.unwrap_or_else(|_| {
            let (seconds, last) = (limit.as_secs(), last.borrow());
            bail!("{subject}: not ready after {seconds} s: {last}; see kubectl describe, or give a longer --timeout")
        })
    }

    /// Creates a pod. If there is one of its name, it has to be equal.
    async fn create(&self, pod: &PlannedPod) -> Result<(), Error> {
        let namespace = &self.plan.namespace;
        let mut backoff = Backoff::new(PAUSES);
        let existing = loop {
            if let Some(existing) = self.existing(&pod.name).await {
                break existing;
            }
            match self.client.send(&pods::create(namespace, pod)?).await {
                Ok(created) => {
                    self.created.borrow_mut().push(pod.name.clone());
                    self.cache.add(created);
                    return Ok(());
                }
                // Either the pod exists: somebody else was faster, or the answer to our own request was lost. Or it
                // does not: many pods are created at once in a namespace with a quota, which counts them.
                Err(failure) if failure.code() == Some(409) => {
                    match self.client.send(&pods::get(namespace, &pod.name)?).await {
                        Ok(existing) if !is_being_deleted(&existing) => break existing,
                        Err(failure) if failure.code() != Some(404) => return Err(failure.into()),
                        _ => {}
                    }
                }
                Err(failure) => return Err(failure.into()),
            }
            sleep(backoff.next()).await;
        };
        if let Some(field) = pods::difference(&existing, &pod.object) {
            let name = &pod.name;
            bail!(
                "pod {namespace}/{name}: exists with a different {field}; kubectl delete pod -n {namespace} {name}"
            );
        }
        self.cache.add(existing);
        Ok(())
    }

    /// Returns the pod of this name, if there is one. Waits while it is being deleted.
    async fn existing(&self, name: &str) -> Option<Pod> {
        let settled = |pod: Option<&Pod>| match pod {
            Some(pod) if is_being_deleted(pod) => None,
            pod => Some(pod.cloned()),
        };
        self.cache.wait_for(|pods| settled(pods.get(name))).await
    }

    /// Returns the message about a pod that has failed, with the last line of its log.
    async fn failure(
        &self,
        subject: &str,
        pod: &PlannedPod,
        container: Option<String>,
        reason: &str,
    ) -> Error {
        let namespace = &self.plan.namespace;
        let containers = pod.object.spec.as_ref().map(|spec| spec.containers.as_slice()).unwrap_or_default();
        let first = || containers.first().map(|container| container.name.clone());
        let container = container.or_else(first).unwrap_or_default();
        let log = match pods::last_line(namespace, &pod.name, &container) {
            Ok(request) => self.client.text(&request).await.ok(),
            Err(_) => None,
        };
        let line = log.as_deref().and_then(|text| text.lines().last()).filter(|line| !line.trim().is_empty());
        let line = line.map(|line| format!("; its last line: {line}")).unwrap_or_default();
        anyhow!(
            "{subject}, container {container}: {reason}{line}; then kubectl delete pod -n {namespace} {}",
            pod.name
        )
    }
}

fn is_being_deleted(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some()
}
