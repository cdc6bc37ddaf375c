//! Cross-entropy of logits against targets, with weights that say what each row counts.

use std::convert::Infallible;

use burn::tensor::{DType, IndexingUpdateOp, Int, Tensor, TensorData};
use dsp_core::shape::reshape;
use dsp_core::vjp::attach1;

use super::single_at_least;

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
/// # Gradient
/// Its own, from the logits alone: `weight · (softmax − 1 at the target)`. Without a row it is 0, and the node is
/// there all the same, so that a rank without rows takes part in the backward pass.
pub fn cross_entropy<const D: usize>(logits: Tensor<D>, targets: &[Target]) -> Tensor<1> {
    let logits = single_at_least(logits);
    let inner = logits.clone().inner();
    let (device, dtype, dims) = (inner.device(), inner.dtype(), inner.dims());
    let rows = targets.len();
    if rows == 0 {
        let zero = Tensor::zeros([1], (&device, dtype));
        return attach1(logits, zero, move |gradient: Tensor<1>| {
            Ok::<_, Infallible>(Tensor::zeros(dims, (&gradient.device(), dtype)))
        });
    }
    let x: Tensor<2> = reshape(inner, [rows, dims[D - 1]]);
    let classes: Vec<i64> = targets
        .iter()
        .map(|target| i64::from(target.class))
        .collect();
    let classes = TensorData::new(classes, [rows, 1]);
    let classes = Tensor::<2, Int>::from_data(classes, (&device, DType::I64));
    let weights: Vec<f64> = targets.iter().map(|target| target.weight).collect();
    let weights = Tensor::<2>::from_data(TensorData::new(weights, [rows, 1]), (&device, dtype));
    let largest = x.clone().max_dim(1);
    let logsumexp = largest.clone() + (x.clone() - largest).exp().sum_dim(1).log();
    let of_target = x.clone().gather(1, classes.clone());
    let loss = ((logsumexp.clone() - of_target) * weights.clone()).sum();
    attach1(logits, loss, move |gradient: Tensor<1>| {
        let probabilities = (x.clone() - logsumexp.clone()).exp();
        let one_less = Tensor::full([rows, 1], -1.0, (&gradient.device(), dtype));
        let slope = probabilities.scatter(1, classes.clone(), one_less, IndexingUpdateOp::Add);
        let gradient = reshape(gradient, [1, 1]);
        Ok::<_, Infallible>(reshape(slope * weights.clone() * gradient, dims))
    })
}
