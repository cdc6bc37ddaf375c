//! A layer: attention over time, over latitude and over longitude, then a feed-forward network.
//!
//! ```text
//!   x ─┬─ norm ─ attention over an axis ─ + ─    (three times, an axis each)    ─┬─ norm ─ MLP ─ + ─
//!      └──────────────────────────────────┘                                     └───────────────┘
//! ```

use burn::module::Module;
use burn::tensor::Device;
use dsp_core::session::Stages;
use dsp_core::{Ending, Shard};

use crate::error::ModelError;
use crate::layers::{Mlp, RmsNorm, Rotary};
use crate::random::Draws;
use crate::video_dit::{BlockConfig, SelfAttention};

/// The epsilon of the norms.
pub(crate) const NORM_EPSILON: f64 = 1e-6;

/// Attention over one axis, of the normed residual stream and added to it.
#[derive(Module, Debug)]
pub struct Axial {
    /// Over the channels.
    pub norm: RmsNorm,
    /// Over the axis that the stage declares.
    pub attn: SelfAttention,
}

impl Axial {
    fn new(config: &BlockConfig, draws: &mut Draws, device: &Device) -> Self {
        Self {
            norm: RmsNorm::new(config.hidden_size, NORM_EPSILON, device),
            attn: SelfAttention::new(config, draws, device),
        }
    }

    fn forward(
        &self,
        x: Shard,
        rotary: Option<&Rotary>,
        stages: &mut Stages<'_>,
    ) -> Result<Shard, ModelError> {
        let stage = stages.attention()?;
        let x = stage.arrange(x)?;
        let h = x.clone().map(|x| self.norm.forward(x))?;
        let h = self.attn.forward(h, rotary, &stage)?;
        Ok(stage.end(x, h, Ending::of(&self.attn.proj))?)
    }
}

/// A layer.
#[derive(Module, Debug)]
pub struct Layer {
    /// Over time, with rotary positions.
    pub time: Axial,
    /// Over latitude.
    pub latitude: Axial,
    /// Over longitude.
    pub longitude: Axial,
    /// Before the feed-forward network.
    pub mlp_norm: RmsNorm,
    /// Position-wise.
    pub mlp: Mlp,
}

impl Layer {
    pub(crate) fn new(config: &BlockConfig, draws: &mut Draws, device: &Device) -> Self {
        let hidden = config.hidden_size;
        Self {
            time: Axial::new(config, draws, device),
            latitude: Axial::new(config, draws, device),
            longitude: Axial::new(config, draws, device),
            mlp_norm: RmsNorm::new(hidden, NORM_EPSILON, device),
            mlp: Mlp::new([hidden, config.inner_size(), hidden], draws, device),
        }
    }

    /// Runs the layer's four stages.
    ///
    /// # Shapes
    /// - `x`: `[B, T, lat, lon, C]`; returns the same, laid out as the strategy has it after these stages
    ///
    /// # Errors
    /// [`ModelError::Core`] if the ranks fail, or the stages are not those that were declared.
    pub fn forward(&self, x: Shard, stages: &mut Stages<'_>) -> Result<Shard, ModelError> {
        let rotary = Rotary::new(self.time.attn.head_dim);
        let x = self.time.forward(x, Some(&rotary), stages)?;
        let x = self.latitude.forward(x, None, stages)?;
        let x = self.longitude.forward(x, None, stages)?;

        let stage = stages.feed_forward()?;
        let x = stage.arrange(x)?;
        let h = x.clone().map(|x| self.mlp_norm.forward(x))?;
        let h = stage.enter(h)?.map(|x| self.mlp.inner(x))?;
        Ok(stage.end(x, h, Ending::of(&self.mlp.fc2))?)
    }
}
