//! The daemon: mounting, state on disk, faults, restarts and upgrades.

pub mod damage;
pub mod diagnostics;
pub mod faults;
pub mod full_disk;
pub mod import;
pub mod keeper;
pub mod mounting;
pub mod process;
pub mod repeats;
pub mod state;
pub mod upgrade;
