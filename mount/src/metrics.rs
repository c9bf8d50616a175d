//! Counters for `info/metrics`, as OpenMetrics text.
//!
//! Owns: names, units and the histogram's bounds. Must not know: where the gauges come from.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use parking_lot::Mutex;

/// Upper bounds of the latency histogram, in microseconds.
const BOUNDS_US: [u64; 12] = [5, 10, 25, 50, 100, 250, 500, 1_000, 5_000, 25_000, 100_000, 1_000_000];

/// What is counted while the daemon runs. All counters start at 0 with the daemon.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    /// Wall time in milliseconds.
    started: u64,
    /// State files that were set aside at the start.
    damaged: usize,
    claimed: AtomicU64,
    moved: AtomicU64,
    released: AtomicU64,
    inherited: AtomicU64,
    ended: AtomicU64,
    reclaimed: AtomicU64,
    refusals: Mutex<BTreeMap<String, u64>>,
    /// One more than there are bounds: the last one is everything above.
    latency: [AtomicU64; BOUNDS_US.len() + 1],
    latency_ns: AtomicU64,
}

/// What is counted when a claim changes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Counter {
    Claimed,
    Moved,
    Released,
    Inherited,
    Ended,
    Reclaimed,
}

/// The state of one pool at this moment.
#[derive(Debug)]
pub(crate) struct PoolGauge {
    pub(crate) pool: String,
    pub(crate) exclusive: bool,
    pub(crate) lists_free: usize,
    pub(crate) lists_taken: usize,
    pub(crate) tasks: usize,
}

impl Metrics {
    /// Of a daemon that starts now (wall time in milliseconds) and has set this many state files aside.
    pub(crate) fn new(started: u64, damaged: usize) -> Self {
        Self { started, damaged, ..Self::default() }
    }

    pub(crate) fn count(&self, counter: Counter) {
        self.counter(counter).fetch_add(1, Ordering::Relaxed);
    }

    fn counter(&self, counter: Counter) -> &AtomicU64 {
        match counter {
            Counter::Claimed => &self.claimed,
            Counter::Moved => &self.moved,
            Counter::Released => &self.released,
            Counter::Inherited => &self.inherited,
            Counter::Ended => &self.ended,
            Counter::Reclaimed => &self.reclaimed,
        }
    }

    pub(crate) fn refused(&self, errno: Errno) {
        *self.refusals.lock().entry(format!("{errno:?}")).or_default() += 1;
    }

    /// How long one request took in the daemon.
    pub(crate) fn took(&self, duration: Duration) {
        let us = duration.as_micros() as u64;
        let bucket = BOUNDS_US.iter().position(|&bound| us <= bound).unwrap_or(BOUNDS_US.len());
        if let Some(bucket) = self.latency.get(bucket) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        self.latency_ns.fetch_add(duration.as_nanos() as u64, Ordering::Relaxed);
    }

    /// OpenMetrics text, with `# EOF` at its end.
    pub(crate) fn show(&self, pools: &[PoolGauge], unacknowledged: u64) -> String {
        let mut text = String::new();
        let out = &mut text;
        head(out, "kcm_start_time_seconds", "gauge", "When the daemon started, in seconds since 1970.");
        let _ = writeln!(out, "kcm_start_time_seconds {}", self.started as f64 / 1e3);
        head(
            out,
            "kcm_state_damaged",
            "gauge",
            "Damaged state files that were set aside when the daemon started.",
        );
        let _ = writeln!(out, "kcm_state_damaged {}", self.damaged);
        head(out, "kcm_lists", "gauge", "CPU lists by pool and state.");
        for pool in pools {
            let (name, exclusive) = (&pool.pool, pool.exclusive);
            for (state, lists) in [("free", pool.lists_free), ("taken", pool.lists_taken)] {
                let _ = writeln!(
                    out,
                    "kcm_lists{{pool=\"{name}\",exclusive=\"{exclusive}\",state=\"{state}\"}} {lists}"
                );
            }
        }
        head(out, "kcm_tasks", "gauge", "Tasks that hold a claim, by pool.");
        for pool in pools {
            let _ = writeln!(out, "kcm_tasks{{pool=\"{}\"}} {}", pool.pool, pool.tasks);
        }
        for (name, counter, help) in [
            ("kcm_claims", Counter::Claimed, "Claims made by tasks that had none."),
            ("kcm_moves", Counter::Moved, "Claims replaced by one on another list."),
            ("kcm_releases", Counter::Released, "Claims that living tasks gave up."),
            ("kcm_inherited", Counter::Inherited, "Claims that passed from a dead task to its heir."),
            ("kcm_ended", Counter::Ended, "Claims that ended because the task exited."),
            ("kcm_reclaimed", Counter::Reclaimed, "Claims taken back from tasks that were killed."),
        ] {
            head(out, name, "counter", help);
            let _ = writeln!(out, "{name}_total {}", self.counter(counter).load(Ordering::Relaxed));
        }
        head(out, "kcm_reclaimed_unacknowledged", "gauge", "Reclaimed claims that nobody has acknowledged.");
        let _ = writeln!(out, "kcm_reclaimed_unacknowledged {unacknowledged}");
        head(out, "kcm_refusals", "counter", "Refused operations by error number.");
        for (errno, count) in &*self.refusals.lock() {
            let _ = writeln!(out, "kcm_refusals_total{{errno=\"{errno}\"}} {count}");
        }
        self.show_latency(out);
        text.push_str("# EOF\n");
        text
    }

    fn show_latency(&self, out: &mut String) {
        let name = "kcm_request_duration_seconds";
        head(out, name, "histogram", "Time that requests on control files took in the daemon.");
        let mut sum = 0;
        for (index, bucket) in self.latency.iter().enumerate() {
            sum += bucket.load(Ordering::Relaxed);
            match BOUNDS_US.get(index) {
                Some(&us) => {
                    let _ = writeln!(out, "{name}_bucket{{le=\"{}\"}} {sum}", us as f64 / 1e6);
                }
                None => {
                    let _ = writeln!(out, "{name}_bucket{{le=\"+Inf\"}} {sum}");
                }
            }
        }
        let _ = writeln!(out, "{name}_sum {}", self.latency_ns.load(Ordering::Relaxed) as f64 / 1e9);
        let _ = writeln!(out, "{name}_count {sum}");
    }
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# TYPE {name} {kind}\n# HELP {name} {help}");
}
