//! Every way of attending, beside the formula written out, and beside each other.
#![allow(
    clippy::single_range_in_vec_init,
    reason = "positions are lists of ranges"
)]

use std::num::NonZeroUsize;
use std::ops::Range;

use burn::tensor::{DType, Device, TensorData, s};
use proptest::prelude::*;

use super::*;
use crate::attention::flex::{Few, Tiling};
use crate::attention::{Documents, Dropout, DropoutKey, Mask, Within};
use crate::simd::Level;

/// Blocks that hold any problem of these tests at once.
const ONE_BLOCK: Blocks = Blocks {
    query: 1000,
    key: 1000,
    scores_bytes: 1 << 30,
};

fn random(shape: [usize; 4], seed: u64, (device, dtype): (&Device, DType)) -> Tensor<4> {
    // A generator of our own: Burn's is shared by all threads, so that no test could be repeated.
    let mut state = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let values: Vec<f64> = (0..shape.iter().product())
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 11) as f64 / (1u64 << 53) as f64 * 4.0 - 2.0
        })
        .collect();
    Tensor::from_data(TensorData::new(values, shape), (device, dtype))
}

fn values<const D: usize>(tensor: &Tensor<D>) -> Vec<f64> {
    tensor.to_data().iter::<f64>().collect()
}

/// The largest difference, relative to the largest value or 1; infinities must be equal.
fn difference<const D: usize>(found: &Tensor<D>, expected: &Tensor<D>) -> f64 {
    assert_eq!(found.dims(), expected.dims());
    let (found, expected) = (values(found), values(expected));
    let size = (expected.iter().filter(|x| x.is_finite())).fold(1.0, |m: f64, x| m.max(x.abs()));
    let differences = found.iter().zip(&expected).map(|(a, b)| match a == b {
        true => 0.0,
        false => (a - b).abs() / size,
    });
    // A NaN, once found, stays: no number is greater.
    differences.fold(
        0.0,
        |worst, x| if x > worst || x.is_nan() { x } else { worst },
    )
}

macro_rules! assert_close {
    ($found:expr, $expected:expr, $tolerance:expr) => {
        let difference = difference(&$found, &$expected);
        // Written so that NaN fails.
        assert!(
            difference <= $tolerance,
            "{} differs by {difference:e}",
            stringify!($found)
        );
    };
}

#[derive(Debug, Clone)]
struct Case {
    problem: Problem,
    batch: usize,
    width: usize,
    value_width: usize,
    blocks: Blocks,
    dtype: DType,
    seed: u64,
}

impl Case {
    fn inputs(&self, device: &Device, dtype: DType) -> [Tensor<4>; 4] {
        let rows = |positions: &[Range<usize>]| positions.iter().map(Range::len).sum();
        let lq: usize = rows(&self.problem.query_positions);
        let lk: usize = rows(&self.problem.key_positions);
        let (hq, hkv) = (
            self.problem.heads.query.len(),
            self.problem.heads.kv().len(),
        );
        let (b, d, dv) = (self.batch, self.width, self.value_width);
        let shapes = [
            [b, lq, hq, d],
            [b, lk, hkv, d],
            [b, lk, hkv, dv],
            [b, lq, hq, dv],
        ];
        let mut seed = self.seed;
        let [q, k, v, dout] = shapes.map(|shape| {
            seed += 1;
            random(shape, seed, (device, DType::F32))
        });
        // Dropout enlarges the terms of gradients by its scale, and the rounding of what cancels with them: from
        // so much less they are of one size, whatever is dropped.
        let scale = self.problem.dropout.map_or(1.0, |dropout| dropout.scale());
        // Rounded first to what the case's precision holds, f32's at most, so that all see the same numbers.
        let held = match self.dtype {
            DType::F64 => DType::F32,
            held => held,
        };
        [q, k, v, dout.div_scalar(scale)].map(|x| x.cast(held).cast(dtype))
    }
}

/// Everything that attention returns, and the gradients for one cotangent.
struct Results {
    out: Tensor<4>,
    lse: Tensor<3>,
    gradients: [Tensor<4>; 3],
}

impl Results {
    fn assert_close(&self, expected: &Self, tolerance: f64) {
        assert_close!(self.out, expected.out, tolerance);
        assert_close!(self.lse, expected.lse, tolerance);
        let [dq, dk, dv] = &self.gradients;
        assert_close!(dq, expected.gradients[0], tolerance);
        assert_close!(dk, expected.gradients[1], tolerance);
        assert_close!(dv, expected.gradients[2], tolerance);
    }
}

/// Every way that can take the case, in blocks of these sizes.
fn ways(case: &Case, blocks: Blocks) -> Vec<Way> {
    let mut ways = vec![Way::Best, Way::Portable(blocks)];
    if case.dtype == DType::F32 {
        let rows = blocks.query;
        // In tiles of keys, and all keys at once.
        for few in [0, usize::MAX].map(|keys| Few { keys, rows }) {
            let tiling = Tiling {
                rows,
                strip: rows.div_ceil(2),
                keys: blocks.key,
                few,
            };
            ways.extend(
                Level::all()
                    .into_iter()
                    .map(|level| Way::Flex(level, tiling)),
            );
        }
    }
    ways
}

fn ours(case: &Case, way: Way, device: &Device) -> Results {
    let [q, k, v, dout] = case.inputs(device, case.dtype);
    let [q, k, v] = [q, k, v].map(|x| x.autodiff().require_grad());
    let (out, lse) = attached(way, q.clone(), k.clone(), v.clone(), case.problem.clone());
    let gradients = (out.clone() * dout.autodiff()).sum().backward();
    Results {
        out: out.inner(),
        lse: lse.inner(),
        gradients: [q, k, v].map(|x| x.grad(&gradients).unwrap()),
    }
}

/// All scores at once, in f64, with Burn's own gradients.
fn naive(case: &Case, device: &Device) -> Results {
    let Problem {
        heads,
        mask,
        query_positions,
        key_positions,
        scale,
        dropout,
        samples,
    } = &case.problem;
    let [q, k, v, dout] = case.inputs(device, DType::F64);
    let [q, k, v] = [q, k, v].map(|x| x.autodiff().require_grad());
    let ([b, lq, hq, _], lk) = (q.dims(), k.dims()[1]);
    let kv: Vec<i64> = (heads.query.clone())
        .map(|head| (head / heads.group - heads.kv().start) as i64)
        .collect();
    let kv = Tensor::<1, burn::tensor::Int>::from_data(kv.as_slice(), &k.device());
    let by_head = |x: &Tensor<4>| x.clone().select(2, kv.clone()).swap_dims(1, 2);
    let mut visible = Vec::new();
    for sample in 0..b {
        for query in query_positions.iter().cloned().flatten() {
            for key in key_positions.iter().cloned().flatten() {
                visible.push(f64::from(mask.sees(sample, query, key)));
            }
        }
    }
    let visible = TensorData::new(visible, [b, 1, lq, lk]);
    let visible = Tensor::<4>::from_data(visible, (&q.device(), DType::F64));
    let scores = q
        .clone()
        .swap_dims(1, 2)
        .matmul(by_head(&k).swap_dims(2, 3))
        * *scale;
    // Scores of these tests are small enough to take their exponentials as they are.
    let weights = scores.exp() * visible;
    let sum = weights.clone().sum_dim(3);
    let blind = sum.clone().equal_elem(0.0);
    let mut kept = Vec::new();
    for sample in samples.iter().cloned().flatten() {
        for head in heads.query.clone() {
            for query in query_positions.iter().cloned().flatten() {
                for key in key_positions.iter().cloned().flatten() {
                    kept.push(match dropout {
                        Some(dropout) if dropout.drops(sample, head, query, key) => 0.0,
                        Some(dropout) => 1.0 / (1.0 - dropout.probability()),
                        None => 1.0,
                    });
                }
            }
        }
    }
    let kept = TensorData::new(kept, [b, hq, lq, lk]);
    let weights = weights * Tensor::<4>::from_data(kept, (&q.device(), DType::F64));
    let out = weights.matmul(by_head(&v)) / sum.clone().mask_fill(blind, 1.0);
    let out = out.swap_dims(1, 2);
    let lse = sum.inner().log().swap_dims(1, 2).reshape([b, lq, hq]);
    let gradients = (out.clone() * dout.autodiff()).sum().backward();
    Results {
        out: out.inner(),
        lse,
        gradients: [q, k, v].map(|x| x.grad(&gradients).unwrap()),
    }
}

fn positions(ranges: Range<usize>) -> impl Strategy<Value = Vec<Range<usize>>> {
    let range = (0..30usize, 1..6usize).prop_map(|(start, len)| start..start + len);
    prop::collection::vec(range, ranges)
}

fn window() -> impl Strategy<Value = NonZeroUsize> {
    (1..12usize).prop_map(|size| NonZeroUsize::new(size).unwrap())
}

fn documents() -> impl Strategy<Value = Documents> {
    prop::collection::btree_set(0..30usize, 0..5)
        .prop_map(|ends| Documents::new(ends.into_iter().collect::<Vec<_>>()).unwrap())
}

fn within() -> impl Strategy<Value = Within> {
    prop_oneof![
        Just(Within::Full),
        Just(Within::Causal),
        window().prop_map(Within::Window),
    ]
}

fn dropout() -> impl Strategy<Value = Dropout> {
    let probability = prop_oneof![Just(0.0), Just(0.9), 0.0..0.9f64];
    (probability, any::<u64>()).prop_map(|(probability, seed)| {
        let key = DropoutKey {
            seed,
            ..DropoutKey::default()
        };
        Dropout::new(probability, key).unwrap()
    })
}

fn cases() -> impl Strategy<Value = Case> {
    (1..4usize, 0..6usize, 1..7usize, 1..5usize).prop_flat_map(|(batch, start, len, group)| {
        let mask = prop_oneof![
            Just(Mask::Full),
            Just(Mask::Causal),
            window().prop_map(|size| Mask::Window { size }),
            (documents(), within())
                .prop_map(|(documents, within)| Mask::Packed { documents, within }),
            prop::collection::vec(0..30usize, batch)
                .prop_map(|lengths| Mask::KeyLengths(lengths.into())),
        ];
        let samples = prop::collection::vec((0..9usize).prop_map(|start| start..start + 1), batch);
        let problem = (
            mask,
            positions(1..4),
            positions(1..4),
            0.2..0.8f64,
            prop::option::of(dropout()),
            samples,
        );
        let problem = problem.prop_map(
            move |(mask, query_positions, key_positions, scale, dropout, samples)| Problem {
                heads: HeadRange {
                    query: start..start + len,
                    group,
                },
                mask,
                query_positions,
                key_positions,
                scale,
                dropout,
                samples,
            },
        );
        let blocks = (1..9usize, 1..9usize, 1..4096usize).prop_map(|(query, key, bytes)| Blocks {
            query,
            key,
            scores_bytes: bytes,
        });
        let dtype = prop_oneof![Just(DType::F32), Just(DType::F64)];
        (problem, 1..5usize, 1..5usize, blocks, dtype, any::<u32>()).prop_map(
            move |(problem, width, value_width, blocks, dtype, seed)| Case {
                problem,
                batch,
                width,
                value_width,
                blocks,
                dtype,
                seed: u64::from(seed),
            },
        )
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn any_blocks_give_the_naive_output_logsumexp_and_gradients(case in cases()) {
        let device = Device::flex();
        // f64: a few hundred roundings. f32: the same, at its own epsilon.
        let tolerance = if case.dtype == DType::F64 { 1e-13 } else { 1e-5 };
        let expected = naive(&case, &device);
        for blocks in [case.blocks, ONE_BLOCK] {
            for way in ways(&case, blocks) {
                ours(&case, way, &device).assert_close(&expected, tolerance);
            }
        }
    }

    #[test]
    fn disjoint_sets_of_keys_merge_to_their_union_and_share_its_backward(
        case in cases(),
        cut in 0..16usize,
    ) {
        let device = Device::flex();
        let [q, k, v, dout] = case.inputs(&device, DType::F64);
        let keys = k.dims()[1];
        let cut = cut.min(keys);
        let parts: Vec<_> = [0..cut, cut..keys]
            .into_iter()
            .filter(|rows| !rows.is_empty())
            .map(|rows| {
                let mut problem = case.problem.clone();
                problem.key_positions = positions_of(&problem.key_positions, rows.clone());
                let part = |x: &Tensor<4>| x.clone().slice(s![.., rows.clone(), .., ..]);
                (part(&k), part(&v), problem)
            })
            .collect();
        let (out, lse) = parts
            .iter()
            .map(|(k, v, problem)| forward_in(case.blocks, q.clone(), k.clone(), v.clone(), problem))
            .reduce(merge)
            .unwrap();
        let mut dq = q.zeros_like();
        let (mut dk, mut dv) = (Vec::new(), Vec::new());
        for (k, v, problem) in parts {
            let (q, out, lse, dout) = (q.clone(), out.clone(), lse.clone(), dout.clone());
            let part = backward_in(case.blocks, q, k, v, out, lse, dout, &problem);
            dq = dq + part.0;
            dk.push(part.1);
            dv.push(part.2);
        }
        let gradients = [dq, Tensor::cat(dk, 1), Tensor::cat(dv, 1)];
        let expected = naive(&case, &device);
        Results { out, lse, gradients }.assert_close(&expected, 1e-13);
    }

    #[test]
    fn segments_hold_every_head_once_beside_its_kv_head(
        start in 0..40usize,
        len in 0..40usize,
        group in 1..10usize,
    ) {
        let heads = HeadRange { query: start..start + len, group };
        let segments = heads.segments();
        prop_assert!(segments.len() <= 3);
        let mut pairs = Vec::new();
        for segment in segments {
            for (i, kv) in segment.kv.enumerate() {
                for j in 0..segment.group {
                    pairs.push((segment.query_start + i * segment.group + j, kv));
                }
            }
        }
        let expected: Vec<_> = (0..len)
            .map(|local| (local, (start + local) / group - start / group))
            .collect();
        prop_assert_eq!(pairs, expected);
    }

    #[test]
    fn positions_of_rows_are_those_of_the_whole_list(
        all in positions(0..5),
        from in 0..20usize,
        len in 0..20usize,
    ) {
        let flat: Vec<usize> = all.iter().cloned().flatten().collect();
        let rows = from.min(flat.len())..(from + len).min(flat.len());
        let found: Vec<usize> = positions_of(&all, rows.clone()).into_iter().flatten().collect();
        prop_assert_eq!(&found, &flat[rows]);
    }
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
            scale: 0.5,
            dropout: None,
            samples: vec![0..batch],
        },
        batch,
        width: 4,
        value_width: 3,
        blocks: Blocks::DEFAULT,
        dtype: DType::F64,
        seed: 7,
    }
}

#[test]
fn empty_batches_heads_queries_and_keys_give_zeros_of_the_right_shapes() {
    let device = Device::flex();
    for dtype in [DType::F32, DType::F64] {
        for (batch, heads, queries, keys) in [
            (0, 2, 3, 4),
            (2, 0, 3, 4),
            (2, 2, 0, 4),
            (2, 2, 3, 0),
            (0, 0, 0, 0),
        ] {
            for mask in [
                Mask::Full,
                Mask::Causal,
                Mask::KeyLengths(vec![2; batch].into()),
            ] {
                let mut case = plain(batch, heads, queries, keys, mask);
                case.dtype = dtype;
                for way in ways(&case, Blocks::DEFAULT) {
                    let Results {
                        out,
                        lse,
                        gradients: [dq, dk, dv],
                    } = ours(&case, way, &device);
                    assert_eq!(out.dims(), [batch, queries, heads, 3]);
                    assert_eq!(lse.dims(), [batch, queries, heads]);
                    assert_eq!(dq.dims(), [batch, queries, heads, 4]);
                    assert_eq!(dk.dims(), [batch, keys, heads, 4]);
                    assert_eq!(dv.dims(), [batch, keys, heads, 3]);
                    assert!(values(&lse).iter().all(|&x| x == f64::NEG_INFINITY));
                    for tensor in [out, dq, dk, dv] {
                        assert_eq!(tensor.dtype(), dtype);
                        assert!(values(&tensor).iter().all(|&x| x == 0.0));
                    }
                }
            }
        }
    }
}

#[test]
fn empty_results_merge() {
    let (device, dtype) = (Device::flex(), DType::F64);
    for [b, l, h] in [[0, 3, 2], [2, 0, 2], [2, 3, 0]] {
        let side = || {
            (
                Tensor::<4>::zeros([b, l, h, 4], (&device, dtype)),
                Tensor::<3>::zeros([b, l, h], (&device, dtype)),
            )
        };
        let (out, lse) = merge(side(), side());
        assert_eq!((out.dims(), lse.dims()), ([b, l, h, 4], [b, l, h]));
    }
}

#[test]
fn a_sample_of_length_zero_gets_zeros_and_minus_infinity_beside_one_that_sees() {
    let device = Device::flex();
    for dtype in [DType::F32, DType::F64] {
        for blocks in [
            Blocks::DEFAULT,
            Blocks {
                key: 2,
                ..Blocks::DEFAULT
            },
        ] {
            let mut case = plain(2, 2, 3, 5, Mask::KeyLengths([0, 3].into()));
            case.dtype = dtype;
            for way in ways(&case, blocks) {
                let found = ours(&case, way, &device);
                let [blind, seeing] = [0, 1].map(|sample| {
                    let part = |x: &Tensor<4>| values(&x.clone().slice(s![sample..sample + 1]));
                    let mut all = part(&found.out);
                    found.gradients.iter().for_each(|x| all.extend(part(x)));
                    (
                        all,
                        values(&found.lse.clone().slice(s![sample..sample + 1])),
                    )
                });
                assert!(blind.0.iter().all(|&x| x == 0.0));
                assert!(blind.1.iter().all(|&x| x == f64::NEG_INFINITY));
                assert!(seeing.0.iter().chain(&seeing.1).all(|x| x.is_finite()));
                // Hidden keys of the seeing sample get no gradient, to the last bit.
                let hidden = found.gradients[1].clone().slice(s![1..2, 3..5]);
                assert!(values(&hidden).iter().all(|&x| x == 0.0));
            }
        }
    }
}

#[test]
fn hidden_keys_and_values_do_not_touch_the_result_even_if_huge() {
    let device = Device::flex();
    for dtype in [DType::F32, DType::F64] {
        let mut case = plain(1, 2, 6, 6, Mask::KeyLengths([4].into()));
        case.dtype = dtype;
        let [q, k, v, _] = case.inputs(&device, dtype);
        let huge = |x: &Tensor<4>| {
            let tail = x.clone().slice(s![.., 4..6]).full_like(1e30);
            x.clone().slice_assign(s![.., 4..6], tail)
        };
        let expected = forward(q.clone(), k.clone(), v.clone(), &case.problem);
        let found = forward(q, huge(&k), huge(&v), &case.problem);
        assert_eq!(values(&found.0), values(&expected.0));
        assert_eq!(values(&found.1), values(&expected.1));
    }
}

/// Not a bit, on any way of the kernels: what lies after the last key that is seen is not looked at.
#[test]
fn padding_does_not_touch_the_kernels_results_even_if_it_is_no_number() {
    let device = Device::flex();
    // Fewer keys than the kernel for few takes, and more than that.
    for keys in [32, 40] {
        let mut case = plain(3, 2, 70, keys, Mask::KeyLengths([8, 0, 31].into()));
        case.dtype = DType::F32;
        let [q, k, v, dout] = case.inputs(&device, case.dtype);
        let filled = |x: &Tensor<4>, filling: f32| {
            [8, 0, 31]
                .into_iter()
                .enumerate()
                .fold(x.clone(), |x, (sample, seen)| {
                    let padding = s![sample..sample + 1, seen..keys];
                    let filling = x.clone().slice(padding).full_like(filling);
                    x.slice_assign(padding, filling)
                })
        };
        for way in ways(&case, ONE_BLOCK) {
            if matches!(way, Way::Portable(_)) {
                continue;
            }
            let of = |filling| {
                let (k, v) = (filled(&k, filling), filled(&v, filling));
                let (out, lse) = way.forward(q.clone(), k.clone(), v.clone(), &case.problem);
                let results = (out.clone(), lse.clone(), dout.clone());
                let (dq, dk, dv) = way.backward(
                    q.clone(),
                    k,
                    v,
                    results.0,
                    results.1,
                    results.2,
                    &case.problem,
                );
                let all = [out, dq, dk, dv].map(|x| values(&x));
                (all, values(&lse))
            };
            let expected = of(0.0);
            assert_eq!(of(f32::NAN), expected, "{way:?}");
            assert_eq!(of(f32::INFINITY), expected, "{way:?}");
        }
    }
}

#[test]
fn scores_in_the_thousands_neither_overflow_nor_lose_the_logsumexp() {
    let device = Device::flex();
    for dtype in [DType::F32, DType::F64] {
        for blocks in [
            Blocks::DEFAULT,
            Blocks {
                key: 3,
                ..Blocks::DEFAULT
            },
        ] {
            let mut case = plain(1, 2, 5, 8, Mask::Causal);
            case.problem.scale = 2000.0;
            case.dtype = dtype;
            for way in ways(&case, blocks) {
                let found = ours(&case, way, &device);
                // The first query sees one key: its score is its logsumexp, its value the output.
                let [q, k, v, _] = case.inputs(&device, DType::F64);
                let first = |x: Tensor<4>| x.slice(s![.., 0..1]);
                let score = (first(q) * first(k)).sum_dim(3) * case.problem.scale;
                let lse = found.lse.clone().slice(s![.., 0..1]).unsqueeze_dim::<4>(3);
                assert_close!(lse, score, if dtype == DType::F64 { 1e-14 } else { 1e-6 });
                assert_close!(first(found.out.clone()), first(v), 0.0);
                for tensor in found.gradients.iter().chain([&found.out]) {
                    assert!(values(tensor).iter().all(|x| x.is_finite()));
                }
            }
        }
    }
}

#[test]
fn merging_with_a_side_that_saw_nothing_returns_the_other_and_two_such_return_nothing() {
    let device = Device::flex();
    for dtype in [DType::F32, DType::F64] {
        let infinity = f64::NEG_INFINITY;
        let out = |x: f64| Tensor::<4>::full([1, 1, 1, 2], x, (&device, dtype));
        let lse = |x: f64| Tensor::<3>::full([1, 1, 1], x, (&device, dtype));
        for value in [-3000.0, -0.3, 0.0, 2.7, 3000.0] {
            let expected = (values(&out(value)), values(&lse(value)));
            let seen = (out(value), lse(value));
            let unseen = (out(0.0), lse(infinity));
            let first = merge(seen.clone(), unseen.clone());
            assert_eq!((values(&first.0), values(&first.1)), expected);
            let second = merge(unseen, seen);
            assert_eq!((values(&second.0), values(&second.1)), expected);
        }
        let neither = merge((out(0.0), lse(infinity)), (out(0.0), lse(infinity)));
        assert_eq!(values(&neither.0), [0.0, 0.0]);
        assert_eq!(values(&neither.1), [infinity]);
        // Far apart, the larger logsumexp wins whole; equal, each side is a half.
        let far = merge((out(1.0), lse(-9000.0)), (out(2.0), lse(9000.0)));
        assert_eq!(
            (values(&far.0), values(&far.1)),
            (vec![2.0; 2], vec![9000.0])
        );
        let equal = merge((out(1.0), lse(9.0)), (out(2.0), lse(9.0)));
        assert_eq!(values(&equal.0), [1.5, 1.5]);
        assert_close!(equal.1, lse(9.0 + 2f64.ln()), 1e-7);
    }
}

#[test]
fn gradient_checkpointing_changes_nothing() {
    let device = Device::flex();
    let case = plain(2, 2, 7, 9, Mask::Causal);
    let plain = ours(&case, Way::Best, &device);
    let balanced = device.clone().autodiff().gradient_checkpointing();
    let [q, k, v, dout] = case.inputs(&balanced, DType::F64);
    let leaves = [q, k, v].map(|x| x.detach().require_grad());
    // Memory-bound neighbours, which checkpointing does repeat.
    let [q, k, v] = leaves.clone().map(|x| x.mul_scalar(2.0).mul_scalar(0.5));
    let (out, lse) = softmax_attention(q, k, v, case.problem);
    assert!(!lse.is_tracked());
    // Devices are equal with and without autodiff: the strategy tells them apart.
    let strategy = balanced.gradient_checkpointing_strategy();
    assert!(strategy.is_some());
    assert_eq!(lse.gradient_checkpointing_strategy(), strategy);
    let gradients = (out * dout).sum().backward();
    for (leaf, expected) in leaves.iter().zip(&plain.gradients) {
        assert_eq!(values(&leaf.grad(&gradients).unwrap()), values(expected));
    }
}

#[test]
fn inputs_without_autodiff_give_outputs_without_it() {
    let device = Device::flex();
    let case = plain(1, 1, 2, 2, Mask::Full);
    let [q, k, v, _] = case.inputs(&device, DType::F32);
    let (out, lse) = softmax_attention(q, k, v, case.problem);
    assert!(!out.is_autodiff() && !lse.is_autodiff());
}

#[test]
fn the_same_inputs_give_the_same_bits() {
    let device = Device::flex();
    let mut case = plain(2, 4, 70, 90, Mask::Causal);
    case.dtype = DType::F32;
    let blocks = Blocks {
        query: 16,
        key: 32,
        scores_bytes: 10_000,
    };
    for way in ways(&case, blocks) {
        let (a, b) = (ours(&case, way, &device), ours(&case, way, &device));
        assert_eq!(values(&a.out), values(&b.out));
        for (a, b) in a.gradients.iter().zip(&b.gradients) {
            assert_eq!(values(a), values(b));
        }
    }
}

#[test]
fn kernels_give_the_same_bits_on_any_number_of_threads_and_in_tiles_of_any_rows() {
    let Some(level) = Level::detect() else { return };
    let device = Device::flex();
    // One kv head, so that its queries are cut into chunks.
    let mut case = plain(1, 2, 700, 300, Mask::Causal);
    case.dtype = DType::F32;
    case.problem.heads.group = 2;
    for few in [0, usize::MAX] {
        let tiling = |rows| Tiling {
            rows,
            strip: rows.div_ceil(3),
            keys: 64,
            few: Few { keys: few, rows },
        };
        let run = |threads, rows| {
            let threads = rayon::ThreadPoolBuilder::new().num_threads(threads);
            let way = Way::Flex(level, tiling(rows));
            (threads.build().unwrap()).install(|| ours(&case, way, &device))
        };
        let expected = run(1, 40);
        for (threads, rows) in [(3, 40), (2, 40)] {
            let found = run(threads, rows);
            assert_eq!(values(&found.out), values(&expected.out));
            assert_eq!(values(&found.lse), values(&expected.lse));
            for (found, expected) in found.gradients.iter().zip(&expected.gradients) {
                assert_eq!(values(found), values(expected));
            }
        }
        let found = run(2, 14);
        assert_eq!(values(&found.out), values(&expected.out));
        assert_eq!(values(&found.lse), values(&expected.lse));
    }
}

#[test]
fn kernels_read_any_view_as_they_read_a_copy_of_it() {
    let device = Device::flex();
    let mut case = plain(2, 3, 20, 30, Mask::Causal);
    (case.dtype, case.width) = (DType::F32, 12);
    let [q, k, v, dout] = case.inputs(&device, DType::F32);
    let copies = [&q, &k, &v, &dout].map(Tensor::clone);
    // Permuted, cut out of more, repeated, and backwards.
    let apart = |x: Tensor<4>| {
        let data = x.clone().swap_dims(1, 3).into_data();
        Tensor::<4>::from_data(data, &device).swap_dims(1, 3)
    };
    let part = |x: Tensor<4>| {
        let [b, l, h, w] = x.dims();
        let larger = Tensor::<4>::zeros([b, l + 2, h + 1, w + 3], &device);
        let place = s![.., 1..l + 1, 1.., 2..w + 2];
        larger.slice_assign(place, x).slice(place)
    };
    let flipped = |x: Tensor<4>| x.flip([1, 3]).flip([1, 3]);
    let views = [part(apart(q)), apart(k), flipped(v), part(dout)];
    let run = |[q, k, v, dout]: [Tensor<4>; 4]| {
        let (out, lse) = forward(q.clone(), k.clone(), v.clone(), &case.problem);
        let gradients = backward(q, k, v, out.clone(), lse.clone(), dout, &case.problem);
        (out, lse, gradients)
    };
    let (found, expected) = (run(views), run(copies));
    assert_eq!(values(&found.0), values(&expected.0));
    assert_eq!(values(&found.1), values(&expected.1));
    assert_eq!(values(&found.2.0), values(&expected.2.0));
    assert_eq!(values(&found.2.1), values(&expected.2.1));
    assert_eq!(values(&found.2.2), values(&expected.2.2));
}

#[test]
fn kernels_are_right_over_many_tiles_of_their_own_sizes() {
    let device = Device::flex();
    let documents = Documents::new([100, 130, 400]).unwrap();
    let within = Within::Causal;
    let window = NonZeroUsize::new(333).unwrap();
    // Of so few heads the gradients are computed in chunks of queries, and a draw knows nothing of those.
    let dropping = Dropout::new(0.4, DropoutKey::default()).unwrap();
    for (mask, query_positions, key_positions, dropout) in [
        (Mask::Full, vec![0..401], vec![0..531], None),
        (
            Mask::Causal,
            vec![0..130, 400..600],
            vec![0..300, 350..601],
            None,
        ),
        (Mask::Causal, vec![0..530], vec![0..530], Some(dropping)),
        (
            Mask::Window { size: window },
            vec![0..700],
            vec![0..700],
            None,
        ),
        (
            Mask::Packed { documents, within },
            vec![0..513],
            vec![300..513, 0..300],
            None,
        ),
        (
            Mask::KeyLengths([520, 0].into()),
            vec![0..300],
            vec![0..530],
            None,
        ),
    ] {
        for (width, value_width) in [(64, 64), (72, 40), (5, 33)] {
            let mut case = plain(2, 5, 0, 0, mask.clone());
            (case.problem.query_positions, case.problem.key_positions) =
                (query_positions.clone(), key_positions.clone());
            case.problem.heads = HeadRange {
                query: 1..6,
                group: 3,
            };
            case.problem.scale = 1.0 / (width as f64).sqrt();
            case.problem.dropout = dropout;
            (case.width, case.value_width) = (width, value_width);
            let expected = ours(&case, Way::Portable(Blocks::DEFAULT), &device);
            case.dtype = DType::F32;
            ours(&case, Way::Best, &device).assert_close(&expected, 1e-5);
        }
    }
}

/// How far one is from the other, relative to its size.
fn distance<const D: usize>(found: &Tensor<D>, expected: &Tensor<D>) -> f64 {
    let (found, expected) = (values(found), values(expected));
    let squares = |x: Vec<f64>| x.into_iter().map(|x| x * x).sum::<f64>();
    let between = found.iter().zip(&expected).map(|(a, b)| a - b).collect();
    (squares(between) / squares(expected)).sqrt()
}

/// A long row's attention in 16 bits, and what half of a last place is to a number of that type.
fn cases_of_16_bits() -> impl Iterator<Item = (Case, f64)> {
    [(DType::BF16, 2f64.powi(-9)), (DType::F16, 2f64.powi(-12))]
        .into_iter()
        .map(|(dtype, half_a_place)| {
            let mut case = plain(1, 4, 300, 2100, Mask::Causal);
            case.problem.query_positions = vec![1800..2100];
            case.problem.heads.group = 2;
            (case.width, case.value_width) = (16, 16);
            case.dtype = dtype;
            (case, half_a_place)
        })
}

impl Results {
    /// 16 bits are rounded where a result begins and ends, and nothing in between is: errors do not grow with
    /// the length. The output, which is rounded before it goes back, may add as much as the gradient's own end.
    fn assert_rounded_at_the_ends(&self, expected: &Self, half_a_place: f64) {
        assert_eq!(self.lse.dtype(), DType::F32);
        assert_close!(self.lse, expected.lse, 1e-6);
        let found = self.gradients.iter().chain([&self.out]);
        let expected = expected.gradients.iter().chain([&expected.out]);
        for (found, expected) in found.zip(expected) {
            let distance = distance(found, expected);
            assert!(distance <= 2.0 * half_a_place, "{distance:e}");
        }
    }
}

#[test]
fn sixteen_bits_are_computed_in_f32_and_rounded_once() {
    let device = Device::flex();
    let dropout = Dropout::new(0.3, DropoutKey::default()).unwrap();
    for dropout in [None, Some(dropout)] {
        for (mut case, half_a_place) in cases_of_16_bits() {
            case.problem.dropout = dropout;
            let found = ours(&case, Way::Best, &device);
            assert_eq!(found.out.dtype(), case.dtype);
            found.assert_rounded_at_the_ends(&naive(&case, &device), half_a_place);
        }
    }
}

#[test]
fn parts_of_16_bits_merge_in_f32_and_share_their_backward() {
    let device = Device::flex();
    for (case, half_a_place) in cases_of_16_bits() {
        let [q, k, v, dout] = case.inputs(&device, case.dtype);
        let parts = [0..700, 700..1400, 1400..2100].map(|keys: Range<usize>| {
            let part = |x: &Tensor<4>| x.clone().slice(s![.., keys.clone(), .., ..]);
            let (k, v) = (part(&k), part(&v));
            let mut problem = case.problem.clone();
            problem.key_positions = vec![keys];
            (k, v, problem)
        });
        let [first, second, third] = parts
            .each_ref()
            .map(|(k, v, problem)| forward(q.clone(), k.clone(), v.clone(), problem));
        let two = merge(first.clone(), second.clone());
        assert_eq!((two.0.dtype(), two.1.dtype()), (case.dtype, DType::F32));
        let first = (first.0.cast(DType::F32), first.1);
        let (out, lse) = merge(merge(first, second), third);
        let mut dq = q.zeros_like().cast(DType::F32);
        let (mut dk, mut dv) = (Vec::new(), Vec::new());
        for (k, v, problem) in parts {
            let (q, out, lse, dout) = (q.clone(), out.clone(), lse.clone(), dout.clone());
            let part = backward(q, k, v, out, lse, dout, &problem);
            dq = dq + part.0.cast(DType::F32);
            dk.push(part.1);
            dv.push(part.2);
        }
        let gradients = [dq, Tensor::cat(dk, 1), Tensor::cat(dv, 1)];
        let expected = naive(&case, &device);
        Results {
            out,
            lse,
            gradients,
        }
        .assert_rounded_at_the_ends(&expected, half_a_place);
    }
}

#[test]
fn dropout_with_probability_0_changes_no_bit() {
    let device = Device::flex();
    let mut case = plain(2, 4, 9, 11, Mask::Causal);
    case.dtype = DType::F32;
    let mut dropping = case.clone();
    dropping.problem.dropout = Some(Dropout::new(0.0, DropoutKey::default()).unwrap());
    for way in ways(&case, case.blocks) {
        let [without, with] = [&case, &dropping].map(|case| ours(case, way, &device));
        assert_eq!(values(&with.out), values(&without.out));
        assert_eq!(values(&with.lse), values(&without.lse));
        for (a, b) in with.gradients.iter().zip(&without.gradients) {
            assert_eq!(values(a), values(b));
        }
    }
}

#[test]
fn dropout_leaves_the_logsumexp_and_the_mean_of_the_output() {
    let device = Device::flex();
    // Of equal weights and values of one, an output is the share of what is kept, scaled.
    let (queries, keys, probability) = (64, 256, 0.3);
    let mut case = plain(1, 2, queries, keys, Mask::Full);
    let [q, k, v, _] = case.inputs(&device, DType::F64);
    let (q, v) = (q.zeros_like(), v.ones_like());
    let without = forward(q.clone(), k.clone(), v.clone(), &case.problem);
    case.problem.dropout = Some(Dropout::new(probability, DropoutKey::default()).unwrap());
    let with = forward(q, k, v, &case.problem);
    assert_eq!(values(&with.1), values(&without.1));
    let outputs = values(&with.0);
    let mean = outputs.iter().sum::<f64>() / outputs.len() as f64;
    // Five standard deviations of a mean of all pairs.
    let pairs = (2 * queries * keys) as f64;
    let bound = 5.0 * (probability / (1.0 - probability) / pairs).sqrt();
    assert!((mean - 1.0).abs() < bound, "{mean}");
    assert!(outputs.iter().any(|x| (x - 1.0).abs() > 1e-3));
}

#[test]
#[should_panic(expected = "one global number")]
fn samples_without_a_global_number_are_refused() {
    let mut case = plain(2, 1, 2, 2, Mask::Full);
    let [q, k, v, _] = case.inputs(&Device::flex(), DType::F32);
    case.problem.samples = vec![3..4];
    let _ = forward(q, k, v, &case.problem);
}

#[test]
#[should_panic(expected = "must have a row per position")]
fn positions_that_are_not_one_per_row_are_refused() {
    let mut case = plain(1, 1, 2, 2, Mask::Full);
    let [q, k, v, _] = case.inputs(&Device::flex(), DType::F32);
    case.problem.query_positions = vec![0..1];
    let _ = forward(q, k, v, &case.problem);
}

#[test]
#[should_panic(expected = "must hold the query heads")]
fn kv_heads_other_than_those_of_the_query_heads_are_refused() {
    let mut case = plain(1, 4, 2, 2, Mask::Full);
    let [q, k, v, _] = case.inputs(&Device::flex(), DType::F32);
    case.problem.heads = HeadRange {
        query: 2..6,
        group: 2,
    };
    let _ = forward(q, k, v, &case.problem);
}
