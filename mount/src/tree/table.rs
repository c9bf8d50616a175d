//! The table of all files.
//!
//! Owns one row per file: location, name, mode, and how it is read and written. Does not know how nodes are found.

use std::sync::Arc;

use super::{Content, Node, POOLS, ROOT, WriteRequest};
use crate::engine::{Attributes, CONFIG, Caller, EVENTS_NODE, Engine, MODE_OFFSET, Ports, Refused};
use crate::model::claims::Pool;
use crate::model::command::Target;
use crate::model::pool::{Exclusivity, ListId, Mode, PoolId};

const SELF: u64 = 4;
const INFO: u64 = 5;

/// The location of a file of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Location {
    /// A single file, with its node id and the node id of its directory.
    Fixed { node: u64, parent: u64 },
    /// A file of every pool, at this distance from the pool's node.
    Pool { offset: u64 },
    /// A file of every CPU list, at this distance from the list's node.
    List { offset: u64 },
}

pub(super) type Show<P> = fn(&Engine<P>, Context) -> Content;
pub(super) type Store<P> = fn(&Engine<P>, Context, &WriteRequest<'_>) -> Result<(), Refused>;

/// One row: a file or a directory.
pub(super) struct Entry<P: Ports> {
    pub(super) location: Location,
    pub(super) name: &'static str,
    /// File type and permission bits.
    pub(super) mode: u32,
    /// `None` for a directory.
    pub(super) show: Option<Show<P>>,
    /// `None` if writes are refused.
    pub(super) store: Option<Store<P>>,
    pub(super) volatile: Volatile,
}

/// Whether size and content change without a request of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Volatile {
    No,
    Yes,
    /// The content is also costly to compute, so stat(2) shows a nominal size, as in sysfs.
    Costly,
}

/// The caller that reads or writes a file, and the pool or list of the file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Context {
    pub(super) caller: Caller,
    pub(super) base: u64,
    /// The open file; 0 if it is not known.
    pub(super) handle: u64,
}

const DIR: u32 = 0o040_000;
const FILE: u32 = 0o100_000;

const fn at(node: u64, parent: u64) -> Location {
    Location::Fixed { node, parent }
}

impl<P: Ports> Entry<P> {
    const fn dir(location: Location, name: &'static str) -> Self {
        Self { location, name, mode: DIR | 0o755, show: None, store: None, volatile: Volatile::No }
    }

    const fn file(
        location: Location,
        name: &'static str,
        mode: u32,
        show: Show<P>,
        store: Option<Store<P>>,
        volatile: Volatile,
    ) -> Self {
        Self { location, name, mode: FILE | mode, show: Some(show), store, volatile }
    }

    #[rustfmt::skip]
    pub(super) const TABLE: &'static [Self] = &[
        Self::dir (at(ROOT, ROOT),           ""),
        Self::file(at(2, ROOT),              "lock",       0o600, show_nothing,    None,                 Volatile::No),
        Self::dir (at(POOLS, ROOT),          "pools"),
        Self::dir (Location::Pool { offset: 0 }, ""),
        Self::file(Location::Pool { offset: 1 }, "exclusive", 0o644, show_exclusive,  Some(store_exclusive), Volatile::No),
        Self::file(Location::Pool { offset: 2 }, "tasks",     0o644, show_pool_tasks, Some(store_pool_tasks), Volatile::Yes),
        Self::file(Location::Pool { offset: 3 }, "partial",   0o644, show_partial,    Some(store_partial),   Volatile::No),
        Self::file(Location::Pool { offset: MODE_OFFSET }, "mode", 0o644, show_mode,   Some(store_mode),      Volatile::No),
        Self::file(Location::Pool { offset: MODE_OFFSET + 1 }, "transient", 0o644, show_transient, Some(store_transient), Volatile::No),
        Self::file(Location::Pool { offset: MODE_OFFSET + 2 }, "queue", 0o644, show_queue, Some(store_queue), Volatile::Yes),
        Self::dir (Location::List { offset: 0 }, ""),
        Self::file(Location::List { offset: 1 }, "tasks",     0o644, show_list_tasks, Some(store_list_tasks), Volatile::Yes),
        Self::file(Location::List { offset: 2 }, "state",     0o644, show_state,      Some(store_state),    Volatile::Yes),
        Self::dir (at(SELF, ROOT),           "self"),
        Self::file(at(6, SELF),              "claim",      0o444, show_claim,      None,                 Volatile::Yes),
        Self::file(at(7, SELF),              "cpus",       0o444, show_cpus,       None,                 Volatile::Yes),
        Self::file(at(8, SELF),              "last_error", 0o444, show_last_error, None,                 Volatile::Yes),
        Self::dir (at(INFO, ROOT),           "info"),
        Self::file(at(9, INFO),              "version",    0o444, show_version,    None,                 Volatile::No),
        Self::file(at(10, INFO),             "topology",   0o444, show_topology,   None,                 Volatile::No),
        Self::file(at(EVENTS_NODE, INFO),         "events",     0o600, show_events,     None,                 Volatile::Yes),
        Self::file(at(12, INFO),             "reclaimed",  0o600, show_reclaimed,  Some(store_reclaimed), Volatile::Yes),
        Self::file(at(13, INFO),             "metrics",    0o444, show_metrics,    None,                 Volatile::Costly),
        Self::file(at(CONFIG, INFO),         "config",     0o600, show_config,     Some(store_config),   Volatile::Yes),
    ];
}

fn show_nothing<P: Ports>(_: &Engine<P>, _: Context) -> Content {
    Arc::default()
}

fn show_exclusive<P: Ports>(engine: &Engine<P>, context: Context) -> Content {
    show_flag(engine, context, |pool| pool.exclusivity() == Exclusivity::Exclusive)
}

fn show_partial<P: Ports>(engine: &Engine<P>, context: Context) -> Content {
    show_flag(engine, context, Pool::is_partial)
}

fn show_transient<P: Ports>(engine: &Engine<P>, context: Context) -> Content {
    show_flag(engine, context, Pool::is_transient)
}

fn show_mode<P: Ports>(engine: &Engine<P>, context: Context) -> Content {
    let mode = engine.configuration().pool(PoolId(context.base)).map(Pool::mode);
    line(mode.map(|mode| {
        match mode {
            Mode::Affinity => "affinity",
            Mode::Isolated => "isolated",
        }
        .to_owned()
    }))
}

fn show_flag<P: Ports>(engine: &Engine<P>, context: Context, is_set: fn(&Pool) -> bool) -> Content {
    let flag = engine.configuration().pool(PoolId(context.base)).map(is_set);
    line(flag.map(|is_set| if is_set { "1" } else { "0" }.to_owned()))
}

fn show_queue<P: Ports>(engine: &Engine<P>, context: Context) -> Content {
    engine.show_queue(PoolId(context.base), context.handle).into_bytes().into()
}

fn show_state<P: Ports>(engine: &Engine<P>, context: Context) -> Content {
    engine.show_state(ListId(context.base)).into_bytes().into()
}

fn show_pool_tasks<P: Ports>(engine: &Engine<P>, context: Context) -> Content {
    engine.show_pool_tasks(PoolId(context.base))
}

fn show_list_tasks<P: Ports>(engine: &Engine<P>, context: Context) -> Content {
    engine.show_list_tasks(ListId(context.base))
}

fn show_claim<P: Ports>(engine: &Engine<P>, context: Context) -> Content {
    line(engine.claim_of_reader(context.caller).map(|list| list.to_string()))
}

fn show_cpus<P: Ports>(engine: &Engine<P>, context: Context) -> Content {
    line(engine.claim_of_reader(context.caller).map(|list| list.cpus))
}

fn show_last_error<P: Ports>(engine: &Engine<P>, context: Context) -> Content {
    let text =
        engine.last_error_of_reader(context.caller, |list| may_read_tasks(engine, context.caller, list));
    text.into_bytes().into()
}

fn show_version<P: Ports>(engine: &Engine<P>, _: Context) -> Content {
    line(Some(engine.version.to_owned()))
}

fn show_topology<P: Ports>(engine: &Engine<P>, _: Context) -> Content {
    line(Some(engine.topology().to_json()))
}

fn show_events<P: Ports>(engine: &Engine<P>, _: Context) -> Content {
    engine.show_events(None).0.into_bytes().into()
}

fn show_reclaimed<P: Ports>(engine: &Engine<P>, _: Context) -> Content {
    engine.show_reclaimed().into_bytes().into()
}

fn show_metrics<P: Ports>(engine: &Engine<P>, _: Context) -> Content {
    engine.show_metrics().into_bytes().into()
}

fn show_config<P: Ports>(engine: &Engine<P>, _: Context) -> Content {
    engine.show_config().into_bytes().into()
}

fn store_exclusive<P: Ports>(
    engine: &Engine<P>,
    context: Context,
    request: &WriteRequest<'_>,
) -> Result<(), Refused> {
    Ok(engine.set_exclusive(context.caller, request.opener, PoolId(context.base), request.data)?)
}

fn store_partial<P: Ports>(
    engine: &Engine<P>,
    context: Context,
    request: &WriteRequest<'_>,
) -> Result<(), Refused> {
    Ok(engine.set_partial(context.caller, request.opener, PoolId(context.base), request.data)?)
}

fn store_transient<P: Ports>(
    engine: &Engine<P>,
    context: Context,
    request: &WriteRequest<'_>,
) -> Result<(), Refused> {
    Ok(engine.set_transient(context.caller, request.opener, PoolId(context.base), request.data)?)
}

fn store_queue<P: Ports>(
    engine: &Engine<P>,
    context: Context,
    request: &WriteRequest<'_>,
) -> Result<(), Refused> {
    let pool = PoolId(context.base);
    engine.enter_queue(context.caller, request.opener, pool, request.data, context.handle)
}

fn store_mode<P: Ports>(
    engine: &Engine<P>,
    context: Context,
    request: &WriteRequest<'_>,
) -> Result<(), Refused> {
    Ok(engine.set_mode(context.caller, request.opener, PoolId(context.base), request.data)?)
}

fn store_state<P: Ports>(
    engine: &Engine<P>,
    context: Context,
    request: &WriteRequest<'_>,
) -> Result<(), Refused> {
    Ok(engine.set_state(context.caller, request.opener, ListId(context.base), request.data)?)
}

fn store_config<P: Ports>(
    engine: &Engine<P>,
    context: Context,
    request: &WriteRequest<'_>,
) -> Result<(), Refused> {
    Ok(engine.set_config(context.caller, request.opener, request.data)?)
}

fn store_pool_tasks<P: Ports>(
    engine: &Engine<P>,
    context: Context,
    request: &WriteRequest<'_>,
) -> Result<(), Refused> {
    store_tasks(engine, Target::Pool(PoolId(context.base)), context, request)
}

fn store_list_tasks<P: Ports>(
    engine: &Engine<P>,
    context: Context,
    request: &WriteRequest<'_>,
) -> Result<(), Refused> {
    store_tasks(engine, Target::List(ListId(context.base)), context, request)
}

fn store_tasks<P: Ports>(
    engine: &Engine<P>,
    target: Target,
    context: Context,
    request: &WriteRequest<'_>,
) -> Result<(), Refused> {
    engine.write_tasks(target, context.caller, request.opener, request.data, request.read_write)
}

fn store_reclaimed<P: Ports>(
    engine: &Engine<P>,
    context: Context,
    request: &WriteRequest<'_>,
) -> Result<(), Refused> {
    Ok(engine.acknowledge(context.caller, request.opener, request.data)?)
}

fn line(text: Option<String>) -> Content {
    text.map(|text| (text + "\n").into_bytes()).unwrap_or_default().into()
}

/// Returns whether the mode lets this user read the `tasks` file of the list: the first class that fits decides.
pub(super) fn may_read_tasks<P: Ports>(engine: &Engine<P>, caller: Caller, list: ListId) -> bool {
    let Some(node) = Node::of(engine, list.tasks_node()) else { return false };
    let Attributes { uid, gid, mode } = node.attributes(engine);
    let class = if caller.uid == uid {
        6
    } else if engine.is_in_group(caller, gid) {
        3
    } else {
        0
    };
    mode >> class & 4 != 0 || engine.is_admin(caller)
}
