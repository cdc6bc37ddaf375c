//! Linear layers' weights, drawn from a seed. [`dsp_core::linear`] applies them.

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

/// The same without a bias.
pub fn linear_without_bias(
    inputs: usize,
    outputs: usize,
    draws: &mut Draws,
    device: &Device,
) -> Linear {
    Linear {
        bias: None,
        ..linear(inputs, outputs, draws, device)
    }
}

/// A trainable parameter.
pub(crate) fn parameter<const D: usize>(value: Tensor<D>) -> Param<Tensor<D>> {
    Param::from_tensor(value)
}

/// A tensor that is stored with the parameters and never trained.
pub(crate) fn buffer<const D: usize>(value: Tensor<D>) -> Param<Tensor<D>> {
    Param::initialized(ParamId::new(), value).set_require_grad(false)
}
