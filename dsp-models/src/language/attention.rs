//! A layer's attention: by softmax with rotary positions, or linear with decay.
//!
//! How many heads each has is read from its parameters' shapes: a rank may hold some of them, or none.

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::{Device, Tensor};
use dsp_core::Shard;
use dsp_core::linear::project;
use dsp_core::session::StageRun;

use super::config::{LanguageConfig, TOKENS};
use crate::error::ModelError;
use crate::layers::{LayerNorm, Pairs, Rotary, linear_without_bias, sigmoid, silu};
use crate::random::Draws;

/// The epsilon of TransNormer's norm over all heads.
const NORM_EPSILON: f64 = 1e-5;

/// Softmax attention, as LLaMA has it.
#[derive(Module, Debug)]
pub struct SoftmaxAttention {
    /// `[C, Hq·d]`.
    pub q_proj: Linear,
    /// `[C, Hkv·d]`.
    pub k_proj: Linear,
    /// `[C, Hkv·d]`.
    pub v_proj: Linear,
    /// `[Hq·d, C]`.
    pub o_proj: Linear,
    head_dim: usize,
    rope_theta: f64,
}

impl SoftmaxAttention {
    pub(crate) fn new(config: &LanguageConfig, draws: &mut Draws, device: &Device) -> Self {
        let (hidden, dim) = (config.hidden_size, config.head_dim());
        let keys = config.num_key_value_heads * dim;
        let mut linear = |inputs, outputs| linear_without_bias(inputs, outputs, draws, device);
        Self {
            q_proj: linear(hidden, hidden),
            k_proj: linear(hidden, keys),
            v_proj: linear(hidden, keys),
            o_proj: linear(hidden, hidden),
            head_dim: dim,
            rope_theta: config.rope_theta,
        }
    }

    /// The attention of a stage, from the normed residual stream to what [`o_proj`](Self::o_proj) takes, with which the
    /// sub-layer ends.
    ///
    /// # Shapes
    /// - `x`: `[B, L, 1, 1, C]`; returns `[B, L, 1, 1, Hq·d]`
    ///
    /// # Errors
    /// [`ModelError::Core`] if the ranks fail or the layouts do not fit.
    pub fn forward(&self, x: Shard, stage: &StageRun<'_>) -> Result<Shard, ModelError> {
        let x = stage.enter(x)?;
        let rotary = Rotary {
            dim: self.head_dim,
            base: self.rope_theta,
            pairs: Pairs::Halves,
        };
        let tables = rotary.tables(&x.positions(TOKENS), x.tensor());
        let turned = |x: Tensor<5>, layer: &Linear| tables.apply(project(x, layer));
        let query = x.clone().map(|x| turned(x, &self.q_proj))?;
        let key = x.clone().map(|x| turned(x, &self.k_proj))?;
        let value = x.map(|x| project(x, &self.v_proj))?;
        Ok(stage.attend(query, key, value)?)
    }
}

/// Linear attention with decay, as TransNormer has it: `silu` of queries, keys and values, a norm over all heads,
/// and a gate of low rank.
#[derive(Module, Debug)]
pub struct LinearAttention {
    /// `[C, H·d]`.
    pub q_proj: Linear,
    /// `[C, H·d]`.
    pub k_proj: Linear,
    /// `[C, H·d]`.
    pub v_proj: Linear,
    /// `[H·d, C]`.
    pub o_proj: Linear,
    /// Over all heads of a position.
    pub norm: LayerNorm,
    /// `[C, d]` and `[d, H·d]`.
    pub output_gate: Vec<Linear>,
}

impl LinearAttention {
    /// An attention over `hidden` channels in `heads` heads, drawn from a seed.
    pub fn new(hidden: usize, heads: usize, draws: &mut Draws, device: &Device) -> Self {
        let dim = hidden / heads;
        let mut linear = |inputs, outputs| linear_without_bias(inputs, outputs, draws, device);
        Self {
            q_proj: linear(hidden, hidden),
            k_proj: linear(hidden, hidden),
            v_proj: linear(hidden, hidden),
            o_proj: linear(hidden, hidden),
            output_gate: vec![linear(hidden, dim), linear(dim, hidden)],
            norm: LayerNorm::new(hidden, NORM_EPSILON, device),
        }
    }

    /// The attention of a stage, from the normed residual stream to what is added to it.
    ///
    /// # Shapes
    /// - `x`: `[B, L, 1, 1, C]`; returns the same
    ///
    /// # Errors
    /// [`ModelError::Core`] if the ranks fail or the layouts do not fit.
    pub fn forward(&self, x: Shard, stage: &StageRun<'_>) -> Result<Shard, ModelError> {
        let gated = x.clone();
        let x = stage.enter(x)?;
        let part = |layer: &Linear| x.clone().map(|x| silu(project(x, layer)));
        let (query, key, value) = (
            part(&self.q_proj)?,
            part(&self.k_proj)?,
            part(&self.v_proj)?,
        );
        let x = stage.join(stage.attend(query, key, value)?)?;
        let gate = self.output_gate.iter().fold(gated.into_tensor(), project);
        Ok(x.map(|x| project(self.norm.forward(x) * sigmoid(gate), &self.o_proj))?)
    }
}

/// How fast the heads of a layer forget: ALiBi's slopes (arXiv:2108.12409), less from layer to layer, so that the last
/// ones see far (TransNormer).
pub fn slopes(heads: usize, layer: usize, layers: usize) -> Vec<f64> {
    let of_power = |heads: usize| -> Vec<f64> {
        let first = 2f64.powf(-8.0 / heads as f64);
        (1..=heads).map(|index| first.powi(index as i32)).collect()
    };
    let slopes = if heads.is_power_of_two() {
        of_power(heads)
    } else {
        let below = (heads + 1).next_power_of_two() / 2;
        let between = of_power(2 * below).into_iter().step_by(2);
        let between = between.take(heads - below);
        of_power(below).into_iter().chain(between).collect()
    };
    let factor = 1.0 - layer as f64 / (layers.max(2) - 1) as f64 + 1e-5;
    slopes.into_iter().map(|slope| slope * factor).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_are_alibis_times_the_layers_factor() {
        assert_eq!(
            slopes(4, 0, 1),
            [0.25, 0.0625, 0.015625, 0.00390625].map(|slope: f64| slope * 1.00001)
        );
        // Between powers of two: those of 4 and every second of 8.
        let six = slopes(6, 2, 3);
        let expected = [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125];
        for (slope, expected) in six.into_iter().zip(expected) {
            assert!((slope - expected * 1e-5).abs() < 1e-12, "{slope}");
        }
    }
}
