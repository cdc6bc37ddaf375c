//! Vectors of channels that hold for many positions: how they are spread over a tensor, and summed back.

use burn::tensor::Tensor;

use crate::shape::reshape;

/// How many groups of consecutive rows of a tensor of shape `x` have a vector each in one of shape `vectors`; `None`
/// if the rows with one vector do not all follow each other.
///
/// # Panics
/// If a dim of `vectors` is neither that of `x` nor 1, or its last is not that of `x`.
pub(super) fn groups<const D: usize>(
    what: &str,
    x: [usize; D],
    vectors: [usize; D],
) -> Option<usize> {
    let fits = |dim: usize| vectors[dim] == x[dim] || vectors[dim] == 1;
    assert!(
        (0..D - 1).all(fits) && vectors[D - 1] == x[D - 1],
        "{what}: {vectors:?} does not fit {x:?}: a dim is that or 1, and the last that"
    );
    let own = (0..D - 1).take_while(|&dim| vectors[dim] == x[dim]).count();
    let spread = vectors[own..D - 1].iter().all(|&length| length == 1);
    spread.then(|| x[..own].iter().product())
}

/// The sums over the dims along which a shape is 1.
pub(super) fn sum_to<const D: usize>(x: Tensor<D>, shape: [usize; D]) -> Tensor<D> {
    if x.dims().contains(&0) {
        return Tensor::zeros(shape, (&x.device(), x.dtype()));
    }
    let dims = (0..D).filter(|&dim| shape[dim] == 1);
    let sum = dims.fold(x, |x, dim| match x.dims()[dim] {
        1 => x,
        _ => x.sum_dim(dim),
    });
    reshape(sum, shape)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_fall_into_groups_where_the_dims_with_vectors_of_their_own_come_first() {
        let x = [2, 3, 4, 5];
        assert_eq!(groups("", x, [1, 1, 1, 5]), Some(1));
        assert_eq!(groups("", x, [2, 1, 1, 5]), Some(2));
        assert_eq!(groups("", x, [2, 3, 1, 5]), Some(6));
        assert_eq!(groups("", x, x), Some(24));
        assert_eq!(groups("", x, [1, 3, 1, 5]), None);
        assert_eq!(groups("", [2, 0, 4, 5], [2, 1, 1, 5]), Some(2));
        assert_eq!(groups("", [2, 0, 4, 5], [2, 0, 1, 5]), Some(0));
    }

    #[test]
    #[should_panic(expected = "does not fit")]
    fn a_vector_of_another_length_fits_nothing() {
        groups("", [2, 3], [1, 4]);
    }
}
