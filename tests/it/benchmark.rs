//! The arithmetic and the table of the benchmark (`scripts/bench`), which has no tests of its own.

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
