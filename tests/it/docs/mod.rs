//! The documents and the test list agree.

pub mod architecture;
pub mod compatibility;
pub mod manual;
pub mod monitoring;
pub mod pages;
pub mod programming;
pub mod reference;
pub mod schemas;
pub mod scripts;
pub mod semantics;
