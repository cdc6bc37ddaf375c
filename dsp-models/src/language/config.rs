//! Sizes, and what the model declares to a strategy.

use burn::config::Config;
use dsp_core::layout::AxisSet;
use dsp_core::strategy::{AttentionStage, Closing, OutputLayout, StageKind};
use dsp_core::{Heads, Mask, ModelShape, SeqAxis, Stage};
use serde::{Deserialize, Serialize};

use super::attention::slopes;
use crate::error::ConfigError;

/// The tokens: the one sequence axis.
pub const TOKENS: SeqAxis = SeqAxis::FIRST;

/// Which layers attend linearly.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layers {
    /// None: LLaMA.
    #[default]
    Softmax,
    /// All: TransNormer.
    Linear,
    /// All but each `softmax_every`-th: a hybrid.
    Hybrid {
        /// Of how many layers the last attends by softmax.
        softmax_every: usize,
    },
}

/// How a layer attends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerKind {
    /// By softmax, with rotary positions.
    Softmax,
    /// Linearly, with a decay for each head.
    Linear,
}

/// A causal language model. The fields have the names of Hugging Face's `LlamaConfig`.
#[derive(Config, Debug, PartialEq)]
pub struct LanguageConfig {
    /// Tokens that there are.
    pub vocab_size: usize,
    /// The width of the residual stream.
    pub hidden_size: usize,
    /// The inner width of the feed-forward networks.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key-value heads of softmax attention. Linear attention has as many as query heads.
    pub num_key_value_heads: usize,
    /// The epsilon of the norms.
    #[config(default = 1e-5)]
    pub rms_norm_eps: f64,
    /// The base of the rotary embedding's frequencies.
    #[config(default = 1e4)]
    pub rope_theta: f64,
    /// Whether the head's weights are the embedding's.
    #[config(default = false)]
    pub tie_word_embeddings: bool,
    /// Which layers attend linearly.
    #[config(default = "Layers::Softmax")]
    pub layers: Layers,
}

impl LanguageConfig {
    /// The channels of a head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size
            .checked_div(self.num_attention_heads)
            .unwrap_or(0)
    }

    /// How layer `index` attends.
    pub fn kind(&self, index: usize) -> LayerKind {
        match self.layers {
            Layers::Softmax => LayerKind::Softmax,
            Layers::Linear => LayerKind::Linear,
            Layers::Hybrid { softmax_every } if (index + 1).is_multiple_of(softmax_every) => {
                LayerKind::Softmax
            }
            Layers::Hybrid { .. } => LayerKind::Linear,
        }
    }

    /// The heads of layer `index`.
    pub fn heads(&self, index: usize) -> Heads {
        let query = self.num_attention_heads;
        Heads {
            query,
            key_value: match self.kind(index) {
                LayerKind::Softmax => self.num_key_value_heads,
                LayerKind::Linear => query,
            },
            dim: self.head_dim(),
        }
    }

    /// The attention of layer `index`, of which softmax layers see what `mask` shows.
    pub fn attention(&self, index: usize, mask: &Mask) -> AttentionStage {
        let (axes, heads) = (AxisSet::of(&[TOKENS]), self.heads(index));
        match self.kind(index) {
            LayerKind::Softmax => AttentionStage::softmax(axes, heads, mask.clone()),
            LayerKind::Linear => {
                let slopes = slopes(heads.query, index, self.num_hidden_layers);
                let decay = slopes.into_iter().map(|slope| (-slope).exp());
                AttentionStage {
                    closing: Closing::AllHeads,
                    ..AttentionStage::linear(axes, heads, decay.collect())
                }
            }
        }
    }

    /// What the model declares to a strategy for `[batch, length]` tokens: two stages a layer. `mask` is softmax
    /// attention's, [`Mask::Causal`] or one that shows no more.
    ///
    /// The output's layout is free, as the loss is that of each rank's own tokens.
    pub fn shape(&self, batch: usize, length: usize, mask: &Mask) -> ModelShape {
        let stages = (0..self.num_hidden_layers).flat_map(|index| {
            let name = match self.kind(index) {
                LayerKind::Softmax => "self_attn",
                LayerKind::Linear => "linear_attn",
            };
            let attention = StageKind::Attention(self.attention(index, mask));
            let inner = self.intermediate_size;
            [
                Stage::new(format!("layers.{index}.{name}"), attention),
                Stage::new(
                    format!("layers.{index}.mlp"),
                    StageKind::FeedForward { inner },
                ),
            ]
        });
        ModelShape {
            batch,
            lengths: vec![length],
            hidden: self.hidden_size,
            stages: stages.collect(),
            output: OutputLayout::Free,
        }
    }

    /// Checks that the sizes describe a model.
    ///
    /// # Errors
    /// [`ConfigError`] with the field, its value and the rule.
    pub fn check(&self) -> Result<(), ConfigError> {
        let every = match self.layers {
            Layers::Hybrid { softmax_every } => softmax_every,
            _ => 1,
        };
        for (field, value) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("layers.softmax_every", every),
        ] {
            if value == 0 {
                return Err(ConfigError::Zero { field });
            }
        }
        let multiple = |field, value: usize, divisor, rule| match value.is_multiple_of(divisor) {
            true => Ok(()),
            false => Err(ConfigError::Multiple {
                field,
                value,
                divisor,
                rule,
            }),
        };
        multiple(
            "hidden_size",
            self.hidden_size,
            2 * self.num_attention_heads,
            "each head has an even number of channels, in pairs that are turned together",
        )?;
        multiple(
            "num_attention_heads",
            self.num_attention_heads,
            self.num_key_value_heads,
            "as many query heads share each key-value head",
        )
    }
}
