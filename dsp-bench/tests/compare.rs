//! The main job, on a model small enough for a test.

#![allow(clippy::unwrap_used, reason = "a test whose helper fails has failed")]

mod common;

use std::io::Write;
use std::sync::{Arc, Mutex};

use common::{Refusal, softmax_refusal};
use dsp_bench::compare::{Comparer, Meter};
use dsp_bench::progress::Progress;
use dsp_bench::record::{Comparison, Outcome};
use dsp_bench::scenario::{ModelKind, ModelSizes, Scenario};
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
    compare_in(Scenario::load("small").unwrap(), change)
}

fn compare_in(mut scenario: Scenario, change: impl Fn(&mut Scenario)) -> Comparison {
    (scenario.min_repeats, scenario.max_repeats) = (2, 2);
    change(&mut scenario);
    scenario.check("the test").unwrap();
    let comparer = Comparer::new(scenario).unwrap();
    let quiet = Progress::lines(comparer.cases().len(), Box::new(std::io::sink()));
    comparer.run(&quiet, &Nothing).unwrap()
}

/// The strategies beside serial.
fn others() -> usize {
    dsp_strategies::all().len() - 1
}

/// Serial and `cases` others: timed, but refused where `refusal` says so and for that reason.
fn assert_refusals(
    comparison: &Comparison,
    cases: usize,
    refusal: impl Fn(&str, usize) -> Refusal,
) {
    assert_eq!(comparison.rows.len(), 1 + cases);
    for row in &comparison.rows {
        match (&row.outcome, refusal(&row.strategy, row.ranks)) {
            (Outcome::Timed(_), None) => {}
            (Outcome::Refused { reason }, Some(words)) => {
                assert!(reason.contains(words), "{}: {reason}", row.case());
            }
            (outcome, expected) => panic!("{}: {expected:?}, but {outcome:?}", row.case()),
        }
    }
}

#[test]
fn every_strategy_is_exact_and_sends_what_its_formula_says_on_the_clip() {
    let comparison = compare(|_| {});
    assert!(comparison.all_well(), "{}", comparison.finding());
    assert_refusals(&comparison, 4 * others(), |strategy, ranks| {
        softmax_refusal(strategy, 2, 4, ranks)
    });
    for (row, measured) in comparison.timed().filter(|(row, _)| row.ranks > 1) {
        assert!(measured.traffic.busiest_rank_bytes() > 0, "{}", row.case());
    }
    assert!(table::render(&comparison).contains("Ulysses"));
    assert!(report::render(&comparison, None).unwrap().contains("<svg"));
}

/// What a comparison did, in order: its lines of progress, and what it asked of the meter.
#[derive(Clone, Default)]
struct Told(Arc<Mutex<Vec<String>>>);

impl Told {
    fn note(&self, line: &str) {
        self.0.lock().unwrap().push(line.trim_end().to_owned());
    }
}

impl Write for Told {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        for line in text.lines().filter(|line| line.contains("round ")) {
            // Without the time that it took.
            self.note(line.rsplit_once(": ").unwrap().0);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Meter for Told {
    fn reset_peak(&self) -> u64 {
        30
    }

    fn peak(&self) -> u64 {
        70
    }

    fn set_recording(&self, recording: bool) {
        if recording {
            self.note("traced");
        }
    }
}

#[test]
fn the_cases_take_turns_there_and_back_and_the_first_round_is_traced() {
    let compiled = dsp_strategies::all();
    let mut names = compiled.iter().map(|strategy| strategy.name());
    let runs = |name: &&str| *name != "serial" && softmax_refusal(name, 2, 4, 2).is_none();
    let Some(name) = names.find(runs) else {
        return;
    };
    let mut scenario = Scenario::load("small").unwrap();
    (scenario.min_repeats, scenario.max_repeats) = (3, 3);
    scenario.ranks = vec![2, 3];
    scenario.strategies = Some(vec![name.to_owned()]);
    let comparer = Comparer::new(scenario).unwrap();
    let told = Told::default();
    // A line comes in pieces, without this.
    let writer = std::io::LineWriter::new(told.clone());
    let progress = Progress::lines(comparer.cases().len(), Box::new(writer));
    let comparison = comparer.run(&progress, &told).unwrap();
    for (row, measured) in comparison.timed() {
        let memory = (measured.memory.before_bytes, measured.memory.peak_bytes);
        assert_eq!(memory, (30, 70), "{}", row.case());
        assert_eq!(measured.time.repeats_seconds.len(), 3, "{}", row.case());
    }
    assert_eq!(comparison.rounds(), 3);
    let there = ["serial on 1 rank", "NAME on 2 ranks", "NAME on 3 ranks"];
    let there = there.map(|case| case.replace("NAME", name));
    let there = |round| there.iter().map(move |case| (case, round));
    let order = there(1).chain(there(2).rev()).chain(there(3));
    let expected = order.zip(1..).flat_map(|((case, round), number)| {
        let line = format!("[{number}/9] {case}, round {round}");
        [(round == 1).then(|| "traced".to_owned()), Some(line)]
    });
    let expected: Vec<String> = expected.flatten().collect();
    assert_eq!(*told.0.lock().unwrap(), expected);
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
    assert_refusals(&comparison, others(), |strategy, ranks| {
        softmax_refusal(strategy, 2, 4, ranks)
    });
    let ulysses = comparison.rows.iter().find(|row| row.strategy == "ulysses");
    if let Some(row) = ulysses {
        let reason = "4 query heads over 5 ranks";
        assert!(
            matches!(&row.outcome, Outcome::Refused { reason: found } if found.contains(reason))
        );
    }
    assert!(comparison.all_well());
}

#[test]
fn mixtures_are_compared_and_one_whose_part_is_not_there_is_refused() {
    let others = ["dsp", "ulysses"];
    let compiled = |name: &str| dsp_strategies::by_name(name).is_ok();
    let comparison = compare(|scenario| {
        scenario.ranks = vec![2];
        scenario.mixtures = vec!["dsp+ulysses".into(), "dsp+nothing".into()];
    });
    assert!(comparison.all_well(), "{}", comparison.finding());
    let [.., mixture, absent] = &comparison.rows[..] else {
        panic!("{:?}", comparison.rows);
    };
    assert_eq!(mixture.strategy, "dsp+ulysses");
    assert_eq!(
        matches!(mixture.outcome, Outcome::Timed(_)),
        others.into_iter().all(compiled)
    );
    let Outcome::Refused { reason } = &absent.outcome else {
        panic!("{:?}", absent.outcome);
    };
    assert!(reason.contains("\"nothing\""), "{reason}");
}

#[test]
fn a_strategy_that_is_asked_for_and_not_there_ends_the_comparison_before_any_work() {
    let mut scenario = Scenario::load("small").unwrap();
    scenario.strategies = Some(vec!["serial+nothing".into()]);
    let error = Comparer::new(scenario).unwrap_err().to_string();
    assert!(
        error.contains("\"nothing\"") && error.contains("serial"),
        "{error}"
    );
}

#[test]
fn the_weather_model_is_compared_on_the_fields_and_named_in_what_is_shown() {
    let small = Scenario::load("small").unwrap();
    let comparison = compare_in(small.with_model(ModelKind::Weather).unwrap(), |scenario| {
        scenario.ranks = vec![3];
        let ModelSizes::Weather(sizes) = &mut scenario.model else {
            panic!("{:?}", scenario.model);
        };
        (sizes.times, sizes.latitudes, sizes.longitudes) = (4, 7, 5);
        (sizes.hidden, sizes.heads, sizes.depth) = (16, 4, 1);
    });
    assert!(comparison.all_well(), "{}", comparison.finding());
    let weather = |strategy: &str, ranks| match strategy {
        // The scenario's mixture is DSP here, if both are compiled in.
        "dsp+ulysses" => match dsp_strategies::by_name(strategy) {
            Ok(_) => None,
            Err(_) => Some("no strategy is called"),
        },
        _ => softmax_refusal(strategy, 3, 4, ranks),
    };
    assert_refusals(&comparison, others() + 1, weather);
    for shown in [
        table::render(&comparison),
        report::render(&comparison, None).unwrap(),
    ] {
        assert!(shown.contains("axial weather model"), "{shown}");
        assert!(
            !shown.contains("STDiT") && !shown.contains("video"),
            "{shown}"
        );
    }
}

#[test]
fn what_is_to_be_written_and_cannot_be_is_said_before_anything_is_computed() {
    for option in ["--json", "--report"] {
        let folder = tempfile::tempdir().unwrap();
        let mut dsp = std::process::Command::new(env!("CARGO_BIN_EXE_dsp"));
        dsp.current_dir(folder.path());
        let output = dsp.args(["compare", "--scenario", "small", option, "none/there"]);
        let output = output.output().unwrap();
        assert!(!output.status.success());
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(errors.contains("cannot write none/there"), "{errors}");
        assert!(output.stdout.is_empty(), "a table was shown first");
    }
}
