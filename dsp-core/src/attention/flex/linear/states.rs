//! The states that the blocks of a head meet, one after the other, either way.

use std::ops::Range;

use burn::tensor::Tensor;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::super::rows::Rows;
use super::super::{pack, tensor};
use super::{Powers, input};
use crate::attention::chunks::Direction;
use crate::attention::linear::Problem;
use crate::simd::{Ahead, Left, Level, Store, multiply_ahead};

/// The state that leaves, `[B, Hq, d, dv]`, and those that the blocks meet, `[B, Hq, blocks·d, dv]`; each block adds
/// the outer products of its rows of `a` and `b`.
pub(in crate::attention) fn states(
    level: Level,
    ab: [&Tensor<4>; 2],
    blocks: &[Range<usize>],
    direction: Direction,
    problem: &Problem,
) -> [Tensor<4>; 2] {
    let device = ab[0].device();
    let ([samples, _, _, d], dv) = (ab[0].dims(), ab[1].dims()[3]);
    let heads = problem.heads.query.len();
    let inputs = ab.map(input);
    let [a, b] = inputs.each_ref().map(Rows::of);
    let mut last = vec![0.0; samples * heads * d * dv];
    let mut met = vec![0.0; last.len() * blocks.len()];
    let powers = Powers::all(problem, blocks);
    let states = (last.par_chunks_mut(d * dv)).zip(met.par_chunks_mut(blocks.len() * d * dv));
    let of_head = |scratch: &mut _, (index, (last, met))| {
        let (sample, head) = (index / heads, index % heads);
        level.run(Run {
            from: [&a, &b],
            sample,
            head: match direction {
                Direction::Forward => problem.kv_head(head),
                Direction::Backward => head,
            },
            powers: &powers[head],
            blocks,
            direction,
            last,
            met,
            scratch,
        });
    };
    (states.enumerate()).for_each_init(Scratch::default, of_head);
    [
        tensor(last, [samples, heads, d, dv], &device),
        tensor(met, [samples, heads, blocks.len() * d, dv], &device),
    ]
}

/// What a thread needs for a head; kept from one to the next.
#[derive(Default)]
struct Scratch {
    a: Vec<f32>,
    b: Vec<f32>,
    state: Vec<f32>,
}

/// The states of one head.
struct Run<'a> {
    from: [&'a Rows<'a>; 2],
    sample: usize,
    /// Of the tensors.
    head: usize,
    powers: &'a Powers,
    blocks: &'a [Range<usize>],
    direction: Direction,
    last: &'a mut [f32],
    met: &'a mut [f32],
    scratch: &'a mut Scratch,
}

impl WithSimd for Run<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            from: [a, b],
            sample,
            head,
            powers,
            blocks,
            direction,
            last,
            met,
            scratch,
        } = self;
        let Scratch {
            a: packed_a,
            b: packed_b,
            state,
        } = scratch;
        let lanes = S::F32_LANES;
        let (d, dv) = (a.width(), b.width());
        let row = dv.next_multiple_of(lanes);
        state.clear();
        state.resize(d * row, 0.0);
        for step in 0..blocks.len() {
            let index = match direction {
                Direction::Forward => step,
                Direction::Backward => blocks.len() - 1 - step,
            };
            let rows = blocks[index].clone();
            let count = rows.len();
            let met = &mut met[index * d * dv..(index + 1) * d * dv];
            unpad(met, state, dv);
            let weights = (0..count).map(|row| match direction {
                Direction::Forward => powers.aged(row, count),
                Direction::Backward => powers.reached(row),
            });
            pack::weighted_rows::<S>(packed_a, a.positions(sample, &rows, head).zip(weights), d);
            pack::panels::<S>(packed_b, b.positions(sample, &rows, head), count, dv);
            let ahead = &mut Ahead::default();
            hand_on(
                simd,
                state,
                powers,
                (packed_a, packed_b),
                [count, d, dv],
                ahead,
            );
        }
        unpad(last, state, dv);
    }
}

/// Hands a state on over a block of `count` rows: what is left of it, and the outer products of the rows of `a`, packed
/// with their weights, and `b`, packed as panels.
#[inline(always)]
pub(super) fn hand_on<S: Simd>(
    simd: S,
    state: &mut [f32],
    powers: &Powers,
    (a, b): (&[f32], &[f32]),
    [count, d, dv]: [usize; 3],
    ahead: &mut Ahead,
) {
    let [a_row, row] = [d, dv].map(|width| width.next_multiple_of(S::F32_LANES));
    let left = powers.rising[count];
    state.iter_mut().for_each(|x| *x *= left);
    multiply_ahead(
        simd,
        [d, dv, count],
        Left::columns(a, a_row),
        (b, count),
        (state, row),
        Store::Add,
        ahead,
    );
}

/// The rows of a state, `dv` wide, without what fills them up to whole vectors.
#[inline(always)]
fn unpad(to: &mut [f32], state: &[f32], dv: usize) {
    let row = state.len() / (to.len() / dv);
    for (to, from) in to.chunks_exact_mut(dv).zip(state.chunks_exact(row)) {
        to.copy_from_slice(&from[..dv]);
    }
}
