//! The whole model, from a video and its conditions to tokens of velocity.

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::activation::silu;
use burn::tensor::{Device, Tensor, TensorData};
use dsp_core::shape::reshape;
use dsp_core::{Session, Shard};

use super::attention::Text;
use super::block::{BlockPairs, Conditions};
use super::config::{Init, SPACE, VideoDitConfig};
use super::embed::{CaptionEmbedder, NumberEmbedder, PatchEmbedder};
use super::final_layer::FinalLayer;
use super::modulation::{ByFrame, FrameMask};
use super::patch::{PatchOrder, patchify, unpatchify};
use crate::error::{ConfigError, ModelError};
use crate::layers::{linear, narrow, sin_cos_2d};
use crate::random::{Draws, Purpose};
use dsp_core::linear::project;

/// STDiT-3 (Open-Sora 1.2; Zheng et al., arXiv:2412.20404).
#[derive(Module, Debug)]
pub struct VideoDit {
    /// Patches.
    pub x_embedder: PatchEmbedder,
    /// Timesteps.
    pub t_embedder: NumberEmbedder,
    /// Frame rates.
    pub fps_embedder: NumberEmbedder,
    /// `[C, 6·C]`: from the timestep's embedding to every block's modulation; stored elsewhere as `t_block.1`.
    pub t_block: Linear,
    /// Text.
    pub y_embedder: CaptionEmbedder,
    /// The blocks; stored elsewhere without this level of the path.
    pub blocks: BlockPairs,
    /// The last layer.
    pub final_layer: FinalLayer,
    /// See [`VideoDitConfig::in_channels`].
    pub in_channels: usize,
    /// See [`VideoDitConfig::input_sq_size`].
    pub input_sq_size: usize,
}

/// What conditions a video: the same on every rank.
#[derive(Debug, Clone)]
pub struct VideoConditions {
    /// One for each sample, from 0 (the video) to 1000 (noise).
    pub timesteps: Vec<f64>,
    /// Frames a second, one for each sample.
    pub fps: Vec<f64>,
    /// The height and width of the picture in pixels, from which the positions' scale is taken.
    pub resolution: [f64; 2],
    /// The text encoder's features, `[B, L, caption_channels]`.
    pub text: Text,
    /// Which time positions are to be generated; all of them if it is not there.
    pub frame_mask: Option<FrameMask>,
}

impl Text {
    /// Text of which a mask keeps some tokens: those of each sample are brought to its front.
    ///
    /// # Shapes
    /// - `tokens`: `[B, L, channels]`; `keep[sample][token]`
    ///
    /// # Errors
    /// [`ModelError::Shape`] if the mask is not `B` by `L`.
    pub fn masked(tokens: Tensor<3>, keep: &[Vec<bool>]) -> Result<Self, ModelError> {
        let [batch, length, channels] = tokens.dims();
        if keep.len() != batch || keep.iter().any(|sample| sample.len() != length) {
            return Err(ModelError::Shape {
                what: "the text mask",
                got: keep.iter().map(Vec::len).collect(),
                rule: format!("the text has {batch} samples of {length} tokens"),
            });
        }
        let mut order = Vec::with_capacity(batch * length);
        let mut lengths = Vec::with_capacity(batch);
        for (sample, keep) in keep.iter().enumerate() {
            let row = |token: usize| (sample * length + token) as i64;
            lengths.push(keep.iter().filter(|&&keep| keep).count());
            order.extend((0..length).filter(|&token| keep[token]).map(row));
            order.extend((0..length).filter(|&token| !keep[token]).map(row));
        }
        let in_order = order
            .iter()
            .enumerate()
            .all(|(place, &row)| place as i64 == row);
        let tokens = if in_order {
            tokens
        } else {
            let order = TensorData::new(order, [batch * length]);
            let order = Tensor::from_data(order, &tokens.device());
            let rows = tokens.reshape([batch * length, channels]).select(0, order);
            rows.reshape([batch, length, channels])
        };
        Ok(Self {
            tokens,
            lengths: lengths.into(),
        })
    }

    /// Text all of whose tokens count.
    pub fn full(tokens: Tensor<3>) -> Self {
        let [batch, length, _] = tokens.dims();
        Self {
            tokens,
            lengths: vec![length; batch].into(),
        }
    }
}

impl VideoDitConfig {
    /// A model with parameters drawn from a seed, in the device's element type.
    ///
    /// # Errors
    /// [`ConfigError`] if the configuration describes no model.
    pub fn init(&self, init: Init, seed: u64, device: &Device) -> Result<VideoDit, ConfigError> {
        self.check()?;
        let hidden = self.hidden_size;
        let draws = &mut Draws::new(seed, Purpose::Parameters, 0);
        let volume: usize = self.patch_size.iter().product();
        let mut model = VideoDit {
            x_embedder: PatchEmbedder::new(
                self.in_channels,
                self.patch_size,
                hidden,
                draws,
                device,
            ),
            t_embedder: NumberEmbedder::new(hidden, draws, device),
            fps_embedder: NumberEmbedder::new(hidden, draws, device),
            t_block: linear(hidden, 6 * hidden, draws, device),
            y_embedder: CaptionEmbedder::new(
                [self.model_max_length, self.caption_channels, hidden],
                draws,
                device,
            ),
            blocks: BlockPairs::drawn(&self.block(), self.depth, init, draws, device),
            final_layer: FinalLayer::new(hidden, volume * self.out_channels(), draws, device),
            in_channels: self.in_channels,
            input_sq_size: self.input_sq_size,
        };
        if init == Init::AsPublished {
            let closing = &mut model.fps_embedder.mlp_out;
            closing.weight = closing.weight.clone().map(|weight| weight.zeros_like());
        }
        Ok(model)
    }
}

impl VideoDit {
    /// Runs the model on this rank's part of a video.
    ///
    /// Each rank holds the whole video, takes patches of it, keeps its own and embeds only those.
    ///
    /// # Shapes
    /// - `video`: `[B, C, F, H, W]`, the same on every rank; `session`: of [`VideoDitConfig::shape`]
    /// - returns: `[B, T, S, 1, pt·ph·pw·out]` in the plan's output layout, see [`velocity`](Self::velocity)
    ///
    /// # Gradient
    /// The video's and the text's are each rank's terms, whose sum over the ranks is the gradient.
    ///
    /// # Errors
    /// [`ModelError`] if an input does not fit the model or the session, or the ranks fail.
    pub fn forward(
        &self,
        video: Tensor<5>,
        conditions: &VideoConditions,
        session: &Session,
    ) -> Result<Shard, ModelError> {
        let [batch, _, _, height, width] = video.dims();
        conditions.check(self, &video)?;
        let patch = self.x_embedder.patch_size();
        let dtype = self.t_block.weight.dtype();
        let video = if video.dtype() == dtype {
            video
        } else {
            video.cast(dtype)
        };

        let patches = session.split(patchify(video, patch, PatchOrder::ChannelFirst))?;
        let grid = [height.div_ceil(patch[1]), width.div_ceil(patch[2])];
        let x = patches.map(|patches| self.x_embedder.forward(patches))?;
        let positions = self.positions(&x, grid, conditions.resolution);
        let x = x.map(|x| x + positions)?;

        let time = self.timestep(conditions, batch);
        let blocks = Conditions {
            text: Text {
                tokens: self.y_embedder.forward(conditions.text.tokens.clone()),
                lengths: conditions.text.lengths.clone(),
            },
            modulation: time.clone().map(|t| {
                let [batch, _, hidden] = t.dims();
                let rows = project(silu(t), &self.t_block);
                rows.reshape([batch, 6, hidden])
            }),
        };
        let mut stages = session.stages();
        let x = self.blocks.forward(x, &blocks, &mut stages)?;
        let x = stages.finish(x)?;
        self.final_layer.forward(x, &time)
    }

    /// The velocity in the model's output: without the second half of the channels, if there is one.
    ///
    /// # Shapes
    /// - `tokens`: `[…, pt·ph·pw·out]`; returns `[…, pt·ph·pw·in]`
    ///
    /// # Errors
    /// [`ModelError::Core`] never in practice: the positions do not change.
    pub fn velocity(&self, tokens: Shard) -> Result<Shard, ModelError> {
        let volume: usize = self.x_embedder.patch_size().iter().product();
        Ok(tokens.map(|tokens| {
            let [batch, s1, s2, s3, channels] = tokens.dims();
            let outputs = channels / volume;
            if outputs == self.in_channels {
                return tokens;
            }
            let pixels: Tensor<5> = reshape(tokens, [batch, s1, s2 * s3, volume, outputs]);
            let kept = narrow(pixels, 4, 0..self.in_channels);
            reshape(kept, [batch, s1, s2, s3, volume * self.in_channels])
        })?)
    }

    /// Gathers output tokens and lays them out as a video of `size` frames, rows and columns.
    ///
    /// # Shapes
    /// - `tokens`: `[B, T, S, 1, pt·ph·pw·channels]`; returns `[B, channels, F, H, W]`, whole on every rank
    ///
    /// # Errors
    /// [`ModelError`] if the video is of another size, or the ranks fail.
    pub fn video(
        &self,
        tokens: Shard,
        size: [usize; 3],
        session: &Session,
    ) -> Result<Tensor<5>, ModelError> {
        let tokens = session.gather(tokens)?;
        unpatchify(tokens, self.x_embedder.patch_size(), size)
    }

    /// `[1, 1, S, 1, C]` for the places that `x` holds.
    fn positions(&self, x: &Shard, grid: [usize; 2], resolution: [f64; 2]) -> Tensor<5> {
        let x_dims = x.tensor().dims();
        let base_size = ((grid[0] * grid[1]) as f64).sqrt().round_ties_even();
        let scale = (resolution[0] * resolution[1]).sqrt() / self.input_sq_size as f64;
        let places = x.positions(SPACE);
        let table = sin_cos_2d(&places, grid, x_dims[4], scale, base_size);
        let data = TensorData::new(table, [1, 1, x_dims[2], 1, x_dims[4]]);
        Tensor::from_data(data, (&x.tensor().device(), x.tensor().dtype()))
    }

    /// `[B, 1, C]`: timestep and frame rate.
    fn timestep(&self, conditions: &VideoConditions, batch: usize) -> ByFrame<3> {
        let fps = self.fps_embedder.forward(&conditions.fps);
        let hidden = fps.dims()[1];
        let embed = |timesteps: &[f64]| {
            let sum = self.t_embedder.forward(timesteps) + fps.clone();
            sum.reshape([batch, 1, hidden])
        };
        ByFrame {
            generated: embed(&conditions.timesteps),
            given: (conditions.frame_mask.as_ref())
                .map(|mask| (mask.clone(), embed(&vec![0.0; batch]))),
        }
    }
}

impl VideoConditions {
    /// Checks that they and the video fit the model and each other.
    ///
    /// # Errors
    /// [`ModelError::Shape`] with what does not fit and the rule.
    pub fn check(&self, model: &VideoDit, video: &Tensor<5>) -> Result<(), ModelError> {
        let dims = video.dims();
        let [batch, channels, frames, ..] = dims;
        let shape = |what, got, rule| Err(ModelError::Shape { what, got, rule });
        if channels != model.in_channels {
            let rule = format!("the model has {} channels", model.in_channels);
            return shape("the video", dims.to_vec(), rule);
        }
        for (what, got) in [
            ("the timesteps", self.timesteps.len()),
            ("the frame rates", self.fps.len()),
            ("the text's lengths", self.text.lengths.len()),
            ("the text", self.text.tokens.dims()[0]),
        ] {
            if got != batch {
                return shape(what, vec![got], format!("the video has {batch} samples"));
            }
        }
        let times = frames.div_ceil(model.x_embedder.patch_size()[0]);
        match &self.frame_mask {
            Some(mask) if mask.dims() != Some([batch, times]) => shape(
                "the frame mask",
                mask.dims().map_or(vec![], |dims| dims.to_vec()),
                format!("the video has {batch} samples of {times} time positions"),
            ),
            _ => Ok(()),
        }
    }
}

impl<const D: usize> ByFrame<D> {
    fn map<const E: usize>(self, function: impl Fn(Tensor<D>) -> Tensor<E>) -> ByFrame<E> {
        ByFrame {
            generated: function(self.generated),
            given: self.given.map(|(mask, given)| (mask, function(given))),
        }
    }
}
