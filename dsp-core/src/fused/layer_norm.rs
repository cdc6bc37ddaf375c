//! Layer norm, scaled and shifted.

use std::convert::Infallible;

use burn::tensor::{DType, Tensor};

use super::is_half;
use super::spread::{groups, sum_to};
use crate::vjp::attach3;

/// `x̂·weight + bias` with `x̂ = (x − mean) / √(var + ε)` over the last dim (Ba et al., arXiv:1607.06450).
///
/// A weight and a bias for all positions make a plain layer norm; `1 + scale` and `shift` for each sample, an adaptive
/// one (DiT, arXiv:2212.09748).
///
/// # Shapes
/// - `x`: `[…, C]`
/// - `weight`, `bias`: `[…, C]`, of one shape: the dims of `x` or 1; of one dtype, where `x` is in 16 bits also f32
/// - returns: as `x`
///
/// # Gradient
/// With `g' = g·weight` and `r = 1/√(var + ε)`: `dx = r·(g' − mean(g') − x̂·mean(g'·x̂))`; `dweight` and `dbias` are
/// `g·x̂` and `g`, summed over the dims along which they are 1. Nothing is kept but the inputs.
///
/// # Panics
/// If the shapes do not fit.
pub fn layer_norm<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<D>,
    bias: Tensor<D>,
    epsilon: f64,
) -> Tensor<D> {
    assert_eq!(weight.dims(), bias.dims(), "layer norm: weight and bias");
    let groups = groups("layer norm's weight", x.dims(), weight.dims());
    through([x, weight, bias], epsilon, groups)
}

/// The norm through the loops, or the portable way without groups.
pub(super) fn through<const D: usize>(
    inputs: [Tensor<D>; 3],
    epsilon: f64,
    groups: Option<usize>,
) -> Tensor<D> {
    let inner = inputs.each_ref().map(|tensor| tensor.clone().inner());
    let y = forward(inner.clone(), epsilon, groups);
    let [inner_x, inner_weight, _] = inner;
    attach3(inputs, y, move |gradient| {
        let inputs = [inner_x.clone(), inner_weight.clone(), gradient];
        Ok::<_, Infallible>(backward(inputs, epsilon, groups))
    })
}

fn forward<const D: usize>(
    inputs: [Tensor<D>; 3],
    epsilon: f64,
    groups: Option<usize>,
) -> Tensor<D> {
    let dtype = inputs[0].dtype();
    if is_half(dtype) {
        let inputs = inputs.map(|input| input.cast(DType::F32));
        return forward(inputs, epsilon, groups).cast(dtype);
    }
    #[cfg(feature = "flex")]
    if let (Some(native), Some(groups)) = (super::rows::native(&inputs[0]), groups) {
        use super::rows::Native;
        return match native {
            Native::F32 => flex::forward::<f32, D>(inputs, epsilon, groups),
            Native::F64 => flex::forward::<f64, D>(inputs, epsilon, groups),
        };
    }
    portable_forward(inputs, epsilon)
}

/// From `x`, the weight and the gradient.
fn backward<const D: usize>(
    inputs: [Tensor<D>; 3],
    epsilon: f64,
    groups: Option<usize>,
) -> [Tensor<D>; 3] {
    let [dtype, of_vectors, _] = inputs.each_ref().map(Tensor::dtype);
    if is_half(dtype) {
        let inputs = inputs.map(|input| input.cast(DType::F32));
        let [dx, dweight, dbias] = backward(inputs, epsilon, groups);
        return [
            dx.cast(dtype),
            dweight.cast(of_vectors),
            dbias.cast(of_vectors),
        ];
    }
    #[cfg(feature = "flex")]
    if let (Some(native), Some(groups)) = (super::rows::native(&inputs[0]), groups) {
        use super::rows::Native;
        return match native {
            Native::F32 => flex::backward::<f32, D>(inputs, epsilon, groups),
            Native::F64 => flex::backward::<f64, D>(inputs, epsilon, groups),
        };
    }
    portable_backward(inputs, epsilon)
}

fn normal<const D: usize>(x: Tensor<D>, epsilon: f64) -> (Tensor<D>, Tensor<D>) {
    let centred = x.clone() - x.mean_dim(D - 1);
    let variance = (centred.clone() * centred.clone()).mean_dim(D - 1);
    let scale = variance.add_scalar(epsilon).sqrt().recip();
    (centred * scale.clone(), scale)
}

fn portable_forward<const D: usize>([x, weight, bias]: [Tensor<D>; 3], epsilon: f64) -> Tensor<D> {
    normal(x, epsilon).0 * weight + bias
}

fn portable_backward<const D: usize>(
    [x, weight, gradient]: [Tensor<D>; 3],
    epsilon: f64,
) -> [Tensor<D>; 3] {
    let (normal, scale) = normal(x, epsilon);
    let dims = weight.dims();
    let dweight = sum_to(gradient.clone() * normal.clone(), dims);
    let dbias = sum_to(gradient.clone(), dims);
    let gradient = gradient * weight;
    let along = (gradient.clone() * normal.clone()).mean_dim(D - 1);
    let mean = gradient.clone().mean_dim(D - 1);
    [(gradient - mean - normal * along) * scale, dweight, dbias]
}

#[cfg(feature = "flex")]
mod flex {
    use burn::tensor::Tensor;

    use super::super::real::{Real, sum, sum_of_pairs, vectorised};
    use super::super::rows::{Owned, Rows, WHOLE, changed, of_groups, written};

    /// The mean, and `1/√(var + ε)`.
    #[inline(always)]
    fn moments<E: Real>(x: &[E], epsilon: E) -> (E, E) {
        let count = E::of(x.len() as f64);
        let mean = sum(x, |x| x) / count;
        let variance = sum(x, |x| (x - mean) * (x - mean)) / count;
        (mean, E::ONE / (variance + epsilon).root())
    }

    pub(super) fn forward<E: Real, const D: usize>(
        [x, weight, bias]: [Tensor<D>; 3],
        epsilon: f64,
        groups: usize,
    ) -> Tensor<D> {
        let dims = x.dims();
        let [x, weight, bias] = [x, weight, bias].map(Rows::<E>::of);
        let (group, epsilon) = (x.count() / groups.max(1), E::of(epsilon));
        let (y, _) = written(dims, WHOLE, |rows, y| {
            vectorised(
                #[inline(always)]
                || {
                    for row in rows {
                        let (weight, bias) = (weight.row(row / group), bias.row(row / group));
                        let x = x.row(row);
                        let (mean, scale) = moments(x, epsilon);
                        let vectors = x.iter().zip(weight).zip(bias);
                        y.extend(
                            vectors
                                .map(|((&x, &weight), &bias)| (x - mean) * scale * weight + bias),
                        );
                    }
                },
            );
        });
        y
    }

    pub(super) fn backward<E: Real, const D: usize>(
        [x, weight, gradient]: [Tensor<D>; 3],
        epsilon: f64,
        groups: usize,
    ) -> [Tensor<D>; 3] {
        let dims = weight.dims();
        let [x, weight] = [x, weight].map(Rows::<E>::of);
        let (width, group, epsilon) = (x.width(), x.count() / groups.max(1), E::of(epsilon));
        let count = E::of(width as f64);
        // Of each block: the sums of g·x̂, then those of g.
        let (dx, sums) = changed(gradient, group, |first, block| {
            let weight = weight.row(first / group);
            let mut sums = vec![E::ZERO; 2 * width];
            let (dweight, dbias) = sums.split_at_mut(width);
            let mut normal = vec![E::ZERO; width];
            vectorised(
                #[inline(always)]
                || {
                    for (row, g) in block.chunks_exact_mut(width).enumerate() {
                        let x = x.row(first + row);
                        let (mean, scale) = moments(x, epsilon);
                        for (normal, &x) in normal.iter_mut().zip(x) {
                            *normal = (x - mean) * scale;
                        }
                        let vectors = normal.iter().zip(weight);
                        let sums = dweight.iter_mut().zip(dbias.iter_mut());
                        for ((g, (&normal, &weight)), (dweight, dbias)) in
                            g.iter_mut().zip(vectors).zip(sums)
                        {
                            *dweight += *g * normal;
                            *dbias += *g;
                            *g *= weight;
                        }
                        let mean = sum(g, |g| g) / count;
                        let along = sum_of_pairs(g, &normal, |g, normal| g * normal) / count;
                        for (g, &normal) in g.iter_mut().zip(&normal) {
                            *g = (*g - mean - normal * along) * scale;
                        }
                    }
                },
            );
            sums
        });
        let sums = of_groups(sums, groups, 2 * width);
        let vectors = |half: usize| {
            let of_group = |sums: &Vec<E>| sums[half * width..][..width].to_vec();
            Owned::from_vec(sums.iter().flat_map(of_group).collect(), &dims).into_tensor()
        };
        [dx, vectors(0), vectors(1)]
    }
}
