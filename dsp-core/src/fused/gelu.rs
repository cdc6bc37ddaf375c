//! The tanh form of GELU.

use std::convert::Infallible;
use std::f64::consts::{FRAC_2_SQRT_PI, SQRT_2};

use burn::tensor::{DType, Tensor};

use super::is_half;
use crate::vjp::attach1;

/// `2·√(2/π)`: the form's tanh is that of a logistic function at twice its argument.
const SLOPE: f64 = 2.0 * FRAC_2_SQRT_PI / SQRT_2;
/// `2·√(2/π)·0.044715`.
const CUBIC: f64 = SLOPE * 0.044715;
/// Of an `x²` beyond it the tanh is ±1 to the last bit of every type. There its derivative is 0 and must meet no
/// infinite one of its argument: so `x²` goes no further.
const SETTLED: f64 = 1024.0;

/// `½·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))` (Hendrycks and Gimpel, arXiv:1606.08415).
///
/// # Shapes
/// - `x`: any; returns the same
///
/// # Gradient
/// Its own, from `x` alone: nothing of the forward pass is kept but `x`.
pub fn gelu_tanh<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let inner = x.clone().inner();
    let y = forward(inner.clone());
    attach1(x, y, move |gradient: Tensor<D>| {
        Ok::<_, Infallible>(backward(inner.clone(), gradient))
    })
}

// Where x is negative its share is the difference of near numbers, which 16 bits would lose: of those, all is in f32.

fn forward<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let dtype = x.dtype();
    if is_half(dtype) {
        return forward(x.cast(DType::F32)).cast(dtype);
    }
    #[cfg(feature = "flex")]
    if let Some(native) = super::rows::native(&x) {
        use super::rows::Native;
        return match native {
            Native::F32 => flex::forward::<f32, D>(x),
            Native::F64 => flex::forward::<f64, D>(x),
        };
    }
    portable_forward(x)
}

fn backward<const D: usize>(x: Tensor<D>, gradient: Tensor<D>) -> Tensor<D> {
    let dtype = x.dtype();
    if is_half(dtype) {
        return backward(x.cast(DType::F32), gradient.cast(DType::F32)).cast(dtype);
    }
    #[cfg(feature = "flex")]
    if let Some(native) = super::rows::native(&x) {
        use super::rows::Native;
        return match native {
            Native::F32 => flex::backward::<f32, D>(x, gradient),
            Native::F64 => flex::backward::<f64, D>(x, gradient),
        };
    }
    portable_backward(x, gradient)
}

/// `½(1 + tanh)`, given `x²`.
fn share<const D: usize>(x: Tensor<D>, square: Tensor<D>) -> Tensor<D> {
    let argument = square.mul_scalar(CUBIC / 2.0).add_scalar(SLOPE / 2.0) * x;
    argument.tanh().add_scalar(1.0).mul_scalar(0.5)
}

pub(super) fn portable_forward<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    share(x.clone(), x.clone() * x.clone()) * x
}

pub(super) fn portable_backward<const D: usize>(x: Tensor<D>, gradient: Tensor<D>) -> Tensor<D> {
    // With s = ½(1 + tanh): s + x·s·(1 − s)·(the derivative of s's argument).
    let square = (x.clone() * x.clone()).clamp_max(SETTLED);
    let s = share(x.clone(), square.clone());
    let argument = square.mul_scalar(3.0 * CUBIC).add_scalar(SLOPE);
    let change = s.clone() * s.clone().neg().add_scalar(1.0) * argument * x;
    gradient * (s + change)
}

#[cfg(feature = "flex")]
mod flex {
    use burn::tensor::Tensor;

    use super::super::real::{Real, vectorised};
    use super::super::rows::{Rows, WHOLE, changed, written};
    use super::{CUBIC, SETTLED, SLOPE};

    pub(super) fn forward<E: Real, const D: usize>(x: Tensor<D>) -> Tensor<D> {
        let (dims, x) = (x.dims(), Rows::<E>::of(x));
        let (slope, cubic) = (E::of(SLOPE), E::of(CUBIC));
        let (y, _) = written(dims, WHOLE, |rows, y| {
            vectorised(
                #[inline(always)]
                || {
                    for row in rows {
                        let gelu = |&x: &E| x * ((slope + cubic * (x * x)) * x).logistic();
                        y.extend(x.row(row).iter().map(gelu));
                    }
                },
            );
        });
        y
    }

    pub(super) fn backward<E: Real, const D: usize>(
        x: Tensor<D>,
        gradient: Tensor<D>,
    ) -> Tensor<D> {
        let x = Rows::<E>::of(x);
        let (width, slope, cubic, three) = (x.width(), E::of(SLOPE), E::of(CUBIC), E::of(3.0));
        let settled = E::of(SETTLED);
        let (dx, _) = changed::<E, _, D>(gradient, WHOLE, |first, block| {
            vectorised(
                #[inline(always)]
                || {
                    for (row, g) in block.chunks_exact_mut(width).enumerate() {
                        for (g, &x) in g.iter_mut().zip(x.row(first + row)) {
                            let square = cubic * (x * x).at_most(settled);
                            let s = ((slope + square) * x).logistic();
                            let change = s * (E::ONE - s) * (slope + three * square) * x;
                            *g *= s + change;
                        }
                    }
                },
            );
        });
        dx
    }
}
