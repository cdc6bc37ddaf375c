//! The states that the blocks of a head meet, one after the other, either way.

#![expect(
    unsafe_code,
    reason = "threads write rows of one tensor that they share out among themselves"
)]

use std::ops::Range;

use burn::tensor::{Device, Tensor};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::super::rows::{NewRows, Rows};
use super::super::{pack, tensor};
use super::parts::{parts, steps};
use super::{Powers, input};
use crate::attention::chunks::Direction;
use crate::attention::linear::Problem;
use crate::simd::{Ahead, Left, Level, Run, Store, multiply};

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
    let (samples, heads) = (ab[0].dims()[0], problem.heads.query.len());
    let inputs = ab.map(input);
    let [a, b] = inputs.each_ref().map(Rows::of);
    let states = States {
        a,
        b,
        powers: &Powers::all(problem, blocks),
        blocks,
        direction,
        problem,
        to: StatesOut::new([samples, heads, blocks.len()], [a.width(), b.width()]),
    };
    let of_part = |scratch: &mut _, (sample, heads)| {
        level.run(Part {
            states: &states,
            sample,
            heads,
            scratch,
        });
    };
    (parts(samples, heads).into_par_iter()).for_each_init(Scratch::default, of_part);
    states.to.tensors(&device)
}

/// Where states are written: that which leaves, and those that the blocks meet.
pub(super) struct StatesOut {
    last: NewRows,
    met: NewRows,
    /// Samples, heads and blocks; rows and columns of a state.
    sizes: [usize; 3],
    state: [usize; 2],
}

impl StatesOut {
    pub(super) fn new(sizes: [usize; 3], state: [usize; 2]) -> Self {
        let ([samples, heads, blocks], [d, dv]) = (sizes, state);
        Self {
            last: NewRows::new([samples, heads * d, 1], dv),
            met: NewRows::new([samples, heads * blocks * d, 1], dv),
            sizes,
            state,
        }
    }

    /// Writes the state that a block of a head meets, from rows of at least its width.
    ///
    /// # Safety
    /// Nobody else writes it, at this time or another.
    #[inline(always)]
    pub(super) unsafe fn meet<'r>(
        &self,
        block: [usize; 3],
        state: impl Iterator<Item = &'r [f32]>,
    ) {
        // SAFETY: the caller's.
        unsafe { self.met.write(self.met_at(block), state) };
    }

    /// Writes the states that leave heads that lie side by side, from `head` on.
    ///
    /// # Safety
    /// As [`meet`](Self::meet).
    #[inline(always)]
    pub(super) unsafe fn leave<'r>(
        &self,
        [sample, head]: [usize; 2],
        states: impl Iterator<Item = &'r [f32]>,
    ) {
        // SAFETY: the caller's.
        unsafe { self.last.write([sample, head * self.state[0], 0], states) };
    }

    /// The state that a block of a head meets, to be asked for ahead.
    pub(super) fn run(&self, block: [usize; 3]) -> Run {
        self.met.run(self.met_at(block))
    }

    fn met_at(&self, [sample, head, block]: [usize; 3]) -> [usize; 3] {
        [sample, (head * self.sizes[2] + block) * self.state[0], 0]
    }

    /// `[B, Hq, d, dv]` and `[B, Hq, blocks·d, dv]`.
    ///
    /// # Panics
    /// If not all of them have been written.
    pub(super) fn tensors(self, device: &Device) -> [Tensor<4>; 2] {
        let ([samples, heads, blocks], [d, dv]) = (self.sizes, self.state);
        [
            tensor(self.last.all(), [samples, heads, d, dv], device),
            tensor(self.met.all(), [samples, heads, blocks * d, dv], device),
        ]
    }
}

/// What a thread needs for a part; kept from one to the next.
#[derive(Default)]
struct Scratch {
    a: Vec<f32>,
    b: Vec<f32>,
    states: Vec<f32>,
    ahead: Ahead,
}

/// What is read, and what is written.
struct States<'a> {
    a: Rows<'a>,
    b: Rows<'a>,
    powers: &'a [Powers],
    blocks: &'a [Range<usize>],
    direction: Direction,
    problem: &'a Problem,
    to: StatesOut,
}

impl States<'_> {
    /// The head of `a` and `b` for a query head.
    fn head(&self, query: usize) -> usize {
        match self.direction {
            Direction::Forward => self.problem.kv_head(query),
            Direction::Backward => query,
        }
    }

    /// The blocks in the order in which states run through them.
    fn order(&self) -> impl Iterator<Item = usize> + Clone {
        let blocks = self.blocks.len();
        (0..blocks).map(move |step| match self.direction {
            Direction::Forward => step,
            Direction::Backward => blocks - 1 - step,
        })
    }
}

/// Query heads of a sample that lie side by side.
struct Part<'a> {
    states: &'a States<'a>,
    sample: usize,
    heads: Range<usize>,
    scratch: &'a mut Scratch,
}

impl WithSimd for Part<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            states: of,
            sample,
            heads,
            scratch,
        } = self;
        let Scratch {
            a: packed_a,
            b: packed_b,
            states,
            ahead,
        } = scratch;
        let States { a, b, blocks, .. } = of;
        let (d, dv) = (a.width(), b.width());
        let row = dv.next_multiple_of(S::F32_LANES);
        states.clear();
        states.resize(heads.len() * d * row, 0.0);
        for ([index, nth], next) in steps(of.order(), heads.len()) {
            let (rows, query) = (&blocks[index], heads.start + nth);
            let (count, head) = (rows.len(), of.head(query));
            let powers = &of.powers[query];
            let state = &mut states[nth * d * row..(nth + 1) * d * row];
            if let Some([index, nth]) = next {
                let at = [sample, blocks[index].start, of.head(heads.start + nth)];
                ahead.want([a.run(at), b.run(at)], blocks[index].len());
            }
            // SAFETY: this part alone has this head, and meets each of its blocks once.
            unsafe { (of.to).meet([sample, query, index], state.chunks_exact(row)) };
            let weights = (0..count).map(|row| match of.direction {
                Direction::Forward => powers.aged(row, count),
                Direction::Backward => powers.reached(row),
            });
            pack::weighted_rows::<S>(packed_a, a.positions(sample, rows, head).zip(weights), d);
            pack::panels::<S>(packed_b, b.positions(sample, rows, head), count, dv);
            let ab = (&**packed_a, &**packed_b);
            hand_on(simd, state, powers, ab, [count, d, dv], ahead);
        }
        // SAFETY: this part alone has these heads, and is at the end once.
        unsafe { (of.to).leave([sample, heads.start], states.chunks_exact(row)) };
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
    multiply(
        simd,
        [d, dv, count],
        Left::columns(a, a_row),
        (b, count),
        (state, row),
        Store::Add,
        ahead,
    );
}
