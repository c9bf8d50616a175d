//! `kcm discover`: sets the slots, the label and the taint of this node, and keeps them up to date.
//!
//! Owns what is advertised, when it is withdrawn, and the Events about that. Does not know how a request is sent, or what is in
//! it.
//!
//! Slots that cannot be claimed are removed and not set to 0. For the scheduler both are the same. But a kubelet that restarts
//! refuses its running pods if they request more of a resource than there is, unless the node does not have that resource: those
//! requests it ignores. There is no taint for such a node: with the effect NoExecute it would evict the pods that run.

pub(super) mod change;
mod slots;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Error, anyhow};
use k8s_openapi::api::core::v1::Node;

use change::Step;
use slots::{Offer, look, offer};

use super::common::cluster::connected;
use super::common::interval::End;
use super::common::node::{node_name, taint};
use super::common::node_events::NodeEvents;
use super::common::{interval, output};
use crate::cli::{self, Repeat, ResourceName};
use crate::kubernetes::Cluster;
use crate::kubernetes::objects::event::Reason;
use crate::kubernetes::objects::node::{self, Change, Marks, Slots};

/// How long a request is retried, and how long conflicts with the changes of others are.
pub(super) const RETRY_TIMEOUT: Duration = Duration::from_secs(30);
/// The same for a periodic run, which the next one follows.
const PERIODIC_RETRY_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a daemon may be away before its slots are withdrawn, if the interval is not shorter. A container that starts again is
/// away for less.
const PATIENCE: Duration = Duration::from_secs(3);

/// Advertises this node, once or periodically.
pub(super) fn run(args: &cli::Discover) -> Result<ExitCode, Error> {
    if args.look {
        output::print(&serde_json::to_string(&look(args))?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let node = node_name(&args.node)?;
    let mut advertiser = Advertiser {
        events: NodeEvents::new(&node),
        marks: Marks { taint: taint(&args.taint) },
        node,
        args,
        cluster: None,
        state: State::Unknown,
    };
    interval::run_with_end(args.interval, |end| advertiser.run(end))
}

/// Removes from the node what discover has set.
pub(super) fn unadvertise(node: &str) -> Result<(), Error> {
    let cluster = Cluster::find(RETRY_TIMEOUT)?;
    change::remove_all(&cluster, node, RETRY_TIMEOUT).map(drop)
}

/// Keeps a node up to date.
struct Advertiser<'a> {
    args: &'a cli::Discover,
    node: String,
    marks: Marks,
    cluster: Option<Cluster>,
    events: NodeEvents,
    /// The state after the last run, so that a message is printed once.
    state: State,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    Unknown,
    Advertised,
    /// Why, in the words of the run that found it first: the daemon ends in several steps.
    Withdrawn(Reason, String),
}

impl Advertiser<'_> {
    fn run(&mut self, end: &End) -> Result<(), Error> {
        let found = offer(self.args)?;
        let Repeat::Every(interval) = self.args.interval else {
            return match found {
                Offer::Slots(slots) => self.advertise(&slots),
                Offer::Nothing(why) | Offer::Unavailable(why) | Offer::Unknown(why) => Err(anyhow!(why)),
            };
        };
        let found = match found {
            Offer::Unavailable(why) if !matches!(self.state, State::Withdrawn(Reason::Unavailable, _)) => {
                log::debug!("{why}");
                // A pod that ends takes its daemon with it, and the next one advertises again.
                if end.comes_within(PATIENCE.min(interval)) {
                    return Ok(());
                }
                offer(self.args)?
            }
            found => found,
        };
        match found {
            Offer::Slots(slots) => self.advertise(&slots),
            Offer::Nothing(why) => self.withdraw(&why, Reason::NoSlots),
            Offer::Unavailable(why) => self.withdraw(&why, Reason::Unavailable),
            Offer::Unknown(why) => Err(anyhow!(why)),
        }
    }

    /// Sets what is missing of these slots and of the marks.
    fn advertise(&mut self, slots: &Slots) -> Result<(), Error> {
        let cluster = connected(&mut self.cluster, retry_timeout(self.args))?;
        let steps: [&Step<'_>; 2] = [&|node| capacity(self.args, node, slots), &|node| {
            node::label_and_taint(node, Some(&self.marks))
        }];
        let node = &self.node;
        if self.args.dry_run {
            return show(cluster, node, &steps);
        }
        if change::apply(cluster, node, &steps, retry_timeout(self.args))? {
            log::info!("Node {node} advertises {}.", advertised(self.args, slots));
        } else {
            log::debug!("Node {node} is up to date.");
        }
        if self.args.interval == Repeat::Once {
            return Ok(());
        }
        [Reason::Unavailable, Reason::NoSlots]
            .into_iter()
            .for_each(|gone| self.events.set(cluster, gone, None));
        let message = match &self.state {
            State::Withdrawn(..) => {
                Some(format!("the node advertises {} again", advertised(self.args, slots)))
            }
            _ => None,
        };
        self.events.set(cluster, Reason::Available, message.as_deref());
        self.state = State::Advertised;
        Ok(())
    }

    /// Removes the slots, while nobody can claim them. Label and taint stay as they are.
    fn withdraw(&mut self, why: &str, reason: Reason) -> Result<(), Error> {
        let cluster = connected(&mut self.cluster, retry_timeout(self.args))?;
        let none = Slots::new();
        let steps: [&Step<'_>; 1] = [&|node| capacity(self.args, node, &none)];
        let node = &self.node;
        if self.args.dry_run {
            return show(cluster, node, &steps);
        }
        let has_changed = change::apply(cluster, node, &steps, retry_timeout(self.args))?;
        if !matches!(&self.state, State::Withdrawn(before, _) if *before == reason) {
            match has_changed {
                _ if !has_slots(self.args) => log::error!("{why}"),
                true => log::error!("{why}; the slots of node {node} are withdrawn until then"),
                false => log::error!("{why}; node {node} has no slots until then"),
            }
            self.state = State::Withdrawn(reason, why.to_owned());
        }
        // When it is available again, that is news, also if it was away for less than an interval before.
        self.events.set(cluster, Reason::Available, None);
        if let State::Withdrawn(_, why) = &self.state {
            self.events.set(cluster, reason, Some(why));
        }
        // Two outages may have no other run in between.
        for over in [Reason::Available, Reason::NoSlots, Reason::Unavailable] {
            if over != reason {
                self.events.set(cluster, over, None);
            }
        }
        Ok(())
    }
}

/// Whether the slots are set here, and not by a device plugin.
fn has_slots(args: &cli::Discover) -> bool {
    args.resource_name != ResourceName::None
}

/// The request that sets these slots. Those of a device plugin belong to the kubelet.
fn capacity(args: &cli::Discover, node: &Node, slots: &Slots) -> Change {
    if has_slots(args) { node::capacity(node, slots) } else { node::without_legacy_capacity(node) }
}

fn retry_timeout(args: &cli::Discover) -> Duration {
    if args.interval == Repeat::Once { RETRY_TIMEOUT } else { PERIODIC_RETRY_TIMEOUT }
}

/// Returns what the node advertises, for a message.
fn advertised(args: &cli::Discover, slots: &Slots) -> String {
    if has_slots(args) { listed(slots) } else { "the slots of its device plugin".into() }
}

/// Formats slots for a message: `4 kcm.intel.com/dataplane, 2 kcm.intel.com/fast`.
fn listed(slots: &Slots) -> String {
    if slots.is_empty() {
        return "no slots, because all CPU lists are draining or offline".into();
    }
    slots.iter().map(|(name, count)| format!("{count} {name}")).collect::<Vec<_>>().join(", ")
}

/// Prints what would be sent.
fn show(cluster: &Cluster, name: &str, steps: &[&Step<'_>]) -> Result<(), Error> {
    let requests = change::shown(cluster, name, steps)?;
    if requests.is_empty() {
        log::info!("Node {name} is up to date.");
    }
    output::print(&requests.join("---\n"))
}
