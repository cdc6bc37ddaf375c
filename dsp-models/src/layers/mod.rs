//! What transformers are made of: position-wise layers, each on `[batch, s1, s2, s3, channels]` or on the
//! last dim of anything. None of them knows of ranks; what depends on a position is told the global one.

use std::ops::Range;

use burn::tensor::Tensor;
use dsp_core::layout::select_ranges;

mod activation;
mod linear;
mod mlp;
mod norm;
mod rotary;
mod sincos;

pub use activation::{gelu, sigmoid, silu};
pub use dsp_core::fused::{Pairs, Target, cross_entropy};
pub(crate) use linear::{buffer, parameter};
pub use linear::{linear, linear_without_bias};
pub use mlp::Mlp;
pub use norm::{LayerNorm, RmsNorm};
pub use rotary::{Rotary, RotaryTables};
pub use sincos::{sin_cos_2d, timestep_features};

/// A range of one dim, as [`Tensor::narrow`] gives it, also of a tensor that is empty along another dim.
pub(crate) fn narrow<const D: usize>(x: Tensor<D>, dim: usize, range: Range<usize>) -> Tensor<D> {
    select_ranges(x, dim, std::slice::from_ref(&range))
}
