//! The matrix product that everything here takes: Burn's, but where that is not what it is called, or slower than it
//! need be.
//!
//! On the processor `flex` calls the crate that Burn calls, without what Burn does before.
//!
//! On NVIDIA's GPUs Burn's product of f32 rounds its inputs to TF32's 10 bits (0.22.1: no option turns that off), so that
//! results are right to 1e-3 where f32 has 1e-7: ranks that split a product otherwise than one device does would differ by
//! so much. And what it takes for 16 bits, unless it may try all kernels first, is slow where an operand is transposed, as
//! in every backward pass. There, and only there, `gpu` launches another kernel of the same library.

#[cfg(all(feature = "flex", target_arch = "x86_64"))]
mod amx;
#[cfg(feature = "flex")]
mod flex;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod gpu;

use burn::tensor::Tensor;

/// `left · right`, rounded as the type is and summed in f32 or better.
///
/// # Shapes
/// - `left`: `[…, m, k]`; `right`: `[…, k, n]`, with the same dims before; returns `[…, m, n]`
pub(crate) fn matmul<const D: usize>(left: Tensor<D>, right: Tensor<D>) -> Tensor<D> {
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    if let Some(product) = gpu::matmul(&left, &right) {
        return product;
    }
    #[cfg(feature = "flex")]
    if let Some(product) = flex::matmul(&left, &right, None) {
        return product;
    }
    left.matmul(right)
}

/// `left · right + row`, of untracked tensors.
///
/// # Shapes
/// - `left`: `[m, k]`; `right`: `[k, n]`; `row`: `[n]`, added to every row; returns `[m, n]`
pub(crate) fn matmul_and_row(left: Tensor<2>, right: Tensor<2>, row: Tensor<1>) -> Tensor<2> {
    #[cfg(feature = "flex")]
    if let Some(product) = flex::matmul(&left, &right, Some(&row)) {
        return product;
    }
    matmul(left, right) + row.unsqueeze()
}
