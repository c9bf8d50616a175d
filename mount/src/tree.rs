//! The tree: every file in one table, with its mode, how it is read and how it is written.
//!
//! Owns names, node ids and default modes. Does not know FUSE's messages, or what a claim is.
//!
//! Node ids below [`FIRST_DYNAMIC`] are fixed in the table. A pool has four consecutive nodes (directory,
//! `exclusive`, `tasks`, `partial`) and three far away (`mode`, `transient`, `queue`), and a CPU list three (directory, `tasks`, `state`), starting at a multiple of four.
//! They are stored with the configuration and never reused, so that the next worker can serve the nodes that the kernel knows.
//!
//! Longer than 400 lines because the table of files and the functions that it names are read together.

mod table;
#[cfg(test)]
mod tests;

use std::ops::RangeInclusive;
use std::sync::Arc;

use crate::engine::{
    Attributes, Caller, EVENTS_NODE, Engine, Live, MODE_OFFSET, NODES_EACH, Place, Ports, Refused,
};
use crate::model::claims::Claims;
use crate::model::pool::{ListId, PoolId};
use crate::model::refusal::Refusal;
use crate::model::rights::User;
use table::{Context, Entry, Location, Volatile};

/// Returns whether the size of a node depends on the caller, so that stat(2) has to look at the caller's ancestors.
pub(crate) fn depends_on_caller(node: u64) -> bool {
    OF_THE_CALLER.contains(&node)
}

/// The size of a file whose true one is not computed, as in sysfs. It must not be 0: where a program reads through the page
/// cache (sendfile(2)), the kernel takes a file of that size for empty and does not ask for its content.
const NOMINAL_SIZE: u64 = 4096;

/// The node id of the mount's root.
pub(crate) const ROOT: u64 = 1;
const POOLS: u64 = 3;
/// The files of `self/`.
const OF_THE_CALLER: RangeInclusive<u64> = 6..=8;
/// The first node id that a pool or list can have.
pub(crate) const FIRST_DYNAMIC: u64 = 64;

/// No node has this id.
pub(crate) const NO_NODE: u64 = 0;

/// The content of a file.
pub(crate) type Content = Arc<[u8]>;

/// One write(2), and how its file was opened.
#[derive(Debug)]
pub(crate) struct WriteRequest<'a> {
    /// All bytes: one write(2) is one command.
    pub(crate) data: &'a [u8],
    /// The user who opened the file.
    pub(crate) opener: User,
    /// Whether it was opened for reading too.
    pub(crate) read_write: bool,
    /// The open file.
    pub(crate) handle: u64,
}

/// A file or directory that exists.
#[derive(Clone, Copy)]
pub(crate) struct Node<P: Ports = Live> {
    /// The node of its pool or list, or its own if it has none.
    base: u64,
    entry: &'static Entry<P>,
}

/// The values that stat(2) shows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stat {
    pub(crate) node: u64,
    pub(crate) is_dir: bool,
    pub(crate) owner: Attributes,
    /// In bytes; 0 for a directory.
    pub(crate) size: u64,
    pub(crate) links: u32,
    /// Whether the kernel may cache all this until it changes it itself.
    pub(crate) cacheable: bool,
}

/// The kinds of directories, by what can be made in them.
enum Directory {
    Pools,
    Pool(PoolId),
    Other,
}

impl<P: Ports> Node<P> {
    /// Returns the node with this id, if it exists.
    pub(crate) fn of(engine: &Engine<P>, id: u64) -> Option<Self> {
        if id < FIRST_DYNAMIC {
            let is = |entry: &&Entry<P>| matches!(entry.location, Location::Fixed { node, .. } if node == id);
            return Entry::TABLE.iter().find(is).map(|entry| Self { base: id, entry });
        }
        let far = id & MODE_OFFSET;
        let (base, offset) = (id - far - id % NODES_EACH, far + id % NODES_EACH);
        let location = location(&engine.configuration(), base, offset)?;
        Entry::TABLE.iter().find(|entry| entry.location == location).map(|entry| Self { base, entry })
    }

    /// Returns its id.
    pub(crate) fn id(self) -> u64 {
        match self.entry.location {
            Location::Fixed { node, .. } => node,
            Location::Pool { offset } | Location::List { offset } => self.base + offset,
        }
    }

    pub(crate) fn is_dir(self) -> bool {
        self.entry.show.is_none()
    }

    /// Returns whether its content changes without a request of the kernel.
    pub(crate) fn is_volatile(self) -> bool {
        self.entry.volatile != Volatile::No
    }

    /// Returns whether poll(2) reports its changes.
    pub(crate) fn notifies(self) -> bool {
        let is_of_list = matches!(self.entry.location, Location::List { .. });
        self.is_volatile() && (self.is_writable() || is_of_list || self.grows())
    }

    /// Returns whether it can be written.
    pub(crate) fn is_writable(self) -> bool {
        self.entry.store.is_some()
    }

    /// Returns whether its content grows at the end, so that a program can follow it (`tail -f`).
    pub(crate) fn grows(self) -> bool {
        self.id() == EVENTS_NODE
    }

    /// Returns owner and mode.
    pub(crate) fn attributes(self, engine: &Engine<P>) -> Attributes {
        let default = Attributes { uid: 0, gid: 0, mode: (self.entry.mode & 0o7777) as u16 };
        // Who may claim any list of a pool may wait for one.
        let pool = PoolId(self.base);
        let like = if self.id() == pool.queue_node() { pool.tasks_node() } else { self.id() };
        engine.attributes(self.id()).or_else(|| engine.attributes(like)).unwrap_or(default)
    }

    /// Returns what stat(2) shows to the caller.
    pub(crate) fn stat(self, engine: &Engine<P>, caller: Caller) -> Stat {
        Stat { size: self.size(engine, caller), ..self.found(engine, caller) }
    }

    /// The same for a caller that only looks up the name: without the size if it changes by itself, because the kernel asks
    /// again before it shows that to anybody.
    pub(crate) fn found(self, engine: &Engine<P>, caller: Caller) -> Stat {
        Stat {
            node: self.id(),
            is_dir: self.is_dir(),
            owner: self.attributes(engine),
            size: if self.is_volatile() { NOMINAL_SIZE } else { self.size(engine, caller) },
            links: if self.is_dir() {
                2 + self.children(engine).iter().filter(|(_, node)| node.is_dir()).count() as u32
            } else {
                1
            },
            cacheable: !self.is_volatile(),
        }
    }

    /// Returns the size that stat(2) shows, which is cheap: nobody has asked for the content.
    fn size(self, engine: &Engine<P>, caller: Caller) -> u64 {
        let Attributes { uid, mode, .. } = self.attributes(engine);
        if self.grows() {
            // Programs that follow a file take a smaller one for a new one, so this size only grows.
            return engine.events_size();
        }
        // The text of a file that only its owner reads may be long.
        let is_private = mode & 0o044 == 0 && uid != caller.uid;
        if is_private || self.entry.volatile == Volatile::Costly {
            return NOMINAL_SIZE;
        }
        self.show(engine, caller, 0).map_or(0, |content| content.len() as u64)
    }

    /// Returns the user to whom an open file belongs, with capabilities only if it is opened for writing.
    ///
    /// # Errors
    /// `EPERM` if the caller lacks the capability to read events, which name the processes of all users.
    pub(crate) fn opener(self, engine: &Engine<P>, caller: Caller, writable: bool) -> Result<User, Refusal> {
        if self.id() == EVENTS_NODE {
            engine.require_admin(caller)?;
        }
        let user = User::without_capabilities(caller.uid);
        Ok(if writable && self.is_writable() { engine.user(caller) } else { user })
    }

    /// Returns its content for a reader of the open file `handle`, or of none (0); `None` for a directory.
    pub(crate) fn show(self, engine: &Engine<P>, caller: Caller, handle: u64) -> Option<Content> {
        self.entry.show.map(|show| show(engine, Context { caller, base: self.base, handle }))
    }

    /// Returns the pool to which it belongs, and the list.
    pub(crate) fn place(self, engine: &Engine<P>) -> Option<Place> {
        let claims = engine.configuration();
        match self.entry.location {
            Location::Fixed { .. } => None,
            Location::Pool { .. } => {
                let pool = claims.pool(PoolId(self.base))?.name().to_string();
                Some(Place { pool, cpus: None })
            }
            Location::List { .. } => {
                let name = claims.list(ListId(self.base))?.name();
                Some(Place { pool: name.pool.to_string(), cpus: Some(name.cpus.clone()) })
            }
        }
    }

    /// Carries out one write(2).
    ///
    /// # Errors
    /// The file cannot be written, or the command is refused.
    pub(crate) fn store(
        self,
        engine: &Engine<P>,
        caller: Caller,
        request: &WriteRequest<'_>,
    ) -> Result<(), Refused> {
        let store = self.entry.store.ok_or(Refusal::NotWritable)?;
        store(engine, Context { caller, base: self.base, handle: request.handle }, request)
    }

    /// Returns the child with this name.
    pub(crate) fn child(self, engine: &Engine<P>, name: &str) -> Option<Self> {
        if let Some(found) = self.fixed_children().find(|node| node.entry.name == name) {
            return Some(found);
        }
        let found = {
            let claims = engine.configuration();
            match self.directory() {
                Directory::Pools => {
                    claims.pools().find(|(_, pool)| pool.name().as_str() == name).map(|(id, _)| id.0)
                }
                Directory::Pool(id) => claims.pool(id).and_then(|pool| {
                    let has_name =
                        |id: &ListId| claims.list(*id).is_some_and(|list| list.name().cpus == name);
                    pool.lists().find(has_name).map(|id| id.0)
                }),
                Directory::Other => None,
            }
        };
        Self::of(engine, found?)
    }

    /// Returns all children with their names: the fixed ones, then pools by name or lists by their first CPU.
    pub(crate) fn children(self, engine: &Engine<P>) -> Vec<(String, Self)> {
        let mut all: Vec<(String, Self)> =
            self.fixed_children().map(|node| (node.entry.name.to_owned(), node)).collect();
        let dynamic = {
            let claims = engine.configuration();
            match self.directory() {
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
            }
        };
        all.extend(dynamic.into_iter().filter_map(|(name, id)| Some((name, Self::of(engine, id)?))));
        all
    }

    /// Returns the node of its directory.
    pub(crate) fn parent(self, engine: &Engine<P>) -> u64 {
        match self.entry.location {
            Location::Fixed { parent, .. } => parent,
            Location::Pool { offset: 0 } => POOLS,
            Location::Pool { .. } => self.base,
            Location::List { offset: 0 } => {
                engine.configuration().list(ListId(self.base)).map_or(POOLS, |list| list.pool().0)
            }
            Location::List { .. } => self.base,
        }
    }

    /// Carries out mkdir(2) in this directory.
    ///
    /// # Errors
    /// Nothing can be made here, or it is refused.
    pub(crate) fn make_child(self, engine: &Engine<P>, caller: Caller, name: &str) -> Result<Self, Refusal> {
        let made = match self.directory() {
            Directory::Pools => engine.add_pool(caller, name)?.0,
            Directory::Pool(pool) => engine.add_list(caller, pool, name)?.0,
            Directory::Other => return Err(Refusal::FixedDirectory),
        };
        Self::of(engine, made).ok_or(Refusal::Removed)
    }

    /// Carries out rmdir(2) of this node.
    ///
    /// # Errors
    /// It cannot be removed, or that is refused.
    pub(crate) fn remove(self, engine: &Engine<P>, caller: Caller) -> Result<(), Refusal> {
        match self.entry.location {
            Location::Pool { offset: 0 } => engine.remove_pool(caller, PoolId(self.base)),
            Location::List { offset: 0 } => engine.remove_list(caller, ListId(self.base)),
            _ => Err(Refusal::FixedDirectory),
        }
    }

    /// Carries out rename(2) of this node to a name in a directory.
    ///
    /// # Errors
    /// It cannot be there, another node has the name, or it is refused.
    pub(crate) fn rename(
        self,
        engine: &Engine<P>,
        caller: Caller,
        to: Self,
        name: &str,
    ) -> Result<(), Refusal> {
        let is_free = || to.child(engine, name).map_or(Ok(()), |_| Err(Refusal::Exists));
        match (self.entry.location, to.directory()) {
            (Location::Pool { offset: 0 }, Directory::Pools) => {
                is_free().and_then(|()| engine.rename_pool(caller, PoolId(self.base), name))
            }
            (Location::List { offset: 0 }, Directory::Pool(pool)) => {
                is_free().and_then(|()| engine.change_list(caller, ListId(self.base), pool, name))
            }
            _ => Err(Refusal::FixedDirectory),
        }
    }

    fn fixed_children(self) -> impl Iterator<Item = Self> {
        Entry::TABLE.iter().filter_map(move |entry: &'static Entry<P>| {
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

/// Returns whether the node belongs to a pool or to a list.
fn location(claims: &Claims, base: u64, offset: u64) -> Option<Location> {
    if claims.pool(PoolId(base)).is_some() {
        Some(Location::Pool { offset })
    } else if claims.list(ListId(base)).is_some() {
        Some(Location::List { offset })
    } else {
        None
    }
}
