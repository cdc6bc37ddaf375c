//! Normalisations over the last dim, each with a gradient of its own that keeps nothing but the input.

use std::convert::Infallible;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use dsp_core::vjp::attach1;

use super::linear::parameter;

/// `(x − mean) / √(var + ε)` over the last dim, without a weight or a bias: adaptive layer norms bring theirs.
///
/// # Shapes
/// - `x`: `[…, C]`; returns the same
///
/// # Gradient
/// With `x̂` the result and `r = 1/√(var + ε)`: `r·(g − mean(g) − x̂·mean(g·x̂))`.
pub fn layer_norm<const D: usize>(x: Tensor<D>, epsilon: f64) -> Tensor<D> {
    let inner = x.clone().inner();
    let ones = Tensor::ones([inner.dims()[D - 1]], (&inner.device(), inner.dtype()));
    let y = burn::tensor::module::layer_norm(inner.clone(), ones, None, epsilon);
    attach1(x, y, move |gradient: Tensor<D>| {
        let last = D - 1;
        let centred = inner.clone() - inner.clone().mean_dim(last);
        let variance = (centred.clone() * centred.clone()).mean_dim(last);
        let scale = variance.add_scalar(epsilon).sqrt().recip();
        let normal = centred * scale.clone();
        let along = (gradient.clone() * normal.clone()).mean_dim(last);
        let mean = gradient.clone().mean_dim(last);
        Ok::<_, Infallible>((gradient - mean - normal * along) * scale)
    })
}

/// [`layer_norm`] times a weight, plus a bias (Ba et al., arXiv:1607.06450).
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
        let normal = layer_norm(x, self.epsilon);
        normal * self.gamma.val().unsqueeze() + self.beta.val().unsqueeze()
    }
}

/// `x / √(mean(x²) + ε)` over the last dim.
///
/// # Gradient
/// With `x̂` the result and `r = 1/√(mean(x²) + ε)`: `r·(g − x̂·mean(g·x̂))`.
pub fn unit_rms<const D: usize>(x: Tensor<D>, epsilon: f64) -> Tensor<D> {
    let inner = x.clone().inner();
    let scale = move |x: &Tensor<D>| {
        let square = (x.clone() * x.clone()).mean_dim(D - 1);
        square.add_scalar(epsilon).sqrt().recip()
    };
    let y = inner.clone() * scale(&inner);
    attach1(x, y, move |gradient: Tensor<D>| {
        let scale = scale(&inner);
        let normal = inner.clone() * scale.clone();
        let along = (gradient.clone() * normal.clone()).mean_dim(D - 1);
        Ok::<_, Infallible>((gradient - normal * along) * scale)
    })
}

/// [`unit_rms`] times a weight (Zhang and Sennrich, arXiv:1910.07467).
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

    /// The norm over the last dim.
    ///
    /// # Shapes
    /// - `x`: `[…, C]`; returns the same
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        unit_rms(x, self.epsilon) * self.gamma.val().unsqueeze()
    }
}
