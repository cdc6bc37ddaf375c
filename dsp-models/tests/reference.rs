//! STDiT-3 against VideoSys' own code: every tensor of the reference files, serial and under every strategy.
#![cfg(feature = "flex")]
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot read its file has failed"
)]
#![allow(clippy::print_stdout, reason = "the errors found, for those who ask")]

mod common;

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::Arc;

use burn::tensor::{DType, Device};
use common::{Fixture, LossFrom, ModelCase, PairsCase, Run, Values, softmax_strategies};
use dsp_core::SequenceParallel;
use dsp_core::strategy::OutputLayout;
use dsp_models::video_dit::{BlockConfig, BlockPairs, FrameMask, Init, VideoDitConfig};
use dsp_models::weights::{Weights, load};

/// f32: some five times the worst difference of VideoSys' own f32 (4.63e-6, README of the fixtures). f64: what
/// is left is the references' storage in f32 (6e-8 of a value), and tables that VideoSys makes in f32.
const TOLERANCES: [(DType, f64); 2] = [(DType::F32, 2e-5), (DType::F64, 3e-7)];

fn number(config: &serde_json::Value, key: &str) -> usize {
    config[key].as_u64().unwrap() as usize
}

/// Rows of booleans from a `[B, n]` tensor.
fn rows(mask: &Values) -> Vec<Vec<bool>> {
    let rows = mask.values.chunks(mask.shape[1]);
    rows.map(|row| row.iter().map(|&keep| keep != 0.0).collect())
        .collect()
}

fn reshaped(mut values: Values, shape: &[usize]) -> Values {
    assert_eq!(values.values.len(), shape.iter().product::<usize>());
    values.shape = shape.to_vec();
    values
}

fn pairs(fixture: &Fixture, dtype: DType) -> PairsCase {
    let config = fixture.config();
    let [hidden, b, t, s, l] =
        ["hidden", "B", "T", "S", "text_tokens"].map(|key| number(&config, key));
    let block = BlockConfig::new(hidden, number(&config, "heads"))
        .with_mlp_ratio(config["mlp_ratio"].as_f64().unwrap())
        .with_qk_norm(config["qk_norm"].as_bool().unwrap());
    let template = BlockPairs::new(&block, 1, Init::Dense, 0, &Device::flex()).unwrap();
    let weights = Weights::bytes(fixture.bytes.clone()).with_prefix("param.");
    let given = (fixture.names().iter().any(|name| name == "x_mask")).then(|| {
        let mask = FrameMask::new(rows(&fixture.get("x_mask")));
        (mask, reshaped(fixture.get("t0"), &[b, 6, hidden]))
    });
    PairsCase {
        template: load(template, &weights, dtype).unwrap(),
        config: block,
        x: reshaped(fixture.get("x"), &[b, t, s, 1, hidden]),
        y: reshaped(fixture.get("y"), &[b, l, hidden]),
        lengths: (config["text_lens"].as_array().unwrap().iter())
            .map(|length| length.as_u64().unwrap() as usize)
            .collect(),
        t: reshaped(fixture.get("t"), &[b, 6, hidden]),
        given,
        dout: reshaped(fixture.get("dout"), &[b, t, s, 1, hidden]),
        dtype,
    }
}

fn model(fixture: &Fixture, dtype: DType) -> ModelCase {
    let config = fixture.config();
    let number = |key| number(&config, key);
    let patch: Vec<usize> = serde_json::from_value(config["patch_size"].clone()).unwrap();
    let dit = VideoDitConfig::new()
        .with_depth(number("depth"))
        .with_hidden_size(number("hidden_size"))
        .with_num_heads(number("num_heads"))
        .with_caption_channels(number("caption_channels"))
        .with_model_max_length(number("model_max_length"))
        .with_in_channels(number("in_channels"))
        .with_patch_size(patch.try_into().unwrap())
        .with_input_sq_size(number("input_sq_size"))
        .with_qk_norm(config["qk_norm"].as_bool().unwrap());
    let template = dit.init(Init::Dense, 0, &Device::flex()).unwrap();
    let weights = Weights::bytes(fixture.bytes.clone()).with_prefix("param.");
    let y = fixture.get("y");
    let shape = [y.shape[0], y.shape[2], y.shape[3]];
    ModelCase {
        template: load(template, &weights, dtype).unwrap(),
        config: dit,
        video: fixture.get("x"),
        text: reshaped(y, &shape),
        keep: rows(&fixture.get("mask")),
        timesteps: fixture.get("timestep").values,
        fps: fixture.get("fps").values,
        resolution: ["height", "width"].map(|key| fixture.get(key).values[0]),
        frame_mask: None,
        dout: fixture.get("dout"),
        dtype,
        output: OutputLayout::Free,
        loss: LossFrom::Shard,
        switch_parts: NonZeroUsize::MIN,
    }
}

/// What is no result: parameters, inputs, the cotangent and the rotary frequencies.
const INPUTS: [&str; 12] = [
    "dout",
    "x",
    "y",
    "t",
    "t0",
    "x_mask",
    "mask",
    "rope_freqs",
    "timestep",
    "fps",
    "height",
    "width",
];

/// Compares every result of the file, and returns the worst with its name.
fn worst(fixture: &Fixture, run: &Run, tolerance: f64) -> (f64, String) {
    let mut errors = BTreeMap::new();
    for name in fixture.names() {
        if name.starts_with("param.") || INPUTS.contains(&&*name) {
            continue;
        }
        let found = match &*name {
            "after_spatial" => &run.found["after_spatial.0"],
            name => &run.found[name],
        };
        errors.insert(name.clone(), found.error(&fixture.get(&name)));
    }
    let beyond: Vec<_> = errors
        .iter()
        .filter(|(_, error)| **error > tolerance)
        .collect();
    assert!(beyond.is_empty(), "beyond {tolerance:e}: {beyond:?}");
    let worst = errors
        .into_iter()
        .max_by(|a, b| a.1.total_cmp(&b.1))
        .unwrap();
    (worst.1, worst.0)
}

fn every_strategy(mut check: impl FnMut(&Arc<dyn SequenceParallel>, usize)) {
    for strategy in softmax_strategies() {
        for ranks in 1..=4 {
            if strategy.name() == "serial" && ranks > 1 {
                continue;
            }
            check(&strategy, ranks);
        }
    }
}

fn block_fixture(name: &str, (dtype, tolerance): (DType, f64)) {
    let fixture = Fixture::open(name);
    let case = Arc::new(pairs(&fixture, dtype));
    every_strategy(|strategy, ranks| {
        let run = case.run(strategy, ranks).unwrap();
        let (error, tensor) = worst(&fixture, &run, tolerance);
        println!(
            "{name} {dtype:?} {} {ranks}: {error:.2e} ({tensor})",
            strategy.name()
        );
    });
}

#[test]
fn a_block_pair_gives_videosys_outputs_and_gradients_in_both_precisions() {
    for tolerance in TOLERANCES {
        block_fixture("stdit3_block.safetensors", tolerance);
    }
}

/// By itself, for on most GPUs it is the only one that computes there.
#[test]
fn a_block_pair_with_given_frames_gives_videosys_outputs_and_gradients_in_f32() {
    block_fixture("stdit3_block_xmask.safetensors", TOLERANCES[0]);
}

#[test]
fn a_block_pair_with_given_frames_gives_videosys_outputs_and_gradients_in_f64() {
    block_fixture("stdit3_block_xmask.safetensors", TOLERANCES[1]);
}

#[test]
fn the_whole_model_gives_videosys_outputs_and_gradients() {
    let fixture = Fixture::open("stdit3_model.safetensors");
    for (dtype, tolerance) in TOLERANCES {
        let case = Arc::new(model(&fixture, dtype));
        every_strategy(|strategy, ranks| {
            let run = case.run(strategy, ranks).unwrap();
            for name in fixture.names() {
                let Some(name) = name.strip_prefix("param.") else {
                    continue;
                };
                // The original's text for no text is a buffer: stored, but not trained.
                let is_trained = name != "y_embedder.y_embedding";
                assert_eq!(
                    run.found.contains_key(&format!("grad.{name}")),
                    is_trained,
                    "{name}"
                );
            }
            let (error, tensor) = worst(&fixture, &run, tolerance);
            println!(
                "model {dtype:?} {} {ranks}: {error:.2e} ({tensor})",
                strategy.name()
            );
        });
    }
}
