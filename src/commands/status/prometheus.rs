//! The status as text for Prometheus.
//!
//! Owns the names, labels and help texts. Does not know how the status is found out.

use anyhow::Error;
use prometheus::{
    Registry, TextEncoder, register_int_gauge_vec_with_registry, register_int_gauge_with_registry,
};

use super::{Report, State};

/// Returns whether the daemon answers and which checks are ok, followed by the metrics of the daemon.
///
/// # Errors
/// A name is not valid, or used twice. A test shows that none is.
pub(super) fn text(report: &Report) -> Result<String, Error> {
    let registry = Registry::new();
    let help = "Whether a daemon serves the directory and answers.";
    let answers = matches!(report.state, State::Healthy | State::Problems);
    register_int_gauge_with_registry!("kcm_up", help, registry)?.set(i64::from(answers));
    let (help, labels) = ("Whether a check of kcm status has found no problem.", &["check"]);
    let ok = register_int_gauge_vec_with_registry!("kcm_check_ok", help, labels, registry)?;
    let help = "The problems that a check of kcm status has found.";
    let problems = register_int_gauge_vec_with_registry!("kcm_check_problems", help, labels, registry)?;
    for check in &report.checks {
        let count = report.problems.iter().filter(|problem| problem.check == *check).count();
        ok.with_label_values(&[check]).set(i64::from(count == 0));
        problems.with_label_values(&[check]).set(count as i64);
    }
    Ok(TextEncoder::new().encode_to_string(&registry.gather())? + &report.metrics)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::Problem;
    use super::*;

    #[test]
    fn each_check_has_its_result() {
        let problems = vec![Problem::new("masks", "a"), Problem::new("masks", "b")];
        let report = Report {
            checks: ["masks", "cpus"].map(str::to_owned).into(),
            metrics: "# of the daemon\n".to_owned(),
            ..Report::new(State::Problems, Path::new("/etc/kcm"), problems)
        };
        let text = text(&report).unwrap();
        for part in [
            "# TYPE kcm_up gauge\nkcm_up 1\n",
            "kcm_check_ok{check=\"cpus\"} 1\nkcm_check_ok{check=\"masks\"} 0\n",
            "kcm_check_problems{check=\"cpus\"} 0\nkcm_check_problems{check=\"masks\"} 2\n",
        ] {
            assert!(text.contains(part), "{part}\n---\n{text}");
        }
        assert!(
            text.ends_with("} 2\n# of the daemon\n") || text.ends_with("kcm_up 1\n# of the daemon\n"),
            "{text}"
        );
    }

    #[test]
    fn without_an_answer_kcm_is_not_up() {
        for state in [State::NotRunning, State::NotAnswering] {
            let report = Report::new(state, Path::new("/etc/kcm"), vec![Problem::new("mount", "x")]);
            let text = text(&report).unwrap();
            assert!(
                text.contains("\nkcm_up 0\n") && text.contains("kcm_check_ok{check=\"mount\"} 0\n"),
                "{text}"
            );
        }
    }
}
