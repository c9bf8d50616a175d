//! Against real processes.
