//! The whole configuration at once: `info/config`.
//!
//! Owns the order in which a document becomes the configuration, as a whole or not at all. A list that goes, and room in
//! what stays, are reserved while it is stored. The tasks of a list that is removed by force are released after that: a
//! worker that finds their claims, but not the list, gives them back their masks, too. Does not know the form of a document,
//! or which changes it needs: `difference` does.

use std::collections::HashMap;
use std::sync::Arc;

use super::configure::Attributes;
use super::difference::{Difference, NEW_TASKS};
use super::ports::{Clock as _, Partitions as _, Ports};
use super::{Caller, Engine};
use crate::failpoint::{Step, reached};
use crate::model::claims::Pool;
use crate::model::command::{Claim, Command, Plan};
use crate::model::document::{
    self, Document, ListEntry, ModeEntry, Order, Permissions, PoolEntry, TasksEntry,
};
use crate::model::pool::{Exclusivity, ListId, Mode, PoolId};
use crate::model::refusal::Refusal;
use crate::model::rights::User;
use crate::model::task::before_nul;
use crate::process::BlockedWriter;

/// The node of `info/config`.
pub(crate) const CONFIG: u64 = 14;

impl<P: Ports> Engine<P> {
    /// Returns `info/config`: JSON with a line for each pool.
    pub(crate) fn show_config(&self) -> String {
        let pools = self.document().pools;
        let lines = pools.iter().map(|(name, pool)| {
            // It cannot fail: all keys are strings.
            let pool = serde_json::to_string(pool).unwrap_or_default();
            format!("\"{name}\":{pool}")
        });
        let lines = lines.collect::<Vec<_>>().join(",\n");
        // Lines of their own, if there are any.
        let end = if lines.is_empty() { "" } else { "\n" };
        format!("{{\"pools\":{{{end}{lines}{end}}}}}\n")
    }

    fn document(&self) -> Document {
        let claims = self.configuration();
        let attributes = self.attributes.read();
        let tasks = |node: u64| {
            attributes.get(&node).map_or_else(TasksEntry::default, |it| TasksEntry {
                owner: Some(it.uid).filter(|uid| *uid != NEW_TASKS.uid),
                group: Some(it.gid).filter(|gid| *gid != NEW_TASKS.gid),
                mode: Some(Permissions(it.mode)).filter(|mode| mode.0 != NEW_TASKS.mode),
            })
        };
        let list = |id: ListId| {
            let cpus = claims.list(id)?.name().cpus.clone();
            Some(ListEntry { cpus, tasks: tasks(id.tasks_node()) })
        };
        let pool = |(id, pool): (PoolId, &Pool)| {
            let entry = PoolEntry {
                exclusive: pool.exclusivity() == Exclusivity::Exclusive,
                partial: pool.is_partial(),
                mode: if pool.mode() == Mode::Isolated { ModeEntry::Isolated } else { ModeEntry::Affinity },
                tasks: tasks(id.tasks_node()),
                lists: pool.lists().filter_map(list).collect(),
            };
            (pool.name().to_string(), entry)
        };
        Document { pools: claims.pools().filter(|(_, pool)| !pool.is_transient()).map(pool).collect() }
    }

    /// Carries out one write to `info/config`: makes the document the configuration, as a whole or not at all. `opener` is
    /// the user who opened the file.
    ///
    /// # Errors
    /// `EPERM` if caller or opener lacks the capability; `EINVAL` if it is not a document, or for names and CPUs that cannot
    /// be; `EBUSY` if a list that would go has tasks, or if tasks do not fit the change; `EOPNOTSUPP` if this machine cannot
    /// isolate CPUs; or it cannot be stored.
    pub(crate) fn set_config(&self, caller: Caller, opener: User, data: &[u8]) -> Result<(), Refusal> {
        self.require_admins(caller, opener)?;
        let order: Order = serde_json::from_slice(before_nul(data))
            .map_err(|error| Refusal::BadConfig { why: error.to_string() })?;
        let wanted = document::specs(&order.pools).map_err(|(_, refusal)| *refusal)?;
        let time = self.allowance(caller, opener);
        let mut next = self.configuring.lock(&self.clock)?;
        let difference = {
            let ids_and_now = (*next, self.clock.since_boot());
            let (claims, attributes) = (self.configuration(), self.attributes.read());
            Difference::new(&claims, &attributes, &wanted, ids_and_now, order.force)
        };
        if difference.is_empty() {
            return Ok(());
        }
        let mut plans = Vec::new();
        let mut attributes = self.attributes.read().clone();
        attributes.extend(difference.attributes.iter().map(|(node, new)| (*node, *new)));
        attributes.retain(|node, _| !difference.gone.contains(node));
        let stored = self
            .reserve_all(&difference, time.waiting, &mut plans)
            .and_then(|()| self.check_possible(&difference))
            .and_then(|()| match order.dry_run {
                true => Ok(()),
                false => self.store_difference(&mut next, caller, &difference, &attributes),
            });
        if stored.is_err() || order.dry_run {
            let cancels: Vec<Command> =
                difference.reserve.iter().take(plans.len()).map(|(_, cancel)| cancel.clone()).collect();
            self.apply_stored(&cancels);
            self.abandon(plans);
            return stored;
        }
        self.release_removed(plans, caller.waiting().within(time.limit));
        self.apply_stored(&difference.changes);
        *self.attributes.write() = attributes;
        self.forget(&difference.gone);
        self.announce();
        self.stale.add(difference.stale.into_iter().collect());
        self.update_daemon_affinity();
        drop(next);
        self.await_refresh();
        reached(Step::ConfigApplied);
        Ok(())
    }

    /// Reserves what a difference needs. `plans` has the plan of each reservation that was made.
    fn reserve_all(
        &self,
        difference: &Difference,
        patience: std::time::Duration,
        plans: &mut Vec<Plan>,
    ) -> Result<(), Refusal> {
        for (reserve, _) in &difference.reserve {
            plans.push(self.reserve(reserve.clone(), patience)?);
        }
        Ok(())
    }

    fn check_possible(&self, difference: &Difference) -> Result<(), Refusal> {
        difference.new_cpus.iter().try_for_each(|cpus| self.check_known(cpus))?;
        let isolates = |change: &Command| matches!(change, Command::SetMode { mode: Mode::Isolated, .. });
        if difference.changes.iter().any(isolates)
            && let Some(missing) = self.partitions.missing()
        {
            return Err(Refusal::CannotIsolate { missing });
        }
        self.configuration().preview(&difference.changes).map(drop)
    }

    fn store_difference(
        &self,
        next: &mut u64,
        caller: Caller,
        difference: &Difference,
        attributes: &HashMap<u64, Attributes>,
    ) -> Result<(), Refusal> {
        let after = self.configuration().preview(&difference.changes)?;
        let stale = difference.stale.iter().cloned().collect();
        self.store(next, difference.nodes, caller, &after, attributes, stale)
    }

    /// Gives up reservations.
    fn abandon(&self, plans: Vec<Plan>) {
        let mut claims = self.claims.lock();
        for plan in plans {
            let _ = claims.apply(Command::Abandon(plan));
        }
        drop(claims);
        self.plan_finished.notify_all();
    }

    /// Releases the tasks of lists that are removed by force.
    fn release_removed(&self, plans: Vec<Plan>, waiting: BlockedWriter) {
        let releases: Vec<Arc<Claim>> = plans.into_iter().flat_map(|plan| plan.releases).collect();
        if !releases.is_empty() {
            self.release(releases, waiting);
        }
    }

    /// All pools and lists may have changed.
    fn announce(&self) {
        let claims = self.configuration();
        let lists = claims.pools().flat_map(|(_, pool)| pool.lists());
        lists.for_each(|id| self.files_changed(&claims, id));
        drop(claims);
        self.changes.changed([CONFIG]);
        self.transient.wake();
        // Claims wait for it.
        self.plan_finished.notify_all();
    }
}
