use burn::tensor::TensorData;
use proptest::prelude::*;

use super::*;
use crate::simd::Level;

/// Values without a pattern.
fn random(shape: [usize; 4], seed: u64, (device, dtype): (&Device, DType)) -> Tensor<4> {
    let count: usize = shape.iter().product();
    let values: Vec<f64> = (0..count)
        .map(|index| ((index as f64 + 1.0) * 12.9898 + seed as f64 * 78.233).sin() * 43758.5453)
        .map(|value| value - value.floor() - 0.5)
        .collect();
    Tensor::from_data(TensorData::new(values, shape), (device, dtype))
}

fn values(x: &Tensor<4>) -> Vec<f64> {
    x.to_data().iter::<f64>().collect()
}

fn difference(found: &Tensor<4>, expected: &Tensor<4>) -> f64 {
    assert_eq!(found.dims(), expected.dims());
    let pairs = values(found).into_iter().zip(values(expected));
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[derive(Debug, Clone)]
struct Case {
    batch: usize,
    length: usize,
    width: [usize; 2],
    problem: Problem,
}

impl Case {
    fn inputs(&self, device: &Device, dtype: DType) -> [Tensor<4>; 4] {
        let heads = (
            self.problem.heads.query.len(),
            self.problem.heads.kv().len(),
        );
        let [d, dv] = self.width;
        let of = |heads, width, seed| {
            let shape = [self.batch, self.length, heads, width];
            random(shape, seed, (device, dtype))
        };
        [
            of(heads.0, d, 1),
            of(heads.1, d, 2),
            of(heads.1, dv, 3),
            of(heads.0, dv, 4),
        ]
    }

    /// By the formula, with every pair of positions at once, and Burn's gradients of that.
    fn naive(&self) -> [Tensor<4>; 4] {
        let device = Device::flex().autodiff();
        let [q, k, v, dout] = self.inputs(&device, DType::F64);
        let leaves = [q, k, v].map(Tensor::require_grad);
        let [q, k, v] = leaves.clone();
        let problem = &self.problem;
        let of_head = (0..problem.decays().len()).map(|head| {
            let kv = problem.kv_head(head);
            let [q, k, v] = [(&q, head), (&k, kv), (&v, kv)]
                .map(|(x, head)| x.clone().narrow(2, head, 1).swap_dims(1, 2));
            let decay = problem.decays()[head];
            let mut weights = vec![];
            for i in 0..self.length {
                for j in 0..self.length {
                    weights.push(if j <= i {
                        decay.powi((i - j) as i32)
                    } else {
                        0.0
                    });
                }
            }
            let data = TensorData::new(weights, [1, 1, self.length, self.length]);
            let weights = Tensor::<4>::from_data(data, (&device, DType::F64));
            let scores = q.matmul(k.swap_dims(2, 3)).mul_scalar(problem.scale);
            (scores * weights).matmul(v).swap_dims(1, 2)
        });
        let out = Tensor::cat(of_head.collect(), 2);
        let gradients = (out.clone() * dout).sum().backward();
        let [dq, dk, dv] = leaves.map(|leaf| leaf.grad(&gradients).unwrap());
        [out.inner(), dq, dk, dv]
    }

    /// As one chunk, by the passes for such.
    fn at_once(&self, way: Way, dtype: DType) -> [Tensor<4>; 4] {
        let [q, k, v, dout] = &self.inputs(&Device::flex(), dtype);
        let chunk = forward_by(way, [q, k, v], &self.problem);
        let Gradients { query, key, value } =
            backward_by(way, [q, k, v], &chunk.states, dout, &self.problem);
        [chunk.output, query, key, value]
    }

    /// In chunks of the given lengths, each of which gets its states from the others.
    fn chunked(&self, way: Way, dtype: DType, lengths: &[usize]) -> [Tensor<4>; 4] {
        let device = Device::flex();
        let inputs = self.inputs(&device, dtype);
        let problem = &self.problem;
        let mut start = 0;
        let chunks: Vec<[Tensor<4>; 4]> = lengths
            .iter()
            .map(|&length| {
                let range = start..start + length;
                start = range.end;
                inputs
                    .each_ref()
                    .map(|x| x.clone().slice_dim(1, range.clone()))
            })
            .collect();
        let mut before: Option<Tensor<4>> = None;
        let mut forwards = vec![];
        for [q, k, v, _] in &chunks {
            let mut states = states_by(way, [k, v], Direction::Forward, problem);
            if let Some(before) = before {
                states.receive(&before, problem);
            }
            before = Some(states.last.clone());
            let within = within_by(way, [q, k, v], problem);
            let output = within.output_by(way, q, &states, problem);
            forwards.push(Chunk { output, states });
        }
        let mut after: Option<Tensor<4>> = None;
        let mut backwards = vec![];
        for ([q, k, v, dout], chunk) in chunks.iter().zip(&forwards).rev() {
            let mut gradients = states_by(way, [q, dout], Direction::Backward, problem);
            if let Some(after) = after {
                gradients.receive(&after, problem);
            }
            after = Some(gradients.last.clone());
            let qkv = [q, k, v];
            let within = gradients_within_by(way, qkv, &chunk.states, dout, problem);
            backwards.push(within.gradients_by(way, qkv, &gradients, problem));
        }
        backwards.reverse();
        let cat = |parts: Vec<Tensor<4>>| Tensor::cat(parts, 1);
        [
            cat(forwards.into_iter().map(|chunk| chunk.output).collect()),
            cat(backwards.iter().map(|part| part.query.clone()).collect()),
            cat(backwards.iter().map(|part| part.key.clone()).collect()),
            cat(backwards.iter().map(|part| part.value.clone()).collect()),
        ]
    }
}

fn cases() -> impl Strategy<Value = Case> {
    let heads = prop_oneof![
        Just((0..3, 1)),
        Just((1..4, 1)),
        Just((0..4, 2)),
        // The first and the last key-value head are cut.
        Just((1..6, 2)),
        Just((2..3, 3)),
    ];
    let decay = prop_oneof![Just(1.0), 0.05..1.0f64, 0.9..1.0f64];
    (
        1..=2usize,
        1..=13usize,
        [1..=3usize, 1..=4usize],
        heads,
        prop::collection::vec(decay, 6),
        prop_oneof![Just(1.0), Just(0.3)],
    )
        .prop_map(
            |(batch, length, width, (query, group), decay, scale)| Case {
                batch,
                length,
                width,
                problem: Problem {
                    heads: HeadRange { query, group },
                    decay: decay.into(),
                    scale,
                },
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn chunks_of_any_length_with_states_passed_between_them_give_the_formulas_results(
        case in cases(),
        cuts in prop::collection::vec(0..=13usize, 0..4),
        block in 1..=5usize,
    ) {
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(case.length)).collect();
        cuts.extend([0, case.length]);
        cuts.sort_unstable();
        let lengths: Vec<usize> = cuts.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let found = case.chunked(Way::Portable(block), DType::F64, &lengths);
        for (found, expected) in found.iter().zip(case.naive()) {
            let difference = difference(found, &expected);
            prop_assert!(difference < 1e-12, "{difference:e}");
        }
    }

    /// Of every width of a vector, in blocks and strips that are whole and that are not.
    #[test]
    fn kernels_give_the_portable_results(
        mut case in cases(),
        cut in 0..=1usize,
        (length, block) in (1..=90usize, 1..=70usize),
        width in [1..=20usize, 1..=20usize],
    ) {
        case.length = length;
        case.width = width;
        let lengths = [cut * length / 3, length - cut * length / 3];
        let expected = case.chunked(Way::Portable(block), DType::F64, &lengths);
        for level in Level::all() {
            let way = Way::Flex(level, block);
            let found = case.chunked(way, DType::F32, &lengths);
            let at_once = case.at_once(way, DType::F32);
            for ((found, at_once), expected) in found.iter().zip(&at_once).zip(&expected) {
                let size = values(expected).into_iter().fold(1.0, |size: f64, x| size.max(x.abs()));
                for found in [found, at_once] {
                    let difference = difference(found, expected) / size;
                    prop_assert!(difference < 3e-6, "{level:?}: {difference:e}");
                }
            }
        }
    }
}

/// Four query heads, of which the first and the last share their key-value head with one that is not here.
fn cut_heads() -> Problem {
    Problem {
        heads: HeadRange {
            query: 1..5,
            group: 2,
        },
        decay: vec![0.5, 0.99, 1.0, 0.9, 0.7].into(),
        scale: 0.5,
    }
}

#[test]
fn kernels_give_the_same_bits_on_any_number_of_threads_and_whatever_follows_in_a_block() {
    let Some(level) = Level::detect() else { return };
    let way = Way::Flex(level, BLOCK);
    let case = |length| Case {
        batch: 5,
        length,
        width: [24, 20],
        problem: cut_heads(),
    };
    let length = 3 * BLOCK + 5;
    let steps = || case(length).chunked(way, DType::F32, &[length]);
    // In one sweep as long as each thread has a head: there are 20 of queries, 15 of keys and values.
    let at_once = || case(length).at_once(way, DType::F32);
    for run in [&steps as &(dyn Fn() -> [Tensor<4>; 4] + Sync), &at_once] {
        let on = |threads| {
            let threads = rayon::ThreadPoolBuilder::new().num_threads(threads);
            threads.build().unwrap().install(run)
        };
        let expected = on(1);
        for found in [2, 3, 16, 21].map(on) {
            for (found, expected) in found.iter().zip(&expected) {
                assert_eq!(values(found), values(expected));
            }
        }
    }
    // The inputs depend on the length: the same rows are those of a case cut short.
    let [q, k, v, _] = case(BLOCK).inputs(&Device::flex(), DType::F32);
    let problem = cut_heads();
    let whole = forward_by(way, [&q, &k, &v], &problem).output;
    let cut = BLOCK - 7;
    let [q, k, v] = [q, k, v].map(|x| x.narrow(1, 0, cut));
    let short = forward_by(way, [&q, &k, &v], &problem).output;
    assert_eq!(values(&short), values(&whole.narrow(1, 0, cut)));
}

#[test]
fn the_operation_has_the_formulas_gradients_over_several_blocks() {
    let case = Case {
        batch: 2,
        length: 2 * BLOCK + 7,
        width: [3, 4],
        problem: cut_heads(),
    };
    let device = Device::flex().autodiff();
    let [q, k, v, dout] = case.inputs(&device, DType::F64);
    let leaves = [q, k, v].map(Tensor::require_grad);
    let [q, k, v] = leaves.clone();
    let out = linear_attention(q, k, v, case.problem.clone());
    let gradients = (out.clone() * dout).sum().backward();
    let [dq, dk, dv] = leaves.map(|leaf| leaf.grad(&gradients).unwrap());
    for (found, expected) in [out.inner(), dq, dk, dv].iter().zip(case.naive()) {
        assert!(difference(found, &expected) < 1e-11);
    }
}

#[test]
fn half_precision_has_states_in_f32_and_results_in_its_own_dtype() {
    let problem = Problem {
        heads: HeadRange {
            query: 0..2,
            group: 2,
        },
        decay: vec![0.9, 1.0].into(),
        scale: 0.5,
    };
    let device = Device::flex();
    let of = |dtype: DType| {
        // What bf16 can hold, so that both compute with the same numbers.
        let of = |heads, seed| {
            let x = random([1, 5, heads, 3], seed, (&device, DType::F32));
            x.cast(DType::BF16).cast(dtype)
        };
        let (q, k, v, dout) = (of(2, 1), of(1, 2), of(1, 3), of(2, 4));
        let chunk = forward(&q, &k, &v, &problem);
        let gradients = backward([&q, &k, &v], &chunk.states, &dout, &problem);
        let Gradients { query, key, value } = gradients;
        (chunk.states.last, [chunk.output, query, key, value])
    };
    let ((state, half), (expected, single)) = (of(DType::BF16), of(DType::F32));
    assert_eq!(state.dtype(), DType::F32);
    assert_eq!(difference(&state, &expected), 0.0);
    for (half, single) in half.into_iter().zip(single) {
        assert_eq!(half.dtype(), DType::BF16);
        // Rounded once, at the end.
        assert_eq!(difference(&half, &single.cast(DType::BF16)), 0.0);
    }
}

#[test]
fn nothing_of_any_kind_has_results_without_elements() {
    for [batch, length, heads] in [[0, 3, 2], [2, 0, 2], [2, 3, 0]] {
        let problem = Problem {
            heads: HeadRange {
                query: 0..heads,
                group: 1,
            },
            decay: vec![0.9; 2].into(),
            scale: 1.0,
        };
        let device = Device::flex();
        let of = |width| random([batch, length, heads, width], 1, (&device, DType::F32));
        let (q, k, v, dout) = (of(3), of(3), of(4), of(4));
        let mut states = states(&k, &v, &problem);
        let before = Tensor::ones([batch, heads, 3, 4], (&device, DType::F32));
        states.receive(&before, &problem);
        let output = within(&q, &k, &v, &problem).output(&q, &states, &problem);
        assert_eq!(output.dims(), [batch, length, heads, 4]);
        let mut after = state_gradients(&q, &dout, &problem);
        after.receive(&before, &problem);
        // What passes an empty chunk is what came.
        if length == 0 {
            assert_eq!(difference(&states.last, &before), 0.0);
            assert_eq!(difference(&after.last, &before), 0.0);
        }
        let qkv = [&q, &k, &v];
        let within = gradients_within(qkv, &states, &dout, &problem);
        let gradients = within.gradients(qkv, &after, &problem);
        assert_eq!(gradients.query.dims(), q.dims());
        assert_eq!(gradients.key.dims(), k.dims());
        assert_eq!(gradients.value.dims(), v.dims());
    }
}

#[test]
fn a_state_reaches_every_block_in_the_bits_of_the_portable_way_whoever_holds_the_states() {
    let problem = cut_heads();
    let (length, block) = (23, 4);
    let of = |shape, seed, dtype| random(shape, seed, (&Device::flex(), dtype));
    for dtype in [DType::F32, DType::F64] {
        let [k, v] = [1, 2].map(|seed| of([2, length, 3, 70], seed, dtype));
        let [q, dout] = [3, 4].map(|seed| of([2, length, 4, 70], seed, dtype));
        let came = of([2, 4, 70, 70], 5, dtype);
        for (direction, ab) in [
            (Direction::Forward, [&k, &v]),
            (Direction::Backward, [&q, &dout]),
        ] {
            let states = || portable::states(block, ab, direction, &problem);
            let before = states();
            let passed = |index: usize| match direction {
                Direction::Forward => index * block,
                Direction::Backward => length - length.min((index + 1) * block),
            };
            let expected = received::portable(before.met.clone(), &came, passed, &problem);
            let last = before.last.clone()
                + came.clone() * problem.passing(length, (&came.device(), dtype));
            for threads in [1, 3] {
                let pool = rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .build()
                    .unwrap();
                let (mut alone, mut shared) = (states(), states());
                let held = shared.clone();
                pool.install(|| {
                    alone.receive(&came, &problem);
                    shared.receive(&came, &problem);
                });
                for found in [alone, shared] {
                    assert_eq!(found.met.to_data(), expected.to_data());
                    assert_eq!(found.last.to_data(), last.to_data());
                }
                assert_eq!(held.met.to_data(), before.met.to_data());
            }
        }
    }
}

#[test]
fn a_state_is_added_where_the_states_are() {
    let problem = cut_heads();
    let device = Device::flex();
    let of = |shape, seed| random(shape, seed, (&device, DType::F32));
    let [k, v] = [1, 2].map(|seed| of([1, 300, 3, 8], seed));
    let mut states = states(&k, &v, &problem);
    let place = |states: &States| {
        let met = crate::fused::rows::primitive(states.met.clone());
        (met.bytes().as_ptr(), met.bytes().to_vec())
    };
    let before = place(&states);
    states.receive(&of([1, 4, 8, 8], 3), &problem);
    let after = place(&states);
    assert_eq!(after.0, before.0);
    assert_ne!(after.1, before.1);
}

/// With more heads than the problem's, the loops would read wrong rows and say nothing.
fn refused(k: [usize; 4], v: [usize; 4], query: Range<usize>) {
    let problem = Problem {
        heads: HeadRange { query, group: 1 },
        decay: vec![0.9; 4].into(),
        scale: 1.0,
    };
    let of = |shape| random(shape, 1, (&Device::flex(), DType::F32));
    states(&of(k), &of(v), &problem);
}

#[test]
#[should_panic(expected = "and hold the heads 0..4")]
fn states_of_other_heads_than_the_problems_are_refused() {
    refused([1, 100, 1, 16], [1, 100, 1, 16], 0..4);
}

#[test]
#[should_panic(expected = "must be [B, L, H, d] and [B, L, H, dv]")]
fn states_of_keys_and_values_of_two_lengths_are_refused() {
    refused([1, 100, 2, 16], [1, 99, 2, 16], 0..2);
}

#[test]
#[should_panic(expected = "4 decays are too few")]
fn states_of_heads_without_a_decay_are_refused() {
    refused([1, 10, 2, 16], [1, 10, 2, 16], 3..5);
}

#[test]
#[should_panic(expected = "dout [1, 10, 4, 8] must be [1, 10, 4, 16]")]
fn an_outputs_gradient_of_another_shape_is_refused() {
    let problem = cut_heads();
    let heads = (problem.heads.query.len(), problem.heads.kv().len());
    let of = |heads, width| random([1, 10, heads, width], 1, (&Device::flex(), DType::F32));
    let (q, k, v) = (of(heads.0, 16), of(heads.1, 16), of(heads.1, 16));
    let chunk = forward(&q, &k, &v, &problem);
    backward([&q, &k, &v], &chunk.states, &of(heads.0, 8), &problem);
}
