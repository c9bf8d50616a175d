//! The texts of the files that change by themselves.
//!
//! Owns these texts. Of the tree it only knows the node of a `tasks` file.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use super::Engine;
use super::ports::{Journal as _, Ports};
use super::search::{Concern, LIMIT};
use crate::metrics::{Gauges, ListGauge, PoolGauge};
use crate::model::claims::{Claims, Pool};
use crate::model::cpuset::CpuSet;
use crate::model::partition::PartitionState;
use crate::model::pool::{Exclusivity, ListId, PoolId};
use crate::model::task::Pid;
use crate::model::topology::Topology;

/// How long a reader of events waits until they are written. A worker that dies after a reader has seen an event
/// that is not written would show another one in its place. If the disk does not answer, that is accepted.
const FLUSH_LIMIT: Duration = Duration::from_millis(200);

impl<P: Ports> Engine<P> {
    /// Returns the `tasks` file of a list; empty if the list has been removed.
    pub(crate) fn show_list_tasks(&self, id: ListId) -> Arc<[u8]> {
        self.show_tasks(id.tasks_node(), Concern::List(id), |claims| {
            claims.list(id).into_iter().flat_map(|list| list.tasks()).map(|task| task.pid).collect()
        })
    }

    /// Returns the `tasks` file of a pool; empty if the pool has been removed.
    pub(crate) fn show_pool_tasks(&self, id: PoolId) -> Arc<[u8]> {
        self.show_tasks(id.tasks_node(), Concern::Pool(id), |claims| {
            let lists =
                claims.pool(id).into_iter().flat_map(|pool| pool.taken()).filter_map(|id| claims.list(id));
            let mut pids: Vec<Pid> = lists.flat_map(|list| list.tasks()).map(|task| task.pid).collect();
            pids.sort_unstable();
            pids
        })
    }

    /// Returns ascending PIDs with commas between them and a newline at the end; nothing if there are none. The
    /// text is made once per version of the file.
    fn show_tasks(
        &self,
        node: u64,
        concern: Concern<'_>,
        pids: impl FnOnce(&Claims) -> Vec<Pid>,
    ) -> Arc<[u8]> {
        let (version, pids) = {
            self.reap_for(concern, LIMIT);
            let claims = self.claims.lock();
            // Under the lock, so that version and tasks belong together.
            let version = self.changes.version(node);
            if let Some((_, text)) = self.shown.lock().get(&node).filter(|(shown, _)| *shown == version) {
                return Arc::clone(text);
            }
            (version, pids(&claims))
        };
        let mut text = String::with_capacity(pids.len() * 8);
        for pid in pids {
            let _ = write!(text, "{pid},");
        }
        if text.pop().is_some() {
            text.push('\n');
        }
        let text: Arc<[u8]> = text.into_bytes().into();
        self.shown.lock().insert(node, (version, Arc::clone(&text)));
        text
    }

    /// Returns the `state` file of a list: a word, its offline CPUs if there are any, and whether it is draining; empty if the
    /// list has been removed.
    pub(crate) fn show_state(&self, id: ListId) -> String {
        self.reap_for(Concern::List(id), LIMIT);
        let (cpus, is_free, is_draining) = {
            let claims = self.claims.lock();
            let Some(list) = claims.list(id) else { return String::new() };
            (list.cpus().clone(), list.tasks().is_empty(), list.is_draining())
        };
        let topology = self.topology.get();
        let (word, reason) = self.state(id, &cpus, is_free, &topology);
        let reason = reason.map(|why| format!(": {why}")).unwrap_or_default();
        let offline = cpus.difference(&topology.online());
        let offline = if offline.is_empty() { String::new() } else { format!(" offline={offline}") };
        let draining = if is_draining { " draining" } else { "" };
        format!("{word}{reason}{offline}{draining}\n")
    }

    /// Returns the word for the state of a list, and the reason if it is `invalid`.
    fn state(
        &self,
        id: ListId,
        cpus: &CpuSet,
        is_free: bool,
        topology: &Topology,
    ) -> (&'static str, Option<String>) {
        if is_free {
            return ("free", None);
        }
        match self.isolation.state(id) {
            Some(PartitionState::Isolated) => ("isolated", None),
            Some(PartitionState::Invalid(why)) => ("invalid", Some(why)),
            _ if cpus.is_subset(&topology.isolated()) => ("boot", None),
            _ => ("affinity", None),
        }
    }

    /// Returns `info/events`, and the size that the file would have if no line had been dropped. `since`: only the lines
    /// that were added since the file had this size.
    pub(crate) fn show_events(&self, since: Option<u64>) -> (String, u64) {
        self.reap_briefly();
        self.journal.flush_within(FLUSH_LIMIT);
        let events = self.events.lock();
        (since.map_or_else(|| events.show(), |size| events.show_since(size)), events.end())
    }

    /// Returns the size that `info/events` would have if no line had been dropped.
    pub(crate) fn events_size(&self) -> u64 {
        self.reap();
        self.events.lock().end()
    }

    /// Returns `info/reclaimed`.
    pub(crate) fn show_reclaimed(&self) -> String {
        self.reap_briefly();
        self.journal.flush_within(FLUSH_LIMIT);
        self.events.lock().show_reclaimed()
    }

    /// Returns `info/metrics`.
    pub(crate) fn show_metrics(&self) -> String {
        self.reap_briefly();
        let (unacknowledged, events_dropped, reclaims_dropped) = {
            let events = self.events.lock();
            (events.reclaimed_count(), events.dropped(), events.reclaims_dropped())
        };
        let dropped = [
            ("event", events_dropped),
            ("reclaim", reclaims_dropped),
            ("refusal", self.refusals.lock().dropped()),
        ];
        let gauges = Gauges {
            pools: self.pool_gauges(),
            unacknowledged,
            dropped,
            displaced: self.displaced.count(),
            intruders: self.count_intruders(),
        };
        self.metrics.show(&gauges).unwrap_or_else(|error| format!("# {error}\n"))
    }

    fn pool_gauges(&self) -> Vec<PoolGauge> {
        let topology = self.topology.get();
        let claims = self.claims.lock();
        let of_list = |id: ListId| {
            let list = claims.list(id)?;
            let (state, _) = self.state(id, list.cpus(), list.tasks().is_empty(), &topology);
            Some(ListGauge { list: list.name().cpus.clone(), tasks: list.tasks().len(), state })
        };
        let of_pool = |(_, pool): (PoolId, &Pool)| PoolGauge {
            pool: pool.name().to_string(),
            exclusive: pool.exclusivity() == Exclusivity::Exclusive,
            lists: pool.lists().filter_map(of_list).collect(),
        };
        claims.pools().map(of_pool).collect()
    }
}
