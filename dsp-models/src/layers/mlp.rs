//! The feed-forward network of a transformer: two linear layers with a GELU between.

use std::convert::Infallible;
use std::f64::consts::{FRAC_2_SQRT_PI, SQRT_2};

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::{Device, Tensor};
use dsp_core::linear::{project, project_without_bias};
use dsp_core::vjp::attach1;

use super::linear::linear;
use crate::random::Draws;

/// `fc2(gelu(fc1(x)))`, with the tanh form of GELU.
#[derive(Module, Debug)]
pub struct Mlp {
    /// `[in, inner]` and its bias.
    pub fc1: Linear,
    /// `[inner, out]` and its bias.
    pub fc2: Linear,
}

impl Mlp {
    /// A network of the given widths.
    pub fn new([inputs, inner, outputs]: [usize; 3], draws: &mut Draws, device: &Device) -> Self {
        Self {
            fc1: linear(inputs, inner, draws, device),
            fc2: linear(inner, outputs, draws, device),
        }
    }

    /// The whole network, both biases included.
    ///
    /// # Shapes
    /// - `x`: `[…, in]`; returns `[…, out]`
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        project(gelu_tanh(project(x, &self.fc1)), &self.fc2)
    }

    /// The network without the second bias: on a rank that holds some of the inner features, its term of the sum.
    pub fn forward_without_bias<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        project_without_bias(gelu_tanh(project(x, &self.fc1)), &self.fc2)
    }
}

/// `½·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))` (Hendrycks and Gimpel, arXiv:1606.08415).
///
/// # Gradient
/// Its own, from `x` alone: nothing of the forward pass is kept but `x`.
pub fn gelu_tanh<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    /// √(2/π)
    const SLOPE: f64 = FRAC_2_SQRT_PI / SQRT_2;
    const CUBIC: f64 = 0.044715;
    let inner = x.clone().inner();
    let tanh = |x: &Tensor<D>, square: &Tensor<D>| {
        let cubic = square.clone().mul_scalar(SLOPE * CUBIC).add_scalar(SLOPE);
        (x.clone() * cubic).tanh()
    };
    let square = inner.clone() * inner.clone();
    let y = inner.clone() * tanh(&inner, &square).add_scalar(1.0).mul_scalar(0.5);
    attach1(x, y, move |gradient: Tensor<D>| {
        // ½(1 + t) + ½·x·(1 − t²)·√(2/π)·(1 + 3·0.044715·x²)
        let square = inner.clone() * inner.clone();
        let t = tanh(&inner, &square);
        let slope = square
            .mul_scalar(1.5 * SLOPE * CUBIC)
            .add_scalar(0.5 * SLOPE);
        let change = (t.clone() * t.clone()).neg().add_scalar(1.0) * inner.clone() * slope;
        Ok::<_, Infallible>(gradient * (t.mul_scalar(0.5).add_scalar(0.5) + change))
    })
}
