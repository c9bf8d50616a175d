//! The tasks that are in pods of Kubernetes.
//!
//! Owns how a pod is shown beside a PID. Does not know how a pod is recognised: `host` does.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use crate::confdir::Pools;
use crate::host::{Container, Host, Names};

/// The tasks that are in pods, by PID.
#[derive(Debug, Default)]
pub(in crate::commands) struct Members(BTreeMap<u32, Member>);

#[derive(Debug)]
struct Member {
    /// `namespace/name`; the pod's UID if the name is not known.
    pod: String,
    /// The name of the container; its ID if the name is not known.
    container: String,
    is_best_effort: bool,
}

impl Members {
    /// Looks at every task of the pools. `logs`: the kubelet's directory of container logs.
    pub(in crate::commands) fn find(pools: &Pools, host: &Host, logs: &Path) -> Self {
        let tasks = pools.values().flat_map(|pool| pool.lists.values()).flatten();
        let found: Vec<(u32, Container)> =
            tasks.filter_map(|&pid| Some((pid, host.container_of(pid)?))).collect();
        let names = if found.is_empty() { Names::default() } else { Names::read(logs) };
        let member = |container: &Container| {
            let (pod, name) = names.of(container);
            Member { pod, container: name, is_best_effort: container.is_best_effort }
        };
        Self(found.iter().map(|(pid, container)| (*pid, member(container))).collect())
    }

    /// Whether a task is in a pod that requests nothing.
    pub(in crate::commands) fn is_best_effort(&self, pid: u32) -> bool {
        self.0.get(&pid).is_some_and(|member| member.is_best_effort)
    }

    /// Returns ` in <pod>:<container>`, or nothing.
    pub(super) fn suffix(&self, pid: u32) -> String {
        self.0
            .get(&pid)
            .map(|Member { pod, container, .. }| format!(" in {pod}:{container}"))
            .unwrap_or_default()
    }

    /// Returns the tasks of these that are in pods, as JSON; `None` if there are none.
    pub(super) fn json(&self, tasks: &[u32]) -> Option<Value> {
        let members = tasks.iter().filter_map(|pid| Some((pid, self.0.get(pid)?)));
        let members: Vec<Value> = members
            .map(|(pid, Member { pod, container, .. })| json!({ "container": container, "pid": pid, "pod": pod }))
            .collect();
        (!members.is_empty()).then_some(Value::Array(members))
    }
}
