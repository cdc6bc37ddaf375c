//! Activations with gradients of their own, which keep nothing but the input and are exact in f64.

use std::convert::Infallible;
use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

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

/// `½·x·(1 + erf(x/√2))`, the exact GELU (Hendrycks and Gimpel, arXiv:1606.08415).
///
/// # Gradient
/// `½(1 + erf(x/√2)) + x·e^{−x²/2}/√(2π)`.
pub fn gelu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let inner = x.clone().inner();
    let below = |x: &Tensor<D>| {
        let erf = x.clone().mul_scalar(FRAC_1_SQRT_2).erf();
        erf.add_scalar(1.0).mul_scalar(0.5)
    };
    let y = inner.clone() * below(&inner);
    attach1(x, y, move |gradient: Tensor<D>| {
        let square = inner.clone() * inner.clone();
        let density = square.mul_scalar(-0.5).exp();
        let density = density.mul_scalar(0.5 * FRAC_2_SQRT_PI * FRAC_1_SQRT_2);
        Ok::<_, Infallible>(gradient * (below(&inner) + inner.clone() * density))
    })
}
