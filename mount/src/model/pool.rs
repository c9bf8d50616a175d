//! Pools and CPU lists: their names and numbers.
//!
//! Owns the rules for names. Does not know which task holds which list.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// The name of a pool: `[a-z0-9]([-a-z0-9]*[a-z0-9])?`, at most 63 bytes (an RFC 1123 label, so that it can
/// be a part of a Kubernetes resource name). Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PoolName(Arc<str>);

/// Why a text is not a pool name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a pool name is 1 to 63 of a-z, 0-9 and -, and neither begins nor ends with -")]
pub struct InvalidPoolName;

impl PoolName {
    /// Returns the text of the name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for PoolName {
    type Err = InvalidPoolName;

    fn from_str(text: &str) -> Result<Self, InvalidPoolName> {
        let edge = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let bytes = text.as_bytes();
        let inner = bytes.iter().all(|&b| b == b'-' || edge(Some(&b)));
        if bytes.len() <= 63 && inner && edge(bytes.first()) && edge(bytes.last()) {
            Ok(Self(text.into()))
        } else {
            Err(InvalidPoolName)
        }
    }
}

impl fmt::Display for PoolName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How many live tasks each CPU list of a pool may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exclusivity {
    /// At most one.
    Exclusive,
    /// Any number.
    Shared,
}

/// The means that keeps others off the CPUs of a list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// The masks of the tasks that have claims: other programs may run there.
    #[default]
    Affinity,
    /// A partition of the kernel's: nothing else runs there while a task has the list.
    Isolated,
}

/// Identifies a pool: the node id of its directory, which is never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PoolId(pub u64);

/// Identifies a CPU list: the node id of its directory, which is never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ListId(pub u64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pool_names() {
        for good in ["a", "0", "dataplane", "a-b", "a--b", &"x".repeat(63)] {
            assert_eq!(good.parse::<PoolName>().unwrap().as_str(), good);
        }
        for bad in ["", "-", "-a", "a-", "A", "a_b", "a.b", "..", "a b", "ä", "a\n", &"x".repeat(64)] {
            assert_eq!(bad.parse::<PoolName>(), Err(InvalidPoolName), "{bad:?}");
        }
    }
}
