//! What the files that change by themselves say.
//!
//! Owns: their texts. Each takes the dead off first. Must not know: nodes of the tree but the number of a `tasks`
//! file.

use std::fmt::Write as _;
use std::sync::Arc;

use super::Engine;
use crate::metrics::PoolGauge;
use crate::model::claims::Claims;
use crate::model::pool::{Exclusivity, ListId, PoolId};
use crate::model::task::Pid;

impl Engine {
    /// The `tasks` file of a list; empty where it has been removed.
    pub(crate) fn show_list_tasks(&self, id: ListId) -> Arc<[u8]> {
        self.show_tasks(id.tasks_node(), |claims| {
            claims.list(id).into_iter().flat_map(|list| list.tasks()).map(|task| task.pid).collect()
        })
    }

    /// The `tasks` file of a pool; empty where it has been removed.
    pub(crate) fn show_pool_tasks(&self, id: PoolId) -> Arc<[u8]> {
        self.show_tasks(id.tasks_node(), |claims| {
            let lists =
                claims.pool(id).into_iter().flat_map(|pool| pool.taken()).filter_map(|id| claims.list(id));
            let mut pids: Vec<Pid> = lists.flat_map(|list| list.tasks()).map(|task| task.pid).collect();
            pids.sort_unstable();
            pids
        })
    }

    /// Ascending PIDs with commas between and a newline at the end; nothing where there are none. The text is
    /// made once for each version of the file.
    fn show_tasks(&self, node: u64, pids: impl FnOnce(&Claims) -> Vec<Pid>) -> Arc<[u8]> {
        self.reap();
        let (version, pids) = {
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

    /// `info/events`.
    pub(crate) fn show_events(&self) -> String {
        self.reap();
        self.events.lock().show()
    }

    /// `info/reclaimed`.
    pub(crate) fn show_reclaimed(&self) -> String {
        self.reap();
        self.events.lock().show_reclaimed()
    }

    /// `info/metrics`.
    pub(crate) fn show_metrics(&self) -> String {
        let pools: Vec<PoolGauge> = self.with_claims(|claims| {
            claims
                .pools()
                .map(|(_, pool)| {
                    let lists: Vec<usize> = pool
                        .lists()
                        .filter_map(|id| claims.list(id))
                        .map(|list| list.tasks().len())
                        .collect();
                    PoolGauge {
                        pool: pool.name().to_string(),
                        exclusive: pool.exclusivity() == Exclusivity::Exclusive,
                        lists_free: lists.iter().filter(|&&tasks| tasks == 0).count(),
                        lists_taken: lists.iter().filter(|&&tasks| tasks > 0).count(),
                        tasks: lists.iter().sum(),
                    }
                })
                .collect()
        });
        let unacknowledged = self.events.lock().reclaimed_count();
        self.metrics.show(&pools, unacknowledged)
    }
}
