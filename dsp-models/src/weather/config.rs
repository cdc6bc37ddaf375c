//! Sizes, and what the model declares to a strategy.

use burn::config::Config;
use dsp_core::layout::AxisSet;
use dsp_core::strategy::{AttentionStage, OutputLayout, StageKind};
use dsp_core::{Heads, Mask, ModelShape, SeqAxis, Stage};
use serde::{Deserialize, Serialize};

use crate::error::ConfigError;
use crate::video_dit::BlockConfig;

/// Time: the first sequence axis.
pub const TIME: SeqAxis = SeqAxis::FIRST;
/// Latitude, a grid's rows: the second sequence axis.
pub const LATITUDE: SeqAxis = SeqAxis::SECOND;
/// Longitude, a grid's columns: the third sequence axis.
pub const LONGITUDE: SeqAxis = SeqAxis::THIRD;

/// Which times attention over time sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum TimeMask {
    /// The present and the past: what a forecast may know.
    Causal,
    /// All of them. The next fields are then among the input, so this is for filling in, not for forecasts.
    Full,
}

impl From<TimeMask> for Mask {
    fn from(mask: TimeMask) -> Self {
        match mask {
            TimeMask::Causal => Self::Causal,
            TimeMask::Full => Self::Full,
        }
    }
}

/// The axial weather model.
#[derive(Config, Debug, PartialEq)]
pub struct WeatherConfig {
    /// Fields at each point, such as the wind's two components.
    pub variables: usize,
    /// The width of the residual stream.
    #[config(default = 256)]
    pub hidden_size: usize,
    /// Layers, each of three attentions and a feed-forward network.
    #[config(default = 6)]
    pub depth: usize,
    /// Heads of each attention.
    #[config(default = 8)]
    pub num_heads: usize,
    /// The inner width of the feed-forward networks over that of the stream.
    #[config(default = 4.0)]
    pub mlp_ratio: f64,
    /// Whether queries and keys are normalised, per head, by their root mean square.
    #[config(default = true)]
    pub qk_norm: bool,
    /// Which times attention over time sees.
    #[config(default = "TimeMask::Causal")]
    pub time_mask: TimeMask,
    /// How many multiples of latitude and longitude a point's place is told by: their finest has that many
    /// waves around the globe.
    #[config(default = 8)]
    pub harmonics: usize,
}

impl WeatherConfig {
    /// The configuration of each attention and feed-forward network.
    pub fn block(&self) -> BlockConfig {
        BlockConfig::new(self.hidden_size, self.num_heads)
            .with_mlp_ratio(self.mlp_ratio)
            .with_qk_norm(self.qk_norm)
    }

    /// What the model declares to a strategy for fields of `[batch, times, latitudes, longitudes, variables]`.
    ///
    /// Four stages a layer: attention over time, latitude, longitude, and the feed-forward network. The output's
    /// layout is free, as the loss compares shards.
    pub fn shape(
        &self,
        batch: usize,
        times: usize,
        latitudes: usize,
        longitudes: usize,
    ) -> ModelShape {
        let block = self.block();
        let heads = Heads::multi(block.num_heads, block.head_dim());
        let mut stages = Vec::with_capacity(4 * self.depth);
        for layer in 0..self.depth {
            for (part, axis, mask) in [
                ("time", TIME, self.time_mask.into()),
                ("latitude", LATITUDE, Mask::Full),
                ("longitude", LONGITUDE, Mask::Full),
            ] {
                let attention = AttentionStage::softmax(AxisSet::of(&[axis]), heads, mask);
                stages.push(Stage::new(
                    format!("layers.{layer}.{part}"),
                    StageKind::Attention(attention),
                ));
            }
            let inner = block.inner_size();
            stages.push(Stage::new(
                format!("layers.{layer}.mlp"),
                StageKind::FeedForward { inner },
            ));
        }
        ModelShape {
            batch,
            lengths: vec![times, latitudes, longitudes],
            hidden: self.hidden_size,
            stages,
            output: OutputLayout::Free,
        }
    }

    /// Checks that the sizes describe a model.
    ///
    /// # Errors
    /// [`ConfigError`] with the field, its value and the rule.
    pub fn check(&self) -> Result<(), ConfigError> {
        for (field, value) in [("variables", self.variables), ("harmonics", self.harmonics)] {
            if value == 0 {
                return Err(ConfigError::Zero { field });
            }
        }
        self.block().check()
    }
}
