//! Chains of element-wise operations in one pass over memory, each with a gradient of its own.
//!
//! Between its matrix products a transformer normalises, scales, gates and turns. As separate tensor operations
//! each step of that reads and writes the whole activation, and the graph keeps what lies between; as one operation
//! the activation passes once, a row at a time through a core's own cache, and only inputs are kept.
//!
//! Every file is one operation, in two forms: a *portable* expression of tensor operations, which serves all backends
//! and is what the tests hold the other to; and on Flex a loop over the rows of the last dim, for f32 and f64, through
//! whatever strides the tensor has, vectorised for the processor that it runs on, in blocks that the threads of the
//! rank's pool share. Sums over positions are taken block by block in an order that does not depend on the threads.
//! What sums, of half-precision tensors, sums in f32 and is rounded once; so is GELU.

#[cfg(feature = "flex")]
mod blocks;
mod cross_entropy;
#[cfg(feature = "flex")]
mod fresh;
pub(crate) mod gated_sum;
mod gelu;
mod layer_norm;
mod parts;
#[cfg(feature = "flex")]
pub(crate) mod real;
mod rms_norm;
mod rotary;
#[cfg(feature = "flex")]
pub(crate) mod rows;
mod spread;
mod swiglu;
#[cfg(test)]
#[cfg(feature = "flex")]
mod tests;

pub use cross_entropy::{Target, UnknownClass, check_classes, cross_entropy};
pub use gated_sum::gated_sum;
pub use gelu::gelu_tanh;
pub use layer_norm::layer_norm;
pub use parts::parts;
pub(crate) use parts::{channels, side_by_side};
pub use rms_norm::rms_norm;
pub use rotary::{Angles, Pairs, rotary};
pub use swiglu::swiglu;

use burn::tensor::DType;

/// Whether such values are computed with in f32, where that is more than a product or a sum of two.
fn is_half(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::BF16)
}
