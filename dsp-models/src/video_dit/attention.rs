//! A block's two attentions: over an axis of the video, and from the video to the text.

use std::sync::Arc;

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::{Device, Tensor};
use dsp_core::Shard;
use dsp_core::fused::parts;
use dsp_core::linear::project;
use dsp_core::session::StageRun;

use super::config::{BlockConfig, TIME};
use crate::error::ModelError;
use crate::layers::{RmsNorm, Rotary, linear};
use crate::random::Draws;

/// The epsilon of the norms of queries and keys.
const QK_NORM_EPSILON: f64 = 1e-6;

/// Self-attention: queries, keys and values from one projection, queries and keys normalised per head and, over
/// time, turned by their frame's position.
///
/// How many heads it has is read from its parameters' shapes: a rank may hold some of them.
#[derive(Module, Debug)]
pub struct SelfAttention {
    /// `[C, 3·heads·d]`: queries, keys and values, each head by head.
    pub qkv: Linear,
    /// Over the channels of a query's head.
    pub q_norm: Option<RmsNorm>,
    /// Over the channels of a key's head.
    pub k_norm: Option<RmsNorm>,
    /// `[heads·d, C]`.
    pub proj: Linear,
    /// The channels of a head.
    pub head_dim: usize,
}

impl SelfAttention {
    pub(crate) fn new(config: &BlockConfig, draws: &mut Draws, device: &Device) -> Self {
        let (hidden, head_dim) = (config.hidden_size, config.head_dim());
        let norm = || {
            config
                .qk_norm
                .then(|| RmsNorm::new(head_dim, QK_NORM_EPSILON, device))
        };
        Self {
            qkv: linear(hidden, 3 * hidden, draws, device),
            q_norm: norm(),
            k_norm: norm(),
            proj: linear(hidden, hidden, draws, device),
            head_dim,
        }
    }

    /// The attention of a stage, from the modulated residual stream to what [`proj`](Self::proj) takes, with which the
    /// sub-layer ends.
    ///
    /// # Errors
    /// [`ModelError::Core`] if the ranks fail or the layouts do not fit.
    pub fn forward(
        &self,
        x: Shard,
        rotary: Option<&Rotary>,
        stage: &StageRun<'_>,
    ) -> Result<Shard, ModelError> {
        let x = stage.enter(x)?.map(|x| project(x, &self.qkv))?;
        let tables = rotary.map(|rotary| rotary.tables(&x.positions(TIME), x.tensor()));
        let prepare = |mut x: Tensor<5>, norm: &Option<RmsNorm>| {
            if let Some(norm) = norm {
                x = norm.forward(x);
            }
            match &tables {
                Some(tables) => tables.apply(x),
                None => x,
            }
        };
        let [query, key, value] = x.chunks();
        let query = query.map(|query| prepare(query, &self.q_norm))?;
        let key = key.map(|key| prepare(key, &self.k_norm))?;
        Ok(stage.attend(query, key, value)?)
    }
}

/// Text that every rank holds whole.
#[derive(Debug, Clone)]
pub struct Text {
    /// `[B, L, C]`.
    pub tokens: Tensor<3>,
    /// How many of each sample's tokens count: those from the first on.
    pub lengths: Arc<[usize]>,
}

/// Attention of every token of the video to the text. Nothing is sent: every rank holds the text.
#[derive(Module, Debug)]
pub struct CrossAttention {
    /// `[C, heads·d]`.
    pub q_linear: Linear,
    /// `[C, 2·heads·d]`: keys and values, each head by head.
    pub kv_linear: Linear,
    /// `[heads·d, C]`.
    pub proj: Linear,
    /// The channels of a head.
    pub head_dim: usize,
}

impl CrossAttention {
    pub(crate) fn new(config: &BlockConfig, draws: &mut Draws, device: &Device) -> Self {
        let hidden = config.hidden_size;
        Self {
            q_linear: linear(hidden, hidden, draws, device),
            kv_linear: linear(hidden, 2 * hidden, draws, device),
            proj: linear(hidden, hidden, draws, device),
            head_dim: config.head_dim(),
        }
    }

    /// The cross-attention of a stage, from the residual stream to what [`proj`](Self::proj) takes, with which the
    /// sub-layer ends.
    ///
    /// # Errors
    /// [`ModelError::Core`] if the ranks fail or the shapes do not fit.
    pub fn forward(
        &self,
        x: Shard,
        text: &Text,
        stage: &StageRun<'_>,
    ) -> Result<Shard, ModelError> {
        let query = stage.enter(x)?.map(|x| project(x, &self.q_linear))?;
        let [key, value] = parts(project(text.tokens.clone(), &self.kv_linear));
        Ok(stage.cross_attend(query, key, value, text.lengths.clone())?)
    }
}
