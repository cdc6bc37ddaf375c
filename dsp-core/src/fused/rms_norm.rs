//! Root-mean-square norm of parts of the last dim, scaled.

use std::convert::Infallible;

use burn::tensor::{DType, Tensor};

use super::is_half;
use super::spread::sum_to;
use crate::shape::reshape;
use crate::vjp::attach2;

/// `x / √(mean(x²) + ε) · weight`, for each run of as many channels as the weight has (Zhang and Sennrich,
/// arXiv:1910.07467): of a head, or of all channels.
///
/// # Shapes
/// - `x`: `[…, n·c]`; `weight`: `[c]`, where `x` is in 16 bits also in f32
/// - returns: as `x`
///
/// # Gradient
/// With `x̂ = x·r`, `r = 1/√(mean(x²) + ε)` and `g' = g·weight`: `dx = r·(g' − x̂·mean(g'·x̂))`, and `dweight` the sum
/// of `g·x̂`. Nothing is kept but the inputs.
///
/// # Panics
/// If the weight's length does not divide the channels.
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, epsilon: f64) -> Tensor<D> {
    let (channels, [length]) = (x.dims()[D - 1], weight.dims());
    assert!(
        channels.checked_rem(length).unwrap_or(channels) == 0,
        "an RMS norm of runs of {length} channels needs a multiple of as many, not {channels}"
    );
    let (inner_x, inner_weight) = (x.clone().inner(), weight.clone().inner());
    let y = forward(inner_x.clone(), inner_weight.clone(), epsilon);
    let mut dims = [1; D];
    dims[D - 1] = length;
    attach2([x, reshape(weight, dims)], y, move |gradient| {
        let (dx, dweight) = backward([inner_x.clone(), gradient], inner_weight.clone(), epsilon);
        Ok::<_, Infallible>([dx, reshape(dweight, dims)])
    })
}

fn forward<const D: usize>(x: Tensor<D>, weight: Tensor<1>, epsilon: f64) -> Tensor<D> {
    let dtype = x.dtype();
    if is_half(dtype) {
        let (x, weight) = (x.cast(DType::F32), weight.cast(DType::F32));
        return forward(x, weight, epsilon).cast(dtype);
    }
    #[cfg(feature = "flex")]
    if let Some(native) = super::rows::native(&x) {
        use super::rows::Native;
        return match native {
            Native::F32 => flex::forward::<f32, D>(x, weight, epsilon),
            Native::F64 => flex::forward::<f64, D>(x, weight, epsilon),
        };
    }
    portable_forward(x, weight, epsilon)
}

/// From `x` and the gradient.
fn backward<const D: usize>(
    inputs: [Tensor<D>; 2],
    weight: Tensor<1>,
    epsilon: f64,
) -> (Tensor<D>, Tensor<1>) {
    let (dtype, of_weight) = (inputs[0].dtype(), weight.dtype());
    if is_half(dtype) {
        let inputs = inputs.map(|input| input.cast(DType::F32));
        let (dx, dweight) = backward(inputs, weight.cast(DType::F32), epsilon);
        return (dx.cast(dtype), dweight.cast(of_weight));
    }
    #[cfg(feature = "flex")]
    if let Some(native) = super::rows::native(&inputs[0]) {
        use super::rows::Native;
        return match native {
            Native::F32 => flex::backward::<f32, D>(inputs, weight, epsilon),
            Native::F64 => flex::backward::<f64, D>(inputs, weight, epsilon),
        };
    }
    portable_backward(inputs, weight, epsilon)
}

/// The runs as rows.
fn runs<const D: usize>(x: Tensor<D>, length: usize) -> Tensor<2> {
    let count = x.shape().num_elements().checked_div(length).unwrap_or(0);
    reshape(x, [count, length])
}

/// `1/√(mean(x²) + ε)`.
fn scale(x: &Tensor<2>, epsilon: f64) -> Tensor<2> {
    let square = (x.clone() * x.clone()).mean_dim(1);
    square.add_scalar(epsilon).sqrt().recip()
}

pub(super) fn portable_forward<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<1>,
    epsilon: f64,
) -> Tensor<D> {
    let (dims, length) = (x.dims(), weight.dims()[0]);
    let x = runs(x, length);
    let scale = scale(&x, epsilon);
    reshape(x * scale * weight.unsqueeze(), dims)
}

pub(super) fn portable_backward<const D: usize>(
    [x, gradient]: [Tensor<D>; 2],
    weight: Tensor<1>,
    epsilon: f64,
) -> (Tensor<D>, Tensor<1>) {
    let (dims, length) = (x.dims(), weight.dims()[0]);
    let [x, gradient] = [x, gradient].map(|tensor| runs(tensor, length));
    let scale = scale(&x, epsilon);
    let normal = x * scale.clone();
    let dweight = sum_to(gradient.clone() * normal.clone(), [1, length]);
    let gradient = gradient * weight.unsqueeze();
    let along = (gradient.clone() * normal.clone()).mean_dim(1);
    let dx = (gradient - normal * along) * scale;
    (reshape(dx, dims), reshape(dweight, [length]))
}

#[cfg(feature = "flex")]
mod flex {
    use burn::tensor::Tensor;

    use super::super::real::{Real, sum, sum_of_pairs, vectorised};
    use super::super::rows::{Owned, Rows, WHOLE, add_up, changed, written};

    /// `1/√(mean(x²) + ε)`.
    #[inline(always)]
    fn scale<E: Real>(x: &[E], epsilon: E) -> E {
        let square = sum(x, |x| x * x) / E::of(x.len() as f64);
        E::ONE / (square + epsilon).root()
    }

    pub(super) fn forward<E: Real, const D: usize>(
        x: Tensor<D>,
        weight: Tensor<1>,
        epsilon: f64,
    ) -> Tensor<D> {
        let dims = x.dims();
        let (x, weight, epsilon) = (Rows::<E>::of(x), Rows::of(weight), E::of(epsilon));
        let weight = weight.row(0);
        let (y, _) = written(dims, WHOLE, |rows, y| {
            vectorised(
                #[inline(always)]
                || {
                    for row in rows {
                        for x in x.row(row).chunks_exact(weight.len()) {
                            let scale = scale(x, epsilon);
                            let pairs = x.iter().zip(weight);
                            y.extend(pairs.map(|(&x, &weight)| x * scale * weight));
                        }
                    }
                },
            );
        });
        y
    }

    pub(super) fn backward<E: Real, const D: usize>(
        [x, gradient]: [Tensor<D>; 2],
        weight: Tensor<1>,
        epsilon: f64,
    ) -> (Tensor<D>, Tensor<1>) {
        let (x, weight, epsilon) = (Rows::<E>::of(x), Rows::of(weight), E::of(epsilon));
        let (width, weight) = (x.width(), weight.row(0));
        let (length, count) = (weight.len(), E::of(weight.len() as f64));
        let (dx, sums) = changed(gradient, WHOLE, |first, block| {
            let mut dweight = vec![E::ZERO; length];
            vectorised(
                #[inline(always)]
                || {
                    for (row, g) in block.chunks_exact_mut(width).enumerate() {
                        let runs = x.row(first + row).chunks_exact(length);
                        for (g, x) in g.chunks_exact_mut(length).zip(runs) {
                            let scale = scale(x, epsilon);
                            let vectors = x.iter().zip(weight);
                            for ((g, dweight), (&x, &weight)) in
                                g.iter_mut().zip(&mut dweight).zip(vectors)
                            {
                                *dweight += *g * (x * scale);
                                *g *= weight;
                            }
                            let along = sum_of_pairs(g, x, |g, x| g * (x * scale)) / count;
                            for (g, &x) in g.iter_mut().zip(x) {
                                *g = (*g - x * scale * along) * scale;
                            }
                        }
                    }
                },
            );
            dweight
        });
        let dweight = Owned::from_vec(add_up(sums, length), &[length]);
        (dx, dweight.into_tensor())
    }
}
