//! Linear attention on the CPU in f32: what [`super::super::linear`] computes of a chunk, block by block.
//!
//! ```text
//!   one head of one sample       ┌─────┐ powers of the decay on the triangle, a strip of rows at a time;
//!   a block: its rows of q, k    │▒    │ what lies right of a strip is left out
//!   and v, packed once, and   ▶  │▒▒▒  │
//!   the state that it meets      │▒▒▒▒▒│ a strip's scores, and both results, stay in the first cache
//!                                └─────┘
//! ```
//!
//! States run through the blocks of a head one after the other (`states.rs`); once they are known, all blocks of all heads are
//! computed side by side: `output.rs` and `gradients.rs`. A whole chunk goes in one sweep, where every thread has a head:
//! `sweep`. Either asks for what comes next while it multiplies (`simd::Ahead`). A row's bits depend on neither the number of threads nor the rows after it in its block.

mod gradients;
mod output;
mod parts;
mod states;
mod sweep;

use std::ops::Range;

use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;

use super::flex;
use super::rows::readable;
use crate::attention::chunks::Direction;
use crate::attention::linear::Problem;
use crate::simd::Level;

pub(in crate::attention) use gradients::{gradients, gradients_after};
pub(in crate::attention) use output::{output, output_after};
pub(in crate::attention) use states::states;

/// A chunk before which there is nothing: the output, `[B, L, Hq, dv]`, and as [`states`] the states.
pub(in crate::attention) fn forward(
    level: Level,
    qkv: [&Tensor<4>; 3],
    blocks: &[Range<usize>],
    problem: &Problem,
) -> (Tensor<4>, [Tensor<4>; 2]) {
    let [q, k, v] = qkv;
    let [samples, _, heads, d] = q.dims();
    if sweep::fits(samples, heads) {
        return sweep::forward(level, qkv, blocks, problem);
    }
    let [last, met] = states(level, [k, v], blocks, Direction::Forward, problem);
    let of_blocks = [samples, heads, blocks.len(), d, v.dims()[3]];
    let met_by = met.clone().reshape(of_blocks);
    let output = output(level, qkv, Some(&met_by), blocks, problem);
    (output, [last, met])
}

/// The gradients of the query, the key and the value of a chunk after which nothing follows.
pub(in crate::attention) fn backward(
    level: Level,
    qkv: [&Tensor<4>; 3],
    dout: &Tensor<4>,
    met: &Tensor<5>,
    blocks: &[Range<usize>],
    problem: &Problem,
) -> [Tensor<4>; 3] {
    let [q, k, _] = qkv;
    if sweep::fits(k.dims()[0], k.dims()[2]) {
        return sweep::backward(level, qkv, dout, met, blocks, problem);
    }
    let [_, after] = states(level, [q, dout], blocks, Direction::Backward, problem);
    let after = after.reshape(met.dims());
    gradients(level, qkv, dout, (met, Some(&after)), blocks, problem)
}

/// Rows whose scores are taken at once. More of them read what is packed less often, and compute more scores that lie
/// right of the diagonal.
const STRIP: usize = 24;

/// The powers of a head's decay, in f32 from f64.
struct Powers {
    /// `λ^i`, as far as a block is long.
    rising: Vec<f32>,
    /// `c·λ^{C−1−i}`: its end is what row `i` of a block sees of the rows up to itself.
    falling: Vec<f32>,
    scale: f32,
}

impl Powers {
    fn all(problem: &Problem, blocks: &[Range<usize>]) -> Vec<Self> {
        let longest = blocks.iter().map(Range::len).max().unwrap_or(0);
        let of_head = |&decay: &f64| {
            let power = |i: usize| decay.powi(i as i32);
            Self {
                rising: (0..=longest).map(|i| power(i) as f32).collect(),
                falling: (0..longest)
                    .rev()
                    .map(|i| (problem.scale * power(i)) as f32)
                    .collect(),
                scale: problem.scale as f32,
            }
        };
        problem.decays().iter().map(of_head).collect()
    }

    /// `c·λ^{i+1}`: how a row is reached by the state before its block.
    #[inline(always)]
    fn reached(&self, row: usize) -> f32 {
        self.scale * self.rising[row + 1]
    }

    /// `λ^{C−1−j}`: how a row of a block of `rows` enters the state after it.
    #[inline(always)]
    fn aged(&self, row: usize, rows: usize) -> f32 {
        self.rising[rows - 1 - row]
    }

    /// Scores of a row of a block, times `c·λ^{i−j}`, and 0 right of the diagonal.
    #[inline(always)]
    fn weigh(&self, row: usize, scores: &mut [f32]) {
        let (seen, hidden) = scores.split_at_mut(row + 1);
        let powers = &self.falling[self.falling.len() - 1 - row..];
        seen.iter_mut()
            .zip(powers)
            .for_each(|(x, power)| *x *= power);
        hidden.fill(0.0);
    }
}

fn input(x: &Tensor<4>) -> FlexTensor {
    readable(flex(x.clone()))
}

/// `[B, Hq, blocks, d, dv]` with a row of a state for a position: `[B, blocks·d, Hq, dv]`.
fn states_of(met: &Tensor<5>) -> FlexTensor {
    let [samples, heads, blocks, d, dv] = met.dims();
    let rows = met.clone().reshape([samples, heads, blocks * d, dv]);
    input(&rows.swap_dims(1, 2))
}

/// Adds rows to such as lie `stride` apart.
#[inline(always)]
fn add_to<'a>(sums: &mut [f32], rows: impl Iterator<Item = &'a [f32]>, stride: usize) {
    for (sums, row) in sums.chunks_exact_mut(stride).zip(rows) {
        sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
    }
}
