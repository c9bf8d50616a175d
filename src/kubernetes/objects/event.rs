//! Events of a node: what `kubectl describe node` shows below `Events`.
//!
//! Owns the reasons and the form of an Event. Does not know when one is sent.
//!
//! An Event is an object of core/v1, not of events.k8s.io/v1: it may count up under one name, which needs the same rights as a
//! report, and `kubectl describe` reads it. As for the kubelet, the UID of the object is the name of the node, by which
//! `kubectl describe node` searches too, so that nothing has to be read. Events of objects without a namespace are in the
//! namespace `default`; the API server refuses others.

use std::time::SystemTime;

use k8s_openapi::api::core::v1::Event;
use kube::Resource as _;
use kube::core::params::Patch;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

use super::{Built, Request, apply};

/// The namespace of Events of nodes.
const NAMESPACE: &str = "default";
/// The longest message, in bytes: the limit of events.k8s.io/v1, under which the same object can be read.
const LONGEST: usize = 1024;

/// The condition that an Event reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Reason {
    /// The machine cannot have the requested pools.
    LayoutImpossible,
    /// No daemon answers, so there are no slots.
    Unavailable,
    /// The daemon answers again.
    Available,
    /// There is nothing to advertise.
    NoSlots,
    /// Processes without a claim are pinned within exclusive lists.
    Intruders,
    /// Threads of tasks are not on their list, or their cgroup does not have it.
    Strays,
    /// Claimed lists of isolated pools are not isolated.
    NotIsolated,
    /// The kubelet uses CPUs of a pool.
    Kubelet,
}

impl Reason {
    /// Returns the reason as Kubernetes shows it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::LayoutImpossible => "KcmLayoutImpossible",
            Self::Unavailable => "KcmUnavailable",
            Self::Available => "KcmAvailable",
            Self::NoSlots => "KcmNoSlots",
            Self::Intruders => "KcmIntruders",
            Self::Strays => "KcmStrays",
            Self::NotIsolated => "KcmNotIsolated",
            Self::Kubelet => "KcmKubelet",
        }
    }

    fn kind(self) -> &'static str {
        match self {
            Self::Available => "Normal",
            _ => "Warning",
        }
    }
}

/// An Event of a node.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NodeEvent<'a> {
    pub(crate) node: &'a str,
    pub(crate) reason: Reason,
    pub(crate) message: &'a str,
    /// How often this was so.
    pub(crate) count: u32,
    pub(crate) first: SystemTime,
    pub(crate) last: SystemTime,
}

impl NodeEvent<'_> {
    /// Returns the name: there is one object per node and reason, so that a node has few of them.
    fn name(&self) -> String {
        format!("{}.{}", self.node, self.reason.name().to_lowercase())
    }

    fn object(&self) -> Value {
        let time = |time| humantime::format_rfc3339_seconds(time).to_string();
        json!({
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": { "name": self.name(), "namespace": NAMESPACE },
            "involvedObject": { "apiVersion": "v1", "kind": "Node", "name": self.node, "uid": self.node },
            "type": self.reason.kind(),
            "reason": self.reason.name(),
            "message": shortened(self.message),
            "count": self.count,
            "firstTimestamp": time(self.first),
            "lastTimestamp": time(self.last),
            "source": { "component": "kcm", "host": self.node },
            "reportingComponent": "kcm",
            "reportingInstance": self.node,
        })
    }
}

/// Writes an Event: creates it, or counts it up.
pub(crate) fn publish(event: &NodeEvent<'_>) -> Built<IgnoredAny> {
    let events = kube::core::Request::new(Event::url_path(&(), Some(NAMESPACE)));
    let http = events.patch(&event.name(), &apply(), &Patch::Apply(&event.object()))?;
    Ok(Request::new(http, format!("Event {} of node {}", event.reason.name(), event.node)))
}

fn shortened(message: &str) -> String {
    const CUT: &str = "...";
    if message.len() <= LONGEST {
        return message.to_owned();
    }
    let mut end = LONGEST - CUT.len();
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{CUT}", message.get(..end).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_message_is_cut_between_characters() {
        assert_eq!(shortened("short"), "short");
        let cut = shortened(&"ä".repeat(600));
        assert!(cut.len() <= LONGEST && cut.ends_with("ä..."), "{cut}");
    }
}
