//! Attention on the CPU in f32, by kernels of our own, near the speed of the matrix product: softmax attention, what
//! [`super::softmax`] computes, and in [`linear`] the other kind.
//!
//! ```text
//!   one kv head of one sample            keys ──►  a tile at a time, in the second cache
//!   K transposed and V, packed once    ┌───────┬───────┬───────┐
//!                                      │ tile  │       │       │
//!   rows: its queries × its        6 { ├───────┼───────┼───────┤   a few rows at a time, whose scores stay in
//!   group of query heads               │       │       │       │   the first cache: product, softmax, product
//!                                      └───────┴───────┴───────┘
//! ```
//!
//! - A mask is ranges of rows of keys for each query: what lies outside them for some rows is left out, and only
//!   the rest of a partly visible tile is hidden, by −∞.
//! - The query heads that share a kv head are rows side by side, so that keys and values are never repeated.
//! - Inputs are read through their strides; outputs are written once, in place.
//! - Scores are taken to base 2: `log2 e` goes into the scale.
//! - Over few keys, what takes the time is not the products: a way of its own, [`few`].
//! - The threads are those of the current rayon pool, the rank's own. A row's bits depend on neither their number
//!   nor the rows beside it.
//!
//! Whatever is not f32 on Flex, and processors without AVX2 or NEON, go the portable way.
//!
//! Sources: FlashAttention-2 (arXiv:2307.08691), online normaliser of the softmax (arXiv:1805.02867).

mod backward;
mod few;
mod forward;
pub(super) mod linear;
mod pack;
mod rows;
mod visible;

use std::ops::Range;

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, Device, Tensor, TensorData};
use rayon::prelude::*;

use super::softmax::{HeadRange, Problem, Sizes};
use crate::simd::Level;
pub(super) use few::Few;
use rows::{NewRows, Row, Rows, readable};

/// The sizes of a tile. Results depend on that of keys by rounding only, the gradients of keys and values also on that of
/// rows, of which they are sums block by block, and nothing on that of strips.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tiling {
    /// Rows (queries × query heads of a group) of a part of the work.
    pub(super) rows: usize,
    /// Rows whose scores are taken at once, forward.
    pub(super) strip: usize,
    /// Keys of a tile, up to whole panels.
    pub(super) keys: usize,
    /// When there are few keys.
    pub(super) few: Few,
}

impl Tiling {
    pub(super) const FORWARD: Self = Self {
        rows: 192,
        strip: 24,
        keys: 512,
        few: Few::DEFAULT,
    };
    pub(super) const BACKWARD: Self = Self {
        rows: 192,
        strip: 192,
        keys: 128,
        few: Few::DEFAULT,
    };
}

/// As [`super::softmax::forward`]; `None` where the portable way is to be taken.
pub(super) fn forward(
    q: &Tensor<4>,
    k: &Tensor<4>,
    v: &Tensor<4>,
    problem: &Problem,
) -> Option<(Tensor<4>, Tensor<3>)> {
    let level = level_for([q, k, v])?;
    Some(forward_in((level, Tiling::FORWARD), q, k, v, problem))
}

/// As [`super::softmax::backward`]; `None` where the portable way is to be taken.
pub(super) fn backward(
    [q, k, v, out, dout]: [&Tensor<4>; 5],
    lse: &Tensor<3>,
    problem: &Problem,
) -> Option<[Tensor<4>; 3]> {
    let level = level_for([q, k, v, out, dout])?;
    let way = (level, Tiling::BACKWARD);
    (lse.dtype() == DType::F32).then(|| backward_in(way, [q, k, v, out, dout], lse, problem))
}

pub(super) fn forward_in(
    (level, tiling): (Level, Tiling),
    q: &Tensor<4>,
    k: &Tensor<4>,
    v: &Tensor<4>,
    problem: &Problem,
) -> (Tensor<4>, Tensor<3>) {
    let sizes = Sizes::of(q, k, v, problem);
    let device = q.device();
    let [batch, queries, heads, _] = sizes.q;
    let dims = [batch, queries, heads];
    let width = sizes.v[3];
    let inputs = [q, k, v].map(|tensor| readable(flex(tensor.clone())));
    let rows = batch * queries * heads;
    let (out, lse) = if sizes.k[1] > 0 && rows * width > 0 {
        let [q, k, v] = inputs.each_ref().map(Rows::of);
        let forward = forward::Forward {
            level,
            tiling,
            problem,
            lengths: [queries, sizes.k[1]],
            q,
            k,
            v,
            out: NewRows::new(dims, width),
            lse: NewRows::new(dims, 1),
        };
        forward.run(&heads_of(batch, &problem.heads));
        (forward.out.all(), forward.lse.all())
    } else {
        (vec![0.0; rows * width], vec![f32::NEG_INFINITY; rows])
    };
    (
        tensor(out, [batch, queries, heads, width], &device),
        tensor(lse, dims, &device),
    )
}

pub(super) fn backward_in(
    (level, tiling): (Level, Tiling),
    [q, k, v, out, dout]: [&Tensor<4>; 5],
    lse: &Tensor<3>,
    problem: &Problem,
) -> [Tensor<4>; 3] {
    let sizes = Sizes::of(q, k, v, problem);
    sizes.check_results(out, lse, dout);
    let device = q.device();
    let shapes = [sizes.q, sizes.k, sizes.v];
    let lengths = [sizes.q[1], sizes.k[1]];
    let heads = heads_of(sizes.q[0], &problem.heads);
    let nothing = shapes[..2].iter().any(|shape| shape.contains(&0));
    let [dq, dk, dv] = if nothing {
        shapes.map(|shape| vec![0.0; shape.iter().product()])
    } else {
        let lse = lse.clone().unsqueeze_dim::<4>(3);
        let inputs = [q, k, v, out, dout, &lse].map(|x| readable(flex(x.clone())));
        let chunks = backward::chunks(heads.len(), lengths[0]);
        let new = |[samples, length, heads, width]: [usize; 4]| {
            NewRows::new([samples, length, heads], width)
        };
        let [q, k, v, out, dout, lse] = inputs.each_ref().map(Rows::of);
        let backward = backward::Backward {
            level,
            tiling,
            problem,
            keys: lengths[1],
            q,
            k,
            v,
            out,
            dout,
            lse,
            dq: new(sizes.q),
            sums: chunks
                .iter()
                .map(|_| [new(sizes.k), new(sizes.v)])
                .collect(),
        };
        backward.run(&heads, &chunks);
        let backward::Backward { dq, sums, .. } = backward;
        let mut sums = sums.into_iter().map(|sums| sums.map(NewRows::all));
        // Of each chunk of queries a part of dk and dv, which are added in order.
        let [mut dk, mut dv] = sums.next().expect("there is a chunk");
        for [more_dk, more_dv] in sums {
            add(&mut dk, &more_dk);
            add(&mut dv, &more_dv);
        }
        [dq.all(), dk, dv]
    };
    [
        tensor(dq, sizes.q, &device),
        tensor(dk, sizes.k, &device),
        tensor(dv, sizes.v, &device),
    ]
}

fn add(sum: &mut [f32], more: &[f32]) {
    /// What is worth another thread.
    const PIECE: usize = 1 << 14;
    let pieces = sum.par_chunks_mut(PIECE).zip(more.par_chunks(PIECE));
    pieces.for_each(|(sum, more)| sum.iter_mut().zip(more).for_each(|(sum, x)| *sum += x));
}

/// One kv head of one sample, and the query heads that attend with it; all numbers are local.
#[derive(Debug, Clone)]
struct Head {
    sample: usize,
    kv: usize,
    query: Range<usize>,
}

impl Head {
    /// The query, counted from the first of `queries`, and the row of the tensors that belong to a row of a tile.
    #[inline(always)]
    fn row(&self, queries: &Range<usize>, row: usize) -> (usize, Row) {
        let (query, head) = (row / self.query.len(), row % self.query.len());
        (
            query,
            [self.sample, queries.start + query, self.query.start + head],
        )
    }

    /// The rows of a tensor of queries, in the order of a tile's.
    #[inline(always)]
    fn rows<'a>(
        &self,
        tensor: &Rows<'a>,
        queries: &Range<usize>,
    ) -> impl Iterator<Item = &'a [f32]> + Clone {
        (queries.clone()).flat_map(move |query| {
            (self.query.clone()).map(move |head| tensor.row([self.sample, query, head]))
        })
    }
}

fn heads_of(batch: usize, heads: &HeadRange) -> Vec<Head> {
    let segments = heads.segments();
    let mut heads = Vec::new();
    for sample in 0..batch {
        for segment in &segments {
            for (i, kv) in segment.kv.clone().enumerate() {
                let first = segment.query_start + i * segment.group;
                heads.push(Head {
                    sample,
                    kv,
                    query: first..first + segment.group,
                });
            }
        }
    }
    heads
}

/// How many heads, side by side, are one part of the work: all of a sample's, unless less keeps the threads busier.
fn heads_of_a_part(samples: usize, heads: usize) -> usize {
    let threads = rayon::current_num_threads();
    let longest = |parts: &usize| (samples * parts).div_ceil(threads) * heads.div_ceil(*parts);
    heads.div_ceil((1..=heads).min_by_key(longest).unwrap_or(1))
}

/// The heads, as many of a sample together as are one part of the work.
fn shared_out(heads: &[Head], kv_heads: usize) -> Vec<&[Head]> {
    let size = heads_of_a_part(heads.len() / kv_heads, kv_heads);
    (heads.chunks(kv_heads))
        .flat_map(|of_sample| of_sample.chunks(size))
        .collect()
}

/// The global numbers in `ranges`, from the one at `index` on.
fn numbers(ranges: &[Range<usize>], index: usize) -> impl Iterator<Item = usize> {
    ranges.iter().cloned().flatten().skip(index)
}

pub(super) fn level_for<const N: usize>(tensors: [&Tensor<4>; N]) -> Option<Level> {
    let ours = |tensor: &&Tensor<4>| {
        tensor.dtype() == DType::F32
            && *tensor.device().as_dispatch() == *Device::flex().as_dispatch()
            && tensor.dims()[3] > 0
    };
    tensors.iter().all(ours).then(Level::detect).flatten()
}

fn flex(tensor: Tensor<4>) -> FlexTensor {
    match tensor.try_into_primitive::<Flex>() {
        Ok(tensor) => tensor,
        Err(_) => unreachable!("the tensors of this attention are on Flex"),
    }
}

fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
}
