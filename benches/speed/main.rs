//! Measures how fast kcm is, beside baselines and beside the lower bound; see `scripts/bench`.
//!
//! Owns the list of measurements and the document. All figures come from one run: real daemons (the shipped build),
//! real clients, contenders in turn.
#![allow(missing_docs, unreachable_pub, reason = "a program")]
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a benchmark fails by panicking"
)]

mod baselines;
mod client;
mod columns;
#[path = "../../tests/it/harness/mod.rs"]
mod common;
mod harness;
mod machine;
mod null_fs;
mod process_group;
mod rows;
mod stats;
mod table;

use std::error::Error;
use std::fs;
use std::process::ExitCode;
use std::time::Instant;

use table::Row;

const DOCUMENT: &str = "docs/performance.md";
/// The load per CPU above which figures mean little.
const BUSY: f64 = 0.5;

fn main() -> Result<ExitCode, Box<dyn Error>> {
    // cargo adds `--bench`.
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        [client::FLAG, job] => client::run(job)?,
        [null_fs::FLAG, dir, flags @ ..] => null_fs::serve(dir, flags.contains(&null_fs::REMEMBERED))?,
        [process_group::FLAG, count] => process_group::threads(count)?,
        ["--check", names @ ..] => return check(names),
        names => {
            let (rows, words) = measure(names);
            if names.is_empty() {
                fs::write(DOCUMENT, document(&rows, &words))?;
                println!("{DOCUMENT} is written");
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Measures the rows whose names begin with one of `names`, or all rows, and prints them. Returns them with a line
/// about the machine.
fn measure(names: &[&str]) -> (Vec<Row>, String) {
    let wanted = |name: &str| names.is_empty() || names.iter().any(|wanted| name.starts_with(wanted));
    let (started, load) = (Instant::now(), machine::load());
    if load > BUSY * std::thread::available_parallelism().map_or(1.0, |cpus| usize::from(cpus) as f64) {
        eprintln!("this machine is busy (load {load}): figures say little");
    }
    let mut rows = Vec::new();
    for (group, measure) in rows::GROUPS {
        let is_wanted = |name: &&str| name.split('-').next() == Some(group);
        if names.is_empty() || names.iter().any(is_wanted) {
            eprintln!("{group} ...");
            rows.extend(measure().into_iter().filter(|row| wanted(&row.name)));
        }
    }
    let words =
        format!("{}; load {load:.1} at the start; {} s", machine::kind(), started.elapsed().as_secs());
    println!("{words}\n\n{}\n{}", table::text(&rows), table::notes(&rows));
    (rows, words)
}

/// Measures and compares ratios with the committed ones. Measures a row that looks worse once more.
fn check(names: &[&str]) -> Result<ExitCode, Box<dyn Error>> {
    let document = fs::read_to_string(DOCUMENT)
        .map_err(|error| format!("{DOCUMENT}: {error}; scripts/bench writes it"))?;
    let committed = table::committed(&document);
    let worse = |rows: &[Row]| -> Vec<String> {
        let then =
            |row: &Row| committed.iter().find(|(name, _)| *name == row.name).map_or(f64::NAN, |(_, r)| *r);
        let worse = rows.iter().filter(|row| row.is_worse_than(then(row)));
        worse.map(|row| row.name.clone()).collect()
    };
    let mut found = worse(&measure(names).0);
    if !found.is_empty() {
        eprintln!("worse than in {DOCUMENT}, measured once more: {}", found.join(", "));
        let again: Vec<&str> = found.iter().map(String::as_str).collect();
        found = worse(&measure(&again).0).into_iter().filter(|name| found.contains(name)).collect();
    }
    if found.is_empty() {
        println!("no row is worse than in {DOCUMENT}");
        return Ok(ExitCode::SUCCESS);
    }
    println!("worse than in {DOCUMENT}: {}", found.join(", "));
    Ok(ExitCode::FAILURE)
}

fn document(rows: &[Row], words: &str) -> String {
    let met = rows.iter().filter(|row| row.target != table::Target::Informational && row.is_met()).count();
    let targets = rows.iter().filter(|row| row.target != table::Target::Informational).count();
    format!(
        "{HEAD}\n{words}. {met} of {targets} targets are met.\n\n{}\n## Notes\n\n{}",
        table::markdown(rows),
        table::notes(rows)
    )
}

const HEAD: &str = "\
# Performance

`scripts/bench` writes this page. It measures everything in one run: kcm as shipped (supervisor, claims log and all
checks on), real clients, and the baselines in turn over several rounds. Times are medians, followed by the 99th
percentile. A ratio is the median over all rounds of the ratio of medians. Absolute figures depend on the machine;
ratios carry over to others. `scripts/bench --check` compares ratios with the ones below.

If one client is measured, it and the daemon run on one CPU, so that neither waits for another CPU to wake up; in a
virtual machine that takes longer than the work. On a machine with more CPUs the daemon runs on other CPUs than the
claimed tasks, and the wake-up adds the same time to kcm and to the empty filesystem.

*Empty FUSE* is a filesystem that does nothing: the same fuser, the same number of threads, the same mount options, a
file at the same depth. It is the lower bound for a file that is not part of the kernel.
";
