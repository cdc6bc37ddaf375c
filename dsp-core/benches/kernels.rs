//! What the kernels reach in which a model's time goes: attention, linear layers, linear attention, the loss, in f32, on
//! one thread and on all; one of those that `cargo xtask bench --kernels` runs. The last column is the share of the best
//! rate of a matrix product, measured between them.
#![allow(
    clippy::print_stdout,
    missing_docs,
    reason = "a benchmark's output is what it is run for"
)]

use std::hint::black_box;
use std::time::Instant;

use burn::tensor::{Device, Tensor, TensorData};
use dsp_core::attention::{HeadRange, Heads, Mask, Problem, backward, forward, linear};
use dsp_core::fused::{Target, cross_entropy};
use dsp_core::linear::affine;
use rayon::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};

/// As in the binary `dsp`. `MIMALLOC_PURGE_DELAY=-1`, which `cargo xtask bench --kernels` sets, keeps freed pages
/// with the process, as there: else page faults are what is measured.
#[global_allocator]
static MEMORY: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Runs of each, of which the median counts: after one that does not.
const RUNS: usize = 9;

/// Something to run, and how many operations it does.
struct Kernel<'a> {
    name: String,
    operations: usize,
    run: Box<dyn FnMut() + Send + 'a>,
}

impl<'a> Kernel<'a> {
    fn new(name: String, operations: usize, run: impl FnMut() + Send + 'a) -> Self {
        let run = Box::new(run);
        Self {
            name,
            operations,
            run,
        }
    }

    fn seconds(&mut self) -> f64 {
        let start = Instant::now();
        (self.run)();
        start.elapsed().as_secs_f64()
    }

    /// Operations a second, the median of its runs; before each of them `floor` runs once, whose best rate comes back.
    fn rates(&mut self, floor: &mut Kernel<'_>) -> [f64; 2] {
        self.seconds();
        let mut best = f64::INFINITY;
        let mut seconds: Vec<f64> = (0..RUNS)
            .map(|_| {
                best = best.min(floor.seconds());
                self.seconds()
            })
            .collect();
        seconds.sort_by(f64::total_cmp);
        [
            self.operations as f64 / seconds[RUNS / 2],
            floor.operations as f64 / best,
        ]
    }
}

fn drawn<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    let count: usize = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|i| (1.7 * i as f32).sin()).collect();
    Tensor::from_data(TensorData::new(values, shape), &Device::flex())
}

/// The floor: a square product, in caches as far as one can be.
fn product() -> Kernel<'static> {
    const SIDE: usize = 768;
    let (a, b) = (drawn([SIDE, SIDE]), drawn([SIDE, SIDE]));
    Kernel::new("product".to_owned(), 2 * SIDE.pow(3), move || {
        black_box(a.clone().matmul(b.clone()));
    })
}

fn attention() -> Vec<Kernel<'static>> {
    const WIDTH: usize = 64;
    let mut kernels = Vec::new();
    // Batch, length, query heads, key-value heads. The last two are STDiT-3's along space and along time.
    for (mask, [batch, length, heads, kv_heads]) in [
        (Mask::Full, [1, 4096, 8, 8]),
        (Mask::Causal, [1, 4096, 8, 8]),
        (Mask::Causal, [1, 4096, 8, 2]),
        (Mask::Full, [16, 256, 8, 8]),
        (Mask::Full, [256, 16, 8, 8]),
    ] {
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
        let [q, k, v] = [heads, kv_heads, kv_heads].map(|h| drawn([batch, length, h, WIDTH]));
        let dout = drawn(q.dims());
        let (out, lse) = forward(q.clone(), k.clone(), v.clone(), &problem);
        let name = format!("attention {batch}×{length}, heads {heads}/{kv_heads}{kind}");
        let operations = 4 * batch * heads * WIDTH * pairs;
        let again = (problem.clone(), [q.clone(), k.clone(), v.clone()]);
        kernels.push(Kernel::new(
            format!("{name}: forward"),
            operations,
            move || {
                let (problem, [q, k, v]) = &again;
                black_box(forward(q.clone(), k.clone(), v.clone(), problem));
            },
        ));
        let operations = 5 * operations / 2;
        kernels.push(Kernel::new(
            format!("{name}: backward"),
            operations,
            move || {
                let [q, k, v, out, dout] = [&q, &k, &v, &out, &dout].map(Tensor::clone);
                black_box(backward(q, k, v, out, lse.clone(), dout, &problem));
            },
        ));
    }
    kernels
}

fn linear_layers() -> Vec<Kernel<'static>> {
    const ROWS: usize = 4096;
    let mut kernels = Vec::new();
    // STDiT-3's layers at hidden 512, and those of a LLaMA block.
    for [inputs, outputs] in [
        [512, 1536],
        [512, 512],
        [512, 2048],
        [2048, 512],
        [512, 1376],
        [1376, 512],
    ] {
        let x = drawn([1, ROWS, inputs]).autodiff();
        let weight = drawn([inputs, outputs]).autodiff();
        let bias = drawn([outputs]).autodiff();
        let name = format!("linear layer {ROWS}×{inputs} → {outputs}");
        let operations = 2 * ROWS * inputs * outputs;
        let again = [x.clone()];
        let parameters = (weight.clone(), bias.clone());
        kernels.push(Kernel::new(
            format!("{name}: forward"),
            operations,
            move || {
                let ([x], (weight, bias)) = (&again, &parameters);
                black_box(affine(x.clone(), weight.clone(), Some(bias.clone())));
            },
        ));
        let (x, weight, bias) = (x.require_grad(), weight.require_grad(), bias.require_grad());
        let name = format!("{name}: forward and backward");
        kernels.push(Kernel::new(name, 3 * operations, move || {
            // From a gradient of ones.
            black_box(affine(x.clone(), weight.clone(), Some(bias.clone())).backward());
        }));
    }
    kernels
}

fn linear_attention() -> Vec<Kernel<'static>> {
    /// What its blocks have; operations are counted as if every pair of a block were seen.
    const BLOCK: usize = 64;
    let (length, heads, width) = (4096, 8, 64);
    let problem = linear::Problem {
        heads: HeadRange::all(Heads::multi(heads, width)),
        decay: (0..heads)
            .map(|head| 1.0 - 0.5f64.powi(5 + head as i32))
            .collect(),
        scale: 0.125,
    };
    let [q, k, v, dout] = [0; 4].map(|_| drawn([1, length, heads, width]));
    let operations = length * heads * width * (4 * BLOCK + 4 * width);
    let name = format!("linear attention 1×{length}, heads {heads}");
    let states = linear::forward(&q, &k, &v, &problem).states;
    let again = (problem.clone(), [q.clone(), k.clone(), v.clone()]);
    // What comes from another chunk is received again and again by the same states.
    let (received_by, came) = (problem.clone(), drawn([1, heads, width, width]));
    let mut receiving = linear::states(&k, &v, &problem);
    let of_states = 2 * (length / BLOCK) * heads * width * width;
    vec![
        Kernel::new(format!("{name}: forward"), operations, move || {
            let (problem, [q, k, v]) = &again;
            black_box(linear::forward(q, k, v, problem));
        }),
        Kernel::new(format!("{name}: a state received"), of_states, move || {
            receiving.receive(&came, &received_by);
        }),
        Kernel::new(format!("{name}: backward"), 2 * operations, move || {
            black_box(linear::backward([&q, &k, &v], &states, &dout, &problem));
        }),
    ]
}

/// Of which memory is the limit: three operations a logit, the exponential as one.
fn loss() -> Vec<Kernel<'static>> {
    const SHAPE: [usize; 2] = [4096, 32000];
    let [rows, classes] = SHAPE;
    let of_row = |row| Target {
        class: (row * 7 % classes) as u32,
        weight: 1.0 / rows as f64,
    };
    let targets: Vec<Target> = (0..rows).map(of_row).collect();
    let logits = drawn(SHAPE);
    let leaf = logits.clone().autodiff().require_grad();
    let (name, operations) = (
        format!("cross-entropy {rows}×{classes}"),
        3 * rows * classes,
    );
    let again = targets.clone();
    vec![
        Kernel::new(format!("{name}: forward"), operations, move || {
            black_box(cross_entropy(logits.clone(), &again));
        }),
        Kernel::new(
            format!("{name}: forward and backward"),
            2 * operations,
            move || {
                black_box(cross_entropy(leaf.clone(), &targets).backward());
            },
        ),
    ]
}

fn pool(threads: usize) -> Result<ThreadPool, ThreadPoolBuildError> {
    ThreadPoolBuilder::new().num_threads(threads).build()
}

fn main() -> Result<(), ThreadPoolBuildError> {
    let wanted = std::env::args().skip(1).find(|word| !word.starts_with('-'));
    let wanted = wanted.unwrap_or_default();
    let all = std::thread::available_parallelism().map_or(1, usize::from);
    let numbers = if all == 1 { vec![1] } else { vec![1, all] };
    println!(
        "{:<58} {:>7} {:>8} {:>9} {:>9}  share of the product's rate",
        "kernel", "threads", "ms", "GFLOP/s", "product"
    );
    for threads in numbers {
        pool(threads)?.install(|| {
            let mut floor = product();
            floor.seconds();
            // One group's tensors at a time.
            let groups = [attention, linear_layers, linear_attention, loss];
            for mut kernel in groups.into_iter().flat_map(|group| group()) {
                if !kernel.name.contains(&wanted) {
                    continue;
                }
                let [rate, best] = kernel.rates(&mut floor);
                println!(
                    "{:<58} {threads:>7} {:>8.1} {:>9.1} {:>9.1} {:>6.0} %",
                    kernel.name,
                    1e3 * kernel.operations as f64 / rate,
                    rate / 1e9,
                    best / 1e9,
                    1e2 * rate / best
                );
            }
        });
    }
    Ok(())
}
