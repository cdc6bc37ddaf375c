//! Parts of the channels, whose gradients are put together once.
//!
//! ```text
//!             ┌── part 0 ──► query      forward: views, nothing is copied
//!   x ── token┼── part 1 ──► key        backward: each part leaves its gradient with the token, which lays them
//!             └── part 2 ──► value      side by side when all have come
//! ```
//!
//! By slices of their own, each part's gradient would be a tensor of zeros as large as `x` with a part filled in, and
//! all of them would be added up. Here the parts hang on a token of one element, whose own gradient nobody needs: it
//! stands for `x` in the graph, so it is walked after all parts that the loss depends on.

use std::convert::Infallible;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::Tensor;

use crate::vjp::attach1;

/// The channels of `x` in `N` equal parts.
///
/// # Shapes
/// - `x`: `[…, N·c]`; returns `N` times `[…, c]`
///
/// # Gradient
/// Those of the parts side by side; zeros for a part that has none.
///
/// # Panics
/// If `N` does not divide the channels.
pub fn parts<const N: usize, const D: usize>(x: Tensor<D>) -> [Tensor<D>; N] {
    let (dims, dtype) = (x.dims(), x.dtype());
    let count = dims[D - 1];
    assert!(
        count.is_multiple_of(N),
        "{count} channels do not fall into {N} equal parts"
    );
    let width = count / N;
    let range = move |part: usize| part * width..(part + 1) * width;
    let inner = x.clone().inner();
    let views = std::array::from_fn(|part| channels(inner.clone(), range(part)));
    if !x.is_tracked() {
        return views.map(|view| crate::vjp::constant_like(view, &x));
    }
    let mut part = dims;
    part[D - 1] = width;
    let arrived: Arc<Mutex<[Option<Tensor<D>>; N]>> =
        Arc::new(Mutex::new(std::array::from_fn(|_| None)));
    let left = arrived.clone();
    let one = Tensor::<1>::zeros([1], (&inner.device(), dtype));
    let token = attach1(x, one, move |gradient: Tensor<1>| {
        let mut parts = left.lock().unwrap_or_else(PoisonError::into_inner);
        let parts: [_; N] = std::array::from_fn(|index| {
            let absent = || Tensor::zeros(part, (&gradient.device(), dtype));
            parts[index].take().unwrap_or_else(absent)
        });
        Ok::<_, Infallible>(side_by_side(parts.into()))
    });
    let mut index = 0;
    views.map(|view| {
        let (place, arrived) = (index, arrived.clone());
        index += 1;
        attach1(token.clone(), view, move |gradient: Tensor<D>| {
            let nothing = Tensor::zeros([1], (&gradient.device(), dtype));
            arrived.lock().unwrap_or_else(PoisonError::into_inner)[place] = Some(gradient);
            Ok::<_, Infallible>(nothing)
        })
    })
}

/// A range of the channels of an untracked tensor.
pub(crate) fn channels<const D: usize>(x: Tensor<D>, range: Range<usize>) -> Tensor<D> {
    let mut dims = x.dims();
    dims[D - 1] = range.len();
    match dims.contains(&0) {
        true => Tensor::zeros(dims, (&x.device(), x.dtype())),
        false => x.narrow(D - 1, range.start, range.len()),
    }
}

/// Untracked tensors side by side, one after the other along the channels.
///
/// # Shapes
/// - `parts`: `[…, c]` each, of the same type on the same device, at least one; returns `[…, Σ c]`
pub(crate) fn side_by_side<const D: usize>(parts: Vec<Tensor<D>>) -> Tensor<D> {
    #[cfg(feature = "flex")]
    if let Some(native) = super::rows::native(&parts[0]) {
        use super::rows::Native;
        return match native {
            Native::F32 => flex::side_by_side::<f32, D>(parts),
            Native::F64 => flex::side_by_side::<f64, D>(parts),
        };
    }
    portable(parts)
}

pub(super) fn portable<const D: usize>(parts: Vec<Tensor<D>>) -> Tensor<D> {
    let mut dims = parts[0].dims();
    dims[D - 1] = parts.iter().map(|part| part.dims()[D - 1]).sum();
    if dims.contains(&0) {
        return Tensor::zeros(dims, (&parts[0].device(), parts[0].dtype()));
    }
    Tensor::cat(parts, D - 1)
}

#[cfg(feature = "flex")]
mod flex {
    use burn::tensor::Tensor;

    use super::super::real::Real;
    use super::super::rows::{Rows, WHOLE, written};

    pub(super) fn side_by_side<E: Real, const D: usize>(parts: Vec<Tensor<D>>) -> Tensor<D> {
        let mut dims = parts[0].dims();
        dims[D - 1] = parts.iter().map(|part| part.dims()[D - 1]).sum();
        let parts: Vec<_> = parts.into_iter().map(Rows::<E>::of).collect();
        let (whole, _) = written(dims, WHOLE, |rows, whole| {
            for row in rows {
                for part in &parts {
                    whole.extend_from_slice(part.row(row));
                }
            }
        });
        whole
    }
}
