//! Every strategy gives what one rank gives, to 1e-10 in f64: outputs, input gradients, every parameter's
//! gradient; and sends what the formulas say, to the element.
#![cfg(feature = "flex")]
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot build its model has failed"
)]

mod common;

use std::num::NonZeroUsize;
use std::sync::Arc;

use burn::tensor::{DType, Device};
use common::{LossFrom, ModelCase, Run, Values, softmax_strategies};
use dsp_core::SequenceParallel;
use dsp_core::strategy::{OutputLayout, PlanError};
use dsp_models::VideoDitConfig;
use dsp_models::random::{Draws, Purpose};
use dsp_models::video_dit::{FrameMask, Init};
use dsp_models::weights::cast;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

/// f64 sums in another order differ by some 1e-15 of their terms; a mistake is no smaller than 1e-6.
const TOLERANCE: f64 = 1e-10;

/// A tiny model and video; every field shrinks towards what a person can draw.
#[derive(Debug, Clone)]
struct Tiny {
    ranks: usize,
    size: [usize; 3],
    patch: [usize; 3],
    batch: usize,
    heads: usize,
    head_dim: usize,
    depth: usize,
    /// `text[sample][token]`: whether the token counts.
    text: Vec<Vec<bool>>,
    /// `frames[sample][time]`: whether it is to be generated.
    frames: Option<Vec<Vec<bool>>>,
    qk_norm: bool,
    pred_sigma: bool,
    output: OutputLayout,
    loss: LossFrom,
    switch_parts: NonZeroUsize,
    seed: u64,
}

fn tiny() -> impl Strategy<Value = Tiny> {
    let sizes = (
        1..=5_usize,
        1..=6_usize,
        1..=4_usize,
        1..=5_usize,
        1..=2_usize,
    );
    let patch = prop_oneof![Just([1, 1, 1]), Just([1, 2, 2]), Just([2, 1, 2])];
    let model = (
        1..=5_usize,
        prop_oneof![Just(4_usize), Just(8)],
        1..=2_usize,
        0..=3_usize,
    );
    (sizes, patch, model).prop_flat_map(
        |((ranks, frames, height, width, batch), patch, (heads, head_dim, depth, tokens))| {
            let booleans = |columns: usize| {
                let row = prop::collection::vec(any::<bool>(), columns);
                prop::collection::vec(row, batch)
            };
            let output = prop_oneof![Just(OutputLayout::Free), Just(OutputLayout::AsInput)];
            let loss = prop_oneof![Just(LossFrom::Shard), Just(LossFrom::Whole)];
            let parts = (1..=3_usize).prop_map(|parts| NonZeroUsize::new(parts).unwrap());
            (
                booleans(tokens + 1),
                prop::option::of(booleans(frames.div_ceil(patch[0]))),
                (
                    any::<bool>(),
                    any::<bool>(),
                    output,
                    loss,
                    parts,
                    0..1000_u64,
                ),
            )
                .prop_map(move |(text, given, rest)| {
                    let (qk_norm, pred_sigma, output, loss, switch_parts, seed) = rest;
                    Tiny {
                        ranks,
                        size: [frames, height, width],
                        patch,
                        batch,
                        heads,
                        head_dim,
                        depth,
                        text,
                        frames: given,
                        qk_norm,
                        pred_sigma,
                        output,
                        loss,
                        switch_parts,
                        seed,
                    }
                })
        },
    )
}

impl Tiny {
    fn case(&self) -> Arc<ModelCase> {
        let config = VideoDitConfig::new()
            .with_in_channels(2)
            .with_patch_size(self.patch)
            .with_hidden_size(self.heads * self.head_dim)
            .with_num_heads(self.heads)
            .with_depth(self.depth)
            .with_mlp_ratio(2.0)
            .with_qk_norm(self.qk_norm)
            .with_pred_sigma(self.pred_sigma)
            .with_caption_channels(3)
            .with_model_max_length(self.text[0].len());
        let template = config
            .init(Init::Dense, self.seed, &Device::flex())
            .unwrap();
        let mut draws = Draws::new(self.seed, Purpose::Other, 0);
        let mut values =
            |shape: &[usize]| Values::new(shape, draws.normals(shape.iter().product()));
        let [frames, height, width] = self.size;
        let video = |channels| [self.batch, channels, frames, height, width];
        Arc::new(ModelCase {
            template: cast(template, DType::F64),
            video: values(&video(2)),
            text: values(&[self.batch, self.text[0].len(), 3]),
            keep: self.text.clone(),
            timesteps: vec![500.0, 37.0][..self.batch].to_vec(),
            fps: vec![24.0, 8.0][..self.batch].to_vec(),
            resolution: [64.0, 80.0],
            frame_mask: self.frames.clone().map(FrameMask::new),
            dout: values(&video(config.out_channels())),
            config,
            dtype: DType::F64,
            output: self.output,
            loss: self.loss,
            switch_parts: self.switch_parts,
        })
    }
}

fn check(
    strategy: &Arc<dyn SequenceParallel>,
    ranks: usize,
    case: &Arc<ModelCase>,
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
    let [frames, height, width] = tiny.size;
    let shape = case.config.shape(tiny.batch, frames, height, width);
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
    fn every_strategy_gives_the_serial_outputs_and_gradients_and_sends_what_the_formulas_say(tiny in tiny()) {
        everything_is_equal(&tiny)?;
    }
}

fn small(ranks: usize) -> Tiny {
    Tiny {
        ranks,
        size: [5, 3, 4],
        patch: [1, 2, 2],
        batch: 2,
        heads: 4,
        head_dim: 4,
        depth: 2,
        text: vec![vec![true, false, true], vec![false, true, false]],
        frames: Some(vec![vec![true, false, true, true, false], vec![true; 5]]),
        qk_norm: true,
        pred_sigma: true,
        output: OutputLayout::Free,
        loss: LossFrom::Shard,
        switch_parts: NonZeroUsize::MIN,
        seed: 1,
    }
}

#[test]
fn ranks_without_a_frame_or_a_token_agree_with_the_others() {
    for size in [[1, 2, 2], [1, 2, 8], [6, 2, 2], [2, 2, 4]] {
        let tiny = Tiny {
            size,
            frames: None,
            ..small(4)
        };
        everything_is_equal(&tiny).unwrap();
    }
}

#[test]
fn a_loss_after_a_gather_gives_the_gradients_of_one_on_shards() {
    for ranks in [2, 3] {
        let runs = [LossFrom::Shard, LossFrom::Whole].map(|loss| {
            let case = Tiny {
                loss,
                ..small(ranks)
            }
            .case();
            let strategies = softmax_strategies().into_iter().skip(1);
            strategies
                .map(|strategy| case.run(&strategy, ranks).unwrap())
                .collect::<Vec<_>>()
        });
        let [shards, wholes] = &runs;
        for (shard, whole) in shards.iter().zip(wholes) {
            for (name, found) in &whole.found {
                let error = found.error(&shard.found[name]);
                assert!(error <= TOLERANCE, "{name} is off by {error:e}");
            }
        }
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
