//! Every operation against the same formula in Burn's own operations under its autodiff: the loops and the portable
//! expressions, values and the gradients of all inputs, whatever strides the inputs have.

use burn::tensor::{DType, Device, Tensor, TensorData, activation};
use proptest::prelude::*;

use super::*;
use crate::shape::reshape;

/// Of the norms: large enough that a row of nearly equal values does not make rounding errors large.
const EPSILON: f64 = 0.1;

/// A value in [-1, 1) for each pair of numbers, without any generator's state.
fn noise(seed: u64, index: usize) -> f64 {
    let z = ((seed << 32) | index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    ((z ^ (z >> 29)) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
}

/// How an input lies in memory.
#[derive(Debug, Clone, Copy)]
enum Lies {
    EndToEnd,
    /// Its first two dims swapped.
    Permuted,
    /// Its last two dims swapped: no row lies end to end.
    Transposed,
    /// A part of wider rows.
    Part,
}

fn drawn<const D: usize>(shape: [usize; D], seed: u64, dtype: DType, lies: Lies) -> Tensor<D> {
    let mut held = shape;
    match lies {
        Lies::EndToEnd => {}
        Lies::Permuted => held.swap(0, 1),
        Lies::Transposed => held.swap(D - 2, D - 1),
        Lies::Part => held[D - 1] += 3,
    }
    let values: Vec<f64> = (0..held.iter().product())
        .map(|index| 2.0 * noise(seed, index))
        .collect();
    let x = Tensor::<D>::from_data(TensorData::new(values, held), (&Device::flex(), dtype));
    if shape.contains(&0) {
        return Tensor::zeros(shape, (&Device::flex(), dtype));
    }
    match lies {
        Lies::EndToEnd => x,
        Lies::Permuted => x.swap_dims(0, 1),
        Lies::Transposed => x.swap_dims(D - 2, D - 1),
        Lies::Part => x.narrow(D - 1, 2, shape[D - 1]),
    }
}

fn values<const D: usize>(x: &Tensor<D>) -> Vec<f64> {
    x.to_data().iter::<f64>().collect()
}

#[track_caller]
fn assert_close<const D: usize>(what: &str, found: &Tensor<D>, expected: &Tensor<D>) {
    assert_eq!(found.dims(), expected.dims(), "{what}");
    assert_eq!(found.dtype(), expected.dtype(), "{what}");
    // Relative to the largest value: sums over positions grow with their number.
    let tolerance = match found.dtype() {
        DType::F64 => 1e-10,
        _ => 1e-5,
    };
    let (found, expected) = (values(found), values(expected));
    let largest = expected.iter().fold(1.0, |a: f64, b| a.max(b.abs()));
    for (found, expected) in found.into_iter().zip(expected) {
        let error = (found - expected).abs() / largest;
        assert!(error <= tolerance, "{what}: {found} instead of {expected}");
    }
}

/// The output, and the gradients of all inputs for a cotangent without a pattern.
fn differentiated<const N: usize, const D: usize>(
    inputs: &[Tensor<D>; N],
    function: impl Fn([Tensor<D>; N]) -> Tensor<D>,
    lies: Lies,
) -> (Tensor<D>, [Tensor<D>; N]) {
    let leaves = inputs.clone().map(|input| input.autodiff().require_grad());
    let y = function(leaves.clone());
    let cotangent = drawn(y.dims(), 77, y.dtype(), lies).autodiff();
    let gradients = (y.clone() * cotangent).sum().backward();
    (y.inner(), leaves.map(|leaf| leaf.grad(&gradients).unwrap()))
}

/// Holds an operation to a formula, by Burn's autodiff of it.
#[track_caller]
fn check<const N: usize, const D: usize>(
    inputs: &[Tensor<D>; N],
    operation: impl Fn([Tensor<D>; N]) -> Tensor<D>,
    formula: impl Fn([Tensor<D>; N]) -> Tensor<D>,
    lies: Lies,
) {
    let (found, gradients) = differentiated(inputs, operation, lies);
    let (expected, expected_gradients) = differentiated(inputs, formula, lies);
    assert_close("the output", &found, &expected);
    for (index, pair) in gradients.iter().zip(&expected_gradients).enumerate() {
        assert_close(&format!("gradient {index}"), pair.0, pair.1);
    }
}

/// Not `mean_dim`: its backward rounds its factor to f32.
fn mean<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let count = x.dims()[D - 1] as f64;
    x.sum_dim(D - 1).mul_scalar(1.0 / count)
}

fn layer_norm_formula<const D: usize>([x, weight, bias]: [Tensor<D>; 3]) -> Tensor<D> {
    let centred = x.clone() - mean(x);
    let variance = mean(centred.clone() * centred.clone());
    centred / variance.add_scalar(EPSILON).sqrt() * weight + bias
}

fn rms_norm_formula([x, weight]: [Tensor<4>; 2]) -> Tensor<4> {
    let (dims, length) = (x.dims(), weight.dims()[3]);
    let x: Tensor<4> = reshape(x, [dims[0] * dims[1], dims[2], dims[3] / length, length]);
    let square = mean(x.clone() * x.clone());
    reshape(x / square.add_scalar(EPSILON).sqrt() * weight, dims)
}

fn gelu_formula([x]: [Tensor<4>; 1]) -> Tensor<4> {
    let cube = x.clone() * x.clone() * x.clone();
    let argument =
        (x.clone() + cube.mul_scalar(0.044715)).mul_scalar((2.0 / std::f64::consts::PI).sqrt());
    x * argument.tanh().add_scalar(1.0).mul_scalar(0.5)
}

fn swiglu_formula([gate, up]: [Tensor<4>; 2]) -> Tensor<4> {
    gate.clone() * activation::sigmoid(gate) * up
}

/// A target for each row of a tensor, some of which do not count.
fn targets([a, b, c, classes]: [usize; 4], seed: u64) -> Vec<Target> {
    let of_row = |row| Target {
        class: ((noise(seed, row) + 1.0) / 2.0 * classes as f64) as u32,
        weight: noise(seed + 1, row).max(-0.5) + 0.5,
    };
    (0..a * b * c).map(of_row).collect()
}

fn cross_entropy_formula(x: Tensor<4>, targets: &[Target]) -> Tensor<4> {
    let [a, b, c, classes] = x.dims();
    let options = (&x.device(), x.dtype());
    let weights = targets.iter().map(|target| target.weight).collect();
    let weights = Tensor::<4>::from_data(TensorData::new::<f64, _>(weights, [a, b, c, 1]), options);
    let is_target = |at: usize| f64::from(targets[at / classes].class as usize == at % classes);
    let is_target = (0..a * b * c * classes).map(is_target).collect();
    let data = TensorData::new::<f64, _>(is_target, [a, b, c, classes]);
    let of_target = (x.clone() * Tensor::from_data(data, options)).sum_dim(3);
    reshape(
        ((x.exp().sum_dim(3).log() - of_target) * weights).sum(),
        [1; 4],
    )
}

fn lies() -> impl Strategy<Value = Lies> {
    prop_oneof![
        Just(Lies::EndToEnd),
        Just(Lies::Permuted),
        Just(Lies::Transposed),
        Just(Lies::Part)
    ]
}

fn dtypes() -> impl Strategy<Value = DType> {
    prop_oneof![Just(DType::F64), Just(DType::F32)]
}

fn shapes(widths: impl Strategy<Value = usize>) -> impl Strategy<Value = [usize; 4]> {
    (1usize..4, 1usize..4, 1usize..6, widths).prop_map(|(a, b, c, width)| [a, b, c, width])
}

/// Which dims of a tensor have vectors of their own; the third choice, which no loop serves, takes the portable way.
fn vectors(shape: [usize; 4], own: usize) -> [usize; 4] {
    let [a, b, _, width] = shape;
    match own {
        0 => [1, 1, 1, width],
        1 => [a, 1, 1, width],
        2 => [1, b, 1, width],
        _ => [a, b, 1, width],
    }
}

proptest! {
    #[test]
    fn layer_norm_is_its_formula(
        shape in shapes(2usize..40), own in 0usize..4, dtype in dtypes(), lies in lies(), seed in 0u64..1000,
    ) {
        let vectors = vectors(shape, own);
        let inputs = [
            drawn(shape, seed, dtype, lies),
            drawn(vectors, seed + 1, dtype, Lies::EndToEnd),
            drawn(vectors, seed + 2, dtype, Lies::EndToEnd),
        ];
        let operation = |[x, weight, bias]: [Tensor<4>; 3]| layer_norm(x, weight, bias, EPSILON);
        check(&inputs, operation, layer_norm_formula, lies);
        let portable = |[x, weight, bias]: [Tensor<4>; 3]| layer_norm::through([x, weight, bias], EPSILON, None);
        check(&inputs, portable, layer_norm_formula, lies);
    }

    #[test]
    fn rms_norm_is_its_formula_for_each_run(
        (shape, length) in (1usize..12, 1usize..5).prop_flat_map(|(length, runs)| (shapes(Just(length * runs)), Just(length))),
        dtype in dtypes(), lies in lies(), seed in 0u64..1000,
    ) {
        let inputs = [drawn(shape, seed, dtype, lies), drawn([1, 1, 1, length], seed + 1, dtype, Lies::EndToEnd)];
        let operation = |[x, weight]: [Tensor<4>; 2]| rms_norm(x, reshape(weight, [length]), EPSILON);
        check(&inputs, operation, rms_norm_formula, lies);
        let [x, weight] = inputs.clone();
        let weight = reshape(weight, [length]);
        let (expected, [dx, dweight]) = differentiated(&inputs, rms_norm_formula, lies);
        assert_close("the output", &rms_norm::portable_forward(x.clone(), weight.clone(), EPSILON), &expected);
        let cotangent = drawn(shape, 77, dtype, lies);
        let (found, found_weight) = rms_norm::portable_backward([x, cotangent], weight, EPSILON);
        assert_close("gradient 0", &found, &dx);
        assert_close("gradient 1", &reshape(found_weight, [1, 1, 1, length]), &dweight);
    }

    #[test]
    fn a_gated_sum_is_its_formula(
        shape in shapes(1usize..40), own in 0usize..4, dtype in dtypes(), lies in lies(), seed in 0u64..1000,
    ) {
        let inputs = [
            drawn(shape, seed, dtype, lies),
            drawn(vectors(shape, own), seed + 1, dtype, Lies::EndToEnd),
            drawn(shape, seed + 2, dtype, lies),
        ];
        check(&inputs, |[x, gate, h]| gated_sum(x, gate, h), |[x, gate, h]| x + gate * h, lies);
    }

    #[test]
    fn gelu_is_its_formula(shape in shapes(1usize..40), dtype in dtypes(), lies in lies(), seed in 0u64..1000) {
        let inputs = [drawn(shape, seed, dtype, lies).mul_scalar(4.0)];
        check(&inputs, |[x]| gelu_tanh(x), gelu_formula, lies);
        let (expected, [dx]) = differentiated(&inputs, gelu_formula, lies);
        let [x] = inputs;
        assert_close("the output", &gelu::portable_forward(x.clone()), &expected);
        let cotangent = drawn(shape, 77, dtype, lies);
        assert_close("gradient", &gelu::portable_backward(x, cotangent), &dx);
    }

    #[test]
    fn swiglu_is_its_formula(shape in shapes(1usize..40), dtype in dtypes(), lies in lies(), seed in 0u64..1000) {
        let inputs = [drawn(shape, seed, dtype, lies).mul_scalar(4.0), drawn(shape, seed + 1, dtype, lies)];
        check(&inputs, |[gate, up]| swiglu(gate, up), swiglu_formula, lies);
        let (expected, gradients) = differentiated(&inputs, swiglu_formula, lies);
        assert_close("the output", &swiglu::portable_forward(inputs.clone()), &expected);
        let found = swiglu::portable_backward(inputs, drawn(shape, 77, dtype, lies));
        for (found, expected) in found.iter().zip(&gradients) {
            assert_close("a gradient", found, expected);
        }
    }

    /// Rows of several pieces too, the last of which is short.
    #[test]
    fn cross_entropy_is_its_formula(
        shape in shapes(prop_oneof![1usize..40, 1000usize..2100]), dtype in dtypes(), lies in lies(), seed in 0u64..1000,
    ) {
        let (inputs, targets) = ([drawn(shape, seed, dtype, lies).mul_scalar(4.0)], targets(shape, seed));
        let operation = |[x]: [Tensor<4>; 1]| reshape(cross_entropy(x, &targets), [1; 4]);
        let formula = |[x]: [Tensor<4>; 1]| cross_entropy_formula(x, &targets);
        check(&inputs, operation, formula, lies);
        let (expected, [dx]) = differentiated(&inputs, formula, lies);
        let [x] = inputs;
        let rows: Tensor<2> = reshape(x, [targets.len(), shape[3]]);
        let (found, peaks) = cross_entropy::portable_forward(rows.clone(), &targets);
        assert_close("the output", &reshape(found, [1; 4]), &expected);
        let cotangent = reshape(drawn([1; 4], 77, dtype, lies), [1]);
        let found = cross_entropy::portable_backward(rows, &peaks, &targets, cotangent);
        assert_close("gradient", &reshape(found, shape), &dx);
    }

    #[test]
    fn rotary_embedding_turns_each_pair_and_its_gradient_back(
        (batch, positions, n1, n2) in (1usize..3, 1usize..5, 1usize..3, 1usize..3),
        (heads, half) in (1usize..4, 1usize..7), interleaved: bool,
        dtype in dtypes(), lies in lies(), seed in 0u64..1000,
    ) {
        let pairs = if interleaved { Pairs::Interleaved } else { Pairs::Halves };
        let angles = |function: fn(f64) -> f64| {
            let values: Vec<f64> = (0..positions * half).map(|i| function(3.0 * noise(5, i))).collect();
            Tensor::<2>::from_data(TensorData::new(values, [positions, half]), (&Device::flex(), dtype))
        };
        let angles = Angles { cos: angles(f64::cos), sin: angles(f64::sin) };
        let inputs = [drawn([batch, positions, n1, n2, heads * 2 * half], seed, dtype, lies)];
        let formula = |[x]: [Tensor<5>; 1]| {
            // A matrix that puts (−b, a) where (a, b) is.
            let width = heads * 2 * half;
            let mut turn = vec![0.0; width * width];
            let mut spread = |table: &Tensor<2>| -> Tensor<5> {
                let held = values(table);
                let mut all = vec![0.0; positions * width];
                for channel in 0..width {
                    let within = channel % (2 * half);
                    let (pair, partner, sign) = match pairs {
                        Pairs::Interleaved if within % 2 == 0 => (within / 2, channel + 1, 1.0),
                        Pairs::Interleaved => (within / 2, channel - 1, -1.0),
                        Pairs::Halves if within < half => (within, channel + half, 1.0),
                        Pairs::Halves => (within - half, channel - half, -1.0),
                    };
                    turn[channel * width + partner] = sign;
                    for position in 0..positions {
                        all[position * width + channel] = held[position * half + pair];
                    }
                }
                let data = TensorData::new(all, [1, positions, 1, 1, width]);
                Tensor::<5>::from_data(data, (&Device::flex(), dtype)).autodiff()
            };
            let (cos, sin) = (spread(&angles.cos), spread(&angles.sin));
            let turn = TensorData::new(turn, [1, 1, 1, width, width]);
            let turn = Tensor::<5>::from_data(turn, (&Device::flex(), dtype)).autodiff();
            x.clone() * cos + x.matmul(turn) * sin
        };
        check(&inputs, |[x]| rotary(x, angles.clone(), pairs), formula, lies);
        let [x] = inputs.clone();
        let (expected, _) = differentiated(&inputs, formula, lies);
        assert_close("the output", &rotary::portable(x, &angles, pairs), &expected);
    }

    #[test]
    fn parts_are_slices_and_their_gradients_lie_side_by_side(
        shape in shapes((1usize..7).prop_map(|width| 3 * width)), used in 1usize..8,
        dtype in dtypes(), lies in lies(), seed in 0u64..1000,
    ) {
        let width = shape[3] / 3;
        let inputs = [drawn(shape, seed, dtype, lies)];
        // Some parts may lead to no loss; those that do, each in its own way.
        let sum = |parts: [Tensor<4>; 3]| {
            let mut index = 0.0;
            let terms = parts.map(|part| {
                index += 1.0;
                (part.clone() * part).mul_scalar(index)
            });
            let mut chosen = terms.into_iter().enumerate().filter(|(part, _)| used >> part & 1 == 1);
            let first = chosen.next().unwrap().1;
            chosen.fold(first, |sum, (_, term)| sum + term)
        };
        let formula = |[x]: [Tensor<4>; 1]| sum([0, 1, 2].map(|part| x.clone().narrow(3, part * width, width)));
        check(&inputs, |[x]| sum(parts::<3, 4>(x)), formula, lies);
        let [x] = inputs;
        let slices = [0, 1, 2].map(|part| x.clone().narrow(3, part * width, width));
        assert_close("side by side", &parts::portable(slices.into()), &x);
    }
}

/// Their polynomials overflow there; gates that are shut must be so to the last bit, or they let through a part of what
/// is huge.
#[test]
fn far_from_zero_gelu_and_swiglu_are_the_identity_or_nothing() {
    let far = [1e3, 1e13, 3e19, 1e38, 1e103, 1e154, 3e200, 1e308];
    for (dtype, largest) in [(DType::F32, 1e38), (DType::F64, 1e308)] {
        let far = far.into_iter().filter(|&x| x <= largest);
        let given: Vec<f64> = far.flat_map(|x| [x, -x]).collect();
        let x = TensorData::new(given.clone(), [1, 1, 1, given.len()]);
        let x = Tensor::<4>::from_data(x, (&Device::flex(), dtype));
        let (held, one) = (values(&x), x.ones_like());
        let expect = |what: &str, y: Tensor<4>, slope: Tensor<4>| {
            for (&x, found) in held.iter().zip(values(&y).iter().zip(values(&slope))) {
                let expected = (x.max(0.0), f64::from(x > 0.0));
                assert_eq!((*found.0, found.1), expected, "{what} of {x}");
            }
        };
        let slopes = |function: &dyn Fn(Tensor<4>) -> Tensor<4>| {
            let leaf = x.clone().autodiff().require_grad();
            let gradients = function(leaf.clone()).sum().backward();
            leaf.grad(&gradients).unwrap()
        };
        expect("gelu", gelu_tanh(x.clone()), slopes(&gelu_tanh));
        let portable = gelu::portable_backward(x.clone(), one.clone());
        expect("portable gelu", gelu::portable_forward(x.clone()), portable);
        let open = |x: Tensor<4>| swiglu(x.clone(), x.ones_like());
        expect("swiglu", open(x.clone()), slopes(&open));
    }
}

/// Of f16 the square of 256 is infinite.
#[test]
fn gelu_of_16_bits_has_a_slope_where_squares_do_not_fit() {
    let given = [-60_000.0, -300.0, -20.0, 0.0, 8.0, 300.0, 60_000.0];
    for dtype in [DType::F16, DType::BF16] {
        let x = Tensor::<1>::from_data(given, (&Device::flex(), dtype));
        let (_, slopes) = gelu_and_slopes(x);
        assert_eq!(slopes, [0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0]);
    }
}

fn gelu_and_slopes(x: Tensor<1>) -> (Vec<f64>, Vec<f64>) {
    let leaf = x.autodiff().require_grad();
    let y = gelu_tanh(leaf.clone());
    let gradients = y.clone().sum().backward();
    (values(&y), values(&leaf.grad(&gradients).unwrap()))
}

/// Its negative tail is the difference of near numbers, and so is how far its slope is above 1.
#[test]
fn gelu_of_16_bits_and_its_slope_are_rounded_once() {
    let given: Vec<f64> = (-128..=128).map(|step| f64::from(step) / 32.0).collect();
    let of = |dtype| {
        let data = TensorData::new(given.clone(), [given.len()]);
        gelu_and_slopes(Tensor::from_data(data, (&Device::flex(), dtype)))
    };
    let (expected, expected_slopes) = of(DType::F64);
    for (dtype, half_a_place) in [(DType::F16, 2f64.powi(-11)), (DType::BF16, 2f64.powi(-8))] {
        let (found, slopes) = of(dtype);
        let pairs = found.iter().zip(&expected);
        let pairs = pairs.chain(slopes.iter().zip(&expected_slopes));
        for ((found, expected), x) in pairs.zip(given.iter().chain(&given)) {
            // And of what lies far below 1, what f32 and the smallest numbers of f16 leave.
            let tolerance = 1.01 * half_a_place * expected.abs() + 2e-7;
            let error = (found - expected).abs();
            assert!(
                error <= tolerance,
                "{dtype:?} {x}: {found} instead of {expected}"
            );
        }
    }
}

/// Every operation on tensors of many blocks, or of none.
fn all(shape: [usize; 4], dtype: DType) -> Vec<Tensor<4>> {
    let [a, _, _, width] = shape;
    let draw = |shape, seed| drawn::<4>(shape, seed, dtype, Lies::EndToEnd);
    let (x, h) = (draw(shape, 1), draw(shape, 2));
    let (w, b) = (draw([a, 1, 1, width], 3), draw([a, 1, 1, width], 4));
    let run = draw([1, 1, 1, width / 2], 5);
    let mut found = vec![];
    let mut add = |(y, gradients): (Tensor<4>, Vec<Tensor<4>>)| {
        found.push(y);
        found.extend(gradients);
    };
    let lies = Lies::EndToEnd;
    let of = |(y, gradients): (Tensor<4>, [Tensor<4>; 3])| (y, gradients.to_vec());
    add(of(differentiated(
        &[x.clone(), w.clone(), b],
        |[x, w, b]| layer_norm(x, w, b, EPSILON),
        lies,
    )));
    add(of(differentiated(
        &[x.clone(), w, h.clone()],
        |[x, w, h]| gated_sum(x, w, h),
        lies,
    )));
    let of = |(y, gradients): (Tensor<4>, [Tensor<4>; 2])| (y, gradients.to_vec());
    let norm = |[x, run]: [Tensor<4>; 2]| rms_norm(x, reshape(run, [width / 2]), EPSILON);
    add(of(differentiated(&[x.clone(), run], norm, lies)));
    add(of(differentiated(
        &[x.clone(), h],
        |[x, h]| swiglu(x, h),
        lies,
    )));
    let of = |(y, gradients): (Tensor<4>, [Tensor<4>; 1])| (y, gradients.to_vec());
    add(of(differentiated(
        std::array::from_ref(&x),
        |[x]| gelu_tanh(x),
        lies,
    )));
    let targets = targets(shape, 6);
    add(of(differentiated(
        std::array::from_ref(&x),
        |[x]| reshape(cross_entropy(x, &targets), [1; 4]),
        lies,
    )));
    add(of(differentiated(
        &[x],
        |[x]| {
            let [a, b] = parts(x);
            a * b
        },
        lies,
    )));
    found
}

#[test]
fn blocks_on_any_number_of_threads_give_the_same_bits() {
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.unwrap().install(|| all([2, 30, 40, 64], DType::F32))
    };
    for (one, three) in on(1).iter().zip(&on(3)) {
        let bits = |x: &Tensor<4>| values(x).into_iter().map(f64::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(one), bits(three));
    }
}

#[test]
fn an_empty_block_has_an_empty_output_gradients_of_0_and_stays_in_the_graph() {
    for shape in [[2, 0, 3, 8], [0, 2, 3, 8]] {
        for dtype in [DType::F32, DType::F64] {
            for tensor in all(shape, dtype) {
                assert!(values(&tensor).into_iter().all(|value| value == 0.0));
            }
        }
    }
}

#[test]
fn an_input_that_is_held_elsewhere_keeps_its_values() {
    let x = drawn([1, 2, 3, 4], 1, DType::F32, Lies::EndToEnd);
    let before = values(&x);
    let gate = drawn([1, 1, 1, 4], 2, DType::F32, Lies::EndToEnd);
    let _ = gated_sum(x.clone(), gate, x.clone());
    assert_eq!(values(&x), before);
    // The gradient of a sum goes to both terms: what one does to it must not reach the other.
    let leaf = x.autodiff().require_grad();
    let y = gelu_tanh(leaf.clone()) + leaf.clone();
    let gradients = y.sum().backward();
    let without = gelu_tanh(leaf.clone()).sum().backward();
    let expected = leaf.grad(&without).unwrap().add_scalar(1.0);
    assert_close("the gradient", &leaf.grad(&gradients).unwrap(), &expected);
}

/// Of 4096 ones and a half's precision: what sums in it is stuck at 256, and a mean of its squares is off.
#[test]
fn norms_and_sums_of_half_precision_are_taken_in_single_and_rounded_once() {
    let cast = |x: Tensor<4>| x.cast(DType::BF16);
    let single = |shape, seed| drawn::<4>(shape, seed, DType::F32, Lies::EndToEnd);
    let [x, w, b] =
        [[1, 64, 8, 64], [1, 1, 1, 64], [1, 1, 1, 64]].map(|shape| cast(single(shape, 3)));
    let norm = |[x, w, b]: [Tensor<4>; 3]| layer_norm(x, w, b, EPSILON);
    let half = [x, w, b];
    let wide = half.clone().map(|input| input.cast(DType::F32));
    let (y, gradients) = differentiated(&half, norm, Lies::EndToEnd);
    let cotangent = cast(drawn([1, 64, 8, 64], 77, DType::F32, Lies::EndToEnd)).cast(DType::F32);
    let leaves = wide.map(|input| input.autodiff().require_grad());
    let expected = norm(leaves.clone());
    let walked = (expected.clone() * cotangent.autodiff()).sum().backward();
    let expected_gradients = leaves.map(|leaf| leaf.grad(&walked).unwrap());
    let pairs = gradients.into_iter().zip(expected_gradients);
    for (found, expected) in pairs.chain([(y, expected.inner())]) {
        assert_eq!(found.dtype(), DType::BF16);
        for (found, expected) in values(&found).into_iter().zip(values(&expected)) {
            assert!(
                (found - expected).abs() <= expected.abs() / 128.0 + 1e-6,
                "{found} instead of {expected}"
            );
        }
    }
}

/// As a model's own weights are where its activations pass in 16 bits.
#[test]
fn norms_of_16_bits_take_vectors_of_single_precision_and_give_their_gradients_so() {
    fn check<const N: usize>(narrow: [Tensor<4>; N], norm: impl Fn([Tensor<4>; N]) -> Tensor<4>) {
        let mut mixed = narrow.clone();
        for vector in &mut mixed[1..] {
            *vector = vector.clone().cast(DType::F32);
        }
        let (expected, expected_gradients) = differentiated(&narrow, &norm, Lies::EndToEnd);
        let (found, gradients) = differentiated(&mixed, &norm, Lies::EndToEnd);
        assert_eq!(found.dtype(), DType::BF16);
        assert_eq!(values(&found), values(&expected));
        for ((found, expected), input) in gradients.iter().zip(&expected_gradients).zip(&mixed) {
            assert_eq!(found.dtype(), input.dtype());
            let rounded = found.clone().cast(DType::BF16);
            assert_eq!(values(&rounded), values(expected));
        }
    }
    let half = |shape, seed| drawn(shape, seed, DType::F32, Lies::EndToEnd).cast(DType::BF16);
    let [x, weight, bias] = [
        half([1, 2, 3, 8], 1),
        half([1, 1, 1, 8], 2),
        half([1, 1, 1, 8], 3),
    ];
    check([x.clone(), weight.clone()], |[x, weight]| {
        rms_norm(x, reshape(weight, [8]), EPSILON)
    });
    check([x, weight, bias], |[x, weight, bias]| {
        layer_norm(x, weight, bias, EPSILON)
    });
}

/// The loss of one row, and its gradient.
fn of_row(logits: Vec<f64>, class: u32, dtype: DType) -> (f64, Vec<f64>) {
    let data = TensorData::new(logits.clone(), [1, logits.len()]);
    let leaf = Tensor::<2>::from_data(data, (&Device::flex().autodiff(), dtype)).require_grad();
    let loss = cross_entropy(leaf.clone(), &[Target { class, weight: 1.0 }]);
    let gradient = leaf.grad(&loss.backward()).unwrap();
    (values(&loss)[0], values(&gradient))
}

#[test]
fn cross_entropy_finds_its_largest_logit_wherever_it_comes() {
    for dtype in [DType::F32, DType::F64] {
        for count in [1, 15, 16, 17, 1023, 1025, 3000] {
            for largest in [0, count / 2, count - 1] {
                let mut logits = vec![-1000.0; count];
                logits[largest] = 1000.0;
                let (loss, gradient) = of_row(logits, largest as u32, dtype);
                assert_eq!(loss, 0.0);
                assert!(gradient.iter().all(|&g| g == 0.0));
            }
        }
        // Larger ones come in every piece, each of which shrinks what was summed.
        let logits: Vec<f64> = (0..5000).map(|at| f64::from(at) / 100.0).collect();
        let sum: f64 = logits.iter().map(|x| (x - 49.99).exp()).sum();
        let (loss, gradient) = of_row(logits.clone(), 4990, dtype);
        assert!((loss - (sum.ln() + 49.99 - logits[4990])).abs() < 1e-5);
        for (at, found) in gradient.into_iter().enumerate() {
            let expected = (logits[at] - 49.99).exp() / sum - f64::from(at == 4990);
            assert!(
                (found - expected).abs() < 1e-7,
                "{at}: {found} instead of {expected}"
            );
        }
    }
}

#[test]
fn classes_that_are_hidden_count_nothing_and_what_is_no_number_stays_so() {
    for dtype in [DType::F32, DType::F64] {
        let mut logits = vec![f64::NEG_INFINITY; 2050];
        (logits[1500], logits[2049]) = (-300.0, -300.0);
        let (loss, gradient) = of_row(logits.clone(), 1500, dtype);
        assert!((loss - 2f64.ln()).abs() < 1e-7);
        let mut expected = vec![0.0; 2050];
        (expected[1500], expected[2049]) = (-0.5, 0.5);
        assert_eq!(gradient, expected);
        for unknown in [f64::NAN, f64::INFINITY] {
            logits[3] = unknown;
            let (loss, gradient) = of_row(logits.clone(), 1500, dtype);
            assert!(loss.is_nan() && gradient[3].is_nan());
        }
        assert!(of_row(vec![f64::NEG_INFINITY; 20], 3, dtype).0.is_nan());
    }
}

/// As a row of padding may hold anything.
#[test]
fn a_row_that_does_not_count_adds_nothing_whatever_its_logits_are() {
    let of = |weight| Target { class: 1, weight };
    let targets = [of(0.0), of(2.0), of(0.0), of(0.0)];
    for dtype in [DType::F32, DType::F64, DType::BF16] {
        let mut logits = [[1.0, 2.0, -1.0]; 4];
        let without = TensorData::from(logits);
        logits[0][1] = f64::NEG_INFINITY;
        logits[2][2] = f64::INFINITY;
        logits[3] = [f64::NAN; 3];
        let [found, expected] = [TensorData::from(logits), without].map(|data| {
            let x = Tensor::<2>::from_data(data, (&Device::flex(), dtype));
            let leaf = x.clone().autodiff().require_grad();
            let loss = cross_entropy(leaf.clone(), &targets);
            let gradient = values(&leaf.grad(&loss.backward()).unwrap());
            let (portable, peaks) = cross_entropy::portable_forward(x.clone(), &targets);
            let one = portable.ones_like();
            let portable_gradient = cross_entropy::portable_backward(x, &peaks, &targets, one);
            assert!(
                [0, 2, 3]
                    .iter()
                    .all(|row| gradient[3 * row..][..3] == [0.0; 3])
            );
            let portable = [values(&portable), values(&portable_gradient)];
            (values(&loss), gradient, portable)
        });
        assert!(expected.0[0] > 0.0 && expected.1[4] < 0.0);
        assert_eq!(found, expected);
    }
}

#[test]
fn cross_entropy_in_blocks_of_rows_is_that_of_all() {
    let (shape, classes) = ([2, 3, 4], 50);
    let targets = targets([2, 3, 4, classes], 3);
    let rows = shape.iter().product();
    for dtype in [DType::F32, DType::BF16] {
        let x = drawn([rows, classes], 3, DType::F32, Lies::Part).cast(dtype);
        let of = |block| {
            let (loss, peaks) = cross_entropy::forward_in(block, x.clone(), &targets);
            let gradient = loss.ones_like().mul_scalar(0.5);
            let dx = cross_entropy::backward_in(block, x.clone(), &peaks, &targets, gradient);
            assert_eq!((loss.dtype(), dx.dtype()), (DType::F32, dtype));
            (loss, values(&dx))
        };
        let (expected, gradient) = of(rows * classes);
        // One row, some, and a last block that is short.
        for block in [1, 2 * classes, 7 * classes + 3] {
            let (loss, found) = of(block);
            assert_close("the loss", &loss, &expected);
            assert_eq!(found, gradient);
        }
    }
}

#[test]
fn cross_entropy_of_half_precision_is_taken_in_single_and_its_gradient_rounded_once() {
    let shape = [1, 2, 3, 700];
    let targets = targets(shape, 3);
    let half = drawn::<4>(shape, 3, DType::F32, Lies::EndToEnd).cast(DType::BF16);
    let of = |x: Tensor<4>| {
        let leaf = x.autodiff().require_grad();
        let loss = cross_entropy(leaf.clone(), &targets);
        let gradient = leaf.grad(&loss.backward()).unwrap();
        (loss.inner(), gradient)
    };
    let ((loss, gradient), (expected, single)) = (of(half.clone()), of(half.cast(DType::F32)));
    assert_eq!((loss.dtype(), gradient.dtype()), (DType::F32, DType::BF16));
    assert_eq!(values(&loss), values(&expected));
    assert_eq!(values(&gradient), values(&single.cast(DType::BF16)));
}

#[test]
#[should_panic(expected = "target 1 is class 10, and there are 10, from 0")]
fn a_target_that_is_no_class_is_named() {
    let of = |class| Target { class, weight: 1.0 };
    cross_entropy(
        drawn([2, 10], 1, DType::F32, Lies::EndToEnd),
        &[of(9), of(10)],
    );
}

#[test]
#[should_panic(expected = "1 targets (left) for the 6 rows (right) of logits [2, 3, 10]")]
fn a_row_without_a_target_is_missed() {
    let target = Target {
        class: 0,
        weight: 1.0,
    };
    cross_entropy(drawn([2, 3, 10], 1, DType::F32, Lies::EndToEnd), &[target]);
}
