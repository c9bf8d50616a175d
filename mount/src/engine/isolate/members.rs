//! The processes in the partitions of others: who inherits, and who moves out.
//!
//! Owns that. Does not know when a partition is made or taken back.

use std::sync::Arc;

use crate::engine::ports::{Partitions as _, Ports, Process as _, Processes as _};
use crate::engine::search::DeadClaim;
use crate::engine::{Engine, ProcessOf};
use crate::model::claims::ListToPassOn;
use crate::model::command::{Heir, HeirCandidate};
use crate::model::cpuset::CpuSet;
use crate::model::partition::Partition;
use crate::model::refusal::Refusal;
use crate::model::task::Pid;

impl<P: Ports> Engine<P> {
    /// Moves a process that is in the partition of another list out of it, because the kernel lets it run only there. Returns
    /// that partition, or `None` if the process is in none.
    ///
    /// # Errors
    /// Its whole cgroup is on that list, or the process cannot be moved.
    pub(in crate::engine) fn leave_partition(
        &self,
        process: &ProcessOf<P>,
    ) -> Result<Option<Partition>, Refusal> {
        let _writing = self.isolation.writing.lock();
        let pid = process.id().pid;
        let written = self.isolation.written();
        let Some(partition) = self.partitions.partition_of(pid, &written) else { return Ok(None) };
        if partition.is_whole_cgroup {
            let name = self.configuration().list(partition.list).map(|list| list.name().to_string());
            let why = format!("all of it is on {}", name.unwrap_or_default());
            return Err(Refusal::UnsuitableCgroup { path: partition.parent.escape_debug().to_string(), why });
        }
        match self.partitions.leave(&partition, pid) {
            Ok(()) => Ok(Some(partition)),
            Err(_) if !process.is_alive() => Err(Refusal::NoSuchProcess),
            Err(error) => Err(self.fault("moving the task out of the partition of another list")(error)),
        }
    }

    /// Moves a process back into a partition that it has left, if that is still there.
    pub(in crate::engine) fn return_to_partition(&self, process: &ProcessOf<P>, partition: &Partition) {
        let _writing = self.isolation.writing.lock();
        if self.isolation.is_partition(&partition.path()) && process.is_alive() {
            let _ = self.partitions.enter(partition, process.id().pid);
        }
    }

    /// Returns the heir of a dead task that had a partition: the oldest process in it. Nobody else can be there.
    pub(in crate::engine) fn heir_in_partition(&self, dead: &DeadClaim) -> Option<Heir> {
        let partition = self.isolation.made.lock().get(&dead.claim.list)?.partition.clone()?;
        let members = self.partitions.members(&partition);
        let candidates = members.into_iter().filter_map(|tid| self.member(tid));
        let oldest = candidates.min_by_key(|candidate| candidate.started)?;
        let (online, tick) = (CpuSet::new(), 1);
        let list = ListToPassOn {
            claim: &dead.claim,
            user_at_death: dead.user,
            cpus: &dead.cpus,
            online: &online,
            tick,
        };
        Some(list.heir_in_partition(&oldest))
    }

    fn member(&self, tid: Pid) -> Option<HeirCandidate> {
        let process: Arc<ProcessOf<P>> = self.processes.of_thread(tid).ok().flatten()?;
        if !process.is_alive() || self.claims.lock().claim(&process.id()).is_some() {
            return None;
        }
        let facts = self.processes.facts(&process).ok().flatten()?;
        Some(HeirCandidate {
            info: self.task_info_of(process.id(), &facts),
            users: vec![facts.uids.real],
            cgroups: self.processes.cgroup(&process).into_iter().collect(),
            started: self.processes.started(&process)?,
            masks: Vec::new(),
        })
    }
}
