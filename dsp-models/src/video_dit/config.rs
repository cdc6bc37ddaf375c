//! Sizes: what a block, a stack of block pairs, and the whole model are built from, and what they declare.

use burn::config::Config;
use dsp_core::layout::AxisSet;
use dsp_core::strategy::{AttentionStage, OutputLayout, StageKind};
use dsp_core::{Heads, Mask, ModelShape, SeqAxis, Stage};

use crate::error::ConfigError;

/// Time: the first sequence axis.
pub const TIME: SeqAxis = SeqAxis::FIRST;
/// Space, a frame's tokens row by row: the second sequence axis.
pub const SPACE: SeqAxis = SeqAxis::SECOND;

/// What a block attends over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BlockKind {
    /// The tokens of one frame.
    Spatial,
    /// The frames, at one place.
    Temporal,
}

impl BlockKind {
    /// The axis.
    pub fn axis(self) -> SeqAxis {
        match self {
            Self::Spatial => SPACE,
            Self::Temporal => TIME,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Spatial => "spatial",
            Self::Temporal => "temporal",
        }
    }
}

/// How fresh parameters are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Init {
    /// As published: what closes a temporal block, and the frame rate's embedding, is 0, so that a model starts
    /// as one of single pictures. Nothing then flows back through temporal attention in the first step.
    AsPublished,
    /// Everything random, so that every parameter and every token has a gradient: for comparisons and tests.
    Dense,
}

/// A block.
#[derive(Config, Debug, PartialEq)]
pub struct BlockConfig {
    /// The width of the residual stream.
    pub hidden_size: usize,
    /// Heads of self- and cross-attention.
    pub num_heads: usize,
    /// The inner width of the feed-forward network over that of the stream.
    #[config(default = 4.0)]
    pub mlp_ratio: f64,
    /// Whether queries and keys are normalised, per head, by their root mean square.
    #[config(default = true)]
    pub qk_norm: bool,
}

impl BlockConfig {
    /// The channels of a head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_heads
    }

    /// The inner width of the feed-forward network.
    pub fn inner_size(&self) -> usize {
        (self.hidden_size as f64 * self.mlp_ratio) as usize
    }

    /// What a stack of `depth` pairs, spatial then temporal, declares to a strategy for an activation of
    /// `[batch, frames, tokens, 1, hidden]`.
    ///
    /// Six stages a pair: self-attention, cross-attention and feed-forward of the spatial block, then of the
    /// temporal one.
    pub fn shape(
        &self,
        depth: usize,
        [batch, frames, tokens]: [usize; 3],
        output: OutputLayout,
    ) -> ModelShape {
        let heads = Heads::multi(self.num_heads, self.head_dim());
        let inner = self.inner_size();
        let mut stages = Vec::with_capacity(6 * depth);
        for pair in 0..depth {
            for kind in [BlockKind::Spatial, BlockKind::Temporal] {
                let name = |part: &str| format!("{}_blocks.{pair}.{part}", kind.name());
                let axes = AxisSet::of(&[kind.axis()]);
                let attention = AttentionStage::softmax(axes, heads, Mask::Full);
                stages.push(Stage::new(name("attn"), StageKind::Attention(attention)));
                stages.push(Stage::new(
                    name("cross_attn"),
                    StageKind::CrossAttention { heads },
                ));
                stages.push(Stage::new(name("mlp"), StageKind::FeedForward { inner }));
            }
        }
        ModelShape {
            batch,
            lengths: vec![frames, tokens],
            hidden: self.hidden_size,
            stages,
            output,
        }
    }

    /// Checks that the sizes describe a block.
    ///
    /// # Errors
    /// [`ConfigError`] with the field, its value and the rule.
    pub fn check(&self) -> Result<(), ConfigError> {
        nonzero("hidden_size", self.hidden_size)?;
        nonzero("num_heads", self.num_heads)?;
        nonzero("mlp_ratio × hidden_size", self.inner_size())?;
        let rule =
            "heads have a whole and even number of channels, which rotary embedding turns in pairs";
        multiple("hidden_size", self.hidden_size, 2 * self.num_heads, rule)
    }
}

/// STDiT-3, the video diffusion transformer of Open-Sora 1.2. The defaults are the published 1.1B model's, and
/// the fields have the names of its `config.json`.
#[derive(Config, Debug, PartialEq)]
pub struct VideoDitConfig {
    /// Channels of the video: 4 for the latents of the original's VAE, 3 for pixels, or any other number.
    #[config(default = 4)]
    pub in_channels: usize,
    /// The extent of a token in frames, rows and columns.
    #[config(default = "[1, 2, 2]")]
    pub patch_size: [usize; 3],
    /// The width of the residual stream.
    #[config(default = 1152)]
    pub hidden_size: usize,
    /// Pairs of a spatial and a temporal block.
    #[config(default = 28)]
    pub depth: usize,
    /// Heads of each attention.
    #[config(default = 16)]
    pub num_heads: usize,
    /// The inner width of the feed-forward networks over that of the stream.
    #[config(default = 4.0)]
    pub mlp_ratio: f64,
    /// Whether queries and keys are normalised.
    #[config(default = true)]
    pub qk_norm: bool,
    /// Whether the output has a second half of channels, for a variance: rectified flow ignores it, but the
    /// published weights have it.
    #[config(default = true)]
    pub pred_sigma: bool,
    /// The width of the text encoder's features.
    #[config(default = 4096)]
    pub caption_channels: usize,
    /// The number of text tokens of the embedding that stands for no text.
    #[config(default = 300)]
    pub model_max_length: usize,
    /// The side of the square picture, in pixels, whose positions have the scale 1.
    #[config(default = 512)]
    pub input_sq_size: usize,
}

impl VideoDitConfig {
    /// The configuration of each block.
    pub fn block(&self) -> BlockConfig {
        BlockConfig::new(self.hidden_size, self.num_heads)
            .with_mlp_ratio(self.mlp_ratio)
            .with_qk_norm(self.qk_norm)
    }

    /// The output's channels.
    pub fn out_channels(&self) -> usize {
        self.in_channels * if self.pred_sigma { 2 } else { 1 }
    }

    /// How many tokens a video of `[frames, height, width]` has along each, the last of them padded if the
    /// patch does not divide the extent.
    pub fn grid(&self, [frames, height, width]: [usize; 3]) -> [usize; 3] {
        let [pt, ph, pw] = self.patch_size;
        [frames.div_ceil(pt), height.div_ceil(ph), width.div_ceil(pw)]
    }

    /// What the model declares to a strategy for a video of `[batch, channels, frames, height, width]`.
    ///
    /// The output's layout is free: losses compare shards, and a whole video is gathered from any layout.
    /// Whoever needs the input's layout sets [`ModelShape::output`].
    pub fn shape(&self, batch: usize, frames: usize, height: usize, width: usize) -> ModelShape {
        let [t, h, w] = self.grid([frames, height, width]);
        self.block()
            .shape(self.depth, [batch, t, h * w], OutputLayout::Free)
    }

    /// Checks that the sizes describe a model.
    ///
    /// # Errors
    /// [`ConfigError`] with the field, its value and the rule.
    pub fn check(&self) -> Result<(), ConfigError> {
        self.block().check()?;
        nonzero("in_channels", self.in_channels)?;
        nonzero("caption_channels", self.caption_channels)?;
        nonzero("input_sq_size", self.input_sq_size)?;
        for extent in self.patch_size {
            nonzero("patch_size", extent)?;
        }
        let rule = "the position embedding has sines and cosines of two coordinates";
        multiple("hidden_size", self.hidden_size, 4, rule)
    }
}

fn nonzero(field: &'static str, value: usize) -> Result<(), ConfigError> {
    if value == 0 {
        return Err(ConfigError::Zero { field });
    }
    Ok(())
}

fn multiple(
    field: &'static str,
    value: usize,
    divisor: usize,
    rule: &'static str,
) -> Result<(), ConfigError> {
    if !value.is_multiple_of(divisor) {
        return Err(ConfigError::Multiple {
            field,
            value,
            divisor,
            rule,
        });
    }
    Ok(())
}
