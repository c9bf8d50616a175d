//! The tree: every file in one table, with its mode, how it is read and how it is written.
//!
//! Owns: names, node ids and default modes. Must not know: FUSE's messages, or what a claim is.
//!
//! Node ids below [`FIRST_DYNAMIC`] are those of the table. A pool has three nodes in a row (directory,
//! `exclusive`, `tasks`) and a CPU list two (directory, `tasks`), from a multiple of four on; they are journaled
//! with the configuration and never given to another node, so that the next daemon can go on serving what the
//! kernel holds.

use std::sync::Arc;

use crate::engine::{Attributes, Caller, Engine, NODES_EACH};
use crate::model::claims::Claims;
use crate::model::command::Target;
use crate::model::pool::{Exclusivity, ListId, PoolId};
use crate::model::refusal::Refusal;

/// The node id of the mount's root.
pub(crate) const ROOT: u64 = 1;
const POOLS: u64 = 3;
const SELF: u64 = 4;
const INFO: u64 = 5;
/// The first node id that a pool or list can have.
pub(crate) const FIRST_DYNAMIC: u64 = 64;

/// Where a file of the table stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Location {
    /// Once, under this node id in the directory of that one.
    Fixed { node: u64, parent: u64 },
    /// In every pool, at this distance from the pool's node.
    Pool { offset: u64 },
    /// In every CPU list, at this distance from the list's node.
    List { offset: u64 },
}

type Show = fn(&Engine, Context) -> Content;
type Store = fn(&Engine, Context, &WriteRequest<'_>) -> Result<(), Refusal>;

/// What is read from a file.
pub(crate) type Content = Arc<[u8]>;

/// One row: a file or a directory.
struct Entry {
    location: Location,
    name: &'static str,
    /// File type and permission bits.
    mode: u32,
    /// None: a directory.
    show: Option<Show>,
    /// None: a write is refused.
    store: Option<Store>,
    /// Whether size and content change behind the kernel's back.
    volatile: bool,
}

/// For whom, and for which pool or list, a file is shown or written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Context {
    caller: Caller,
    base: u64,
}

/// What is written, and how the file was opened.
#[derive(Debug)]
pub(crate) struct WriteRequest<'a> {
    /// All of it: one write(2) is one command.
    pub(crate) data: &'a [u8],
    /// The user who opened the file.
    pub(crate) opener: u32,
    /// Whether it was opened for reading too.
    pub(crate) read_write: bool,
}

const DIR: u32 = 0o040_000;
const FILE: u32 = 0o100_000;

const fn dir(location: Location, name: &'static str) -> Entry {
    Entry { location, name, mode: DIR | 0o755, show: None, store: None, volatile: false }
}

const fn file(
    location: Location,
    name: &'static str,
    mode: u32,
    show: Show,
    store: Option<Store>,
    volatile: bool,
) -> Entry {
    Entry { location, name, mode: FILE | mode, show: Some(show), store, volatile }
}

const fn at(node: u64, parent: u64) -> Location {
    Location::Fixed { node, parent }
}

#[rustfmt::skip]
static TABLE: &[Entry] = &[
    dir (at(ROOT, ROOT),           ""),
    file(at(2, ROOT),              "lock",       0o600, show_nothing,    None,                 false),
    dir (at(POOLS, ROOT),          "pools"),
    dir (Location::Pool { offset: 0 }, ""),
    file(Location::Pool { offset: 1 }, "exclusive", 0o644, show_exclusive,  Some(store_exclusive), false),
    file(Location::Pool { offset: 2 }, "tasks",     0o644, show_pool_tasks, Some(store_pool_tasks), true),
    dir (Location::List { offset: 0 }, ""),
    file(Location::List { offset: 1 }, "tasks",     0o644, show_list_tasks, Some(store_list_tasks), true),
    dir (at(SELF, ROOT),           "self"),
    file(at(6, SELF),              "claim",      0o444, show_claim,      None,                 true),
    file(at(7, SELF),              "cpus",       0o444, show_cpus,       None,                 true),
    file(at(8, SELF),              "last_error", 0o444, show_last_error, None,                 true),
    dir (at(INFO, ROOT),           "info"),
    file(at(9, INFO),              "version",    0o444, show_version,    None,                 false),
    file(at(10, INFO),             "topology",   0o444, show_topology,   None,                 false),
    file(at(11, INFO),             "events",     0o600, show_events,     None,                 true),
    file(at(12, INFO),             "reclaimed",  0o600, show_reclaimed,  Some(store_reclaimed), true),
    file(at(13, INFO),             "metrics",    0o444, show_metrics,    None,                 true),
];

fn show_nothing(_: &Engine, _: Context) -> Content {
    Arc::default()
}

fn show_exclusive(engine: &Engine, context: Context) -> Content {
    let pool = PoolId(context.base);
    let exclusive = engine.with_configuration(|claims| {
        claims.pool(pool).map(|pool| pool.exclusivity() == Exclusivity::Exclusive)
    });
    match exclusive {
        Some(true) => Arc::from(*b"1\n"),
        Some(false) => Arc::from(*b"0\n"),
        None => Arc::default(),
    }
}

fn show_pool_tasks(engine: &Engine, context: Context) -> Content {
    engine.show_pool_tasks(PoolId(context.base))
}

fn show_list_tasks(engine: &Engine, context: Context) -> Content {
    engine.show_list_tasks(ListId(context.base))
}

fn show_claim(engine: &Engine, context: Context) -> Content {
    line(engine.claim_of_reader(context.caller).map(|list| list.to_string()))
}

fn show_cpus(engine: &Engine, context: Context) -> Content {
    line(engine.claim_of_reader(context.caller).map(|list| list.cpus))
}

fn show_last_error(engine: &Engine, context: Context) -> Content {
    let text =
        engine.last_error_of_reader(context.caller, |list| may_read_tasks(engine, context.caller, list));
    text.into_bytes().into()
}

fn show_version(_: &Engine, _: Context) -> Content {
    line(Some(env!("CARGO_PKG_VERSION").to_owned()))
}

fn show_topology(engine: &Engine, _: Context) -> Content {
    line(Some(engine.topology().to_json()))
}

fn show_events(engine: &Engine, _: Context) -> Content {
    engine.show_events().into_bytes().into()
}

fn show_reclaimed(engine: &Engine, _: Context) -> Content {
    engine.show_reclaimed().into_bytes().into()
}

fn show_metrics(engine: &Engine, _: Context) -> Content {
    engine.show_metrics().into_bytes().into()
}

fn store_exclusive(engine: &Engine, context: Context, request: &WriteRequest<'_>) -> Result<(), Refusal> {
    let result = engine.set_exclusive(context.caller, request.opener, PoolId(context.base), request.data);
    result.inspect_err(|refusal| engine.refused(context.caller, refusal))
}

fn store_pool_tasks(engine: &Engine, context: Context, request: &WriteRequest<'_>) -> Result<(), Refusal> {
    store_tasks(engine, Target::Pool(PoolId(context.base)), context, request)
}

fn store_list_tasks(engine: &Engine, context: Context, request: &WriteRequest<'_>) -> Result<(), Refusal> {
    store_tasks(engine, Target::List(ListId(context.base)), context, request)
}

fn store_tasks(
    engine: &Engine,
    target: Target,
    context: Context,
    request: &WriteRequest<'_>,
) -> Result<(), Refusal> {
    engine.write_tasks(target, context.caller, request.opener, request.data, request.read_write)
}

fn store_reclaimed(engine: &Engine, context: Context, request: &WriteRequest<'_>) -> Result<(), Refusal> {
    engine
        .acknowledge(context.caller, request.data)
        .inspect_err(|refusal| engine.refused(context.caller, refusal))
}

fn line(text: Option<String>) -> Content {
    text.map(|text| (text + "\n").into_bytes()).unwrap_or_default().into()
}

/// Whether the mode lets this user read the `tasks` file of the list: the first class that fits decides.
fn may_read_tasks(engine: &Engine, caller: Caller, list: ListId) -> bool {
    let Some(node) = Node::of(engine, list.tasks_node()) else { return caller.uid == 0 };
    let Attributes { uid, gid, mode } = node.attributes(engine);
    let class = if caller.uid == uid {
        6
    } else if engine.is_in_group(caller, gid) {
        3
    } else {
        0
    };
    caller.uid == 0 || mode >> class & 4 != 0
}

/// A file or directory that exists.
#[derive(Clone, Copy)]
pub(crate) struct Node {
    /// The node of its pool or list; for fixed files its own.
    base: u64,
    entry: &'static Entry,
}

/// What stat(2) shows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stat {
    pub(crate) node: u64,
    pub(crate) is_dir: bool,
    pub(crate) owner: Attributes,
    /// In bytes; 0 for a directory.
    pub(crate) size: u64,
    pub(crate) links: u32,
    /// Whether the kernel may remember all this until it changes it itself.
    pub(crate) cacheable: bool,
}

/// What a directory can hold beside its fixed files.
enum Directory {
    Pools,
    Pool(PoolId),
    Other,
}

impl Node {
    /// The node of this id, if it exists.
    pub(crate) fn of(engine: &Engine, id: u64) -> Option<Self> {
        if id < FIRST_DYNAMIC {
            let is = |entry: &&Entry| matches!(entry.location, Location::Fixed { node, .. } if node == id);
            return TABLE.iter().find(is).map(|entry| Self { base: id, entry });
        }
        let (base, offset) = (id - id % NODES_EACH, id % NODES_EACH);
        let location = engine.with_configuration(|claims| location(claims, base, offset))?;
        TABLE.iter().find(|entry| entry.location == location).map(|entry| Self { base, entry })
    }

    /// Its id.
    pub(crate) fn id(self) -> u64 {
        match self.entry.location {
            Location::Fixed { node, .. } => node,
            Location::Pool { offset } | Location::List { offset } => self.base + offset,
        }
    }

    pub(crate) fn is_dir(self) -> bool {
        self.entry.show.is_none()
    }

    /// Whether its content changes behind the kernel's back.
    pub(crate) fn is_volatile(self) -> bool {
        self.entry.volatile
    }

    /// Whether writes mean something.
    pub(crate) fn is_writable(self) -> bool {
        self.entry.store.is_some()
    }

    /// Owner and mode.
    pub(crate) fn attributes(self, engine: &Engine) -> Attributes {
        let default = Attributes { uid: 0, gid: 0, mode: (self.entry.mode & 0o7777) as u16 };
        engine.attributes(self.id()).unwrap_or(default)
    }

    /// What stat(2) shows to the caller.
    pub(crate) fn stat(self, engine: &Engine, caller: Caller) -> Stat {
        Stat {
            node: self.id(),
            is_dir: self.is_dir(),
            owner: self.attributes(engine),
            size: self.show(engine, caller).map_or(0, |content| content.len() as u64),
            links: if self.is_dir() {
                2 + self.children(engine).iter().filter(|(_, node)| node.is_dir()).count() as u32
            } else {
                1
            },
            cacheable: !self.is_volatile(),
        }
    }

    /// What a reader reads; None for a directory.
    pub(crate) fn show(self, engine: &Engine, caller: Caller) -> Option<Content> {
        self.entry.show.map(|show| show(engine, Context { caller, base: self.base }))
    }

    /// One write(2).
    pub(crate) fn store(
        self,
        engine: &Engine,
        caller: Caller,
        request: &WriteRequest<'_>,
    ) -> Result<(), Refusal> {
        let store = self.entry.store.ok_or(Refusal::NotWritable)?;
        store(engine, Context { caller, base: self.base }, request)
    }

    /// The child of this name.
    pub(crate) fn child(self, engine: &Engine, name: &str) -> Option<Self> {
        if let Some(found) = self.fixed_children().find(|node| node.entry.name == name) {
            return Some(found);
        }
        let found = engine.with_configuration(|claims| match self.directory() {
            Directory::Pools => {
                claims.pools().find(|(_, pool)| pool.name().as_str() == name).map(|(id, _)| id.0)
            }
            Directory::Pool(id) => claims.pool(id).and_then(|pool| {
                pool.lists()
                    .find(|id| claims.list(*id).is_some_and(|list| list.name().cpus == name))
                    .map(|id| id.0)
            }),
            Directory::Other => None,
        });
        Self::of(engine, found?)
    }

    /// All children with their names: the fixed ones, then pools by name or lists by their first CPU.
    pub(crate) fn children(self, engine: &Engine) -> Vec<(String, Self)> {
        let mut all: Vec<(String, Self)> =
            self.fixed_children().map(|node| (node.entry.name.to_owned(), node)).collect();
        let dynamic = engine.with_configuration(|claims| match self.directory() {
            Directory::Pools => {
                let mut pools: Vec<(String, u64)> =
                    claims.pools().map(|(id, pool)| (pool.name().to_string(), id.0)).collect();
                pools.sort();
                pools
            }
            Directory::Pool(id) => {
                let lists = claims.pool(id).into_iter().flat_map(|pool| pool.lists());
                lists.filter_map(|id| Some((claims.list(id)?.name().cpus.clone(), id.0))).collect()
            }
            Directory::Other => Vec::new(),
        });
        all.extend(dynamic.into_iter().filter_map(|(name, id)| Some((name, Self::of(engine, id)?))));
        all
    }

    /// The directory above.
    pub(crate) fn parent(self, engine: &Engine) -> u64 {
        match self.entry.location {
            Location::Fixed { parent, .. } => parent,
            Location::Pool { offset: 0 } => POOLS,
            Location::Pool { .. } => self.base,
            Location::List { offset: 0 } => engine.with_configuration(|claims| {
                claims.list(ListId(self.base)).map_or(POOLS, |list| list.pool().0)
            }),
            Location::List { .. } => self.base,
        }
    }

    /// mkdir(2) in this directory.
    ///
    /// # Errors
    /// None where nothing can be made here.
    pub(crate) fn make_child(
        self,
        engine: &Engine,
        caller: Caller,
        name: &str,
    ) -> Option<Result<Self, Refusal>> {
        let made = match self.directory() {
            Directory::Pools => engine.add_pool(caller, name).map(|id| id.0),
            Directory::Pool(pool) => engine.add_list(caller, pool, name).map(|id| id.0),
            Directory::Other => return None,
        };
        let made = made.inspect_err(|refusal| engine.refused(caller, refusal));
        Some(made.and_then(|id| Self::of(engine, id).ok_or(Refusal::Removed)))
    }

    /// rmdir(2) of this node; None where it cannot be removed.
    pub(crate) fn remove(self, engine: &Engine, caller: Caller) -> Option<Result<(), Refusal>> {
        let removed = match self.entry.location {
            Location::Pool { offset: 0 } => engine.remove_pool(caller, PoolId(self.base)),
            Location::List { offset: 0 } => engine.remove_list(caller, ListId(self.base)),
            _ => return None,
        };
        Some(removed.inspect_err(|refusal| engine.refused(caller, refusal)))
    }

    fn fixed_children(self) -> impl Iterator<Item = Self> {
        TABLE.iter().filter_map(move |entry| {
            let base = match (entry.location, self.entry.location) {
                (Location::Fixed { node, parent }, _) if parent == self.id() && node != parent => node,
                (Location::Pool { offset: 1.. }, Location::Pool { offset: 0 }) => self.base,
                (Location::List { offset: 1.. }, Location::List { offset: 0 }) => self.base,
                _ => return None,
            };
            Some(Self { base, entry })
        })
    }

    fn directory(self) -> Directory {
        match self.entry.location {
            Location::Fixed { node: POOLS, .. } => Directory::Pools,
            Location::Pool { offset: 0 } => Directory::Pool(PoolId(self.base)),
            _ => Directory::Other,
        }
    }
}

/// Whether the node is a pool's or a list's.
fn location(claims: &Claims, base: u64, offset: u64) -> Option<Location> {
    if claims.pool(PoolId(base)).is_some() {
        Some(Location::Pool { offset })
    } else if claims.list(ListId(base)).is_some() {
        Some(Location::List { offset })
    } else {
        None
    }
}
