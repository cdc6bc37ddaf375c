//! Activations with gradients of their own, which keep nothing but the input and are exact in f64.

use std::convert::Infallible;

use burn::tensor::Tensor;
use burn::tensor::activation;
use dsp_core::vjp::attach1;

/// `1 / (1 + e^{−x})`.
///
/// # Gradient
/// `s·(1 − s)`.
pub fn sigmoid<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let y = activation::sigmoid(x.clone().inner());
    let kept = y.clone();
    attach1(x, y, move |gradient: Tensor<D>| {
        let slope = kept.clone() * kept.clone().neg().add_scalar(1.0);
        Ok::<_, Infallible>(gradient * slope)
    })
}

/// `x·sigmoid(x)` (Hendrycks and Gimpel, arXiv:1606.08415).
///
/// # Gradient
/// `s + x·s·(1 − s)`.
pub fn silu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let inner = x.clone().inner();
    let y = inner.clone() * activation::sigmoid(inner.clone());
    attach1(x, y, move |gradient: Tensor<D>| {
        let s = activation::sigmoid(inner.clone());
        let slope = s.clone() * (inner.clone() * s.neg().add_scalar(1.0)).add_scalar(1.0);
        Ok::<_, Infallible>(gradient * slope)
    })
}
