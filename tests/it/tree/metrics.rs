//! `info/metrics` is valid text of Prometheus (format 0.0.4), with the names that `promtool check metrics` wants. Tests its
//! values.

use std::collections::{BTreeMap, BTreeSet};

use crate::harness::{Mount, Sleeper, as_nobody, errno, if_collected, until, write};
use nix::errno::Errno;

/// Values by name and labels, the labels sorted: `kcm_lists{pool="a",state="free"}`.
type Samples = BTreeMap<String, f64>;

/// A strict parser of the text format 0.0.4: it checks each rule that a text of counters, gauges and histograms can break,
/// and the rules of Prometheus for names.
fn check(text: &str) -> Result<Samples, String> {
    let mut samples = Samples::new();
    let mut families: BTreeSet<&str> = BTreeSet::new();
    let mut family = Family::default();
    for line in text.split_inclusive('\n') {
        let line = line.strip_suffix('\n').ok_or_else(|| format!("{line}: no newline"))?;
        let fail = |why: &str| Err(format!("{line}: {why}"));
        if let Some(comment) = line.strip_prefix('#') {
            let words: Vec<&str> = comment.splitn(4, ' ').collect();
            let ["", keyword @ ("TYPE" | "HELP"), name, value] = words[..] else {
                return fail("neither TYPE nor HELP");
            };
            if name != family.name {
                family.end()?;
                if !families.insert(name) {
                    return fail("a family in two places");
                }
                family = Family { name, ..Family::default() };
            }
            if family.has_samples {
                return fail("comes after a sample");
            }
            if !is_name(name) || value.is_empty() {
                return fail("no name, or nothing behind it");
            }
            let known = match keyword {
                "TYPE" if !["counter", "gauge", "histogram"].contains(&value) => {
                    return fail("not a type of these metrics");
                }
                "TYPE" => family.kind.replace(value),
                _ => family.help.replace(value),
            };
            if known.is_some() {
                return fail("twice");
            }
        } else {
            let (name, labels, value) = sample(line).ok_or_else(|| format!("{line}: no sample"))?;
            family.take(name, &labels, value).map_err(|why| format!("{line}: {why}"))?;
            let labels: Vec<String> =
                labels.iter().map(|(name, value)| format!("{name}={value:?}")).collect();
            let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
            if samples.insert(format!("{name}{labels}"), value).is_some() {
                return fail("twice");
            }
        }
    }
    family.end()?;
    Ok(samples)
}

/// The metrics of one name, while their lines are read.
#[derive(Default)]
struct Family<'a> {
    name: &'a str,
    kind: Option<&'a str>,
    help: Option<&'a str>,
    has_samples: bool,
    /// The buckets of a histogram: bound and count.
    buckets: Vec<(f64, f64)>,
    count: Option<f64>,
    sum: Option<f64>,
}

impl Family<'_> {
    fn take(
        &mut self,
        name: &str,
        labels: &BTreeMap<String, String>,
        value: f64,
    ) -> Result<(), &'static str> {
        self.has_samples = true;
        let suffix = name.strip_prefix(self.name).ok_or("not of the family above")?;
        let names: BTreeSet<&str> = labels.keys().map(String::as_str).collect();
        if suffix != "_bucket" && names.contains("le") {
            return Err("le is for buckets");
        }
        match (self.kind, suffix) {
            (Some("gauge"), "") => Ok(()),
            (Some("counter"), "") if value >= 0.0 && value.is_finite() => Ok(()),
            (Some("histogram"), "_sum") if value >= 0.0 => {
                self.sum.replace(value).map_or(Ok(()), |_| Err("two"))
            }
            (Some("histogram"), "_count") => self.count.replace(value).map_or(Ok(()), |_| Err("two")),
            (Some("histogram"), "_bucket") => {
                let bound = labels.get("le").ok_or("a bucket without le")?;
                let bound =
                    if bound == "+Inf" { f64::INFINITY } else { bound.parse().map_err(|_| "no bound")? };
                let grows = self.buckets.last().is_none_or(|last| last.0 < bound && last.1 <= value);
                self.buckets.push((bound, value));
                if grows { Ok(()) } else { Err("buckets are ascending and cumulative") }
            }
            _ => Err("not a name or a value for this type"),
        }
    }

    fn end(&self) -> Result<(), String> {
        let fail = |why: &str| Err(format!("{}: {why}", self.name));
        if !self.name.is_empty() && (self.kind.is_none() || self.help.is_none()) {
            return fail("no TYPE or no HELP");
        }
        if (self.kind == Some("counter")) != self.name.ends_with("_total") {
            return fail("_total is the end of the name of a counter");
        }
        if !self.name.is_empty() && !self.has_samples {
            return fail("no sample");
        }
        if self.kind == Some("histogram") {
            let Some(&(bound, all)) = self.buckets.last() else { return fail("no buckets") };
            if bound != f64::INFINITY || self.count != Some(all) || self.sum.is_none() {
                return fail("the last bucket is +Inf and the count, and there is a sum");
            }
        }
        Ok(())
    }
}

fn is_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// `name{label="value",…} value` without a time, which node_exporter refuses.
fn sample(line: &str) -> Option<(&str, BTreeMap<String, String>, f64)> {
    let end = line.find(['{', ' '])?;
    let (name, rest) = line.split_at(end);
    let mut labels = BTreeMap::new();
    let value = if let Some(mut rest) = rest.strip_prefix('{') {
        loop {
            let (label, behind) = rest.split_once("=\"")?;
            let end = behind.find('"')?;
            let (value, behind) = behind.split_at(end);
            // A label needs no escaping.
            if !is_name(label)
                || value.contains(['\\', '\n'])
                || labels.insert(label.into(), value.into()).is_some()
            {
                return None;
            }
            match behind.strip_prefix("\",") {
                Some(behind) => rest = behind,
                None => break behind.strip_prefix("\"} ")?,
            }
        }
    } else {
        rest.strip_prefix(' ')?
    };
    let is_number = value.chars().all(|c| c.is_ascii_digit() || ".e-+".contains(c));
    (is_name(name) && is_number).then_some(())?;
    Some((name, labels, value.parse().ok()?))
}

#[test]
fn the_checker_refuses_invalid_metrics() {
    let right = "# HELP a_total All of it.\n# TYPE a_total counter\na_total{x=\"1\",y=\"2\"} 3\n\
        a_total{x=\"1\",y=\"3\"} 0\n# HELP b_seconds B.\n# TYPE b_seconds histogram\n\
        b_seconds_bucket{le=\"0.1\"} 1\nb_seconds_bucket{le=\"+Inf\"} 2\nb_seconds_sum 0.3\nb_seconds_count 2\n";
    let samples = check(right).unwrap();
    assert_eq!(samples.get("a_total{x=\"1\",y=\"2\"}"), Some(&3.0), "{samples:?}");
    for (from, to) in [
        ("b_seconds_count 2\n", "b_seconds_count 2"),
        ("b_seconds_count 2\n", "b_seconds_count 2\n# EOF\n"),
        ("# TYPE a_total counter\n", ""),
        ("# HELP a_total All of it.\n", ""),
        ("# TYPE a_total counter\n", "# TYPE a_total counter\n# TYPE a_total counter\n"),
        ("# TYPE a_total counter", "# TYPE a counter"),
        ("# TYPE a_total counter", "# TYPE a_total stateset"),
        ("# TYPE a_total counter", "# TYPE a_total gauge"),
        ("# HELP a_total", "#HELP a_total"),
        ("a_total", "a"),
        ("b_seconds_sum 0.3\n", "# UNIT b_seconds seconds\nb_seconds_sum 0.3\n"),
        ("b_seconds_sum 0.3\n", "b_seconds_sum 0.3\n# HELP b_seconds B.\n"),
        ("a_total{x=\"1\",y=\"3\"} 0", "a_total{x=\"1\",y=\"2\"} 0"),
        ("a_total{x=\"1\",y=\"3\"} 0", "a_total{y=\"2\",x=\"1\"} 0"),
        ("a_total{x=\"1\",y=\"3\"} 0", "a_total{x=\"1\",x=\"3\"} 0"),
        ("a_total{x=\"1\",y=\"3\"} 0", "a_total{x=\"1\",y=\"3\"} -1"),
        ("a_total{x=\"1\",y=\"3\"} 0", "a_total{x=\"1\",y=\"3\"} 0 1700000000"),
        ("a_total{x=\"1\",y=\"3\"} 0", "a_total{x=\"1\",y=\"3\"}  0"),
        ("a_total{x=\"1\",y=\"3\"} 0", "a_total{x=\"1\",y=\"3\",} 0"),
        ("a_total{x=\"1\",y=\"3\"} 0", "a_total{x=1} 0"),
        ("a_total{x=\"1\",y=\"3\"} 0", "a_total 0x1"),
        ("a_total{x=\"1\",y=\"3\"} 0", "a 0"),
        ("a_total{x=\"1\",y=\"3\"} 0", "c_total 0"),
        ("a_total{x=\"1\",y=\"3\"} 0\n", "a_total 0\n\n"),
        ("b_seconds_bucket{le=\"0.1\"} 1", "b_seconds_bucket{le=\"0.1\"} 3"),
        ("b_seconds_bucket{le=\"0.1\"} 1", "b_seconds_bucket{le=\"+Inf\"} 1"),
        ("b_seconds_bucket{le=\"+Inf\"} 2\n", ""),
        ("b_seconds_count 2", "b_seconds_count 1"),
        ("b_seconds_sum 0.3\n", ""),
        (
            "b_seconds_count 2\n",
            "b_seconds_count 2\n# HELP a_total All of it.\n# TYPE a_total counter\na_total 1\n",
        ),
        ("b_seconds_count 2\n", "b_seconds_count 2\n# HELP c_total C.\n# TYPE c_total counter\n"),
    ] {
        let wrong = right.replace(from, to);
        assert_ne!(wrong, right, "{from}");
        assert!(check(&wrong).is_err(), "{wrong}");
    }
}

#[test]
fn metrics_are_always_valid_text() {
    let mount = Mount::new();
    check(&mount.read("info/metrics")).unwrap();
    mount.make_pool("dataplane", true, &["0"]);
    mount.make_pool("0-a", false, &["1"]);
    check(&mount.read("info/metrics")).unwrap();
    let task = Sleeper::new();
    write(&mount.tasks("0-a", "1"), task.pid().to_string()).unwrap();
    let _ = write(&mount.tasks("0-a", "1"), "\"x{}\\n");
    let _ = write(&mount.tasks("dataplane", "0"), "2");
    check(&mount.read("info/metrics")).unwrap();
}

#[test]
fn all_users_may_read_the_metrics() {
    let mount = Mount::new();
    mount.let_everybody_in();
    let text = as_nobody(|| mount.read("info/metrics"));
    check(&text).unwrap();
}

#[test]
fn metrics_count_lists_tasks_and_events() {
    let mount = Mount::with_dataplane();
    mount.make_pool("empty", false, &[]);
    let sample = |name: &str| {
        let samples = check(&mount.read("info/metrics")).unwrap();
        *samples.get(name).unwrap_or_else(|| panic!("no {name} in {samples:?}"))
    };
    let lists = |pool: &str, exclusive: bool, state: &str| {
        sample(&format!("kcm_lists{{exclusive=\"{exclusive}\",pool=\"{pool}\",state=\"{state}\"}}"))
    };
    let (list_0, list_1) = (mount.tasks("dataplane", "0"), mount.tasks("dataplane", "1"));
    assert_eq!((lists("dataplane", true, "free"), lists("dataplane", true, "taken")), (2.0, 0.0));
    assert_eq!((lists("empty", false, "free"), lists("empty", false, "taken")), (0.0, 0.0));

    let (a, b) = (Sleeper::new(), Sleeper::new());
    write(&list_0, a.pid().to_string()).unwrap();
    write(&list_0, a.pid().to_string()).unwrap();
    write(&list_1, a.pid().to_string()).unwrap();
    write(&list_0, b.pid().to_string()).unwrap();
    assert_eq!((lists("dataplane", true, "free"), lists("dataplane", true, "taken")), (0.0, 2.0));
    assert_eq!(sample("kcm_tasks{pool=\"dataplane\"}"), 2.0);
    assert_eq!(sample("kcm_tasks{pool=\"empty\"}"), 0.0);
    assert_eq!(sample("kcm_claims_total"), 2.0, "a repeated claim does not count");
    assert_eq!(sample("kcm_moves_total"), 1.0);

    for _ in 0..3 {
        assert_eq!(errno(write(&list_0, "0")), Errno::EBUSY);
    }
    assert_eq!(errno(write(&list_0, "x")), Errno::EINVAL);
    assert_eq!(sample("kcm_refusals_total{errno=\"EBUSY\"}"), 3.0);
    assert_eq!(sample("kcm_refusals_total{errno=\"EINVAL\"}"), 1.0);

    write(&list_0, format!("-{}", b.pid())).unwrap();
    assert_eq!(sample("kcm_releases_total"), 1.0);
    assert_eq!(sample("kcm_list_tasks{list=\"0\",pool=\"dataplane\"}"), 0.0);
    assert_eq!(sample("kcm_list_tasks{list=\"1\",pool=\"dataplane\"}"), 1.0);
    let state = |list: &str, state: &str| {
        format!("kcm_list_state{{list=\"{list}\",pool=\"dataplane\",state=\"{state}\"}}")
    };
    let now = mount.read("pools/dataplane/1/state").trim_end().to_owned();
    assert_eq!((sample(&state("0", "free")), sample(&state("1", &now))), (1.0, 1.0));
    a.end();
    until("the metrics see a death before any other read", || sample("kcm_reclaimed_total") == 1.0);
    assert_eq!(sample("kcm_reclaimed_unacknowledged"), 1.0);
    mount.sh("echo $$ > $C/pools/dataplane/0/tasks");
    // Its parent has collected it.
    assert_eq!(sample(&format!("kcm_{}_total", if_collected("ended"))), 1.0);
    assert_eq!(sample("kcm_inherited_total"), 0.0);
    assert_eq!(sample("kcm_tasks{pool=\"dataplane\"}"), 0.0);
    mount.sh("echo 18446744073709551615 > $C/info/reclaimed");
    assert_eq!(sample("kcm_reclaimed_unacknowledged"), 0.0);
}

#[test]
fn metrics_count_requests_by_duration() {
    let mount = Mount::with_shared();
    let count = || check(&mount.read("info/metrics")).unwrap()["kcm_request_duration_seconds_count"];
    let before = count();
    for _ in 0..50 {
        let _ = write(&mount.tasks("shared", "0"), "x");
    }
    let samples = check(&mount.read("info/metrics")).unwrap();
    assert!(count() >= before + 50.0);
    assert!(samples["kcm_request_duration_seconds_sum"] > 0.0, "in fractions of seconds");
    assert!(samples["kcm_request_duration_seconds_sum"] < 20.0, "in seconds");
}
