//! A block: self-attention over one axis, cross-attention to the text, a feed-forward network; and the stack of
//! pairs of a spatial and a temporal one.
//!
//! ```text
//!   x ─┬─ norm ─ shift, scale ─ attention over an axis ─ gate ─ + ─┬─ cross-attention ─ + ─┬─ norm ─ shift, scale ─ MLP ─ gate ─ + ─
//!      └─────────────────────────────────────────────────────────┘└────────────────────┘└──────────────────────────────────────┘
//! ```

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use dsp_core::session::Stages;
use dsp_core::{Ending, Shard};

use super::attention::{CrossAttention, SelfAttention, Text};
use super::config::{BlockConfig, BlockKind, Init};
use super::modulation::{ByFrame, modulated_norm};
use crate::error::{ConfigError, ModelError};
use crate::layers::{Mlp, Rotary};
use crate::random::{Draws, Purpose};

/// The epsilon of the layer norms.
pub(crate) const NORM_EPSILON: f64 = 1e-6;

/// What conditions every block: the same on every rank.
#[derive(Debug, Clone)]
pub struct Conditions {
    /// The text, in the width of the residual stream.
    pub text: Text,
    /// `[B, 6, C]`: shift, scale and gate of the attention, then of the feed-forward network.
    pub modulation: ByFrame<3>,
}

/// A block.
#[derive(Module, Debug)]
pub struct Block {
    /// Over one axis of the video.
    pub attn: SelfAttention,
    /// To the text.
    pub cross_attn: CrossAttention,
    /// Position-wise.
    pub mlp: Mlp,
    /// `[6, C]`: what is added to the conditions' modulation.
    pub scale_shift_table: Param<Tensor<2>>,
}

impl Block {
    pub(crate) fn new(
        config: &BlockConfig,
        kind: BlockKind,
        init: Init,
        draws: &mut Draws,
        device: &Device,
    ) -> Self {
        let hidden = config.hidden_size;
        let mut block = Self {
            attn: SelfAttention::new(config, draws, device),
            cross_attn: CrossAttention::new(config, draws, device),
            mlp: Mlp::new([hidden, config.inner_size(), hidden], draws, device),
            scale_shift_table: modulation_table(6, hidden, draws, device),
        };
        if (kind, init) == (BlockKind::Temporal, Init::AsPublished) {
            for closing in [
                &mut block.attn.proj,
                &mut block.cross_attn.proj,
                &mut block.mlp.fc2,
            ] {
                closing.weight = closing.weight.clone().map(|weight| weight.zeros_like());
            }
        }
        block
    }

    /// Runs the block's three stages.
    ///
    /// # Shapes
    /// - `x`: `[B, T, S, 1, C]`; returns the same, laid out as the strategy has it after these stages
    ///
    /// # Errors
    /// [`ModelError::Core`] if the ranks fail, or the stages are not those that were declared.
    pub fn forward(
        &self,
        x: Shard,
        conditions: &Conditions,
        rotary: Option<&Rotary>,
        stages: &mut Stages<'_>,
    ) -> Result<Shard, ModelError> {
        let table = self.scale_shift_table.val();
        let modulation = &conditions.modulation;

        let stage = stages.attention()?;
        let x = stage.arrange(x)?;
        let [shift, scale, gate, _, _, _] = modulation.rows(&table, &x);
        let h = x
            .clone()
            .map(|x| modulated_norm(x, shift, scale, NORM_EPSILON))?;
        let h = self.attn.forward(h, rotary, &stage)?;
        let x = stage.end(x, h, Ending::of(&self.attn.proj).gated(gate))?;

        let stage = stages.cross_attention()?;
        let x = stage.arrange(x)?;
        let h = self
            .cross_attn
            .forward(x.clone(), &conditions.text, &stage)?;
        let x = stage.end(x, h, Ending::of(&self.cross_attn.proj))?;

        let stage = stages.feed_forward()?;
        let x = stage.arrange(x)?;
        let [_, _, _, shift, scale, gate] = modulation.rows(&table, &x);
        let h = x
            .clone()
            .map(|x| modulated_norm(x, shift, scale, NORM_EPSILON))?;
        let h = stage.enter(h)?.map(|x| self.mlp.inner(x))?;
        Ok(stage.end(x, h, Ending::of(&self.mlp.fc2).gated(gate))?)
    }
}

/// A table of `rows` rows, with the deviation with which PixArt-α and its descendants begin.
pub(crate) fn modulation_table(
    rows: usize,
    hidden: usize,
    draws: &mut Draws,
    device: &Device,
) -> Param<Tensor<2>> {
    let deviation = (hidden as f64).powf(-0.5);
    Param::from_tensor(draws.normal([rows, hidden], deviation, device))
}

/// A stack of pairs, each a spatial and then a temporal block: the model without its ends.
#[derive(Module, Debug)]
pub struct BlockPairs {
    /// The spatial blocks.
    pub spatial_blocks: Vec<Block>,
    /// The temporal blocks, as many.
    pub temporal_blocks: Vec<Block>,
}

impl BlockPairs {
    /// `depth` pairs, drawn from a seed. Declare them to a strategy by [`BlockConfig::shape`].
    ///
    /// # Errors
    /// [`ConfigError`] if the configuration describes no block.
    pub fn new(
        config: &BlockConfig,
        depth: usize,
        init: Init,
        seed: u64,
        device: &Device,
    ) -> Result<Self, ConfigError> {
        config.check()?;
        Ok(Self::drawn(
            config,
            depth,
            init,
            &mut Draws::new(seed, Purpose::Parameters, 0),
            device,
        ))
    }

    pub(crate) fn drawn(
        config: &BlockConfig,
        depth: usize,
        init: Init,
        draws: &mut Draws,
        device: &Device,
    ) -> Self {
        let mut blocks = |kind| {
            (0..depth)
                .map(|_| Block::new(config, kind, init, draws, device))
                .collect()
        };
        Self {
            spatial_blocks: blocks(BlockKind::Spatial),
            temporal_blocks: blocks(BlockKind::Temporal),
        }
    }

    /// Runs all pairs.
    ///
    /// # Shapes
    /// - `x`: `[B, T, S, 1, C]` in the plan's input layout ([`dsp_core::Session::split`])
    /// - returns: the same shape, as the last stage leaves it; [`Stages::finish`] brings it into the plan's
    ///   output layout
    ///
    /// # Errors
    /// [`ModelError::Core`] if the ranks fail, or the stages are not those that were declared.
    pub fn forward(
        &self,
        x: Shard,
        conditions: &Conditions,
        stages: &mut Stages<'_>,
    ) -> Result<Shard, ModelError> {
        self.forward_observed(x, conditions, stages, |_, _, _| {})
    }

    /// As [`forward`](Self::forward), showing `observe` the output of each block: its kind, its pair's number
    /// and the shard.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_observed(
        &self,
        mut x: Shard,
        conditions: &Conditions,
        stages: &mut Stages<'_>,
        mut observe: impl FnMut(BlockKind, usize, &Shard),
    ) -> Result<Shard, ModelError> {
        let pairs = self.spatial_blocks.iter().zip(&self.temporal_blocks);
        for (pair, (spatial, temporal)) in pairs.enumerate() {
            x = spatial.forward(x, conditions, None, stages)?;
            observe(BlockKind::Spatial, pair, &x);
            let rotary = Rotary::new(temporal.attn.head_dim);
            x = temporal.forward(x, conditions, Some(&rotary), stages)?;
            observe(BlockKind::Temporal, pair, &x);
        }
        Ok(x)
    }
}
