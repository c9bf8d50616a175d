//! The cost of an idle daemon, and the time it takes to start.

use std::fs;
use std::time::{Duration, Instant};

use crate::common::{Mount, Sleeper};
use crate::null_fs::NullFs;
use crate::process_group::ProcessGroup;
use crate::stats::Samples;
use crate::table::{Row, Target};

/// The supervisor checks the worker every 6 seconds.
const WINDOW: Duration = Duration::from_secs(18);

pub(super) fn rows() -> Vec<Row> {
    let mut rows = idle();
    rows.extend(with_claims());
    rows
}

fn figure(name: &str, work: &str, kcm: f64, unit: &'static str, target: Target) -> Row {
    Row {
        name: name.into(),
        work: work.into(),
        kcm,
        kcm_p99: None,
        beside: String::new(),
        theirs: f64::NAN,
        theirs_p99: None,
        unit,
        ratio: f64::NAN,
        target,
        note: String::new(),
    }
}

fn idle() -> Vec<Row> {
    let mount = Mount::with_dataplane();
    let holder = Sleeper::new();
    let daemon = [mount.worker().expect("a worker"), mount.supervisor()];
    let free = lives(daemon);
    fs::write(mount.tasks("dataplane", "0"), holder.pid().to_string()).expect("a claim");
    let [worker, supervisor] = lives(daemon);
    let cpu = worker.cpu_ms + supervisor.cpu_ms;
    let looks = "while something is claimed, the worker looks every 5 s whether the tasks are on their lists";
    let note = "each mount or unmount on the machine wakes the supervisor once";
    vec![
        figure(
            "rest-worker-free",
            "idle, without a claim: wake-ups of the worker",
            free[0].wakeups,
            "/min",
            Target::Within(0.0),
        ),
        Row {
            note: looks.into(),
            ..figure(
                "rest-worker",
                "idle, with a claim: wake-ups of the worker",
                worker.wakeups,
                "/min",
                Target::Within(12.0),
            )
        },
        Row {
            note: note.into(),
            ..figure(
                "rest-keeper",
                "idle: wake-ups of the supervisor",
                supervisor.wakeups,
                "/min",
                Target::Within(12.0),
            )
        },
        figure("rest-cpu", "idle: CPU time of both", cpu, "ms/min", Target::Within(10.0)),
    ]
}

/// What processes do in a minute in which nothing happens.
fn lives(processes: [u32; 2]) -> [Life; 2] {
    // Lets the start or the claim finish.
    std::thread::sleep(Duration::from_millis(500));
    let before = processes.map(Life::of);
    std::thread::sleep(WINDOW);
    let after = processes.map(Life::of);
    let a_minute = 60.0 / WINDOW.as_secs_f64();
    [0, 1].map(|n| Life {
        wakeups: (after[n].wakeups - before[n].wakeups) * a_minute,
        cpu_ms: (after[n].cpu_ms - before[n].cpu_ms) * a_minute,
    })
}

/// The totals over the threads of a process since its start.
struct Life {
    wakeups: f64,
    cpu_ms: f64,
}

impl Life {
    fn of(pid: u32) -> Self {
        let (mut wakeups, mut cpu_ms) = (0.0, 0.0);
        for thread in fs::read_dir(format!("/proc/{pid}/task")).expect("a process").filter_map(Result::ok) {
            let read = |name| fs::read_to_string(thread.path().join(name)).unwrap_or_default();
            let status = read("status");
            let switches = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            wakeups += switches.and_then(|count| count.trim().parse::<f64>().ok()).unwrap_or(0.0);
            let on_cpu = read("schedstat").split(' ').next().and_then(|ns| ns.parse::<f64>().ok());
            cpu_ms += on_cpu.unwrap_or(0.0) / 1e6;
        }
        Self { wakeups, cpu_ms }
    }
}

fn with_claims() -> Vec<Row> {
    let mount = Mount::with_shared();
    let null_fs = NullFs::new();
    let (none, floor) = (resident(&mount), resident_of(null_fs.pid()));
    let without = Samples::new((0..3).map(|_| start(&mount)).collect()).median();
    let group = ProcessGroup::of_processes(10_000);
    group.claim(&mount.tasks("shared", "1"), 10_000);
    // The same number of claims, made again, does not need more memory.
    let with = resident(&mount);
    let starts = Samples::new((0..3).map(|_| start(&mount)).collect()).median();
    let tasks = fs::read_to_string(mount.tasks("shared", "1")).expect("tasks");
    assert_eq!(tasks.split(',').count(), 10_000, "the claims are taken up again");
    let after = resident(&mount);
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    let each = (with.max(after) - none) / 10_000.0;
    let beside = |row: Row, beside: &str, theirs: f64| Row {
        beside: beside.into(),
        theirs,
        ratio: row.kcm / theirs,
        ..row
    };
    let memory = figure(
        "rest-memory",
        "resident memory: worker and supervisor",
        mib(none),
        "MiB",
        Target::Within(8.0),
    );
    let mount =
        figure("rest-mount", "kcm mount with 10,000 recorded claims", starts, "ms", Target::Within(1000.0));
    vec![
        Row { note: "".into(), ..beside(memory, "empty FUSE", mib(floor)) },
        figure(
            "rest-memory-claim",
            "resident memory: each of 10,000 claims",
            each,
            "bytes",
            Target::Within(512.0),
        ),
        beside(mount, "without claims", without),
    ]
}

/// Restarts the daemon and returns the time until it answers, in milliseconds.
fn start(mount: &Mount) -> f64 {
    mount.stop();
    let started = Instant::now();
    mount.start();
    started.elapsed().as_secs_f64() * 1e3
}

/// Returns the memory of both processes of the daemon in bytes; shared pages count once.
fn resident(mount: &Mount) -> f64 {
    mount.daemons().into_iter().map(resident_of).sum()
}

fn resident_of(pid: u32) -> f64 {
    let map = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let pss = map.lines().find_map(|line| line.strip_prefix("Pss:"));
    pss.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok()).unwrap_or(f64::NAN) * 1024.0
}
