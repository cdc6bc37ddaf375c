//! Kinds `llama_train_adamw` and `llama_train_adam`: three steps of a LLaMA's training.
//!
//! A file holds `batches [steps, B, L]`, the first weights, the loss of each step and once more of the first batch
//! after the last one, the norms of the gradients, and parameters after the first and the last step. It says that
//! Adam divides by the root of a gradient's square, so that an element whose gradient is about 0 moves by the
//! learning rate whatever way its rounding points: losses and norms are to be compared tightly and parameters
//! loosely.

use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor};
use dsp_core::{Group, Loss, Mask, SequenceParallel, Session};
use dsp_models::language::{CausalLm, LanguageConfig, Tokens, next_token_loss, roles};
use dsp_models::training::{Decayed, Report, Trainer, TrainingConfig};
use dsp_models::weights::named_parameters;
use serde::Deserialize;

use super::language::LlamaFile;
use super::shared::{of_dtype, weights};
use super::{Case, CaseError, Produced};
use crate::reference::{Reference, ReferenceError, Stored};

/// By how much parameters after a step may be further off than losses, in f32. Between f32 and f64 the file's own
/// program is off by up to 9.2e-4 in them and by 2.2e-6 in the losses.
const LOOSER: f64 = 100.0;

/// By how much everything may be further off in f64 where β₂ is close to 1. Burn 0.22.1's AdamW takes `1 − β₂ᵗ` in
/// f32, whatever the parameters are: with β₂ = 0.999 it is off by 2⁻²⁵ in 0.001, 0.002 and 0.003, and a step by half of
/// that. Three steps of 0.01 add up to 2.7e-7, of parameters of about 0.1: nine times the tolerance of 3e-7.
const COEFFICIENTS: f64 = 10.0;

#[derive(Debug, Deserialize)]
struct OptimizerFile {
    lr: f64,
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
}

struct TrainingCase {
    config: LanguageConfig,
    training: TrainingConfig,
    templates: [CausalLm; 2],
    batches: Vec<Tokens>,
}

pub(super) fn open(reference: &Reference) -> Result<Vec<Arc<dyn Case>>, ReferenceError> {
    let file: LlamaFile = reference.json("config")?;
    let config = file.config();
    let OptimizerFile {
        lr,
        betas: [beta_1, beta_2],
        eps,
        weight_decay,
    } = reference.json("optimiser")?;
    let templates = weights(reference, || config.init(0, &Device::flex()))?;
    let ids = reference.input("batches")?;
    let [steps, batch, length] = ids.shape[..] else {
        return Err(reference.wrong_metadata(format!(
            "goes with batches of shape {:?}, which must be [steps, samples, tokens]",
            ids.shape
        )));
    };
    let of_step = |step: usize| {
        let row = |sample: usize| {
            let start = (step * batch + sample) * length;
            let row = &ids.values[start..start + length];
            row.iter().map(|&id| id as u32).collect()
        };
        Tokens::new((0..batch).map(row).collect())
    };
    let batches: Result<Vec<Tokens>, _> = (0..steps).map(of_step).collect();
    let training = TrainingConfig::new(steps as u64, batch, lr)
        .with_beta_1(beta_1)
        .with_beta_2(beta_2)
        .with_epsilon(eps)
        .with_weight_decay(weight_decay)
        .with_decayed(Decayed::All);
    (training.check()).map_err(|error| reference.wrong_metadata(error.to_string()))?;
    Ok(vec![Arc::new(TrainingCase {
        config,
        training,
        templates,
        batches: batches.map_err(|error| reference.wrong_metadata(error.to_string()))?,
    })])
}

impl TrainingCase {
    fn loss(
        &self,
        model: &CausalLm,
        tokens: &Tokens,
        session: &Session,
    ) -> Result<Tensor<1>, CaseError> {
        let logits = model.forward(tokens, session)?;
        Ok(next_token_loss(&logits, tokens)?)
    }
}

impl Case for TrainingCase {
    fn name(&self) -> &str {
        ""
    }

    fn tolerance(&self, tensor: &str, dtype: DType, tolerance: f64) -> f64 {
        match dtype {
            DType::F32 if tensor.starts_with("step") => tolerance * LOOSER,
            DType::F64 if self.training.beta_2 > 0.99 => tolerance * COEFFICIENTS,
            _ => tolerance,
        }
    }

    fn run(
        &self,
        strategy: Arc<dyn SequenceParallel>,
        group: Group,
        device: &Device,
        dtype: DType,
    ) -> Result<Produced, CaseError> {
        let Some(first) = self.batches.first() else {
            return Ok(Produced::new());
        };
        let [batch, length] = first.dims();
        let shape = self.config.shape(batch, length, &Mask::Causal);
        let session = Session::new(strategy, group, shape)?;
        let mut trainer = Trainer::new(
            of_dtype(&self.templates, dtype),
            roles(&self.config),
            self.training.clone(),
            &session,
            &device.clone().autodiff(),
        );
        let mut produced = Produced::new();
        let mut reports: Vec<Report> = Vec::new();
        for tokens in &self.batches {
            let part = |model: &CausalLm| -> Result<Loss, CaseError> {
                Ok(Loss::OfShard(self.loss(model, tokens, &session)?))
            };
            let report = trainer.step(&session, [part])?;
            reports.push(report);
            let whole = session.whole_module(trainer.model())?;
            let named =
                named_parameters(&whole).map_err(|error| CaseError::Model(error.to_string()))?;
            for (name, data) in named {
                let stored = Stored {
                    shape: data.shape().to_vec(),
                    values: data.iter::<f64>().collect(),
                };
                produced.insert(format!("step{}.{name}", report.step), stored);
            }
        }
        let last = self.loss(&trainer.model().module, first, &session)?;
        let last = session.sum_over_ranks(last)?.into_scalar::<f64>();
        let losses = reports.iter().map(|report| report.loss).chain([last]);
        let norms = reports.iter().map(|report| report.gradient_norm);
        for (name, values) in [
            ("losses", losses.collect::<Vec<f64>>()),
            ("grad_norms", norms.collect()),
        ] {
            let shape = vec![values.len()];
            produced.insert(name.to_owned(), Stored { shape, values });
        }
        Ok(produced)
    }
}
