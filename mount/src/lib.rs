//! The live configuration directory of kcm.

pub mod model;
