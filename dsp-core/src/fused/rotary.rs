//! Rotary position embedding: each pair of channels turned by an angle of its position.

use std::convert::Infallible;

use burn::tensor::Tensor;

use crate::blocks::DIMS;
use crate::shape::reshape;
use crate::vjp::attach1;

/// Which channels of a head are turned together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairs {
    /// `2i` and `2i + 1`, as in RoFormer (Su et al., arXiv:2104.09864).
    Interleaved,
    /// `i` and `i + d/2`, as in LLaMA's published weights.
    Halves,
}

/// The cosines and sines of the angles, each `[positions, d/2]`: by position and pair.
#[derive(Debug, Clone)]
pub struct Angles {
    /// The cosines.
    pub cos: Tensor<2>,
    /// The sines.
    pub sin: Tensor<2>,
}

/// `(a, b) ↦ (a·cos − b·sin, b·cos + a·sin)` for each pair of channels of each head.
///
/// # Shapes
/// - `x`: `[B, positions, n1, n2, heads·d]`; returns the same
///
/// # Gradient
/// The turn the other way: of `x` nothing is kept.
///
/// # Panics
/// If `x` has other positions than the angles, or `d` does not divide its channels.
pub fn rotary(x: Tensor<DIMS>, angles: Angles, pairs: Pairs) -> Tensor<DIMS> {
    let [_, positions, _, _, channels] = x.dims();
    let ([held, half], sines) = (angles.cos.dims(), angles.sin.dims());
    assert!(
        held == positions && sines == [held, half] && channels.is_multiple_of((2 * half).max(1)),
        "a rotary embedding of {positions} positions and {channels} channels cannot have angles {:?} and {sines:?}",
        [held, half]
    );
    let y = turned(x.clone().inner(), &angles, pairs);
    let back = Angles {
        cos: angles.cos,
        sin: angles.sin.neg(),
    };
    attach1(x, y, move |gradient| {
        Ok::<_, Infallible>(turned(gradient, &back, pairs))
    })
}

fn turned(x: Tensor<DIMS>, angles: &Angles, pairs: Pairs) -> Tensor<DIMS> {
    #[cfg(feature = "flex")]
    if let Some(native) = super::rows::native(&x) {
        use super::rows::Native;
        return match native {
            Native::F32 => flex::turned::<f32>(x, angles, pairs),
            Native::F64 => flex::turned::<f64>(x, angles, pairs),
        };
    }
    portable(x, angles, pairs)
}

pub(super) fn portable(x: Tensor<DIMS>, angles: &Angles, pairs: Pairs) -> Tensor<DIMS> {
    let (dims, [positions, half]) = (x.dims(), angles.cos.dims());
    if dims.contains(&0) {
        return x;
    }
    let [batch, _, n1, n2, channels] = dims;
    let rows = n1 * n2 * (channels / (2 * half));
    // The pairs' own dim is the last, or the last but one.
    let (seen, dim) = match pairs {
        Pairs::Interleaved => ([batch, positions, rows, half, 2], 4),
        Pairs::Halves => ([batch, positions, rows, 2, half], 3),
    };
    let mut table = [1, positions, 1, half, half];
    table[dim] = 1;
    let [cos, sin] = [&angles.cos, &angles.sin].map(|values| reshape(values.clone(), table));
    let x: Tensor<DIMS> = reshape(x, seen);
    let [a, b] = [0, 1].map(|channel| x.clone().narrow(dim, channel, 1));
    let first = a.clone() * cos.clone() - b.clone() * sin.clone();
    let second = b * cos + a * sin;
    reshape(Tensor::cat(vec![first, second], dim), dims)
}

#[cfg(feature = "flex")]
mod flex {
    use burn::tensor::Tensor;

    use super::super::real::{Real, vectorised};
    use super::super::rows::{Rows, WHOLE, changed};
    use super::{Angles, Pairs};
    use crate::blocks::DIMS;

    pub(super) fn turned<E: Real>(x: Tensor<DIMS>, angles: &Angles, pairs: Pairs) -> Tensor<DIMS> {
        let [_, positions, n1, n2, width] = x.dims();
        let [cos, sin] = [&angles.cos, &angles.sin].map(|values| Rows::<E>::of(values.clone()));
        let half = cos.width();
        let (y, _) = changed::<E, _, DIMS>(x, WHOLE, |first, block| {
            vectorised(
                #[inline(always)]
                || {
                    for (row, y) in block.chunks_exact_mut(width).enumerate() {
                        let position = (first + row) / (n1 * n2) % positions;
                        let (cos, sin) = (cos.row(position), sin.row(position));
                        for head in y.chunks_exact_mut(2 * half) {
                            match pairs {
                                Pairs::Interleaved => {
                                    let pairs = head.chunks_exact_mut(2).zip(cos.iter().zip(sin));
                                    for (pair, (&cos, &sin)) in pairs {
                                        let (a, b) = (pair[0], pair[1]);
                                        pair[0] = a * cos - b * sin;
                                        pair[1] = b * cos + a * sin;
                                    }
                                }
                                Pairs::Halves => {
                                    let (a, b) = head.split_at_mut(half);
                                    let pairs = a.iter_mut().zip(b).zip(cos.iter().zip(sin));
                                    for ((a, b), (&cos, &sin)) in pairs {
                                        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                                    }
                                }
                            }
                        }
                    }
                },
            );
        });
        y
    }
}
