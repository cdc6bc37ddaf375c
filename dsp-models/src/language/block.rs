//! A layer: attention and feed-forward network, each from the normed residual stream and added to it.

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::{Device, Tensor};
use dsp_core::fused::swiglu;
use dsp_core::linear::project;
use dsp_core::session::Stages;
use dsp_core::{Ending, Shard};

use super::attention::{LinearAttention, SoftmaxAttention};
use super::config::{LanguageConfig, LayerKind};
use crate::error::ModelError;
use crate::layers::{RmsNorm, linear_without_bias};
use crate::random::Draws;

/// `down(silu(gate(x)) · up(x))` (Shazeer, arXiv:2002.05202).
#[derive(Module, Debug)]
pub struct SwiGlu {
    /// `[C, inner]`.
    pub gate_proj: Linear,
    /// `[C, inner]`.
    pub up_proj: Linear,
    /// `[inner, C]`.
    pub down_proj: Linear,
}

impl SwiGlu {
    /// A network of the given widths.
    pub fn new(hidden: usize, inner: usize, draws: &mut Draws, device: &Device) -> Self {
        let mut linear = |inputs, outputs| linear_without_bias(inputs, outputs, draws, device);
        Self {
            gate_proj: linear(hidden, inner),
            up_proj: linear(hidden, inner),
            down_proj: linear(inner, hidden),
        }
    }

    /// What [`down_proj`](Self::down_proj) takes: the inner features, of which a rank may hold some.
    ///
    /// # Shapes
    /// - `x`: `[…, C]`; returns `[…, inner]`
    pub fn inner<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let gate = project(x.clone(), &self.gate_proj);
        let up = project(x, &self.up_proj);
        swiglu(gate, up)
    }
}

/// A layer.
#[derive(Module, Debug)]
pub struct Block {
    /// Before the attention.
    pub input_layernorm: RmsNorm,
    /// The attention of a softmax layer.
    pub self_attn: Option<SoftmaxAttention>,
    /// The attention of a linear layer.
    pub linear_attn: Option<LinearAttention>,
    /// Before the feed-forward network.
    pub post_attention_layernorm: RmsNorm,
    /// The feed-forward network.
    pub mlp: SwiGlu,
}

impl Block {
    pub(crate) fn new(
        config: &LanguageConfig,
        index: usize,
        draws: &mut Draws,
        device: &Device,
    ) -> Self {
        let (hidden, heads) = (config.hidden_size, config.num_attention_heads);
        let norm = || RmsNorm::new(hidden, config.rms_norm_eps, device);
        let kind = config.kind(index);
        Self {
            input_layernorm: norm(),
            self_attn: (kind == LayerKind::Softmax)
                .then(|| SoftmaxAttention::new(config, draws, device)),
            linear_attn: (kind == LayerKind::Linear)
                .then(|| LinearAttention::new(hidden, heads, draws, device)),
            post_attention_layernorm: norm(),
            mlp: SwiGlu::new(hidden, config.intermediate_size, draws, device),
        }
    }

    /// Runs the layer's two stages.
    ///
    /// # Shapes
    /// - `x`: `[B, L, 1, 1, C]`; returns the same, laid out as the strategy has it after these stages
    ///
    /// # Errors
    /// [`ModelError::Core`] if the ranks fail, or the stages are not those that were declared.
    pub fn forward(&self, x: Shard, stages: &mut Stages<'_>) -> Result<Shard, ModelError> {
        let stage = stages.attention()?;
        let mut x = stage.arrange(x)?;
        let h = x.clone().map(|x| self.input_layernorm.forward(x))?;
        if let Some(attention) = &self.self_attn {
            let h = attention.forward(h, &stage)?;
            x = stage.end(x, h, Ending::of(&attention.o_proj))?;
        } else if let Some(attention) = &self.linear_attn {
            x = x.plus(attention.forward(h, &stage)?)?;
        }

        let stage = stages.feed_forward()?;
        let x = stage.arrange(x)?;
        let h = x
            .clone()
            .map(|x| self.post_attention_layernorm.forward(x))?;
        let h = stage.enter(h)?.map(|x| self.mlp.inner(x))?;
        Ok(stage.end(x, h, Ending::of(&self.mlp.down_proj))?)
    }
}
