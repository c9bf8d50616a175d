//! kcm's own commands.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike as _;

use crate::common::{Machine, Mount};
use crate::harness::{FEW, interleave, row};
use crate::stats::Samples;
use crate::table::{Row, Target};

/// Returns wall time and CPU time of commands, repeated several times, in microseconds.
pub(super) fn race(commands: &mut [Command], times: u64) -> [Vec<crate::stats::Rounds>; 2] {
    let mut cpu: Vec<Samples> = Vec::new();
    let wall = interleave(commands.len(), FEW.rounds, |n| {
        let (mut walls, mut cpus) = (Vec::new(), Vec::new());
        for _ in 0..times {
            let (before, started) = (cpu_of_children(), Instant::now());
            let status = commands[n].stdout(Stdio::null()).status().expect("a command");
            walls.push(started.elapsed().as_secs_f64() * 1e6);
            cpus.push(cpu_of_children() - before);
            assert!(status.success(), "{:?}", commands[n]);
        }
        cpu.push(Samples::new(cpus));
        Samples::new(walls)
    });
    let mut cpu = cpu.into_iter();
    [wall, interleave(commands.len(), FEW.rounds, |_| cpu.next().unwrap_or_default())]
}

fn cpu_of_children() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).expect("getrusage");
    (usage.user_time() + usage.system_time()).num_microseconds() as f64
}

pub(super) fn rows() -> Vec<Row> {
    let mut rows = isolate();
    rows.extend(reports());
    rows
}

fn isolate() -> Vec<Row> {
    let mount = Mount::with_dataplane();
    let mut taskset = Command::new("taskset");
    taskset.args(["-c", "0", "true"]);
    let isolate = mount.kcm(&["isolate", "--pool=dataplane", "--", "true"]);
    let mut sh = Command::new("sh");
    sh.args(["-c", "true"]);
    let [wall, cpu] = race(&mut [isolate, taskset, sh], 40);
    let work = "kcm isolate -- true";
    let beside = "taskset -c 0 true";
    let cpu = row("command-isolate-cpu", work, &cpu[0], beside, &cpu[1], Target::AtMost(1.5));
    let note = "the CPU time of the command only; the daemon's is in the claim";
    vec![
        row("command-isolate", work, &wall[0], beside, &wall[1], Target::AtMost(2.0)),
        row("command-isolate-sh", work, &wall[0], "sh -c true", &wall[2], Target::Informational),
        Row { work: format!("{work}: CPU time"), note: note.into(), ..cpu },
    ]
}

fn reports() -> Vec<Row> {
    let mount = Mount::not_mounted_in("/dev/shm".as_ref());
    mount.start_on(&Machine::new(1, 256, 1));
    let lists: Vec<String> = (0..256).map(|cpu: u32| cpu.to_string()).collect();
    mount.make_pool("dataplane", true, &lists.iter().map(String::as_str).collect::<Vec<_>>());
    let files: Vec<PathBuf> = std::iter::once(mount.pool("dataplane").join("exclusive"))
        .chain(lists.iter().map(|list| mount.tasks("dataplane", list)))
        .collect();
    let mut cat = Command::new("cat");
    cat.args(files);
    let mut report = mount.kcm(&["node-report"]);
    report.env("KCM_DEV_LSCPU_SYSFS", mount.home().join("machine"));
    let [wall, _] = race(&mut [mount.kcm(&["describe"]), report, cat], 10);
    let row = |name, work, n: usize| {
        Row {
        note:
            "the lists consist of CPUs of a simulated machine with 256 CPUs; node-report also reads the topology and \
looks at every process of the machine"
                .into(),
        ..row(name, work, &wall[n], "cat of the files", &wall[2], Target::AtMost(3.0))
    }
    };
    vec![
        row("command-describe", "kcm describe with 256 lists", 0),
        row("command-node-report", "kcm node-report with 256 lists", 1),
    ]
}
