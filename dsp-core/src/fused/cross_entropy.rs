//! Cross-entropy of logits against targets, with weights that say what each row counts.

use std::convert::Infallible;
use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{DType, IndexingUpdateOp, Int, Tensor, TensorData};

use super::is_half;
use crate::precision::computed_in;
use crate::shape::reshape;
use crate::vjp::attach1;

/// A row's target, and what its loss counts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Target {
    /// The class.
    pub class: u32,
    /// Its weight in the sum: 0 for a row that does not count.
    pub weight: f64,
}

/// `Σ_r weight_r · (logsumexp(x_r) − x_r[class_r])`, in f32 at least.
///
/// # Shapes
/// - `logits`: `[…, classes]`, as many rows as `targets`, 0 included
/// - returns: `[1]`
///
/// # Cost
/// On the CPU in f32 and f64 the logits are read once, and in the backward pass once more. Else they are taken in blocks of
/// rows, of which there are copies in f32 and what each step of the formula gives. Of the size of all logits there is their
/// gradient alone.
///
/// # Gradient
/// Its own, from the logits and two numbers a row: `weight · (softmax − 1 at the target)`, and 0 for a row of weight 0
/// whatever its logits are, which adds nothing to the loss either. Without a row it is 0, and the node is there all the
/// same, so that a rank without rows takes part in the backward pass.
///
/// # Panics
/// If there are not as many targets as rows, or one is no class. A rank that panics leaves the others to wait for it
/// until the launch ends them: what all ranks know, a loss checks on all of them before, by [`check_classes`].
pub fn cross_entropy<const D: usize>(logits: Tensor<D>, targets: &[Target]) -> Tensor<1> {
    let dims = logits.dims();
    let (rows, classes) = (dims[..D - 1].iter().product(), dims[D - 1]);
    assert_eq!(
        targets.len(),
        rows,
        "cross-entropy: {} targets (left) for the {rows} rows (right) of logits {dims:?}: each row has one",
        targets.len()
    );
    if let Err(unknown) = check_classes(targets.iter().map(|target| target.class), classes) {
        panic!("cross-entropy: {unknown}");
    }
    let inner = logits.clone().inner();
    if rows == 0 {
        let zero = Tensor::zeros([1], (&inner.device(), computed_in(inner.dtype())));
        let (device, dtype) = (inner.device(), inner.dtype());
        return attach1(logits, zero, move |_: Tensor<1>| {
            Ok::<_, Infallible>(Tensor::zeros(dims, (&device, dtype)))
        });
    }
    let x: Tensor<2> = reshape(inner, [rows, classes]);
    let targets: Arc<[Target]> = targets.into();
    let (loss, peaks) = forward(x.clone(), &targets);
    attach1(logits, loss, move |gradient| {
        let dx = backward(x.clone(), &peaks, &targets, gradient);
        Ok::<_, Infallible>(reshape(dx, dims))
    })
}

/// A target that is no class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("target {index} is class {class}, and there are {classes}, from 0")]
pub struct UnknownClass {
    /// Which of the targets, from 0.
    pub index: usize,
    /// Its class.
    pub class: u32,
    /// How many classes there are.
    pub classes: usize,
}

/// Sees that targets are among the `classes`, whoever has their rows.
///
/// # Errors
/// [`UnknownClass`] for the first one that is not.
pub fn check_classes(
    targets: impl IntoIterator<Item = u32>,
    classes: usize,
) -> Result<(), UnknownClass> {
    let mut all = targets.into_iter().enumerate();
    match all.find(|&(_, class)| class as usize >= classes) {
        Some((index, class)) => Err(UnknownClass {
            index,
            class,
            classes,
        }),
        None => Ok(()),
    }
}

/// Of each row the largest logit, and the sum of `e^{x − largest}`: both `[rows, 1]`. Together they are the logsumexp,
/// without its rounding, which large logits would multiply.
#[derive(Debug, Clone)]
pub(super) struct Peaks {
    largest: Tensor<2>,
    sum: Tensor<2>,
}

/// Logits of a block, where blocks of rows are copied: enough to keep a GPU busy, and little beside its memory.
const BLOCK: usize = 1 << 24;

/// The rows in blocks of about so many logits.
fn blocks(x: &Tensor<2>, block: usize) -> Vec<Range<usize>> {
    let [rows, classes] = x.dims();
    let size = (block / classes.max(1)).max(1);
    let starts = (0..rows).step_by(size);
    starts.map(|start| start..rows.min(start + size)).collect()
}

fn of_rows(x: &Tensor<2>, rows: &Range<usize>) -> Tensor<2> {
    match rows.len() == x.dims()[0] {
        true => x.clone(),
        false => x.clone().slice_dim(0, rows.clone()),
    }
}

fn forward(x: Tensor<2>, targets: &[Target]) -> (Tensor<1>, Peaks) {
    #[cfg(feature = "flex")]
    if let Some(native) = super::rows::native(&x) {
        use super::rows::Native;
        return match native {
            Native::F32 => flex::forward::<f32>(x, targets),
            Native::F64 => flex::forward::<f64>(x, targets),
        };
    }
    forward_in(BLOCK, x, targets)
}

/// [`forward`] of what no loop takes as it is.
pub(super) fn forward_in(block: usize, x: Tensor<2>, targets: &[Target]) -> (Tensor<1>, Peaks) {
    let of_block = |rows: Range<usize>| {
        let (part, targets) = (of_rows(&x, &rows), &targets[rows]);
        match is_half(x.dtype()) {
            true => forward(part.cast(DType::F32), targets),
            false => portable_forward(part, targets),
        }
    };
    let parts = blocks(&x, block).into_iter().map(of_block);
    let (losses, peaks): (Vec<_>, Vec<_>) = parts.unzip();
    let peaks = peaks
        .into_iter()
        .map(|Peaks { largest, sum }| (largest, sum));
    let (largest, sums) = peaks.unzip();
    let peaks = Peaks {
        largest: Tensor::cat(largest, 0),
        sum: Tensor::cat(sums, 0),
    };
    (Tensor::cat(losses, 0).sum(), peaks)
}

fn backward(x: Tensor<2>, peaks: &Peaks, targets: &[Target], gradient: Tensor<1>) -> Tensor<2> {
    #[cfg(feature = "flex")]
    if let Some(native) = super::rows::native(&x) {
        use super::rows::Native;
        return match native {
            Native::F32 => flex::backward::<f32>(x, peaks, targets, gradient),
            Native::F64 => flex::backward::<f64>(x, peaks, targets, gradient),
        };
    }
    backward_in(BLOCK, x, peaks, targets, gradient)
}

/// [`backward`] of what no loop takes as it is.
pub(super) fn backward_in(
    block: usize,
    x: Tensor<2>,
    Peaks { largest, sum }: &Peaks,
    targets: &[Target],
    gradient: Tensor<1>,
) -> Tensor<2> {
    let dtype = x.dtype();
    let of_block = |rows: Range<usize>| {
        let [part, largest, sum] = [&x, largest, sum].map(|tensor| of_rows(tensor, &rows));
        let (peaks, targets) = (Peaks { largest, sum }, &targets[rows]);
        match is_half(dtype) {
            true => backward(part.cast(DType::F32), &peaks, targets, gradient.clone()).cast(dtype),
            false => portable_backward(part, &peaks, targets, gradient.clone()),
        }
    };
    let blocks = blocks(&x, block);
    if let [all] = &blocks[..] {
        return of_block(all.clone());
    }
    let dx = Tensor::zeros(x.dims(), (&x.device(), dtype));
    blocks.into_iter().fold(dx, |dx, rows| {
        dx.slice_assign([rows.clone(), 0..x.dims()[1]], of_block(rows))
    })
}

/// The targets' classes and weights, `[rows, 1]` each.
fn columns(targets: &[Target], x: &Tensor<2>) -> (Tensor<2, Int>, Tensor<2>) {
    let (rows, device) = (targets.len(), x.device());
    let classes = targets.iter().map(|target| i64::from(target.class));
    let classes = TensorData::new(classes.collect::<Vec<_>>(), [rows, 1]);
    let weights = targets.iter().map(|target| target.weight);
    let weights = TensorData::new(weights.collect::<Vec<_>>(), [rows, 1]);
    (
        Tensor::from_data(classes, (&device, DType::I64)),
        Tensor::from_data(weights, (&device, x.dtype())),
    )
}

pub(super) fn portable_forward(x: Tensor<2>, targets: &[Target]) -> (Tensor<1>, Peaks) {
    let (classes, weights) = columns(targets, &x);
    let largest = x.clone().max_dim(1);
    let sum = (x.clone() - largest.clone()).exp().sum_dim(1);
    let loss = sum.clone().log() + (largest.clone() - x.gather(1, classes));
    // 0 times a loss that is infinite, or no number, is no 0.
    let loss = loss.mask_fill(weights.clone().equal_elem(0.0), 0.0);
    ((loss * weights).sum(), Peaks { largest, sum })
}

pub(super) fn portable_backward(
    x: Tensor<2>,
    Peaks { largest, sum }: &Peaks,
    targets: &[Target],
    gradient: Tensor<1>,
) -> Tensor<2> {
    let (classes, weights) = columns(targets, &x);
    let uncounted = weights.clone().equal_elem(0.0);
    let weights = weights * reshape::<1, 2>(gradient, [1, 1]);
    let shares = (x - largest.clone()).exp() * (weights.clone() / sum.clone());
    let shares = shares.mask_fill(uncounted, 0.0);
    shares.scatter(1, classes, weights.neg(), IndexingUpdateOp::Add)
}

#[cfg(feature = "flex")]
mod flex {
    use burn::tensor::Tensor;

    use super::super::blocks::over;
    use super::super::real::{Real, sum, vectorised};
    use super::super::rows::{Owned, Rows, WHOLE, written};
    use super::{Peaks, Target};

    /// How many logits are read at a time, so that they stay in a core's first cache.
    const PIECE: usize = 1024;

    /// How many largest numbers a reduction keeps, as [`sum`] does sums.
    const LANES: usize = 16;

    #[inline(always)]
    fn largest<E: Real>(x: &[E]) -> E {
        let above = |a: E, b: E| if b > a { b } else { a };
        let mut lanes = [E::of(f64::NEG_INFINITY); LANES];
        let (chunks, rest) = x.as_chunks::<LANES>();
        for chunk in chunks {
            for (lane, &x) in lanes.iter_mut().zip(chunk) {
                *lane = above(*lane, x);
            }
        }
        lanes.iter().chain(rest).copied().fold(lanes[0], above)
    }

    /// The largest number of a row, and `Σ e^{x − largest}`: what was summed before a larger number came shrinks.
    #[inline(always)]
    fn peak<E: Real>(x: &[E]) -> [E; 2] {
        let (mut peak, mut total) = (E::of(f64::NEG_INFINITY), E::ZERO);
        for piece in x.chunks(PIECE) {
            let before = peak;
            let found = largest(piece);
            if found > peak {
                peak = found;
                total *= (before - peak).exponential();
            }
            // As long as all are −∞ there is nothing to compare with, and hardly anything is summed.
            let shift = match peak == E::of(f64::NEG_INFINITY) {
                true => E::ZERO,
                false => peak,
            };
            total += sum(piece, |x| (x - shift).exponential());
        }
        [peak, total]
    }

    pub(super) fn forward<E: Real>(x: Tensor<2>, targets: &[Target]) -> (Tensor<1>, Peaks) {
        let x = Rows::<E>::of(x);
        let peaks = over(x.count(), x.width(), |rows| {
            let mut peaks = Vec::with_capacity(rows.len());
            vectorised(
                #[inline(always)]
                || {
                    for row in rows {
                        peaks.push(peak(x.row(row)));
                    }
                },
            );
            peaks
        })
        .concat();
        let of_row = |(row, (&[largest, sum], target)): (usize, (&[E; 2], &Target))| {
            // 0 times a loss that is infinite, or no number, is no 0.
            if target.weight == 0.0 {
                return 0.0;
            }
            let own = x.row(row)[target.class as usize];
            target.weight * (sum.to_f64().ln() + (largest.to_f64() - own.to_f64()))
        };
        let loss: f64 = peaks.iter().zip(targets).enumerate().map(of_row).sum();
        let column = |index: usize| {
            let values: Vec<E> = peaks.iter().map(|peak| peak[index]).collect();
            Owned::from_vec(values, &[peaks.len(), 1]).into_tensor()
        };
        let loss = Owned::from_vec(vec![E::of(loss)], &[1]).into_tensor();
        let [largest, sum] = [0, 1].map(column);
        (loss, Peaks { largest, sum })
    }

    pub(super) fn backward<E: Real>(
        x: Tensor<2>,
        Peaks { largest, sum }: &Peaks,
        targets: &[Target],
        gradient: Tensor<1>,
    ) -> Tensor<2> {
        let dims = x.dims();
        let [x, largest, sum] = [x, largest.clone(), sum.clone()].map(Rows::<E>::of);
        let gradient = Rows::<E>::of(gradient).row(0)[0].to_f64();
        // The last normal number, at which the exponential is held, stands for less than it.
        let least = E::of(f64::NEG_INFINITY).exponential();
        let (dx, _) = written(dims, WHOLE, |rows, dx| {
            vectorised(
                #[inline(always)]
                || {
                    for row in rows {
                        let (largest, sum) = (largest.row(row)[0], sum.row(row)[0]);
                        let Target { class, weight } = targets[row];
                        if weight == 0.0 {
                            dx.extend(std::iter::repeat_n(E::ZERO, dims[1]));
                            continue;
                        }
                        let weight = weight * gradient;
                        let share = E::of(weight / sum.to_f64());
                        let dx = dx.extend(x.row(row).iter().map(|&x| {
                            let power = (x - largest).exponential();
                            let power = if power <= least { E::ZERO } else { power };
                            power * share
                        }));
                        dx[class as usize] += E::of(-weight);
                    }
                },
            );
        });
        dx
    }
}
