//! Products on Flex by the crate that Burn calls there, into memory that is not touched before.
//!
//! Burn (0.22.1) clears the room for a product, and copies the zeros to where they lie on whole lines of the cache:
//! three passes over memory for nothing, a tenth of the time of a product with few steps and a wide result. And a bias
//! is what the sums begin with, rather than a pass after them.

#![expect(
    unsafe_code,
    reason = "the product of matrices takes addresses and writes memory that is not initialised"
)]

use std::mem::MaybeUninit;

use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;
use gemm::Parallelism;
use rayon::prelude::*;

use crate::fused::real::Real;
use crate::fused::rows::{Native, Owned, Rows, native, primitive};

/// How many elements a thread fills at a time, about.
const BLOCK: usize = 1 << 14;

/// `left · right`, plus `row` in every row where there is one; nothing where Burn's own product is to be taken.
///
/// # Shapes
/// - `left`: `[m, k]`; `right`: `[k, n]`; `row`: `[n]`; returns `[m, n]`; other ranks are Burn's
pub(super) fn matmul<const D: usize>(
    left: &Tensor<D>,
    right: &Tensor<D>,
    row: Option<&Tensor<1>>,
) -> Option<Tensor<D>> {
    let empty = left.dims().iter().chain(&right.dims()).any(|&n| n == 0);
    let element = native(left)?;
    let alike =
        native(right) == Some(element) && row.is_none_or(|row| native(row) == Some(element));
    if D != 2 || empty || !alike {
        return None;
    }
    Some(match element {
        Native::F32 => product(left, right, row, on_the_unit),
        Native::F64 => product(left, right, row, |_, _, _: Option<&[f64]>| None),
    })
}

/// By another way where there is one, else by `gemm`.
fn product<E: Real, const D: usize>(
    left: &Tensor<D>,
    right: &Tensor<D>,
    row: Option<&Tensor<1>>,
    other: impl Fn(&Matrix<'_, E>, &Matrix<'_, E>, Option<&[E]>) -> Option<Vec<E>>,
) -> Tensor<D> {
    let [left, right] = [left, right].map(|x| primitive(x.clone()));
    let [left, right] = [&left, &right].map(Matrix::<E>::of);
    let ([m, k], [steps, n]) = (left.shape, right.shape);
    assert_eq!(
        k, steps,
        "the left matrix is as wide as the right one is high"
    );
    let row = row.map(|row| Rows::<E>::of(row.clone()));
    let row = row.as_ref().map(|row| {
        assert_eq!(
            row.width(),
            n,
            "a row is added that is as wide as the product"
        );
        row.row(0)
    });
    let out = other(&left, &right, row).unwrap_or_else(|| by_gemm(&left, &right, row));
    Owned::from_vec(out, &[m, n]).into_tensor()
}

/// By the processor's matrix unit, where there is one and the product is for it.
#[cfg(target_arch = "x86_64")]
fn on_the_unit(
    left: &Matrix<'_, f32>,
    right: &Matrix<'_, f32>,
    row: Option<&[f32]>,
) -> Option<Vec<f32>> {
    super::amx::product(left, right, row)
}

#[cfg(not(target_arch = "x86_64"))]
fn on_the_unit(_: &Matrix<'_, f32>, _: &Matrix<'_, f32>, _: Option<&[f32]>) -> Option<Vec<f32>> {
    None
}

fn by_gemm<E: Real>(left: &Matrix<'_, E>, right: &Matrix<'_, E>, row: Option<&[E]>) -> Vec<E> {
    let ([m, k], n) = (left.shape, right.shape[1]);
    let mut out = Vec::with_capacity(m * n);
    if let Some(row) = row {
        fill(&mut out.spare_capacity_mut()[..m * n], row);
    }
    // SAFETY: `Matrix::of` has found that all elements of either matrix lie inside the storage that it borrows. `out` is as large as the product, and nobody else's. It is read only where it was filled, and each element is
    // then written: there is a step at least, as no dim is 0.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            row.is_some(),
            left.first(),
            left.strides[1],
            left.strides[0],
            right.first(),
            right.strides[1],
            right.strides[0],
            E::ONE,
            E::ONE,
            false,
            false,
            false,
            Parallelism::Rayon(0),
        );
        out.set_len(m * n);
    }
    out
}

/// Writes `row` again and again.
fn fill<E: Real>(out: &mut [MaybeUninit<E>], row: &[E]) {
    let rows = (BLOCK / row.len()).max(1);
    out.par_chunks_mut(rows * row.len()).for_each(|block| {
        for out in block.chunks_exact_mut(row.len()) {
            for (out, &element) in out.iter_mut().zip(row) {
                out.write(element);
            }
        }
    });
}

/// A matrix in a tensor's storage, transposed or not.
pub(super) struct Matrix<'a, E> {
    pub(super) storage: &'a [E],
    /// Where its first element is there; others may come before it.
    pub(super) start: usize,
    pub(super) shape: [usize; 2],
    /// From row to row, and from column to column.
    pub(super) strides: [isize; 2],
}

impl<'a, E: Real> Matrix<'a, E> {
    /// # Panics
    /// If the tensor is no matrix, is empty, or does not hold its elements.
    fn of(tensor: &'a FlexTensor) -> Self {
        let (layout, storage) = (tensor.layout(), tensor.storage::<E>());
        let start = layout.start_offset();
        let shape = [layout.shape()[0], layout.shape()[1]];
        let strides = [layout.strides()[0], layout.strides()[1]];
        let (mut lowest, mut highest) = (start as isize, start as isize);
        for (length, stride) in shape.into_iter().zip(strides) {
            let reach = (length as isize - 1) * stride;
            lowest += reach.min(0);
            highest += reach.max(0);
        }
        assert!(lowest >= 0 && (highest as usize) < storage.len());
        Self {
            storage,
            start,
            shape,
            strides,
        }
    }

    fn first(&self) -> *const E {
        self.storage.as_ptr().wrapping_add(self.start)
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, Device, TensorData};
    use proptest::prelude::*;

    use super::*;

    /// A matrix of small whole numbers, of which every order of sums gives the same bits, and as it is seen.
    #[derive(Debug, Clone, Copy)]
    enum View {
        Whole,
        Transposed,
        /// Inside a larger one.
        Part,
        /// Every row is the same one.
        Repeated,
        Flipped,
    }

    fn view() -> impl Strategy<Value = View> {
        use View::{Flipped, Part, Repeated, Transposed, Whole};
        prop::sample::select(vec![Whole, Transposed, Part, Repeated, Flipped])
    }

    /// Some of them are for the matrix unit, with more steps than are packed at once.
    fn sizes() -> impl Strategy<Value = [usize; 3]> {
        let small = [1..40usize, 1..30usize, 1..50usize];
        let large = [128..200usize, 200..700usize, 128..200usize];
        prop_oneof![3 => small, 1 => large]
    }

    fn numbers([rows, columns]: [usize; 2], dtype: DType) -> Tensor<2> {
        let number = |i: usize| (i * 7 % 11) as f64 - 5.0;
        let values: Vec<f64> = (0..rows * columns).map(number).collect();
        let data = TensorData::new(values, [rows, columns]);
        Tensor::from_data(data, (&Device::flex(), dtype))
    }

    fn seen(view: View, [rows, columns]: [usize; 2], dtype: DType) -> Tensor<2> {
        match view {
            View::Whole => numbers([rows, columns], dtype),
            View::Transposed => numbers([columns, rows], dtype).transpose(),
            View::Part => {
                numbers([rows + 3, columns + 2], dtype).slice([1..1 + rows, 2..2 + columns])
            }
            View::Repeated => numbers([1, columns], dtype).expand([rows, columns]),
            View::Flipped => numbers([rows, columns], dtype).flip([0, 1]),
        }
    }

    fn values<const D: usize>(x: &Tensor<D>) -> Vec<f64> {
        x.to_data().iter::<f64>().collect()
    }

    proptest! {
        #[test]
        fn a_product_is_the_sum_over_steps_and_its_row_for_any_views(
            [m, k, n] in sizes(),
            views in [view(), view()],
            with_row in any::<bool>(),
            dtype in prop::sample::select(vec![DType::F32, DType::F64]),
        ) {
            let (left, right) = (seen(views[0], [m, k], dtype), seen(views[1], [k, n], dtype));
            let row: Tensor<1> = numbers([1, n + 1], dtype).slice([0..1, 1..n + 1]).reshape([n]);
            let found = matmul(&left, &right, with_row.then_some(&row)).unwrap();
            prop_assert_eq!(found.dtype(), dtype);
            prop_assert_eq!(found.dims(), [m, n]);
            let (left, right, row) = (values(&left), values(&right), values(&row));
            let right: Vec<f64> = (0..k * n).map(|at| right[at % k * n + at / k]).collect();
            for (at, found) in values(&found).into_iter().enumerate() {
                let (i, j) = (at / n, at % n);
                let pairs = left[i * k..][..k].iter().zip(&right[j * k..]);
                let sum: f64 = pairs.map(|(left, right)| left * right).sum();
                let expected = sum + if with_row { row[j] } else { 0.0 };
                prop_assert_eq!(found, expected, "row {}, column {}", i, j);
            }
        }
    }

    #[test]
    fn what_has_no_elements_another_rank_or_another_type_is_left_to_burn() {
        let of = |shape, dtype| numbers(shape, dtype);
        let [single, double] = [DType::F32, DType::F64];
        assert!(matmul(&of([0, 2], single), &of([2, 3], single), None).is_none());
        assert!(matmul(&of([3, 0], single), &of([0, 3], single), None).is_none());
        assert!(matmul(&of([3, 2], single), &of([2, 3], double), None).is_none());
        let batched = of([2, 2], single).unsqueeze::<3>();
        assert!(matmul(&batched, &batched, None).is_none());
    }

    #[test]
    fn a_product_on_several_threads_has_the_same_bits() {
        let [left, right] = [
            seen(View::Part, [300, 200], DType::F32),
            seen(View::Transposed, [200, 260], DType::F32),
        ]
        .map(|x| x.div_scalar(7.0));
        let row: Tensor<1> = numbers([1, 260], DType::F32).reshape([260]);
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            let product = pool.install(|| matmul(&left, &right, Some(&row)).unwrap());
            product.to_data().try_to_vec::<f32>().unwrap()
        };
        let one = on(1);
        assert_eq!(one, on(2));
        assert_eq!(one, on(5));
    }
}
