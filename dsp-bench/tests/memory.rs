//! The memory of a training step grows with the sequence's length, not with its square, under every strategy.
//!
//! A test binary of its own, with one test: the allocator counts for the whole process.

#![allow(clippy::unwrap_used, reason = "a test whose helper fails has failed")]

use std::collections::BTreeMap;

use dsp_bench::allocator::CountingAllocator;
use dsp_bench::compare::{Comparer, Meter};
use dsp_bench::progress::Progress;
use dsp_bench::record::Outcome;
use dsp_bench::scenario::{ModelSizes, Scenario};

#[global_allocator]
static MEMORY: CountingAllocator = CountingAllocator::new();

struct Counted;

impl Meter for Counted {
    fn reset_peak(&self) -> u64 {
        MEMORY.reset_peak() as u64
    }

    fn peak(&self) -> u64 {
        MEMORY.peak_bytes() as u64
    }

    fn set_recording(&self, _recording: bool) {}
}

/// The most that a step of one layer holds beyond what was there before it, by strategy and ranks.
fn peaks(scenario: &str, tokens: usize) -> BTreeMap<(String, usize), u64> {
    let mut scenario = Scenario::load(scenario).unwrap();
    (scenario.min_repeats, scenario.max_repeats) = (1, 1);
    scenario.ranks = vec![2];
    let ModelSizes::Language(sizes) = &mut scenario.model else {
        panic!("{} is no language model", scenario.name);
    };
    (sizes.tokens, sizes.depth) = (tokens, 1);
    (sizes.hidden, sizes.inner) = (32, 64);
    (sizes.heads, sizes.key_value_heads) = (2, 2);
    scenario.check("the test").unwrap();
    let comparer = Comparer::new(scenario).unwrap();
    let quiet = Progress::lines(comparer.cases().len() as u64, Box::new(std::io::sink()));
    let comparison = comparer.run(&quiet, &Counted).unwrap();
    let timed = comparison.rows.iter().filter_map(|row| match &row.outcome {
        Outcome::Timed(measured) => {
            let memory = &measured.memory;
            let held = memory.peak_bytes - memory.before_bytes;
            Some(((row.strategy.clone(), row.ranks), held))
        }
        Outcome::Refused { .. } => None,
        other => panic!("{}: {other:?}", row.case()),
    });
    timed.collect()
}

#[test]
fn four_times_the_length_takes_four_times_the_memory_of_a_step_under_every_strategy() {
    for (scenario, strategies) in [("lm", 6), ("linear-lm", 5)] {
        let (short, long) = (peaks(scenario, 1024), peaks(scenario, 4096));
        assert!(short.len() >= strategies, "{scenario}: {short:?}");
        assert!(short.keys().eq(long.keys()), "{short:?}, then {long:?}");
        for (case, short) in short {
            let long = long[&case];
            // All scores at once would take sixteen times as much: 128 MiB of the longer sequence's two heads.
            assert!(
                long <= 4 * short + (4 << 20),
                "{scenario}, {case:?}: {short} bytes, then {long}"
            );
        }
    }
}
