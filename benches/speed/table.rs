//! The table of results, as people read it and as it is compared with the committed one.
//!
//! Owns its columns, and when a row is worse than before; `tests/it/benchmark.rs` tests it. Does not know how
//! anything is measured.

use std::fmt::Write as _;

use super::columns::padded;

/// The noise: a ratio may exceed the committed one by this factor, and by this amount on top for ratios near 0.
const NOISE: f64 = 1.4;
const NOISE_OF_TAILS: f64 = 2.5;
const NOISE_ON_TOP: f64 = 0.15;

/// The target of a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// The ratio is at most this.
    AtMost(f64),
    /// The ratio is at least this.
    AtLeast(f64),
    /// kcm's figure is at most this, in the row's unit.
    Within(f64),
    /// No target: the row is for comparison.
    Informational,
}

/// One row.
#[derive(Clone, Debug)]
pub struct Row {
    /// The name by which the row is chosen and compared. It begins with the name of its group.
    pub name: String,
    pub work: String,
    pub kcm: f64,
    /// The 99th percentile.
    pub kcm_p99: Option<f64>,
    /// The baseline's name and figure.
    pub beside: String,
    pub theirs: f64,
    pub theirs_p99: Option<f64>,
    pub unit: &'static str,
    pub ratio: f64,
    pub target: Target,
    /// How the work differs from its description.
    pub note: String,
}

impl Row {
    pub fn is_met(&self) -> bool {
        match self.target {
            Target::AtMost(most) => self.ratio <= most,
            Target::AtLeast(least) => self.ratio >= least,
            Target::Within(most) => self.kcm <= most,
            Target::Informational => true,
        }
    }

    fn target(&self) -> String {
        match self.target {
            Target::AtMost(most) => format!("≤ {most} ×"),
            Target::AtLeast(least) => format!("≥ {least} ×"),
            Target::Within(most) => format!("≤ {most} {}", self.unit),
            Target::Informational => String::new(),
        }
    }

    fn met(&self) -> &'static str {
        match (self.target, self.is_met()) {
            (Target::Informational, _) => "",
            (_, true) => "yes",
            (_, false) => "**no**",
        }
    }

    /// Whether the row is worse than the committed ratio, beyond noise. Absolute figures are not compared, because
    /// they are from another machine.
    pub fn is_worse_than(&self, committed: f64) -> bool {
        let noise = if self.name.ends_with("p99") { NOISE_OF_TAILS } else { NOISE };
        match self.target {
            Target::AtMost(_) => self.ratio > committed * noise + NOISE_ON_TOP,
            Target::AtLeast(_) => self.ratio < committed / noise - NOISE_ON_TOP,
            Target::Within(_) => !self.is_met(),
            Target::Informational => false,
        }
    }

    fn cells(&self) -> [String; 8] {
        let figure = |value, p99: Option<f64>| match p99 {
            _ if f64::is_nan(value) => String::new(),
            Some(p99) => format!("{} (p99 {}) {}", number(value), number(p99), self.unit),
            None => format!("{} {}", number(value), self.unit),
        };
        let ratio = if self.ratio.is_nan() { String::new() } else { format!("{:.2}", self.ratio) };
        [
            self.name.clone(),
            self.work.clone(),
            figure(self.kcm, self.kcm_p99),
            self.beside.clone(),
            figure(self.theirs, self.theirs_p99),
            ratio,
            self.target(),
            self.met().to_owned(),
        ]
    }
}

const HEAD: [&str; 8] = ["row", "work", "kcm", "beside it", "takes", "ratio", "target", "met"];

/// Formats a number with three significant figures.
fn number(value: f64) -> String {
    if value >= 100.0 || value == 0.0 {
        format!("{value:.0}")
    } else if value >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

/// Formats the table for a terminal.
pub fn text(rows: &[Row]) -> String {
    let mut lines = vec![HEAD.map(str::to_owned)];
    lines.extend(rows.iter().map(Row::cells));
    let mut out = String::new();
    for cells in padded(&lines) {
        let _ = writeln!(out, "{}", cells.join("  ").trim_end());
    }
    out
}

/// Formats the table in Markdown.
pub fn markdown(rows: &[Row]) -> String {
    let mut out = format!("| {} |\n|{}\n", HEAD.join(" | "), " --- |".repeat(HEAD.len()));
    for row in rows {
        let _ = writeln!(out, "| {} |", row.cells().join(" | "));
    }
    out
}

/// Formats the notes in Markdown.
pub fn notes(rows: &[Row]) -> String {
    let mut out = String::new();
    let mut last = "";
    for row in rows.iter().filter(|row| !row.note.is_empty()) {
        if row.note != last {
            let _ = writeln!(out, "- **{}**: {}", row.name, row.note);
        }
        last = &row.note;
    }
    out
}

/// Parses the names and ratios of a table in Markdown. Skips rows without a ratio.
pub fn committed(markdown: &str) -> Vec<(String, f64)> {
    let cells = |line: &str| -> Option<(String, f64)> {
        let cells: Vec<&str> = line.strip_prefix('|')?.split('|').map(str::trim).collect();
        Some(((*cells.first()?).to_owned(), cells.get(5)?.parse().ok()?))
    };
    markdown.lines().filter_map(cells).collect()
}
