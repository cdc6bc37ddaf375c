//! Sizes, and what the model declares to a strategy.

use burn::config::Config;
use dsp_core::layout::AxisSet;
use dsp_core::strategy::{AttentionStage, OutputLayout, StageKind};
use dsp_core::{Heads, Mask, ModelShape, SeqAxis, Stage};

use crate::error::ConfigError;

/// The class token and the patches: the one sequence axis.
pub const PATCHES: SeqAxis = SeqAxis::FIRST;

/// A vision transformer.
#[derive(Config, Debug, PartialEq)]
pub struct VitConfig {
    /// Rows and columns of an image.
    pub image: [usize; 2],
    /// Rows and columns of a patch.
    pub patch: usize,
    /// Channels of an image.
    #[config(default = 3)]
    pub channels: usize,
    /// The width of the residual stream.
    pub hidden: usize,
    /// Layers.
    pub depth: usize,
    /// Attention heads.
    pub heads: usize,
    /// The inner width of the feed-forward networks.
    pub mlp: usize,
    /// Classes.
    pub classes: usize,
    /// The epsilon of the norms.
    #[config(default = 1e-6)]
    pub norm_eps: f64,
}

impl VitConfig {
    /// The heads of each attention.
    pub fn all_heads(&self) -> Heads {
        Heads::multi(self.heads, self.hidden.checked_div(self.heads).unwrap_or(0))
    }

    /// The class token and the patches.
    pub fn tokens(&self) -> usize {
        let patches = self.image.map(|extent| extent / self.patch.max(1));
        1 + patches[0] * patches[1]
    }

    /// What the model declares to a strategy for `batch` images: two stages a layer. The output's layout is free.
    pub fn shape(&self, batch: usize) -> ModelShape {
        let attention =
            AttentionStage::softmax(AxisSet::of(&[PATCHES]), self.all_heads(), Mask::Full);
        let stages = (0..self.depth).flat_map(|index| {
            [
                Stage::new(
                    format!("blocks.{index}.attn"),
                    StageKind::Attention(attention.clone()),
                ),
                Stage::new(
                    format!("blocks.{index}.mlp"),
                    StageKind::FeedForward { inner: self.mlp },
                ),
            ]
        });
        ModelShape {
            batch,
            lengths: vec![self.tokens()],
            hidden: self.hidden,
            stages: stages.collect(),
            output: OutputLayout::Free,
        }
    }

    /// Checks that the sizes describe a model.
    ///
    /// # Errors
    /// [`ConfigError`] with the field, its value and the rule.
    pub fn check(&self) -> Result<(), ConfigError> {
        for (field, value) in [
            ("image[0]", self.image[0]),
            ("image[1]", self.image[1]),
            ("patch", self.patch),
            ("channels", self.channels),
            ("hidden", self.hidden),
            ("depth", self.depth),
            ("heads", self.heads),
            ("mlp", self.mlp),
            ("classes", self.classes),
        ] {
            if value == 0 {
                return Err(ConfigError::Zero { field });
            }
        }
        let whole = "an image is a whole number of patches";
        let each = "each head has as many channels";
        for (field, value, divisor, rule) in [
            ("image[0]", self.image[0], self.patch, whole),
            ("image[1]", self.image[1], self.patch, whole),
            ("hidden", self.hidden, self.heads, each),
        ] {
            if !value.is_multiple_of(divisor) {
                return Err(ConfigError::Multiple {
                    field,
                    value,
                    divisor,
                    rule,
                });
            }
        }
        Ok(())
    }
}
