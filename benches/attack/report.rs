//! The table of the attacks, and when the aim is held.
//!
//! Owns its columns; `tests/it/benchmark.rs` tests it. Does not know how anything is measured.

use std::fmt::Write as _;

use super::columns::padded;
use super::stats::Samples;

/// The aim for claims and for reads of the victim, in milliseconds.
const AIM_P99: f64 = 50.0;
const AIM_MAX: f64 = 250.0;

/// The victim beside one filesystem.
#[derive(Clone, Debug, Default)]
pub struct Beside {
    /// In milliseconds; infinite for an operation that hung.
    pub claims: Samples,
    pub reads: Samples,
    /// How many operations of the attacker were successful and refused, if it could still say it.
    pub attacker: Option<(u64, u64)>,
}

/// One attack.
#[derive(Clone, Debug, Default)]
pub struct Row {
    pub name: &'static str,
    pub what: &'static str,
    pub kcm: Beside,
    pub empty: Beside,
    /// The worker's memory before and after, in MiB.
    pub resident: Option<(f64, f64)>,
    /// The faults beyond the figures: an attacker that hung, a worker that was replaced, a victim that was refused.
    pub faults: Vec<String>,
    /// Why claims cannot be held to the aim, if SECURITY.md says so.
    pub limit: Option<&'static str>,
}

impl Row {
    /// Whether the aim is held, also for claims.
    pub fn is_held(&self) -> bool {
        self.faults.is_empty() && holds(&self.kcm.claims) && holds(&self.kcm.reads)
    }

    /// Whether the aim is held except for a limit that SECURITY.md names.
    pub fn is_accepted(&self) -> bool {
        self.is_held() || (self.limit.is_some() && self.faults.is_empty() && holds(&self.kcm.reads))
    }

    fn held(&self) -> &'static str {
        match (self.is_held(), self.is_accepted()) {
            (true, _) => "yes",
            (false, true) => "reads only",
            (false, false) => "**no**",
        }
    }

    fn cells(&self) -> [String; 9] {
        let (kcm, empty) = (&self.kcm, &self.empty);
        let ratio = |ours: &Samples, theirs: &Samples| number(ours.p99() / theirs.p99());
        let memory =
            self.resident.map_or_else(String::new, |(before, after)| format!("{before:.0}, {after:.0}"));
        [
            self.name.to_owned(),
            figures(&kcm.claims),
            figures(&kcm.reads),
            figures(&empty.claims),
            figures(&empty.reads),
            format!("{}, {}", ratio(&kcm.claims, &empty.claims), ratio(&kcm.reads, &empty.reads)),
            format!("{}, {}", kcm.claims.len(), kcm.reads.len()),
            memory,
            self.held().to_owned(),
        ]
    }
}

fn holds(samples: &Samples) -> bool {
    samples.len() > 0 && samples.p99() <= AIM_P99 && samples.quantile(1.0) <= AIM_MAX
}

const HEAD: [&str; 9] = [
    "attack",
    "claim p50, p99, worst",
    "read p50, p99, worst",
    "claim, empty FUSE",
    "read, empty FUSE",
    "ratio of p99",
    "samples",
    "MiB before, after",
    "held",
];

fn figures(samples: &Samples) -> String {
    let figures = [0.5, 0.99, 1.0].map(|q| number(samples.quantile(q)));
    figures.join(", ")
}

/// Formats a number with two or three significant figures.
fn number(value: f64) -> String {
    match value {
        _ if value.is_nan() => "-".into(),
        f64::INFINITY => "hung".into(),
        10.0.. => format!("{value:.0}"),
        1.0.. => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Formats the table, in Markdown and aligned. Times are milliseconds.
pub fn table(rows: &[Row]) -> String {
    let mut lines = vec![HEAD.map(str::to_owned)];
    lines.extend(rows.iter().map(Row::cells));
    let mut out = String::new();
    for (n, cells) in padded(&lines).iter().enumerate() {
        let _ = writeln!(out, "| {} |", cells.join(" | "));
        if n == 0 {
            let _ = writeln!(out, "|{}", " --- |".repeat(HEAD.len()));
        }
    }
    let _ = writeln!(out, "\nMilliseconds. Aim: p99 at most {AIM_P99:.0}, worst at most {AIM_MAX:.0}.");
    out
}

/// Formats what each attacker did, and what went wrong.
pub fn notes(rows: &[Row]) -> String {
    let mut out = String::new();
    let did = |beside: &Beside| {
        beside.attacker.map_or("unknown".into(), |(done, refused)| format!("{done} done, {refused} refused"))
    };
    for row in rows {
        let _ = writeln!(
            out,
            "- {}: {} (kcm: {}; empty FUSE: {})",
            row.name,
            row.what,
            did(&row.kcm),
            did(&row.empty)
        );
        let limit = row.limit.map(|why| format!("known limit of claims: {why}"));
        for remark in row.faults.iter().chain(&limit) {
            let _ = writeln!(out, "  - {remark}");
        }
    }
    out
}
