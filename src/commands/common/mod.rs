//! Code that several commands share.
//!
//! Owns what is not about one command: output, answers of other processes, intervals, following the pools, files of a user, the
//! node's name, its Events, and the connection to the cluster.
//! Does not know any command; a command does not import another one for such things.

pub(super) mod cluster;
pub(super) mod columns;
pub(super) mod deadline;
pub(super) mod follow;
pub(super) mod interval;
pub(super) mod looker;
pub(super) mod node;
pub(super) mod node_events;
pub(super) mod other_process;
pub(super) mod output;
pub(super) mod periodic;
pub(super) mod yaml;
