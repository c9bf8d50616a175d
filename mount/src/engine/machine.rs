//! The machine: which CPUs it has now.
//!
//! Owns the last picture of the machine, which is what remains if it cannot be read. Does not know how it is read.

use std::sync::Arc;

use parking_lot::RwLock;

use crate::model::topology::Topology;

/// Reads the CPUs of the machine, quickly if none has come or gone.
pub type ReadTopology = fn() -> Result<Topology, Box<dyn std::error::Error + Send + Sync>>;

/// The CPUs of the machine.
#[derive(Debug)]
pub(super) struct CurrentTopology {
    read: Option<ReadTopology>,
    last: RwLock<Arc<Topology>>,
}

impl CurrentTopology {
    /// `first`: the machine as it was when the directory was mounted.
    pub(super) fn new(first: Topology, read: Option<ReadTopology>) -> Self {
        Self { read, last: RwLock::new(Arc::new(first)) }
    }

    /// Sets the picture of a machine that cannot be read.
    #[cfg(test)]
    pub(super) fn set(&self, topology: Topology) {
        *self.last.write() = Arc::new(topology);
    }

    /// Returns the machine as it is now.
    pub(super) fn get(&self) -> Arc<Topology> {
        match self.read.map(|read| read()) {
            Some(Ok(now)) if now != **self.last.read() => *self.last.write() = Arc::new(now),
            Some(Err(error)) => log::debug!("the CPUs of the machine cannot be read: {error}"),
            Some(Ok(_)) | None => {}
        }
        Arc::clone(&self.last.read())
    }
}
