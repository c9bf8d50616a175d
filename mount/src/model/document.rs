//! The configuration as a document: what `info/config` shows and takes, and the files of `kcm apply` and `kcm export`.
//!
//! Owns its form, its checks, and the differences between two documents. Transient pools are no part of it: they belong to the
//! commands that made them. Does not know how a difference is carried out, or the text format around the document: JSON or
//! YAML.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Error as _, MapAccess, Visitor, value::MapAccessDeserializer};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::cpuset::CpuSet;
use super::pool::{Exclusivity, Mode, PoolName};
use super::refusal::{ListName, Refusal};

/// All pools that stay, and their lists. A field that has its default can be left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Document {
    /// The pools by name.
    pub pools: BTreeMap<String, PoolEntry>,
}

/// A document that is to become the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    /// The pools by name.
    pub pools: BTreeMap<String, PoolEntry>,
    /// Whether lists are removed although they have tasks, which are released.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
    /// Whether it is only checked whether all this would be possible.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
}

/// A pool.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolEntry {
    /// Whether each list takes one task only.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub exclusive: bool,
    /// Whether exclusive lists with offline CPUs can be claimed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub partial: bool,
    /// What keeps others off its lists.
    #[serde(default, skip_serializing_if = "ModeEntry::is_default")]
    pub mode: ModeEntry,
    /// Owner and mode of its file `tasks`.
    #[serde(default, skip_serializing_if = "TasksEntry::is_default")]
    pub tasks: TasksEntry,
    /// Its lists.
    #[serde(default)]
    pub lists: Vec<ListEntry>,
}

/// The word in the file `mode` of a pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModeEntry {
    /// [`Mode::Affinity`]
    #[default]
    Affinity,
    /// [`Mode::Isolated`]
    Isolated,
}

impl ModeEntry {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Owner and mode of a file `tasks`. A field that is left out stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TasksEntry {
    /// A uid.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<u32>,
    /// A gid.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<u32>,
    /// The permission bits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<Permissions>,
}

impl TasksEntry {
    /// Whether it changes nothing.
    #[must_use]
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Permission bits, written as an octal text: `"0664"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permissions(pub u16);

impl Serialize for Permissions {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:04o}", self.0))
    }
}

impl<'de> Deserialize<'de> for Permissions {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bits = u16::from_str_radix(&text, 8).ok().filter(|bits| *bits <= 0o777);
        bits.map(Self)
            .ok_or_else(|| D::Error::custom(format!("\"{text}\" is no mode; write it like \"0664\"")))
    }
}

/// A CPU list: its name, or a map with the name as `cpus`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListEntry {
    /// The name of its directory.
    pub cpus: String,
    /// Owner and mode of its file `tasks`.
    pub tasks: TasksEntry,
}

/// The map.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ListMap {
    #[serde(deserialize_with = "cpus")]
    cpus: String,
    #[serde(default, skip_serializing_if = "TasksEntry::is_default")]
    tasks: TasksEntry,
}

fn cpus<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Ok(ListEntry::deserialize(deserializer)?.cpus)
}

impl Serialize for ListEntry {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.tasks.is_default() {
            return serializer.serialize_str(&self.cpus);
        }
        ListMap { cpus: self.cpus.clone(), tasks: self.tasks }.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for ListEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntryVisitor;
        impl<'de> Visitor<'de> for EntryVisitor {
            type Value = ListEntry;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a CPU list such as 0-3, or a map with cpus and tasks")
            }

            fn visit_str<E>(self, text: &str) -> Result<ListEntry, E> {
                Ok(ListEntry { cpus: text.to_owned(), tasks: TasksEntry::default() })
            }

            // YAML takes a single CPU for a number.
            fn visit_u64<E>(self, cpu: u64) -> Result<ListEntry, E> {
                Ok(ListEntry { cpus: cpu.to_string(), tasks: TasksEntry::default() })
            }

            fn visit_i64<E: serde::de::Error>(self, cpu: i64) -> Result<ListEntry, E> {
                self.visit_u64(cpu.try_into().map_err(|_| E::custom(format!("{cpu} is no CPU")))?)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<ListEntry, A::Error> {
                let ListMap { cpus, tasks } = ListMap::deserialize(MapAccessDeserializer::new(map))?;
                Ok(ListEntry { cpus, tasks })
            }
        }
        deserializer.deserialize_any(EntryVisitor)
    }
}

/// A pool whose values are checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolSpec {
    /// Its name.
    pub name: PoolName,
    /// How many tasks each of its lists takes.
    pub exclusivity: Exclusivity,
    /// Whether exclusive lists with offline CPUs can be claimed.
    pub partial: bool,
    /// What keeps others off its lists.
    pub mode: Mode,
    /// Owner and mode of its file `tasks`.
    pub tasks: TasksEntry,
    /// Its lists.
    pub lists: Vec<ListSpec>,
}

/// A list whose values are checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListSpec {
    /// The name of its directory.
    pub name: String,
    /// Its CPUs.
    pub cpus: CpuSet,
    /// Owner and mode of its file `tasks`.
    pub tasks: TasksEntry,
}

/// Checks the pools of a document.
///
/// # Errors
/// The name of a pool, and why it cannot be as it is written.
pub fn specs(pools: &BTreeMap<String, PoolEntry>) -> Result<Vec<PoolSpec>, (String, Box<Refusal>)> {
    let mut all: Vec<PoolSpec> = Vec::new();
    for (name, entry) in pools {
        let spec = spec(name, entry).and_then(|spec| overlaps_none(&all, &spec).map(|()| spec));
        all.push(spec.map_err(|refusal| (name.clone(), Box::new(refusal)))?);
    }
    Ok(all)
}

fn spec(name: &str, entry: &PoolEntry) -> Result<PoolSpec, Refusal> {
    let name: PoolName = name.parse().map_err(Refusal::BadPoolName)?;
    let exclusivity = if entry.exclusive { Exclusivity::Exclusive } else { Exclusivity::Shared };
    let mode = match entry.mode {
        ModeEntry::Affinity => Mode::Affinity,
        ModeEntry::Isolated if !entry.exclusive => return Err(Refusal::NotExclusive { pool: name }),
        ModeEntry::Isolated => Mode::Isolated,
    };
    let list = |list: &ListEntry| {
        let cpus = CpuSet::from_name(&list.cpus).map_err(Refusal::BadCpuList)?;
        Ok(ListSpec { name: list.cpus.clone(), cpus, tasks: list.tasks })
    };
    let lists = entry.lists.iter().map(list).collect::<Result<_, Refusal>>()?;
    let PoolEntry { partial, tasks, .. } = *entry;
    Ok(PoolSpec { name, exclusivity, partial, mode, tasks, lists })
}

/// Checks that no CPU is in two lists, of one pool or of several.
fn overlaps_none(others: &[PoolSpec], pool: &PoolSpec) -> Result<(), Refusal> {
    for (index, list) in pool.lists.iter().enumerate() {
        let before = pool.lists.iter().take(index).map(|other| (pool, other));
        let elsewhere = others.iter().flat_map(|pool| pool.lists.iter().map(move |list| (pool, list)));
        let mut overlapping =
            before.chain(elsewhere).filter(|(_, other)| !other.cpus.is_disjoint(&list.cpus));
        if let Some((pool, other)) = overlapping.next() {
            let both = other.cpus.intersection(&list.cpus);
            let other = ListName { pool: pool.name.clone(), cpus: other.name.clone() };
            return Err(Refusal::Overlap { other, both });
        }
    }
    Ok(())
}

/// Returns a line for each difference, in the order in which people read them: `+ pool infra`, `- list infra 2-3`,
/// `~ infra exclusive 0 -> 1`.
#[must_use]
pub fn differences(before: &[PoolSpec], after: &[PoolSpec]) -> Vec<String> {
    let mut lines = Vec::new();
    for pool in after {
        let old = before.iter().find(|old| old.name == pool.name);
        if old.is_none() {
            lines.push(format!("+ pool {}", pool.name));
        }
        changed_values(&mut lines, old, pool);
        for list in &pool.lists {
            let name = format!("{} {}", pool.name, list.name);
            match place(before, &list.cpus) {
                None => lines.push(format!("+ list {name}")),
                Some((from, _)) if from.name != pool.name => {
                    lines.push(format!("~ list {} {} -> {}", from.name, list.name, pool.name));
                }
                Some(_) => {}
            }
            let old = place(before, &list.cpus).map_or(TasksEntry::default(), |(_, old)| old.tasks);
            changed_tasks(&mut lines, &name, old, list.tasks);
        }
    }
    for pool in before {
        let gone = pool.lists.iter().filter(|list| place(after, &list.cpus).is_none());
        lines.extend(gone.map(|list| format!("- list {} {}", pool.name, list.name)));
        if !after.iter().any(|new| new.name == pool.name) {
            lines.push(format!("- pool {}", pool.name));
        }
    }
    lines
}

/// Returns the list with these CPUs, and its pool.
fn place<'a>(pools: &'a [PoolSpec], cpus: &CpuSet) -> Option<(&'a PoolSpec, &'a ListSpec)> {
    let mut lists = pools.iter().flat_map(|pool| pool.lists.iter().map(move |list| (pool, list)));
    lists.find(|(_, list)| list.cpus == *cpus)
}

/// Adds a line for each value of a pool that differs from the old one, or from that of a new pool.
fn changed_values(lines: &mut Vec<String>, old: Option<&PoolSpec>, pool: &PoolSpec) {
    let flag = |is_set: bool| if is_set { "1" } else { "0" };
    let mode = |mode: Mode| if mode == Mode::Isolated { "isolated" } else { "affinity" };
    let values = |pool: &PoolSpec| {
        let is_exclusive = pool.exclusivity == Exclusivity::Exclusive;
        [flag(is_exclusive), flag(pool.partial), mode(pool.mode)]
    };
    let before = old.map_or(["0", "0", "affinity"], values);
    let names = ["exclusive", "partial", "mode"];
    for ((name, before), after) in names.into_iter().zip(before).zip(values(pool)) {
        if before != after {
            lines.push(format!("~ {} {name} {before} -> {after}", pool.name));
        }
    }
    changed_tasks(lines, pool.name.as_str(), old.map_or(TasksEntry::default(), |old| old.tasks), pool.tasks);
}

/// Adds a line for each given value that differs from the old one. `old` has all values that are not those of a new file.
fn changed_tasks(lines: &mut Vec<String>, name: &str, old: TasksEntry, new: TasksEntry) {
    let mut line = |what: &str, old: String, new: Option<String>| {
        if let Some(new) = new.filter(|new| *new != old) {
            lines.push(format!("~ {name} tasks {what} {old} -> {new}"));
        }
    };
    let octal = |Permissions(bits): Permissions| format!("{bits:04o}");
    line("owner", old.owner.unwrap_or(0).to_string(), new.owner.map(|uid| uid.to_string()));
    line("group", old.group.unwrap_or(0).to_string(), new.group.map(|gid| gid.to_string()));
    line("mode", octal(old.mode.unwrap_or(Permissions(0o644))), new.mode.map(octal));
}
