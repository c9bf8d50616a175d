//! Claims: which task gets a CPU list, how masks follow, and how a claim ends.

pub mod death;
pub mod exclusive;
pub mod heirs;
pub mod last_error;
pub mod legacy_client;
pub mod legacy_clients;
pub mod limits;
pub mod masks;
pub mod model_mount;
pub mod naive;
pub mod namespaces;
pub mod queue;
pub mod refusals;
pub mod rewriter;
pub mod rewrites;
pub mod storm;
