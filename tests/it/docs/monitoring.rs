//! The files in `deploy/monitoring`, and the metrics, are right in the eyes of Prometheus.
//!
//! `promtool` is the program of Prometheus that checks them; `scripts/test` puts it into `target/tools`.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::harness::{KCM, Mount, Sleeper, run, write};
use serde_json::Value;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn monitoring(file: &str) -> PathBuf {
    Path::new(ROOT).join("deploy/monitoring").join(file)
}

fn promtool(args: &[&str]) -> Command {
    let own = Path::new(ROOT).join("target/tools/promtool");
    let mut command = Command::new(if own.exists() { own.as_os_str() } else { "promtool".as_ref() });
    command.args(args);
    command
}

/// Runs promtool with this input; it has to have nothing to say but that all is well.
fn accepts(mut command: Command, input: &str) {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("promtool: {error}; run scripts/test"));
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n---\n{input}");
}

/// The text for Prometheus, of a mount on which something has happened.
fn metrics(mount: &Mount) -> String {
    let task = Sleeper::new();
    write(&mount.tasks("dataplane", "0"), task.pid().to_string()).unwrap();
    assert!(write(&mount.tasks("dataplane", "0"), "x").is_err());
    let (out, err, status) = run(&mut mount.kcm(&["status", "--prometheus", "--timeout=60"]));
    assert_eq!((err.as_str(), status), ("", Some(0)));
    out
}

#[test]
fn promtool_accepts_the_metrics() {
    let mount = Mount::with_dataplane();
    let text = metrics(&mount);
    accepts(promtool(&["check", "metrics"]), &text);
    for part in ["\nkcm_up 1\n", "\nkcm_list_tasks{list=\"0\",pool=\"dataplane\"} 1\n"] {
        assert!(text.contains(part), "{text}");
    }
    // It is not lenient.
    let mut refuses = promtool(&["check", "metrics"]);
    refuses.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut refuses = refuses.spawn().unwrap();
    refuses.stdin.take().unwrap().write_all(b"# TYPE kcm_claims counter\nkcm_claims_total 1\n").unwrap();
    assert!(!refuses.wait().unwrap().success());
    let _paused = mount.pause();
    let (out, _, status) = run(&mut mount.kcm(&["status", "--prometheus"]));
    assert_eq!(status, Some(0), "{out}");
    assert!(out.contains("\nkcm_up 0\n") && out.contains("\nkcm_check_ok{check=\"mount\"} 0\n"), "{out}");
    accepts(promtool(&["check", "metrics"]), &out);
}

#[test]
fn promtool_accepts_and_tests_the_alert_rules() {
    let (rules, tests) = (monitoring("alerts.yaml"), monitoring("alerts_test.yaml"));
    accepts(promtool(&["check", "rules", rules.to_str().unwrap()]), "");
    accepts(promtool(&["test", "rules", tests.to_str().unwrap()]), "");
    let tests = fs::read_to_string(tests).unwrap();
    for alert in alerts() {
        assert!(tests.contains(&format!("alertname: {alert} }}\n")), "{alert}: no time without the alert");
        assert!(tests.contains(&format!("alertname: {alert}\n        exp_alerts:\n")), "{alert}: no alert");
    }
}

fn alerts() -> Vec<String> {
    let rules = fs::read_to_string(monitoring("alerts.yaml")).unwrap();
    let alerts = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: "));
    let alerts: Vec<String> = alerts.map(str::to_owned).collect();
    assert!(alerts.len() > 10, "{alerts:?}");
    alerts
}

/// The queries of the dashboard, with values for its variables.
fn queries() -> Vec<String> {
    let dashboard: Value = serde_json::from_slice(&fs::read(monitoring("dashboard.json")).unwrap()).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap());
    let queries: Vec<String> = targets
        .map(|target| target["expr"].as_str().unwrap())
        .map(|query| query.replace("$__rate_interval", "5m").replace("$instance", ".*"))
        .collect();
    assert!(queries.len() > 15, "{queries:?}");
    queries
}

#[test]
fn promtool_accepts_the_queries_of_the_dashboard() {
    let home = tempfile::tempdir().unwrap();
    let rules = home.path().join("queries.yaml");
    let rule = |(n, query): (usize, &String)| serde_json::json!({ "record": format!("q{n}"), "expr": query });
    let all: Vec<Value> = queries().iter().enumerate().map(rule).collect();
    let text = serde_json::json!({ "groups": [{ "name": "queries", "rules": all }] }).to_string();
    fs::write(&rules, text).unwrap();
    accepts(promtool(&["check", "rules", rules.to_str().unwrap()]), "");
}

/// The names of kcm's metrics in a text.
fn names(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let names = words.filter(|word| word.starts_with("kcm_"));
    names.map(|name| name.strip_suffix("_bucket").unwrap_or(name).to_owned()).collect()
}

#[test]
fn rules_and_dashboard_use_metrics_that_exist() {
    let page = fs::read_to_string(Path::new(ROOT).join("docs/metrics.md")).unwrap();
    let known = page.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
    let known: BTreeSet<String> = known.map(|(name, _)| name.to_owned()).collect();
    let rules = fs::read_to_string(monitoring("alerts.yaml")).unwrap();
    let shown = names(&queries().join("\n"));
    for (place, used) in [("alerts.yaml", names(&rules)), ("dashboard.json", shown.clone())] {
        let unknown: Vec<_> = used.difference(&known).collect();
        assert!(unknown.is_empty(), "{place}: {unknown:?}");
    }
    // The dashboard shows all of them.
    let of_kcm: BTreeSet<_> = known.into_iter().filter(|name| name.starts_with("kcm_")).collect();
    let missing: Vec<_> = of_kcm.difference(&shown).filter(|name| *name != "kcm_check_ok").collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn the_service_replaces_the_file_of_the_collector() {
    let mount = Mount::with_dataplane();
    let home = tempfile::tempdir().unwrap();
    let service = fs::read_to_string(monitoring("kcm-metrics.service")).unwrap();
    let line = service.lines().find_map(|line| line.strip_prefix("ExecStart=/bin/sh -ec '")).unwrap();
    let line = line.strip_suffix('\'').unwrap();
    // The line names neither the directory of the test nor its program.
    let line = line.replace("kcm status", "\"$KCM\" status --timeout=60 --conf-dir=\"$C\"");
    let write = || {
        let mut shell = Command::new("/bin/sh");
        shell.args(["-ec", &line]).env("KCM", KCM).env("C", mount.conf()).current_dir(home.path());
        let (out, err, status) = run(&mut shell);
        (out + &err, status)
    };
    for _ in 0..2 {
        assert_eq!(write(), (String::new(), Some(0)));
        let files: Vec<_> =
            fs::read_dir(home.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(files, ["kcm.prom"]);
    }
    assert!(fs::read_to_string(home.path().join("kcm.prom")).unwrap().contains("\nkcm_up 1\n"));
    for unit in ["kcm-metrics.service", "kcm-metrics.timer"] {
        let text = fs::read_to_string(monitoring(unit)).unwrap();
        assert!(text.contains("\nDescription=Metrics of kcm for node_exporter"), "{unit}");
    }
}
