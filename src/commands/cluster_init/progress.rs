//! Shows how far each node has come.
//!
//! Owns the lines on stderr. On a terminal there is one line per finished node, and below them one line about the
//! others that is drawn again in its place; elsewhere there is a line for each step. Does not know what the steps are.

use std::collections::BTreeMap;
use std::io::{IsTerminal as _, Write as _};

/// Moves to the start of the line, clears it, and switches line wrapping off.
const CLEAR_LINE: &str = "\r\x1b[K\x1b[?7l";
/// Switches line wrapping on again.
const WRAP: &str = "\x1b[?7h";

/// The progress of all nodes.
pub(super) struct Progress {
    on_terminal: bool,
    /// The steps of the nodes in progress.
    nodes: BTreeMap<String, String>,
    /// The node whose step changed last.
    latest: String,
    finished: usize,
    all: usize,
}

impl Progress {
    pub(super) fn new(all: usize) -> Self {
        let on_terminal = std::io::stderr().is_terminal();
        Self { on_terminal, nodes: BTreeMap::new(), latest: String::new(), finished: 0, all }
    }

    /// Shows the step of a node.
    pub(super) fn step(&mut self, node: &str, step: &str) {
        if self.nodes.get(node).is_some_and(|shown| shown == step) {
            return;
        }
        self.nodes.insert(node.to_owned(), step.to_owned());
        node.clone_into(&mut self.latest);
        if self.on_terminal {
            self.draw("");
        } else {
            log::info!("{node}: {step}");
        }
    }

    /// Shows that a node is ready, or has failed.
    pub(super) fn finish(&mut self, node: &str, outcome: &str, is_ready: bool) {
        self.nodes.remove(node);
        self.finished += 1;
        if self.on_terminal {
            let mark = if is_ready { "\x1b[32m✓\x1b[0m" } else { "\x1b[31m✗\x1b[0m" };
            self.draw(&format!("{mark} {node}: {outcome}\n"));
        } else {
            log::info!("{node}: {outcome} ({}/{})", self.finished, self.all);
        }
    }

    /// Removes the line about the nodes in progress.
    pub(super) fn end(&mut self) {
        self.nodes.clear();
        if self.on_terminal {
            self.draw("");
        }
    }

    fn draw(&self, above: &str) {
        let text = format!("{CLEAR_LINE}{above}{}{WRAP}", self.line());
        let _ = std::io::stderr().write_all(text.as_bytes());
    }

    /// Returns the line about the nodes in progress, with the step of the latest one as an example.
    fn line(&self) -> String {
        let latest = self.nodes.get_key_value(&self.latest).or_else(|| self.nodes.first_key_value());
        latest.map_or_else(String::new, |(node, step)| {
            let (finished, all, rest) = (self.finished, self.all, self.nodes.len());
            format!("{finished}/{all} finished, {rest} in progress: {node}: {step}")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_tells_about_all_nodes_in_progress() {
        let mut progress = Progress { on_terminal: false, ..Progress::new(50) };
        assert_eq!(progress.line(), "");
        for node in ["n1", "n2", "n3"] {
            progress.step(node, "waiting");
        }
        progress.step("n2", "mount: ContainerCreating");
        assert_eq!(progress.line(), "0/50 finished, 3 in progress: n2: mount: ContainerCreating");
        progress.finish("n2", "ready", true);
        assert_eq!(progress.line(), "1/50 finished, 2 in progress: n1: waiting");
        progress.end();
        assert_eq!(progress.line(), "");
    }
}
