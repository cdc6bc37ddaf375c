//! The feed-forward network of a transformer: two linear layers with a GELU between.

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::{Device, Tensor};
use dsp_core::fused::gelu_tanh;
use dsp_core::linear::project;

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
        project(self.inner(x), &self.fc2)
    }

    /// What the second layer takes: the inner features, of which a rank may hold some.
    ///
    /// # Shapes
    /// - `x`: `[…, in]`; returns `[…, inner]`
    pub fn inner<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        gelu_tanh(project(x, &self.fc1))
    }
}
