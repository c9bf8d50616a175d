//! Version 1 of the files `config` and `claims`.
//!
//! Owns what is on disk, apart from the types that the program works with: renaming a field of those changes nothing
//! here. The names and the order of fields and variants here are the format.
//!
//! Longer than 400 lines because a version of the format is one file, which does not change.

use std::collections::HashMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::super::{pools, records};
use crate::model::cgroup::Cgroups;
use crate::model::command;
use crate::model::cpuset::{CpuSet, ParseCpuSetError};
use crate::model::partition;
use crate::model::pool::{self, InvalidPoolName, ListId, PoolId, PoolName};
use crate::model::queue;
use crate::model::refusal;
use crate::model::task::{Pid, TaskId};

/// Why a line that is well-formed JSON of this format means nothing.
#[derive(Debug, thiserror::Error)]
pub(in crate::journal) enum Invalid {
    #[error("{0} is not a PID")]
    Pid(u32),
    #[error("{0}")]
    CpuList(#[from] ParseCpuSetError),
    #[error("{0}")]
    PoolName(#[from] InvalidPoolName),
}

/// The first line of `claims`. The checksum of every other line covers the boot id as well.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::journal) struct ClaimsHeader {
    pub(in crate::journal) kcm: String,
    pub(in crate::journal) version: u32,
    pub(in crate::journal) boot: String,
}

/// Every other line of `claims`. Numbers are consecutive, so that a missing line is noticed.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::journal) struct ClaimsLine {
    pub(in crate::journal) n: u64,
    pub(in crate::journal) r: Record,
}

/// See [`records::Record`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(in crate::journal) enum Record {
    Intent(Claim),
    Claimed(Claim),
    Abandoned {
        task: Task,
    },
    Releasing {
        task: Task,
    },
    Released {
        task: Task,
    },
    Inherited {
        from: Task,
        heir: Claim,
    },
    Ended {
        task: Task,
        reclaimed: Option<Reclaimed>,
    },
    Kept(Reclaimed),
    Dropped {
        count: u64,
    },
    Acknowledged {
        seq: u64,
    },
    Mounted {
        mount: u64,
    },
    Answered {
        request: u64,
        errno: i32,
        /// The session thread.
        hand: u32,
    },
    Refused {
        request: u64,
        hand: u32,
        filed: Refusal,
    },
    /// Not known to early programs.
    Succeeded {
        tasks: Vec<Task>,
    },
    /// A request was retried.
    Tried {
        request: u64,
    },
    Polled {
        fh: u64,
        kh: u64,
    },
    /// Not known to early programs.
    Queued(Waiter),
    /// An open file was poisoned by a truncated command.
    Rest {
        fh: u64,
    },
    Closed {
        fh: u64,
    },
    Reserved {
        events: u64,
        handles: u32,
    },
    /// Not known to early programs, which made no partitions.
    Partition(Partition),
    Unpartitioned {
        list: u64,
    },
    Batch(Vec<Record>),
}

#[derive(Debug, Serialize, Deserialize)]
pub(in crate::journal) struct Partition {
    list: u64,
    cpus: String,
    parent: String,
    /// An earlier version has no such field, and passes over it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    whole: bool,
    levels: Vec<Level>,
    /// Left out if it is empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    workqueues: String,
}

/// A field that has its default is left out.
#[derive(Debug, Serialize, Deserialize)]
struct Level {
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    enabled: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    exclusive: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub(in crate::journal) struct Claim {
    task: Task,
    list: u64,
    saved: SavedMask,
    since: u64,
    uid: u32,
    cgroup: u64,
    by_root: bool,
    /// Not in the records of early programs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kin: Option<Kin>,
}

/// A field that has its default is left out.
#[derive(Debug, Serialize, Deserialize)]
struct Kin {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    cgroups: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    users: Vec<u32>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    any_user: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub(in crate::journal) struct Task {
    pid: u32,
    ino: u64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum SavedMask {
    All,
    Cpus(String),
}

#[derive(Debug, Serialize, Deserialize)]
pub(in crate::journal) struct Reclaimed {
    seq: u64,
    time: u64,
    pid: u32,
    pool: String,
    cpus: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    uid: Option<u32>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(in crate::journal) struct Refusal {
    time: u64,
    number: u32,
    errno: i32,
    text: String,
    holder: Option<Holder>,
    concerned: Vec<Task>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    uid: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    session: Option<u32>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(in crate::journal) struct Waiter {
    fh: u64,
    pool: u64,
    task: Task,
    uid: u32,
    since: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Holder {
    task: Task,
    list: u64,
    held: u64,
}

/// A line of `config`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(in crate::journal) enum ConfigLine {
    Header { kcm: String, version: u32 },
    Next { node: u64 },
    Last(Request),
    Pool(Pool),
    List { pool: Pool, list: List },
    Attributes(Attributes),
    End { lines: usize },
}

#[derive(Debug, Serialize, Deserialize)]
pub(in crate::journal) struct Request {
    mount: u64,
    request: u64,
    /// An earlier version has no such field, and passes over it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    stale: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(in crate::journal) struct Pool {
    name: String,
    exclusivity: Exclusivity,
    /// An earlier version has no such field, and passes over it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    partial: bool,
    /// The same holds for this one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    isolated: bool,
    /// And for this one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    transient: bool,
    node: u64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Exclusivity {
    Exclusive,
    Shared,
}

#[derive(Debug, Serialize, Deserialize)]
pub(in crate::journal) struct List {
    id: u64,
    name: String,
    cpus: String,
    /// An earlier version has no such field, and passes over it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    draining: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub(in crate::journal) struct Attributes {
    node: u64,
    uid: u32,
    gid: u32,
    mode: u16,
}

impl From<&records::Record> for Record {
    fn from(record: &records::Record) -> Self {
        use records::Record as R;
        match record {
            R::Intent(claim) => Self::Intent(Claim::without_kin(claim)),
            R::Claimed(claim) => Self::Claimed((&**claim).into()),
            R::Abandoned { task } => Self::Abandoned { task: task.into() },
            R::Releasing { task } => Self::Releasing { task: task.into() },
            R::Released { task } => Self::Released { task: task.into() },
            R::Inherited { from, heir } => Self::Inherited { from: from.into(), heir: (&**heir).into() },
            R::Ended { task, reclaimed } => {
                Self::Ended { task: task.into(), reclaimed: reclaimed.as_ref().map(Into::into) }
            }
            R::RetainedReclaim(reclaimed) => Self::Kept(reclaimed.into()),
            &R::Dropped { count } => Self::Dropped { count },
            &R::Acknowledged { seq } => Self::Acknowledged { seq },
            &R::Mounted { mount } => Self::Mounted { mount },
            &R::Answered { request, errno, session_thread } => {
                Self::Answered { request, errno, hand: session_thread }
            }
            R::Refused { request, session_thread, refusal } => {
                Self::Refused { request: *request, hand: *session_thread, filed: (&**refusal).into() }
            }
            R::Succeeded { tasks } => Self::Succeeded { tasks: tasks.iter().map(Into::into).collect() },
            &R::Retried { request } => Self::Tried { request },
            &R::Polled { fh, kh } => Self::Polled { fh, kh },
            R::Queued(waiter) => Self::Queued(waiter.into()),
            &R::Truncated { fh } => Self::Rest { fh },
            &R::Closed { fh } => Self::Closed { fh },
            &R::Reserved { events, handles } => Self::Reserved { events, handles },
            R::Partition(partition) => Self::Partition(partition.into()),
            &R::Unpartitioned { list } => Self::Unpartitioned { list: list.0 },
            R::Batch(records) => Self::Batch(records.iter().map(Into::into).collect()),
        }
    }
}

/// The cgroups in the records that are being read. Equal ones share their memory: thousands of claims may name the same.
#[derive(Debug, Default)]
pub(in crate::journal) struct SharedCgroups(HashMap<String, Arc<Cgroups>>);

impl SharedCgroups {
    fn parse(&mut self, text: String) -> Arc<Cgroups> {
        match self.0.get(&text) {
            Some(known) => Arc::clone(known),
            None => {
                let cgroups = Arc::new(Cgroups::from_printed(&text));
                self.0.insert(text, Arc::clone(&cgroups));
                cgroups
            }
        }
    }
}

impl Record {
    /// Returns what the record says.
    ///
    /// # Errors
    /// A value is out of its range.
    pub(in crate::journal) fn decoded(self, cgroups: &mut SharedCgroups) -> Result<records::Record, Invalid> {
        use records::Record as R;
        let mut claim = |claim: Claim| claim.decoded(cgroups).map(Arc::new);
        Ok(match self {
            Self::Intent(it) => R::Intent(claim(it)?),
            Self::Claimed(it) => R::Claimed(claim(it)?),
            Self::Abandoned { task } => R::Abandoned { task: task.try_into()? },
            Self::Releasing { task } => R::Releasing { task: task.try_into()? },
            Self::Released { task } => R::Released { task: task.try_into()? },
            Self::Inherited { from, heir } => R::Inherited { from: from.try_into()?, heir: claim(heir)? },
            Self::Ended { task, reclaimed } => {
                R::Ended { task: task.try_into()?, reclaimed: reclaimed.map(Into::into) }
            }
            Self::Kept(reclaimed) => R::RetainedReclaim(reclaimed.into()),
            Self::Dropped { count } => R::Dropped { count },
            Self::Acknowledged { seq } => R::Acknowledged { seq },
            Self::Mounted { mount } => R::Mounted { mount },
            Self::Answered { request, errno, hand } => R::Answered { request, errno, session_thread: hand },
            Self::Refused { request, hand, filed } => {
                R::Refused { request, session_thread: hand, refusal: Arc::new(filed.try_into()?) }
            }
            Self::Succeeded { tasks } => {
                R::Succeeded { tasks: tasks.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()? }
            }
            Self::Tried { request } => R::Retried { request },
            Self::Polled { fh, kh } => R::Polled { fh, kh },
            Self::Queued(waiter) => R::Queued(waiter.try_into()?),
            Self::Rest { fh } => R::Truncated { fh },
            Self::Closed { fh } => R::Closed { fh },
            Self::Reserved { events, handles } => R::Reserved { events, handles },
            Self::Partition(partition) => R::Partition(partition.try_into()?),
            Self::Unpartitioned { list } => R::Unpartitioned { list: ListId(list) },
            Self::Batch(records) => {
                R::Batch(records.into_iter().map(|it| it.decoded(cgroups)).collect::<Result<_, _>>()?)
            }
        })
    }
}

impl Claim {
    /// An intent is only undone or replaced by the claim, so nobody asks for its kin.
    fn without_kin(claim: &command::Claim) -> Self {
        Self {
            task: (&claim.task).into(),
            list: claim.list.0,
            saved: match &claim.saved {
                command::SavedMask::All => SavedMask::All,
                command::SavedMask::Cpus(cpus) => SavedMask::Cpus(cpus.to_string()),
            },
            since: claim.since,
            uid: claim.uid,
            cgroup: claim.cgroup,
            by_root: claim.by_root,
            kin: None,
        }
    }
}

impl From<&command::Claim> for Claim {
    fn from(claim: &command::Claim) -> Self {
        let kin = (claim.kin != command::Kin::default()).then(|| (&claim.kin).into());
        Self { kin, ..Self::without_kin(claim) }
    }
}

impl From<&command::Kin> for Kin {
    fn from(kin: &command::Kin) -> Self {
        let cgroups = kin.cgroups.iter().map(ToString::to_string).collect();
        Self { cgroups, users: kin.users.clone(), any_user: kin.any_user }
    }
}

impl Claim {
    fn decoded(self, shared: &mut SharedCgroups) -> Result<command::Claim, Invalid> {
        let kin = self.kin.map_or_else(command::Kin::default, |kin| command::Kin {
            cgroups: kin.cgroups.into_iter().map(|text| shared.parse(text)).collect(),
            users: kin.users,
            any_user: kin.any_user,
        });
        Ok(command::Claim {
            task: self.task.try_into()?,
            list: ListId(self.list),
            saved: match self.saved {
                SavedMask::All => command::SavedMask::All,
                SavedMask::Cpus(cpus) => command::SavedMask::Cpus(cpus.parse()?),
            },
            since: self.since,
            uid: self.uid,
            cgroup: self.cgroup,
            by_root: self.by_root,
            kin,
        })
    }
}

impl From<&TaskId> for Task {
    fn from(task: &TaskId) -> Self {
        Self { pid: task.pid.get(), ino: task.ino }
    }
}

impl TryFrom<Task> for TaskId {
    type Error = Invalid;

    fn try_from(task: Task) -> Result<Self, Invalid> {
        Ok(Self { pid: Pid::new(task.pid).ok_or(Invalid::Pid(task.pid))?, ino: task.ino })
    }
}

impl From<&records::Reclaimed> for Reclaimed {
    fn from(reclaimed: &records::Reclaimed) -> Self {
        let records::Reclaimed { seq, time, pid, pool, cpus, uid } = reclaimed.clone();
        Self { seq, time, pid, pool, cpus, uid }
    }
}

impl From<Reclaimed> for records::Reclaimed {
    fn from(reclaimed: Reclaimed) -> Self {
        let Reclaimed { seq, time, pid, pool, cpus, uid } = reclaimed;
        Self { seq, time, pid, pool, cpus, uid }
    }
}

impl From<&records::RefusalRecord> for Refusal {
    fn from(refusal: &records::RefusalRecord) -> Self {
        Self {
            time: refusal.time,
            number: refusal.pid,
            errno: refusal.errno,
            text: refusal.text.clone(),
            holder: refusal.holder.as_ref().map(|holder| Holder {
                task: (&holder.task).into(),
                list: holder.list.0,
                held: holder.held,
            }),
            concerned: refusal.subjects.iter().map(Into::into).collect(),
            uid: refusal.uid,
            session: refusal.session,
        }
    }
}

impl TryFrom<Refusal> for records::RefusalRecord {
    type Error = Invalid;

    fn try_from(refusal: Refusal) -> Result<Self, Invalid> {
        let holder = |holder: Holder| {
            Ok::<_, Invalid>(refusal::Holder {
                task: holder.task.try_into()?,
                list: ListId(holder.list),
                held: holder.held,
            })
        };
        Ok(Self {
            time: refusal.time,
            pid: refusal.number,
            errno: refusal.errno,
            text: refusal.text,
            holder: refusal.holder.map(holder).transpose()?,
            subjects: refusal.concerned.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
            uid: refusal.uid,
            session: refusal.session,
        })
    }
}

impl From<&queue::Waiter> for Waiter {
    fn from(waiter: &queue::Waiter) -> Self {
        let queue::Waiter { fh, pool, task, uid, since } = *waiter;
        Self { fh, pool: pool.0, task: (&task).into(), uid, since }
    }
}

impl TryFrom<Waiter> for queue::Waiter {
    type Error = Invalid;

    fn try_from(waiter: Waiter) -> Result<Self, Invalid> {
        let Waiter { fh, pool, task, uid, since } = waiter;
        Ok(Self { fh, pool: PoolId(pool), task: task.try_into()?, uid, since })
    }
}

impl From<&partition::Partition> for Partition {
    fn from(partition: &partition::Partition) -> Self {
        let level =
            |&partition::Level { enabled, exclusive }: &partition::Level| Level { enabled, exclusive };
        Self {
            list: partition.list.0,
            cpus: partition.cpus.to_string(),
            parent: partition.parent.clone(),
            whole: partition.is_whole_cgroup,
            levels: partition.levels.iter().map(level).collect(),
            workqueues: partition.workqueues.to_string(),
        }
    }
}

impl TryFrom<Partition> for partition::Partition {
    type Error = Invalid;

    fn try_from(partition: Partition) -> Result<Self, Invalid> {
        let level = |Level { enabled, exclusive }| partition::Level { enabled, exclusive };
        Ok(Self {
            list: ListId(partition.list),
            cpus: partition.cpus.parse()?,
            parent: partition.parent,
            is_whole_cgroup: partition.whole,
            levels: partition.levels.into_iter().map(level).collect(),
            workqueues: match partition.workqueues.as_str() {
                "" => CpuSet::new(),
                cpus => cpus.parse()?,
            },
        })
    }
}

impl From<(pools::LastRequest, &[String])> for Request {
    fn from((last, stale): (pools::LastRequest, &[String])) -> Self {
        Self { mount: last.mount, request: last.request, stale: stale.to_vec() }
    }
}

impl Request {
    /// Returns the request, and the paths that it has changed without the kernel.
    pub(in crate::journal) fn decoded(self) -> (Option<pools::LastRequest>, Vec<String>) {
        let Self { mount, request, stale } = self;
        (Some(pools::LastRequest { mount, request }), stale)
    }
}

impl From<&pools::PoolConfig> for Pool {
    fn from(pool: &pools::PoolConfig) -> Self {
        Self {
            name: pool.name.to_string(),
            exclusivity: match pool.exclusivity {
                pool::Exclusivity::Exclusive => Exclusivity::Exclusive,
                pool::Exclusivity::Shared => Exclusivity::Shared,
            },
            partial: pool.partial,
            isolated: pool.mode == pool::Mode::Isolated,
            transient: pool.transient,
            node: pool.node,
        }
    }
}

/// Its lists are lines of their own.
impl TryFrom<Pool> for pools::PoolConfig {
    type Error = Invalid;

    fn try_from(pool: Pool) -> Result<Self, Invalid> {
        Ok(Self {
            name: pool.name.parse::<PoolName>()?,
            exclusivity: match pool.exclusivity {
                Exclusivity::Exclusive => pool::Exclusivity::Exclusive,
                Exclusivity::Shared => pool::Exclusivity::Shared,
            },
            partial: pool.partial,
            mode: if pool.isolated { pool::Mode::Isolated } else { pool::Mode::Affinity },
            transient: pool.transient,
            node: pool.node,
            lists: Vec::new(),
        })
    }
}

impl From<&pools::ListConfig> for List {
    fn from(list: &pools::ListConfig) -> Self {
        let (name, cpus) = (list.name.clone(), list.cpus.to_string());
        Self { id: list.id.0, name, cpus, draining: list.draining }
    }
}

impl TryFrom<List> for pools::ListConfig {
    type Error = Invalid;

    fn try_from(list: List) -> Result<Self, Invalid> {
        let (id, cpus) = (ListId(list.id), list.cpus.parse()?);
        Ok(Self { id, name: list.name, cpus, draining: list.draining })
    }
}

impl From<&pools::NodeAttributes> for Attributes {
    fn from(attributes: &pools::NodeAttributes) -> Self {
        let &pools::NodeAttributes { node, uid, gid, mode } = attributes;
        Self { node, uid, gid, mode }
    }
}

impl From<Attributes> for pools::NodeAttributes {
    fn from(attributes: Attributes) -> Self {
        let Attributes { node, uid, gid, mode } = attributes;
        Self { node, uid, gid, mode }
    }
}
