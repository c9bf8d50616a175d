//! The rows, by group.

use std::path::Path;

use crate::client::{Job, OWN, Op};
use crate::table::Row;

mod claims;
mod clients;
mod commands;
mod containers;
mod deaths;
mod idle;
mod isolated;
mod reads;
mod scale;
mod shell;
mod threads;

/// Microseconds in a millisecond.
const MILLI: f64 = 1e3;

/// A name and the function that measures the rows of the group.
pub type Group = (&'static str, fn() -> Vec<Row>);

/// The names of rows begin with the name of their group.
pub const GROUPS: [Group; 11] = [
    ("claim", claims::rows),
    ("clients", clients::rows),
    ("read", reads::rows),
    ("scale", scale::rows),
    ("threads", threads::rows),
    ("shell", shell::rows),
    ("command", commands::rows),
    ("container", containers::rows),
    ("death", deaths::rows),
    ("rest", idle::rows),
    ("isolated", isolated::rows),
];

/// A job that writes `text` into a `tasks` file and undoes it before the next repetition, unmeasured.
fn put(file: &Path, text: &str, before: &str) -> Job {
    let op = |text: &str| Op::Put { file: file.into(), text: text.into() };
    Job { before: vec![op(before)], timed: vec![op(text)], after: vec![op(before)] }
}

/// A job that makes a first claim for the client, which is on CPU 0. Releasing a claim restores the mask from before,
/// so the client moves there each time.
fn first(file: &Path) -> Job {
    let mut job = put(file, OWN, "-0");
    job.before.push(Op::Pin { cpu: 0 });
    job
}
