//! The axial weather model: every strategy gives what one rank gives, to 1e-10 in f64, and sends what the formulas
//! say; a forecast knows no later time; the loss counts by area; weights come back.
#![cfg(feature = "flex")]
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot build its model has failed"
)]

mod common;

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;

use burn::tensor::{DType, Device};
use common::weather::{End, WeatherCase};
use common::{LossFrom, Run, Values, softmax_strategies};
use dsp_core::SequenceParallel;
use dsp_core::strategy::{OutputLayout, PlanError};
use dsp_models::error::ConfigError;
use dsp_models::random::{Draws, Purpose};
use dsp_models::weather::{Grid, TimeMask, WeatherConfig};
use dsp_models::weights::{Weights, cast, load, named_parameters, save};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

/// f64 sums in another order differ by some 1e-15 of their terms; a mistake is no smaller than 1e-6.
const TOLERANCE: f64 = 1e-10;

/// A tiny model and grid; every field shrinks towards what a person can draw.
#[derive(Debug, Clone)]
struct Tiny {
    ranks: usize,
    /// Times, latitudes, longitudes.
    size: [usize; 3],
    batch: usize,
    variables: usize,
    heads: usize,
    head_dim: usize,
    depth: usize,
    time_mask: TimeMask,
    qk_norm: bool,
    output: OutputLayout,
    end: End,
    switch_parts: NonZeroUsize,
    seed: u64,
}

fn tiny() -> impl Strategy<Value = Tiny> {
    let sizes = (
        1..=5_usize,
        [1..=5_usize, 1..=6_usize, 1..=6_usize],
        1..=2_usize,
        1..=3_usize,
    );
    let model = (
        1..=5_usize,
        prop_oneof![Just(2_usize), Just(4)],
        1..=2_usize,
        any::<bool>(),
        prop_oneof![Just(TimeMask::Causal), Just(TimeMask::Full)],
    );
    let run = (
        prop_oneof![Just(OutputLayout::Free), Just(OutputLayout::AsInput)],
        prop_oneof![
            Just(End::Forecast),
            Just(End::Cotangent(LossFrom::Shard)),
            Just(End::Cotangent(LossFrom::Whole)),
        ],
        (1..=3_usize).prop_map(|parts| NonZeroUsize::new(parts).unwrap()),
        0..1000_u64,
    );
    (sizes, model, run).prop_map(|(sizes, model, (output, end, switch_parts, seed))| {
        let (ranks, size, batch, variables) = sizes;
        let (heads, head_dim, depth, qk_norm, time_mask) = model;
        Tiny {
            ranks,
            size,
            batch,
            variables,
            heads,
            head_dim,
            depth,
            time_mask,
            qk_norm,
            output,
            end,
            switch_parts,
            seed,
        }
    })
}

impl Tiny {
    fn config(&self) -> WeatherConfig {
        WeatherConfig::new(self.variables)
            .with_hidden_size(self.heads * self.head_dim)
            .with_num_heads(self.heads)
            .with_depth(self.depth)
            .with_mlp_ratio(2.0)
            .with_qk_norm(self.qk_norm)
            .with_time_mask(self.time_mask)
            .with_harmonics(2)
    }

    /// Rows from pole to pole, one of them at the south pole, and columns a third of the way round.
    fn grid(&self) -> Grid {
        let [times, rows, columns] = self.size;
        let step = 175.0 / rows as f64;
        let seasons = |sample: usize| (0..times).map(move |t| (t + 5 * sample) as f64 / 12.0);
        Grid::new(
            (0..rows).map(|row| -90.0 + step * row as f64).collect(),
            (0..columns).map(|column| 20.0 * column as f64).collect(),
            (0..self.batch)
                .map(|sample| seasons(sample).collect())
                .collect(),
        )
        .unwrap()
    }

    fn case(&self) -> Arc<WeatherCase> {
        let config = self.config();
        let template = config.init(self.seed, &Device::flex()).unwrap();
        let [times, rows, columns] = self.size;
        let shape = [self.batch, times, rows, columns, self.variables];
        let mut draws = Draws::new(self.seed, Purpose::Other, 0);
        let mut values = || Values::new(&shape, draws.normals(shape.iter().product()));
        Arc::new(WeatherCase {
            template: cast(template, DType::F64),
            fields: values(),
            other: values(),
            grid: self.grid(),
            end: self.end,
            output: self.output,
            switch_parts: self.switch_parts,
            config,
        })
    }
}

fn check(
    strategy: &Arc<dyn SequenceParallel>,
    ranks: usize,
    case: &Arc<WeatherCase>,
    alone: &Run,
) -> Result<(), TestCaseError> {
    let run = case
        .run(strategy, ranks)
        .map_err(|error| TestCaseError::fail(error.to_string()))?;
    let name = strategy.name();
    prop_assert_eq!(
        run.found.keys().collect::<Vec<_>>(),
        alone.found.keys().collect::<Vec<_>>()
    );
    for (tensor, found) in &run.found {
        let error = found.error(&alone.found[tensor]);
        prop_assert!(
            error <= TOLERANCE,
            "{name} on {ranks} ranks: {tensor} is off by {error:e}"
        );
    }
    for (rank, account) in run.accounts.iter().enumerate() {
        for (what, (sent, formula)) in [
            ("forward", account.forward),
            ("backward", account.backward),
            ("gather", account.gather),
            ("reduction", account.reduce),
        ] {
            prop_assert_eq!(
                sent,
                formula,
                "{} rank {} of {}: {}",
                name,
                rank,
                ranks,
                what
            );
        }
    }
    Ok(())
}

fn everything_is_equal(tiny: &Tiny) -> Result<(), TestCaseError> {
    let case = tiny.case();
    let [alone, others @ ..] = &softmax_strategies()[..] else {
        return Err(TestCaseError::fail("no strategy is compiled in"));
    };
    let serial = case
        .run(alone, 1)
        .map_err(|error| TestCaseError::fail(error.to_string()))?;
    let [times, rows, columns] = tiny.size;
    let shape = case.config.shape(tiny.batch, times, rows, columns);
    for strategy in others {
        match strategy.plan(&shape, tiny.ranks) {
            Ok(_) => check(strategy, tiny.ranks, &case, &serial)?,
            Err(PlanError::Heads { heads, ranks, .. }) => prop_assert!(heads < ranks),
            Err(error) => return Err(TestCaseError::fail(error.to_string())),
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig {
        // 64, or a quarter of what the environment asks for.
        cases: ProptestConfig::default().cases / 4,
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        ..ProptestConfig::default()
    })]

    #[test]
    fn every_strategy_gives_the_serial_forecast_and_gradients_and_sends_what_the_formulas_say(tiny in tiny()) {
        everything_is_equal(&tiny)?;
    }
}

fn small(ranks: usize) -> Tiny {
    Tiny {
        ranks,
        size: [3, 5, 4],
        batch: 2,
        variables: 2,
        heads: 4,
        head_dim: 4,
        depth: 2,
        time_mask: TimeMask::Causal,
        qk_norm: true,
        output: OutputLayout::Free,
        end: End::Forecast,
        switch_parts: NonZeroUsize::MIN,
        seed: 1,
    }
}

#[test]
fn ranks_without_a_time_a_latitude_or_a_longitude_agree_with_the_others() {
    for size in [[1, 1, 1], [1, 7, 2], [7, 1, 2], [2, 2, 7], [5, 3, 1]] {
        let tiny = Tiny { size, ..small(4) };
        everything_is_equal(&tiny).unwrap();
    }
}

#[test]
fn seventy_three_latitudes_which_no_number_of_ranks_divides_agree_with_serial() {
    for ranks in 2..=5 {
        let tiny = Tiny {
            size: [2, 73, 3],
            batch: 1,
            heads: 5,
            head_dim: 2,
            depth: 1,
            ..small(ranks)
        };
        everything_is_equal(&tiny).unwrap();
    }
}

#[test]
fn two_runs_give_the_same_bits() {
    let case = small(3).case();
    for strategy in softmax_strategies().into_iter().skip(1) {
        let [first, second] = [0, 1].map(|_| case.run(&strategy, 3).unwrap());
        assert_eq!(first.found, second.found, "{}", strategy.name());
    }
}

/// At which times and points one layer's forecast changes if the fields change at one point of the second time.
fn changed(time_mask: TimeMask) -> Vec<bool> {
    let tiny = Tiny {
        time_mask,
        batch: 1,
        depth: 1,
        ..small(1)
    };
    let before = tiny.case();
    let mut after = WeatherCase::clone(&before);
    let [_, rows, columns] = tiny.size;
    let point = rows * columns + columns + 2;
    after.fields.values[point * tiny.variables] += 1.0;
    let [before, after] = [before, Arc::new(after)].map(|case| {
        let run = case.run(&dsp_strategies::all()[0], 1).unwrap();
        run.found["out"].values.clone()
    });
    let pairs = before
        .chunks(tiny.variables)
        .zip(after.chunks(tiny.variables));
    pairs.map(|(before, after)| before != after).collect()
}

#[test]
fn a_layer_carries_a_change_everywhere_and_a_causal_one_not_to_earlier_times() {
    let [times, rows, columns] = small(1).size;
    let points = rows * columns;
    let is_later: Vec<bool> = (0..times * points).map(|point| point >= points).collect();
    assert_eq!(changed(TimeMask::Causal), is_later);
    assert_eq!(changed(TimeMask::Full), vec![true; times * points]);
}

#[test]
fn every_parameter_takes_part() {
    let case = small(1).case();
    let run = case.run(&dsp_strategies::all()[0], 1).unwrap();
    let names = named_parameters(&case.template).unwrap();
    for name in names.keys() {
        let gradient = &run.found[&format!("grad.{name}")].values;
        assert!(gradient.iter().any(|value| value.abs() > 1e-9), "{name}");
    }
}

#[test]
fn attention_over_time_tells_the_order_of_the_times() {
    // Two times of one season whose fields change places: without positions, so would the forecasts.
    let tiny = Tiny {
        size: [2, 2, 2],
        batch: 1,
        time_mask: TimeMask::Full,
        ..small(1)
    };
    let mut case = WeatherCase::clone(&tiny.case());
    case.grid = Grid::new(vec![-90.0, 0.0], vec![0.0, 20.0], vec![vec![0.5, 0.5]]).unwrap();
    let mut swapped = case.clone();
    let half = swapped.fields.values.len() / 2;
    swapped.fields.values.rotate_left(half);
    let [mut there, back] = [case, swapped].map(|case| {
        let run = Arc::new(case).run(&dsp_strategies::all()[0], 1).unwrap();
        run.found["out"].values.clone()
    });
    there.rotate_left(half);
    let pairs = there.iter().zip(&back);
    let apart = pairs.fold(0.0, |apart: f64, (a, b)| apart.max((a - b).abs()));
    assert!(apart > 1e-3, "{apart}");
}

#[test]
fn the_loss_is_the_squared_error_by_the_cosine_of_the_latitude() {
    let tiny = small(1);
    let case = tiny.case();
    let run = case.run(&dsp_strategies::all()[0], 1).unwrap();
    let [_, rows, columns] = tiny.size;
    let (mut sum, mut weights) = (0.0, 0.0);
    let pairs = run.found["out"].values.iter().zip(&case.other.values);
    for (index, (forecast, next)) in pairs.enumerate() {
        let row = index / (tiny.variables * columns) % rows;
        let latitude: f64 = -90.0 + 35.0 * row as f64;
        let weight = latitude.to_radians().cos();
        sum += weight * (forecast - next).powi(2);
        weights += weight;
    }
    let found = run.found["loss"].values[0];
    let expected = sum / weights;
    assert!(
        (found - expected).abs() < 1e-12,
        "{found} instead of {expected}"
    );
}

#[test]
fn weights_come_back_under_their_names() {
    let config = small(1).config();
    let model = config.init(3, &Device::flex()).unwrap();
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("weather.safetensors");
    save(&model, &path).unwrap();
    let other = config.init(4, &Device::flex()).unwrap();
    let expected = named_parameters(&model).unwrap();
    assert_ne!(named_parameters(&other).unwrap(), expected);
    let again = load(other, &Weights::file(path), DType::F32).unwrap();
    assert_eq!(named_parameters(&again).unwrap(), expected);
    for (name, shape) in [
        ("embed.weight", &[16, 2][..]),
        ("place.weight", &[16, 8]),
        ("season.weight", &[16, 4]),
        ("layers.1.latitude.attn.qkv.weight", &[48, 16]),
        ("layers.0.time.norm.weight", &[16]),
        ("layers.1.mlp.fc1.bias", &[32]),
        ("norm.weight", &[16]),
        ("head.weight", &[2, 16]),
    ] {
        assert_eq!(expected[name].shape().to_vec(), shape, "{name}");
    }
    let same = config.init(3, &Device::flex()).unwrap();
    assert_eq!(named_parameters(&same).unwrap(), expected);
}

#[test]
fn fields_that_do_not_fit_the_grid_and_sizes_that_describe_no_model_are_refused() {
    let tiny = small(1);
    let mut case = Arc::try_unwrap(tiny.case()).unwrap();
    case.grid = Tiny {
        size: [3, 4, 5],
        ..tiny.clone()
    }
    .grid();
    let error = Arc::new(case)
        .run(&dsp_strategies::all()[0], 1)
        .unwrap_err();
    let message = error.to_string();
    assert!(message.contains("[2, 3, 5, 4, 2]"), "{message}");
    assert!(
        message.contains("4 latitudes and 5 longitudes"),
        "{message}"
    );

    let config = tiny.config();
    let zero = |field| Err(ConfigError::Zero { field });
    assert_eq!(config.clone().with_harmonics(0).check(), zero("harmonics"));
    assert_eq!(WeatherConfig::new(0).check(), zero("variables"));
    assert!(matches!(
        config.with_hidden_size(20).check(),
        Err(ConfigError::Multiple {
            field: "hidden_size",
            ..
        })
    ));
}
