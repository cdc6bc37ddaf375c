//! What the kernels reach on a GPU: attention and linear layers, beside a square matrix product and a pass over memory in the
//! same run, in bf16 and f32. `benchmarks/pytorch_gpu.py` measures the same in PyTorch.
//!
//! ```text
//! cargo bench --bench gpu --features cuda
//! ```
//!
//! The last column is the share of the rate of the matrix product in the same type.
#![allow(
    clippy::print_stdout,
    missing_docs,
    reason = "a benchmark's output is what it is run for"
)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use burn::tensor::{DType, Device, Distribution, Tensor};
use dsp_core::attention::{HeadRange, Heads, Mask, Problem, backward, forward};
use dsp_core::linear::times;

/// Rounds, of which the median counts; each lasts about so long.
const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_millis(60);

/// Batch, length, query heads, key-value heads. The last two are STDiT-3's along space and along time.
const PROBLEMS: [(Mask, [usize; 4]); 6] = [
    (Mask::Full, [1, 4096, 16, 16]),
    (Mask::Causal, [1, 4096, 16, 16]),
    (Mask::Causal, [1, 16384, 16, 4]),
    (Mask::Full, [1, 16384, 16, 16]),
    (Mask::Full, [16, 256, 8, 8]),
    (Mask::Full, [256, 16, 8, 8]),
];

const WIDTH: usize = 64;

/// Seconds that one run takes; the device is asked for many before it is waited for.
fn seconds(device: &Device, mut run: impl FnMut()) -> f64 {
    let mut timed = |runs: u32| {
        let start = Instant::now();
        (0..runs).for_each(|_| run());
        device
            .sync()
            .expect("the device has done what it was asked for");
        start.elapsed()
    };
    // Kernels are compiled where they are first called.
    timed(1);
    let once = timed(1).max(Duration::from_micros(20));
    let runs = (ROUND.as_secs_f64() / once.as_secs_f64()).ceil() as u32;
    let mut rounds: Vec<Duration> = (0..ROUNDS).map(|_| timed(runs)).collect();
    rounds.sort();
    rounds[ROUNDS / 2].as_secs_f64() / f64::from(runs)
}

fn drawn<const D: usize>(shape: [usize; D], dtype: DType, device: &Device) -> Tensor<D> {
    let numbers: Tensor<D> = Tensor::random(shape, Distribution::Normal(0.0, 1.0), device);
    numbers.cast(dtype)
}

/// Bytes a second of a pass that reads and writes.
fn memory(device: &Device) -> f64 {
    const NUMBERS: usize = 1 << 28;
    let x = drawn([NUMBERS], DType::F32, device);
    8.0 * NUMBERS as f64 / seconds(device, || drop(black_box(x.clone().mul_scalar(1.5))))
}

/// Operations a second of a square product.
fn product(dtype: DType, device: &Device) -> f64 {
    const SIDE: usize = 8192;
    let [a, b] = [0; 2].map(|_| drawn([SIDE, SIDE], dtype, device));
    let product = || drop(black_box(times(a.clone(), b.clone())));
    2.0 * (SIDE as f64).powi(3) / seconds(device, product)
}

/// The three products of a linear layer of a model's size.
fn linear_layer(dtype: DType, product: f64, device: &Device) {
    const SIZES: [usize; 3] = [4096, 2048, 2048];
    let [rows, inputs, outputs] = SIZES;
    let x = drawn([rows, inputs], dtype, device);
    let weight = drawn([inputs, outputs], dtype, device);
    let gradient = drawn([rows, outputs], dtype, device);
    let operations = 2 * rows * inputs * outputs;
    let name = format!("{dtype:?} {rows}×{inputs} → {outputs}");
    let products: [(_, &dyn Fn() -> Tensor<2>); 3] = [
        ("y = x·W", &|| times(x.clone(), weight.clone())),
        ("dx = g·Wᵀ", &|| {
            times(gradient.clone(), weight.clone().transpose())
        }),
        ("dW = xᵀ·g", &|| {
            times(x.clone().transpose(), gradient.clone())
        }),
    ];
    for (what, run) in products {
        let taken = seconds(device, || drop(black_box(run())));
        line(&format!("{name}: {what}"), operations, taken, product);
    }
}

fn line(name: &str, operations: usize, seconds: f64, product: f64) {
    let rate = operations as f64 / seconds;
    println!(
        "{name:<58} {:>9.3} {:>9.1} {:>6.1} %",
        1e3 * seconds,
        rate / 1e12,
        1e2 * rate / product
    );
}

fn attention(dtype: DType, product: f64, device: &Device) {
    for (mask, [batch, length, heads, kv_heads]) in PROBLEMS {
        let (pairs, kind) = match mask {
            Mask::Causal => (length * (length + 1) / 2, " causal"),
            _ => (length * length, ""),
        };
        let problem = Problem {
            heads: HeadRange::all(Heads {
                query: heads,
                key_value: kv_heads,
                dim: WIDTH,
            }),
            mask,
            query_positions: vec![0..length],
            key_positions: vec![0..length],
            scale: 0.125,
            dropout: None,
            samples: vec![0..batch],
        };
        let [q, k, v] = [heads, kv_heads, kv_heads]
            .map(|heads| drawn([batch, length, heads, WIDTH], dtype, device));
        let dout = drawn(q.dims(), dtype, device);
        let name = format!("{dtype:?} {batch}×{length}, heads {heads}/{kv_heads}{kind}");
        let operations = 4 * batch * heads * WIDTH * pairs;
        let taken = seconds(device, || {
            black_box(forward(q.clone(), k.clone(), v.clone(), &problem));
        });
        line(&format!("{name}: forward"), operations, taken, product);
        let (out, lse) = forward(q.clone(), k.clone(), v.clone(), &problem);
        let taken = seconds(device, || {
            let [q, k, v, out, dout] = [&q, &k, &v, &out, &dout].map(Tensor::clone);
            black_box(backward(q, k, v, out, lse.clone(), dout, &problem));
        });
        let operations = 5 * operations / 2;
        line(&format!("{name}: backward"), operations, taken, product);
    }
}

fn main() {
    let device = Device::default();
    println!("{device:?}");
    println!("a pass over memory: {:.0} GB/s", memory(&device) / 1e9);
    println!(
        "{:<58} {:>9} {:>9} share of the product's rate",
        "", "ms", "TFLOP/s"
    );
    for dtype in [DType::BF16, DType::F32] {
        let rate = product(dtype, &device);
        println!(
            "{:<58} {:>9} {:>9.1}",
            format!("{dtype:?} matrix product"),
            "",
            rate / 1e12
        );
        linear_layer(dtype, rate, &device);
        attention(dtype, rate, &device);
    }
}
