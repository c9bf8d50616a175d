//! The formats of the state directory's files.
//!
//! Owns their versions. One line holds one record (see [`super::codec`]); what its JSON says is defined by a module per
//! version. A version that a released program wrote stays readable: its module and its golden files in `testdata`
//! never change. A new version gets a new module and a new directory of golden files.

pub(super) mod v1;

/// The newest version that this program knows, and the one that it writes.
pub(super) const VERSION: u32 = 1;
