//! The pods of `cluster-init` as the server last reported them.
//!
//! Owns the list and the watch that keep the cache up to date. Does not know what the pods are for.
//!
//! This is not `kube::runtime::watcher`, because that has no time limit for a list, opens a watch that ends at once
//! again and again without a pause, and never lists again while watches deliver nothing that can be understood (such
//! as the error page of a proxy). Its requests could not be compared with committed ones either.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::core::WatchEvent;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use crate::backoff::Backoff;
use crate::kubernetes::objects::pods;
use crate::kubernetes::{Client, Failure};

/// The pauses between watches that report nothing.
const PAUSES: RangeInclusive<Duration> = Duration::from_millis(50)..=Duration::from_secs(5);
/// How long a watch may be silent. The server ends it earlier, unless the connection is lost.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(pods::WATCH_SECONDS as u64 + 15);

type Pods = BTreeMap<String, Pod>;

/// The pods of one namespace by name.
pub(super) struct PodCache {
    client: Client,
    namespace: String,
    /// `None` before the first list.
    pods: RefCell<Option<Pods>>,
    /// The pods that were added since the last list was requested: the list may be older than they are.
    added: RefCell<Vec<Pod>>,
    changed: Notify,
}

impl PodCache {
    pub(super) fn new(client: Client, namespace: &str) -> Self {
        let (namespace, pods, added) = (namespace.to_owned(), RefCell::default(), RefCell::default());
        Self { client, namespace, pods, added, changed: Notify::new() }
    }

    /// Keeps the cache up to date until the server refuses, or is not available for too long.
    pub(super) async fn run(&self) -> Failure {
        let mut backoff = Backoff::new(PAUSES);
        loop {
            if let Err(failure) = self.list_and_watch(&mut backoff).await {
                return failure;
            }
        }
    }

    /// Lists the pods, and watches them until only another list can help.
    async fn list_and_watch(&self, backoff: &mut Backoff) -> Result<(), Failure> {
        self.added.take();
        let list = self.client.send(&pods::list(&self.namespace)?).await?;
        self.pods.replace(Some(by_name(list.items, self.added.take())));
        self.changed.notify_waiters();
        let mut version = list.metadata.resource_version.unwrap_or_default();
        // A watch ends now and then. The next one continues from the last event, unless there was none, or the
        // server does not know its version any longer.
        let mut can_continue = true;
        while can_continue {
            can_continue = false;
            match self.client.watch(&pods::watch(&self.namespace, &version)?).await {
                Ok(mut events) => {
                    while let Ok(Some(event)) = timeout(SILENCE_TIMEOUT, events.next()).await {
                        let seen = self.pods.borrow_mut().as_mut().and_then(|pods| apply(pods, event));
                        self.changed.notify_waiters();
                        can_continue = seen.is_some();
                        let Some(seen) = seen else { break };
                        version = seen;
                        backoff.reset();
                    }
                }
                Err(failure) if failure.is_transient() || failure.code() == Some(410) => {
                    log::debug!("{failure}; listing the pods again");
                }
                Err(failure) => return Err(failure),
            }
            sleep(backoff.next()).await;
        }
        Ok(())
    }

    /// Waits until `check` returns something. It is called with the pods after each change.
    pub(super) async fn wait_for<T>(&self, mut check: impl FnMut(&Pods) -> Option<T>) -> T {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            // A change from here on is not missed.
            changed.as_mut().enable();
            if let Some(found) = self.pods.borrow().as_ref().and_then(&mut check) {
                return found;
            }
            changed.await;
        }
    }

    /// Adds a pod that the watch has not reported yet.
    pub(super) fn add(&self, pod: Pod) {
        if let (Some(pods), Some(name)) = (self.pods.borrow_mut().as_mut(), pod.metadata.name.clone()) {
            self.added.borrow_mut().push(pod.clone());
            pods.entry(name).or_insert(pod);
        }
    }
}

/// Returns the pods of a list by name, with the added ones that it does not have. The watch that follows the list reports them, and
/// also if they are deleted.
fn by_name(list: Vec<Pod>, added: Vec<Pod>) -> Pods {
    let mut pods = Pods::new();
    for pod in list.into_iter().chain(added) {
        if let Some(name) = pod.metadata.name.clone() {
            pods.entry(name).or_insert(pod);
        }
    }
    pods
}

/// Applies an event. Returns the version from which a watch can continue; `None` if the pods have to be listed again.
fn apply(pods: &mut Pods, event: WatchEvent<Pod>) -> Option<String> {
    match event {
        WatchEvent::Added(pod) | WatchEvent::Modified(pod) => {
            let version = pod.metadata.resource_version.clone();
            pods.insert(pod.metadata.name.clone()?, pod);
            version
        }
        WatchEvent::Deleted(pod) => {
            pods.remove(&pod.metadata.name?);
            pod.metadata.resource_version
        }
        WatchEvent::Bookmark(bookmark) => Some(bookmark.metadata.resource_version),
        WatchEvent::Error(status) => {
            log::debug!("the watch ends: {}", status.message);
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn event(kind: &str, object: Value) -> WatchEvent<Pod> {
        serde_json::from_value(json!({ "type": kind, "object": object })).unwrap()
    }

    fn pod(version: &str) -> Value {
        json!({ "metadata": { "name": "p", "resourceVersion": version } })
    }

    #[test]
    fn events_change_the_pods_and_carry_the_version() {
        let mut pods = Pods::new();
        assert_eq!(apply(&mut pods, event("ADDED", pod("7"))), Some("7".into()));
        assert_eq!(apply(&mut pods, event("MODIFIED", pod("8"))), Some("8".into()));
        assert_eq!(pods.get("p").unwrap().metadata.resource_version, Some("8".into()));
        let bookmark = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "resourceVersion": "9" } });
        assert_eq!(apply(&mut pods, event("BOOKMARK", bookmark)), Some("9".into()));
        assert_eq!(apply(&mut pods, event("DELETED", pod("10"))), Some("10".into()));
        assert!(pods.is_empty());
    }

    #[test]
    fn a_list_that_is_older_than_a_pod_does_not_remove_it() {
        let named = |name: &str, version: &str| -> Pod {
            serde_json::from_value(json!({ "metadata": { "name": name, "resourceVersion": version } }))
                .unwrap()
        };
        let pods = by_name(vec![named("a", "7")], vec![named("a", "5"), named("b", "8")]);
        let versions: Vec<_> =
            pods.values().filter_map(|pod| pod.metadata.resource_version.as_deref()).collect();
        assert_eq!(versions, ["7", "8"]);
    }

    #[test]
    fn an_expired_version_needs_a_list() {
        let status = json!({ "kind": "Status", "code": 410, "message": "too old resource version" });
        assert_eq!(apply(&mut Pods::new(), event("ERROR", status)), None);
    }
}
