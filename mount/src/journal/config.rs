//! The configuration file: pools, lists, owners and modes.
//!
//! Owns: its records. Replaced as a whole and durably. Each list's record names its pool with all that is to
//! be known of it, so that a damaged record loses nothing but itself.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::codec::{self, VERSION};
use super::disk::{self, Disk, Durability};
use crate::model::cpuset::CpuSet;
use crate::model::pool::{Exclusivity, ListId, PoolName};

/// The first node id that is given to a pool or list.
const FIRST_NODE: u64 = 64;
/// How far the numbering jumps where the count of given node ids is lost: further than anybody got.
const JUMP: u64 = 1 << 32;

/// A pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PoolConfig {
    pub(crate) name: PoolName,
    pub(crate) exclusivity: Exclusivity,
    /// The id of its directory.
    pub(crate) node: u64,
    #[serde(skip)]
    pub(crate) lists: Vec<ListConfig>,
}

/// A CPU list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ListConfig {
    pub(crate) id: ListId,
    /// The name of its directory.
    pub(crate) name: String,
    pub(crate) cpus: CpuSet,
}

/// Owner and mode of a node, where somebody changed them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NodeAttributes {
    pub(crate) node: u64,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// The permission bits.
    pub(crate) mode: u16,
}

/// What the state directory keeps over reboots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    pub(crate) pools: Vec<PoolConfig>,
    pub(crate) attributes: Vec<NodeAttributes>,
    /// The next node id. Never goes back.
    pub(crate) next_node: u64,
    /// The request that made it what it is, in case that comes again.
    pub(crate) last: Option<LastRequest>,
}

/// A request of the kernel's, and the mount in which its number means something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LastRequest {
    pub(crate) mount: u64,
    pub(crate) request: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { pools: Vec::new(), attributes: Vec::new(), next_node: FIRST_NODE, last: None }
    }
}

impl Config {
    /// Nothing, where there was something: the node ids that are given now must mean nothing to anybody.
    pub(super) fn after_loss() -> Self {
        Self { next_node: FIRST_NODE + JUMP, ..Self::default() }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Header { kcm: String, version: u32 },
    Next { node: u64 },
    Last(LastRequest),
    Pool(PoolConfig),
    List { pool: PoolConfig, list: ListConfig },
    Attributes(NodeAttributes),
    End { lines: usize },
}

/// What a configuration file says.
#[derive(Debug)]
pub(super) enum Read {
    /// A newer kcm has written it.
    Newer(u32),
    Config {
        config: Config,
        /// What is missing, in words.
        damage: Option<String>,
    },
}

/// The version of a file that a newer kcm has written.
pub(super) fn newer(bytes: &[u8]) -> Option<u32> {
    match read(bytes) {
        Read::Newer(version) => Some(version),
        Read::Config { .. } => None,
    }
}

/// Reads a file's bytes.
pub(super) fn read(bytes: &[u8]) -> Read {
    let mut lines = Vec::new();
    let decoded = codec::decode("", bytes, |line: Line| lines.push(line));
    let (mut config, mut next, mut expected, mut header) = (Config::default(), None, None, false);
    let count = lines.len();
    for line in lines {
        match line {
            Line::Header { version, .. } if version > VERSION => return Read::Newer(version),
            Line::Header { kcm, .. } => header = kcm == "config",
            Line::Next { node } => next = next.max(Some(node)),
            Line::Last(last) => config.last = Some(last),
            Line::Pool(pool) => {
                pool_of(&mut config, pool);
            }
            Line::List { pool, list } => pool_of(&mut config, pool).lists.push(list),
            Line::Attributes(attributes) => config.attributes.push(attributes),
            Line::End { lines } => expected = Some(lines),
        }
    }
    let nodes =
        config.pools.iter().flat_map(|pool| pool.lists.iter().map(|list| list.id.0).chain([pool.node]));
    let after_all = nodes.max().map_or(Config::after_loss().next_node, |node| node + JUMP);
    let whole = header && decoded.bad == 0 && decoded.whole == bytes.len() && expected == Some(count);
    config.next_node = next.unwrap_or(after_all);
    let lost = decoded.bad.max(expected.map_or(1, |expected| expected.saturating_sub(count)));
    let damage = (!whole).then(|| format!("{lost} of its records cannot be read"));
    Read::Config { config, damage }
}

fn pool_of(config: &mut Config, pool: PoolConfig) -> &mut PoolConfig {
    let known = config.pools.iter().position(|known| known.node == pool.node);
    let at = known.unwrap_or_else(|| {
        config.pools.push(pool);
        config.pools.len() - 1
    });
    #[allow(clippy::indexing_slicing, reason = "it was just found or put there")]
    &mut config.pools[at]
}

/// Replaces the file by one that says this. Durable when it returns.
///
/// # Errors
/// The old file is still there, and nothing else.
pub(super) fn store(disk: &dyn Disk, directory: &Path, config: &Config) -> io::Result<()> {
    let mut lines =
        vec![Line::Header { kcm: "config".into(), version: VERSION }, Line::Next { node: config.next_node }];
    for pool in &config.pools {
        let bare = PoolConfig { lists: Vec::new(), ..pool.clone() };
        lines.push(Line::Pool(bare.clone()));
        lines.extend(pool.lists.iter().map(|list| Line::List { pool: bare.clone(), list: list.clone() }));
    }
    lines.extend(config.attributes.iter().cloned().map(Line::Attributes));
    lines.extend(config.last.map(Line::Last));
    // Twice: without it, numbers would have to jump.
    lines.push(Line::Next { node: config.next_node });
    lines.push(Line::End { lines: lines.len() + 1 });
    let mut bytes = Vec::new();
    for line in &lines {
        bytes.extend(codec::encode("", line)?);
    }
    disk::replace(disk, directory, "config", &bytes, Durability::Power).map(|_| ())
}
