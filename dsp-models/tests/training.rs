//! A few steps of training: the loss falls, alike under every strategy.
#![cfg(feature = "flex")]
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot build its model has failed"
)]

mod common;

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Tensor, TensorData};
use common::softmax_strategies;
use dsp_core::strategy::{OutputLayout, Role};
use dsp_core::{CommError, Group, Loss, ModelShape, SequenceParallel, Session, launch};
use dsp_models::error::ModelError;
use dsp_models::flow::{Batch, Noised, Sampling, loss};
use dsp_models::random::{Draws, Purpose};
use dsp_models::training::{Decayed, Trainer, TrainingConfig};
use dsp_models::video_dit::{FrameMask, Init, Text, VideoDit, VideoDitConfig, roles};
use dsp_models::weights::{cast, named_parameters};

const STEPS: u64 = 8;

fn config() -> VideoDitConfig {
    VideoDitConfig::new()
        .with_in_channels(3)
        .with_hidden_size(16)
        .with_num_heads(4)
        .with_depth(1)
        .with_mlp_ratio(2.0)
        .with_caption_channels(5)
        .with_model_max_length(3)
}

fn batch(device: &Device, frame_mask: Option<FrameMask>) -> Batch {
    let mut draws = Draws::new(3, Purpose::Other, 0);
    let mut tensor =
        |shape: &[usize]| TensorData::new(draws.normals(shape.iter().product()), shape.to_vec());
    let video = Tensor::from_data(tensor(&[2, 3, 5, 3, 6]), (device, DType::F64));
    let text = Tensor::from_data(tensor(&[2, 3, 5]), (device, DType::F64));
    Batch {
        video,
        fps: vec![24.0, 12.0],
        resolution: [48.0, 96.0],
        text: Text {
            tokens: text,
            lengths: [3, 1].into(),
        },
        frame_mask,
    }
}

/// The losses of all steps, and the parameters after the last.
fn train(
    template: &VideoDit,
    strategy: Arc<dyn SequenceParallel>,
    frame_mask: Option<FrameMask>,
    group: Group,
) -> Result<(Vec<f64>, Vec<f64>), ModelError> {
    let device = Device::flex().autodiff();
    let config = config();
    let session = Session::new(strategy, group, config.shape(2, 5, 3, 6))?;
    let training = TrainingConfig::new(STEPS, 2, 3e-3).with_clip_norm(Some(1.0));
    let mut trainer = Trainer::new(
        template,
        roles(&config.block()),
        training,
        &session,
        &device,
    );
    let batch = batch(&device, frame_mask);
    // The same draw each time, so that the loss must fall.
    let sampling = Sampling::LogitNormal {
        location: 0.0,
        scale: 1.0,
    };
    let noised = Noised::draw(&batch, sampling, 5, 0);
    let mut losses = Vec::new();
    for _ in 0..STEPS {
        let part = |model: &VideoDit| -> Result<Loss, ModelError> {
            Ok(Loss::OfShard(loss(model, &batch, &noised, &session)?))
        };
        losses.push(trainer.step(&session, [part])?.loss);
    }
    let parameters = named_parameters(&session.whole_module(trainer.model())?).unwrap();
    let parameters = parameters
        .values()
        .flat_map(|data| data.iter::<f64>().collect::<Vec<_>>());
    Ok((losses, parameters.collect()))
}

#[test]
fn training_lowers_the_loss_alike_under_every_strategy() {
    let mask = FrameMask::new(vec![
        vec![false, true, true, true, true],
        vec![true, true, false, true, false],
    ]);
    for frame_mask in [None, Some(mask)] {
        let template = config()
            .init(Init::AsPublished, 1, &Device::flex())
            .unwrap();
        let template = Arc::new(cast(template, DType::F64));
        let mut expected: Option<(Vec<f64>, Vec<f64>)> = None;
        for strategy in softmax_strategies() {
            for ranks in 1..=4 {
                if strategy.name() == "serial" && ranks > 1 {
                    continue;
                }
                let (template, strategy, mask) =
                    (template.clone(), strategy.clone(), frame_mask.clone());
                let ends = launch(ranks, move |group| {
                    train(&template, strategy.clone(), mask.clone(), group)
                })
                .unwrap();
                assert!(
                    ends.iter().all(|end| *end == ends[0]),
                    "the ranks' models drifted apart"
                );
                let (losses, parameters) = &ends[0];
                assert!(
                    losses.windows(2).all(|pair| pair[1] < pair[0]),
                    "{losses:?}"
                );
                let (first, last) = expected.get_or_insert_with(|| ends[0].clone());
                let pairs = losses
                    .iter()
                    .chain(parameters)
                    .zip(first.iter().chain(last.iter()));
                for (found, expected) in pairs {
                    // AdamW divides by the root of a gradient's square: where a gradient is all rounding, so
                    // is the step. What is 0 there is 0 here, and what is not is far from it.
                    assert!(
                        (found - expected).abs() <= 1e-9,
                        "{found} instead of {expected}"
                    );
                }
            }
        }
    }
}

/// A parameter of each kind that decay tells apart.
#[derive(Module, Debug)]
struct Pair {
    matrix: Param<Tensor<2>>,
    vector: Param<Tensor<1>>,
}

/// The parameters after a step along gradients of 3 and 4 in the matrix and 12 in the vector: their norm is 13.
///
/// From 10, -10 and 10, at a rate of 0.1. AdamW's first step is g / (|g| + ε) of each, whatever the betas, so that
/// an ε of 1/2 shows how large a gradient was; what decays loses 0.1 · 0.5 of itself besides.
fn after_a_step(clip_norm: f64, decayed: Decayed) -> [f64; 3] {
    let place = (&Device::flex().autodiff(), DType::F64);
    let template = Pair {
        matrix: Param::from_tensor(Tensor::from_data([[10.0, -10.0]], place)),
        vector: Param::from_tensor(Tensor::from_data([10.0], place)),
    };
    let shape = ModelShape {
        batch: 1,
        lengths: vec![1],
        hidden: 1,
        stages: vec![],
        output: OutputLayout::Free,
    };
    let serial = dsp_strategies::by_name("serial").unwrap();
    let session = Session::new(serial, Group::alone(), shape).unwrap();
    let config = TrainingConfig::new(1, 1, 0.1)
        .with_epsilon(0.5)
        .with_weight_decay(0.5)
        .with_decayed(decayed)
        .with_clip_norm(Some(clip_norm));
    let role = |_: &str| Role::Replicated;
    let mut trainer = Trainer::new(&template, role, config, &session, place.0);
    let part = |pair: &Pair| {
        let slopes = Tensor::<2>::from_data([[3.0, 4.0]], (&Device::flex(), DType::F64));
        let slopes = Tensor::from_inner(slopes);
        let loss = (pair.matrix.val() * slopes).sum() + pair.vector.val().sum().mul_scalar(12.0);
        Ok::<_, CommError>(Loss::OfShard(loss))
    };
    let report = trainer.step(&session, [part]).unwrap();
    assert!((report.gradient_norm - 13.0).abs() < 1e-12, "{report:?}");
    let Pair { matrix, vector } = trainer.model().module.clone();
    let values = [matrix.val().into_data(), vector.val().into_data()];
    let values: Vec<f64> = values.iter().flat_map(|data| data.iter::<f64>()).collect();
    values.try_into().unwrap()
}

fn assert_numbers(found: [f64; 3], expected: [f64; 3]) {
    for (one, other) in found.iter().zip(expected) {
        // Burn's AdamW has its constants in f32.
        assert!(
            (one - other).abs() < 1e-6,
            "{found:?} instead of {expected:?}"
        );
    }
}

#[test]
fn gradients_of_a_larger_norm_than_the_limit_are_scaled_down_to_it_and_others_are_not() {
    let moved = |steps: [f64; 3]| {
        let [first, second, third] = steps.map(|step| 0.1 * step);
        [9.5 - first, -9.5 - second, 10.0 - third]
    };
    // 1.5, 2 and 6.
    let halved = moved([1.5 / 2.0, 2.0 / 2.5, 6.0 / 6.5]);
    assert_numbers(after_a_step(6.5, Decayed::Matrices), halved);
    let whole = moved([3.0 / 3.5, 4.0 / 4.5, 12.0 / 12.5]);
    for limit in [13.0001, 1e3] {
        assert_numbers(after_a_step(limit, Decayed::Matrices), whole);
    }
}

#[test]
fn vectors_decay_if_all_do_and_not_if_matrices_do() {
    let step = 0.1 * 12.0 / 12.5;
    let [.., vector] = after_a_step(1e3, Decayed::Matrices);
    assert!((vector - (10.0 - step)).abs() < 1e-6, "{vector}");
    let [matrix, _, vector] = after_a_step(1e3, Decayed::All);
    assert!((vector - (9.5 - step)).abs() < 1e-6, "{vector}");
    assert!((matrix - (9.5 - 0.1 * 3.0 / 3.5)).abs() < 1e-6, "{matrix}");
}
