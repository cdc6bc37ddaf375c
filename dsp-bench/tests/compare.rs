//! The main job, on a model small enough for a test.

#![allow(clippy::unwrap_used, reason = "a test whose helper fails has failed")]

use dsp_bench::compare::{Comparer, Meter};
use dsp_bench::progress::Progress;
use dsp_bench::record::{Comparison, Outcome};
use dsp_bench::scenario::Scenario;
use dsp_bench::{report, table};

/// No allocator and no trace.
struct Nothing;

impl Meter for Nothing {
    fn reset_peak(&self) -> u64 {
        0
    }

    fn peak(&self) -> u64 {
        0
    }

    fn set_recording(&self, _recording: bool) {}
}

fn compare(change: impl Fn(&mut Scenario)) -> Comparison {
    let mut scenario = Scenario::load("small").unwrap();
    (scenario.min_repeats, scenario.max_repeats) = (2, 2);
    change(&mut scenario);
    scenario.check("the test").unwrap();
    let comparer = Comparer::new(scenario).unwrap();
    let quiet = Progress::lines(comparer.cases().len() as u64, Box::new(std::io::sink()));
    comparer.run(&quiet, &Nothing).unwrap()
}

#[test]
fn every_strategy_is_exact_and_sends_what_its_formula_says_on_the_clip() {
    let comparison = compare(|_| {});
    assert!(comparison.all_well(), "{}", comparison.finding());
    // Serial once, the others on one to four ranks: none refuses two axes and four heads.
    let others = dsp_strategies::all().len() - 1;
    assert_eq!(comparison.timed().count(), 1 + 4 * others);
    assert_eq!(comparison.rows.len(), 1 + 4 * others);
    for (row, measured) in comparison.timed().filter(|(row, _)| row.ranks > 1) {
        assert!(measured.traffic.busiest_rank_bytes() > 0, "{}", row.case());
    }
    assert!(table::render(&comparison).contains("Ulysses"));
    assert!(report::render(&comparison, None).unwrap().contains("<svg"));
}

#[test]
fn a_forward_pass_alone_is_compared_without_gradients() {
    let comparison = compare(|scenario| {
        scenario.passes = dsp_bench::scenario::Passes::Forward;
        scenario.ranks = vec![3];
    });
    assert!(comparison.all_well(), "{}", comparison.finding());
    for (row, measured) in comparison.timed() {
        assert!(measured.equality.input_gradient.is_none(), "{}", row.case());
        assert_eq!(measured.traffic.total().measured_bytes > 0, row.ranks > 1);
    }
}

#[test]
fn a_case_that_a_strategy_cannot_run_is_a_row_with_the_reason() {
    let comparison = compare(|scenario| scenario.ranks = vec![5]);
    // Five ranks, four heads.
    let others = dsp_strategies::all();
    let others = others.iter().filter(|strategy| strategy.name() != "serial");
    for (row, strategy) in comparison.rows[1..].iter().zip(others) {
        assert_eq!(row.strategy, strategy.name());
        match (&row.outcome, strategy.name()) {
            (Outcome::Refused { reason }, "ulysses") => {
                assert_eq!(row.case(), "Ulysses on 5 ranks");
                assert!(reason.contains("4 query heads over 5 ranks"), "{reason}");
            }
            (Outcome::Timed(_), name) if name != "ulysses" => {}
            (outcome, name) => panic!("{name}: {outcome:?}"),
        }
    }
    assert_eq!(comparison.rows.len(), dsp_strategies::all().len());
    assert!(comparison.all_well());
}
