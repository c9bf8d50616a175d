//! Counters and gauges for `info/metrics`, in the text format of Prometheus (0.0.4).
//!
//! Owns the names, labels and help texts, and the bounds of the histogram. Does not know the source of the gauges.
//!
//! Not OpenMetrics: the name in its `# TYPE` line of a counter lacks `_total`, so that parsers of the text format, such as
//! node_exporter's textfile collector, find no type for the samples.

use std::collections::BTreeMap;
use std::time::Duration;

use nix::errno::Errno;
use prometheus::{
    Histogram, IntCounter, IntCounterVec, Registry, TextEncoder, histogram_opts,
    register_gauge_with_registry, register_histogram_with_registry, register_int_counter_vec_with_registry,
    register_int_counter_with_registry, register_int_gauge_vec_with_registry,
    register_int_gauge_with_registry,
};

/// The upper bounds of the latency histogram, in seconds: from 5 µs, less than any request takes, to 1 s.
const BOUNDS: [f64; 12] = [5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 5e-3, 0.025, 0.1, 1.0];

/// The counters for changes of claims, and for refusals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
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

const COUNTERS: [(Counter, &str, &str); 10] = [
    (Counter::Claimed, "kcm_claims_total", "Claims of tasks that had none."),
    (Counter::Moved, "kcm_moves_total", "Claims replaced by a claim on another list."),
    (Counter::Released, "kcm_releases_total", "Claims that live tasks gave up."),
    (Counter::Inherited, "kcm_inherited_total", "Claims that passed from a dead task to its heir."),
    (Counter::Ended, "kcm_ended_total", "Claims that ended because the task exited."),
    (Counter::Reclaimed, "kcm_reclaimed_total", "Claims taken back from tasks that were killed."),
    (Counter::Died, "kcm_died_total", "Claims of tasks of which the kernel does not tell how they ended."),
    (
        Counter::Unrecorded,
        "kcm_refusals_unrecorded_total",
        "Refusals without event and record, because their user had caused too many.",
    ),
    (Counter::Intruders, "kcm_intruders_total", "Processes found on an exclusive list that came free."),
    (Counter::Displaced, "kcm_displaced_total", "Claimed tasks that the kernel took off their lists."),
];

/// The metrics that are counted while a worker runs. All counters start at 0 with the worker.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    changes: BTreeMap<Counter, IntCounter>,
    /// By the name of the error number.
    refusals: IntCounterVec,
    latency: Histogram,
}

/// The values that are found out when the file is read.
#[derive(Debug, Default)]
pub(crate) struct Gauges {
    pub(crate) pools: Vec<PoolGauge>,
    /// How many reclaimed claims nobody has acknowledged.
    pub(crate) unacknowledged: u64,
    /// How many records of each kind had to make room.
    pub(crate) dropped: [(&'static str, u64); 3],
    /// How many claimed tasks are not on their lists.
    pub(crate) displaced: usize,
    /// How many of the intruders that were found are still there.
    pub(crate) intruders: usize,
}

/// The current state of one pool.
#[derive(Debug)]
pub(crate) struct PoolGauge {
    pub(crate) pool: String,
    pub(crate) exclusive: bool,
    pub(crate) lists: Vec<ListGauge>,
}

/// The current state of one list.
#[derive(Debug)]
pub(crate) struct ListGauge {
    pub(crate) list: String,
    pub(crate) tasks: usize,
    /// The word of its file `state`.
    pub(crate) state: &'static str,
}

impl Metrics {
    /// The metrics of a worker of this version that starts at `started` (wall time in milliseconds) and has set `damaged`
    /// state files aside.
    ///
    /// # Errors
    /// A name is not valid, or used twice. A test shows that none is.
    pub(crate) fn new(started: u64, damaged: usize, version: &str) -> prometheus::Result<Self> {
        let registry = &Registry::new();
        let (number, commit) = split_version(version);
        let help = "The version of the daemon, and the commit that it was built from.";
        let labels = &["version", "commit"];
        let build = register_int_gauge_vec_with_registry!("kcm_build_info", help, labels, registry)?;
        build.with_label_values(&[number, commit]).set(1);
        let help = "When the daemon started, in seconds since 1970.";
        register_gauge_with_registry!("kcm_start_time_seconds", help, registry)?.set(started as f64 / 1e3);
        let help = "Damaged state files that were set aside when the daemon started.";
        register_int_gauge_with_registry!("kcm_state_damaged", help, registry)?.set(damaged as i64);
        let mut changes = BTreeMap::new();
        for (counter, name, help) in COUNTERS {
            changes.insert(counter, register_int_counter_with_registry!(name, help, registry)?);
        }
        let help = "Refused operations by error number.";
        let refusals =
            register_int_counter_vec_with_registry!("kcm_refusals_total", help, &["errno"], registry)?;
        let help = "Time that requests on control files took in the daemon.";
        let latency = histogram_opts!("kcm_request_duration_seconds", help, BOUNDS.to_vec());
        let latency = register_histogram_with_registry!(latency, registry)?;
        Ok(Self { registry: registry.clone(), changes, refusals, latency })
    }

    /// Counts a change of a claim, or a refusal.
    pub(crate) fn count(&self, counter: Counter) {
        if let Some(count) = self.changes.get(&counter) {
            count.inc();
        }
    }

    /// Counts a refusal.
    pub(crate) fn refused(&self, errno: Errno) {
        self.refusals.with_label_values(&[&format!("{errno:?}")]).inc();
    }

    /// Counts a request that took this long in the daemon.
    pub(crate) fn took(&self, duration: Duration) {
        self.latency.observe(duration.as_secs_f64());
    }

    /// Returns the text, in the same order each time.
    ///
    /// # Errors
    /// A name is not valid, or used twice. A test shows that none is.
    pub(crate) fn show(&self, gauges: &Gauges) -> prometheus::Result<String> {
        let mut families = self.registry.gather();
        families.extend(gauges.registry()?.gather());
        TextEncoder::new().encode_to_string(&families)
    }
}

impl Gauges {
    fn registry(&self) -> prometheus::Result<Registry> {
        let registry = Registry::new();
        self.add_pools(&registry)?;
        let help = "Reclaimed claims that nobody has acknowledged.";
        let unacknowledged =
            register_int_gauge_with_registry!("kcm_reclaimed_unacknowledged", help, registry)?;
        unacknowledged.set(self.unacknowledged as i64);
        let help = "Records that had to make room for newer ones, by kind.";
        let labels = &["record"];
        let dropped =
            register_int_counter_vec_with_registry!("kcm_records_dropped_total", help, labels, registry)?;
        for (record, count) in self.dropped {
            dropped.with_label_values(&[record]).inc_by(count);
        }
        let help = "Claimed tasks that the kernel does not let back on their lists.";
        register_int_gauge_with_registry!("kcm_displaced_now", help, registry)?.set(self.displaced as i64);
        let help = "Processes without a claim that were found on an exclusive list and are still there.";
        register_int_gauge_with_registry!("kcm_intruders_now", help, registry)?.set(self.intruders as i64);
        Ok(registry)
    }

    fn add_pools(&self, registry: &Registry) -> prometheus::Result<()> {
        let (help, labels) = ("CPU lists by pool and state.", &["pool", "exclusive", "state"]);
        let lists = register_int_gauge_vec_with_registry!("kcm_lists", help, labels, registry)?;
        let (help, labels) = ("Tasks that hold a claim, by pool.", &["pool"]);
        let tasks = register_int_gauge_vec_with_registry!("kcm_tasks", help, labels, registry)?;
        let (help, labels) = ("Tasks that hold a claim on a CPU list.", &["pool", "list"]);
        let list_tasks = register_int_gauge_vec_with_registry!("kcm_list_tasks", help, labels, registry)?;
        let (help, labels) = ("1 for the state that a CPU list is in.", &["pool", "list", "state"]);
        let list_state = register_int_gauge_vec_with_registry!("kcm_list_state", help, labels, registry)?;
        for PoolGauge { pool, exclusive, lists: of_pool } in &self.pools {
            let exclusive = if *exclusive { "true" } else { "false" };
            let free = of_pool.iter().filter(|list| list.tasks == 0).count();
            for (state, count) in [("free", free), ("taken", of_pool.len() - free)] {
                lists.with_label_values(&[pool.as_str(), exclusive, state]).set(count as i64);
            }
            let all: usize = of_pool.iter().map(|list| list.tasks).sum();
            tasks.with_label_values(&[pool]).set(all as i64);
            for ListGauge { list, tasks, state } in of_pool {
                list_tasks.with_label_values(&[pool, list]).set(*tasks as i64);
                list_state.with_label_values(&[pool.as_str(), list, state]).set(1);
            }
        }
        Ok(())
    }
}

/// Splits `0.2.0 (1a2b3c4 2026-11-26)` into the number and the commit, which is empty if it is not known.
fn split_version(version: &str) -> (&str, &str) {
    let (number, rest) = version.split_once(" (").unwrap_or((version, ""));
    (number, rest.split([' ', ')']).next().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics() -> Metrics {
        Metrics::new(0, 0, "1.2.3").unwrap()
    }

    fn pool(name: &str, exclusive: bool) -> PoolGauge {
        let list = |list: &str, tasks, state| ListGauge { list: list.into(), tasks, state };
        let lists = vec![list("0,8", 0, "free"), list("1", 3, "isolated"), list("2", 0, "free")];
        PoolGauge { pool: name.into(), exclusive, lists }
    }

    #[test]
    fn families_are_shown_in_the_same_order_each_time() {
        let metrics = Metrics::new(1_764_000_000_250, 1, "0.2.0 (1a2b3c4 2026-11-26)").unwrap();
        metrics.count(Counter::Claimed);
        metrics.count(Counter::Claimed);
        metrics.refused(Errno::EINVAL);
        metrics.refused(Errno::EBUSY);
        metrics.refused(Errno::EBUSY);
        let gauges = Gauges {
            pools: vec![pool("b", true), pool("a", false)],
            unacknowledged: 7,
            dropped: [("event", 5), ("reclaim", 0), ("refusal", 2)],
            displaced: 3,
            intruders: 4,
        };
        let text = metrics.show(&gauges).unwrap();
        assert_eq!(text, metrics.show(&gauges).unwrap());
        for part in [
            "kcm_build_info{commit=\"1a2b3c4\",version=\"0.2.0\"} 1\n",
            "# HELP kcm_start_time_seconds When the daemon started, in seconds since 1970.\n\
             # TYPE kcm_start_time_seconds gauge\nkcm_start_time_seconds 1764000000.25\n",
            "\nkcm_state_damaged 1\n",
            "\nkcm_lists{exclusive=\"false\",pool=\"a\",state=\"free\"} 2\n\
             kcm_lists{exclusive=\"false\",pool=\"a\",state=\"taken\"} 1\n\
             kcm_lists{exclusive=\"true\",pool=\"b\",state=\"free\"} 2\n",
            "\nkcm_tasks{pool=\"a\"} 3\nkcm_tasks{pool=\"b\"} 3\n",
            "\nkcm_list_tasks{list=\"0,8\",pool=\"a\"} 0\n",
            "\nkcm_list_state{list=\"1\",pool=\"b\",state=\"isolated\"} 1\n",
            "# TYPE kcm_claims_total counter\nkcm_claims_total 2\n",
            "\nkcm_ended_total 0\n",
            "\nkcm_displaced_total 0\n",
            "\nkcm_displaced_now 3\n",
            "\nkcm_intruders_now 4\n",
            "\nkcm_reclaimed_unacknowledged 7\n",
            "\nkcm_refusals_total{errno=\"EBUSY\"} 2\nkcm_refusals_total{errno=\"EINVAL\"} 1\n",
            "\nkcm_refusals_unrecorded_total 0\n",
            "\nkcm_records_dropped_total{record=\"event\"} 5\nkcm_records_dropped_total{record=\"reclaim\"} 0\n",
        ] {
            assert!(text.contains(part), "{part}\n---\n{text}");
        }
    }

    #[test]
    fn a_version_has_a_number_and_perhaps_a_commit() {
        assert_eq!(split_version("0.2.0 (1a2b3c4 2026-11-26)"), ("0.2.0", "1a2b3c4"));
        assert_eq!(split_version("0.2.0 (1a2b3c4)"), ("0.2.0", "1a2b3c4"));
        assert_eq!(split_version("0.2.0"), ("0.2.0", ""));
    }

    #[test]
    fn durations_are_counted_in_cumulative_buckets() {
        let metrics = metrics();
        for us in [4, 5, 6, 40, 2_000_000] {
            metrics.took(Duration::from_micros(us));
        }
        let text = metrics.show(&Gauges::default()).unwrap();
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
