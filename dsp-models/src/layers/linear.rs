//! Linear layers with weights drawn from a seed, and the projection whose bias is added elsewhere.

use burn::module::{Param, ParamId};
use burn::nn::Linear;
use burn::tensor::{Device, Tensor};

use crate::random::Draws;

/// A linear layer with Xavier-uniform weights and a bias of 0, as DiT and its descendants begin.
pub fn linear(inputs: usize, outputs: usize, draws: &mut Draws, device: &Device) -> Linear {
    let bound = (6.0 / (inputs + outputs) as f64).sqrt();
    Linear {
        weight: parameter(draws.uniform([inputs, outputs], bound, device)),
        bias: Some(parameter(Tensor::zeros([outputs], device))),
    }
}

/// `x·W` without the bias, which [`dsp_core::strategy::StageRun::leave`] adds once, after any reduction.
///
/// # Shapes
/// - `x`: `[…, in]`; returns `[…, out]`
pub fn project_without_bias<const D: usize>(x: Tensor<D>, layer: &Linear) -> Tensor<D> {
    burn::tensor::module::linear(x, layer.weight.val(), None)
}

/// A trainable parameter.
pub(crate) fn parameter<const D: usize>(value: Tensor<D>) -> Param<Tensor<D>> {
    Param::from_tensor(value)
}

/// A tensor that is stored with the parameters and never trained.
pub(crate) fn buffer<const D: usize>(value: Tensor<D>) -> Param<Tensor<D>> {
    Param::initialized(ParamId::new(), value).set_require_grad(false)
}
