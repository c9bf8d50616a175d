//! How a command prints its report: as it is, or in a periodic run one line per report that has news.
//!
//! Owns the form of the line, and when a report has news. Does not know what is in a report.
//!
//! A run without `--interval` prints the report as the legacy kcm did. A periodic one is a log: a line has its time, and a
//! report that says the same as the last one is not printed.

use anyhow::Error;
use kcm_mount::daemon;
use serde::Serialize;
use serde_json::Value;

use super::output::{ascii, json_text, print};
use crate::cli::Repeat;

/// How deep the names of parts that have changed go: `/checks/masks/errors`.
const DEPTH: usize = 3;

/// Prints the reports of a command.
pub(crate) struct Printer {
    is_periodic: bool,
    /// The last report that was printed, without what was news only.
    last: Option<Value>,
}

/// A line of a periodic run.
#[derive(Serialize)]
struct Line<'a> {
    time: String,
    /// The parts that have changed, as JSON pointers (RFC 6901). In the first line, the whole report: an empty pointer.
    changed: Vec<String>,
    report: &'a Value,
}

impl Printer {
    pub(crate) fn new(repeat: Repeat) -> Self {
        Self { is_periodic: repeat != Repeat::Once, last: None }
    }

    /// Prints a report; in a periodic run, as a line, if it differs from the last one or has news. `news`: the lists of the
    /// report whose entries are in one report only.
    ///
    /// # Errors
    /// Standard output cannot be written.
    pub(crate) fn print(&mut self, report: &Value, news: &[&str]) -> Result<(), Error> {
        if !self.is_periodic {
            return print(&json_text(report));
        }
        let mut lasting = report.clone();
        let mut changed = Vec::new();
        for name in news {
            let entries = lasting.as_object_mut().and_then(|fields| fields.remove(*name));
            if entries.is_some_and(|entries| entries.as_array().is_some_and(|entries| !entries.is_empty())) {
                changed.push(format!("/{name}"));
            }
        }
        match &self.last {
            None => changed = vec![String::new()],
            Some(last) => differences(last, &lasting, "", DEPTH, &mut changed),
        }
        if changed.is_empty() {
            return Ok(());
        }
        changed.sort();
        let line = Line { time: daemon::timestamp(), changed, report };
        print(&(ascii(&serde_json::to_string(&line)?) + "\n"))?;
        self.last = Some(lasting);
        Ok(())
    }
}

/// Adds the parts in which two values differ.
fn differences(before: &Value, now: &Value, at: &str, depth: usize, found: &mut Vec<String>) {
    let (Value::Object(before_fields), Value::Object(now_fields), 1..) = (before, now, depth) else {
        if before != now {
            found.push(at.to_owned());
        }
        return;
    };
    let gone = before_fields.keys().filter(|name| !now_fields.contains_key(*name));
    for name in now_fields.keys().chain(gone) {
        let at = format!("{at}/{}", name.replace('~', "~0").replace('/', "~1"));
        match (before_fields.get(name), now_fields.get(name)) {
            (Some(before), Some(now)) => differences(before, now, &at, depth - 1, found),
            _ => found.push(at),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn changed(before: &Value, now: &Value) -> Vec<String> {
        let mut found = Vec::new();
        differences(before, now, "", DEPTH, &mut found);
        found
    }

    #[test]
    fn a_change_is_named_by_its_place() {
        let report = |tasks: Value, ok: bool| {
            json!({
                "checks": { "masks": { "errors": [], "ok": ok }, "mount": { "ok": true } },
                "description": { "pools": { "a/b": { "cpuLists": { "0": { "tasks": tasks } } }, "c": {} } },
            })
        };
        let before = report(json!([]), true);
        assert_eq!(changed(&before, &before), [""; 0]);
        let now = report(json!([7]), false);
        assert_eq!(changed(&before, &now), ["/checks/masks/ok", "/description/pools/a~1b"]);
        let unreadable = json!({ "checks": { "mount": { "ok": true } }, "description": null });
        assert_eq!(changed(&before, &unreadable), ["/checks/masks", "/description"]);
        assert_eq!(changed(&unreadable, &before), ["/checks/masks", "/description"]);
    }
}
