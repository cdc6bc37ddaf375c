//! What enters the model, embedded into the width of the residual stream: patches, timesteps and frame rates,
//! text.

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::activation::silu;
use burn::tensor::{Device, Tensor, TensorData};

use crate::layers::{Mlp, buffer, linear, timestep_features};
use crate::random::Draws;
use dsp_core::linear::{affine, project};

/// The number of features of a timestep or a frame rate.
const FEATURES: usize = 256;

/// A convolution whose stride is its kernel: a linear map of patches, position by position.
#[derive(Module, Debug)]
pub struct PatchProjection {
    /// `[hidden, channels, pt, ph, pw]`.
    pub weight: Param<Tensor<5>>,
    /// `[hidden]`.
    pub bias: Param<Tensor<1>>,
}

/// The embedding of patches.
#[derive(Module, Debug)]
pub struct PatchEmbedder {
    /// The linear map.
    pub proj: PatchProjection,
}

impl PatchEmbedder {
    pub(crate) fn new(
        channels: usize,
        [pt, ph, pw]: [usize; 3],
        hidden: usize,
        draws: &mut Draws,
        device: &Device,
    ) -> Self {
        // As a torch convolution begins: uniform up to 1/√(channels·patch).
        let bound = ((channels * pt * ph * pw) as f64).powf(-0.5);
        let weight = draws.uniform([hidden, channels, pt, ph, pw], bound, device);
        let bias = draws.uniform([hidden], bound, device);
        Self {
            proj: PatchProjection {
                weight: Param::from_tensor(weight),
                bias: Param::from_tensor(bias),
            },
        }
    }

    /// Embeds patches.
    ///
    /// # Shapes
    /// - `patches`: `[B, T, S, 1, channels·pt·ph·pw]`, channels first
    /// - returns: `[B, T, S, 1, hidden]`
    pub fn forward(&self, patches: Tensor<5>) -> Tensor<5> {
        let weight = self.proj.weight.val();
        let [hidden, channels, pt, ph, pw] = weight.dims();
        let weight = weight
            .reshape([hidden, channels * pt * ph * pw])
            .transpose();
        affine(patches, weight, Some(self.proj.bias.val()))
    }

    /// The extent of a patch.
    pub fn patch_size(&self) -> [usize; 3] {
        let [_, _, pt, ph, pw] = self.proj.weight.dims();
        [pt, ph, pw]
    }
}

/// The embedding of a number for each sample: sines and cosines of it, and a small network.
#[derive(Module, Debug)]
pub struct NumberEmbedder {
    /// `[256, hidden]`; stored elsewhere as `mlp.0`.
    pub mlp_in: Linear,
    /// `[hidden, hidden]`; stored elsewhere as `mlp.2`.
    pub mlp_out: Linear,
}

impl NumberEmbedder {
    pub(crate) fn new(hidden: usize, draws: &mut Draws, device: &Device) -> Self {
        Self {
            mlp_in: linear(FEATURES, hidden, draws, device),
            mlp_out: linear(hidden, hidden, draws, device),
        }
    }

    /// Embeds one number for each sample.
    ///
    /// # Shapes
    /// - returns: `[values, hidden]`, in the parameters' element type
    pub fn forward(&self, values: &[f64]) -> Tensor<2> {
        let weight = self.mlp_in.weight.val();
        let features = timestep_features(values, FEATURES);
        let data = TensorData::new(features, [values.len(), FEATURES]);
        let features = Tensor::from_data(data, (&weight.device(), weight.dtype()));
        project(silu(project(features, &self.mlp_in)), &self.mlp_out)
    }
}

/// The embedding of text features, and the features that stand for no text.
#[derive(Module, Debug)]
pub struct CaptionEmbedder {
    /// From the text encoder's width to the stream's.
    pub y_proj: Mlp,
    /// `[tokens, caption_channels]`: what replaces the text of a sample that goes without. Stored with the
    /// parameters, but not trained.
    pub y_embedding: Param<Tensor<2>>,
}

impl CaptionEmbedder {
    pub(crate) fn new(
        [tokens, channels, hidden]: [usize; 3],
        draws: &mut Draws,
        device: &Device,
    ) -> Self {
        let deviation = (channels as f64).powf(-0.5);
        let nothing = draws.normal([tokens, channels], deviation, device);
        Self {
            y_proj: Mlp::new([channels, hidden, hidden], draws, device),
            y_embedding: buffer(nothing),
        }
    }

    /// Embeds text.
    ///
    /// # Shapes
    /// - `text`: `[B, L, caption_channels]`; returns `[B, L, hidden]`
    pub fn forward(&self, text: Tensor<3>) -> Tensor<3> {
        self.y_proj.forward(text)
    }

    /// The features that stand for no text, for one sample: `[tokens, caption_channels]`.
    ///
    /// For classifier-free guidance, and for training without text now and then.
    pub fn no_text(&self) -> Tensor<2> {
        self.y_embedding.val()
    }
}
