//! Measures what one local user can do to another one; see `scripts/attack`.
//!
//! Owns the order of the attacks, the time for all of them, and the verdict. Each attack runs beside a daemon of its own
//! and beside an empty FUSE filesystem, and the same victim is measured beside both.
#![allow(missing_docs, unreachable_pub, reason = "a program")]
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a measurement fails by panicking"
)]

mod attackers;
#[path = "../speed/columns.rs"]
mod columns;
#[path = "../../tests/it/harness/mod.rs"]
mod common;
mod crew;
mod lines;
#[path = "../speed/machine.rs"]
mod machine;
#[allow(dead_code, reason = "the benchmark uses all of it")]
#[path = "../speed/null_fs.rs"]
mod null_fs;
mod place;
mod report;
#[allow(dead_code, reason = "the benchmark uses all of it")]
#[path = "../speed/stats.rs"]
mod stats;
mod sys;
mod trial;
mod victim;

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use attackers::{ATTACKS, Attack};
use place::Stage;
use report::Row;

/// All attacks together take at most this long.
const BOUND: Duration = Duration::from_secs(120);
/// An attack that is started takes at most about this long beside both filesystems, also if nothing is answered.
const ENOUGH: Duration = Duration::from_secs(12);
/// A usual step takes less.
const SLOW: Duration = Duration::from_secs(5);

fn main() -> Result<ExitCode, Box<dyn Error>> {
    // cargo adds `--bench`.
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        [null_fs::FLAG, dir, flags @ ..] => null_fs::serve(dir, flags.contains(&null_fs::REMEMBERED))?,
        [attackers::FLAG, name, root] => attackers::run(name, Path::new(root))?,
        [victim::FLAG, kind, root] => victim::run(kind, Path::new(root))?,
        names => return Ok(measure(names)),
    }
    Ok(ExitCode::SUCCESS)
}

/// Carries out the attacks whose names contain one of `names`, or all, and prints the table.
fn measure(names: &[&str]) -> ExitCode {
    let wanted = |attack: &&Attack| names.is_empty() || names.iter().any(|name| attack.name.contains(name));
    let (started, load) = (Instant::now(), machine::load());
    let rows: Vec<Row> = ATTACKS.iter().filter(wanted).map(|attack| row(attack, started)).collect();
    println!("{}; load {load:.1} at the start; {} s\n", machine::kind(), started.elapsed().as_secs());
    println!("{}\n{}", report::table(&rows), report::notes(&rows));
    if !rows.is_empty() && rows.iter().all(Row::is_accepted) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Measures one attack, or says that the time is up.
fn row(attack: &Attack, started: Instant) -> Row {
    let mut row = Row { name: attack.name, what: attack.what, limit: attack.limit, ..Row::default() };
    if started.elapsed() + ENOUGH > BOUND {
        row.faults.push("not measured: the time is up".into());
        return row;
    }
    eprintln!("{} ...", attack.name);
    let stage = step("starting the daemon", || Stage::kcm(attack.pool));
    let (worker, before) = (stage.server(), stage.resident());
    let trial = step("attacking kcm", || trial::run(attack.name, &stage.root()));
    row.faults = trial.faults();
    if stage.server() != worker {
        row.faults.push(format!("the worker was replaced: {}", stage.complaints()));
    }
    row.resident = Some((before, stage.resident()));
    step("stopping the daemon", || drop(stage));
    let slow = trial.slow();
    row.kcm = trial.into();
    if !row.is_held() {
        eprintln!("  {slow}");
    }
    let stage = step("starting the empty filesystem", Stage::empty);
    row.empty = step("attacking the empty filesystem", || trial::run(attack.name, &stage.root())).into();
    step("stopping the empty filesystem", || drop(stage));
    row
}

/// Does a part of the work. Says so if it takes long: it uses up the time of the attacks that follow.
fn step<T>(what: &str, work: impl FnOnce() -> T) -> T {
    let started = Instant::now();
    let done = work();
    if started.elapsed() > SLOW {
        eprintln!("  {what} took {:.1} s", started.elapsed().as_secs_f64());
    }
    done
}
