//! The arithmetic and the tables of the benchmark (`scripts/bench`) and of the attacks (`scripts/attack`), which have no
//! tests of their own.

#[path = "../../benches/speed/columns.rs"]
mod columns;
#[allow(dead_code, reason = "only the attacks use all of it")]
#[path = "../../benches/attack/report.rs"]
mod report;
#[allow(dead_code, reason = "only the benchmark uses all of it")]
#[path = "../../benches/speed/stats.rs"]
mod stats;
#[allow(dead_code, reason = "only the benchmark uses all of it")]
#[path = "../../benches/speed/table.rs"]
mod table;

use stats::{Rounds, Samples};
use table::{Row, Target};

#[test]
fn median_and_slowest_percentile() {
    let samples = Samples::new((1..=1000).rev().map(f64::from).collect());
    assert_eq!((samples.median(), samples.p99(), samples.len()), (500.0, 990.0, 1000));
    assert_eq!(Samples::new(vec![7.0]).p99(), 7.0);
    assert_eq!(Samples::new(vec![3.0, 1.0]).median(), 1.0);
    assert!(Samples::default().median().is_nan());
}

#[test]
fn contenders_are_compared_per_round() {
    let rounds = |medians: [f64; 3]| {
        let mut rounds = Rounds::default();
        medians.into_iter().for_each(|median| rounds.push(Samples::new(vec![median])));
        rounds
    };
    // The machine was busy in the last round: both were slow, so that round must not change the ratio.
    let (ours, theirs) = (rounds([20.0, 22.0, 900.0]), rounds([10.0, 11.0, 300.0]));
    assert_eq!(ours.ratio(&theirs, Samples::median), 2.0);
    assert_eq!(ours.all().median(), 22.0);
    assert_eq!(ours.difference(&theirs, Samples::median), 11.0);
    // A round without a measurement is ignored.
    assert_eq!(ours.ratio(&rounds([10.0, 11.0, 0.0]), Samples::median), 2.0);
}

#[test]
fn a_row_is_worse_only_beyond_noise() {
    let row = |ratio, target| Row { ratio, target, ..row() };
    assert!(row(2.5, Target::AtMost(2.5)).is_met() && !row(2.6, Target::AtMost(2.5)).is_met());
    assert!(row(0.5, Target::AtLeast(0.5)).is_met() && !row(0.4, Target::AtLeast(0.5)).is_met());
    assert!(row(9.0, Target::Within(42.0)).is_met() && !row(0.0, Target::Within(41.0)).is_met());
    assert!(!row(2.2, Target::AtMost(2.5)).is_worse_than(1.6));
    assert!(row(2.5, Target::AtMost(2.5)).is_worse_than(1.6), "although it meets its target");
    assert!(!row(0.6, Target::AtLeast(0.5)).is_worse_than(0.9));
    assert!(row(0.4, Target::AtLeast(0.5)).is_worse_than(0.9));
    assert!(!row(99.0, Target::Informational).is_worse_than(1.0));
}

#[test]
fn committed_rows_are_read_from_the_document() {
    let rows = [row(), Row { name: "other".into(), ratio: f64::NAN, ..row() }];
    let document = format!("# Performance\n\nWords.\n\n{}\nMore.\n", table::markdown(&rows));
    assert_eq!(table::committed(&document), [("claim-first".to_owned(), 2.0)]);
    assert!(table::text(&rows).lines().count() == 3);
    assert_eq!(table::notes(&rows), "- **claim-first**: as it is\n", "each note only once");
}

fn row() -> Row {
    Row {
        name: "claim-first".into(),
        work: "first claim".into(),
        kcm: 42.0,
        kcm_p99: Some(99.0),
        beside: "empty".into(),
        theirs: 21.0,
        theirs_p99: None,
        unit: "µs",
        ratio: 2.0,
        target: Target::AtMost(2.5),
        note: "as it is".into(),
    }
}

#[test]
fn an_aim_is_held_by_claims_and_reads_at_p99_and_at_worst() {
    // 200 samples: the slowest percent is two of them.
    let samples = |slow: f64, worst: f64| Samples::new([vec![1.0; 196], vec![slow; 3], vec![worst]].concat());
    let (good, slow, worst) = (samples(50.0, 250.0), samples(51.0, 250.0), samples(50.0, 251.0));
    let held = |claims: &Samples, reads: &Samples| {
        let kcm = report::Beside { claims: claims.clone(), reads: reads.clone(), attacker: None };
        report::Row { kcm, ..report::Row::default() }.is_held()
    };
    assert!(held(&good, &good));
    for bad in [&slow, &worst, &Samples::default()] {
        assert!(!held(bad, &good) && !held(&good, bad), "{bad:?}");
    }
    let kcm = report::Beside { claims: good.clone(), reads: good, attacker: Some((1, 2)) };
    let row =
        report::Row { name: "heirs", kcm, faults: vec!["a read hung".into()], ..report::Row::default() };
    assert!(!row.is_held(), "good figures do not make up for a fault");
    let hung = Samples::new(vec![1.0, f64::INFINITY]);
    let kcm = report::Beside { claims: hung, ..row.kcm.clone() };
    let limited = report::Row { kcm, faults: Vec::new(), limit: Some("why"), ..row.clone() };
    assert!(limited.is_accepted() && !limited.is_held(), "its reads hold");
    assert!(!report::Row { limit: None, ..limited.clone() }.is_accepted());
    assert!(report::table(&[limited]).contains("1.0, hung, hung"));
    let table = report::table(std::slice::from_ref(&row));
    assert!(table.contains("heirs") && table.contains("1.0, 50, 250") && table.contains("**no**"), "{table}");
    assert!(report::notes(&[row]).contains("kcm: 1 done, 2 refused; empty FUSE: unknown"));
}
