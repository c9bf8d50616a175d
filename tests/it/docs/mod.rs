//! The documents and the test list agree.

pub mod pages;
pub mod semantics;
