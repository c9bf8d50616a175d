//! The daemon: mounting, state on disk, faults, restarts and upgrades.

pub mod connection;
pub mod damage;
pub mod diagnostics;
pub mod faults;
pub mod frozen_disk;
pub mod full_disk;
pub mod identity;
pub mod import;
pub mod inherited;
pub mod limits;
pub mod mounting;
pub mod process;
pub mod read_only;
pub mod replay;
pub mod requirements;
pub mod state;
pub mod supervisor;
pub mod trust;
pub mod upgrade;
