//! The rows, by group.

use std::path::Path;

use crate::client::{Job, OWN, Op};
use crate::table::Row;

mod claims;
mod clients;
mod commands;
mod deaths;
mod idle;
mod reads;
mod scale;
mod shell;
mod threads;

/// A name, and what measures the rows of the group.
pub type Group = (&'static str, fn() -> Vec<Row>);

/// Rows of a group begin with its name.
pub const GROUPS: [Group; 9] = [
    ("claim", claims::rows),
    ("clients", clients::rows),
    ("read", reads::rows),
    ("scale", scale::rows),
    ("threads", threads::rows),
    ("shell", shell::rows),
    ("command", commands::rows),
    ("death", deaths::rows),
    ("rest", idle::rows),
];

/// Writes this into a `tasks` file; whatever it does is taken back, unmeasured, before the next time.
fn put(file: &Path, text: &str, before: &str) -> Job {
    let op = |text: &str| Op::Put { file: file.into(), text: text.into() };
    Job { before: vec![op(before)], timed: vec![op(text)], after: vec![op(before)] }
}

/// A first claim for the client itself, which is on CPU 0. Whoever has released a claim gets its old mask back: so
/// it goes there each time.
fn first(file: &Path) -> Job {
    let mut job = put(file, OWN, "-0");
    job.before.push(Op::Pin { cpu: 0 });
    job
}
