//! Normalisations over the last dim with their parameters. [`dsp_core::fused`] computes them.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use dsp_core::fused;

use super::linear::parameter;

/// A layer norm with a weight and a bias (Ba et al., arXiv:1607.06450).
#[derive(Module, Debug)]
pub struct LayerNorm {
    /// `[C]`; stored elsewhere as `weight`.
    pub gamma: Param<Tensor<1>>,
    /// `[C]`; stored elsewhere as `bias`.
    pub beta: Param<Tensor<1>>,
    /// What is added to the variance.
    pub epsilon: f64,
}

impl LayerNorm {
    /// A norm over `channels`, with a weight of 1 and a bias of 0.
    pub fn new(channels: usize, epsilon: f64, device: &Device) -> Self {
        Self {
            gamma: parameter(Tensor::ones([channels], device)),
            beta: parameter(Tensor::zeros([channels], device)),
            epsilon,
        }
    }

    /// The norm over the last dim.
    ///
    /// # Shapes
    /// - `x`: `[…, C]`; returns the same
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let (weight, bias) = (self.gamma.val().unsqueeze(), self.beta.val().unsqueeze());
        fused::layer_norm(x, weight, bias, self.epsilon)
    }
}

/// A root-mean-square norm with a weight (Zhang and Sennrich, arXiv:1910.07467).
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// `[C]`; stored elsewhere as `weight`.
    pub gamma: Param<Tensor<1>>,
    /// What is added to the mean square.
    pub epsilon: f64,
}

impl RmsNorm {
    /// A norm over `channels`, with a weight of 1.
    pub fn new(channels: usize, epsilon: f64, device: &Device) -> Self {
        Self {
            gamma: parameter(Tensor::ones([channels], device)),
            epsilon,
        }
    }

    /// The norm over the last dim, or over each head's part of it.
    ///
    /// # Shapes
    /// - `x`: `[…, n·C]`; returns the same
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        fused::rms_norm(x, self.gamma.val(), self.epsilon)
    }
}
