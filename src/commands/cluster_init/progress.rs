//! How far each node has got, for whoever watches.
//!
//! On a terminal one line a node that is in work, below those that have come to an end; elsewhere a plain line
//! for every step. Must not know: what the steps are.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{IsTerminal as _, Write as _};

/// The lines.
pub(super) struct Progress {
    on_terminal: bool,
    in_work: BTreeMap<String, String>,
    /// How many lines are drawn now.
    drawn: usize,
    done: usize,
    all: usize,
}

impl Progress {
    pub(super) fn new(all: usize) -> Self {
        let on_terminal = std::io::stderr().is_terminal();
        Self { on_terminal, in_work: BTreeMap::new(), drawn: 0, done: 0, all }
    }

    /// A node has got somewhere.
    pub(super) fn say(&mut self, node: &str, what: &str) {
        if self.in_work.get(node).is_some_and(|said| said == what) {
            return;
        }
        self.in_work.insert(node.to_owned(), what.to_owned());
        if self.on_terminal {
            self.draw("");
        } else {
            log::info!("{node}: {what}");
        }
    }

    /// A node has come to an end.
    pub(super) fn finish(&mut self, node: &str, what: &str, is_well: bool) {
        self.in_work.remove(node);
        self.done += 1;
        if self.on_terminal {
            let mark = if is_well { "\x1b[32m✓\x1b[0m" } else { "\x1b[31m✗\x1b[0m" };
            self.draw(&format!("{mark} {node}: {what}\n"));
        } else {
            log::info!("{node}: {what} ({}/{})", self.done, self.all);
        }
    }

    /// Takes the lines of what is in work away.
    pub(super) fn end(&mut self) {
        self.in_work.clear();
        if self.on_terminal {
            self.draw("");
        }
    }

    fn draw(&mut self, above: &str) {
        let mut text = String::new();
        if self.drawn > 0 {
            // Up to the first of our lines, and everything from there away.
            let _ = write!(text, "\x1b[{}A\x1b[J", self.drawn);
        }
        text.push_str(above);
        for (node, what) in &self.in_work {
            // A line that wraps would be two.
            let line: String = format!("  {node}: {what}").chars().take(78).collect();
            let _ = writeln!(text, "{line}");
        }
        self.drawn = self.in_work.len();
        let _ = std::io::stderr().write_all(text.as_bytes());
    }
}
