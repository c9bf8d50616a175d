//! The configuration file: pools, lists, owners and modes.
//!
//! Owns its lines. The file is replaced as a whole, durably. The line of each list contains all that there is to know of
//! its pool, so that a damaged line loses only itself.

use std::io;
use std::path::Path;

use super::codec;
use super::disk::{self, Disk, Durability};
use super::format::VERSION;
use super::format::v1::ConfigLine as Line;
use super::pools::{LastRequest, NodeAttributes, PoolConfig};

/// The first node id that is given to a pool or list. Lower ones belong to files that always exist.
const FIRST_NODE: u64 = 64;
/// How far node ids jump if the next one is lost, so that none is given out twice: more than any daemon ever used.
const JUMP: u64 = 1 << 32;

/// The part of the state that survives reboots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    pub(crate) pools: Vec<PoolConfig>,
    pub(crate) attributes: Vec<NodeAttributes>,
    /// The next node id. Never decreases.
    pub(crate) next_node: u64,
    /// The request that changed the configuration last, in case the kernel sends it again.
    pub(crate) last: Option<LastRequest>,
    /// What that request has changed without the kernel: paths, relative to `pools`.
    pub(crate) stale: Vec<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            pools: Vec::new(),
            attributes: Vec::new(),
            next_node: FIRST_NODE,
            last: None,
            stale: Vec::new(),
        }
    }
}

impl Config {
    /// Returns an empty configuration in place of one that was lost. Its new node ids were never given out before.
    pub(super) fn after_loss() -> Self {
        Self { next_node: FIRST_NODE + JUMP, ..Self::default() }
    }
}

/// The content of a configuration file.
#[derive(Debug)]
pub(super) enum Read {
    /// A newer kcm wrote it; its version.
    Newer(u32),
    Config {
        config: Config,
        /// A description of what is missing.
        damage: Option<String>,
    },
}

/// Returns the version of a file if a newer kcm wrote it.
pub(super) fn newer(bytes: &[u8]) -> Option<u32> {
    match read(bytes) {
        Read::Newer(version) => Some(version),
        Read::Config { .. } => None,
    }
}

/// Reads a file's bytes.
pub(super) fn read(bytes: &[u8]) -> Read {
    let (mut config, mut next, mut expected) = (Config::default(), None, None);
    let (mut has_header, mut newer, mut count) = (false, None, 0);
    let decoded = codec::decode("", bytes, |line: Line| {
        count += 1;
        match line {
            Line::Header { version, .. } if version > VERSION => newer = newer.or(Some(version)),
            Line::Header { kcm, .. } => has_header = kcm == "config",
            Line::Next { node } => next = next.max(Some(node)),
            Line::Last(last) => (config.last, config.stale) = last.decoded(),
            Line::Pool(pool) => {
                let Ok(pool) = pool.try_into() else { return false };
                pool_of(&mut config, pool);
            }
            Line::List { pool, list } => {
                let (Ok(pool), Ok(list)) = (pool.try_into(), list.try_into()) else { return false };
                pool_of(&mut config, pool).lists.push(list);
            }
            Line::Attributes(attributes) => config.attributes.push(attributes.into()),
            Line::End { lines } => expected = Some(lines),
        }
        true
    });
    if let Some(newer) = newer {
        return Read::Newer(newer);
    }
    let nodes =
        config.pools.iter().flat_map(|pool| pool.lists.iter().map(|list| list.id.0).chain([pool.node]));
    let after_all = nodes.max().map_or(Config::after_loss().next_node, |node| node + JUMP);
    let whole = has_header && decoded.bad == 0 && decoded.whole == bytes.len() && expected == Some(count);
    config.next_node = next.unwrap_or(after_all);
    let lost = decoded.bad.max(expected.map_or(1, |expected| expected.saturating_sub(count)));
    let damage = (!whole).then(|| format!("{lost} of its records cannot be read"));
    Read::Config { config, damage }
}

/// Returns the pool of this node, which is added if it is not there yet.
fn pool_of(config: &mut Config, pool: PoolConfig) -> &mut PoolConfig {
    let known = config.pools.iter().position(|known| known.node == pool.node);
    let at = known.unwrap_or_else(|| {
        config.pools.push(pool);
        config.pools.len() - 1
    });
    #[allow(clippy::indexing_slicing, reason = "the index was just found or added")]
    &mut config.pools[at]
}

/// Replaces the file; durable when this returns.
///
/// # Errors
/// The old file is unchanged.
pub(super) fn store(disk: &dyn Disk, directory: &Path, config: &Config) -> io::Result<()> {
    let mut lines =
        vec![Line::Header { kcm: "config".into(), version: VERSION }, Line::Next { node: config.next_node }];
    for pool in &config.pools {
        lines.push(Line::Pool(pool.into()));
        lines.extend(pool.lists.iter().map(|list| Line::List { pool: pool.into(), list: list.into() }));
    }
    lines.extend(config.attributes.iter().map(|attributes| Line::Attributes(attributes.into())));
    lines.extend(config.last.map(|last| Line::Last((last, &*config.stale).into())));
    // For the second time: if both were lost, node ids would have to jump.
    lines.push(Line::Next { node: config.next_node });
    lines.push(Line::End { lines: lines.len() + 1 });
    let mut bytes = Vec::new();
    for line in &lines {
        bytes.extend(codec::encode("", line)?);
    }
    disk::replace(disk, directory, "config", || Ok(bytes), Durability::Power).map(|_| ())
}
