//! Pods of one namespace, created, awaited and deleted.
//!
//! Owns what happens to one pod, and the message about one that fails. Does not know which pods a node needs, or in which
//! order.

use std::cell::{Ref, RefCell};
use std::ops::RangeInclusive;
use std::time::Duration;

use anyhow::{Error, anyhow, bail};
use futures_util::future::{Either, select};
use k8s_openapi::api::core::v1::Pod;
use tokio::time::{sleep, timeout};

use super::pod_cache::PodCache;
use super::progress::Progress;
use crate::backoff::Backoff;
use crate::cli;
use crate::kubernetes::objects::pods::{self, PlannedPod, State};
use crate::kubernetes::{Client, interrupted};

/// The pauses after conflicts.
const PAUSES: RangeInclusive<Duration> = Duration::from_millis(50)..=Duration::from_secs(5);

/// The condition on an existing pod of the name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::commands) enum Existing {
    /// As planned, or it is an error.
    Equal,
    /// It is used as it is.
    Any,
}

/// The pods of kcm in a namespace.
pub(in crate::commands) struct Pods {
    pub(in crate::commands) client: Client,
    namespace: String,
    /// How long a pod may take.
    pub(in crate::commands) timeout: cli::Wait,
    cache: PodCache,
    /// The names of the pods that were created.
    created: RefCell<Vec<String>>,
    progress: RefCell<Progress>,
}

impl Pods {
    /// `nodes`: how many nodes there are to do.
    pub(in crate::commands) fn new(
        client: Client,
        namespace: &str,
        timeout: cli::Wait,
        nodes: usize,
    ) -> Self {
        let cache = PodCache::new(client.clone(), namespace);
        let (namespace, progress) = (namespace.to_owned(), RefCell::new(Progress::new(nodes)));
        Self { client, namespace, timeout, cache, created: RefCell::default(), progress }
    }

    /// Shows the step of a node.
    pub(in crate::commands) fn step(&self, node: &str, step: &str) {
        self.progress.borrow_mut().step(node, step);
    }

    /// Shows that a node is finished.
    pub(in crate::commands) fn finish(&self, node: &str, outcome: &str, is_well: bool) {
        self.progress.borrow_mut().finish(node, outcome, is_well);
    }

    /// Returns the names of the pods that were created.
    pub(in crate::commands) fn created(&self) -> Ref<'_, Vec<String>> {
        self.created.borrow()
    }

    /// Does the work and follows the pods, until a signal arrives, or the server does not let us see our pods.
    pub(in crate::commands) async fn until_stopped<T>(
        &self,
        work: impl Future<Output = T>,
    ) -> Result<T, Error> {
        let (work, stopped) = (std::pin::pin!(work), std::pin::pin!(self.stopped()));
        let result = select(work, stopped).await;
        self.progress.borrow_mut().end();
        match result {
            Either::Left((done, _)) => Ok(done),
            Either::Right((error, _)) => Err(error),
        }
    }

    async fn stopped(&self) -> Error {
        match select(std::pin::pin!(self.cache.run()), std::pin::pin!(interrupted())).await {
            Either::Left((failure, _)) => failure.into(),
            Either::Right((Ok(()), _)) => anyhow!("interrupted"),
            Either::Right((Err(error), _)) => Error::from(error).context("cannot catch signals"),
        }
    }

    /// Returns the names of the pods on a node.
    pub(in crate::commands) async fn of_node(&self, node: &str) -> Vec<String> {
        let is_there = |pod: &Pod| pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some(node);
        let names = |pods: &std::collections::BTreeMap<String, Pod>| {
            Some(pods.iter().filter(|(_, pod)| is_there(pod)).map(|(name, _)| name.clone()).collect())
        };
        self.cache.wait_for(names).await
    }

    /// Deletes a pod, and waits until it is gone. It need not exist.
    pub(in crate::commands) async fn delete(&self, node: &str, name: &str) -> Result<(), Error> {
        if self.cache.wait_for(|pods| Some(!pods.contains_key(name))).await {
            return Ok(());
        }
        self.step(node, &format!("deleting {name}"));
        match self.client.send(&pods::delete(&self.namespace, name)?).await {
            Err(failure) if failure.code() != Some(404) => return Err(failure.into()),
            _ => {}
        }
        let gone = self.cache.wait_for(|pods| (!pods.contains_key(name)).then_some(()));
        let Some(limit) = self.timeout else {
            gone.await;
            return Ok(());
        };
        timeout(limit, gone).await.map_err(|_| {
            let namespace = &self.namespace;
            anyhow!("pod {namespace}/{name}: not gone after {} s; does the kubelet run?", limit.as_secs())
        })
    }

    /// Creates a pod and waits until it reaches its goal.
    pub(in crate::commands) async fn bring_up(
        &self,
        node: &str,
        pod: &PlannedPod,
        existing: Existing,
    ) -> Result<(), Error> {
        let subject = format!("pod {}/{}", self.namespace, pod.name);
        let last = RefCell::new("not created yet".to_owned());
        let reached = async {
            self.create(pod, existing).await?;
            let outcome = self.cache.wait_for(|pods| {
                let Some(current) = pods.get(&pod.name) else { return Some(None) };
                match pods::state(current, pod.goal) {
                    State::Waiting(why) if why != *last.borrow() => {
                        self.step(node, &format!("{}: {why}", pod.phase));
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

    /// Creates a pod, unless one with its name exists.
    async fn create(&self, pod: &PlannedPod, wanted: Existing) -> Result<(), Error> {
        let namespace = &self.namespace;
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
        if wanted == Existing::Equal
            && let Some(field) = pods::difference(&existing, &pod.object)
        {
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
        let namespace = &self.namespace;
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
