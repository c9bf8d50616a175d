//! `echo $$ > tasks` in a shell.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use crate::common::{Mount, Shell};
use crate::harness::{interleave, row, together};
use crate::null_fs::NullFs;
use crate::stats::Samples;
use crate::table::{Row, Target};

const TIMES: u32 = 300;
const AGAIN: &str = "in a loop in one shell: after the first iteration it repeats the same claim";

pub(super) fn rows() -> Vec<Row> {
    let mount = Mount::with_shared();
    let null_fs = NullFs::new();
    together([mount.worker().expect("a worker"), null_fs.pid()]);
    let rows = ["bash", "dash"].map(|shell| {
        let files = [mount.tasks("shared", "0"), null_fs.tasks("0"), "/dev/null".into()];
        let mut shells =
            files.each_ref().map(|_| Shell::start(Command::new("taskset").args(["-c", "0", shell])));
        let measured = interleave(files.len(), 15, |n| echo(&mut shells[n], &files[n]));
        let work = format!("echo $$ > tasks in {shell}");
        let row = |name: &str, beside, n: usize, target| Row {
            kcm_p99: None,
            theirs_p99: None,
            note: AGAIN.into(),
            ..row(&format!("shell-{shell}{name}"), &work, &measured[0], beside, &measured[n], target)
        };
        [row("", "empty FUSE", 1, Target::AtMost(1.3)), row("-null", "/dev/null", 2, Target::Informational)]
    });
    rows.into_iter().flatten().collect()
}

/// Returns the time of one echo.
fn echo(shell: &mut Shell, file: &Path) -> Samples {
    let file = file.display();
    let started = Instant::now();
    shell.ask(&format!("n=0; while [ $n -lt {TIMES} ]; do echo $$ > {file}; n=$((n+1)); done"));
    Samples::new(vec![started.elapsed().as_secs_f64() * 1e6 / f64::from(TIMES)])
}
