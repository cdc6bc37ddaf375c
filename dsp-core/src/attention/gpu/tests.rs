//! The kernels against the portable functions on the processor, in f64.
#![allow(
    clippy::unwrap_used,
    reason = "a test whose preparation fails has failed"
)]

use std::num::NonZeroUsize;
use std::ops::Range;

use burn::tensor::{DType, Device, Tensor, TensorData};
use proptest::prelude::*;

use self::device::tries;
use super::*;
use crate::attention::{Documents, Dropout, DropoutKey, HeadRange, Mask, Problem, Within, softmax};

#[path = "../../../tests/common/device.rs"]
#[allow(dead_code, reason = "these tests choose their device themselves")]
mod device;

#[derive(Debug, Clone)]
struct Case {
    problem: Problem,
    batch: usize,
    /// Of queries and keys, and of values.
    widths: (usize, usize),
    seed: u64,
}

/// What attention returns, and the gradients for one cotangent.
struct Results {
    out: Tensor<4>,
    lse: Tensor<3>,
    gradients: [Tensor<4>; 3],
}

/// Values in [-2, 2) without a pattern, that every floating type of 16 bits or more can tell apart.
fn values(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        ((state >> 56) as f64 - 128.0) / 64.0
    };
    (0..count).map(|_| next()).collect()
}

impl Case {
    /// `q`, `k`, `v` and the cotangent.
    fn inputs(&self, device: &Device, dtype: DType) -> [Tensor<4>; 4] {
        let rows = |positions: &[Range<usize>]| positions.iter().map(Range::len).sum::<usize>();
        let (lq, lk) = (
            rows(&self.problem.query_positions),
            rows(&self.problem.key_positions),
        );
        let heads = &self.problem.heads;
        let (hq, hkv) = (heads.query.len(), heads.kv().len());
        let (b, (d, dv)) = (self.batch, self.widths);
        let shapes = [
            [b, lq, hq, d],
            [b, lk, hkv, d],
            [b, lk, hkv, dv],
            [b, lq, hq, dv],
        ];
        let mut seed = self.seed;
        shapes.map(|shape| {
            seed += 1;
            let data = TensorData::new(values(shape.iter().product(), seed), shape);
            Tensor::from_data(data, (device, dtype))
        })
    }

    fn expected(&self) -> Results {
        let [q, k, v, dout] = self.inputs(&Device::flex(), DType::F64);
        let (out, lse) = softmax::forward(q.clone(), k.clone(), v.clone(), &self.problem);
        let (dq, dk, dv) =
            softmax::backward(q, k, v, out.clone(), lse.clone(), dout, &self.problem);
        Results {
            out,
            lse,
            gradients: [dq, dk, dv],
        }
    }

    /// By the kernels themselves, which must not decline.
    fn found(&self, dtype: DType) -> Results {
        let [q, k, v, dout] = self.inputs(&Device::default(), dtype);
        let (out, lse) = forward(&q, &k, &v, &self.problem).unwrap();
        let gradients = backward([&q, &k, &v, &out, &dout], &lse, &self.problem).unwrap();
        Results {
            out,
            lse,
            gradients,
        }
    }
}

impl Results {
    fn assert_close(&self, expected: &Self, tolerance: f64) {
        assert_close("out", &self.out, &expected.out, tolerance);
        assert_close("lse", &self.lse, &expected.lse, tolerance);
        let names = ["dq", "dk", "dv"].into_iter();
        for ((name, found), expected) in names.zip(&self.gradients).zip(&expected.gradients) {
            assert_close(name, found, expected, tolerance);
        }
    }

    /// How far 16-bit results are from f64's, for inputs that are exact in both: a few roundings of the type, and in f32
    /// the logsumexp, which never was in 16 bits.
    fn assert_close_in_16_bits(&self, expected: &Self, dtype: DType) {
        assert_eq!(self.out.dtype(), dtype);
        assert_eq!(self.lse.dtype(), DType::F32);
        assert_close("lse", &self.lse, &expected.lse, 1e-5);
        let epsilon = match dtype {
            DType::F16 => 1e-3,
            _ => 8e-3,
        };
        self.assert_close(expected, 4.0 * epsilon);
    }
}

fn doubles<const D: usize>(tensor: &Tensor<D>) -> Vec<f64> {
    tensor.to_data().iter::<f64>().collect()
}

/// Relative to the largest value or 1; infinities must be equal.
fn assert_close<const D: usize>(
    what: &str,
    found: &Tensor<D>,
    expected: &Tensor<D>,
    tolerance: f64,
) {
    assert_eq!(found.dims(), expected.dims(), "{what}");
    let (found, expected) = (doubles(found), doubles(expected));
    let finite = expected.iter().filter(|x| x.is_finite());
    let size = finite.fold(1.0, |size: f64, x| size.max(x.abs()));
    for (index, (a, b)) in found.iter().zip(&expected).enumerate() {
        // Written so that NaN fails.
        assert!(
            a == b || (a - b).abs() / size <= tolerance,
            "{what}[{index}] is {a}, and should be {b}"
        );
    }
}

fn positions() -> impl Strategy<Value = Vec<Range<usize>>> {
    let range = (0..90usize, 1..45usize).prop_map(|(start, len)| start..start + len);
    prop::collection::vec(range, 1..4)
}

fn masks(batch: usize) -> impl Strategy<Value = Mask> {
    let size = || (1..60usize).prop_map(|size| NonZeroUsize::new(size).unwrap());
    let within = prop_oneof![
        Just(Within::Full),
        Just(Within::Causal),
        size().prop_map(Within::Window)
    ];
    let documents = prop::collection::btree_set(0..120usize, 0..5)
        .prop_map(|ends| Documents::new(ends.into_iter().collect::<Vec<_>>()).unwrap());
    prop_oneof![
        Just(Mask::Full),
        Just(Mask::Causal),
        size().prop_map(|size| Mask::Window { size }),
        (documents, within).prop_map(|(documents, within)| Mask::Packed { documents, within }),
        prop::collection::vec(0..130usize, batch)
            .prop_map(|lengths| Mask::KeyLengths(lengths.into())),
    ]
}

/// Each pair of widths is a kernel of its own: narrower than the units, and wider with a remainder.
const WIDTHS: [(usize, usize); 2] = [(5, 3), (24, 40)];

/// Whole blocks of matrix units.
const BLOCKS: [(usize, usize); 3] = [(16, 32), (64, 64), (128, 48)];

fn cases(widths: &'static [(usize, usize)]) -> impl Strategy<Value = Case> {
    (1..3usize).prop_flat_map(move |batch| {
        (
            masks(batch),
            positions(),
            positions(),
            (0..6usize, 1..6usize, 1..5usize),
            0.2..0.6f64,
            prop::sample::select(widths),
            any::<u32>(),
        )
            .prop_map(
                move |(mask, query_positions, key_positions, heads, scale, widths, seed)| Case {
                    problem: Problem {
                        heads: HeadRange {
                            query: heads.0..heads.0 + heads.1,
                            group: heads.2,
                        },
                        mask,
                        query_positions,
                        key_positions,
                        scale,
                        dropout: None,
                        samples: vec![0..batch],
                    },
                    batch,
                    widths,
                    seed: u64::from(seed),
                },
            )
    })
}

fn plain(batch: usize, heads: usize, queries: usize, keys: usize, mask: Mask) -> Case {
    Case {
        problem: Problem {
            heads: HeadRange {
                query: 0..heads,
                group: 1,
            },
            mask,
            query_positions: vec![0..queries],
            key_positions: vec![0..keys],
            scale: 0.25,
            dropout: None,
            samples: vec![0..batch],
        },
        batch,
        widths: (24, 40),
        seed: 7,
    }
}

proptest! {
    #![proptest_config(tries(40))]

    #[test]
    fn every_mask_and_any_rows_give_the_portable_output_logsumexp_and_gradients(case in cases(&WIDTHS)) {
        // Sums of some hundred terms in f32, each rounded at 6e-8 of its size, and the device's own exponential.
        case.found(DType::F32).assert_close(&case.expected(), 1e-5);
    }
}

/// By the kernels themselves.
fn assert_close_in_16_bits(case: &Case, dtype: DType) {
    (case.found(dtype)).assert_close_in_16_bits(&case.expected(), dtype);
}

/// Types of 16 bits that the device has.
fn sixteen_bits() -> impl Iterator<Item = DType> {
    let dtypes = [DType::F16, DType::BF16].into_iter();
    dtypes.filter(|&dtype| Device::default().supports_dtype(dtype))
}

proptest! {
    #![proptest_config(tries(20))]

    /// Where the device has matrix units, these are computed there.
    #[test]
    fn whole_blocks_in_16_bits_give_the_portable_output_logsumexp_and_gradients(
        mut case in cases(&BLOCKS),
    ) {
        // Scores of the size that models have.
        case.problem.scale *= 0.5;
        sixteen_bits().for_each(|dtype| assert_close_in_16_bits(&case, dtype));
    }
}

#[test]
fn long_rows_in_16_bits_pass_whole_tiles_and_parts_of_some() {
    for mask in [Mask::Full, Mask::Causal] {
        let mut case = plain(1, 2, 300, 333, mask);
        case.widths = (64, 64);
        sixteen_bits().for_each(|dtype| assert_close_in_16_bits(&case, dtype));
    }
}

#[cfg(feature = "cuda")]
#[test]
fn sixteen_bits_are_multiplied_by_matrix_units_and_the_rest_is_not() {
    let by = |widths: (usize, usize), dtype| {
        let mut case = plain(1, 2, 70, 70, Mask::Causal);
        case.widths = widths;
        let [q, k, v, _] = case.inputs(&Device::default(), dtype);
        [Pass::Forward, Pass::Queries, Pass::KeysAndValues]
            .map(|pass| Launch::of(&q, &k, &v, &case.problem, pass).unwrap().by)
    };
    for widths in BLOCKS {
        assert_eq!(by(widths, DType::BF16), [By::Matrices; 3]);
        assert_eq!(by(widths, DType::F32), [By::Units; 3]);
    }
    assert_eq!(by((24, 40), DType::BF16), [By::Units; 3]);
}

#[test]
fn disjoint_keys_merge_to_their_union_and_share_its_backward() {
    let whole = plain(2, 3, 70, 90, Mask::Causal);
    let expected = whole.expected();
    let [q, k, v, dout] = whole.inputs(&Device::default(), DType::F32);
    let halves = [0..40, 40..90].map(|rows: Range<usize>| {
        let mut problem = whole.problem.clone();
        problem.key_positions = vec![rows.clone()];
        let part = |x: &Tensor<4>| x.clone().narrow(1, rows.start, rows.len());
        (part(&k), part(&v), problem)
    });
    let [first, second] = halves
        .each_ref()
        .map(|(k, v, problem)| forward(&q, k, v, problem).unwrap());
    let (out, lse) = softmax::merge(first, second);
    let [(dq, dk, dv), other] = halves.map(|(k, v, problem)| {
        let [dq, dk, dv] = backward([&q, &k, &v, &out, &dout], &lse, &problem).unwrap();
        (dq, dk, dv)
    });
    let gradients = [
        dq + other.0,
        Tensor::cat(vec![dk, other.1], 1),
        Tensor::cat(vec![dv, other.2], 1),
    ];
    Results {
        out,
        lse,
        gradients,
    }
    .assert_close(&expected, 1e-5);
}

#[test]
fn a_sample_that_sees_nothing_gets_zeros_and_minus_infinity_beside_one_that_does() {
    let case = plain(2, 2, 20, 30, Mask::KeyLengths([0, 17].into()));
    let found = case.found(DType::F32);
    found.assert_close(&case.expected(), 1e-5);
    let blind = found.lse.clone().narrow(0, 0, 1);
    assert!(doubles(&blind).iter().all(|&x| x == f64::NEG_INFINITY));
    let out = found.out.clone().narrow(0, 0, 1);
    assert!(doubles(&out).iter().all(|&x| x == 0.0));
    // Hidden keys of the other get no gradient, to the last bit.
    let hidden = found.gradients[1].clone().narrow(0, 1, 1).narrow(1, 17, 13);
    assert!(doubles(&hidden).iter().all(|&x| x == 0.0));
}

/// Of every tile before its own, a row sees the last key at most: of whole tiles one pair.
#[test]
fn a_tile_of_which_one_pair_is_visible_is_not_passed_over() {
    let size = NonZeroUsize::new(2).unwrap();
    let case = plain(1, 2, 150, 150, Mask::Window { size });
    case.found(DType::F32).assert_close(&case.expected(), 1e-5);
    sixteen_bits().for_each(|dtype| assert_close_in_16_bits(&case, dtype));
}

/// As on a rank whose keys come after some of its queries.
#[test]
fn rows_that_see_nothing_of_a_tile_that_others_see_get_zeros_and_minus_infinity() {
    let mut case = plain(1, 2, 40, 40, Mask::Causal);
    case.problem.key_positions = std::iter::once(10..50).collect();
    let found = case.found(DType::F32);
    found.assert_close(&case.expected(), 1e-5);
    let blind = found.out.clone().narrow(1, 0, 10);
    assert!(doubles(&blind).iter().all(|&x| x == 0.0));
    sixteen_bits().for_each(|dtype| assert_close_in_16_bits(&case, dtype));
}

#[test]
fn hidden_keys_do_not_touch_the_result_even_if_huge() {
    let case = plain(1, 2, 40, 50, Mask::KeyLengths([33].into()));
    let [q, k, v, dout] = case.inputs(&Device::default(), DType::F32);
    let huge = |x: &Tensor<4>| {
        let kept = x.clone().narrow(1, 0, 33);
        let rest = x.clone().narrow(1, 33, 17).full_like(1e30);
        Tensor::cat(vec![kept, rest], 1)
    };
    let run = |k: &Tensor<4>, v: &Tensor<4>| {
        let (out, lse) = forward(&q, k, v, &case.problem).unwrap();
        let gradients = backward([&q, k, v, &out, &dout], &lse, &case.problem).unwrap();
        [doubles(&out), doubles(&lse), doubles(&gradients[0])]
    };
    assert_eq!(run(&k, &v), run(&huge(&k), &huge(&v)));
}

/// `max` passes over NaN on most devices; the kernels must not, or a spoilt row looks like one that sees nothing.
#[test]
fn a_query_or_a_key_that_is_not_a_number_shows_in_all_that_depends_on_it() {
    /// The row of 40 that is spoilt.
    const AT: usize = 21;
    let nan_rows = |tensor: &Tensor<4>| -> Vec<usize> {
        let values = doubles(tensor);
        let rows = values.chunks(values.len() / 40).enumerate();
        rows.filter(|(_, row)| row.iter().all(|x| x.is_nan()))
            .map(|(row, _)| row)
            .collect()
    };
    let spoilt = |x: &Tensor<4>| {
        let part = |rows: Range<usize>| x.clone().narrow(1, rows.start, rows.len());
        let nan = part(AT..AT + 1).full_like(f32::NAN);
        Tensor::cat(vec![part(0..AT), nan, part(AT + 1..40)], 1)
    };
    let check = |widths: (usize, usize), dtype| {
        let mut case = plain(1, 2, 40, 40, Mask::Causal);
        case.widths = widths;
        let [q, k, v, dout] = case.inputs(&Device::default(), dtype);
        // Which rows of the output and the logsumexp are NaN; and which of the gradients are at least: within a tile,
        // 0 times NaN is that too.
        let check = |q: &Tensor<4>, k: &Tensor<4>, seeing: Range<usize>, seen: Range<usize>| {
            let (out, lse) = forward(q, k, &v, &case.problem).unwrap();
            let gradients = backward([q, k, &v, &out, &dout], &lse, &case.problem).unwrap();
            let [dq, dk, dv] = gradients.map(|x| nan_rows(&x));
            let expected: Vec<usize> = seeing.clone().collect();
            assert_eq!(nan_rows(&out), expected, "{dtype:?}");
            assert_eq!(nan_rows(&lse.unsqueeze_dim(3)), expected, "{dtype:?}");
            assert!(seeing.clone().all(|row| dq.contains(&row)), "{dtype:?}");
            let both = |row| dk.contains(&row) && dv.contains(&row);
            assert!(seen.clone().all(both), "{dtype:?}");
        };
        check(&spoilt(&q), &k, AT..AT + 1, 0..AT + 1);
        check(&q, &spoilt(&k), AT..40, 0..40);
    };
    check((24, 40), DType::F32);
    sixteen_bits().for_each(|dtype| check((64, 64), dtype));
}

/// The output may be much larger than the inputs.
#[test]
fn an_output_beyond_indices_of_32_bits_is_left_to_the_portable_way() {
    let launched = |queries| {
        let mut case = plain(1, 1, queries, 1, Mask::Full);
        case.widths = (1, 256);
        let device = Device::default();
        let [q, k, v] = [[1, queries, 1, 1], [1, 1, 1, 1], [1, 1, 1, 256]]
            .map(|shape| Tensor::zeros(shape, (&device, DType::F32)));
        Launch::of(&q, &k, &v, &case.problem, Pass::Forward).is_some()
    };
    assert!(launched((1 << 23) - 1));
    assert!(!launched(1 << 23));
}

#[test]
fn strided_inputs_are_read_as_they_look() {
    let case = plain(1, 3, 20, 20, Mask::Causal);
    let [q, k, v, _] = case.inputs(&Device::default(), DType::F32);
    let expected = forward(&q, &k, &v, &case.problem).unwrap();
    // The same values, with heads before rows in memory.
    let turned = |x: Tensor<4>| {
        let data = x.swap_dims(1, 2).into_data();
        Tensor::<4>::from_data(data, (&Device::default(), DType::F32)).swap_dims(1, 2)
    };
    let found = forward(&turned(q), &turned(k), &turned(v), &case.problem).unwrap();
    assert_eq!(doubles(&found.0), doubles(&expected.0));
    assert_eq!(doubles(&found.1), doubles(&expected.1));
}

#[test]
fn sixteen_bits_are_summed_in_f32() {
    let case = plain(1, 2, 70, 300, Mask::Causal);
    sixteen_bits().for_each(|dtype| assert_close_in_16_bits(&case, dtype));
}

#[test]
fn the_same_inputs_give_the_same_bits() {
    let case = plain(2, 4, 130, 130, Mask::Causal);
    let bits = |results: &Results| {
        let [dq, dk, dv] = &results.gradients;
        [&results.out, dq, dk, dv].map(doubles)
    };
    assert_eq!(bits(&case.found(DType::F32)), bits(&case.found(DType::F32)));
    let whole = Case {
        widths: (64, 64),
        ..case
    };
    for dtype in sixteen_bits() {
        assert_eq!(bits(&whole.found(dtype)), bits(&whole.found(dtype)));
    }
}

#[test]
fn dropout_f64_empty_blocks_and_heads_that_do_not_fit_are_left_to_the_portable_way() {
    let device = Device::default();
    let declined = |case: &Case, device: &Device, dtype| {
        let [q, k, v, _] = case.inputs(device, dtype);
        forward(&q, &k, &v, &case.problem).is_none()
    };
    let mut case = plain(1, 1, 4, 4, Mask::Full);
    assert!(!declined(&case, &device, DType::F32));
    assert!(declined(&case, &Device::flex(), DType::F32));
    case.problem.dropout = Some(Dropout::new(0.5, DropoutKey::default()).unwrap());
    assert!(declined(&case, &device, DType::F32));
    assert!(declined(
        &plain(1, 1, 4, 0, Mask::Full),
        &device,
        DType::F32
    ));
    let mut wide = plain(1, 1, 4, 4, Mask::Full);
    wide.widths = (1 << 16, 4);
    assert!(declined(&wide, &device, DType::F32));
}

/// The logsumexp that came from the kernel, in f32, must not meet scores of 16 bits.
#[test]
fn gradients_of_16_bits_that_do_not_fit_are_the_portable_ones_in_f32() {
    let device = Device::default();
    let of_width = |width| Case {
        widths: (width, width),
        ..plain(1, 2, 20, 300, Mask::Causal)
    };
    for dtype in sixteen_bits() {
        let fits = |case: &Case, pass| {
            let [q, k, v, _] = case.inputs(&device, dtype);
            Launch::of(&q, &k, &v, &case.problem, pass).is_some()
        };
        let mut case = (1..1 << 10)
            .map(|blocks| of_width(16 * blocks))
            .find(|case| fits(case, Pass::Forward) && !fits(case, Pass::KeysAndValues))
            .unwrap();
        case.problem.scale = (case.widths.0 as f64).powf(-0.5);
        let [q, k, v, dout] = case.inputs(&device, dtype);
        let (out, lse) = softmax::forward(q.clone(), k.clone(), v.clone(), &case.problem);
        let gradients = softmax::backward(q, k, v, out.clone(), lse.clone(), dout, &case.problem);
        let found = Results {
            out,
            lse,
            gradients: gradients.into(),
        };
        found.assert_close_in_16_bits(&case.expected(), dtype);
    }
}

#[test]
fn tiles_of_matrix_units_fit_and_have_as_many_rows_as_planes_own() {
    for bytes in [48 << 10, 99 << 10, 227 << 10] {
        for pass in [Pass::Forward, Pass::Queries, Pass::KeysAndValues] {
            for width in [16, 64, 128] {
                for length in [1, 16, 17, 4096] {
                    let lengths = (length, length);
                    let tile = matrix_tile(pass, lengths, (width, width), true, bytes).unwrap();
                    let rows = match pass {
                        Pass::KeysAndValues => tile.keys,
                        _ => tile.queries,
                    };
                    assert_eq!(rows, 16 * matrix::planes(rows) * matrix::blocks(rows));
                    assert!(tile.queries < length + 16 && tile.keys < length + 16);
                }
            }
        }
    }
    assert!(matrix_tile(Pass::Forward, (64, 64), (24, 64), true, 1 << 20).is_none());
    assert!(matrix_tile(Pass::Forward, (64, 64), (512, 64), true, 1 << 20).is_none());
}

#[test]
fn tiles_fit_into_shared_memory_and_are_no_larger_than_needed() {
    for bytes in [16 << 10, 32 << 10, 48 << 10, 227 << 10] {
        for pass in [Pass::Forward, Pass::Queries, Pass::KeysAndValues] {
            for width in [2, 64, 128] {
                for length in [1, 16, 17, 4096] {
                    let Some(tile) = tile(pass, (length, length), (width, width), true, bytes)
                    else {
                        // Three tiles of 16 rows of f32 are the least that a pass holds.
                        assert!(4 * 16 * 3 * width > bytes / 2, "{pass:?} {width} {bytes}");
                        continue;
                    };
                    assert!(4 * shared_numbers(pass, &tile) <= bytes);
                    assert!(tile.queries < length.next_multiple_of(16) + 16);
                    assert!(tile.keys < length.next_multiple_of(16) + 16);
                }
            }
        }
    }
}
