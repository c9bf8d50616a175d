//! Counters and gauges for `info/metrics`, as OpenMetrics text.
//!
//! Owns the names, units and help texts, and the bounds of the histogram. Does not know the source of the gauges.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use parking_lot::Mutex;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter as Count};
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

/// The upper bounds of the latency histogram, in seconds: from 5 µs, less than any request takes, to 1 s.
const BOUNDS: [f64; 12] = [5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 5e-3, 0.025, 0.1, 1.0];

/// The metrics that are counted while a worker runs. All counters start at 0 with the worker.
#[derive(Debug)]
pub(crate) struct Metrics(Arc<Counts>);

#[derive(Debug)]
struct Counts {
    /// Wall time in milliseconds.
    started: u64,
    /// The number of state files that were set aside at the start.
    damaged: usize,
    claimed: Count,
    moved: Count,
    released: Count,
    inherited: Count,
    ended: Count,
    reclaimed: Count,
    died: Count,
    unrecorded: Count,
    intruders: Count,
    displaced: Count,
    /// By the name of the error number.
    refusals: Mutex<BTreeMap<String, u64>>,
    latency: Histogram,
}

/// The counters for changes of claims, and for refusals.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Counter {
    Claimed,
    Moved,
    Released,
    Inherited,
    Ended,
    Reclaimed,
    Died,
    /// A refusal without event and record, because its user has caused too many.
    Unrecorded,
    /// A process was found pinned within an exclusive list that came free.
    Intruders,
    /// The kernel has taken a claimed task off its list.
    Displaced,
}

/// The current state of one pool.
#[derive(Debug)]
pub(crate) struct PoolGauge {
    pub(crate) pool: String,
    pub(crate) exclusive: bool,
    pub(crate) lists_free: usize,
    pub(crate) lists_taken: usize,
    pub(crate) tasks: usize,
}

impl Metrics {
    /// The metrics of a worker that starts at `started` (wall time in milliseconds) and has set `damaged` state files
    /// aside.
    pub(crate) fn new(started: u64, damaged: usize) -> Self {
        Self(Arc::new(Counts {
            started,
            damaged,
            claimed: Count::default(),
            moved: Count::default(),
            released: Count::default(),
            inherited: Count::default(),
            ended: Count::default(),
            reclaimed: Count::default(),
            died: Count::default(),
            unrecorded: Count::default(),
            intruders: Count::default(),
            displaced: Count::default(),
            refusals: Mutex::default(),
            latency: Histogram::new(BOUNDS),
        }))
    }

    /// Counts a change of a claim, or a refusal.
    pub(crate) fn count(&self, counter: Counter) {
        let counts = &self.0;
        match counter {
            Counter::Claimed => counts.claimed.inc(),
            Counter::Moved => counts.moved.inc(),
            Counter::Released => counts.released.inc(),
            Counter::Inherited => counts.inherited.inc(),
            Counter::Ended => counts.ended.inc(),
            Counter::Reclaimed => counts.reclaimed.inc(),
            Counter::Died => counts.died.inc(),
            Counter::Unrecorded => counts.unrecorded.inc(),
            Counter::Intruders => counts.intruders.inc(),
            Counter::Displaced => counts.displaced.inc(),
        };
    }

    /// Counts a refusal.
    pub(crate) fn refused(&self, errno: Errno) {
        *self.0.refusals.lock().entry(format!("{errno:?}")).or_default() += 1;
    }

    /// Counts a request that took this long in the daemon.
    pub(crate) fn took(&self, duration: Duration) {
        self.0.latency.observe(duration.as_secs_f64());
    }

    /// Returns the OpenMetrics text, which ends in `# EOF`. `dropped`: how many records of each kind had to make room.
    /// `displaced`: how many claimed tasks are not on their lists.
    pub(crate) fn show(
        &self,
        pools: Vec<PoolGauge>,
        unacknowledged: u64,
        dropped: [(&'static str, u64); 3],
        displaced: usize,
    ) -> String {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Snapshot {
            counts: Arc::clone(&self.0),
            pools,
            unacknowledged,
            dropped,
            displaced: displaced as u64,
        }));
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = text::encode(&mut out, &registry);
        out
    }
}

/// Everything that one read of the file shows.
///
/// This is a collector instead of registered families so that the order of pools and of error numbers is the same in
/// every read, and families without a sample are shown, too.
#[derive(Debug)]
struct Snapshot {
    counts: Arc<Counts>,
    pools: Vec<PoolGauge>,
    unacknowledged: u64,
    dropped: [(&'static str, u64); 3],
    displaced: u64,
}

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let (out, counts) = (&mut encoder, &*self.counts);
        let started = ConstGauge::new(counts.started as f64 / 1e3);
        let help = "When the daemon started, in seconds since 1970.";
        encode_one(out, "kcm_start_time", help, Some(&Unit::Seconds), &started)?;
        let damaged = ConstGauge::new(counts.damaged as u64);
        let help = "Damaged state files that were set aside when the daemon started.";
        encode_one(out, "kcm_state_damaged", help, None, &damaged)?;
        self.encode_pools(out)?;
        for (name, counter, help) in [
            ("kcm_claims", &counts.claimed, "Claims of tasks that had none."),
            ("kcm_moves", &counts.moved, "Claims replaced by a claim on another list."),
            ("kcm_releases", &counts.released, "Claims that live tasks gave up."),
            ("kcm_inherited", &counts.inherited, "Claims that passed from a dead task to its heir."),
            ("kcm_ended", &counts.ended, "Claims that ended because the task exited."),
            ("kcm_reclaimed", &counts.reclaimed, "Claims taken back from tasks that were killed."),
            ("kcm_died", &counts.died, "Claims of tasks of which the kernel does not tell how they ended."),
            ("kcm_intruders", &counts.intruders, "Processes found on an exclusive list that came free."),
            ("kcm_displaced", &counts.displaced, "Claimed tasks that the kernel took off their lists."),
        ] {
            encode_one(out, name, help, None, counter)?;
        }
        let displaced = ConstGauge::new(self.displaced);
        let help = "Claimed tasks that the kernel does not let back on their lists.";
        encode_one(out, "kcm_displaced_now", help, None, &displaced)?;
        let unacknowledged = ConstGauge::new(self.unacknowledged);
        let help = "Reclaimed claims that nobody has acknowledged.";
        encode_one(out, "kcm_reclaimed_unacknowledged", help, None, &unacknowledged)?;
        let help = "Refused operations by error number.";
        let mut refusals = out.encode_descriptor("kcm_refusals", help, None, MetricType::Counter)?;
        for (errno, count) in &*counts.refusals.lock() {
            ConstCounter::new(*count).encode(refusals.encode_family(&[("errno", errno.as_str())])?)?;
        }
        let help = "Refusals without event and record, because their user had caused too many.";
        encode_one(out, "kcm_refusals_unrecorded", help, None, &counts.unrecorded)?;
        let help = "Records that had to make room for newer ones, by kind.";
        let mut dropped = out.encode_descriptor("kcm_records_dropped", help, None, MetricType::Counter)?;
        for (record, count) in self.dropped {
            ConstCounter::new(count).encode(dropped.encode_family(&[("record", record)])?)?;
        }
        let help = "Time that requests on control files took in the daemon.";
        encode_one(out, "kcm_request_duration", help, Some(&Unit::Seconds), &counts.latency)
    }
}

impl Snapshot {
    fn encode_pools(&self, out: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let help = "CPU lists by pool and state.";
        let mut lists = out.encode_descriptor("kcm_lists", help, None, MetricType::Gauge)?;
        for pool in &self.pools {
            let exclusive = if pool.exclusive { "true" } else { "false" };
            for (state, count) in [("free", pool.lists_free), ("taken", pool.lists_taken)] {
                let labels = [("pool", pool.pool.as_str()), ("exclusive", exclusive), ("state", state)];
                ConstGauge::new(count as u64).encode(lists.encode_family(&labels)?)?;
            }
        }
        let help = "Tasks that hold a claim, by pool.";
        let mut tasks = out.encode_descriptor("kcm_tasks", help, None, MetricType::Gauge)?;
        for pool in &self.pools {
            let labels = [("pool", pool.pool.as_str())];
            ConstGauge::new(pool.tasks as u64).encode(tasks.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

fn encode_one(
    out: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    metric: &impl EncodeMetric,
) -> fmt::Result {
    metric.encode(out.encode_descriptor(name, help, unit, metric.metric_type())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE_DROPPED: [(&str, u64); 3] = [("event", 0), ("reclaim", 0), ("refusal", 0)];

    fn pool(name: &str, exclusive: bool) -> PoolGauge {
        PoolGauge { pool: name.into(), exclusive, lists_free: 2, lists_taken: 1, tasks: 3 }
    }

    #[test]
    fn families_are_shown_in_the_same_order_each_time() {
        let metrics = Metrics::new(1_764_000_000_250, 1);
        metrics.count(Counter::Claimed);
        metrics.count(Counter::Claimed);
        metrics.refused(Errno::EINVAL);
        metrics.refused(Errno::EBUSY);
        metrics.refused(Errno::EBUSY);
        let dropped = [("event", 5), ("reclaim", 0), ("refusal", 2)];
        let show = || metrics.show(vec![pool("b", true), pool("a", false)], 7, dropped, 3);
        let text = show();
        assert_eq!(text, show());
        for part in [
            "# HELP kcm_start_time_seconds When the daemon started, in seconds since 1970.\n\
             # TYPE kcm_start_time_seconds gauge\n# UNIT kcm_start_time_seconds seconds\n\
             kcm_start_time_seconds 1764000000.25\n",
            "\nkcm_state_damaged 1\n",
            "\nkcm_lists{pool=\"b\",exclusive=\"true\",state=\"free\"} 2\n\
             kcm_lists{pool=\"b\",exclusive=\"true\",state=\"taken\"} 1\n\
             kcm_lists{pool=\"a\",exclusive=\"false\",state=\"free\"} 2\n",
            "\nkcm_tasks{pool=\"b\"} 3\nkcm_tasks{pool=\"a\"} 3\n",
            "# TYPE kcm_claims counter\nkcm_claims_total 2\n",
            "\nkcm_ended_total 0\n",
            "\nkcm_displaced_total 0\n",
            "\nkcm_displaced_now 3\n",
            "\nkcm_reclaimed_unacknowledged 7\n",
            "\nkcm_refusals_total{errno=\"EBUSY\"} 2\nkcm_refusals_total{errno=\"EINVAL\"} 1\n",
            "\nkcm_refusals_unrecorded_total 0\n",
            "\nkcm_records_dropped_total{record=\"event\"} 5\nkcm_records_dropped_total{record=\"reclaim\"} 0\n",
        ] {
            assert!(text.contains(part), "{part}\n---\n{text}");
        }
        assert!(text.ends_with("\n# EOF\n"), "{text}");
    }

    #[test]
    fn a_family_without_samples_is_shown() {
        let text = Metrics::new(0, 0).show(Vec::new(), 0, NONE_DROPPED, 0);
        assert!(text.contains("# TYPE kcm_refusals counter\n"), "{text}");
        assert!(text.contains("# TYPE kcm_lists gauge\n"), "{text}");
    }

    #[test]
    fn durations_are_counted_in_cumulative_buckets() {
        let metrics = Metrics::new(0, 0);
        for us in [4, 5, 6, 40, 2_000_000] {
            metrics.took(Duration::from_micros(us));
        }
        let text = metrics.show(Vec::new(), 0, NONE_DROPPED, 0);
        let buckets: Vec<(&str, f64)> = text
            .lines()
            .filter_map(|line| {
                line.strip_prefix("kcm_request_duration_seconds_bucket{le=\"")?.split_once("\"} ")
            })
            .map(|(bound, count)| (bound, count.parse().unwrap()))
            .collect();
        assert_eq!(buckets.len(), BOUNDS.len() + 1);
        let counts: Vec<f64> = buckets.iter().map(|(_, count)| *count).collect();
        assert_eq!(counts, [2.0, 3.0, 3.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 5.0]);
        let bounds: Vec<f64> = buckets.iter().filter_map(|(bound, _)| bound.parse().ok()).collect();
        assert_eq!(bounds[..12], BOUNDS);
        assert_eq!(buckets.last().unwrap().0, "+Inf");
        assert!(text.contains("\nkcm_request_duration_seconds_count 5\n"), "{text}");
    }
}
