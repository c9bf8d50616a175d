//! Events of this node.
//!
//! Owns when one is sent: when something begins or changes, and again while it lasts, because an API server forgets Events after
//! an hour. A failure to send one is a message, and never the failure of a command. Does not know what the Events are about.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;

use crate::kubernetes::objects::event::{self, NodeEvent, Reason};
use crate::kubernetes::{Cluster, Failure};

/// An Event about something that lasts is sent again after this time. An API server keeps Events for an hour, unless its
/// `--event-ttl` says otherwise.
const AGAIN: Duration = Duration::from_secs(30 * 60);
/// The checks of a node report that become Events. The check of the mount is not one of them: discover sends that.
const CHECKS: [(&str, Reason); 4] = [
    ("intruders", Reason::Intruders),
    ("isolation", Reason::NotIsolated),
    ("kubelet", Reason::Kubelet),
    ("masks", Reason::Strays),
];

/// Sends the Events of a node.
#[derive(Debug)]
pub(crate) struct NodeEvents {
    node: String,
    sent: BTreeMap<Reason, Sent>,
    /// Whether the last one could not be sent.
    has_failed: bool,
}

/// The last Event of a reason.
#[derive(Clone, Debug)]
struct Sent {
    /// The message; `None` if the condition is over.
    message: Option<String>,
    count: u32,
    first: SystemTime,
    last: Instant,
}

impl NodeEvents {
    pub(crate) fn new(node: &str) -> Self {
        Self { node: node.to_owned(), sent: BTreeMap::new(), has_failed: false }
    }

    /// Notes that a condition holds, with a message, or with `None` that it does not hold. Sends an Event if the condition is new,
    /// has another message, or was sent long ago.
    pub(crate) fn set(&mut self, cluster: &Cluster, reason: Reason, message: Option<&str>) {
        let Some(message) = message else {
            if let Some(sent) = self.sent.get_mut(&reason) {
                sent.message = None;
            }
            return;
        };
        let now = Instant::now();
        if !is_due(self.sent.get(&reason), message, now) {
            return;
        }
        let last = SystemTime::now();
        let (count, first) = self.sent.get(&reason).map_or((0, last), |sent| (sent.count, sent.first));
        let count = count.saturating_add(1);
        let event = NodeEvent { node: &self.node, reason, message, count, first, last };
        let sent = event::publish(&event).map_err(Failure::from);
        match sent.and_then(|request| cluster.send(&request).map(|_| ())) {
            Ok(()) => {
                self.has_failed = false;
                let message = Some(message.to_owned());
                self.sent.insert(reason, Sent { message, count, first, last: now });
            }
            // The next run tries again.
            Err(failure) if self.has_failed => log::debug!("{failure}"),
            Err(failure) => {
                self.has_failed = true;
                log::warn!("{failure}; the Event is not sent");
            }
        }
    }

    /// Says which checks of a node report have failed.
    pub(crate) fn set_checks(&mut self, cluster: &Cluster, report: &Value) {
        for (check, reason) in CHECKS {
            let errors = report.pointer(&format!("/checks/{check}/errors")).and_then(Value::as_array);
            let errors = errors.into_iter().flatten().filter_map(Value::as_str);
            self.set(cluster, reason, summary(errors).as_deref());
            if self.has_failed {
                return;
            }
        }
    }
}

/// Whether an Event is sent.
fn is_due(sent: Option<&Sent>, message: &str, now: Instant) -> bool {
    sent.is_none_or(|sent| {
        sent.message.as_deref() != Some(message) || now.saturating_duration_since(sent.last) >= AGAIN
    })
}

/// Returns the first error, and how many there are besides.
fn summary<'a>(mut errors: impl Iterator<Item = &'a str>) -> Option<String> {
    let first = errors.next()?;
    Some(match errors.count() {
        0 => first.to_owned(),
        more => format!("{first} (+{more} more; kcm node-report lists them)"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_due_when_it_is_new_and_again_while_it_lasts() {
        let now = Instant::now();
        let sent = |message: Option<&str>| Sent {
            message: message.map(str::to_owned),
            count: 1,
            first: SystemTime::UNIX_EPOCH,
            last: now,
        };
        assert!(is_due(None, "a", now));
        assert!(!is_due(Some(&sent(Some("a"))), "a", now));
        assert!(is_due(Some(&sent(Some("a"))), "b", now), "it has changed");
        assert!(is_due(Some(&sent(None)), "a", now), "it begins again");
        assert!(is_due(Some(&sent(Some("a"))), "a", now + AGAIN), "the API server forgets it");
    }

    #[test]
    fn a_summary_names_the_first_error() {
        assert_eq!(summary([].into_iter()), None);
        assert_eq!(summary(["a"].into_iter()).as_deref(), Some("a"));
        assert_eq!(
            summary(["a", "b", "c"].into_iter()).as_deref(),
            Some("a (+2 more; kcm node-report lists them)")
        );
    }
}
