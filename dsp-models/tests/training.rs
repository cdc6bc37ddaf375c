//! A few steps of training: the loss falls, alike under every strategy.
#![cfg(feature = "flex")]
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot build its model has failed"
)]

mod common;

use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor, TensorData};
use common::softmax_strategies;
use dsp_core::{Group, Loss, SequenceParallel, Session, launch};
use dsp_models::error::ModelError;
use dsp_models::flow::{Batch, Noised, Sampling, loss};
use dsp_models::random::{Draws, Purpose};
use dsp_models::training::{Trainer, TrainingConfig};
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
