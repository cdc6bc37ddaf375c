//! In what is computed that is held in fewer bits: products and sums over many elements, and what is taken out of those.

use burn::tensor::{DType, Tensor};

/// The type in which sums of such floats are taken: f32 at least. 16 bits would lose in each of them.
pub fn computed_in(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// The same numbers in the type in which they are summed.
///
/// # Cost
/// A copy of 16 bits; nothing of others.
pub fn computed<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let dtype = computed_in(x.dtype());
    x.cast(dtype)
}
