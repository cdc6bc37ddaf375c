//! The weather model on the real fields: a few steps of Adam lower the loss, alike on every number of ranks.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot read its fields has failed"
)]

mod common;

use std::sync::Arc;

use burn::tensor::{DType, Device};
use common::softmax_refusal;
use dsp_bench::fields::{Fields, FieldsBatch};
use dsp_core::{Group, Loss, PlanError, SequenceParallel, Session, launch};
use dsp_models::WeatherConfig;
use dsp_models::error::ModelError;
use dsp_models::training::{Trainer, TrainingConfig};
use dsp_models::weather::{Weather, loss, roles};

const STEPS: usize = 6;

fn config() -> WeatherConfig {
    WeatherConfig::new(2)
        .with_hidden_size(16)
        .with_num_heads(4)
        .with_depth(1)
        .with_mlp_ratio(2.0)
}

fn train(
    template: &Weather,
    batch: &FieldsBatch,
    strategy: Arc<dyn SequenceParallel>,
    group: Group,
) -> Result<Vec<f64>, ModelError> {
    let device = Device::flex().autodiff();
    let [samples, times, rows, columns, _] = batch.shape;
    let shape = config().shape(samples, times, rows, columns);
    let session = Session::new(strategy, group, shape)?;
    let training = TrainingConfig::new(STEPS as u64, samples, 3e-3);
    let mut trainer = Trainer::new(template, roles(&config()), training, &session, &device);
    let batch = batch.on(&device, DType::F32);
    let mut losses = Vec::new();
    for _ in 0..STEPS {
        let part = |model: &Weather| -> Result<Loss, ModelError> {
            let forecast = model.forward(batch.fields.clone(), &batch.grid, &session)?;
            let own = loss(&forecast, batch.next.clone(), &batch.grid)?;
            Ok(Loss::OfShard(own))
        };
        losses.push(trainer.step(&session, [part])?.loss);
    }
    Ok(losses)
}

#[test]
fn a_few_steps_on_the_real_winds_lower_the_loss_alike_on_every_number_of_ranks() {
    let fields = Fields::built_in().unwrap();
    // A year and the month after it, at a prime number of latitudes.
    let batch = Arc::new(fields.batch(1, 12, 37, 12).unwrap());
    let template = Arc::new(config().init(1, &Device::flex()).unwrap());
    let [samples, times, rows, columns, _] = batch.shape;
    let shape = config().shape(samples, times, rows, columns);
    let mut expected: Option<Vec<f64>> = None;
    for strategy in dsp_strategies::all() {
        for ranks in 1..=3 {
            let refused = softmax_refusal(strategy.name(), 3, config().num_heads, ranks);
            if strategy.name() == "serial" && ranks > 1 || refused.is_some() {
                continue;
            }
            // Strategies for linear attention refuse a model that attends over every axis by softmax.
            let plan = strategy.plan(&shape, ranks);
            if matches!(plan, Err(PlanError::Form { .. })) {
                continue;
            }
            let (template, batch, strategy) = (template.clone(), batch.clone(), strategy.clone());
            let ends = launch(ranks, move |group| {
                train(&template, &batch, strategy.clone(), group)
            })
            .unwrap();
            let losses = &ends[0];
            assert!(ends.iter().all(|end| end == losses), "{ends:?}");
            assert!(
                losses.windows(2).all(|pair| pair[1] < pair[0]),
                "{losses:?}"
            );
            let first = expected.get_or_insert_with(|| losses.clone());
            for (found, expected) in losses.iter().zip(first) {
                // f32: some 1e-7 of the loss, and Adam's quotients of small gradients pass on more.
                assert!(
                    (found - *expected).abs() <= 1e-4 * *expected,
                    "{found} instead of {expected}"
                );
            }
        }
    }
}
