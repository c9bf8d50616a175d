//! The status for people.
//!
//! Owns the lines and their order. Does not know how the status is found out.

use super::{Problem, Report};
use crate::commands::describe;

/// Returns the status for people.
pub(super) fn text(report: &Report) -> String {
    let path = report.path.display();
    let mut lines = Vec::new();
    match (&report.version, &report.since) {
        (Some(version), Some(since)) => lines.push(format!("{path}: served by kcm {version} since {since}")),
        (Some(version), None) => lines.push(format!("{path}: served by kcm {version}")),
        (None, _) if !report.pools.is_empty() => {
            lines.push(format!("{path}: a plain directory, which no daemon serves"));
        }
        (None, _) => {}
    }
    let mut rows = vec![["POOL", "KIND", "LISTS", "FREE", "TASKS", "CPUS"].map(String::from)];
    for (name, pool) in &report.pools {
        let [kind, lists, free, tasks, cpus] = pool.cells();
        rows.push([describe::shown(name), kind, lists, free, tasks, cpus]);
    }
    if rows.len() > 1 {
        lines.push(describe::columns(&rows).trim_end().to_owned());
    }
    lines.push(match report.problems.len() {
        0 => "No problems.".to_owned(),
        1 => "1 problem:".to_owned(),
        count => format!("{count} problems:"),
    });
    let problem = |Problem { check, problem, cure }: &Problem| format!("{check}: {problem}; {cure}");
    lines.extend(report.problems.iter().map(problem));
    lines.extend(report.notes.iter().map(|note| format!("note: {}", problem(note))));
    if let Some(count) = report.reclaimed.filter(|count| *count > 0) {
        lines.push(format!("{count} claims were taken back from killed programs; kcm reconcile lists them."));
    }
    lines.join("\n") + "\n"
}
