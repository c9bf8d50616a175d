//! The version of the program.
//!
//! Owns nothing else: `build.rs` finds it out.

/// The version of the package, with the commit and its date if they are known: `0.2.0 (1a2b3c4 2026-11-26)`.
pub(crate) const VERSION: &str = env!("KCM_VERSION");
